"""Names of checkpoint files: the folder, filling templates, and finding a name that is free."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_FIELD = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")


def check_template(template: str) -> None:
    """Raise if ``template`` is not made of text and ``{key}`` or ``{key:format}`` fields.

    Raises:
        ValueError: A brace without its partner, or a field without a name.
    """
    rest = _FIELD.sub("", template)
    empty = any(not match.group(1) for match in _FIELD.finditer(template))
    if "{" in rest or "}" in rest or empty:
        raise ValueError(
            f"filename must be text with fields like {{epoch}} or {{val_loss:.2f}}, received {template!r}. "
            "Give every field a name and close every brace."
        )


def fill_template(
    template: str, metrics: Mapping[str, Any], auto_insert_metric_name: bool = True, equals: str = "="
) -> str:
    """Return ``template`` with its fields replaced by metrics.

    Args:
        template: Text with ``{key}`` and ``{key:format}`` fields.
        metrics: Values by key; numbers or tensors of one element. A key that is not there counts as 0.
        auto_insert_metric_name: Whether a field becomes ``key=value`` instead of ``value``.
        equals: What stands between key and value.

    Raises:
        ValueError: A value does not fit its format.

    Example:
        >>> fill_template("{epoch:02d}-{val_loss:.2f}", {"epoch": 3, "val_loss": 0.126})
        'epoch=03-val_loss=0.13'
    """

    def replace(match: re.Match[str]) -> str:
        name, spec = match.group(1), match.group(2) or ""
        value = metrics.get(name, 0)
        if isinstance(value, torch.Tensor):
            value = value.item()
        try:
            text = format(value, spec)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The file name field {{{name}:{spec}}} cannot show the value {value!r} of {name!r}: {error}. "
                "Use a format that fits the value, such as :.2f for a float."
            ) from error
        return f"{name}{equals}{text}" if auto_insert_metric_name else text

    return _FIELD.sub(replace, template)


def template_pattern(template: str, extension: str) -> re.Pattern[str]:
    """Return the expression that matches any name made of ``template``, with or without a version number.

    Example:
        >>> bool(template_pattern("last-{epoch}", ".ckpt").fullmatch("last-epoch=3-v2.ckpt"))
        True
    """
    fixed = (re.escape(text) for text in _FIELD.sub("\0", template).split("\0"))
    return re.compile(".*".join(fixed) + ".*" + re.escape(extension))


def first_free_name(
    name: Callable[[int | None], str], is_taken: Callable[[str], bool], starting_version: int = 1
) -> str:
    """Return ``name(None)`` if it is free, else the first of ``name(starting_version)``, ``name(... + 1)`` that is.

    Args:
        name: Gives the path for a version number, or for None the path without one.
        is_taken: Whether a path may not be used.
        starting_version: The first number to try.

    Example:
        >>> first_free_name(lambda v: "last" if v is None else f"last-v{v}", {"last", "last-v1"}.__contains__)
        'last-v2'
    """
    path = name(None)
    version = starting_version
    while is_taken(path):
        path = name(version)
        version += 1
    return path


def default_folder(root: str, loggers: Sequence[Any]) -> str:
    """Return the folder for checkpoints where the user names none: one in that of the first logger's version.

    Args:
        root: Folder of the run, for the case that there is no logger, or that it keeps nothing on disk.
        loggers: Of the run.
    """
    if not loggers:
        return os.path.join(root, "checkpoints")
    logger = loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    save_dir = root if logger.save_dir is None else logger.save_dir
    return os.path.join(save_dir, str(logger.name or ""), version, "checkpoints")
