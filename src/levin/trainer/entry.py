"""A call of the Trainer, from the arguments to the result: attach, run here or in other processes, fail or finish."""

from __future__ import annotations

import signal
import sys
from contextlib import nullcontext
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any, Optional, Protocol

from levin.callbacks.defaults import merge_model_callbacks
from levin.callbacks.timer import Timer
from levin.checkpoint.select import select_checkpoint
from levin.counters import Loops
from levin.datamodule import LightningDataModule
from levin.engine import Engine
from levin.loops import run_call
from levin.loops.dataloaders import STAGE_OF
from levin.loops.on_error import fail
from levin.loops.run import Run
from levin.loops.stage_loaders import Loaders
from levin.module import LightningModule
from levin.profilers.profiler import PassThroughProfiler
from levin.protocols import Trainer
from levin.ranks.signals import as_ended, second_interrupt_ends, signal_handlers
from levin.report.when import is_worth_a_report
from levin.strategies.ddp import DDPStrategy
from levin.strategies.single_device import SingleDeviceStrategy
from levin.strategies.strategy import Strategy
from levin.trainer import spawned_run
from levin.trainer.compiled import from_compiled, is_compiled
from levin.trainer.results_table import print_results
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn
from levin.utilities.states import RunningStage, StopFlags, TrainerFn, TrainerStatus
from levin.utilities.streams import lenient_streams
from levin.utilities.types import PathLike

if TYPE_CHECKING:
    from levin.explain.text import Explanation


class Caller(Trainer, Protocol):
    """The Trainer whose method was called."""

    loops: Loops
    _engine: Engine
    _flags: StopFlags
    _given_ckpt_path: Optional[PathLike]


def begin(
    trainer: Caller, fn: TrainerFn, model: object, datamodule: Optional[LightningDataModule], given: dict[str, Any]
) -> Run:
    """Return the run of a call of ``fn``, with module and data attached.

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
    previous = trainer.run
    if model is None:
        model = module_of(trainer)
        if model is None:
            raise TypeError(
                f"`Trainer.{fn}()` requires a `LightningModule` when it hasn't been passed in a previous run, received None."
            )
    model = _uncompiled(model, trainer.strategy)
    if not isinstance(model, LightningModule):
        raise TypeError(_no_module(model, given[first], fn))
    model.trainer = trainer
    if datamodule is not None:
        datamodule.trainer = trainer
    elif not any(value is not None for value in given.values()) and fn != TrainerFn.FITTING:
        datamodule = trainer.datamodule
    state, told = trainer.state, trainer._flags
    state.fn, state.status = fn, TrainerStatus.RUNNING
    state.stage = RunningStage.TRAINING if fn == TrainerFn.FITTING else RunningStage(fn.value)
    told.received_sigterm = False
    if fn == TrainerFn.FITTING:
        told.should_stop = False
        _resolve_limits(trainer)
    loaders = Loaders()
    for stage, value in given.items():
        getattr(loaders, stage).attach(value, datamodule, model)
    run = _run_with(trainer, model, datamodule, loaders)
    if previous is not None:
        # Those of the call before, until set-up finds new ones.
        run.metrics, run.ckpt_path = previous.metrics, previous.ckpt_path
    trainer.run = run
    trainer.datamodule = datamodule
    return run


def _run_with(
    trainer: Caller, model: LightningModule, datamodule: Optional[LightningDataModule], loaders: Loaders
) -> Run:
    return Run(
        trainer, trainer.settings, trainer._engine, trainer.profiler, trainer.callbacks, trainer.loggers, trainer.loops,
        trainer.state, trainer._flags, model, datamodule, loaders,
    )  # fmt: skip


def module_of(trainer: Caller) -> Any:
    """Return the module of the present or last run, before the first one that which the strategy was connected to."""
    return trainer.strategy.lightning_module if trainer.run is None else trainer.run.module


def saved_run(trainer: Caller) -> Run:
    """Return what a checkpoint is of: the present or last run, or a module that the strategy was connected to by hand.

    Raises:
        AttributeError: There is neither.
    """
    run: Optional[Run] = trainer.run
    connected = trainer.strategy.lightning_module
    if run is not None and connected in (None, run.module):
        return run
    if connected is None:
        raise AttributeError(
            "Saving a checkpoint is only possible after a model was attached, received none. Call `fit` first, or "
            "`trainer.strategy.connect(model)`."
        )
    trainer.strategy.connect(connected)  # also where only its private field was set
    connected.trainer = trainer
    return _run_with(trainer, connected, None, Loaders())


def method_named(name: str) -> TrainerFn:
    """Return which method ``name`` is.

    Raises:
        ValueError: None that runs.
    """
    names = [each.value for each in TrainerFn]
    if name not in names:
        raise ValueError(f"`fn` must be one of {', '.join(map(repr, names))}, received {name!r}.")
    return TrainerFn(name)


def begin_named(trainer: Caller, fn: TrainerFn, given: dict[str, Any]) -> Run:
    """Return the run of a call of ``fn`` with the arguments ``given``, by their names, with module and data attached."""
    names = {"train": "train_dataloaders", "val": "val_dataloaders"} if fn == "fit" else {STAGE_OF[fn]: "dataloaders"}
    loaders = {stage: given.get(name) for stage, name in names.items()}
    return begin(trainer, fn, given.get("model"), given.get("datamodule"), loaders)


def _no_module(model: object, loaders: object, fn: TrainerFn) -> str:
    """Say what was passed in place of a module, and what was meant."""
    if isinstance(model, type):
        way_out = f" It is a class; pass an instance: {model.__qualname__}(...)."
        return f"`model` must be a `LightningModule`, received {model!r}.{way_out}"
    way_out = f" Swap them: trainer.{fn}(model, loaders)." if isinstance(loaders, LightningModule) else ""
    return f"`model` must be a `LightningModule`, received {type(model).__qualname__}.{way_out}"


def _resolve_limits(trainer: Caller) -> None:
    """Give the limits of training that the user left open their values."""
    loop = trainer.fit_loop
    if loop.max_epochs is None:
        is_endless = loop.max_steps == -1 and not any(isinstance(callback, Timer) for callback in trainer.callbacks)
        loop.max_epochs = 1000 if is_endless else -1
        if is_endless:
            rank_zero_warn(
                "`max_epochs` was not set. Setting it to 1000 epochs. To train without an epoch limit, set `max_epochs=-1`."
            )
    if loop.min_epochs is None:
        loop.min_epochs = 1 if loop.min_steps is not None else 0


def execute(trainer: Caller, run: Run, ckpt_path: object, weights_only: Optional[bool], model_given: bool) -> Any:
    """Carry out ``run``, in this process or in those that the strategy launches; handle what goes wrong."""
    has_others = run.strategy.is_distributed
    watching = second_interrupt_ends(run.strategy.launcher, is_shutdown=False) if has_others else nullcontext()
    with signal_handlers(run), lenient_streams(), watching:
        try:
            result = _execute(trainer, run, ckpt_path, weights_only, model_given)
        except BaseException as error:
            _report(run, error)
            raise
        _report(run, None)
        return result


def _report(run: Run, error: Optional[BaseException]) -> None:
    """Write the page of a fit, and say where things are if it came to its end."""
    if not is_worth_a_report(run):
        return
    from levin.report.at_end import say_where, write_report

    page = write_report(run, error)
    if error is None:
        say_where(run, page)


def _execute(trainer: Caller, run: Run, ckpt_path: object, weights_only: Optional[bool], model_given: bool) -> object:
    launcher = run.strategy.launcher
    runs_elsewhere = False
    try:
        configured = run.call_of(run.module, "configure_callbacks")
        trainer.callbacks = merge_model_callbacks(trainer.callbacks, configured)
        for callback in run.callbacks:
            vars(callback).update(log=run.module.log, log_dict=run.module.log_dict)  # for the time of the call
        run.ckpt_path = select_checkpoint(run, _chosen_path(trainer, ckpt_path), model_given)
        run.strategy.check_module(run.module)
        if launcher is not None:
            runs_elsewhere = run.signals.waits_for_batch = launcher.runs_elsewhere
            function = spawned_run.run_sequence if runs_elsewhere else run_call.run_sequence
            result = launcher.launch(function, run, weights_only, trainer=trainer)
        else:
            result = run_call.run_sequence(run, weights_only)
    except KeyboardInterrupt as error:
        rank_zero_info("Detected KeyboardInterrupt, attempting graceful shutdown ...")
        with second_interrupt_ends(launcher, is_shutdown=True):
            fail(run, error, runs_elsewhere)
            if launcher is not None and hasattr(launcher, "kill"):
                launcher.kill(signal.SIGTERM)
        sys.exit(1)
    except BaseException as error:
        ended = as_ended(run, error)
        fail(run, ended, runs_elsewhere)
        if ended is error:
            raise
        raise ended from error
    finally:
        run.is_setting_up = False
        run.loaders.close()
    run.state.status = TrainerStatus.FINISHED
    run.state.stage = None
    return result


def explain(trainer: Caller, fn: TrainerFn, given: dict[str, Any]) -> Explanation:
    """Return what a method would do; afterwards the Trainer is as it was.

    Args:
        trainer: Whose method it is.
        fn: Which one.
        given: Its arguments, by name.
    """
    from levin.explain.explained_run import explain_sequence

    kept = {name: getattr(trainer, name) for name in ("run", "loops", "callbacks", "datamodule")}
    flags, state = copy(trainer._flags), copy(trainer.state)
    trainer.loops = deepcopy(trainer.loops)
    try:
        run = begin_named(trainer, fn, given)
        run.ckpt_path = given.get("ckpt_path") or trainer._given_ckpt_path
        run.profiler = PassThroughProfiler()  # whatever measures the parts, they are the same
        configured = run.call_of(run.module, "configure_callbacks")
        trainer.callbacks = merge_model_callbacks(trainer.callbacks, configured)
        launcher = run.strategy.launcher
        if launcher is None:
            return explain_sequence(run)
        explanation: Explanation = launcher.launch(explain_sequence, run, None, trainer=trainer)
        return explanation
    finally:
        trainer.run = None  # what is set below counts for the Trainer alone
        for name in ("loops", "callbacks", "datamodule", "run"):
            setattr(trainer, name, kept[name])
        vars(trainer._flags).update(vars(flags))
        vars(trainer.state).update(vars(state))


def _chosen_path(trainer: Caller, given: object) -> object:
    """Return what the user wants to start from: what was passed, else what was set on the Trainer."""
    preset = trainer._given_ckpt_path
    if preset and given is not None:
        rank_zero_warn(f"`trainer.ckpt_path = {preset!r}` was set, but {given!r} was passed, which is used.")
        trainer._given_ckpt_path = preset = None
    return given if given is not None else preset or None


def evaluate(
    trainer: Caller,
    fn: TrainerFn,
    model: object,
    datamodule: Optional[LightningDataModule],
    given: dict[str, object],
    ckpt_path: Optional[PathLike],
    weights_only: Optional[bool],
    verbose: bool,
) -> list[dict[str, float]]:
    """Return the results of ``validate`` or ``test``, and print their table where that is asked for."""
    run = begin(trainer, fn, model, datamodule, given)
    loop = getattr(trainer.loops, fn.value)
    loop.verbose = verbose
    results: list[dict[str, float]] = execute(trainer, run, ckpt_path, weights_only, model is not None)
    if verbose and results and run.strategy.is_global_zero:
        # A loop of the program's own, or a function that it puts there, shows them as it likes.
        show = getattr(loop, "print_results", getattr(loop, "_print_results", print_results))
        with lenient_streams():
            show(results, fn.value)
    return results


def keeps_predictions(strategy: Strategy, value: Optional[bool]) -> bool:
    """Return whether predictions are kept: as the user says, else where they are made in this process.

    Raises:
        MisconfigurationException: They are wanted and made in another process.
    """
    launcher = strategy.launcher
    spawns = launcher is not None and launcher.runs_elsewhere
    if value and spawns:
        raise MisconfigurationException(
            "return_predictions=True is not possible with a strategy that spawns processes. Write predictions with BasePredictionWriter."
        )
    return not spawns if value is None else value


def _uncompiled(model: object, strategy: Strategy) -> object:
    """Return the module inside of a compiled one, with its forward and its steps compiled."""
    if not is_compiled(model):
        return model
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise RuntimeError(
            "A compiled module runs with SingleDeviceStrategy and DDPStrategy, "
            f"received {type(strategy).__name__}. Pass the module as it is, and compile parts of it in `configure_model`."
        )
    return from_compiled(model)
