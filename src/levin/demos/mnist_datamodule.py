"""Images of 28 x 28 in ten classes: MNIST where its files are, else made-up ones. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, random_split
from typing_extensions import override

from levin.datamodule import LightningDataModule
from levin.utilities.rank_zero import rank_zero_info

Sample = tuple[Tensor, int]
MEAN, STD = 0.1307, 0.3081


class MNIST(Dataset[Sample]):
    """The digits that lie in ``root/MNIST/complete``, as ``training.pt`` and ``test.pt``; without them, made-up images.

    Args:
        root: Folder.
        train: Whether the 60,000 images for training, or the 10,000 for the test.
        normalize: Mean and standard deviation that the images are shifted and scaled by, of values from 0 to 255.
        download: Whether images may be made up.
        transform: Called with an image, a float tensor of shape (1, 28, 28) with values from 0 to 1.

    Raises:
        RuntimeError: There are no files and ``download`` is False.
    """

    TRAIN_FILE_NAME = "training.pt"
    TEST_FILE_NAME = "test.pt"

    def __init__(
        self,
        root: str,
        train: bool = True,
        normalize: tuple[float, float] | None = None,
        download: bool = True,
        transform: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self.root: str = root
        self.train: bool = train
        self.normalize: tuple[float, float] | None = normalize
        self._transform: Callable[[Tensor], Tensor] | None = transform
        file = Path(self.cached_folder_path) / (self.TRAIN_FILE_NAME if train else self.TEST_FILE_NAME)
        if file.is_file():
            self.data, self.targets = torch.load(file, weights_only=True)
        elif download:
            self.data, self.targets = made_up_digits(60_000 if train else 10_000, seed=int(train))
        else:
            raise RuntimeError(f"{file} is not there. Put MNIST there, or pass download=True for made-up images.")

    @property
    def cached_folder_path(self) -> str:
        """Folder of the files."""
        return str(Path(self.root) / "MNIST" / "complete")

    def __getitem__(self, index: int) -> Sample:
        image = self.data[index].float().unsqueeze(0) / 255
        if self.normalize is not None:
            image = (image - self.normalize[0]) / self.normalize[1]
        return (image if self._transform is None else self._transform(image)), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.data)


def made_up_digits(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images of ten classes that a model can tell apart, the same every time.

    Args:
        number: How many.
        seed: Of the noise and the order.

    Returns:
        Bytes of shape (number, 28, 28), and the classes.

    Example:
        >>> images, classes = made_up_digits(5, seed=0)
        >>> images.shape, images.dtype, len(classes)
        (torch.Size([5, 28, 28]), torch.uint8, 5)
    """
    shapes = torch.rand(10, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.7
    pictures = shapes.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2).to(torch.uint8) * 160
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(10, (number,), generator=generator)
    noise = torch.randint(96, (number, 28, 28), generator=generator, dtype=torch.uint8)
    return pictures[classes] + noise, classes


class MNISTDataModule(LightningDataModule):
    """Loaders for training, validation and test over :class:`MNIST`.

    Args:
        data_dir: Folder of the files, if there are any.
        val_split: Images of the training that go to the validation.
        num_workers: Workers of each loader.
        normalize: Whether to shift and scale the images to mean 0 and standard deviation 1.
        seed: Of the split.
        batch_size: Images in a batch.

    Example:
        >>> data = MNISTDataModule(batch_size=8, num_workers=0)
        >>> data.setup("test")
        >>> images, classes = next(iter(data.test_dataloader()))
        >>> images.shape
        torch.Size([8, 1, 28, 28])
    """

    name = "mnist"

    def __init__(
        self,
        data_dir: str = "./data",
        val_split: int = 5000,
        num_workers: int = 16,
        normalize: bool = False,
        seed: int = 42,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.data_dir: str = data_dir
        self.val_split: int = val_split
        self.num_workers: int = num_workers
        self.normalize: bool = normalize
        self.seed: int = seed
        self.batch_size: int = batch_size

    @property
    def num_classes(self) -> int:
        """Ten."""
        return 10

    @property
    def default_transforms(self) -> Callable[[Tensor], Tensor] | None:
        """Called with each image; None leaves it. Override it to change the images."""
        return None

    def _images(self, train: bool) -> MNIST:
        normalize = (MEAN, STD) if self.normalize else None
        return MNIST(self.data_dir, train=train, normalize=normalize, transform=self.default_transforms)

    @override
    def prepare_data(self) -> None:
        folder = MNIST(self.data_dir, train=False).cached_folder_path
        if not (Path(folder) / MNIST.TRAIN_FILE_NAME).is_file():
            rank_zero_info(f"There are no images in {folder}: made-up ones take their place.")

    @override
    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate"):
            images = self._images(train=True)
            lengths = [len(images) - self.val_split, self.val_split]
            generator = torch.Generator().manual_seed(self.seed)
            self.dataset_train, self.dataset_val = random_split(images, lengths, generator=generator)
        if stage in ("test", "predict"):
            self.dataset_test = self._images(train=False)

    def _loader(self, dataset: Dataset[Sample], for_training: bool = False) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=for_training,
            num_workers=self.num_workers,
            drop_last=for_training,
            pin_memory=torch.cuda.is_available(),
        )

    @override
    def train_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.dataset_train, for_training=True)

    @override
    def val_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.dataset_val)

    @override
    def test_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.dataset_test)
