"""What a checkpoint is made of, by name: the keys and the version that other frameworks look for, and our own."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.filesystem import exists, is_folder, is_local, local_path, remove, sync_folder
from levin.utilities.types import PathLike, StateDict

COMPATIBLE_VERSION = "2.6.6"
"""The Lightning version whose file layout is written."""
OWN_KEY = "levin"
"""Where everything lies that Lightning's layout has no place for."""
ZERO_FOLDER = "checkpoint"
"""Where in its folder DeepSpeed's own files lie."""
META_FILE = "meta.pt"
"""What the folder of a sharded checkpoint holds beside the parts: everything but weights and optimizer states."""


class StateElsewhere(ABC):
    """What stands in a tree in the place of a state that every process reads its own part of."""

    @abstractmethod
    def load_into(self, state: StateDict, group: object = None) -> StateDict:
        """Read the parts that are in ``state`` here, in place. All processes call this.

        Args:
            state: With tensors, also DTensors, of the shapes that are there now.
            group: The processes; all when None.

        Raises:
            ValueError: There is not all that ``state`` has, or it is damaged.
        """


def is_sharded(path: PathLike) -> bool:
    """Return whether ``path`` is the folder of a sharded checkpoint.

    Raises:
        DamagedCheckpointError: It is a folder of something else, or of a save that did not come to its end.
    """
    if not is_folder(path):
        return False
    folder = folder_name(path)
    if not exists(f"{folder}/{META_FILE}") and not is_zero(folder):
        raise DamagedCheckpointError(
            f"{os.fspath(path)!r} is a folder without {META_FILE}, so it is no complete checkpoint. Give the folder of a "
            "save that came to its end, or a file."
        )
    return True


def is_zero(folder: str) -> bool:
    """Return whether a folder is a checkpoint of DeepSpeed, which writes ``latest`` when all else is there."""
    return exists(f"{folder}/latest") and is_folder(f"{folder}/{ZERO_FOLDER}")


def folder_name(path: PathLike) -> str:
    """Return the path of a local folder as the operating system knows it, or its URL, without a slash at the end."""
    return local_path(path).rstrip("/")


def local_folder(path: PathLike) -> str:
    """Return the path of a folder for the functions of the operating system.

    Raises:
        ValueError: It is not on the file system.
    """
    if not is_local(path):
        raise ValueError(
            f"DeepSpeed reads and writes folders of the file system, received {os.fspath(path)!r}. "
            "Give a local path that all processes see."
        )
    return folder_name(path)


def put_in_place(unfinished: str, folder: str) -> None:
    """Rename a complete folder, in the place of what has that name."""
    before = f"{folder}.before"
    remove(before)
    if os.path.lexists(folder):
        os.rename(folder, before)
    os.rename(unfinished, folder)
    sync_folder(os.path.dirname(os.path.abspath(folder)))
    remove(before)
