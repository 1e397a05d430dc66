"""load_from_checkpoint on Lightning and on levin, each with files of its own and of the other."""

from __future__ import annotations

import csv
import io
import warnings
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import levin.loading
from tests.parity import both
from tests.parity.test_hparams_forms import plain

FRAMEWORKS = {"lightning": both.lightning, "levin": both.levin}


def classes(framework: SimpleNamespace) -> SimpleNamespace:
    Module = framework.LightningModule

    class Net(Module):
        def __init__(self, width, depth=2, note=None):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(4, width)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Open(Net):
        def __init__(self, width, **options):
            super().__init__(width)
            self.save_hyperparameters()
            self.options = options

    class Around(Net):
        """Has a way of its own to be loaded, as modules of packages have that save more than weights (chemprop)."""

        @classmethod
        def load_from_checkpoint(cls, path, *args, **kwargs):
            found = super().load_from_checkpoint(path, *args, **kwargs)
            found.other = "loaded"
            return found

    class Conf(Module):
        def __init__(self, conf, depth=2):
            super().__init__()
            self.save_hyperparameters(conf)
            self.layer = torch.nn.Linear(4, self.hparams["width"])
            self.conf = conf

        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

    class Unsaved(Module):
        def __init__(self, width=2):
            super().__init__()
            self.layer = torch.nn.Linear(4, width)

        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

    class Needs(Unsaved):
        def __init__(self, width, other):
            super().__init__(width)
            self.save_hyperparameters("width")
            self.other = other

    class Lazy(Module):
        def __init__(self, width):
            super().__init__()
            self.save_hyperparameters()
            self.layer = None
            self.seen = []

        def configure_model(self):
            self.seen.append("configure_model")
            if self.layer is None:
                self.layer = torch.nn.Linear(4, self.hparams.width)

        def on_load_checkpoint(self, checkpoint):
            self.seen.append(("on_load_checkpoint", sorted(checkpoint), plain(checkpoint.get("hyper_parameters"))))
            checkpoint["state_dict"]["layer.bias"] = torch.full((self.hparams.width,), 7.0)

        def load_state_dict(self, state, strict=True, assign=False):
            self.seen.append(("load_state_dict", strict))
            return super().load_state_dict(state, strict=strict)

        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

    class Data(framework.DataModule):
        def __init__(self, size, shuffle=False, **options):
            super().__init__()
            self.save_hyperparameters()
            self.position = 0

        def train_dataloader(self):
            return both.loader(1)

        def state_dict(self):
            return {"position": 5}

        def load_state_dict(self, state):
            self.position = state["position"]

    return SimpleNamespace(
        Net=Net, Around=Around, Open=Open, Conf=Conf, Unsaved=Unsaved, Needs=Needs, Lazy=Lazy, Data=Data
    )  # fmt: skip


def saved(framework: SimpleNamespace, folder: Path, name: str, *args: Any, **kwargs: Any) -> Path:
    """A checkpoint of a trained module of the class ``name``, with a data module in it."""
    kinds = classes(framework)
    path = folder / f"{framework.name}-{name}.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        module = getattr(kinds, name)(*args, **kwargs)
        trainer = both.quiet(framework, folder, max_epochs=1)
        trainer.fit(module, datamodule=kinds.Data(3, colour="red"))
        trainer.save_checkpoint(path)
    return path


def loaded(
    framework: SimpleNamespace, name: str, path: Any, *args: Any, before: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """What a user sees of a loaded object, or of the failure."""
    kind = getattr(classes(framework), name)
    if before is not None:
        before(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = kind.load_from_checkpoint(path, *args, **kwargs)
        except Exception as error:
            both.caught(error)
            return {"error": type(error).__name__}
    weights = {}
    if isinstance(found, torch.nn.Module):
        weights = {
            key: (str(value.device), value.dtype, value.flatten().tolist()) for key, value in found.state_dict().items()
        }
    return {
        "hparams": plain(found.hparams), "weights": weights, "training": getattr(found, "training", None),
        "own": {key: plain(getattr(found, key, None)) for key in ("options", "conf", "other", "seen", "position")},
        "warnings": sorted(warning.category.__name__ for warning in caught),
    }  # fmt: skip


def assert_loads_alike(
    tmp_path: Path, name: str, args: tuple = (), kwargs: Any = None, *how: Any, as_name: str = "", **more: Any
) -> None:
    """Each framework loads the file of each, and all four see the same."""
    results = {}
    for writer, make in FRAMEWORKS.items():
        path = saved(make(), tmp_path, name, *args, **(kwargs or {}))
        for reader, other in FRAMEWORKS.items():
            results[writer, reader] = loaded(other(), as_name or name, path, *how, **more)
    first = results["lightning", "lightning"]
    for pair, result in results.items():
        if "own" in first and first["own"]["seen"] and pair[0] == "levin":
            # Files of levin hold one key more.
            strip = [
                [s[0], [k for k in s[1] if k != "levin"], s[2]] if s[0] == "on_load_checkpoint" else s
                for s in result["own"]["seen"]
            ]
            expected = [list(s) if s[0] == "on_load_checkpoint" else s for s in first["own"]["seen"]]
            assert strip == expected
            result["own"]["seen"] = first["own"]["seen"]
        assert result == first, pair


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.lightning_raises("RuntimeError", "TypeError")
@pytest.mark.parametrize(
    ("name", "args", "kwargs", "how"),
    [
        ("Net", (3,), {}, {}),
        ("Net", (3,), {"depth": 5, "note": [1, {"a": 2}]}, {}),
        ("Net", (3,), {}, {"depth": 9}),
        ("Net", (3,), {}, {"width": 4}),
        ("Around", (3,), {}, {"depth": 9}),
        ("Open", (3,), {"colour": "red"}, {}),
        ("Open", (3,), {"colour": "red"}, {"colour": "blue", "unknown": 1}),
        ("Conf", ({"width": 3},), {}, {}),
        ("Conf", ({"width": 3},), {}, {"extra": 1}),
        ("Conf", ({"width": 3},), {}, {"depth": 5}),
        ("Conf", ({"width": 3},), {}, {"conf": {"width": 3, "new": 1}}),
        ("Conf", (Namespace(width=3),), {}, {}),
        ("Unsaved", (), {}, {}),
        ("Unsaved", (), {}, {"width": 2}),
        ("Unsaved", (3,), {}, {}),
        ("Unsaved", (3,), {}, {"width": 3}),
        ("Needs", (3, 1), {}, {}),
        ("Needs", (3, 1), {}, {"other": 2}),
        ("Lazy", (3,), {}, {}),
        ("Lazy", (3,), {}, {"width": 3}),
    ],
    ids=str,
)
def test_modules_and_their_arguments(tmp_path, name, args, kwargs, how):
    assert_loads_alike(tmp_path, name, args, kwargs, **how)


def test_an_argument_that_there_is_not_is_left_out(tmp_path):
    """Differs on purpose: Lightning leaves it out silently, levin says so."""
    path = saved(both.lightning(), tmp_path, "Net", 3)
    theirs, ours = (loaded(framework, "Net", path, unknown=1) for framework in (both.lightning(), both.levin()))
    assert theirs.pop("warnings") == []
    assert ours.pop("warnings") == ["UserWarning"]
    assert ours == theirs


@pytest.mark.lightning_raises("UnpicklingError")
@pytest.mark.parametrize("weights_only", [None, False])
def test_omegaconf_hparams(tmp_path, weights_only):
    assert_loads_alike(tmp_path, "Conf", (OmegaConf.create({"width": 3}),), weights_only=weights_only)


@pytest.mark.parametrize(
    "location",
    [None, "cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda storage, place: storage],
    ids=["none", "string", "device", "dict", "function"],
)
def test_map_location(tmp_path, location):
    assert_loads_alike(tmp_path, "Net", (3,), map_location=location)


@pytest.mark.parametrize("place", ["cuda:0", "cuda:7", "mps", "xla:0"])
def test_weights_of_a_device_that_is_not_there_come_to_the_cpu(tmp_path, monkeypatch, place):
    path = saved(both.levin(), tmp_path, "Net", 3)
    checkpoint = torch.load(path, weights_only=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: place)
        torch.save(checkpoint, path)
    for framework in (both.lightning(), both.levin()):
        result = loaded(framework, "Net", path)
        assert {device for device, _, _ in result["weights"].values()} == {"cpu"}, framework.name


def without_bias(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"]["layer.bias"]


def with_more(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["more"] = torch.zeros(1)


def with_another_shape(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["layer.weight"] = torch.zeros(5, 4)


@pytest.mark.lightning_raises("RuntimeError", "ValueError")
@pytest.mark.parametrize("change", [None, without_bias, with_more, with_another_shape])
@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize("strict_loading", [None, True, False])
def test_strictness(tmp_path, change, strict, strict_loading):
    path = saved(both.lightning(), tmp_path, "Net", 3)
    checkpoint = torch.load(path, weights_only=False)
    if change is not None:
        change(checkpoint)
    torch.save(checkpoint, path)

    def before(kind: Any) -> None:
        if strict_loading is not None:
            original = kind.__init__

            def init(self, width, depth=2, note=None):
                original(self, width, depth, note)
                self.strict_loading = strict_loading

            kind.__init__ = init

    theirs, ours = (loaded(f, "Net", path, strict=strict, before=before) for f in (both.lightning(), both.levin()))
    for result in (theirs, ours):
        if "weights" in result and change is without_bias:
            result["weights"].pop("layer.bias")  # drawn at random
    assert ours == theirs


@pytest.mark.lightning_raises("RuntimeError")
def test_the_strictness_of_a_module_holds_for_the_trainer_too(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        path = saved(framework, tmp_path, "Net", 3)
        checkpoint = torch.load(path, weights_only=False)
        without_bias(checkpoint)
        torch.save(checkpoint, path)
        for strict_loading in (None, True, False):
            module = classes(framework).Net(3)
            assert module.strict_loading is True
            if strict_loading is not None:
                module.strict_loading = strict_loading
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    both.quiet(framework, tmp_path, max_epochs=1).fit(module, both.loader(1), ckpt_path=path)
                    results.append((framework.name, strict_loading, None))
                except Exception as error:
                    both.caught(error)
                    results.append((framework.name, strict_loading, type(error).__name__))
    half = len(results) // 2
    assert [entry[1:] for entry in results[:half]] == [entry[1:] for entry in results[half:]]


VALUES = {"width": 3, "depth": 4, "note": "text", "other": [1, 2]}


def write_yaml(path: Path) -> None:
    path.write_text(yaml.safe_dump(VALUES))


def write_csv(path: Path) -> None:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "value"])
        rows.writerows(VALUES.items())


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("h.yaml", write_yaml),
        ("h.yml", write_yaml),
        ("h.csv", write_csv),
        ("h.json", write_yaml),
        ("h.txt", write_csv),
        ("h.YAML", write_yaml),
    ],
)
@pytest.mark.parametrize("how", [{}, {"depth": 8}], ids=str)
def test_hyper_parameters_from_a_file(tmp_path, file, write, how):
    write(tmp_path / file)
    for name in ("Net", "Open"):
        path = saved(both.lightning(), tmp_path, name, 3)
        theirs, ours = (
            loaded(f, name, path, hparams_file=str(tmp_path / file), **how) for f in (both.lightning(), both.levin())
        )
        # Lightning makes an OmegaConf list of a list in YAML, where omegaconf happens to be installed.
        assert ours == without_omegaconf(theirs)


def without_omegaconf(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_omegaconf(item) for key, item in value.items()}
    return value[1] if isinstance(value, tuple) and value[:1] == ("omegaconf",) else value


@pytest.mark.lightning_raises("TypeError")
@pytest.mark.parametrize("file", ["absent.yaml", "absent.csv"])
def test_a_file_of_hyper_parameters_that_is_not_there(tmp_path, file):
    path = saved(both.lightning(), tmp_path, "Net", 3)
    """Differs on purpose: Lightning warns and goes on without any hyper-parameter, and then lacks ``width``."""
    assert loaded(both.lightning(), "Net", path, hparams_file=str(tmp_path / file)) == {"error": "TypeError"}
    assert loaded(both.levin(), "Net", path, hparams_file=str(tmp_path / file)) == {"error": "FileNotFoundError"}


@pytest.mark.parametrize("kind", ["str", "Path", "bytes", "file"])
def test_where_a_checkpoint_may_lie(tmp_path, kind):
    path = saved(both.lightning(), tmp_path, "Net", 3)
    results = []
    for framework in (both.lightning(), both.levin()):
        where: Any = {"str": str(path), "Path": path, "bytes": io.BytesIO(path.read_bytes())}.get(kind) or open(
            path, "rb"
        )
        results.append(loaded(framework, "Net", where))
        if kind == "file":
            where.close()
    assert "weights" in results[0] and results[1] == results[0]


@pytest.mark.lightning_raises("FileNotFoundError", "KeyError", "TypeError")
@pytest.mark.parametrize("content", ["absent", "no weights", "a list", "text"])
def test_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "file.ckpt"
    if content == "text":
        path.write_text("hello")
    elif content != "absent":
        torch.save([1] if content == "a list" else {"epoch": 1, "hyper_parameters": {"width": 3}}, path)
    for framework in (both.lightning(), both.levin()):
        assert "error" in loaded(framework, "Net", path), framework.name


@pytest.mark.parametrize("name", ["Net", "Data"])
def test_an_instance_is_no_place_to_load_into(tmp_path, name):
    path = saved(both.lightning(), tmp_path, "Net", 3)
    for framework in (both.lightning(), both.levin()):
        with pytest.raises(TypeError, match="load_from_checkpoint"):
            getattr(classes(framework), name)(3).load_from_checkpoint(path)


def test_the_type_of_the_weights_is_kept(tmp_path):
    path = saved(both.lightning(), tmp_path, "Net", 3)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state_dict"] = {key: value.double() for key, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)
    theirs, ours = (loaded(f, "Net", path) for f in (both.lightning(), both.levin()))
    assert ours == theirs


def test_a_checkpoint_of_another_class(tmp_path):
    assert_loads_alike(tmp_path, "Net", (3,), as_name="Unsaved")
    assert_loads_alike(tmp_path, "Net", (3,), as_name="Open")
    assert_loads_alike(tmp_path, "Open", (3,), {"colour": "red"}, as_name="Net")


# Data modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"size": 7}, {"colour": "blue", "more": 1}, {"map_location": "cpu"}], ids=str)
def test_datamodules(tmp_path, how):
    assert_loads_alike(tmp_path, "Net", (3,), as_name="Data", **how)


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize("file", ["d.yaml", "d.csv", "d.json"])
def test_a_datamodule_with_a_file_of_hyper_parameters(tmp_path, file):
    path = saved(both.lightning(), tmp_path, "Net", 3)
    text = "key,value\nsize,8\nshuffle,True\n" if file.endswith("csv") else "size: 8\nshuffle: true\n"
    (tmp_path / file).write_text(text)
    theirs, ours = (
        loaded(f, "Data", path, hparams_file=str(tmp_path / file)) for f in (both.lightning(), both.levin())
    )
    assert ours == theirs


@pytest.mark.lightning_raises("TypeError")
def test_a_checkpoint_without_a_datamodule(tmp_path):
    path = saved(both.lightning(), tmp_path, "Net", 3)
    checkpoint = torch.load(path, weights_only=False)
    for key in [key for key in checkpoint if key.startswith("datamodule") or key == "Data" or key.endswith(".Data")]:
        del checkpoint[key]
    torch.save(checkpoint, path)
    for how in ({}, {"size": 2}):
        theirs, ours = (loaded(f, "Data", path, **how) for f in (both.lightning(), both.levin()))
        assert ours == theirs


# Instantiators --------------------------------------------------------------------------------------------------------


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize(
    "path", ["os.system", "builtins.eval", "tests.parity.test_loading_checkpoints.build", "nonsense", ""]
)
def test_a_file_does_not_choose_what_is_called(tmp_path, path):
    file = saved(both.lightning(), tmp_path, "Net", 3)
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["hyper_parameters"]["_instantiator"] = path
    torch.save(checkpoint, file)
    theirs, ours = (loaded(f, "Net", file) for f in (both.lightning(), both.levin()))
    assert ours == theirs == {"error": "ValueError"}


def build(kind: type, values: dict[str, Any]) -> Any:
    return kind(values["width"], depth=66)


def test_an_instantiator_that_was_allowed_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr(levin.loading, "_instantiators", dict(levin.loading._instantiators))
    file = saved(both.levin(), tmp_path, "Net", 3)
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["hyper_parameters"]["_instantiator"] = f"{__name__}.build"
    torch.save(checkpoint, file)
    levin.loading.allow_instantiator(f"{__name__}.build")
    assert loaded(both.levin(), "Net", file)["hparams"]["depth"] == 66
    with pytest.raises(ValueError, match="must be an import path"):
        levin.loading.allow_instantiator("not a path")
