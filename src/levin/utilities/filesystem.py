"""Files, local and remote: by one name each, and under it when they are complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from levin.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TEMPORARY_PREFIX = ".levin-"
TEMPORARY_SUFFIX = ".tmp"
# Younger files may belong to a writer that has not come to lock its file yet.
_LEFTOVER_AGE_S = 60.0
# These show nothing of an upload before it is committed, and can drop it; elsewhere we write aside and move.
_TRANSACTIONAL_PROTOCOLS = ("s3", "s3a", "gs", "gcs")
# What file systems say that cannot sync a folder, and need not.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is on a local file system (no ``protocol://`` other than ``file://``)."""
    text = str(path)
    return "://" not in text or text.startswith(("file://", "local://"))


def is_web(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is an address of the web, where there are files alone."""
    return str(path).startswith(("http://", "https://"))


def get_filesystem(path: str | os.PathLike[str], **kwargs: object) -> AbstractFileSystem:
    """Return the fsspec file system that ``path`` lives on, as it is now.

    Args:
        path: A local path or any URL that fsspec knows.
        kwargs: Passed to fsspec.
    """
    from fsspec.core import url_to_fs

    filesystem, _ = url_to_fs(str(path), **kwargs)
    filesystem.invalidate_cache()  # Threads and processes of ours write to it through objects of their own.
    return filesystem


def local_path(path: str | os.PathLike[str]) -> str:
    """Return a local path as the operating system knows it, without ``file://``."""
    text = str(path)
    for prefix in ("file://", "local://"):
        if text.startswith(prefix):
            return text[len(prefix) :]
    return text


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a file, a folder or a link, even a broken one, at a local path or URL."""
    if is_local(path):
        return os.path.lexists(local_path(path))
    return bool(get_filesystem(path).exists(str(path)))


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a folder, or a link to one, at a local path or URL."""
    if is_web(path):
        return False  # to ask is to fetch all of a file
    return os.path.isdir(local_path(path)) if is_local(path) else bool(get_filesystem(path).isdir(str(path)))


def list_folder(path: str | os.PathLike[str]) -> list[str]:
    """Return the paths of what is in a local folder or at a URL, nothing if there is no such folder."""
    if is_local(path):
        folder = local_path(path)
        return [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    filesystem = get_filesystem(path)
    if not filesystem.isdir(str(path)):
        return []
    return [str(filesystem.unstrip_protocol(entry)).rstrip("/") for entry in filesystem.ls(str(path), detail=False)]


def open_file(path: str | os.PathLike[str], mode: str = "r") -> IO[Any]:
    """Open a file at a local path or URL; text is UTF-8, with its ends of lines as they are."""
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if is_local(path):
        return open(local_path(path), mode, **text)
    opened: IO[Any] = get_filesystem(path).open(str(path), mode, **text)
    return opened


def ensure_folder(path: str | os.PathLike[str]) -> None:
    """Create a local folder or one at a URL, with its parents, if it is not there."""
    if is_local(path):
        os.makedirs(local_path(path), exist_ok=True)
    else:
        get_filesystem(path).makedirs(str(path), exist_ok=True)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file anew; whoever reads a local one meanwhile sees the old file or the new one."""
    if not is_local(path):
        with open_file(path, "w") as file:
            file.write(text)
        return
    new = Path(f"{local_path(path)}.{os.getpid()}.tmp")
    try:
        new.write_text(text, encoding="utf-8", newline="")
        os.replace(new, local_path(path))
    finally:
        new.unlink(missing_ok=True)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove the file, link or folder at a local path or URL, if there is one."""
    if not exists(path):
        return
    if not is_local(path):
        get_filesystem(path).rm(str(path), recursive=True)
        return
    local = local_path(path)
    if os.path.isdir(local) and not os.path.islink(local):
        shutil.rmtree(local)
    else:
        os.unlink(local)


def modified_s(path: str | os.PathLike[str]) -> float:
    """Return when a file or folder, local or remote, was changed last, in seconds since the epoch.

    Object stores know no folders: a remote one is as old as the newest file in it, an empty one as old as can be.
    """
    if is_local(path):
        return os.stat(local_path(path)).st_mtime
    filesystem = get_filesystem(path)
    times = (float(filesystem.modified(file).timestamp()) for file in filesystem.find(str(path)))
    return max(times, default=0.0)


def set_modified(path: str | os.PathLike[str], seconds: float) -> None:
    """Let a local file say that it was changed at that time, in seconds since the epoch; a remote one says when it came."""
    if is_local(path) and os.path.isfile(local_path(path)):
        os.utime(local_path(path), (seconds, seconds))


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a local path or URL in the one form by which two of them can be compared.

    Example:
        >>> absolute("memory://a//b/"), absolute("file:///a/../b")
        ('memory://a/b', '/b')
    """
    if is_local(path):
        return os.path.abspath(local_path(path))
    protocol, _, rest = str(path).partition("://")
    return f"{protocol}://{'/'.join(part for part in rest.split('/') if part)}"


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` lies in ``folder`` or in a folder below it; both are local paths or URLs.

    Example:
        >>> is_inside("memory://a/b/x.ckpt", "memory://a"), is_inside("memory://ab/x.ckpt", "memory://a")
        (True, False)
    """
    return absolute(path).startswith(absolute(folder).rstrip("/") + "/")


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

    def give_up() -> None:
        # A second error, of whatever kind the remote system has, must not hide the first.
        with contextlib.suppress(Exception):
            filesystem.rm_file(temporary)

    with contextlib.ExitStack() as undo:
        undo.callback(give_up)
        with filesystem.open(temporary, "wb") as file:
            yield file
            written = file.tell()
        arrived = filesystem.info(temporary)["size"]
        if arrived is not None and arrived != written:
            raise OSError(errno.EIO, f"{arrived} of {written} bytes arrived", url)
        filesystem.mv(temporary, path)
        undo.pop_all()


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
