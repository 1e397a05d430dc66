"""The arguments of ModelCheckpoint, checked."""

from __future__ import annotations

import os
from datetime import timedelta

from levin.callbacks.checkpoint_files import check_template
from levin.utilities.exceptions import MisconfigurationException, require_choice, require_number, value_error
from levin.utilities.filesystem import is_local, local_path


def check_choice(filename: str | None, monitor: str | None, save_last: object, save_top_k: int, mode: str) -> None:
    """Raise if the arguments that choose files are out of range or exclude each other.

    Raises:
        MisconfigurationException: What is wrong, and the way out.
        ValueError: ``filename`` is no template.
    """
    require_number("save_top_k", save_top_k)
    if monitor is not None and not isinstance(monitor, str):
        raise value_error(
            "monitor", monitor, "must be the name of one metric, or None", "Use one ModelCheckpoint for each."
        )
    if save_top_k < -1:
        raise value_error("save_top_k", save_top_k, "must be >= -1", "Use -1 to keep all checkpoints.")
    require_choice("mode", mode, ("min", "max"))
    if monitor is None and save_top_k not in (-1, 0, 1):
        raise MisconfigurationException(
            f"ModelCheckpoint(save_top_k={save_top_k}, monitor=None) has no metric to choose the best files by. "
            "Give `monitor`, or save_top_k=-1 (keep all), 0 (none) or 1 (the newest)."
        )
    require_choice("save_last", save_last, (True, False, None, "link"))
    if filename is not None:
        check_template(filename)


def resolved_folder(dirpath: str | os.PathLike[str], save_last: object) -> str:
    """Return the folder for the files: a local one as an absolute path without links.

    Raises:
        ValueError: A remote one, where no links can be made.
    """
    folder = os.fspath(dirpath)
    if is_local(folder):
        return os.path.realpath(os.path.expanduser(local_path(folder)))
    if save_last == "link":
        raise ValueError(f"save_last='link' needs a local dirpath, received {folder!r}. Use save_last=True.")
    return folder


def checked_triggers(
    every_n_train_steps: int | None, every_n_epochs: int | None, train_time_interval: timedelta | None
) -> tuple[int, int]:
    """Return steps and epochs between checkpoints, 0 for what is no trigger; each epoch is one if nothing is given.

    Raises:
        MisconfigurationException: A negative number, none at all, or more than one trigger.
        TypeError: ``train_time_interval`` is no timedelta.
    """
    for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
        require_number(name, value)
        if value is not None and value < 0:
            raise value_error(name, value, "must be >= 0", "Use 0 to switch the trigger off.")
    if train_time_interval is not None and not isinstance(train_time_interval, timedelta):
        raise TypeError(
            f"train_time_interval must be a datetime.timedelta, received {train_time_interval!r}. "
            "Use for example timedelta(minutes=30)."
        )
    chosen = [bool(every_n_train_steps), bool(every_n_epochs), train_time_interval is not None]
    if sum(chosen) > 1:
        raise MisconfigurationException(
            f"every_n_train_steps, every_n_epochs and train_time_interval exclude each other, received "
            f"{every_n_train_steps}, {every_n_epochs} and {train_time_interval}. Use one ModelCheckpoint for each."
        )
    if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
        return 0, 1
    return every_n_train_steps or 0, every_n_epochs or 0
