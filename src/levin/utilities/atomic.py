"""Files that appear under their name when they are complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from typing import IO, Any, cast

from levin.utilities.filesystem import is_local, local_path, remove, set_modified
from levin.utilities.rank_zero import rank_zero_info

TEMPORARY_PREFIX = ".levin-"
TEMPORARY_SUFFIX = ".tmp"
# Younger files may belong to a writer that has not come to lock its file yet.
_LEFTOVER_AGE_S = 60.0
# These show nothing of an upload before it is committed, and can drop it; elsewhere we write aside and move.
_TRANSACTIONAL_PROTOCOLS = ("s3", "s3a", "gs", "gcs")
# What file systems say that cannot sync a folder, and need not.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes the name ``path`` at the end of the block.

    The content is written under a temporary name in the same folder, from its beginning to its end. At the end of the
    block file and folder are synced to the disk, and the file is renamed. When anything fails, or the process is
    killed, what was at ``path`` before is still there unchanged. Missing folders are made.

    Args:
        path: Local path, or URL that fsspec knows. On remote systems the file is written aside and moved, or uploaded
            in a transaction where there are such.

    Raises:
        IsADirectoryError: There is a folder at ``path``.
        OSError: The disk is full, the folder cannot be written to, and so on.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with atomic_open(f"{folder}/notes.txt") as file:
        ...     _ = file.write(b"complete")
        >>> os.listdir(folder)
        ['notes.txt']
    """
    opened = _open_local(local_path(path)) if is_local(path) else _open_remote(str(path))
    with opened as file:
        yield file


class SyncedFile:
    """A new file that is written from its beginning to its end, without a buffer of Python's.

    Args:
        descriptor: Of an open file; it stays open.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append ``data`` and return its length.

        Raises:
            OSError: The disk is full, and so on.
        """
        left = memoryview(data).cast("B")
        size = len(left)
        while left:  # the system takes at most 2 GiB at a time, and less where the disk is almost full
            left = left[os.write(self._descriptor, left) :]
        self._position += size
        return size

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._position

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def finish(self) -> None:
        """Wait until all of the file is on the disk."""
        os.fsync(self._descriptor)


def replace_link(target: str, link: str) -> None:
    """Make ``link`` a relative symbolic link to ``target``, or a copy of it where the system has no links.

    At every instant there is either the old or the new file under the name of the link.

    Args:
        target: A local file or folder.
        link: A local path; what is there already is replaced.
    """
    target, link = local_path(target), local_path(link)
    directory = os.path.dirname(link)
    new = os.path.join(directory, temporary_name())
    try:
        os.symlink(os.path.relpath(target, directory), new)
    except OSError as error:
        rank_zero_info(f"{link} becomes a copy of {target}, since it cannot be a link: {error}")
        (shutil.copytree if os.path.isdir(target) else shutil.copy)(target, new)
    # A folder cannot be replaced by renaming; a file, or a link to anything, can.
    if (os.path.isdir(link) and not os.path.islink(link)) or (os.path.isdir(new) and not os.path.islink(new)):
        remove(link)
    os.replace(new, link)


@contextlib.contextmanager
def _open_local(path: str) -> Iterator[IO[bytes]]:
    path = os.path.abspath(path)
    opened_s = time.time()
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "A folder is in the place of the file that was to be saved", path)
    folder = os.path.dirname(path)
    make_folder(folder)
    _remove_leftovers(folder)
    temporary = os.path.join(folder, temporary_name())
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _lock(descriptor)
            file = SyncedFile(descriptor)
            yield cast("IO[bytes]", file)
            file.finish()
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        # By a clock that is finer than that of the file system. Not before: an old file with a temporary name looks like
        # one that a killed process left.
        set_modified(path, opened_s)
    except BaseException as error:
        # The error that counts is the first one.
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, temporary):
            raise type(error)(error.errno, error.strerror, path) from error
        raise
    sync_folder(folder)


@contextlib.contextmanager
def _open_remote(url: str) -> Iterator[IO[bytes]]:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(url)
    parent = filesystem._parent(path)
    filesystem.makedirs(parent, exist_ok=True)
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    if any(protocol in _TRANSACTIONAL_PROTOCOLS for protocol in protocols):
        with filesystem.transaction, filesystem.open(path, "wb") as file:
            yield file
        return
    temporary = f"{parent}/{temporary_name()}"
    try:
        with filesystem.open(temporary, "wb") as file:
            yield file
            written = file.tell()
        arrived = filesystem.info(temporary)["size"]
        if arrived is not None and arrived != written:
            raise OSError(errno.EIO, f"{arrived} of {written} bytes arrived", url)
        filesystem.mv(temporary, path)
    except BaseException:
        _remove_remote(filesystem, temporary)
        raise


def _remove_remote(filesystem: Any, path: str) -> None:
    # Called while an error is on its way; a second one, of whatever kind the remote system has, must not hide it.
    with contextlib.suppress(Exception):
        filesystem.rm_file(path)


def make_folder(folder: str) -> None:
    """Make a local folder and its missing parents, in such a way that they survive a loss of power."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    if parent != folder:
        make_folder(parent)
    # Another process may be making the same folder.
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
        sync_folder(parent)
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, "A file is in the place of a folder that was to be made", folder)


def sync_folder(folder: str) -> None:
    """Write the entries of a local folder to the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def temporary_name() -> str:
    """Return a name for a file that is to be renamed; one that is left behind goes with a later save in its folder."""
    return f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"


def _lock(descriptor: int) -> bool:
    """Lock an open file for as long as it is open; return False when someone else has, or when that is impossible."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_leftovers(folder: str) -> None:
    """Remove temporary files whose writers were killed: those that are not locked any more."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        if name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX):
            # Another process may remove it at the same time, or it may belong to someone else.
            with contextlib.suppress(OSError):
                _remove_leftover(os.path.join(folder, name))


def _remove_leftover(path: str) -> None:
    state = os.lstat(path)
    if time.time() - state.st_mtime < _LEFTOVER_AGE_S:
        return
    if stat.S_ISLNK(state.st_mode):
        os.unlink(path)
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        if _lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)
