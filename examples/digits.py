"""Reads handwritten digits: train, validate, keep the best checkpoint, test it, and look at what it got wrong.

The data are the 1,797 scanned digits (8 x 8 pixels) that ship inside scikit-learn, so nothing is downloaded. Run it with

    python examples/digits.py

It takes about ten seconds on two CPU cores and leaves a folder `runs/digits/version_N` with the checkpoints,
`metrics.csv`, TensorBoard events (`tensorboard --logdir runs`) and the picture `results.png`.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import levin
from levin.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from levin.loggers import CSVLogger, TensorBoardLogger


def random_affine(images: Tensor, max_degrees: float = 12.0, max_shift: float = 0.1, max_scale: float = 0.1) -> Tensor:
    """Turns, moves and scales every image of a batch `(N, 1, H, W)` by its own small random amount."""
    num = len(images)
    angle = (torch.rand(num, device=images.device) * 2 - 1) * math.radians(max_degrees)
    scale = 1 + (torch.rand(num, device=images.device) * 2 - 1) * max_scale
    shift = (torch.rand(num, 2, 1, device=images.device) * 2 - 1) * max_shift * 2  # the grid runs from -1 to 1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(num, 2, 2)
    grid = F.affine_grid(torch.cat([rotation, shift], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class DigitsData(levin.LightningDataModule):
    """Everything about the data in one place: where it comes from, how it is split, batched and augmented."""

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        # Runs before each stage. The split depends on the seed alone, so `fit` and `test` always agree on it.
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # 17 grey levels -> 0 to 1
        labels = torch.tensor(labels)
        # `stratify` keeps the ten classes equally frequent in every part.
        seed = self.hparams.seed
        rest, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=seed)
        train, val = train_test_split(rest, test_size=360, stratify=labels[rest], random_state=seed)
        self.train, self.val, self.test = (TensorDataset(images[part], labels[part]) for part in (train, val, test))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=len(self.val))

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=len(self.test))

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        # The batch is on its device by now, so the augmentation runs there, and on the whole batch at once.
        if self.trainer.training:
            images, labels = batch
            return [random_affine(images), labels]
        return batch


class DigitClassifier(levin.LightningModule):
    """A small convolutional network: 8 x 8 pixels -> 4 x 4 -> 2 x 2 -> ten scores."""

    def __init__(self, width: int = 32, learning_rate: float = 3e-3, dropout: float = 0.5) -> None:
        super().__init__()
        # Stores the arguments in `self.hparams`, in the logs and in every checkpoint, so that
        # `DigitClassifier.load_from_checkpoint(path)` needs nothing but the path.
        self.save_hyperparameters()

        def block(num_in: int, num_out: int) -> list[nn.Module]:
            return [nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]

        self.net = nn.Sequential(
            *block(1, width), *block(width, width), nn.MaxPool2d(2),
            *block(width, 2 * width), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 2 * 2, 10),
        )  # fmt: skip
        # One metric object for each stage: it adds up over the batches of an epoch, and stages must not mix.
        self.train_acc, self.val_acc, self.test_acc = (MulticlassAccuracy(10, average="micro") for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        scores = self(images)
        loss = F.cross_entropy(scores, labels)
        self.train_acc.update(scores, labels)
        # Logging the metric object, not its value: the epoch's value is then computed over all samples, not
        # averaged over batches, and the metric is reset afterwards.
        self.log_dict({"train_loss": loss, "train_acc": self.train_acc}, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self(images)
        self.val_acc.update(scores, labels)
        self.log_dict({"val_loss": F.cross_entropy(scores, labels), "val_acc": self.val_acc}, prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self(images)
        self.test_acc.update(scores, labels)
        self.log_dict({"test_loss": F.cross_entropy(scores, labels), "test_acc": self.test_acc})

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=1e-2)
        # Up to the full learning rate and down to nearly zero, a little after every batch. The trainer knows how many
        # steps there will be.
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def read_curves(metrics_csv: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns `{name: [(epoch, value), ...]}`. A cell is empty where that row has no such value."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with metrics_csv.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and row.get("epoch"):
                    curves.setdefault(name, []).append((int(row["epoch"]) + 1, float(value)))
    return curves


def draw(path: Path, curves: dict[str, list[tuple[int, float]]], kept: int, data: TensorDataset, probs: Tensor) -> None:
    """Draws the learning curves and, below them, the test digits that were read wrongly, the surest mistakes first."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file, so it works without a screen
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.2, 2.2])

    loss_axes, accuracy_axes = top.subplots(1, 2)
    for axes, name in ((loss_axes, "loss"), (accuracy_axes, "acc")):
        for part, label, color in (("train", "training (augmented)", "#9aabbd"), ("val", "validation", "#1f5fa8")):
            axes.plot(*zip(*curves[f"{part}_{name}"], strict=True), color=color, label=label, linewidth=1.8)
        axes.axvline(kept, color="#c8502d", linewidth=1, linestyle="--", label=f"kept: epoch {kept}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    loss_axes.set(title="Cross-entropy", xlabel="epoch", yscale="log")
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylim=(0.9, 1.003))
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    accuracy_axes.legend(frameon=False, loc="lower right")

    images, labels = data.tensors
    confidence, guesses = probs.max(dim=1)
    wrong = (guesses != labels).nonzero().flatten()
    shown = wrong[confidence[wrong].argsort(descending=True)][:8].tolist()
    more = f", the {len(shown)} surest of them" if len(shown) < len(wrong) else ""
    bottom.suptitle(f"{len(wrong)} of {len(labels)} test digits read wrongly{more}", fontsize=12)
    cells = bottom.subplots(1, 8)
    first = (len(cells) - len(shown)) // 2  # centred
    for index, axes in zip(shown, cells[first:], strict=False):
        axes.imshow(images[index, 0], cmap="gray_r", vmin=0, vmax=1, extent=(0, 8, 8, 0))
        axes.add_patch(plt.Rectangle((0, 0), 8, 8, fill=False, edgecolor="#b8b8b8", clip_on=False))
        axes.set_title(f"{labels[index]} read as {guesses[index]}\n{confidence[index]:.0%} sure", fontsize=10)
    for axes in cells:
        axes.axis("off")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> float:
    """Trains and tests; returns the test accuracy."""
    parser = argparse.ArgumentParser(description="Trains a small convolutional network on handwritten digits.")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights, the order and the augmentation")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run folder goes (default: runs)")
    args = parser.parse_args(argv)

    started = time.perf_counter()
    levin.seed_everything(args.seed)
    data = DigitsData(seed=args.seed)
    model = DigitClassifier()

    csv_logger = CSVLogger(args.out, name="digits")  # takes the next free version_N,
    tensorboard = TensorBoardLogger(args.out, name="digits", version=csv_logger.version)  # and this one joins it
    best = ModelCheckpoint(monitor="val_acc", mode="max", filename="{epoch:02d}-{val_acc:.4f}", save_last=True)
    trainer = levin.Trainer(
        max_epochs=args.max_epochs,
        log_every_n_steps=10,
        logger=[csv_logger, tensorboard],
        callbacks=[best, EarlyStopping(monitor="val_loss", patience=15), LearningRateMonitor("epoch")],
    )
    trainer.fit(model, datamodule=data)
    num_epochs = trainer.current_epoch
    run_dir = Path(trainer.log_dir)
    curves = read_curves(run_dir / "metrics.csv")
    kept = max(curves["val_acc"], key=lambda point: point[1])[0]  # as ModelCheckpoint: the first of equals

    # `ckpt_path="best"` first loads the checkpoint with the highest validation accuracy.
    (val,) = trainer.validate(model, datamodule=data, ckpt_path="best", verbose=False)
    (test,) = trainer.test(model, datamodule=data, ckpt_path="best", verbose=False)
    probs = torch.cat(trainer.predict(model, datamodule=data, ckpt_path="best"))
    draw(run_dir / "results.png", curves, kept, data.test, probs)

    table = Table("part", title=f"Handwritten digits, seed {args.seed}")
    for column in ("digits", "wrong", "accuracy", "cross-entropy"):
        table.add_column(column, justify="right")
    for part, num, accuracy, loss in (
        ("validation", len(data.val), val["val_acc"], val["val_loss"]),
        ("test", len(data.test), test["test_acc"], test["test_loss"]),
    ):
        table.add_row(part, str(num), str(round((1 - accuracy) * num)), f"{accuracy:.2%}", f"{loss:.4f}")
    console = Console()
    console.print(table)
    console.print(f"epoch {kept} of {num_epochs} kept, {time.perf_counter() - started:.0f} s in all", highlight=False)
    for name, path in (("checkpoint", best.best_model_path), ("picture", run_dir / "results.png")):
        print(f"{name:<12}{Path(path)}")
    print(f"{'curves':<12}tensorboard --logdir {args.out}")
    return test["test_acc"]


if __name__ == "__main__":
    main()
