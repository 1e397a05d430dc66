"""The exceptions that levin defines itself; everything else is a builtin exception."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from numbers import Number
from typing import Optional


class MisconfigurationException(ValueError):
    """The settings, hooks or loaders that were given cannot work together."""


class DamagedCheckpointError(ValueError, EOFError, RuntimeError, pickle.UnpicklingError, OSError, TypeError):
    """A checkpoint file is too short, was changed, or is none.

    It is what ``torch.load``, or who takes something else for a checkpoint, raises for one or another of such files, for those
    who catch that.
    """


class SIGTERMException(SystemExit):
    """Ends a run that was asked to terminate; the process leaves with status 143 (128 + SIGTERM)."""

    def __init__(self) -> None:
        super().__init__(143)

    def __reduce__(self) -> tuple[type[SIGTERMException], tuple[()]]:
        """Be made again without arguments: exceptions are sent from process to process."""
        return type(self), ()


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, the one that it was raised from or while it was handled, and so on."""
    cause: Optional[BaseException] = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """Return the question that names the nearest of ``choices``, with a space in front; empty where none is near.

    Args:
        word: What the user wrote.
        choices: What there is.

    Example:
        >>> did_you_mean("dpp", ["ddp", "fsdp"]), did_you_mean(3, ["ddp"])
        (' Did you mean ddp?', '')
    """
    if not isinstance(word, str):
        return ""
    by_form = {re.sub("[-_ /.]", "", choice.lower()): choice for choice in choices}
    meant = difflib.get_close_matches(re.sub("[-_ /.]", "", word.lower()), by_form, n=1)
    return f" Did you mean {by_form[meant[0]]}?" if meant else ""


def value_error(argument: str, received: object, expected: str, remedy: str = "") -> MisconfigurationException:
    """Return the error for a wrong argument value in levin's form: what is expected, what came, the way out.

    Args:
        argument: Name of the argument as the user types it.
        received: The value that was given.
        expected: What the value must be, for example ``"must be >= 1"``.
        remedy: One sentence with the way out.

    Example:
        >>> str(value_error("devices", 0, "must be >= 1", "Use 1 for one device."))
        'devices must be >= 1, received 0. Use 1 for one device.'
    """
    text = f"{argument} {expected}, received {received!r}."
    return MisconfigurationException(f"{text} {remedy}" if remedy else text)


def require_choice(argument: str, received: object, choices: Sequence[object]) -> None:
    """Raise unless a value is one of those that an argument may have.

    Args:
        argument: Name of the argument.
        received: The value.
        choices: Two values or more.

    Raises:
        MisconfigurationException: It is none of them.

    Example:
        >>> require_choice("mode", "max", ("min", "max"))
    """
    if received not in choices:
        *others, last = map(repr, choices)
        raise value_error(argument, received, f"must be {', '.join(others)} or {last}")


def require_instance(argument: str, received: object) -> None:
    """Raise if a class is given where an object of it is meant.

    Args:
        argument: Name of the argument.
        received: The value.

    Raises:
        MisconfigurationException: It is a class.

    Example:
        >>> require_instance("profiler", object())
    """
    if isinstance(received, type):
        raise value_error(argument, received, "must be an object, not its class", f"Write {received.__name__}(...).")


def require_number(argument: str, received: object) -> None:
    """Raise unless a value is a number, or None.

    Args:
        argument: Name of the argument.
        received: The value.

    Raises:
        MisconfigurationException: It is something else.

    Example:
        >>> require_number("patience", 3)
    """
    if received is not None and not isinstance(received, Number):
        raise value_error(argument, received, "must be a number")


def add_hint(exception: BaseException, sign: str, hint: str) -> None:
    """Put a way out before the message of an error of torch's, if ``sign`` is in it."""
    if exception.args and sign in str(exception.args[0]):
        exception.args = (f"{hint}\n{exception.args[0]}", *exception.args[1:])
