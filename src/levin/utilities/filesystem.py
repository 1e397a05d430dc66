"""Files, local and remote, by one name each."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is on a local file system (no ``protocol://`` other than ``file://``)."""
    text = str(path)
    return "://" not in text or text.startswith(("file://", "local://"))


def get_filesystem(path: str | os.PathLike[str], **kwargs: Any) -> AbstractFileSystem:
    """Return the fsspec file system that ``path`` lives on.

    Args:
        path: A local path or any URL that fsspec knows.
        kwargs: Passed to fsspec.
    """
    from fsspec.core import url_to_fs

    filesystem, _ = url_to_fs(str(path), **kwargs)
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


def list_folder(path: str | os.PathLike[str]) -> list[str]:
    """Return the paths of what is in a local folder or at a URL, nothing if there is no such folder."""
    if is_local(path):
        folder = local_path(path)
        return [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    filesystem = get_filesystem(path)
    if not filesystem.isdir(str(path)):
        return []
    return [str(filesystem.unstrip_protocol(entry)).rstrip("/") for entry in filesystem.ls(str(path), detail=False)]


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
    """Return when a file or folder, local or remote, was changed last, in seconds since the epoch."""
    if is_local(path):
        return os.stat(local_path(path)).st_mtime
    when: float = get_filesystem(path).modified(str(path)).timestamp()
    return when


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
