"""The Trainer's arguments: each checked on its own, as pure functions."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Optional, TypeVar, Union, cast

from levin.utilities.exceptions import MisconfigurationException, value_error
from levin.utilities.rank_zero import rank_zero_info

Limit = Union[int, float]
F = TypeVar("F", bound=Callable[..., Any])


def defaults_from_environment(init: F) -> F:
    """Let ``PL_<CLASS>_<ARGUMENT>`` stand in for each argument that is not given.

    Values are read as Python literals where possible; an explicit argument wins.
    """
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise TypeError(
                f"{type(self).__name__} takes keyword arguments only, received {len(args)} by position. "
                f"Write {type(self).__name__}(max_epochs=10)."
            )
        prefix = f"PL_{type(self).__name__.upper()}_"
        for name in names:
            text = os.environ.get(prefix + name.upper(), "")
            if text and name not in kwargs:
                try:
                    kwargs[name] = ast.literal_eval(text)
                except (ValueError, SyntaxError):
                    kwargs[name] = text
        init(self, **kwargs)

    return cast(F, wrapped)


def check_limit(value: Optional[Limit], name: str) -> Limit:
    """Return a limit of batches: an int counts batches, a float in [0, 1] is a fraction; None is 1.0.

    Raises:
        MisconfigurationException: Neither of them.
    """
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise value_error(name, value, "must be an int or a float", "Use 10 for ten batches, 0.1 for a tenth.")
    if value < 0 or (value > 1 and value != int(value)):
        raise value_error(name, value, "must be a count >= 0 or a fraction in [0.0, 1.0]")
    if name != "overfit_batches" and value == 1:
        what = "1 batch" if isinstance(value, int) else "100% of the batches"
        rank_zero_info(f"`Trainer({name}={value!r})` was configured so {what} will be used.")
    return int(value) if value > 1 else value


def num_from_limit(limit: Limit, length: Limit, name: str) -> Limit:
    """Return how many batches a limit leaves of a loader of ``length`` batches (inf when unknown).

    Raises:
        MisconfigurationException: A fraction of an unknown length, or one that leaves nothing.
    """
    if isinstance(limit, int) or limit == 0.0:
        return min(length, int(limit))
    if length == math.inf:
        if limit == 1.0:
            return length
        raise MisconfigurationException(
            f"{name} must be 1.0 or an int when the loader's length is unknown, received {limit}. Give a number of batches."
        )
    count = int(length * limit)
    if count == 0 and length > 0 and limit > 0.0:
        raise MisconfigurationException(
            f"{name} must leave at least one of {length} batches, received {limit}. Use at least {1 / length:.4g}."
        )
    return count


def parse_duration(value: Any, name: str) -> Optional[timedelta]:
    """Return a duration given as ``"DD:HH:MM:SS"``, dict or timedelta; None when ``value`` is no duration at all.

    Raises:
        MisconfigurationException: A string or dict that is not a duration.
    """
    if isinstance(value, timedelta):
        return value
    if isinstance(value, dict):
        try:
            return timedelta(**value)
        except TypeError as error:
            raise value_error(name, value, "must hold arguments of datetime.timedelta", 'Use {"hours": 1}.') from error
    if isinstance(value, str):
        parts = value.strip().split(":")
        if len(parts) != 4 or not all(part.isdigit() for part in parts):
            raise value_error(name, value, 'must have the form "DD:HH:MM:SS"', 'Use "00:01:30:00" for 90 minutes.')
        days, hours, minutes, seconds = map(int, parts)
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    return None


COUNTS = {
    "max_epochs": (-1, "Use -1 for no limit."),
    "min_epochs": (0, "Use 1 for at least one epoch."),
    "max_steps": (-1, "Use -1 for no limit."),
    "min_steps": (0, "Use 1 for at least one step."),
    "num_nodes": (1, "Use 1 for one machine."),
    "accumulate_grad_batches": (1, "Use 1 to step on every batch."),
    "log_every_n_steps": (0, "Use 0 to log no steps."),
    "num_sanity_val_steps": (-1, "Use -1 for all batches."),
    "reload_dataloaders_every_n_epochs": (0, "Use 0 to load them once."),
    "check_val_every_n_epoch": (1, "Use None to count batches across epochs."),
}
"""Argument -> its least value, and the way out when it is less."""

_MAY_BE_LEFT_OPEN = ("max_epochs", "min_epochs", "min_steps", "check_val_every_n_epoch")


def check_counts(given: dict[str, Any]) -> None:
    """Raise MisconfigurationException when an argument that counts something is no int, or too small."""
    for name, value in given.items():
        minimum, remedy = COUNTS[name]
        if value is None and name in _MAY_BE_LEFT_OPEN:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise value_error(name, value, f"must be an int >= {minimum}", remedy)


def check_flags(given: dict[str, Any]) -> None:
    """Raise MisconfigurationException when an argument that switches something is neither on nor off (None: the default)."""
    for name, value in given.items():
        if value is not None and value not in (True, False):
            raise value_error(name, value, "must be True or False")


BAREBONES = {
    "enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 0,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "fast_dev_run": False, "detect_anomaly": False,
    "profiler": None,
}  # fmt: skip
"""What barebones switches off, with the values it forces."""


def check_barebones(given: dict[str, Any]) -> None:
    """Raise ValueError when an argument asks for what ``barebones=True`` switches off."""
    wrong = {name: value for name, value in given.items() if value and name in BAREBONES}
    if wrong:
        text = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(f"Trainer(barebones=True) switches these off, received {text}. Leave them out.")
    rank_zero_info(
        "You are running in `Trainer(barebones=True)` mode. These are off, to measure the overhead of the Trainer: "
        + ", ".join([*BAREBONES, "self.log", "self.log_dict"])
    )
