"""The files of ``torch.distributed.checkpoint``, read without running what is in them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from levin.checkpoint.reading import load
from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.filesystem import is_local, open_file
from levin.utilities.types import StateDict

# What the index of a sharded checkpoint consists of, beside types of numbers; a pickle that names more is refused.
_CLASSES_OF_THE_INDEX = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
    "builtins": ("set",),
}  # fmt: skip


def read_shards(folder: str) -> StateDict:
    """Return all that the files hold, whole, in this process alone.

    Args:
        folder: Holds ``.metadata`` and ``*.distcp``.

    Raises:
        DamagedCheckpointError: They are damaged.
        pickle.UnpicklingError: They refer to classes that have no place there.
    """
    shards: StateDict = {}
    planner = _WholePlanner()  # type: ignore[no-untyped-call]  # torch has no types there
    try:
        _load_state_dict(shards, storage_reader=ShardReader(folder), planner=planner, no_dist=True)
    except CheckpointException as error:
        # What torch raises depends on where it comes upon something odd; all has one meaning.
        cause = cause_of(error)
        if isinstance(cause, (pickle.UnpicklingError, OSError)) or not isinstance(cause, Exception):
            raise cause from error
        raise DamagedCheckpointError(f"{folder!r} is damaged: {type(cause).__name__}: {cause}") from cause
    return shards


class ShardReader(FileSystemReader):
    """Reads a local or remote folder, and the index without running what it names.

    Args:
        folder: Holds ``.metadata`` and ``*.distcp``.
    """

    fs: Any  # torch's own type is that of local files

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._index = f"{folder}/.metadata"
        if not is_local(folder):
            self.fs = FileSystem()
            self.path = self.fs.init_path(folder)

    def read_metadata(self, *args: object, **kwargs: object) -> Any:
        """Return the index; a remote folder is seen as it is now."""
        with open_file(self._index, "rb") as file:
            return _IndexUnpickler(file).load()


class PartsPlanner(DefaultLoadPlanner):
    """Reads what is asked for, and plain values without running what they name."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Take a plain value."""
        # torch unpickles it whatever it names: it is given what was read with care, pickled anew.
        plain = io.BytesIO()
        torch.save(load(value, "cpu"), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _WholePlanner(PartsPlanner, _EmptyStateDictLoadPlanner):
    """Reads all that there is."""


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a sharded checkpoint."""

    def find_class(self, module: str, name: str) -> object:
        """Return the class ``name`` of ``module``, if it has a place in an index."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _CLASSES_OF_THE_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"The index refers to {module}.{name}, which has no place there.")
        return super().find_class(module, name)


def cause_of(error: CheckpointException) -> BaseException:
    """Return what went wrong on the first process that failed."""
    failures = error.failures
    first: object = failures[min(failures)]
    cause: BaseException = first[0] if isinstance(first, tuple) else error
    return cause
