"""Names of Lightning's that packages and their test suites import: the same answers as the installed Lightning's."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import threading
import warnings
from argparse import Namespace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from levin import Trainer
from levin.accelerators import Accelerator
from levin.compat.finder import AliasModule
from levin.demos.boring_classes import BoringModel, ManualOptimBoringModel
from levin.strategies import SingleDeviceStrategy


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


class SizedStream(Stream):
    def __len__(self):
        return 3


def both(path: str, name: str) -> tuple[Any, Any]:
    """Lightning's and levin's object of one name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(importlib.import_module(f"lightning.{path}"), name)
    return theirs, getattr(AliasModule(f"lightning.{path}", path), name)


def outcome(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except Exception as error:
            return type(error).__name__


CALLS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("fabric.utilities.data", name, (loader,))
    for name in ("has_len", "has_iterable_dataset", "sized_len")
    for loader in (
        DataLoader(Stream()), DataLoader(SizedStream()), DataLoader([1]), [1, 2], [], iter([1]), DataLoader([]),
    )
] + [
    ("pytorch.core.saving", "convert", (text,)) for text in ("1", "1.5", "true", "None", "abc", "[1]", "")
] + [
    ("pytorch.utilities.memory", name, (error,))
    for name in ("is_cuda_out_of_memory", "is_cudnn_snafu", "is_out_of_cpu_memory", "is_oom_error")
    for error in (
        RuntimeError("CUDA out of memory. Tried"), RuntimeError("x", "CUDA out of memory."), ValueError("CUDA out of memory."),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    )
] + [
    ("pytorch.loggers.logger", "merge_dicts", ([{"a": 1, "b": 3}, {"a": 3}], *more)) for more in ((), ({"a": min}, max))
] + [("pytorch.core.optimizer", "do_nothing_closure", ())] + [
    (f"{room}.utilities", "is_picklable", (value,)) for room in ("pytorch",)
    for value in (1, {"a": [2]}, lambda: 0, Namespace(a=int))
] + [
    ("fabric.utilities.data", "suggested_max_num_workers", (number,)) for number in (0, 1, 2, 10_000)
] + [
    ("fabric.utilities.apply_func", "convert_tensors_to_scalars", (value,))
    for value in ({"a": torch.tensor(1.5), "b": [torch.tensor([2])], "c": "x"}, torch.ones(2), 3)
]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "arguments"), CALLS, ids=lambda part: part if isinstance(part, str) else None)
def test_functions_answer_as_lightnings(path, name, arguments):
    theirs, ours = both(path, name)
    assert outcome(ours, *arguments) == outcome(theirs, *arguments)


@pytest.mark.parametrize("value", [1, True, 2.5, np.ones(2), {"a": [1, "x", None, False]}, torch.ones(1)], ids=str)
def test_numbers_and_arrays_become_the_same_tensors(value):
    theirs, ours = both("fabric.utilities.apply_func", "convert_to_tensors")
    assert repr(ours(value, "cpu")) == repr(theirs(value, "cpu"))


def test_the_load_of_the_processor_has_the_names_of_lightning():
    theirs, ours = both("pytorch.accelerators.cpu", "get_cpu_stats")
    assert ours().keys() == theirs().keys()


@pytest.mark.parametrize("values", [{"a": 1, "b": "text", "c": [1, 2], "d": 0.5, "e": True, "f": None}, Namespace(a=1)])
def test_hyperparameters_in_a_table(tmp_path: Path, values):
    read = []
    for side in (0, 1):
        save, load = (both("pytorch.core.saving", f"{verb}_hparams_{to}_tags_csv")[side]
                      for verb, to in (("save", "to"), ("load", "from")))  # fmt: skip
        save(tmp_path / f"{side}.csv", values)
        with pytest.warns(RuntimeWarning, match="none.csv"):
            nothing = load(tmp_path / "none.csv")
        read.append((load(tmp_path / f"{side}.csv"), nothing, outcome(save, tmp_path / "a/b", values)))
    assert read[0] == read[1]


def test_nested_values_are_taken_up():
    for side in (0, 1):
        hparams = {"a": 1, "b": {"c": 2, "d": 3}}
        both("pytorch.core.saving", "update_hparams")[side](hparams, {"b": {"c": 4}, "e": 5})
        assert hparams == {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}


def test_arguments_of_constructors():
    seen = []
    for side in (0, 1):
        collect = both("pytorch.utilities.parsing", "collect_init_args")[side]

        class Inner:
            def __init__(self, a, b=2, *rest, c=3, **more):
                super().__init__()
                self.found = collect(inspect.currentframe(), [])

        class Outer(Inner):
            def __init__(self, y, **more):
                super().__init__(5, **more)

        class Plain:
            def __init__(self, a):
                self.found = collect(inspect.currentframe(), [])

        class Chosen(Inner):
            def __init__(self, y):
                super().__init__(y)

        class Choosing(Chosen):
            def __init__(self, z):
                found = collect(inspect.currentframe(), [], classes=(Chosen,))
                super().__init__(z)
                self.found = [found, self.found]

        def outside(inside, classes=()):
            return collect(inspect.currentframe(), [], inside, classes)

        class Asking:
            def __init__(self, a):
                self.found = [outside(False), outside(True), outside(False, (int,))]

        get = both("pytorch.utilities.parsing", "get_init_args")[side]

        class One:
            def __init__(self, a, *rest, b=2, **more):
                self.found = get(inspect.currentframe())
                __class__  # noqa: B018

        seen.append((Choosing(8).found, Asking(3).found, One(1, 2, c=4).found, get(inspect.currentframe())))
        keys = both("pytorch.utilities.parsing", "parse_class_init_keys")[side]
        seen.append((Inner(1, c=9, k=4).found, Outer(7, c=1).found, Plain(1).found, keys(Inner), keys(Plain)))
    assert seen[:2] == seen[2:]


def test_what_cannot_be_pickled_is_removed():
    for side in (0, 1):
        values = {"a": 1, "b": lambda: 0, "e": {1: lambda: 0}}
        with pytest.warns(UserWarning, match="cannot be pickled"):
            both("pytorch.utilities.parsing", "clean_namespace")[side](values)
        assert values == {"a": 1}
    namespace = Namespace(a=1, b=lambda: 0)
    with pytest.warns(UserWarning, match="'b'"):
        both("pytorch.utilities.parsing", "clean_namespace")[1](namespace)
    assert namespace == Namespace(a=1)


def test_a_compiled_module_there_and_back():
    _, from_compiled = both("pytorch.utilities.compile", "from_compiled")
    _, to_uncompiled = both("pytorch.utilities.compile", "to_uncompiled")
    model = BoringModel()
    assert from_compiled(torch.compile(model, backend="eager")) is model
    assert "training_step" in vars(model) and set(model._compiler_ctx) >= {"compiler", "original_forward"}
    batch = torch.ones(2, 32)
    compiled_loss = model.training_step(batch, 0)["loss"]
    assert to_uncompiled(model) is model and "training_step" not in vars(model) and model._compiler_ctx is None
    torch.testing.assert_close(model.training_step(batch, 0)["loss"], compiled_loss)
    assert to_uncompiled(torch.compile(model, backend="eager")) is model
    for wrong in (model, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="must be"):
            to_uncompiled(wrong)
        with pytest.raises(ValueError, match="must be"):
            from_compiled(wrong)


def test_a_module_of_double_precision():
    model = BoringModel().double()
    _, wrapper = both("pytorch.plugins.precision.double", "LightningDoublePrecisionModule")
    wrapped = wrapper(model)
    assert wrapped.training_step(torch.randn(2, 32), 0)["loss"].dtype is torch.double
    assert wrapped(torch.randn(2, 32)).dtype is torch.double
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        setattr(model, name, lambda *args, **kwargs: (name, args, kwargs))  # noqa: B023
        called, args, kwargs = getattr(wrapped, name)({"x": torch.ones(1)}, 3, mask=torch.ones(1, dtype=torch.int32))
        assert (called, args[0]["x"].dtype, args[1], kwargs["mask"].dtype) == (name, torch.double, 3, torch.int32)


def test_lengths_on_one_rank():
    theirs, ours = both("pytorch.utilities.data", "has_len_all_ranks")
    strategy = SingleDeviceStrategy("cpu")
    assert ours([1, 2], strategy) is True and ours(iter([1]), strategy) is False
    with pytest.warns(UserWarning, match="^`DataLoader` has no batches on any rank"):
        assert ours(DataLoader([]), strategy) is True
    _, is_shared = both("fabric.utilities.distributed", "is_shared_filesystem")
    assert is_shared(strategy) is True


def test_lengths_where_another_rank_has_batches():
    _, has_len = both("pytorch.utilities.data", "has_len_all_ranks")
    summed = []

    def reduce(tensor, reduce_op):
        summed.append((tensor.item(), reduce_op))
        return tensor + 5

    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    assert has_len([1, 2], strategy) is True
    with pytest.raises(RuntimeError, match="^`DataLoader` has no batches on this rank and 5 on the others"):
        has_len(DataLoader([]), strategy)
    with pytest.warns(UserWarning, match="^`DataLoader` has no batches on one rank"):
        assert has_len(DataLoader([]), strategy, True) is True
    assert summed == [(2, "sum"), (0, "sum"), (0, "sum")]


class Ranks:
    """What is asked of a strategy of two ranks; at the barrier the other one may write the file, soon."""

    world_size = 2

    def __init__(self, is_global_zero: bool, after_s: float | None = None) -> None:
        self.is_global_zero, self.after_s = is_global_zero, after_s
        self.seen: list[bool] = []

    def broadcast(self, marker: str) -> str:
        self.marker = Path(marker)
        return marker

    def barrier(self) -> None:
        assert self.marker.exists() is self.is_global_zero
        if self.after_s is not None:
            threading.Timer(self.after_s, self.marker.touch).start()

    def reduce_boolean_decision(self, is_seen: bool, all: bool) -> bool:
        assert all
        self.seen.append(is_seen)
        return is_seen


def test_whether_ranks_share_a_folder(tmp_path: Path, monkeypatch):
    _, is_shared = both("fabric.utilities.distributed", "is_shared_filesystem")
    assert is_shared(Ranks(True), "memory://x") is True
    first = Ranks(True)
    assert is_shared(first, tmp_path) is True
    assert first.seen == [True] and first.marker.parent == tmp_path and not first.marker.exists()
    monkeypatch.chdir(tmp_path)
    assert is_shared(Ranks(False, after_s=0.0)) is True
    assert is_shared(Ranks(False, after_s=0.2), tmp_path, timeout=30) is True
    assert is_shared(Ranks(False), tmp_path, timeout=0) is False


def test_tensors_of_a_collection_are_detached():
    for detach in both("pytorch.utilities.memory", "recursive_detach"):
        weight = torch.nn.Parameter(torch.ones(2))
        given = {"a": weight * 2, "b": [weight], "c": "text"}
        for arguments in ({}, {"to_cpu": True}):
            detached = detach(given, **arguments)
            assert not detached["a"].requires_grad and not detached["b"][0].requires_grad
            assert detached["a"].tolist() == [2.0, 2.0] and detached["c"] == "text"


def test_members_that_are_strings():
    theirs, ours = both("pytorch.callbacks.timer", "Interval")
    for name in ("step", "epoch"):
        pair = [getattr(kind, name) for kind in (theirs, ours)]
        assert str(pair[0]) == str(pair[1])
        assert pair[0].value == pair[1].value == name
        assert pair[0] == name.upper() and pair[1] == name.upper()


def test_the_registries_have_their_names_of_fabric():
    from levin.accelerators import AcceleratorRegistry
    from levin.strategies import StrategyRegistry

    assert both("fabric.strategies", "STRATEGY_REGISTRY")[1] is StrategyRegistry
    assert both("fabric.accelerators", "ACCELERATOR_REGISTRY")[1] is AcceleratorRegistry


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accelerator": "auto", "devices": "auto"},
        {"accelerator": "cpu", "devices": 1},
        {"accelerator": "cpu", "devices": "2"},
        {"accelerator": "cpu", "precision": "bf16-mixed", "benchmark": True, "use_distributed_sampler": False},
        {"accelerator": "CPUAccelerator", "devices": 2},
    ],
)
def test_the_connector_that_scvi_tools_asks(arguments):
    flags = []
    for side in (0, 1):
        given = dict(arguments)
        if given.get("accelerator") == "CPUAccelerator":
            given["accelerator"] = both("pytorch.accelerators", "CPUAccelerator")[side]()
        made = both("pytorch.trainer.connectors.accelerator_connector", "_AcceleratorConnector")[side](**given)
        flag = made._accelerator_flag
        assert (
            flag == (given["accelerator"] if isinstance(given.get("accelerator"), Accelerator) else "cpu") or side == 0
        )
        precision = type(made._check_and_init_precision()).__name__
        flags.append((made._devices_flag, made._parallel_devices, made.is_distributed, precision))
    if not torch.cuda.is_available():
        assert flags[0] == flags[1]


def test_the_connector_names_the_indices_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    _, ours = both("pytorch.trainer.connectors.accelerator_connector", "_AcceleratorConnector")
    made = ours([0, 2], "cuda", strategy="ddp_fork")
    assert (made._accelerator_flag, made._devices_flag) == ("cuda", [0, 2])
    assert made._parallel_devices == [torch.device("cuda", 0), torch.device("cuda", 2)]


def test_steps_that_pina_counts_itself_are_steps_of_the_trainer():
    seen = []

    class CountsItself(ManualOptimBoringModel):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers().optimizer
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()
            loop = self.trainer.fit_loop.epoch_loop
            loop.manual_optimization.optim_step_progress.total.completed += 1
            seen.append(self.trainer.global_step)

    trainer = Trainer(accelerator="cpu", devices=1, max_steps=5, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(CountsItself())
    assert seen == [1, 2, 3, 4, 5]
    assert trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed == 0


@pytest.mark.parametrize("name", ["upgrade_checkpoint", "consolidate_checkpoint"])
def test_programs_run_by_their_module(tmp_path: Path, name):
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    done = subprocess.run(
        [sys.executable, "-m", "levin", "-m", f"lightning.pytorch.utilities.{name}", "--help"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and "checkpoint" in done.stdout, done.stderr


def test_keys_of_the_hyper_parameters_of_a_data_module():
    names = [f"CHECKPOINT_HYPER_PARAMS_{part}" for part in ("KEY", "NAME", "TYPE")]
    theirs, ours = both("pytorch", "LightningDataModule")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


@pytest.mark.parametrize("hparams", [Namespace(lr=1), {"lr": 1}])
def test_hyper_parameters_are_found_in_a_namespace_too(hparams):
    class Holder:
        _trainer = None

    holder = Holder()
    holder.hparams = hparams
    for side in (0, 1):
        has, get, change = (
            both("pytorch.utilities.parsing", f"lightning_{verb}attr")[side] for verb in ("has", "get", "set")
        )
        assert has(holder, "lr") and not has(holder, "other")
        change(holder, "lr", side + 5)
        assert get(holder, "lr") == side + 5
        with pytest.raises(AttributeError, match="other"):
            get(holder, "other")
        with pytest.raises(AttributeError, match="other"):
            change(holder, "other", 1)


def test_attributes_are_set_in_module_hyper_parameters_and_data_module_and_the_last_is_read():
    for side in (0, 1):
        has, get, change = (
            both("pytorch.utilities.parsing", f"lightning_{verb}attr")[side] for verb in ("has", "get", "set")
        )
        datamodule = SimpleNamespace(lr=3, size=4)
        module = SimpleNamespace(lr=1, hparams={"lr": 2}, _trainer=SimpleNamespace(datamodule=datamodule))
        assert (get(module, "lr"), get(module, "size"), has(module, "size"), has(module, "none")) == (3, 4, True, False)
        change(module, "lr", 9)
        assert (module.lr, module.hparams, datamodule.lr) == (9, {"lr": 9}, 9)
        assert get(SimpleNamespace(lr=1, hparams={}, _trainer=None), "lr") == 1


class Colour(Enum):
    RED = 3


@pytest.mark.filterwarnings("ignore:Skipping '")
@pytest.mark.parametrize(
    "values", [{"a": 1, "b": [1, "x"], "c": {"d": 0.5}, "e": Colour.RED, "f": None, "g": True}, Namespace(a="text")]
)
def test_hyperparameters_in_yaml(tmp_path: Path, values):
    read = []
    for side in (0, 1):
        save, load = (both("pytorch.core.saving", f"{verb}_hparams_{to}_yaml")[side]
                      for verb, to in (("save", "to"), ("load", "from")))  # fmt: skip
        save(tmp_path / f"{side}.yaml", values, use_omegaconf=False)
        read.append(load(tmp_path / f"{side}.yaml", use_omegaconf=False))
    assert read[0] == read[1]
    assert load(tmp_path / "none.yaml") == {}


def test_a_missing_attribute_is_the_error_that_programs_catch():
    for values in (made(k=1) for made in both("pytorch.utilities", "AttributeDict")):
        with pytest.raises(KeyError):
            del values.nope
        with pytest.raises(AttributeError):
            _ = values.nope
        with pytest.raises(KeyError):
            _ = values["nope"]
        del values.k
        assert values == {}


@pytest.mark.parametrize(
    "value, read",
    [
        ((1, 2), [1, 2]),
        ({"a": (0.9, Path("x"))}, {"a": [0.9, "x"]}),
        (torch.tensor([1.5]), [1.5]),
        ({1}, {1}),
        (None, None),
    ],
)
def test_hyper_parameters_in_a_yaml_file_are_values(tmp_path, value, read):
    from levin.compat.hparams import load_hparams_from_yaml, save_hparams_to_yaml

    save_hparams_to_yaml(tmp_path / "hparams.yaml", {"value": value})
    assert load_hparams_from_yaml(tmp_path / "hparams.yaml") == {"value": read}
