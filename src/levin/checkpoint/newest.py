"""``ckpt_path="auto"``: the newest intact checkpoint that this run, or an earlier process of the same script, left."""

from __future__ import annotations

import os
import re
from typing import Any, Optional, Protocol

from levin.utilities.filesystem import get_filesystem, is_local, local_path
from levin.utilities.states import TrainerFn, TrainerState


class Call(Protocol):
    """What of a call of the Trainer says which checkpoint it starts from."""

    trainer: Any
    settings: Any
    strategy: Any
    state: TrainerState
    callbacks: list[Any]
    loggers: list[Any]

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """Those that save checkpoints."""


def find_newest(run: Call) -> Optional[str]:
    """Return the newest intact checkpoint of the run's folders, or None for a fresh start.

    The folders are ``default_root_dir``, those of the checkpoint callbacks, and for a callback that saves in the folder
    of the logger's version those of earlier versions: the newest version that has an intact checkpoint. Files that are
    damaged or incomplete are named in a warning each. Fit leaves out callbacks that save weights only.

    Args:
        run: With callbacks and loggers attached.
    """
    from levin.checkpoint.verify import find_newest_intact

    rows: list[list[str]] = [[str(run.settings.default_root_dir)]]
    for callback in run.checkpoint_callbacks:
        if run.state.fn == TrainerFn.FITTING and getattr(callback, "save_weights_only", False):
            continue  # there is nothing to go on from
        rows.append(_folders_of(run, callback))
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for row in rows:
        for folder in row:
            if folder in seen:
                continue
            seen.add(folder)
            path = find_newest_intact(folder)
            if path is not None:
                found[path] = modified(path)
                break
    return max(found, key=lambda path: (found[path], path), default=None)


def modified(path: str) -> float:
    """Return when a file or folder, local or remote, was changed last, in seconds."""
    if is_local(path):
        return os.stat(local_path(path)).st_mtime
    when: float = get_filesystem(path).modified(path).timestamp()
    return when


def _folders_of(run: Call, callback: Any) -> list[str]:
    """Return the folders that hold the files of a callback, the newest first."""
    resolve = getattr(callback, "_resolve_ckpt_dir", None)
    folder = resolve(run.trainer) if resolve is not None else getattr(callback, "dirpath", None)
    if not folder:
        return []
    folder = str(folder)
    parent, name = os.path.split(folder)
    parent, version = os.path.split(parent)
    logger = run.loggers[0] if run.loggers else None
    is_numbered = getattr(logger, "_numbers_versions", False) and name == "checkpoints"
    if not is_numbered or version != f"version_{getattr(logger, 'version', None)}":
        return [folder]
    # Each process takes the next number, so that the files of the one before are in another folder.
    earlier = [os.path.join(parent, f"version_{number}", name) for number in _versions_in(parent)]
    return [folder, *(other for other in earlier if other != folder)]


def _versions_in(parent: str) -> list[int]:
    """Return the numbers N of what is called ``version_N`` in a folder, the highest first."""
    filesystem = get_filesystem(parent)
    if not filesystem.isdir(local_path(parent)):
        return []
    paths = filesystem.ls(local_path(parent), detail=False)
    matches = (re.fullmatch(r"version_(\d+)", os.path.basename(str(path).rstrip("/"))) for path in paths)
    return sorted((int(match[1]) for match in matches if match), reverse=True)
