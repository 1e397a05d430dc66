"""What ``self.log`` takes, and how the values of an epoch become one, on Lightning and on levin."""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.parity import both
from tests.parity.logged import Log, assert_same, plain, run_both

SHORT = {"max_epochs": 1, "limit_val_batches": 0}
VALUES = {
    "bool": True, "int": 3, "float": 0.1, "nan": math.nan, "inf": math.inf, "minus inf": -math.inf,
    "int beyond float32": 16777217, "float64": np.float64(1.5), "float32": np.float32(1.1), "int64": np.int64(2),
    "array": np.array([1.5]), "array without dimensions": np.array(1.5), "one element": torch.tensor([1.5]),
    "one element in two dimensions": torch.tensor([[1.5]]), "two elements": torch.tensor([1.0, 2.0]),
    "no element": torch.tensor([]), "text": "x", "None": None, "list": [1.0], "tuple": (1.0,), "dict": {"a": 1.0},
    "nested": {"a": {"b": 1.0}}, "double": torch.tensor(1.1, dtype=torch.float64),
    "half": torch.tensor(1.1, dtype=torch.float16), "bfloat16": torch.tensor(1.1, dtype=torch.bfloat16),
    "with a graph": lambda module, batch, index: module.layer.weight.sum(),
    "a parameter's part": lambda module, batch, index: module.layer.weight[0, 0],
}  # fmt: skip


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("arguments", [{}, {"on_epoch": True, "reduce_fx": "max"}], ids=str)
def test_values_of_any_type(tmp_path, value, arguments):
    assert_same(*run_both(tmp_path, [Log("training_step", "a", value, arguments)], SHORT))


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_of_any_type_in_a_dict(tmp_path, value):
    values = value if callable(value) else lambda module, batch, index: {"x": value, "y": 2.0}
    if callable(value):
        values = lambda module, batch, index: {"x": value(module, batch, index), "y": 2.0}  # noqa: E731
    script = [Log("training_step", "<dict>", values), Log("on_train_epoch_end", "<dict>", {"z": 3.0})]
    assert_same(*run_both(tmp_path, script, SHORT))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8], ids=str)
def test_tensors_of_integers_become_floats_with_a_warning(tmp_path, dtype):
    # Lightning says so once for each name in a process, so each case has a name of its own.
    name = f"count_{dtype}"
    theirs, ours = run_both(tmp_path, [Log("training_step", name, torch.tensor(1, dtype=dtype))], SHORT)
    assert_same(theirs, ours)
    assert [entry for entry in ours["seen"] if "warns" in entry] == [
        ("M", "training_step", name, "warns", "UserWarning")
    ]


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1)], ids=repr)
def test_kept_in_the_default_type(tmp_path, default, value):
    def kept(framework: SimpleNamespace) -> dict[str, torch.Tensor]:
        class Model(framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(4, 2)

            def validation_step(self, batch, batch_idx):
                self.log("a", value)

        trainer = both.quiet(framework, tmp_path)
        trainer.validate(Model(), DataLoader(torch.zeros(3, 4)), verbose=False)
        return dict(trainer.callback_metrics)

    torch.set_default_dtype(default)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, ours = kept(both.lightning()), kept(both.levin())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: (x.dtype, x.item()) for name, x in ours.items()} == {
        n: (x.dtype, x.item()) for n, x in theirs.items()
    }


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true", "16-true"])
def test_sums_are_kept_in_full_precision_whatever_the_model_is_in(tmp_path, precision):
    def run(framework):
        class Model(framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(4, 2)

            def validation_step(self, batch, batch_idx):
                self.log("tensor", self.layer.weight[0, 0] * 0 + 1.0, reduce_fx="sum")
                self.log("number", 0.1)

        trainer = both.quiet(framework, tmp_path, precision=precision)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = trainer.validate(Model(), DataLoader(torch.zeros(300, 4)), verbose=False)
        return result, {name: value.dtype for name, value in trainer.callback_metrics.items()}

    theirs, ours = run(both.lightning()), run(both.levin())
    assert ours[1] == theirs[1]
    assert [plain(entry) for entry in ours[0]] == [plain(entry) for entry in theirs[0]]
    assert ours[0][0]["tensor"] == 300.0


NAMES = {"mean": "mean", "avg": "avg", "sum": "sum", "min": "min", "max": "max", "torch.mean": torch.mean,
         "torch.sum": torch.sum, "torch.min": torch.min, "torch.max": torch.max, "python min": min, "python max": max,
         "python sum": sum, "numpy": np.mean, "std": torch.std, "median": "median", "None": None, "number": 1,
         "capitals": "MEAN", "a function": operator.itemgetter(0)}  # fmt: skip


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("reduce_fx", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("on_step", [True, False])
def test_reductions(tmp_path, reduce_fx, on_step):
    def values(module, batch, index):
        return torch.tensor([3.0, 1.0, 2.0][index])

    arguments = {"reduce_fx": reduce_fx, "on_epoch": True, "on_step": on_step}
    assert_same(*run_both(tmp_path, [Log("training_step", "a", values, arguments)], SHORT))


@pytest.mark.parametrize(
    ("reduce_fx", "batch_size"), [*itertools.product(["mean", "sum", "min", "max"], [None, 1, 3, 0, 2.5])]
)
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_weights_of_the_batches(tmp_path, reduce_fx, batch_size, kind):
    def values(module, batch, index):
        return kind([3.0, 1.0, 2.0][index])

    arguments = {"reduce_fx": reduce_fx, "on_epoch": True, "batch_size": batch_size}
    script = [
        Log(hook, hook, values, arguments) for hook in ("training_step", "on_train_batch_end", "on_after_backward")
    ]
    script += [Log("validation_step", "v", values, {"reduce_fx": reduce_fx, "batch_size": batch_size})]
    assert_same(*run_both(tmp_path, script, {"accumulate_grad_batches": 2}))


def test_a_mean_over_more_values_than_a_block_holds(tmp_path):
    sizes = [1 + (i * 7) % 5 for i in range(75)]
    script = [
        Log("training_step", reduce_fx, lambda module, batch, index: torch.tensor(math.sin(index)), {"reduce_fx": reduce_fx, "on_epoch": True})
        for reduce_fx in ("mean", "sum", "min", "max")
    ]  # fmt: skip
    assert_same(*run_both(tmp_path, script, {**SHORT, "log_every_n_steps": 20}, sizes=sizes, reads=False))


# How many examples a batch holds --------------------------------------------------------------------------------------


class Opaque:
    """A batch that shows nothing."""


class Fields:
    """A batch that shows its parts, as graphs of PyTorch Geometric do, by walking through it."""

    def __init__(self, **fields: object) -> None:
        self.fields = fields

    def __iter__(self):
        return iter(self.fields.items())


def batch_of(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(size, 4) for size in sizes]


BATCHES = {
    "tensor": torch.zeros(3, 4), "without dimensions": torch.tensor(2.0), "list": batch_of(3, 3), "tuple": tuple(batch_of(3, 3)),
    "different sizes": batch_of(3, 2), "dict": {"x": torch.zeros(3, 4), "y": torch.zeros(3)},
    "names first": {"names": ["ab", "c"], "x": torch.zeros(3, 4)}, "a name first": {"name": "four", "x": torch.zeros(3, 4)},
    "names last": {"x": torch.zeros(3, 4), "names": ["ab", "c", "d"]}, "nested": {"a": [{"b": torch.zeros(5, 4)}, torch.zeros(5)]},
    "numbers first": [1, 2.0, torch.zeros(3, 4)], "no tensor": [1, 2.0], "text": "abc", "texts": ["ab", "cd"],
    "opaque": Opaque(), "empty list": [], "number": 3, "empty tensor": torch.zeros(0, 4), "array": np.zeros((3, 4)),
    "None in it": [None, torch.zeros(3, 4)],
}  # fmt: skip

WALKED = {
    "fields": Fields(x=torch.zeros(5, 4), y=torch.zeros(5)), "with texts": Fields(name="abc", x=torch.zeros(5, 4)),
    "different sizes": Fields(x=torch.zeros(5, 4), edges=torch.zeros(2, 9)), "in a list": [Fields(x=torch.zeros(6))],
    "set": {torch.zeros(4)}, "values of a dict": {"a": torch.zeros(7)}.values(), "no tensor": Fields(names=["a"]),
}  # fmt: skip


def evaluated(framework: SimpleNamespace, folder, batch, value, arguments):
    caught_names: list[str] = []

    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def validation_step(self, own, batch_idx):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    self.log("a", value * (batch_idx + 1), **arguments)
                finally:
                    caught_names.extend(warning.category.__name__ for warning in caught)

    class Batches:
        def __iter__(self):
            yield batch
            yield torch.zeros(1, 4)

        def __len__(self) -> int:
            return 2

    trainer = both.quiet(framework, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = [plain(entry) for entry in trainer.validate(Model(), Batches(), verbose=False)]
        except Exception as error:
            both.caught(error)
            result = type(error).__name__
    return result, sorted(caught_names)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    "arguments", [{}, {"batch_size": 4}, {"reduce_fx": "sum"}, {"on_step": True, "on_epoch": False}], ids=str
)
def test_the_size_of_a_batch(tmp_path, batch, arguments):
    theirs = evaluated(both.lightning(), tmp_path, batch, torch.tensor(1.0), arguments)
    ours = evaluated(both.levin(), tmp_path, batch, torch.tensor(1.0), arguments)
    assert ours == theirs


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize(
    "batch", [*BATCHES.values(), *WALKED.values()], ids=[*BATCHES, *(f"walked: {name}" for name in WALKED)]
)
def test_the_size_of_a_batch_for_numbers(tmp_path, batch):
    # Lightning warns about different sizes once in a process, and takes names of fields for sizes of their own; so the
    # warnings are left to the test above.
    theirs, _ = evaluated(both.lightning(), tmp_path, batch, 1.0, {})
    ours, _ = evaluated(both.levin(), tmp_path, batch, 1.0, {})
    assert ours == theirs


def test_a_batch_that_is_an_iterator_is_left_to_the_step(tmp_path):
    # Lightning looks for its size in it, and the step finds it empty.
    left: list[torch.Tensor] = []

    class Model(both.levin().LightningModule):
        def validation_step(self, batch, batch_idx):
            with pytest.raises(ValueError, match="batch size could not be found in a batch of type list_iterator"):
                self.log("a", 1.0)
            left.extend(batch)

    loader = DataLoader([torch.zeros(3)], batch_size=1, collate_fn=iter)
    both.quiet(both.levin(), tmp_path).validate(Model(), loader, verbose=False)
    assert [part.shape for part in left] == [(3,)]
