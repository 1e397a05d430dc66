"""Files, local and remote, by one name each."""

from __future__ import annotations

import os
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
