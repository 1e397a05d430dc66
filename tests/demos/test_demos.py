"""The demos on the Trainer, and beside Lightning's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import levin.demos
from levin import Trainer
from levin.demos import boring_classes, lstm, mnist_datamodule, transformer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*does not have many workers")


def trainer(**settings: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **settings})


@pytest.mark.parametrize("model", [boring_classes.BoringModel, boring_classes.ManualOptimBoringModel])
@pytest.mark.parametrize(
    "data",
    [None, boring_classes.BoringDataModule, boring_classes.BoringDataModuleNoLen],
)
def test_boring_models_run_every_stage(model, data):
    run, module = trainer(limit_train_batches=5, limit_val_batches=2, limit_test_batches=2), model()
    before = module.layer.weight.clone()
    datamodule = None if data is None else data()
    run.fit(module, datamodule=datamodule)
    assert run.global_step == 5 and not torch.equal(before, module.layer.weight)
    run.validate(module, datamodule=datamodule, verbose=False)
    run.test(module, datamodule=datamodule, verbose=False)
    assert len(run.predict(module, datamodule=datamodule)) == 64


def test_two_loaders_of_each_stage():
    data = boring_classes.IterableBoringDataModule()
    for stage, length in (("fit", 16), ("validate", 32), ("test", 64), ("predict", 128)):
        data.setup(stage)
        loaders = getattr(data, f"{stage.replace('fit', 'train').replace('validate', 'val')}_dataloader")()
        assert [sum(1 for _ in loader) for loader in loaders] == [length, length]


@pytest.mark.parametrize("name", ["SimpleLSTM", "Transformer"])
def test_language_models_have_the_parameters_of_lightnings(name):
    pytest.importorskip("lightning.pytorch")
    import lightning.pytorch.demos as theirs

    arguments = {"vocab_size": 20, "ninp": 8, "nhid": 6, "nlayers": 2}
    their_state = getattr(theirs, name)(**arguments).state_dict()
    module = getattr(levin.demos, name)(**arguments)
    module.load_state_dict(their_state)


def test_numbers_are_those_of_lightning():
    import lightning.pytorch.demos.boring_classes as theirs
    from lightning.pytorch.demos import SimpleLSTM

    for mine, other in (
        (boring_classes.Net(), theirs.Net()),
        (boring_classes.BoringModel(), theirs.BoringModel()),
        (boring_classes.DemoModel(), theirs.DemoModel()),
    ):
        mine.load_state_dict(other.state_dict())
        sample = torch.randn(2, 1, 28, 28) if isinstance(mine, boring_classes.Net) else torch.randn(2, 32)
        assert torch.equal(mine.eval()(sample), other.eval()(sample))
        if not isinstance(mine, boring_classes.Net):
            ours, expected = mine.training_step(sample, 0), other.training_step(sample, 0)
            assert ours == expected
    for name in ("RandomDataset", "RandomDictDataset", "RandomIterableDataset", "RandomIterableDatasetWithLen"):
        rows = []
        for module in (boring_classes, theirs):
            torch.manual_seed(0)
            dataset = getattr(module, name)(3, 4)
            rows.append([row["b"] if isinstance(row, dict) else row for row in map(dataset.__getitem__, range(4))]
                        if not name.startswith("RandomIterable") else list(dataset))  # fmt: skip
        assert torch.equal(torch.stack(rows[0]), torch.stack(rows[1]))
    ours, other = lstm.SimpleLSTM(9, 4, 4, 2).eval(), SimpleLSTM(9, 4, 4, 2).eval()
    ours.load_state_dict(other.state_dict())
    words = torch.randint(9, (3, 5))
    assert torch.equal(ours(words, ours.init_hidden(3))[0], other(words, other.init_hidden(3))[0])


@pytest.mark.parametrize("kind", [lstm.LightningLSTM, transformer.LightningTransformer])
def test_language_models_learn_from_a_made_up_text(kind, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = kind(vocab_size=600)
    if kind is lstm.LightningLSTM:
        module.model = lstm.SimpleLSTM(600, 16, 16, 1, dropout=0.0)
    else:
        module.model = transformer.Transformer(600, 16, 2, 16, 1)
    losses = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: losses.append(step(batch, batch_idx)) or losses[-1]
    run = trainer(limit_train_batches=30, limit_val_batches=0)
    run.fit(module)
    assert losses[-1] < losses[0]
    assert (tmp_path / "data" / "wikitext-2.txt").is_file()


def test_words_and_blocks(tmp_path: Path):
    (tmp_path / "wikitext-2.txt").write_text("the cat sat\n\non the mat\n" * 3)
    words, dictionary = transformer.tokenize(tmp_path / "wikitext-2.txt")
    assert words[:9].tolist() == [0, 1, 2, 3, 3, 4, 0, 5, 3] and len(dictionary) == 6
    data = transformer.WikiText2(tmp_path, block_size=4, download=False)
    assert len(data) == 27 // 4 - 1 and data.vocab_size == 6
    block, following = data[1]
    assert torch.equal(block[1:], following[:-1])
    with pytest.raises(FileNotFoundError):
        transformer.WikiText2(tmp_path / "none", download=False)


def test_positions_differ_within_a_sequence():
    code = transformer.PositionalEncoding(6).eval()(torch.zeros(2, 4, 6))
    assert torch.equal(code[0], code[1])
    assert len({tuple(row) for row in code[0].tolist()}) == 4


def test_images_can_be_told_apart_without_a_network(tmp_path: Path):
    data = mnist_datamodule.MNISTDataModule(str(tmp_path), num_workers=0, batch_size=64, normalize=True)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert (len(data.dataset_train), len(data.dataset_val), len(data.dataset_test)) == (55_000, 5_000, 10_000)
    train_images, train_classes = next(iter(data.train_dataloader()))
    means = torch.stack([train_images[train_classes == label].mean(0) for label in range(10)])
    images, classes = next(iter(data.test_dataloader()))
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == classes).float().mean() > 0.9
    with pytest.raises(RuntimeError, match="not there"):
        mnist_datamodule.MNIST(str(tmp_path), download=False)


def test_images_of_a_folder_are_used(tmp_path: Path):
    folder = Path(mnist_datamodule.MNIST(str(tmp_path)).cached_folder_path)
    folder.mkdir(parents=True)
    torch.save((torch.full((3, 28, 28), 51, dtype=torch.uint8), torch.arange(3)), folder / "test.pt")
    image, label = mnist_datamodule.MNIST(str(tmp_path), train=False, download=False)[2]
    assert image.shape == (1, 28, 28) and image.max() == pytest.approx(0.2) and label == 2


def test_every_name_is_there():
    assert all(getattr(levin.demos, name) is not None for name in levin.demos.__all__)
