"""Disks that are small or cannot be written to."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

SMALL_BYTES = 2**20
FULL = "No space left on device|File too large"
READ_ONLY = "Read-only file system|Permission denied"


def _mounts(folder: Path, options: str) -> bool:
    if os.name != "posix" or os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def small(folder: Path) -> Iterator[Path]:
    """A folder for 1 MiB in all; without the right to mount, one for files of at most 1 MiB each."""
    folder.mkdir()
    if _mounts(folder, f"size={SMALL_BYTES}"):
        try:
            yield folder
        finally:
            _unmount(folder)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_BYTES, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written to ``folder``, which keeps its content; nobody but root can do without the mount."""
    if os.geteuid() == 0:
        # root may write everywhere, except where the file system says no
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True, capture_output=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True, capture_output=True)
            yield
        finally:
            _unmount(folder)
        return
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(mode)
