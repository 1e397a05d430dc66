"""The demos on the Trainer, and beside Lightning's own."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import levin
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


@pytest.mark.parametrize("name", ["BoringDataModule", "BoringDataModuleNoLen", "IterableBoringDataModule"])
def test_the_rows_of_each_stage_are_those_of_lightning(name):
    import lightning.pytorch.demos.boring_classes as theirs

    rows = []
    for module in (boring_classes, theirs):
        torch.manual_seed(0)
        data, found = getattr(module, name)(), {}
        found["sizes"] = [len(each) for each in vars(data).values() if isinstance(each, torch.utils.data.Dataset)]
        for stage, names in {
            "fit": ["train", "val"],
            "validate": ["val"],
            "test": ["test"],
            "predict": ["predict"],
        }.items():
            data.setup(stage)
            for each in names:
                loaders = getattr(data, f"{each}_dataloader")()
                loaders = loaders if isinstance(loaders, list) else [loaders]
                found[stage, each] = [torch.cat(list(loader)) for loader in loaders]
        rows.append(found)
    assert rows[0].keys() == rows[1].keys()
    assert rows[0].pop("sizes") == rows[1].pop("sizes")
    for stage, ours in rows[0].items():
        assert [torch.equal(*pair) for pair in zip(ours, rows[1][stage], strict=True)] == [True] * len(ours), stage


@pytest.mark.parametrize("name", ["BoringModel", "ManualOptimBoringModel", "DemoModel"])
def test_steps_loaders_and_optimizers_are_those_of_lightning(name, tmp_path: Path):
    import lightning.pytorch
    import lightning.pytorch.demos.boring_classes as theirs

    found = []
    for framework, module in ((levin, boring_classes), (lightning.pytorch, theirs)):
        torch.manual_seed(0)
        model = getattr(module, name)()
        data = torch.utils.data.DataLoader(torch.randn(6, 32), batch_size=2)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        settings = {**quiet, "accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": tmp_path}
        run = framework.Trainer(**settings, limit_val_batches=0)
        run.fit(model, data)
        seen = [model.state_dict(), run.optimizers[0].state_dict()["param_groups"]]
        seen += [config.scheduler.state_dict() for config in run.lr_scheduler_configs]
        if name == "BoringModel":
            batch = torch.randn(3, 32)
            seen += [model.training_step(batch, 0), model.validation_step(batch, 0), model.test_step(batch, 0)]
            seen += [model.loss(batch), model.loss(batch, batch * 2)]
            for stage in ("train", "val", "test", "predict"):
                torch.manual_seed(1)
                seen.append(torch.cat(list(getattr(model, f"{stage}_dataloader")())))
        found.append(seen)
    torch.testing.assert_close(*([_plain(each) for each in seen] for seen in found), rtol=0, atol=0)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if isinstance(each, (dict, torch.Tensor, int, float))}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def pairs():
    """Yield the demos of levin and of Lightning that have one name."""
    for room in ("boring_classes", "lstm", "transformer", "mnist_datamodule"):
        ours, theirs = (importlib.import_module(f"{root}.demos.{room}") for root in ("levin", "lightning.pytorch"))
        for name, kind in vars(ours).items():
            if inspect.isclass(kind) and kind.__module__ == ours.__name__ and hasattr(theirs, name) and name != "MNIST":
                yield kind, getattr(theirs, name)


def test_what_the_demos_are_made_with_is_what_lightnings_are_made_with():
    compared = set()
    for ours, theirs in pairs():
        defaults = [
            {each.name: each.default for each in inspect.signature(kind).parameters.values()} for kind in (ours, theirs)
        ]
        assert defaults[0] == defaults[1], ours
        if issubclass(ours, torch.nn.Module):
            arguments = (
                {"vocab_size": 50} if "vocab_size" in defaults[0] else {"dim": 6} if "dim" in defaults[0] else {}
            )
            assert repr(ours(**arguments)) == repr(theirs(**arguments))
        compared.add(ours.__name__)
    assert len(compared) == 20


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
    results = [module(words, module.init_hidden(3)) for module in (ours, other)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    drawn = []
    for kind in (lstm.SimpleLSTM, SimpleLSTM):
        torch.manual_seed(3)
        drawn.append(dict(kind(9, 4, 4, 2).named_parameters()))
    torch.testing.assert_close(
        *({name: value.detach() for name, value in each.items()} for each in drawn), rtol=0, atol=0
    )


def test_the_transformer_computes_what_lightnings_does():
    import lightning.pytorch.demos.transformer as theirs

    words, target = torch.randint(9, (2, 5)), torch.randint(9, (2, 5))
    ours, other = (module.LightningTransformer(9) for module in (transformer, theirs))
    ours.load_state_dict(other.state_dict())
    for module in (ours.eval(), other.eval()):
        # Lightning's gives all places of a sequence the code of one.
        module.model.pos_encoder = torch.nn.Identity()
    mask = torch.zeros(5, 5)
    for given in ((words, target), (words, target, mask)):
        torch.testing.assert_close(ours.model(*given), other.model(*given))
    torch.testing.assert_close(ours(words, target), other(words, target))
    torch.testing.assert_close(ours.training_step((words, target), 0), other.training_step((words, target), 0))
    groups = [module.configure_optimizers().state_dict()["param_groups"] for module in (ours, other)]
    assert groups[0] == groups[1]
    assert torch.equal(*(module.model.generate_square_subsequent_mask(3) for module in (ours, other)))


def test_each_place_has_a_code_of_its_own():
    code = transformer.PositionalEncoding(6).eval()(torch.ones(2, 4, 6)) - 1
    angles = [[place / 10000 ** (pair * 2 / 6) for pair in range(3)] for place in range(4)]
    expected = [[value for angle in row for value in (math.sin(angle), math.cos(angle))] for row in angles]
    torch.testing.assert_close(code, torch.tensor([expected, expected]))


def test_the_lstm_carries_its_state_through_an_epoch(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = lstm.LightningLSTM(9)
    module.model = lstm.SimpleLSTM(9, 4, 4, 2).eval()
    words, target = torch.randint(9, (3, 5)), torch.randint(9, (3, 5))
    logged = []
    module.log = lambda *args, **kwargs: logged.append((args, kwargs))
    before = module.model.init_hidden(3)
    for _ in range(2):
        output, state = module.model(words, before)
        loss = module.training_step((words, target), 0)
        torch.testing.assert_close(loss, torch.nn.functional.nll_loss(output, target.flatten()))
        torch.testing.assert_close(module.hidden, state)
        assert not any(part.requires_grad for part in module.hidden)
        before = state
    assert logged[1][0][0] == "train_loss" and logged[1][1] == {"prog_bar": True}
    module.on_train_epoch_end()
    assert module.hidden is None
    assert module.configure_optimizers().defaults["lr"] == 20.0
    module.prepare_data()
    block, following = next(iter(module.train_dataloader()))
    assert block.shape == following.shape == (20, 35)
    sampler = module.train_dataloader().batch_sampler
    assert len(sampler) == len(transformer.WikiText2()) // 20 == sum(1 for _ in sampler)


@pytest.mark.parametrize("kind", [lstm.LightningLSTM, transformer.LightningTransformer])
def test_language_models_learn_from_a_made_up_text(kind, tmp_path: Path, monkeypatch, caplog):
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
    with caplog.at_level(logging.INFO, logger="levin"):
        run.fit(module)
    told = "wikitext-2.txt is made up. Put the text of WikiText-2 there to train on real language."
    assert [message.endswith(told) for message in caplog.messages].count(True) == 1
    assert losses[-1] < losses[0]
    lines = (tmp_path / "data" / "wikitext-2.txt").read_text().splitlines()
    # The same every time.
    assert len(lines) == 2000 and len({word for line in lines for word in line.split()}) == 458
    assert (lines[0], lines[-1]) == (
        "ioo ir esntnae sira onsle tniiae slr onero",
        "re aooo llte olatns si loni oeetn eroer et lo inoinel",
    )


def test_words_and_blocks(tmp_path: Path):
    (tmp_path / "wikitext-2.txt").write_text("the cat sat\n\non the mat\n" * 3)
    words, dictionary = transformer.tokenize(tmp_path / "wikitext-2.txt")
    assert words[:9].tolist() == [0, 1, 2, 3, 3, 4, 0, 5, 3] and len(dictionary) == 6
    assert dictionary.idx2word == ["the", "cat", "sat", "<eos>", "on", "mat"] and dictionary.add_word("cat") == 1
    data = transformer.WikiText2(tmp_path, block_size=4, download=False)
    assert len(data) == 27 // 4 - 1 and data.vocab_size == 6
    block, following = data[1]
    assert torch.equal(block, words[4:8]) and torch.equal(following, words[5:9])
    with pytest.raises(FileNotFoundError):
        transformer.WikiText2(tmp_path / "none", download=False)


def test_images_can_be_told_apart_without_a_network(tmp_path: Path, caplog):
    data = mnist_datamodule.MNISTDataModule(str(tmp_path), num_workers=0, batch_size=64, normalize=True)
    with caplog.at_level(logging.INFO, logger="levin"):
        data.prepare_data()
    folder = tmp_path / "MNIST" / "complete"
    assert f"There are no images in {folder}: made-up ones take their place." in caplog.messages
    data.setup("fit")
    assert not hasattr(data, "dataset_test")
    data.setup("test")
    assert data.num_classes == 10 and data.default_transforms is None
    assert data.dataset_val.indices[:3] == [55299, 34709, 13174]
    for loader, dataset, is_training in (
        (data.train_dataloader(), data.dataset_train, True), (data.val_dataloader(), data.dataset_val, False),
        (data.test_dataloader(), data.dataset_test, False),
    ):  # fmt: skip
        assert loader.dataset is dataset and loader.drop_last is is_training
        assert isinstance(loader.sampler, torch.utils.data.RandomSampler) is is_training
        assert (loader.batch_size, loader.num_workers, loader.pin_memory) == (64, 0, torch.cuda.is_available())
    assert (len(data.dataset_train), len(data.dataset_val), len(data.dataset_test)) == (55_000, 5_000, 10_000)
    train_images, train_classes = next(iter(data.train_dataloader()))
    means = torch.stack([train_images[train_classes == label].mean(0) for label in range(10)])
    images, classes = next(iter(data.test_dataloader()))
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == classes).float().mean() > 0.9
    with pytest.raises(RuntimeError, match="not there"):
        mnist_datamodule.MNIST(str(tmp_path), download=False)


def test_made_up_images_are_the_same_every_time():
    images, classes = mnist_datamodule.made_up_digits(5, seed=1)
    assert classes.tolist() == [5, 9, 4, 8, 3]
    assert images.long().sum() == 356129 and images[0, 0, :8].tolist() == [73, 11, 5, 47, 160, 240, 193, 236]


def test_images_of_a_folder_are_used(tmp_path: Path, caplog):
    folder = Path(mnist_datamodule.MNIST(str(tmp_path)).cached_folder_path)
    folder.mkdir(parents=True)
    torch.save((torch.full((3, 28, 28), 51, dtype=torch.uint8), torch.arange(3)), folder / "test.pt")
    image, label = mnist_datamodule.MNIST(str(tmp_path), train=False, download=False)[2]
    assert image.shape == (1, 28, 28) and image.max() == pytest.approx(0.2) and label == 2
    scaled = mnist_datamodule.MNIST(str(tmp_path), False, (0.1, 0.5), transform=lambda image: image + 1)
    assert len(scaled) == 3 and scaled[1][0].unique().item() == pytest.approx(1.2) and scaled[1][1] == 1
    torch.save((torch.full((4, 28, 28), 51, dtype=torch.uint8), torch.arange(4)), folder / "training.pt")

    class Doubled(mnist_datamodule.MNISTDataModule):
        default_transforms = staticmethod(lambda image: image * 2)

    data = Doubled(str(tmp_path), val_split=1, num_workers=0)
    with caplog.at_level(logging.INFO, logger="levin"):
        data.prepare_data()
    assert caplog.messages == []
    data.setup("validate")
    data.setup("predict")
    assert (len(data.dataset_train), len(data.dataset_val), len(data.dataset_test)) == (3, 1, 3)
    assert data.dataset_val[0][0].unique().item() == pytest.approx(0.4)


def test_every_name_is_there():
    assert all(getattr(levin.demos, name) is not None for name in levin.demos.__all__)
