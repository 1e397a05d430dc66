"""Files of older Lightning versions, rewritten in the present layout: ``levin upgrade PATH``."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

from packaging.version import Version

from levin.checkpoint.io import atomic_save
from levin.checkpoint.layout import COMPATIBLE_VERSION
from levin.checkpoint.migrate import migrate
from levin.checkpoint.reading import load
from levin.utilities.types import PathLike

_VERSION_KEY = "pytorch-lightning_version"
_LEGACY_KEY = "legacy_pytorch-lightning_version"


def upgrade(path: PathLike, map_to_cpu: bool = False, weights_only: bool | None = None) -> bool:
    """Rewrite a checkpoint in the present layout; what it was before stays beside it, as ``PATH.bak``.

    Args:
        path: A local file that Lightning 0.10 or newer wrote.
        map_to_cpu: Whether tensors of devices are written as tensors of the CPU.
        weights_only: False allows the file to run code while it is loaded; see :func:`~levin.checkpoint.load`.

    Returns:
        Whether there was anything to do.

    Raises:
        FileNotFoundError: There is no such file.
        KeyError: The file was not saved by a Trainer.
        ValueError: The file is damaged.
        pickle.UnpicklingError: The file holds objects of classes that are not allowed.

    Example:
        >>> upgrade("old.ckpt", map_to_cpu=True)  # doctest: +SKIP
    """
    path = Path(path)
    checkpoint = load(path, "cpu" if map_to_cpu else None, weights_only)
    version = checkpoint.get(_VERSION_KEY) if isinstance(checkpoint, dict) else None
    if version is None:
        raise KeyError(f"{path} has no {_VERSION_KEY!r}, so it was not saved by a Trainer.")
    if Version(version) >= Version(COMPATIBLE_VERSION):
        return False
    migrate(checkpoint)
    # An upgrade of an upgraded file keeps the first version.
    checkpoint.setdefault(_LEGACY_KEY, version)
    checkpoint[_VERSION_KEY] = COMPATIBLE_VERSION
    shutil.copy2(path, f"{path}.bak")
    atomic_save(checkpoint, path)
    return True


def main(arguments: Sequence[str]) -> int:
    """Upgrade the file, or the files in the folder, named in ``arguments``; return 0 when all went well, else 1.

    This is the command ``levin upgrade PATH``.
    """
    parser = argparse.ArgumentParser(
        prog="levin upgrade",
        description="Rewrite checkpoints of older Lightning versions; each is kept as FILE.bak.",
        epilog="Example: levin upgrade checkpoints --map-to-cpu",
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint file, or a folder that is searched to its bottom")
    parser.add_argument("-e", "--extension", default=".ckpt", help="of the files in a folder (default: %(default)s)")
    parser.add_argument("--map-to-cpu", action="store_true", help="write tensors of devices as tensors of the CPU")
    parser.add_argument(
        "--trust", action="store_true", help="load objects of any class, which can run code that is in the file"
    )
    options = parser.parse_args(list(arguments))
    path = Path(options.path)
    if not path.exists():
        parser.error(f"there is no file or folder {options.path!r}")
    if path.is_dir():
        paths = sorted(found for found in path.rglob(f"*{options.extension}") if found.is_file())
        if not paths:
            parser.error(f"there are no *{options.extension} files in {options.path!r}")
    else:
        paths = [path]
    num_bad = 0
    for file in paths:
        try:
            was_old = upgrade(file, options.map_to_cpu, weights_only=False if options.trust else None)
        except (OSError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            num_bad += 1
            said = str(error.args[0] if isinstance(error, KeyError) else error)
            print(f"FAILED    {file}: {said.replace('pass weights_only=False', 'use --trust')}")
        else:
            print(f"{'upgraded' if was_old else 'up to date'}  {os.fspath(file)}")
    return 1 if num_bad else 0
