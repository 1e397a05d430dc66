"""Telling that a checkpoint was saved with other optimizers or schedulers than there are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from levin.resume.optimizer_groups import schedule_new_groups
from levin.utilities.rank_zero import rank_zero_warn

# What schedulers of all kinds have in some versions of torch.
_OF_SOME_VERSIONS = {
    "verbose",
    "base_lrs",
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_is_initial",
    "_get_lr_called_within_step",
}

_WAY_OUT = "Go on with the optimizers of then, or load the weights with `load_from_checkpoint` and start a new fit."


def check_optimizers(optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, object]]) -> None:
    """Raise if ``states`` cannot be those of ``optimizers``.

    Args:
        optimizers: Those of the run.
        states: The ``optimizer_states`` of a checkpoint.

    Raises:
        ValueError: There are more or fewer, of another kind, or with other groups of parameters.

    Example:
        >>> check_optimizers([], [])
    """
    if len(optimizers) != len(states):
        raise ValueError(
            f"The checkpoint holds the states of {len(states)} optimizers, and `configure_optimizers` gives "
            f"{len(optimizers)}: {[type(optimizer).__name__ for optimizer in optimizers]}. {_WAY_OUT}"
        )
    for number, (optimizer, state) in enumerate(zip(optimizers, states)):
        if state == {} and optimizer.param_groups:
            raise ValueError(
                f"The state of optimizer {number} in the checkpoint is empty, since the run that saved it had no optimizer. "
                f"{_WAY_OUT}"
            )
        # A state that is read in parts says by itself what does not fit.
        problem = _difference(optimizer, state.get("param_groups") if isinstance(state, Mapping) else None)
        if problem:
            raise ValueError(f"The state of optimizer {number} in the checkpoint {problem}. {_WAY_OUT}")


def load_schedulers(schedulers: Sequence[Any], states: Sequence[Any]) -> None:
    """Load the states of schedulers, in their order.

    Warns if there are more or fewer of them than schedulers, or if one is of another kind.

    Args:
        schedulers: Those of the run.
        states: The ``lr_schedulers`` of a checkpoint.

    Raises:
        ValueError: A scheduler cannot load the state of one of another kind.
    """
    if len(schedulers) != len(states):
        names = [type(scheduler).__name__ for scheduler in schedulers]
        common = min(len(schedulers), len(states))
        what = f"the last {len(states) - common} are left out" if states[common:] else f"{names[common:]} begin anew"
        rank_zero_warn(
            f"The checkpoint holds the states of {len(states)} learning-rate schedulers, and `configure_optimizers` gives "
            f"{len(schedulers)}: {names}. The first {common} go on in their order, and {what}."
        )
    for number, (scheduler, state) in enumerate(zip(schedulers, states)):
        schedule_new_groups(scheduler)
        lost, added = _other_settings(scheduler, state)
        name = type(scheduler).__name__
        told = (
            f"The state of learning-rate scheduler {number} in the checkpoint is of another kind than {name}: it has "
        )
        told += f"{lost}, and {name} has {added}."
        try:
            scheduler.load_state_dict(state)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            if lost or added:
                raise ValueError(f"{told} {_WAY_OUT.replace('optimizers', 'schedulers')}") from error
            raise
        if (optimizer := getattr(scheduler, "optimizer", None)) is not None:
            # It has stepped, in the run that was saved: torch warns of schedulers that step before their optimizers.
            optimizer._opt_called = True
        if lost and added:
            rank_zero_warn(f"{told} {name} takes from it what has the same name, such as the steps that are done.")


def _other_settings(scheduler: Any, state: object) -> tuple[list[str], list[str]]:
    """Return what the state of a scheduler has that ``scheduler`` has not, and the reverse."""
    read = getattr(scheduler, "state_dict", None)
    if not isinstance(state, Mapping) or read is None:
        return [], []
    now, then = ({str(key) for key in each} - _OF_SOME_VERSIONS for each in (read(), state))
    return sorted(then - now), sorted(now - then)


def _difference(optimizer: Optimizer, saved: object) -> str:
    if not isinstance(saved, (list, tuple)):
        return ""  # a state of the optimizer's own form
    name, groups = type(optimizer).__name__, optimizer.param_groups
    then, now = ([len(group["params"]) for group in which] for which in (saved, groups))
    if then != now:
        return f"has groups of {then} parameters, and those of {name} are of {now}"
    for old, new in zip(saved, groups):
        # A newer torch may know more settings of the same kind of optimizer, and an older one fewer.
        lost, added = set(old) - set(new), set(optimizer.defaults) - set(old)
        lost -= {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "param_names", "name"}
        if lost and added:
            return f"is of another kind: it has {sorted(lost)}, and {name} has {sorted(added)}"
    return ""
