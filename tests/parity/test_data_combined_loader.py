"""CombinedLoader and collections of loaders: modes, lengths, limits, structures."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.parity import trace

MODES = ["min_size", "max_size_cycle", "max_size", "sequential"]


def combined(framework: Any) -> Any:
    if framework.name == "levin":
        from levin.data.combined import CombinedLoader
    else:
        from lightning.pytorch.utilities import CombinedLoader
    return CombinedLoader


def pass_over(seen: trace.Trace, iterables: Any, mode: str, limits: Any) -> None:
    loader = combined(seen.framework)(iterables, mode)
    seen.attempt(len, loader)
    if limits is not None:
        loader.limits = limits
    for _ in range(2):
        iterator = iter(loader)
        seen.attempt(len, loader)
        for item in iterator:
            seen.note(*item)
    seen.note(loader.limits, len(loader.flattened))
    loader.reset()
    seen.attempt(len, loader)


sizes = st.lists(st.integers(0, 4), min_size=1, max_size=3)


@pytest.mark.lightning_raises("RuntimeError")
@settings(max_examples=60, derandomize=True, deadline=None, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    sizes=sizes,
    mode=st.sampled_from(MODES),
    limit=st.none() | st.integers(0, 3) | st.just("each"),
    kind=st.sampled_from(["list", "dict", "tuple", "nested"]),
)
def test_a_combined_loader_gives_the_same_batches(tmp_path, sizes, mode, limit, kind):
    if mode == "max_size_cycle" and 0 in sizes and any(sizes):
        return  # without end in Lightning
    loaders = [range(10 * index, 10 * index + size) for index, size in enumerate(sizes)]
    iterables: Any = {
        "list": loaders, "tuple": tuple(loaders), "dict": {f"k{i}": loader for i, loader in enumerate(loaders)},
        "nested": {"a": loaders[0], "b": [tuple(loaders[1:])] if len(loaders) > 1 else loaders[0]},
    }[kind]  # fmt: skip
    if mode != "sequential":
        limit = None  # Lightning's len() counts them in, its iteration does not; see the next test
    count = len(loaders) if kind != "nested" or len(loaders) > 1 else 2
    limits = [index + 1 for index in range(count)] if limit == "each" else limit
    trace.same(lambda seen: pass_over(seen, iterables, mode, limits), tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_limits_hold_in_every_mode(mode):
    from levin.data.combined import CombinedLoader

    loader = CombinedLoader([range(3), range(2)], mode)
    loader.limits = [2, 1]
    taken = list(loader)
    assert len(taken) == len(loader) == {"min_size": 1, "sequential": 3}.get(mode, 2)


Pair = namedtuple("Pair", "x y")
STRUCTURES: dict[str, Any] = {
    "single": lambda a, b: a,
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered_dict": lambda a, b: OrderedDict(a=a, b=b),
    "namedtuple": lambda a, b: Pair(a, b),
    "nested": lambda a, b: {"a": [a, (b,)], "c": {"d": b}},
    "list_of_one": lambda a, b: [a],
    "dict_of_one": lambda a, b: {"a": a},
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_training_batches_have_the_structure_of_the_collection(tmp_path, structure):
    def code(seen: trace.Trace) -> None:
        module = trained(seen)
        loaders = STRUCTURES[structure](trace.batches(3, 1), trace.batches(2, 2))
        trainer = seen.trainer(max_epochs=2)
        seen.attempt(trainer.fit, module, loaders)
        seen.note(trainer.num_training_batches, trainer.global_step)

    trace.same(code, tmp_path)


def trained(seen: trace.Trace) -> Any:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            seen.note("train", batch_idx, batch, self.trainer.is_last_batch)
            return self.layer(torch.ones(2, 4)).sum()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            seen.note("val", batch_idx, dataloader_idx, batch)

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            seen.note("test", batch_idx, dataloader_idx, batch)

        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            seen.note("predict", batch_idx, dataloader_idx, batch)
            return batch

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Model()


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize("limit", [1.0, 2, 0.5, 0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_a_mode_in_each_method_within_limits(tmp_path, method, mode, limit):
    def code(seen: trace.Trace) -> None:
        loader = combined(seen.framework)({"a": trace.batches(4, 1), "b": trace.batches(2, 2)}, mode)
        name = {"fit": "train", "validate": "val"}.get(method, method)
        trainer = seen.trainer(max_epochs=1, **{f"limit_{name}_batches": limit})
        seen.attempt(getattr(trainer, method), trained(seen), loader)
        if mode == "sequential" and method != "fit":
            seen.note(getattr(trainer, f"num_{name}_batches"))
        elif method == "fit" and mode != "sequential" and limit:
            seen.note(trainer.num_training_batches)

    trace.same(code, tmp_path)


@pytest.mark.parametrize("structure", ["list", "dict", "nested", "tuple"])
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_collections_in_evaluation_are_taken_one_after_the_other(tmp_path, method, structure):
    def code(seen: trace.Trace) -> None:
        loaders = STRUCTURES[structure](trace.batches(2, 1), trace.batches(1, 2))
        seen.attempt(getattr(seen.trainer(), method), trained(seen), loaders)

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize("mode", ["wrong", None, 3, "MIN_SIZE"], ids=str)
def test_an_unknown_mode_is_an_error(tmp_path, mode):
    def code(seen: trace.Trace) -> None:
        seen.attempt(combined(seen.framework), [range(2)], mode)

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("ValueError", "AssertionError")
def test_flattened_and_limits_must_fit(tmp_path):
    def code(seen: trace.Trace) -> None:
        loader = combined(seen.framework)({"a": range(2), "b": [range(3)]}, "min_size")
        loader.flattened = [range(1), range(1)]
        seen.note(list(loader.iterables), [len(x) for x in loader.flattened])
        seen.attempt(setattr, loader, "flattened", [range(1)])
        seen.attempt(setattr, loader, "limits", [1])
        loader.limits = [1, 2]
        seen.note(loader.limits, [getattr(s, "x", s) for s in [loader.sampler["a"], loader.batch_sampler["a"]]])
        seen.attempt(next, loader)

    theirs, ours = trace.on_both(code, tmp_path)
    assert ours.events[:-1] == theirs.events[:-1]
    assert ours.events[-1] == ("raised", "RuntimeError")


LEAVES: dict[str, Any] = {
    "list_of_numbers": lambda: [1, 2, 3],
    "list_of_strings": lambda: ["a", "b"],
    "range": lambda: range(3),
    "generator_function": lambda: iter([torch.ones(1), torch.zeros(1)]),
    "tensor": lambda: torch.arange(3.0),
    "number": lambda: 3,
    "none_in_list": lambda: [range(2), None],
    "object": lambda: object(),
    "empty_list": list,
    "string": lambda: "ab",
    "set": lambda: {1},
}


@pytest.mark.lightning_raises("TypeError")
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("method", ["fit", "validate", "predict"])
def test_anything_that_can_be_iterated_is_a_loader(tmp_path, method, leaf):
    def code(seen: trace.Trace) -> None:
        seen.attempt(getattr(seen.trainer(max_epochs=2), method), trained(seen), LEAVES[leaf]())

    trace.same(code, tmp_path)
