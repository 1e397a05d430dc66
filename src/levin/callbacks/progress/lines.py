"""Progress as plain lines of text, for logs."""

from __future__ import annotations

from time import monotonic

from levin.callbacks.progress.progress_bar import Metrics, convert_inf
from levin.callbacks.progress.renderer import ShownLoop


def describe(loop: ShownLoop, metrics: Metrics) -> str:
    """Return where a loop stands, in one line with its values."""
    seconds = monotonic() - loop.start
    num_timed = loop.done - loop.first
    return format_line(loop.description.strip(), loop.done, convert_inf(loop.total), seconds, num_timed, metrics)


def format_line(
    description: str,
    done: int,
    total: int | float | None,
    seconds: float,
    num_timed: int,
    metrics: dict[str, object],
) -> str:
    """Return the state of a loop in one line.

    Args:
        description: Name of the loop.
        done: Batches done.
        total: Batches there are; None if unknown.
        seconds: Time since the start, in seconds.
        num_timed: How many batches were done in that time.
        metrics: Values to show.

    Example:
        >>> format_line("Epoch 0", 20, 40, 10.0, 20, {"loss": 0.25, "v_num": 3})
        'Epoch 0:  50% 20/40 [00:10<00:10, 2.00it/s, loss=0.250, v_num=3]'
    """
    rate = num_timed / seconds if seconds > 0 else 0.0
    if total is None:
        position, times = f"{done}/?", format_seconds(seconds)
    else:
        position = f"{100 * done / total if total else 100:3.0f}% {done}/{total}"
        remaining = format_seconds((total - done) / rate) if rate > 0 else "?"
        times = f"{format_seconds(seconds)}<{remaining}"
    values = [f"{name}={format_value(value)}" for name, value in metrics.items()]
    return f"{description}: {position} [{', '.join([times, f'{rate:.2f}it/s', *values])}]"


def format_seconds(seconds: float) -> str:
    """Return a duration as ``MM:SS`` or ``H:MM:SS``.

    Example:
        >>> format_seconds(75), format_seconds(3675)
        ('01:15', '1:01:15')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def format_value(value: object) -> str:
    """Return a number with three significant digits or more, in five characters where that is enough.

    Example:
        >>> [format_value(value) for value in (3, 0.5, 1.23456, 0.02714, 1e-05, 12345.67, float("nan"), "abc")]
        ['3', '0.500', '1.235', '0.0271', '1e-5', '12345.7', 'nan', 'abc']
    """
    if not isinstance(value, float):
        return str(value)
    if 999.5 <= abs(value) < 1e5:
        return f"{value:.1f}"
    text = f"{value:.3g}".replace("e+0", "e+").replace("e-0", "e-")
    if "e" in text or "n" in text or len(text) >= 5:  # an exponent, nan or inf, or long enough
        return text
    num_integer_digits = len(text.partition(".")[0])
    return f"{value:.{max(1, 4 - num_integer_digits)}f}"
