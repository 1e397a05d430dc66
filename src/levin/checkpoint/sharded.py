"""Checkpoints as folders: every process writes and reads its own part, by ``torch.distributed.checkpoint``.

A folder holds the files of torch (``.metadata`` and ``*.distcp``) with the weights under ``model`` and the state of each
optimizer under ``optimizer_N``, and ``meta.pt`` with the rest. In one of a Fabric modules and optimizers have the user's
names. ``placing.py`` has it count as a checkpoint when all of it is there.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from typing_extensions import override

from levin.checkpoint.folder import VERSION_KEY, consolidate
from levin.checkpoint.io import CheckpointIO, own_parts, reject_storage_options
from levin.checkpoint.layout import META_FILE, StateElsewhere, folder_name, is_sharded, is_zero
from levin.checkpoint.placing import place_for
from levin.checkpoint.reading import load
from levin.checkpoint.shards import PartsPlanner, ShardReader, cause_of
from levin.checkpoint.verify import verify
from levin.checkpoint.zero import consolidate_zero
from levin.utilities.filesystem import remove
from levin.utilities.types import Group, PathLike, StateDict


@dataclass(frozen=True)
class ShardedEntry(StateElsewhere):
    """A state in the folder of a checkpoint.

    Args:
        folder: Of the checkpoint.
        key: In that folder, for example ``model``.
    """

    folder: str
    key: str

    def names(self) -> set[str]:
        """Return the names of all that the folder holds, nested keys joined by dots."""
        return _names_of(self.folder)

    @override
    def load_into(self, state: StateDict, group: object = None) -> StateDict:
        with _explained(self.folder):
            reader, planner = ShardReader(self.folder), PartsPlanner()
            load_parts({self.key: state}, storage_reader=reader, planner=planner, process_group=group)
        return state


class ShardedCheckpointIO(CheckpointIO):
    """A folder for each checkpoint, into which every process writes its part, on any file system that fsspec knows.

    Example:
        >>> from levin.strategies import FSDPStrategy
        >>> FSDPStrategy(state_dict_type="sharded").default_checkpoint_io().is_collective
        True
    """

    is_collective = True

    def __init__(self) -> None:
        # A save in the background, and one at once beside it: on each rank another one of them may come first.
        self._groups: tuple[Any, Any] = (None, None)
        self._thread: int = threading.get_ident()
        self._world: object = None

    def __getstate__(self) -> StateDict:
        """Leave the connection here: another process makes its own."""
        return {"_groups": (None, None), "_thread": 0, "_world": None}

    def connect(self) -> None:
        """Connect the processes apart from the training, so that a save may go on beside it. All processes call this."""
        if dist.is_initialized() and self._world is not dist.group.WORLD:
            self._groups = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
            self._world = dist.group.WORLD
            self._thread = threading.get_ident()

    def save_checkpoint(self, checkpoint: StateDict, path: PathLike, storage_options: object | None = None) -> None:
        """Save ``checkpoint`` as the folder ``path``. All processes call this.

        Raises:
            TypeError: ``storage_options`` are given.
            OSError: The disk is full, and so on; what was under the name before is intact. Remote systems raise errors of
                their own.
        """
        reject_storage_options(storage_options, self)
        self.connect()
        place = place_for(path)
        shards, meta = _parted(checkpoint)
        group = self._groups[threading.get_ident() == self._thread]
        try:
            _on_first_rank(place.begin, path, group)
            save_parts(shards, storage_writer=place.writer(), process_group=group)
            _on_first_rank(lambda: place.finish(meta), path, group)
        except BaseException as error:
            if _is_first_rank():
                place.give_up()
            if isinstance(error, CheckpointException):
                raise cause_of(error) from error
            raise

    def load_checkpoint(
        self, path: PathLike, map_location: object | None = None, weights_only: bool | None = None
    ) -> StateDict:
        """Return the checkpoint at ``path``: a file or a folder whole (see :func:`load_folder` for parts)."""
        if is_sharded(path):
            return consolidate(path)
        found: StateDict = load(path, "cpu" if map_location is None else map_location, weights_only)
        return found

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the folder at ``path``. All processes call this."""
        if _is_first_rank():
            # First what makes it a checkpoint, since the rest goes file by file.
            remove(f"{folder_name(path)}/{META_FILE}")
            remove(path)


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _on_first_rank(act: Callable[[], None], path: PathLike, group: Group) -> None:
    """Call ``act`` on rank 0 while the others wait; when it fails, none of them goes on."""
    failure: list[Exception | str | None] = [None]
    if _is_first_rank():
        try:
            act()
        except Exception as error:
            failure = [error]
    if group is not None:
        told = [failure[0] and f"{type(failure[0]).__name__}: {failure[0]}"]
        dist.broadcast_object_list(told, src=0, group=group)
        failure = failure if _is_first_rank() else told
    if isinstance(failure[0], Exception):
        raise failure[0]
    if failure[0] is not None:
        raise OSError(f"Rank 0 could not save {os.fspath(path)!r}: {failure[0]}")


def load_folder(path: PathLike, weights_only: bool | None = None) -> StateDict:
    """Return a sharded checkpoint for a process that wants its parts of it.

    Args:
        path: The folder.
        weights_only: As for :func:`levin.checkpoint.load`.

    Returns:
        What ``meta.pt`` holds, and a :class:`ShardedEntry` in the place of the weights and each optimizer's state.

    Raises:
        ValueError: It is no complete sharded checkpoint, or is damaged.
    """
    folder = folder_name(path)
    if is_zero(folder):
        return consolidate_zero(folder, weights_only)
    verify(folder)
    checkpoint: StateDict = load(f"{folder}/{META_FILE}", "cpu", weights_only)
    keys = _keys_of(folder)
    if VERSION_KEY not in checkpoint:
        return {**checkpoint, **{key: ShardedEntry(folder, key) for key in keys}}
    checkpoint["state_dict"] = ShardedEntry(folder, "model" if "model" in keys else "state_dict")
    optimizers = sorted((key for key in keys if key.startswith("optimizer_")), key=lambda key: int(key[10:]))
    if optimizers:
        checkpoint["optimizer_states"] = [ShardedEntry(folder, key) for key in optimizers]
    return checkpoint


def _parted(checkpoint: StateDict) -> tuple[StateDict, StateDict]:
    """Return what every process writes its part of, and what one process writes."""
    if VERSION_KEY in checkpoint:
        meta = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        states = checkpoint.get("optimizer_states", [])
        optimizers = {f"optimizer_{number}": state for number, state in enumerate(states)}
        return {"model": checkpoint.get("state_dict", {}), **optimizers}, meta
    shards = {key: value for key, value in checkpoint.items() if _is_of_all(value)}
    return shards, {key: value for key, value in checkpoint.items() if key not in shards}


def _is_of_all(value: object) -> bool:
    """Whether this is the state of a module that is cut, or of an optimizer, in which case some of it may be."""
    return isinstance(value, dict) and (value.keys() == {"state", "param_groups"} or own_parts(value) is not value)


def _names_of(folder: str) -> set[str]:
    return {str(name) for name in ShardReader(folder).read_metadata().state_dict_metadata}


def _keys_of(folder: str) -> set[str]:
    index = ShardReader(folder).read_metadata()
    paths: Any = index.planner_data or {key: str(key).split(".", 1) for key in index.state_dict_metadata}
    return {str(path[0]) for path in paths.values()}


@contextmanager
def _explained(folder: str) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        cause = cause_of(error)
        if isinstance(cause, (OSError, pickle.UnpicklingError, MemoryError)):
            raise cause from error
        raise ValueError(
            f"{folder!r} does not fit this run, or is damaged: {type(cause).__name__}: {str(cause).rstrip('.')}. Use the module and the "
            "optimizers that it was saved with."
        ) from error
