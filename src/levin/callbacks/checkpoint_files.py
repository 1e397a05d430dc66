"""Checkpoint files on disk: whether they are there, where they lie, and links to them."""

from __future__ import annotations

import os
import shutil

from levin.utilities.atomic import temporary_name
from levin.utilities.filesystem import get_filesystem, is_local, local_path
from levin.utilities.rank_zero import rank_zero_info


def path_exists(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a file, a folder or a link, even a broken one, at a local path or URL."""
    if is_local(path):
        return os.path.lexists(local_path(path))
    return bool(get_filesystem(path).exists(str(path)))


def is_nonempty_directory(path: str | os.PathLike[str]) -> bool:
    """Return whether a local path or URL is a folder with something in it."""
    return bool(list_directory(str(path)))


def list_directory(path: str) -> list[str]:
    """Return the paths of what is in a local folder or at a URL, nothing if there is no such folder."""
    if is_local(path):
        path = local_path(path)
        return [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else []
    filesystem = get_filesystem(path)
    if not filesystem.isdir(path):
        return []
    return [str(filesystem.unstrip_protocol(entry)) for entry in filesystem.ls(path, detail=False)]


def is_inside(path: str, directory: str) -> bool:
    """Return whether a local ``path`` lies in ``directory`` or in a folder below it."""
    path, directory = os.path.abspath(local_path(path)), os.path.abspath(local_path(directory))
    return path != directory and os.path.commonpath([path, directory]) == directory


def link_or_copy(target: str, link: str) -> None:
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
        _remove(link)
    os.replace(new, link)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
