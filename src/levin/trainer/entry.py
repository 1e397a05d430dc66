"""A call of the Trainer, from the arguments to the result: attach, run here or in other processes, fail or finish."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

import torch

from levin.callbacks.defaults import merge_model_callbacks
from levin.checkpoint.select import select_checkpoint
from levin.datamodule import LightningDataModule
from levin.loops import run_call
from levin.loops.on_error import fail
from levin.module import LightningModule
from levin.ranks.signals import as_ended, signal_handlers
from levin.strategies import DDPStrategy, SingleDeviceStrategy
from levin.trainer import spawned_run
from levin.trainer.results_table import print_results
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.overrides import is_overridden
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn
from levin.utilities.states import RunningStage, TrainerFn, TrainerStatus
from levin.utilities.timing import call_timed

if TYPE_CHECKING:
    from levin.strategies import Strategy
    from levin.trainer import Trainer


def begin(
    trainer: Trainer, fn: TrainerFn, model: Any, datamodule: Optional[LightningDataModule], given: dict[str, Any]
) -> None:
    """Attach module and data for a call of ``fn``.

    Args:
        trainer: Whose method was called.
        fn: Which one.
        model: As the user passed it; None for that of the call before.
        datamodule: As the user passed it.
        given: Stage -> loaders, as the user passed them.

    Raises:
        TypeError: No module, or something else.
        RuntimeError: A compiled module, and a strategy that cannot run it.
        MisconfigurationException: Loaders and a data module.
    """
    first = next(iter(given))
    if isinstance(given[first], LightningDataModule):
        datamodule, given[first] = given[first], None
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        raise TypeError(f"`datamodule` must be an instance of a `LightningDataModule`, received {datamodule!r}.")
    if datamodule is not None and any(value is not None for value in given.values()):
        raise MisconfigurationException(
            f"You cannot pass loaders and a `datamodule` to `Trainer.{fn}`, received both. Pass one of the two."
        )
    if model is None:
        model = trainer._module
        if model is None:
            raise TypeError(
                f"`Trainer.{fn}()` requires a `LightningModule` when it hasn't been passed in a previous run, received None."
            )
    model = _uncompiled(model, trainer.strategy)
    if not isinstance(model, LightningModule):
        raise TypeError(f"`model` must be a `LightningModule`, received {type(model).__qualname__}.")
    trainer._module = model
    model.trainer = trainer
    if datamodule is not None:
        trainer.datamodule = datamodule
        datamodule.trainer = trainer
    elif any(value is not None for value in given.values()) or fn == TrainerFn.FITTING:
        trainer.datamodule = None
    trainer.state.fn = fn
    trainer.state.status = TrainerStatus.RUNNING
    trainer.state.stage = RunningStage.TRAINING if fn == TrainerFn.FITTING else RunningStage(fn.value)
    all_loaders = (trainer._train_loaders, trainer._val_loaders, trainer._test_loaders, trainer._predict_loaders)
    for loaders in all_loaders:
        loaders.combined = None  # those of the call before are let go
        if loaders.stage in given:
            loaders.attach(given[loaders.stage], trainer.datamodule, model)
    if fn == TrainerFn.FITTING:
        trainer._val_step = None
        trainer._last_validation_time = time.monotonic()
        _resolve_limits(trainer)


def _resolve_limits(trainer: Trainer) -> None:
    """Give the limits of training that the user left open their values."""
    loop = trainer.fit_loop
    if loop.max_epochs is None:
        loop.max_epochs = 1000 if trainer._warns_about_max_epochs else -1
        if trainer._warns_about_max_epochs:
            rank_zero_warn(
                "`max_epochs` was not set. Setting it to 1000 epochs. To train without an epoch limit, set `max_epochs=-1`."
            )
    if loop.min_epochs is None:
        loop.min_epochs = 1 if loop.min_steps is not None else 0


def execute(trainer: Trainer, ckpt_path: Any, weights_only: Optional[bool], model_given: bool) -> Any:
    """Run the sequence, in this process or in those that the strategy launches; handle what goes wrong."""
    with signal_handlers(trainer):
        return _execute(trainer, ckpt_path, weights_only, model_given)


def _execute(trainer: Trainer, ckpt_path: Any, weights_only: Optional[bool], model_given: bool) -> Any:
    _attach_model_callbacks(trainer)
    launcher = trainer.strategy.launcher
    runs_elsewhere = False
    try:
        path = select_checkpoint(trainer, ckpt_path, model_given)
        if launcher is not None:
            runs_elsewhere = trainer._signals.waits_for_batch = launcher.runs_elsewhere
            function = spawned_run.run_sequence if runs_elsewhere else run_call.run_sequence
            result = launcher.launch(function, trainer, path, weights_only, trainer=trainer)
        else:
            result = run_call.run_sequence(trainer, path, weights_only)
    except KeyboardInterrupt as error:
        rank_zero_info("Detected KeyboardInterrupt, attempting graceful shutdown ...")
        with _no_further_interrupt():
            fail(trainer, error, runs_elsewhere)
            if launcher is not None and hasattr(launcher, "kill"):
                launcher.kill(signal.SIGTERM)
        sys.exit(1)
    except BaseException as error:
        ended = as_ended(trainer, error)
        fail(trainer, ended, runs_elsewhere)
        if ended is error:
            raise
        raise ended from error
    finally:
        trainer._is_setting_up = False
    trainer.state.status = TrainerStatus.FINISHED
    trainer.state.stage = None
    return result


@contextmanager
def _no_further_interrupt() -> Iterator[None]:
    """Let the shutdown end in peace; afterwards Ctrl-C works as before, for those who catch the exit (notebooks)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


def _attach_model_callbacks(trainer: Trainer) -> None:
    module = trainer.lightning_module
    configured = call_timed(trainer, "LightningModule", module, "configure_callbacks")
    trainer.callbacks = merge_model_callbacks(trainer.callbacks, configured)
    for callback in trainer.callbacks:
        callback.log = module.log  # type: ignore[attr-defined]  # given for the time of the call
        callback.log_dict = module.log_dict  # type: ignore[attr-defined]


def show_results(trainer: Trainer, results: list[dict[str, float]], verbose: bool) -> list[dict[str, float]]:
    """Print the table of results where that is asked for; returns them."""
    if verbose and results and trainer.is_global_zero:
        print_results(results, "validate" if trainer.state.fn == TrainerFn.VALIDATING else "test")
    return results


def keeps_predictions(trainer: Trainer, value: Optional[bool]) -> bool:
    """Return whether predictions are kept: as the user says, else where they are made in this process.

    Raises:
        MisconfigurationException: They are wanted and made in another process.
    """
    launcher = trainer.strategy.launcher
    spawns = launcher is not None and launcher.runs_elsewhere
    if value and spawns:
        raise MisconfigurationException(
            "return_predictions=True is not possible with a strategy that spawns processes. Write predictions with BasePredictionWriter."
        )
    return not spawns if value is None else value


def _uncompiled(model: Any, strategy: Strategy) -> Any:
    """Return the module inside of a compiled one, with its forward and its steps compiled."""
    original = getattr(model, "_orig_mod", None)
    if original is None or not isinstance(original, LightningModule):
        return model
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise RuntimeError(
            "A compiled module runs with SingleDeviceStrategy and DDPStrategy, "
            f"received {type(strategy).__name__}. Pass the module as it is, and compile parts of it in `configure_model`."
        )
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        if name == "forward" or is_overridden(name, original, LightningModule):
            original.__dict__[name] = (
                torch.compile(getattr(original, name)) if name != "forward" else model.dynamo_ctx(original.forward)
            )
    original._compiler_ctx = model.dynamo_ctx
    return original
