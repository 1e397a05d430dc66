"""Code of the user's, of which one stage of a pipeline computes its part: no trace of it is made, each stage runs it.

Up to the first layer of the stage, the layers of earlier stages give tensors that have a shape alone, and so has what is
computed of them; there, what came from the stage before takes the place of such tensors. The call of the next stage's first
layer ends it. So all that does not depend on layers (positions, masks, the batch) is at hand in every stage, keyword
arguments and several tensors go from one to the next, and shapes may change from batch to batch::

    stage 0    embed, blocks 0 to 5                      | what block 6 is called with
    stage 1    (embed, blocks 0 to 5 without values)     | blocks 6 to 11, head, loss
"""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn import Module
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Function, Kwargs

# The place of a tensor among all that a layer is called with, its shape and its format.
Announced = tuple[int, torch.Size, torch.dtype]


class ReachedError(BaseException):
    """A stage is done: the first layer of the next one was called. No ``except`` of the user's may hold it.

    Args:
        tensors: What it was called with, as far as the stage that is to receive it lacks that.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors


class _LacksError(BaseException):
    """A trial is done: the first layer of the stage was called."""

    def __init__(self, announced: list[Announced]) -> None:
        self.announced = announced


class _Skipping(TorchDispatchMode):
    """While it is on, what is computed of what has no values has none either, and is not written into what has some."""

    def __init__(self, mode: FakeTensorMode) -> None:
        initialize: Callable[[], None] = super().__init__
        initialize()
        self._mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run ``func``."""
        kwargs = kwargs or {}
        if not _is_of(self._mode, (args, kwargs)):
            return func(*args, **kwargs)
        if func._schema.is_mutable and not _is_of(self._mode, args[0]):
            raise DataDependentOutputException(func)

        def alike(leaf: Any) -> Any:
            return torch.empty_like(leaf) if isinstance(leaf, FakeTensor) and leaf.fake_mode is not self._mode else leaf

        with self._mode:
            # In a plan, what has values is without memory, too.
            args, kwargs = tree_map(alike, (args, kwargs))
            return func(*args, **kwargs)


def _is_of(mode: FakeTensorMode, data: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) and leaf.fake_mode is mode for leaf in tree_leaves(data))


class Shapes:
    """A layer of another stage: it tells what its output looks like.

    Args:
        layer: With its parameters, of which the shapes are kept.
        without_values: Returns a tensor like another, without values.
    """

    def __init__(self, layer: Module, without_values: Callable[[Tensor], Tensor]) -> None:
        tensors = [*layer.parameters(), *layer.buffers()]
        memo: dict[int, Any] = {id(tensor): without_values(tensor) for tensor in tensors}
        self._layer: Module = copy.deepcopy(layer, memo)
        self._new: Callable[[Any], Any] = lambda x: without_values(x) if isinstance(x, Tensor) else x
        self._known: dict[object, Any] = {}

    def __call__(self, is_training: bool, *args: Any, **kwargs: Any) -> Any:
        """Return the output without values."""
        leaves = tree_leaves((args, kwargs))
        if not all(isinstance(leaf, (Tensor, bool, int, float, str, type(None))) for leaf in leaves):
            return self._output(is_training, args, kwargs)
        key = (
            is_training, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), tuple(kwargs),
            *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves),
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = self._output(is_training, args, kwargs)
        # Tensors of its own in each call, since values may take their place.
        return tree_map(self._new, self._known[key])

    def _output(self, is_training: bool, args: Any, kwargs: Any) -> Any:
        self._layer.train(is_training)
        args, kwargs = tree_map(self._new, (args, kwargs))
        with torch.no_grad():
            return self._layer(*args, **kwargs)


@dataclass
class _Run:
    """Code of the user's under way.

    Args:
        stage: For which it runs.
        received: What the stage lacks; None for a trial, which finds out what that is.
        wanted: What the next stage lacks.
        enter: Called where the part of the stage begins.
    """

    stage: int
    received: Sequence[Tensor] | None
    wanted: Sequence[Announced]
    enter: Callable[[], None]
    skipping: ExitStack | None = None
    passed: set[str] = field(default_factory=set)


class Replay:
    """Runs code that calls the layers of a module for one stage of a pipeline at a time.

    Args:
        module: The user's; before anything of it is left out.
        layers: Its layers by their names.
        stages: The names of those of each stage.
        device: Of this process.
    """

    def __init__(
        self, module: Module, layers: Mapping[str, Module], stages: Sequence[Sequence[str]], device: torch.device
    ) -> None:
        self.name = type(module).__name__
        self._firsts: list[str] = [names[0] for names in stages]
        self._stage_of = {name: number for number, names in enumerate(stages) for name in names}
        # Layers without parameters run wherever they are called.
        self._layers = {
            name: layer
            for name, layer in layers.items()
            if name in self._firsts or any(True for _ in layer.parameters())
        }
        self._mode = FakeTensorMode()
        self._device = device
        self._shapes = {name: Shapes(layer, self.without_values) for name, layer in self._layers.items()}
        self._run: _Run | None = None

    def without_values(self, tensor: Tensor) -> Tensor:
        """Return a tensor like another, on the device of this process and without values."""
        with self._mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)

    def has_no_values(self, data: Any) -> bool:
        """Return whether some of it depends on a layer of another stage."""
        return _is_of(self._mode, data)

    @property
    def is_under_way(self) -> bool:
        """Whether the layers are called for a stage."""
        return self._run is not None

    @property
    def has_begun(self) -> bool:
        """Whether the part of the stage has begun for which they are called."""
        return self._run is not None and self._run.skipping is None

    def lacks(self, stage: int, code: Function) -> list[Announced]:
        """Return what a stage lacks where its part of ``code`` begins.

        Raises:
            MisconfigurationException: Its part does not begin, or cannot be found without values.
        """
        if stage == 0:
            return []
        try:
            self.run(stage, code, None, [])
        except _LacksError as found:
            if found.announced:
                return found.announced
            raise MisconfigurationException(
                f"{self._firsts[stage]}, with which a stage of the pipeline of {self.name} begins, is called with nothing that the layers "
                "before it compute: they do not run one after another. Cut elsewhere (pipeline_split=[...])."
            ) from None
        except ReachedError:
            pass
        raise self.not_called(stage)

    def run(
        self,
        stage: int,
        code: Function,
        received: Sequence[Tensor] | None,
        wanted: Sequence[Announced],
        enter: Callable[[], None] = lambda: None,
    ) -> Any:
        """Return what ``code`` returns.

        Args:
            stage: Whose part is computed.
            code: Of the user's.
            received: From the stage before, as :meth:`lacks` announced it.
            wanted: What the stage after it lacks.
            enter: Called where the part of the stage begins, unless that is at once.

        Raises:
            ReachedError: The stage is done.
            MisconfigurationException: The code needs what another stage computes.
        """
        run = _Run(stage, received, wanted, enter)
        with self._in_the_way(), ExitStack() as skipping:
            if stage > 0:
                run.skipping = skipping
                # What is computed of what has no values has none either; after that, it is an error to use such.
                self._mode.allow_non_fake_inputs = True
                skipping.callback(setattr, self._mode, "allow_non_fake_inputs", False)
                skipping.enter_context(_Skipping(self._mode))
            self._run = run
            try:
                result = code()
                if run.skipping is not None:
                    raise self.not_called(stage)
                return result
            except (RuntimeError, AssertionError) as error:
                if not needs_values(error):
                    raise
                operation = re.search(r"aten\.\w+", str(error))
                raise self.needs_value(
                    stage, f"at {_place_of(error)}{f' ({operation[0]})' if operation else ''}"
                ) from error
            finally:
                self._run = None

    @contextmanager
    def _in_the_way(self) -> Iterator[None]:
        """Stand in the way of calls of layers, before all hooks, those of FSDP for one."""
        compiled = {name: layer._compiled_call_impl for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer._compiled_call_impl = self._standing_in(name, layer, compiled[name] or layer._call_impl)
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                layer._compiled_call_impl = compiled[name]

    def _standing_in(self, name: str, layer: Module, call: Function) -> Function:
        own = self._stage_of[name]

        def called(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            assert run is not None
            is_first = name == self._firsts[own]
            if run.skipping is not None and own < run.stage:
                run.passed.add(name)
                return self._shapes[name](layer.training, *args, **kwargs)
            if run.skipping is not None and own == run.stage and is_first:
                args, kwargs = self._begin(run, args, kwargs)
            if run.skipping is None and own == run.stage:
                return call(*args, **kwargs)
            if run.skipping is None and own == run.stage + 1 and is_first:
                leaves = tree_leaves((args, kwargs))
                if self.has_no_values(leaves):
                    raise self.needs_value(run.stage, f"for the call of {name}")
                raise ReachedError([self._checked(name, leaves, *one) for one in run.wanted])
            raise self._out_of_order(name, run)

        return called

    def _begin(self, run: _Run, args: Any, kwargs: Any) -> tuple[Any, Any]:
        lacking: dict[int, tuple[int, Tensor]] = {}
        for place, leaf in enumerate(tree_leaves((args, kwargs))):
            if self.has_no_values(leaf):
                lacking.setdefault(id(leaf), (place, leaf))
        if run.received is None:
            raise _LacksError([(place, leaf.shape, leaf.dtype) for place, leaf in lacking.values()])
        assert run.skipping is not None
        if len(lacking) != len(run.received):
            raise MisconfigurationException(
                f"{self._firsts[run.stage]}, with which a stage of the pipeline of {self.name} begins, is called with {len(lacking)} tensors "
                f"that layers compute, and was called with {len(run.received)} for batches of the same shapes. Call it in one way."
            )
        run.skipping.close()
        run.skipping = None
        values: dict[int, Tensor] = {}
        for (_, leaf), value in zip(lacking.values(), run.received, strict=True):
            values[id(leaf)] = value.view_as(value)
            # It is the tensor with the value from here on, wherever the code keeps it; but one that others are views of.
            with suppress(RuntimeError):
                swap_tensors(leaf, values[id(leaf)])
                del values[id(leaf)]
        run.enter()
        given: tuple[Any, Any] = tree_map(lambda x: values.get(id(x), x), (args, kwargs))
        return given

    def _checked(self, name: str, leaves: list[Any], place: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = leaves[place] if place < len(leaves) else None
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (shape, dtype):
            found = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise MisconfigurationException(
                f"{name}, where a stage of the pipeline of {self.name} begins, is called with {found} in the stage before, and without "
                f"values it is {(tuple(shape), dtype)}. Layers must give the same shapes for the same shapes."
            )
        return tensor.contiguous()

    def needs_value(self, stage: int, reason: str) -> MisconfigurationException:
        """Return the error for code that needs, in one stage, what another one computes."""
        first = self._firsts[stage]
        return MisconfigurationException(
            f"Stage {stage} of the pipeline of {self.name}, which begins with {first}, needs the value of what an earlier stage computes, "
            f"{reason}. It gets what {first} is called with, and computes all else itself. Pass it on through the layers, or cut "
            "elsewhere (pipeline_split=[...])."
        )

    def not_called(self, stage: int) -> MisconfigurationException:
        """Return the error for code that ended without a call of a stage's first layer."""
        return MisconfigurationException(
            f"What runs as a pipeline in {self.name} did not call {self._firsts[stage]}, with which a stage of it begins. Call the "
            "layers once for each batch."
        )

    def _out_of_order(self, name: str, run: _Run) -> MisconfigurationException:
        if name in run.passed:
            return MisconfigurationException(
                f"{name} was called twice for one batch, and the layers of a pipeline run once. Call them once in {self.name}."
            )
        stage = run.stage if run.skipping is None else run.stage - 1
        return MisconfigurationException(
            f"{name} is in stage {self._stage_of[name]} of the pipeline of {self.name}, and runs in stage {stage}: stages are cut in the "
            "order in which the module holds its layers. Assign them in the order in which they run, or cut elsewhere "
            "(pipeline_split=[...])."
        )


def needs_values(error: Exception) -> bool:
    """Return whether torch raised it because a tensor has no values."""
    return isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)) or any(
        word in str(error) for word in ("FakeTensor", "tensor subclasses")
    )


def _place_of(error: BaseException) -> str:
    own = (Path(torch.__file__).parent, Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    of_user = [frame for frame in frames if not any(folder in Path(frame.filename).parents for folder in own)]
    return f"{of_user[-1].filename}:{of_user[-1].lineno}" if of_user else "an unknown place"
