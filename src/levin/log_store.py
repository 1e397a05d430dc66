"""What ``self.log`` writes into, and how it is reduced.

A *slot* is made at the first call for a hook and a name; later calls find it and add. Values in the memory of the host
are added at once. Those on a device are copied there into a small block and folded into a running sum when the block is
full, so that a call neither waits for the device nor keeps a graph alive. Reduction to one value happens when someone
reads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.compiler import is_compiling

from levin.log_slot import Arguments, Slot, StepOrder, Sync, metric_class
from levin.utilities.collections import leaves
from levin.utilities.exceptions import MisconfigurationException, value_error
from levin.utilities.parameters import full, is_in_parts
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import StateDict
from levin.utilities.warnings import PossibleUserWarning

SlotKey = tuple[str, str, Optional[int]]
"""Hook, name and index of the loader."""

Recorded = tuple[torch.dtype, Optional[str], str, object, tuple[object, ...], Optional[int]]
"""A call of ``self.log`` in compiled code: the type of its numbers there, hook, name, value, arguments, batch size."""

_STEP_HOOKS = [
    "training_step",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_backward",
    "on_after_backward",
    "backward",
    "optimizer_step",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "clip_gradients",
]
_EVAL_HOOKS = [
    f"{hook}"
    for stage in ("validation", "test")
    for hook in (f"{stage}_step", f"on_{stage}_batch_start", f"on_{stage}_batch_end")
]
_EPOCH_HOOKS = [
    f"on_{stage}_{moment}"
    for stage in ("train", "validation", "test")
    for moment in ("start", "epoch_start", "epoch_end")
]
DEFAULTS: dict[str, tuple[bool, bool]] = {
    **dict.fromkeys(_STEP_HOOKS, (True, False)),
    **dict.fromkeys(_EVAL_HOOKS, (False, True)),
    **dict.fromkeys(_EPOCH_HOOKS, (False, True)),
}
"""Hook -> the default (on_step, on_epoch); a hook that is not here may not log."""
EPOCH_ONLY = frozenset(_EPOCH_HOOKS)

_REDUCTIONS = {
    "mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max",
    torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", min: "min", max: "max", sum: "sum",
}  # fmt: skip


class Metrics(NamedTuple):
    """Reduced values by destination."""

    callback: dict[str, object]
    logged: dict[str, object]
    progress_bar: dict[str, object]


class LogStore:
    """The slots of one loop (training, validation, test).

    Args:
        training: Whether this is the training loop: its step values count as callback metrics.
        modules: Returns attribute name -> submodule, to know the metrics of the module.
        sync: Reduces a tensor over the ranks, ``sync(tensor, reduction, group)``; None on one device.
        has_loggers: Returns whether there is anything to log to.
        num_ranks: How many ranks see data of their own.
        check: See :class:`levin.log_slot.StepOrder`.
    """

    def __init__(
        self,
        training: bool,
        modules: Callable[[], dict[str, object]],
        sync: Optional[Sync] = None,
        has_loggers: Callable[[], bool] = lambda: True,
        num_ranks: int = 1,
        check: Callable[[str, str], None] = lambda hook, name: None,
    ) -> None:
        self.training = training
        self.hook: Optional[str] = None
        self.batch: object = None
        self.dataloader_idx: Optional[int] = None
        self.is_between_batches: bool = True
        self.has_step_slots: bool = False
        # None, but for steps for which not all ranks have a batch of their own: whether this one has none.
        self.is_filler: Optional[bool] = None
        self._size: Optional[int] = None
        self._slots: dict[SlotKey, Slot] = {}
        self._modules = modules
        self._modules_by_id: dict[int, object] = {}
        self._sync = sync
        self.order = StepOrder(check)
        self._has_loggers = has_loggers
        self._is_of_many = num_ranks > 1
        # What was logged in compiled code, where a tensor has no value yet: taken up when that code has run.
        self.recorded: list[Recorded] = []

    def start_batch(self, batch: object, dataloader_idx: Optional[int] = None) -> None:
        """A new batch: its size is found when a mean needs it."""
        self.is_between_batches = False
        self.batch = batch
        self.dataloader_idx = dataloader_idx
        self._size = None

    def end_batches(self) -> None:
        """No batch is there any more (or not yet): who reads now gets the values of the epoch."""
        self.batch = self.dataloader_idx = None
        self.is_between_batches = True

    def log(self, name: str, value: object, arguments: tuple[object, ...], batch_size: Optional[int]) -> None:
        """Add ``value`` under ``name`` for the present hook. See ``LightningModule.log`` for the arguments."""
        hook = self.hook
        if is_compiling():
            value = value.detach() if isinstance(value, Tensor) else value
            self.recorded.append((torch.get_default_dtype(), hook, name, value, arguments, batch_size))
            return
        slot = self._slots.get((hook, name, self.dataloader_idx))  # type: ignore[arg-type]  # None is never a key
        if slot is None:
            slot = self._new_slot(name, value, Arguments._make(arguments))
        elif slot.arguments != arguments or (slot.metric is not None and slot.metric is not value):
            slot = self._go_on(slot, name, value, Arguments._make(arguments))
        if slot.metric is not None:
            slot.has_value = True
            return
        if isinstance(value, Tensor):
            if type(value) is not Tensor:
                value = _whole(name, value, slot.arguments)
            if value.numel() != 1:
                raise ValueError(
                    f"self.log({name!r}, ...) needs a value with one element, received a tensor of shape "
                    f"{tuple(value.shape)}. Reduce it first, for example with .mean()."
                )
        elif not isinstance(value, (int, float)):
            if not slot.has_value and isinstance(value, metric_class()):
                self._new_slot(name, value, slot.arguments).has_value = True
                return
            _check_value(name, value)
        if not slot.on_epoch or slot.reduction != "mean":
            slot.add(value, 1.0, self.is_filler)
        elif batch_size is not None:
            slot.add(value, batch_size, self.is_filler)
        elif self.batch is None or hook in EPOCH_ONLY:
            slot.add(value, 1.0, self.is_filler)
        else:
            size = self._size
            if size is None:
                size = self._size = extract_batch_size(self.batch)
            slot.add(value, size, self.is_filler)

    def take_recorded(self) -> None:
        """Add what compiled code has logged."""
        recorded = list(self.recorded)
        self.recorded.clear()
        previous = self.hook
        for dtype, self.hook, name, value, arguments, batch_size in recorded:
            kept = torch.tensor(value, dtype=dtype) if isinstance(value, (int, float)) else value
            self.log(name, kept, arguments, batch_size)
        self.hook = previous

    def _new_slot(self, name: str, value: object, arguments: Arguments) -> Slot:
        hook = self.hook
        on_step, on_epoch = resolve_moments(name, hook, arguments)
        assert hook is not None
        if "/dataloader_idx_" in name:
            raise MisconfigurationException(
                f"self.log(name=...) must not contain '/dataloader_idx_', received {name!r}. levin adds it by itself."
            )
        metric = self._find_metric(name, value, arguments)
        reduction = "mean"
        if metric is None:
            _check_value(name, value)
            reduction = resolve_reduction(name, arguments.reduce_fx)
            if isinstance(value, Tensor) and not value.is_floating_point():
                rank_zero_warn(
                    f"self.log({name!r}, ...) received a tensor of dtype {value.dtype}, kept as a float. "
                    "Convert it with .float() to silence this."
                )
        if arguments.logger and not self._has_loggers():
            rank_zero_warn(f"self.log({name!r}, ..., logger=True) was called, but the Trainer has no logger.")
        if on_epoch and metric is None and self._is_of_many and not (arguments.sync_dist or arguments.rank_zero_only):
            rank_zero_warn(
                f"Each rank has its own value of the epoch for self.log({name!r}, ...), and that of rank 0 is logged. "
                f"Use self.log({name!r}, ..., sync_dist=True) for the one of all ranks.",
                category=PossibleUserWarning,
            )
        index = self.dataloader_idx
        before = self._slots.get((hook, name, index - 1)) if index else None
        if not arguments.add_dataloader_idx and index and before is not None and before.has_value:
            raise MisconfigurationException(
                f"self.log({name!r}, add_dataloader_idx=False) was called for loader {index - 1} and for loader {index}, "
                "which would mix their values. Give each loader a name of its own, or leave add_dataloader_idx=True."
            )
        slot = Slot(name, hook, arguments, on_step, on_epoch, reduction, index, metric, self._sync, self.order)
        self._slots[hook, name, index] = slot
        self.has_step_slots = self.has_step_slots or on_step
        return slot

    def _go_on(self, slot: Slot, name: str, value: object, arguments: Arguments) -> Slot:
        """Return the slot of a name that is logged in another way than before: in another epoch it may be another."""
        if not slot.has_value:
            return self._new_slot(name, value, arguments)
        if slot.metric is not None and slot.metric is not value:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) received another {type(value).__name__} in {slot.hook} than before in this epoch, "
                "whose values would be lost. Make metrics once, in __init__; levin resets them after each epoch."
            )
        if self._meaning(slot, arguments) != self._meaning(slot, slot.arguments):
            if slot.is_restored:
                return slot  # as it began, until the epoch ends
            raise MisconfigurationException(
                f"self.log({slot.name!r}, ...) was called twice in {slot.hook} with different arguments: "
                f"{tuple(arguments)} after {tuple(slot.arguments)}. Use two names, or the same arguments."
            )
        slot.arguments = arguments
        return slot

    def _meaning(self, slot: Slot, arguments: Arguments) -> tuple[object, ...]:
        return (
            arguments.prog_bar, arguments.logger is not False, resolve_moments(slot.name, slot.hook, arguments),
            None if slot.metric is not None else resolve_reduction(slot.name, arguments.reduce_fx),
            None if self._sync is None else (arguments.sync_dist, arguments.sync_dist_group),
            arguments.add_dataloader_idx, arguments.rank_zero_only,
        )  # fmt: skip

    def _find_metric(self, name: str, value: object, arguments: Arguments) -> object:
        if not isinstance(value, metric_class()):
            return None
        if arguments.metric_attribute is None and not self._is_of_module(value):
            raise MisconfigurationException(
                f"self.log({name!r}, ...) received a Metric that is no attribute of the LightningModule. "
                "Assign it in __init__ (self.accuracy = ...), or name it with metric_attribute=...."
            )
        return value

    def _is_of_module(self, metric: object) -> bool:
        # To walk through a module of thousands of layers takes as long as a hundred steps.
        if id(metric) not in self._modules_by_id:
            self._modules_by_id = {id(module): module for module in self._modules().values()}
        return id(metric) in self._modules_by_id

    def reset(self) -> None:
        """Forget the values of an epoch, and reset the metrics that were logged."""
        for slot in self._slots.values():
            slot.reset()
        self.end_batches()

    def slots(self) -> Iterator[Slot]:
        """Yield the slots that hold a value."""
        for slot in self._slots.values():
            if slot.has_value:
                yield slot

    def collective_keys(self) -> dict[SlotKey, str]:
        """Return (hook, name, loader index) -> how of the values that all ranks compute together, in their order."""
        names = {id(module): name for name, module in self._modules().items()}
        return {
            key: f"reduce_fx={slot.reduction!r}" if slot.metric is None else f"the metric {names.get(id(slot.metric))}"
            for key, slot in self._slots.items()
            if slot.has_value and slot.is_collective
        }

    def names_in_steps(self) -> list[str]:
        """Return the names whose values of steps all ranks reduce together, in the order of their first calls."""
        return [slot.name for slot in self.slots() if slot.is_collective_in_steps]

    def put_first(self, keys: Iterable[SlotKey]) -> None:
        """Let the values of ``keys`` be computed before the others, and in this order."""
        self._slots = {key: self._slots[key] for key in keys} | self._slots

    def read(self, on_step: bool) -> Metrics:
        """Return the step values, or the epoch values, by destination; of several loaders those of the present one.

        Args:
            on_step: True for the last values of the step, False for the epoch's.
        """
        if self.recorded:  # by compiled code in a hook
            self.take_recorded()
        metrics = Metrics({}, {}, {})
        for slot in self.slots():
            if not (slot.on_step if on_step else slot.on_epoch) or slot.dataloader_idx != self.dataloader_idx:
                continue
            value = slot.step_value() if on_step else slot.epoch_value()
            if value is None:
                continue
            name = forked = slot.name
            if slot.on_step and slot.on_epoch:
                forked = f"{name}_step" if on_step else f"{name}_epoch"
            if slot.dataloader_idx is not None and slot.arguments.add_dataloader_idx:
                suffix = f"/dataloader_idx_{slot.dataloader_idx}"
                name, forked = name + suffix, forked + suffix
            if slot.logger:
                metrics.logged[forked] = value
            if self.training or not on_step:
                metrics.callback[name] = value
                metrics.callback[forked] = value
            if slot.prog_bar:
                metrics.progress_bar[forked] = value
        return metrics

    def state_dict(self) -> list[StateDict]:
        """Return the values of an unfinished epoch; of metric objects only their names, their states are the module's."""
        names = {id(module): name for name, module in self._modules().items()}
        return [{**slot.state_dict(), "metric": names.get(id(slot.metric))} for slot in self.slots()]

    def load_state_dict(self, state: list[StateDict]) -> None:
        """Take up :meth:`state_dict`."""
        self._slots.clear()
        modules = self._modules()
        for entry in state:
            slot = Slot(
                entry["name"], entry["hook"], Arguments._make(entry["arguments"]), entry["on_step"], entry["on_epoch"],
                entry["reduction"], entry["dataloader_idx"], modules.get(entry["metric"]), self._sync,
                self.order,
            )  # fmt: skip
            slot.load_state_dict(entry)
            slot.is_restored = True
            self._slots[slot.hook, slot.name, slot.dataloader_idx] = slot
            self.has_step_slots = self.has_step_slots or slot.on_step


def resolve_moments(name: str, hook: Optional[str], arguments: Arguments) -> tuple[bool, bool]:
    """Return (on_step, on_epoch) with the defaults of ``hook`` filled in.

    Raises:
        MisconfigurationException: The hook may not log, or not in that way.
    """
    if hook is None:
        raise MisconfigurationException(
            f"self.log({name!r}, ...) was called outside of a hook that can log. Call it in a step or a batch or epoch hook."
        )
    default = DEFAULTS.get(hook)
    if default is None:
        raise MisconfigurationException(
            f"self.log({name!r}, ...) cannot be called in {hook}. Call it in a step or in one of the "
            "on_<stage>_batch_start/end or on_<stage>_start/epoch_start/epoch_end hooks."
        )
    on_step = default[0] if arguments.on_step is None else arguments.on_step
    on_epoch = default[1] if arguments.on_epoch is None else arguments.on_epoch
    if hook in EPOCH_ONLY and (on_step or not on_epoch):
        raise MisconfigurationException(
            f"self.log({name!r}, on_step={on_step}, on_epoch={on_epoch}) is not possible in {hook}, "
            "which runs once per epoch. Use on_step=False, on_epoch=True."
        )
    if not on_step and not on_epoch:
        raise MisconfigurationException(
            f"self.log({name!r}, on_step=False, on_epoch=False) would log nothing. Set one of them to True."
        )
    return on_step, on_epoch


def resolve_reduction(name: str, reduce_fx: object) -> str:
    """Return "mean", "sum", "min" or "max".

    Raises:
        MisconfigurationException: ``reduce_fx`` is none of these, nor one of the functions of torch or Python for them.
    """
    key = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx
    reduction = _REDUCTIONS.get(key, "") if isinstance(key, Hashable) else ""
    if not reduction:
        raise value_error(
            f"self.log({name!r}, reduce_fx=...)", reduce_fx, "must be one of 'mean', 'sum', 'min', 'max'",
            "Use a torchmetrics.Metric for any other reduction.",
        )  # fmt: skip
    return reduction


def _whole(name: str, value: Tensor, arguments: Arguments) -> Tensor:
    if arguments.rank_zero_only and is_in_parts(value):
        raise ValueError(
            f"self.log({name!r}, ..., rank_zero_only=True) received a DTensor of which each rank has a part. Log it on all "
            "ranks, or call its full_tensor() on all of them before."
        )
    return full(value)


def _check_value(name: str, value: object) -> None:
    if isinstance(value, (int, float, Tensor)):
        return
    if type(value).__module__ == "numpy" and not hasattr(value, "__setitem__") and not isinstance(value, (str, bytes)):
        return  # a scalar, no array
    hint = (
        "Use self.log_dict for a dict of values."
        if isinstance(value, Mapping)
        else "Log a number, a tensor with one element or a torchmetrics.Metric."
    )
    raise ValueError(
        f"self.log({name!r}, ...) cannot log a value of type {type(value).__name__}, received {value!r}. {hint}"
    )


def _tensors(batch: object) -> Iterator[Tensor]:
    """Yield the tensors of a batch: of collections, and of objects that can be walked through more than once."""
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif (
            isinstance(leaf, Iterable)
            and not isinstance(leaf, (str, bytes, Iterator))
            and not hasattr(leaf, "__array__")
        ):
            for item in leaf:
                yield from _tensors(item)


def extract_batch_size(batch: object) -> int:
    """Return the size of dimension 0 of the first tensor in ``batch`` (1 for a 0-dim tensor).

    Raises:
        MisconfigurationException: There is no tensor to tell.
    """
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.dim() else 1
    # The most frequent batch needs no walk.
    if type(batch) is list or type(batch) is tuple:
        sizes = {item.size(0) if type(item) is Tensor and item.dim() else None for item in batch}
        if len(sizes) == 1 and (found := sizes.pop()) is not None:
            return found
    size: Optional[int] = None
    for tensor in _tensors(batch):
        found = tensor.size(0) if tensor.dim() else 1
        if size is None:
            size = found
        elif size != found:
            rank_zero_warn(
                "The batch size was taken from the first of several tensors of different sizes "
                f"({size}, then {found}). Give it with self.log(..., batch_size=batch_size)."
            )
            break
    if size is None:
        raise MisconfigurationException(
            f"The batch size could not be found in a batch of type {type(batch).__name__}. "
            "Give it with self.log(..., batch_size=batch_size)."
        )
    return size
