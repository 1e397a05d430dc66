"""What a checkpoint is made of, by name: the keys and the version that other frameworks look for, and our own."""

from __future__ import annotations

import os

from levin.utilities.filesystem import is_local, local_path
from levin.utilities.types import PathLike

COMPATIBLE_VERSION = "2.6.6"
"""The Lightning version whose file layout is written."""
OWN_KEY = "levin"
"""Where everything lies that Lightning's layout has no place for."""
META_FILE = "meta.pt"
"""What the folder of a sharded checkpoint holds beside the parts: everything but weights and optimizer states."""


def is_sharded(path: PathLike) -> bool:
    """Return whether ``path`` is the folder of a sharded checkpoint.

    Raises:
        ValueError: It is a folder of something else, or of a save that did not come to its end.
    """
    if not is_local(path) or not os.path.isdir(local_path(path)):
        return False
    if not os.path.isfile(os.path.join(local_path(path), META_FILE)):
        raise ValueError(
            f"{os.fspath(path)!r} is a folder without {META_FILE}, so it is no complete checkpoint. Give the folder of a "
            "save that came to its end, or a file."
        )
    return True
