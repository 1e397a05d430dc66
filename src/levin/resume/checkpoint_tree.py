"""The one tree that is saved: collected from a run, and put back into one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Optional

from levin.checkpoint.layout import COMPATIBLE_VERSION, OWN_KEY
from levin.hparams import is_omegaconf
from levin.resume.changed_optimizers import check_optimizers, load_schedulers
from levin.resume.optimizer_groups import groups_by_name, in_order, keep_schedule, restore_groups
from levin.resume.rank_states import part_of_rank, with_other_ranks
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.rng_states import collect_rng_states, set_rng_states

if TYPE_CHECKING:
    from levin.protocols import Run
    from levin.strategies.strategy import Strategy
    from levin.utilities.types import PathLike, StateDict

# Of what levin adds to the file; counted up when its keys change.
OWN_VERSION = 2


def collect(run: Run, weights_only: bool = False) -> dict[str, object]:
    """Return the tree of a run.

    Args:
        run: Which one.
        weights_only: Whether to leave out optimizers, schedulers, callbacks and the exact position.
    """
    module, datamodule = run.module, run.datamodule
    checkpoint: dict[str, object] = {
        "epoch": run.current_epoch,
        "global_step": run.global_step,
        "pytorch-lightning_version": COMPATIBLE_VERSION,
        "state_dict": run.strategy.lightning_module_state_dict(),
        "loops": {f"{fn}_loop": getattr(run.loops, fn).state_dict() for fn in ("fit", "validate", "test", "predict")},
    }
    if not weights_only:
        checkpoint["callbacks"] = {
            callback.state_key: state for callback in run.callbacks if (state := callback.state_dict())
        }
        checkpoint["optimizer_states"] = [run.strategy.optimizer_state(o) for o in run.strategy.optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in run.strategy.lr_scheduler_configs]
        precision = run.strategy.precision
        precision_state = precision.state_dict()
        if precision_state:
            checkpoint[type(precision).__qualname__] = precision_state
        precision.on_save_checkpoint(checkpoint)
        own = {"version": OWN_VERSION, "rng": collect_rng_states(), **run.resume.state_dict(run)}
        checkpoint[OWN_KEY] = with_other_ranks(own, run.strategy)
    for owner in (module, datamodule):
        if owner is not None and owner.hparams:
            is_conf = is_omegaconf(owner.hparams)
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY] = owner.hparams if is_conf else dict(owner.hparams)
            if is_conf:
                checkpoint[owner.CHECKPOINT_HYPER_PARAMS_TYPE] = type(owner.hparams)
    if datamodule is not None:
        state = run.call_of(datamodule, "state_dict")
        if state:
            checkpoint[type(datamodule).__qualname__] = state
    if not weights_only:
        for callback in run.callbacks:
            run.call_of(callback, "on_save_checkpoint", run.trainer, module, checkpoint)
    run.call_of(module, "on_save_checkpoint", checkpoint)
    return checkpoint


def save_checkpoint(
    run: Run, path: PathLike, weights_only: Optional[bool] = None, storage_options: object = None
) -> None:
    """Save the run, so that ``fit(ckpt_path=path)`` goes on from here; all ranks call this."""
    with run.profiler.profile("save_checkpoint") if run.is_profiled else nullcontext():
        run.strategy.meet("trainer.save_checkpoint")
        if run.unsent.rows:  # a run that goes on from here logs what comes after
            run.unsent.send(math.inf)
        checkpoint = collect(run, weights_only=bool(weights_only))
        run.strategy.save_checkpoint(checkpoint, path, storage_options=storage_options)
        run.strategy.barrier("Trainer.save_checkpoint")


def restore_module(run: Run, checkpoint: StateDict) -> None:
    """Load weights, data module and callbacks out of ``checkpoint``."""
    restore_weights(run, checkpoint)
    restore_datamodule(run, checkpoint)
    restore_callbacks(run, checkpoint)


def restore_weights(run: Run, checkpoint: StateDict) -> None:
    """Load the module's weights, and what it has saved itself."""
    run.call_of(run.module, "on_load_checkpoint", checkpoint)
    run.strategy.load_model_state_dict(checkpoint, strict=run.module.strict_loading)


def restore_datamodule(run: Run, checkpoint: StateDict) -> None:
    """Load the state of the data module, if there is one."""
    datamodule = run.datamodule
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        state = checkpoint[type(datamodule).__qualname__]
        run.call_of(datamodule, "load_state_dict", state)


def restore_callbacks(run: Run, checkpoint: StateDict) -> None:
    """Load the states of callbacks; those of absent ones are warned about."""
    states = checkpoint.get("callbacks")
    if states is None:
        return
    for callback in run.callbacks:
        run.call_of(callback, "on_load_checkpoint", run.trainer, run.module, checkpoint)
    present = {key for callback in run.callbacks for key in _keys_of(callback)}
    absent = sorted(str(key) for key in states if key not in present)
    if absent:
        rank_zero_warn(
            "The checkpoint holds states of callbacks that the Trainer does not have: "
            f"{absent}. Add them to Trainer(callbacks=...) to go on with them."
        )
    for callback in run.callbacks:
        state = next((states[key] for key in _keys_of(callback) if key in states), None)
        if state:
            callback.load_state_dict(deepcopy(state))


def _keys_of(callback: Any) -> tuple[object, ...]:
    """Return where a callback's state may be: under its key, or in files of Lightning before 1.5 under its class."""
    return callback.state_key, type(callback), type(callback).__qualname__


def restore_precision(run: Run, checkpoint: StateDict) -> None:
    """Load the state of the precision, such as a gradient scaler."""
    precision = run.strategy.precision
    for key in (type(precision).__qualname__, "native_amp_scaling_state"):
        if key in checkpoint:
            precision.load_state_dict(checkpoint[key])
            break
    precision.on_load_checkpoint(checkpoint)


def restore_loops(run: Run, checkpoint: StateDict) -> None:
    """Load the counters."""
    loops = checkpoint.get("loops") or {}
    getattr(run.loops, run.fn).load_state_dict(loops.get(f"{run.fn}_loop", {}))
    if run.fn == "fit" and own_state(checkpoint) is None:
        _count_steps_once(run)


def _count_steps_once(run: Run) -> None:
    """Leave out the steps of the other kind of optimization, which files that Lightning has migrated count as well."""
    loop = run.loops.fit.epoch_loop
    unused = loop.manual_step_progress if run.module.automatic_optimization else loop.optim_progress.step
    zero = dict.fromkeys(("ready", "completed"), 0)
    unused.load_state_dict({"total": zero, "current": zero})


def restore_optimizers(run: Run, checkpoint: StateDict) -> None:
    """Load optimizers and schedulers.

    Raises:
        KeyError: The file holds none, since it was saved with weights only.
        ValueError: It holds those of other optimizers than there are.
    """
    for key in ("optimizer_states", "lr_schedulers"):
        if key not in checkpoint:
            raise KeyError(
                f"{run.ckpt_path} has no {key!r}, since it was saved with weights only, and fit cannot go on from it. "
                "Load the weights with `load_from_checkpoint` and start a new fit."
            )
    if not checkpoint["optimizer_states"]:  # saved before there were any, or made by a program of the weights
        if checkpoint["global_step"]:
            rank_zero_warn(f"{run.ckpt_path} holds no states of optimizers: they begin anew.")
        if not checkpoint["lr_schedulers"]:
            return
    elif run.strategy.lightning_restore_optimizer:
        names = (own_state(checkpoint) or {}).get("optimizer_groups")
        if names:
            restore_groups(run.strategy.optimizers, run.module, *names)
        optimizers, states = run.strategy.optimizers, checkpoint["optimizer_states"]
        if len(optimizers) == len(states):
            states = list(map(run.strategy.own_optimizer_state, optimizers, states))
        check_optimizers(optimizers, states)
        states = list(map(keep_schedule, states, optimizers))
        if names:
            states = list(map(in_order, states, names[1], groups_by_name(optimizers, run.module)))
        checkpoint["optimizer_states"] = states
        run.strategy.load_optimizer_state_dict(checkpoint)
    load_schedulers([config.scheduler for config in run.strategy.lr_scheduler_configs], checkpoint["lr_schedulers"])


def continue_logs(run: Run, checkpoint: Mapping[str, object]) -> None:
    """Tell the loggers where the run goes on."""
    logged = (own_state(checkpoint) or {}).get("last_logged", ())
    for logger, last in zip_longest(run.loggers, logged[: len(run.loggers)]):
        logger.continue_from(run.loops.fit.epoch_loop._batches_that_stepped, *([last] if last else []))


def own_state(checkpoint: Mapping[str, object]) -> Optional[StateDict]:
    """Return what levin itself added to the file, or None when another framework wrote it."""
    state = checkpoint.get(OWN_KEY)
    return state if isinstance(state, dict) else None


def keep_part_of_rank(checkpoint: StateDict, strategy: Strategy, weights_only: Optional[bool]) -> None:
    """Leave of :func:`own_state` the part that is for this rank.

    Args:
        checkpoint: As it was read; it is changed.
        strategy: Which rank this is, of how many.
        weights_only: Whether reading may run no code; None for the default.
    """
    state = own_state(checkpoint)
    if state is None:
        return
    if state.get("version") != OWN_VERSION:
        rank_zero_warn(
            f"The checkpoint has version {state.get('version')} of what levin keeps for an exact resume, and this levin reads "
            f"version {OWN_VERSION}: the run goes on as from a file of Lightning. Use the levin that wrote it to go on exactly."
        )
        del checkpoint[OWN_KEY]
        return
    data = strategy.data_parallel
    checkpoint[OWN_KEY] = part_of_rank(state, data.rank, data.size, weights_only)


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the random states of this process back, if it was there when they were saved."""
    if "rng" in state:
        set_rng_states(state["rng"])
