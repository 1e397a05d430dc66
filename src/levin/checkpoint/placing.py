"""Where the parts of a sharded checkpoint are written, and how they come to count as one, all at once.

On the file system a folder is written under another name and renamed. Object stores rename nothing: there the parts of a
save have names of their own in the folder itself, so that they stand beside those of the save before, and ``meta.pt``,
without which a folder is no checkpoint, comes last.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan
from typing_extensions import override

from levin.checkpoint.io import atomic_save
from levin.checkpoint.layout import META_FILE, folder_name, put_in_place
from levin.utilities.filesystem import ensure_folder, exists, get_filesystem, is_local, list_folder, remove
from levin.utilities.types import PathLike, StateDict


class Place(ABC):
    """One save into one folder. Rank 0 calls all but :meth:`writer`.

    Args:
        folder: A local path or URL, as :func:`levin.checkpoint.layout.folder_name` returned it.
    """

    def __init__(self, folder: str) -> None:
        self.folder: str = folder

    @abstractmethod
    def begin(self) -> None:
        """Make room for the parts."""

    @abstractmethod
    def writer(self) -> FileSystemWriter:
        """Return what writes the parts of this process."""

    @abstractmethod
    def finish(self, meta: StateDict) -> None:
        """Write ``meta`` beside the parts, which are all there, and let them take the place of an earlier save."""

    @abstractmethod
    def give_up(self) -> None:
        """Remove what there is of a save that failed."""


class LocalPlace(Place):
    """A folder of the file system."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._unfinished = f"{folder}.part"

    @override
    def begin(self) -> None:
        remove(self._unfinished)
        os.makedirs(self._unfinished)

    @override
    def writer(self) -> FileSystemWriter:
        return FileSystemWriter(self._unfinished, sync_files=True)

    @override
    def finish(self, meta: StateDict) -> None:
        atomic_save(meta, os.path.join(self._unfinished, META_FILE))
        put_in_place(self._unfinished, self.folder)

    @override
    def give_up(self) -> None:
        with contextlib.suppress(OSError):
            remove(self._unfinished)


class RemotePlace(Place):
    """A folder of a system that fsspec knows by a URL.

    What takes long is written before the save that is there is touched: its ``meta.pt`` goes, and index and ``meta.pt`` of the
    new one get their names. A process that dies between these leaves all parts of both, and no checkpoint.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._meta = f"{folder}/{META_FILE}"
        self._save = secrets.token_hex(4)
        self._files = _FilesToRename()
        self._takes_over = False

    @override
    def begin(self) -> None:
        ensure_folder(self.folder)

    @override
    def writer(self) -> FileSystemWriter:
        return _RemoteWriter(self.folder, self._files, self._save)

    @override
    def finish(self, meta: StateDict) -> None:
        atomic_save(meta, f"{self._meta}.tmp")
        new_names = {**self._files.new_names, f"{self._meta}.tmp": self._meta}
        self._takes_over = True
        for name in reversed(new_names.values()):
            remove(name)
        for temporary, name in new_names.items():
            get_filesystem(self.folder).mv(temporary, name)
        self._remove(lambda name: name.endswith(".distcp") and self._save not in name)

    @override
    def give_up(self) -> None:
        # An error of the remote system, of whatever kind, must not hide the one that the save failed with.
        with contextlib.suppress(Exception):
            if exists(self._meta):
                self._remove(lambda name: self._save in name or name.endswith(".tmp"))
            elif not self._takes_over:
                remove(self.folder)

    def _remove(self, is_chosen: Callable[[str], bool]) -> None:
        chosen = [path for path in list_folder(self.folder) if is_chosen(os.path.basename(path))]
        if chosen:
            get_filesystem(self.folder).rm(chosen)


class _FilesToRename(FileSystem):
    """Files that torch writes by their URLs under temporary names; what they are to be called is kept, for later.

    Attributes:
        new_names: By the temporary name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.new_names: dict[str, str] = {}

    @override
    def rename(self, path: PathLike, new_path: PathLike) -> None:
        self.new_names[os.fspath(path)] = os.fspath(new_path)

    @override
    def exists(self, path: PathLike) -> bool:
        return False  # what there is stays, and is no reason for a warning


class _RemoteWriter(FsspecWriter):
    """Writes parts whose names no other save has; the plan of rank 0, which says so, is that of all ranks."""

    fs: Any  # torch's own type is that of local files

    def __init__(self, folder: str, files: FileSystem, save: str) -> None:
        super().__init__(folder, sync_files=False)
        self.fs = files
        self.fs.init_path(folder)
        self._save = save

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        named: list[SavePlan] = super().prepare_global_plan(plans)
        return [
            replace(plan, storage_data=replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{self._save}_"))
            for plan in named
        ]


def place_for(path: PathLike) -> Place:
    """Return the place of a save under ``path``, a local path or URL."""
    folder = folder_name(path)
    return LocalPlace(folder) if is_local(folder) else RemotePlace(folder)
