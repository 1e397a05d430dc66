"""Operators, kernels and memory of a few steps, by ``torch.profiler``."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable
from typing import Any, Optional, cast

import torch
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import EventList
from torch.nn import Module
from torch.profiler import ProfilerAction, ProfilerActivity
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from levin.profilers.profiler import Profiler
from levin.utilities.exceptions import value_error
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_info
from levin.utilities.types import Kwargs, PathLike, StateDict

STEP_FUNCTIONS = ("training_step", "validation_step", "test_step", "predict_step")
SORT_KEYS = frozenset(
    {"count"}
    | {f"{device}_time{total}" for device in ("cpu", "cuda", "device") for total in ("", "_total")}
    | {f"{own}{device}_memory_usage" for device in ("cpu", "cuda", "device") for own in ("", "self_")}
)

_RECORDS = "records"
"""Owner of a window that a schedule does not end."""

Schedule = Callable[[int], ProfilerAction]


class PyTorchProfiler(Profiler):
    """Records a window of steps with ``torch.profiler`` and reports the costliest operators.

    A window belongs to one step function: for ``training_step`` it reaches from its start to the start of the next one,
    so that backward and optimizer are in it. By default the first step is left out, the second warms up and three are
    recorded, for each of training_step, validation_step, test_step and predict_step. A window that another step
    function interrupts ends there.

    Args:
        dirpath: Directory of the report and the traces, by default the ``log_dir`` of the Trainer.
        filename: Name of the report; None prints it.
        group_by_input_shapes: Whether the same operator on other shapes is a row of its own.
        emit_nvtx: Mark the operators for ``nsys`` instead of recording them:
            ``nsys profile --capture-range=cudaProfilerApi -- python train.py``.
        export_to_chrome: Whether to write a trace for TensorBoard, Perfetto or ``chrome://tracing`` per window.
        row_limit: Rows of the report, -1 for all.
        sort_by_key: Column that the report is sorted by, by default the total time on the GPU if there is one, else on
            the CPU.
        record_module_names: Whether to name the modules in the trace.
        table_kwargs: For ``EventList.table``, for example ``max_name_column_width``.
        profiler_kwargs: For ``torch.profiler.profile``, for example ``profile_memory``, ``with_stack`` or ``schedule``
            (None records every action of the run).

    Raises:
        MisconfigurationException: An unknown ``sort_by_key``; a ``schedule`` that is no function from a number to a
            ``ProfilerAction``; ``emit_nvtx`` without CUDA.
        KeyError: ``table_kwargs`` holds an unknown key, or ``sort_by`` or ``row_limit``.
        TypeError: ``profiler_kwargs`` holds an unknown key.

    Example:
        >>> profiler = PyTorchProfiler(schedule=None)
        >>> with profiler.profile("training_step"):
        ...     total = torch.zeros(3).sum()
        >>> "aten::sum" in profiler.summary()
        True
    """

    AVAILABLE_SORT_KEYS = SORT_KEYS
    STEP_FUNCTIONS = frozenset(STEP_FUNCTIONS)

    def __init__(
        self,
        dirpath: Optional[PathLike] = None,
        filename: Optional[str] = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: Optional[str] = None,
        record_module_names: bool = True,
        table_kwargs: Optional[Kwargs] = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        if sort_by_key is not None and sort_by_key not in SORT_KEYS:
            raise value_error("sort_by_key", sort_by_key, f"must be one of {sorted(SORT_KEYS)}")
        if emit_nvtx and not torch.cuda.is_available():
            raise value_error("emit_nvtx", True, "needs a CUDA device")
        columns = set(inspect.signature(EventList.table).parameters) - {"self", "sort_by", "row_limit"}
        for key in table_kwargs or {}:
            if key not in columns:
                raise KeyError(f"table_kwargs must hold keys of {sorted(columns)}, received {key!r}.")
        options = set(inspect.signature(torch.profiler.profile.__init__).parameters) - {"self"}
        for key in profiler_kwargs:
            if key not in options:
                raise TypeError(f"profiler_kwargs must hold keys of {sorted(options)}, received {key!r}.")
        if profiler_kwargs.get("schedule") is None and "acc_events" in options:
            # With one cycle nothing is lost between cycles, of which torch would warn.
            profiler_kwargs.setdefault("acc_events", True)
        activities = profiler_kwargs.setdefault("activities", _default_activities())
        default = "device_time_total" if ProfilerActivity.CUDA in activities else "cpu_time_total"
        self._group_by_input_shapes: bool = group_by_input_shapes
        self._emit_nvtx: bool = emit_nvtx
        self._export_to_chrome: bool = export_to_chrome
        self._row_limit: int = row_limit
        # torch calls the columns of the GPU "device" now.
        self._sort_by_key: str = (sort_by_key or default).replace("cuda_", "device_")
        self._record_module_names: bool = record_module_names
        self._table_kwargs: Kwargs = table_kwargs or {}
        self._schedule: Optional[Schedule] = _checked(profiler_kwargs.pop("schedule", default_schedule()))
        self._on_trace_ready: Optional[Callable[[Any], Any]] = profiler_kwargs.pop("on_trace_ready", None)
        self._profiler_kwargs: Kwargs = profiler_kwargs
        if group_by_input_shapes:
            profiler_kwargs.setdefault("record_shapes", True)
        self._module: Optional[Module] = None
        self._module_names: Optional[_ModuleNames] = None
        self._profile: Any = None
        self._owner: Optional[str] = None
        self._last_step: Optional[str] = None
        self._num_steps: dict[str, int] = {}
        self._running: dict[str, record_function] = {}
        self._events: dict[str, Any] = {}
        self._is_over: bool = False
        # What the last window recorded, one by one; stays when the run is over.
        self.function_events: Optional[EventList] = None

    profiler: Any = reads("_profile", "The profiler of torch that records now; None where none does.")

    @override
    def setup(self, stage: str, local_rank: Optional[int] = None, log_dir: Optional[str] = None) -> None:
        """Prepare for a run."""
        super().setup(stage, local_rank, log_dir)
        self._is_over = False

    @override
    def attach(self, module: Module) -> None:
        """Get to know the module, whose layers are named in the trace."""
        self._module = module
        if self._profile is not None:
            self._name_layers()

    @override
    def start(self, action_name: str) -> None:
        """Mark the start of an action in the trace; a step function opens, goes on with or ends a window."""
        if self._is_over:
            return
        if self._profile is None and (self._emit_nvtx or self._schedule is None):
            self._open(_RECORDS, None)
        if action_name.rpartition(".")[2] in STEP_FUNCTIONS:
            self._last_step = action_name
            if self._owner != _RECORDS:
                self._advance(action_name)
        if self._profile is not None and action_name not in self._running:
            marker = record_function(f"[levin]{action_name}")
            marker.__enter__()
            self._running[action_name] = marker

    @override
    def stop(self, action_name: str) -> None:
        """Mark the end of an action in the trace."""
        marker = self._running.pop(action_name, None)
        if marker is not None:
            marker.__exit__(None, None, None)

    @override
    def summary(self) -> str:
        self._close()
        if self._emit_nvtx:
            return ""
        if not self._events:
            counts = ", ".join(f"{name} ran {count} times" for name, count in self._num_steps.items()) or "no step ran"
            rank_zero_info(
                "PyTorchProfiler recorded nothing: %s, and its schedule starts later. Use schedule=None to record"
                " everything.",
                counts,
            )
            return ""
        return self._stats_to_str(
            {
                name: events.table(sort_by=self._sort_by_key, row_limit=self._row_limit, **self._table_kwargs)
                for name, events in self._events.items()
            }
        )

    @override
    def teardown(self, stage: Optional[str]) -> None:
        """End the window that is open, forget everything and record nothing until the next run."""
        self._close()
        self._is_over = True
        self._module = None
        self._last_step = None
        self._num_steps = {}
        self._running = {}
        self._events = {}

    def _advance(self, action_name: str) -> None:
        """Begin a step of ``action_name`` and do what the schedule says about it."""
        number = self._num_steps.get(action_name, 0)
        self._num_steps[action_name] = number + 1
        schedule = cast("Schedule", self._schedule)
        if self._owner == action_name:
            self._profile.step()
        if schedule(number) is ProfilerAction.NONE:
            self._close()
        elif self._owner != action_name:
            self._close()
            self._open(action_name, schedule, number)

    def _open(self, owner: str, schedule: Optional[Schedule], number: int = 0) -> None:
        self._owner = owner
        profile: Any
        if self._emit_nvtx:
            profile = _NvtxRanges(self._profiler_kwargs.get("record_shapes", False))
        else:
            profile = torch.profiler.profile(
                schedule=schedule, on_trace_ready=self._save_trace, **self._profiler_kwargs
            )
            if schedule is not None:
                # Each window is a profile of its own, whose steps are those of the run.
                profile.step_num, profile.current_action = number, schedule(number)
        profile.start()
        # Not before: to stop a profile that failed to start ends the process, on CUDA.
        self._profile = profile
        self._name_layers()

    def _name_layers(self) -> None:
        if self._record_module_names and self._module is not None and self._module_names is None:
            self._module_names = _ModuleNames(self._module)

    def _close(self) -> None:
        if self._profile is None:
            return
        for marker in self._running.values():
            marker.__exit__(None, None, None)
        self._running.clear()
        if self._module_names is not None:
            self._module_names.remove()
            self._module_names = None
        profile, self._profile = self._profile, None
        profile.stop()
        self._owner = None

    _delete_profilers = _close  # anemoi-training ends the recording by this name, to read what was recorded

    def _save_trace(self, profile: torch.profiler.profile) -> None:
        owner = cast("str", self._owner)
        self.function_events = profile.events()
        self._events[owner] = profile.key_averages(group_by_input_shape=self._group_by_input_shapes)
        if self._on_trace_ready is not None:
            self._on_trace_ready(profile)
        elif self._export_to_chrome:
            directory = self._directory()
            if directory is None:
                rank_zero_info("PyTorchProfiler writes no trace, since it has no directory. Give it a dirpath.")
                return
            os.makedirs(directory, exist_ok=True)
            # A window over everything is called after the last step in it.
            action = self._last_step or owner if owner == _RECORDS else owner
            name = self._prepare_filename(action, extension=f".{time.time_ns()}.pt.trace.json")
            profile.export_chrome_trace(os.path.join(directory, name))

    def __getstate__(self) -> StateDict:
        return {
            **self.__dict__,
            "_profile": None,
            "_owner": None,
            "_running": {},
            "_module": None,
            "_module_names": None,
        }


class _NvtxRanges:
    """Marks operators for nsys from start to stop."""

    def __init__(self, record_shapes: bool) -> None:
        self._record_shapes = record_shapes
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        self._stack.enter_context(torch.cuda.profiler.profile())
        self._stack.enter_context(torch.autograd.profiler.emit_nvtx(record_shapes=self._record_shapes))

    def stop(self) -> None:
        self._stack.close()


class _ModuleNames:
    """Marks the forward pass of every layer in the trace until it is removed."""

    def __init__(self, module: Module) -> None:
        self._handles: list[RemovableHandle] = []
        for name, layer in module.named_modules():
            if name and not isinstance(layer, torch.jit.ScriptModule):
                kind = type(layer)
                self._mark(layer, f"[levin][module]{kind.__module__}.{kind.__name__}: {name}")

    def _mark(self, layer: Module, label: str) -> None:
        markers: list[record_function] = []

        def enter(*_: object) -> None:
            markers.append(record_function(label))
            markers[-1].__enter__()

        def leave(*_: object) -> None:
            if markers:
                markers.pop().__exit__(None, None, None)

        self._handles.append(layer.register_forward_pre_hook(enter))
        self._handles.append(layer.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def default_schedule() -> Schedule:
    """Return the schedule that leaves out one step, warms up in the next and records three, once."""
    return cast("Schedule", torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1))


def _default_activities() -> list[ProfilerActivity]:
    supported = torch.profiler.supported_activities()
    return [kind for kind in (ProfilerActivity.CPU, ProfilerActivity.CUDA) if kind in supported]


def _checked(schedule: object) -> Optional[Schedule]:
    if schedule is None:
        return None
    if not callable(schedule):
        raise value_error("schedule", schedule, "must be a function", "Make one with torch.profiler.schedule(...).")
    if not isinstance(schedule(0), ProfilerAction):
        raise value_error("schedule", schedule(0), "must return a ProfilerAction")
    return cast("Schedule", schedule)
