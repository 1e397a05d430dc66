"""Marks the actions in the traces of PyTorch/XLA."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from levin.profilers.profiler import Profiler
from levin.utilities.packages import require_package

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
RECORDED = (*_STEPS, "backward")


class XLAProfiler(Profiler):
    """Starts the profiler server of ``torch_xla`` and names steps and backward in its traces.

    Capture a trace with TensorBoard while the run goes on.

    Args:
        port: Port of the profiler server.

    Raises:
        ModuleNotFoundError: ``torch_xla`` is not installed.
    """

    def __init__(self, port: int = 9012) -> None:
        require_package("torch_xla", "XLAProfiler")
        super().__init__()
        self.port: int = port
        self._server: Any = None
        self._running: dict[str, Any] = {}
        self._num_steps: dict[str, int] = {}

    @override
    def start(self, action_name: str) -> None:
        """Open a trace for the steps and backward; other actions are let pass."""
        function = action_name.rpartition(".")[2]
        if function not in RECORDED:
            return
        import torch_xla.debug.profiler as xp

        if self._server is None:
            self._server = xp.start_server(self.port)
        if function in _STEPS:
            step = self._num_steps.get(action_name, 0)
            self._num_steps[action_name] = step + 1
            trace = xp.StepTrace(action_name, step_num=step)
        else:
            trace = xp.Trace(action_name)
        trace.__enter__()
        self._running[action_name] = trace

    @override
    def stop(self, action_name: str) -> None:
        """Close the trace of :meth:`start`."""
        trace = self._running.pop(action_name, None)
        if trace is not None:
            import torch_xla.debug.profiler as xp

            trace.__exit__(None, None, None)
            # torch_xla would take all later steps, also those of other runs, for named ones.
            xp.set_tracer_marked_step(False)
