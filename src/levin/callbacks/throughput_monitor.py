"""ThroughputMonitor: logs how many batches, samples and operations are done per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from levin.callbacks.logging_steps import is_logging_step, log_values
from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.rank_zero import rank_zero_info
from levin.utilities.throughput import Throughput, get_available_flops
from levin.utilities.types import STEP_OUTPUT, Batch, Kwargs

_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


class _Meter:
    """The totals of one stage since it began."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput

    def start(self) -> None:
        self.throughput.reset()
        self.started_s: float = time.perf_counter()
        self.elapsed_s: float = 0.0
        self.batches = self.samples = self.lengths = 0

    def tick(self) -> float:
        """Return the seconds since the start; more than the last time, even by a clock that is too coarse."""
        self.elapsed_s = max(time.perf_counter() - self.started_s, self.elapsed_s + 1e-9)
        return self.elapsed_s


class ThroughputMonitor(Callback):
    """Logs totals and rates of each stage under ``train/``, ``validate/``, ``test/`` and ``predict/``.

    The names are ``time`` (seconds), ``batches``, ``samples``, ``lengths`` and, once the window is full,
    ``device/batches_per_sec``, ``device/samples_per_sec``, ``device/items_per_sec``, ``device/flops_per_sec`` and
    ``device/mfu`` (the share of the device's greatest rate of operations that are those of the model, as in PaLM,
    https://arxiv.org/abs/2204.02311); with several devices the rates of all of them without ``device/``. Operations are
    those of the module's ``flops_per_batch``: a number, or a method of the batch. Time spent in validation does not count
    as training.

    Args:
        batch_size_fn: Batch -> number of samples.
        length_fn: Batch -> number of items (tokens).
        count_flops: Whether torch counts the operations of a module that has no ``flops_per_batch``, in the first step of
            training, with its backward pass; for the others the number grows with the samples. Compiled code is not counted.
        prog_bar: Whether the progress bar shows items (or samples) per second, and ``mfu`` where it is known.
        kwargs: Passed to :class:`~levin.utilities.throughput.Throughput`: ``available_flops``, ``window_size``, ``separator``.

    Example:
        >>> monitor = ThroughputMonitor(lambda tokens: len(tokens), lambda tokens: tokens.numel(), count_flops=True)
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Batch], int],
        length_fn: Callable[[Batch], int] | None = None,
        *,
        count_flops: bool = False,
        prog_bar: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.batch_size_fn: Callable[[Batch], int] = batch_size_fn
        self.length_fn: Callable[[Batch], int] | None = length_fn
        self.count_flops: bool = count_flops
        self.prog_bar: bool = prog_bar
        self.kwargs: Kwargs = kwargs
        self.available_flops: float | None = kwargs.pop("available_flops", None)
        self._meters: dict[str, _Meter] = {}
        self._counter: FlopCounterMode | None = None
        self._flops_per_sample: float | None = None
        # Evaluation batches of the whole run, the x-axis of their values.
        self._eval_batches: int = 0
        self._validation_began_s: float = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.available_flops is None:
            dtype = _DTYPES.get(str(trainer.precision).split("-")[0], torch.float32)
            self.available_flops = get_available_flops(trainer.strategy.root_device, dtype)
        if stage == "fit" and not hasattr(pl_module, "flops_per_batch") and not self.count_flops:
            rank_zero_info(f"{type(pl_module).__name__} has no `flops_per_batch`, so no FLOPs are logged.")
        stages = ("train", "validate") if stage == "fit" else (stage,)
        self._meters = {name: _Meter(self._throughput(trainer)) for name in stages}
        self._eval_batches = 0

    def _throughput(self, trainer: Trainer) -> Throughput:
        # Command lines find here which arguments ``kwargs`` may hold.
        return Throughput(self.available_flops, trainer.strategy.data_parallel.size, **self.kwargs)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meters["train"].start()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if self.count_flops and self._flops_per_sample is None and not hasattr(pl_module, "flops_per_batch"):
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_counting()

    def _end_counting(self) -> float:
        """Return the operations since the step began."""
        counter, self._counter = self._counter, None
        if counter is None:
            return 0.0
        counter.__exit__(None, None, None)
        return float(counter.get_total_flops())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._flops_per_sample = self._end_counting() / max(self.batch_size_fn(batch), 1)
        meter = self._count("train", pl_module, batch)
        accumulate = trainer.accumulate_grad_batches
        does_step = (batch_idx + 1) % accumulate == 0 or trainer.is_last_batch
        if does_step and is_logging_step(trainer):
            self._log(trainer, "train", meter, None)
            if self.prog_bar:
                self._show(pl_module, meter)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began_s = time.perf_counter()
        if not trainer.sanity_checking:
            self._meters[_stage(trainer)].start()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            return
        stage = _stage(trainer)
        meter = self._count(stage, pl_module, batch)
        self._eval_batches += 1
        every = trainer.log_every_n_steps
        if every and self._eval_batches % every == 0:
            self._log(trainer, stage, meter, self._eval_batches)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._meters["train"].started_s += time.perf_counter() - self._validation_began_s

    def _count(self, stage: str, pl_module: LightningModule, batch: object) -> _Meter:
        meter = self._meters[stage]
        meter.batches += 1
        meter.samples += self.batch_size_fn(batch)
        if self.length_fn is not None:
            meter.lengths += self.length_fn(batch)
        flops = getattr(pl_module, "flops_per_batch", None)
        if flops is None and stage == "train" and self._flops_per_sample:
            flops = self._flops_per_sample * self.batch_size_fn(batch)
        meter.throughput.update(
            time=meter.tick(),
            batches=meter.batches,
            samples=meter.samples,
            lengths=None if self.length_fn is None else meter.lengths,
            flops=flops(batch) if callable(flops) else flops,
        )
        return meter

    def _show(self, pl_module: LightningModule, meter: _Meter) -> None:
        rates = meter.throughput.compute()
        prefix = f"device{meter.throughput.separator}"
        shown = ("samples_per_sec" if self.length_fn is None else "items_per_sec", "mfu")
        for name in shown:
            if prefix + name in rates:
                pl_module.log(name, rates[prefix + name], prog_bar=True, logger=False)

    def _log(self, trainer: Trainer, stage: str, meter: _Meter, step: int | None) -> None:
        separator = meter.throughput.separator
        values = {f"{stage}{separator}{name}": float(value) for name, value in meter.throughput.compute().items()}
        if step is None:
            values["epoch"] = float(trainer.current_epoch)
        log_values(trainer, values, step)


def _stage(trainer: Trainer) -> str:
    """Return which stage is being evaluated; inside fit that is ``validate``."""
    return "validate" if trainer.state.fn == "fit" else str(trainer.state.fn)
