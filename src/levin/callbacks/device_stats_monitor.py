"""DeviceStatsMonitor: logs memory and load of the device and of the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from typing_extensions import override

from levin.accelerators.cpu import CPUAccelerator
from levin.callbacks.logging_steps import is_logging_step, log_values, require_logger
from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.packages import require_package


def _logs(hook: str) -> Callable[..., None]:
    """Return the method that logs the stats at a hook, whatever its arguments are."""

    def log(self: DeviceStatsMonitor, trainer: Trainer, *_: object, **__: object) -> None:
        self._log(trainer, hook)

    return log


class DeviceStatsMonitor(Callback):
    """Logs what the accelerator says of the device before and after batches, whenever other values are logged.

    The names are ``DeviceStatsMonitor.<hook>/<stat>``, for example ``DeviceStatsMonitor.on_train_batch_end/cpu_percent``.

    Args:
        cpu_stats: True logs load and memory of the machine too, False never does. By default they are logged when
            training runs on the CPU. They need the package psutil.
        filter_keys: Names of the stats to log; by default all.

    Raises:
        MisconfigurationException: In a run, the Trainer has no logger.
        ModuleNotFoundError: In a run, psutil is needed and not installed.

    Example:
        >>> monitor = DeviceStatsMonitor(filter_keys={"cpu_percent"})
    """

    def __init__(self, cpu_stats: bool | None = None, filter_keys: Iterable[str] | None = None) -> None:
        self._cpu_stats: bool | None = cpu_stats
        self._filter_keys: frozenset[str] | None = None if filter_keys is None else frozenset(filter_keys)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        require_logger(trainer, self)
        if self._reads_cpu(trainer):
            require_package("psutil", f"DeviceStatsMonitor(cpu_stats={self._cpu_stats})", "Or use cpu_stats=False.")

    def _reads_cpu(self, trainer: Trainer) -> bool:
        return self._cpu_stats is True or (self._cpu_stats is None and trainer.strategy.root_device.type == "cpu")

    on_train_batch_start, on_train_batch_end = _logs("on_train_batch_start"), _logs("on_train_batch_end")
    on_validation_batch_start = _logs("on_validation_batch_start")
    on_validation_batch_end = _logs("on_validation_batch_end")
    on_test_batch_start, on_test_batch_end = _logs("on_test_batch_start"), _logs("on_test_batch_end")

    def _log(self, trainer: Trainer, hook: str) -> None:
        if not is_logging_step(trainer):
            return
        device = trainer.strategy.root_device
        stats = {} if device.type == "cpu" else dict(trainer.accelerator.get_device_stats(device))
        if self._reads_cpu(trainer):
            stats.update(CPUAccelerator().get_device_stats(device))
        separator = trainer.loggers[0].group_separator
        prefix = f"{type(self).__qualname__}.{hook}{separator}"
        values = {
            prefix + name: float(value)
            for name, value in stats.items()
            if self._filter_keys is None or name in self._filter_keys
        }
        if values:
            log_values(trainer, values)
