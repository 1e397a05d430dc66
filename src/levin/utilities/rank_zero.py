"""Messages and functions that only the first rank prints or runs."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from typing import Any, Callable, Optional, TypeVar

from levin.utilities.warnings import LightningDeprecationWarning

T = TypeVar("T")

log = logging.getLogger("levin")
if not log.handlers and not logging.root.handlers:
    # Messages of a run are shown as they are, as long as nobody configures logging: Hydra does later than the import.
    _shown = logging.StreamHandler()
    _shown.addFilter(lambda record: not logging.root.handlers)
    log.addHandler(_shown)
    if log.parent is logging.root:
        # Below another logger, as with the names of Lightning, it is that one's level which counts.
        log.setLevel(logging.INFO)

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def rank_from_environment() -> Optional[int]:
    """Return the rank that the launcher wrote into the environment, or None when there was no launcher."""
    for name in _RANK_VARIABLES:
        value = os.environ.get(name)
        if value is not None:
            return int(value)
    return None


def rank_zero_only(fn: Callable[..., T], default: Optional[T] = None) -> Callable[..., Optional[T]]:
    """Wrap ``fn`` so that it runs on global rank 0 and returns ``default`` elsewhere.

    The rank is ``rank_zero_only.rank``; the strategy sets it once it knows the global rank.

    Example:
        >>> @rank_zero_only
        ... def where() -> str:
        ...     return "rank 0"
        >>> where()
        'rank 0'
    """

    @functools.wraps(fn)
    def wrapped(*args: object, **kwargs: object) -> Optional[T]:
        if _rank() == 0:
            return fn(*args, **kwargs)
        return default

    return wrapped


def _rank() -> int:
    rank: int = getattr(rank_zero_only, "rank", 0)
    return rank


def set_rank(rank: Optional[int] = None) -> None:
    """Say which rank this process is to :func:`rank_zero_only`, also to that of ``lightning_utilities``.

    Packages around Lightning use the latter, which refuses to work as long as nobody has said it.

    Args:
        rank: Of this process; by default what is known already.
    """
    functions: list[object] = [rank_zero_only]
    if (theirs := sys.modules.get("lightning_utilities.core.rank_zero")) is not None:
        functions.append(theirs.rank_zero_only)
    for function in functions:
        setattr(function, "rank", _rank() if rank is None else rank)  # noqa: B010  (unknown to mypy)


set_rank(rank_from_environment() or 0)


def rank_zero_info(message: object, *args: object, **kwargs: Any) -> None:
    """Log ``message`` at level INFO on rank 0, with the arguments of ``logging.info``."""
    if _rank() == 0:
        log.info(message, *args, **{"stacklevel": 2, **kwargs})


def rank_zero_debug(message: object, *args: object, **kwargs: Any) -> None:
    """Log ``message`` at level DEBUG on rank 0, with the arguments of ``logging.debug``."""
    if _rank() == 0:
        log.debug(message, *args, **{"stacklevel": 2, **kwargs})


def rank_zero_warn(message: object, category: type[Warning] = UserWarning, stacklevel: int = 4, **kwargs: Any) -> None:
    """Warn on rank 0.

    Args:
        message: The text, or a warning, whose class counts then.
        category: Class of the warning.
        stacklevel: 4 to point to the caller, 5 to its caller, ...: Lightning has two frames more in between.
        kwargs: Passed to ``warnings.warn``.
    """
    if _rank() == 0:
        text = message if isinstance(message, Warning) else str(message)
        warnings.warn(text, category=category, stacklevel=stacklevel - 2, **kwargs)


def rank_zero_deprecation(message: object, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warn on rank 0 that something will go away."""
    rank_zero_warn(message, **{"category": LightningDeprecationWarning, "stacklevel": stacklevel, **kwargs})


def rank_prefixed_message(message: str, rank: Optional[int]) -> str:
    """Return ``message`` with ``[rank: N]`` in front, or unchanged when the rank is unknown."""
    return message if rank is None else f"[rank: {rank}] {message}"
