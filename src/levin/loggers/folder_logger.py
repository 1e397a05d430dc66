"""The folders of the loggers that write files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Optional, Union

from typing_extensions import override

from levin.loggers.logger import Logger
from levin.loggers.utilities import join_path, next_version, version_name
from levin.utilities.properties import reads
from levin.utilities.types import PathLike


class FolderLogger(Logger):
    """Base of the loggers that write into ``save_dir/name/version``.

    Args:
        save_dir: Directory or URL of all experiments.
        name: Name of the experiment; None or an empty one leaves out its folder.
        version: Number or name of the run; by default the next number.
        prefix: Put in front of the names of metrics.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self, save_dir: PathLike, name: Optional[str], version: Optional[Union[int, str]], prefix: str
    ) -> None:
        self._save_dir: str = os.fspath(save_dir)
        self._name: str = name or ""
        self._version: Optional[Union[int, str]] = version
        # Earlier numbers then belong to earlier processes of the same script, whose checkpoints `auto` looks for.
        self._numbers_versions: bool = version is None
        self._prefix: str = prefix
        self._experiment: Any = None

    name: str = reads("_name", "Name of the folder of all versions.")

    @property
    @override
    def version(self) -> Union[int, str]:
        if self._version is None:
            self._version = next_version(self.root_dir)
        return self._version

    def agree(self, broadcast: Callable[[Union[int, str]], Union[int, str]]) -> None:
        """Take the version of rank 0 in all processes, whose folder the others would count already.

        Args:
            broadcast: Returns what rank 0 gives.
        """
        self._version = broadcast(self.version)

    save_dir: str = reads("_save_dir", "The root of all folders.")

    @property
    @override
    def root_dir(self) -> str:
        return join_path(self._save_dir, self._name)

    @property
    @override
    def log_dir(self) -> str:
        return os.path.join(self.root_dir, version_name(self.version))
