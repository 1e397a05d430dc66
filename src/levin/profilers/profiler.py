"""What a profiler is, and the one that does nothing."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Optional

from typing_extensions import override

from levin.utilities.filesystem import ensure_folder, is_local, open_file
from levin.utilities.rank_zero import rank_zero_info
from levin.utilities.types import Function, PathLike

if TYPE_CHECKING:
    from torch.nn import Module

_UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


class Profiler(ABC):
    """Base of all profilers, for ``Trainer(profiler=...)``.

    A subclass gives ``start`` and ``stop``, and ``summary`` for the report.

    Args:
        dirpath: Directory of the report, by default the ``log_dir`` of the Trainer.
        filename: Name of the report without ``.txt``; the stage is put in front and, in distributed runs, the rank
            behind. None: rank 0 prints the report.

    Example:
        >>> class CountingProfiler(Profiler):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.counts = {}
        ...     def start(self, action_name):
        ...         self.counts[action_name] = self.counts.get(action_name, 0) + 1
        ...     def stop(self, action_name):
        ...         pass
        >>> profiler = CountingProfiler()
        >>> with profiler.profile("load"):
        ...     pass
        >>> profiler.counts
        {'load': 1}
    """

    def __init__(self, dirpath: Optional[PathLike] = None, filename: Optional[str] = None) -> None:
        self.dirpath: Optional[PathLike] = dirpath
        self.filename: Optional[str] = filename
        self._log_dir: Optional[str] = None
        self._local_rank: Optional[int] = None
        self._stage: Optional[str] = None

    @abstractmethod
    def start(self, action_name: str) -> None:
        """Begin to measure an action.

        Args:
            action_name: For example ``run_training_batch`` or ``[LightningModule]MyModel.on_train_start``.
        """

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """End measuring an action.

        Args:
            action_name: As given to :meth:`start`.
        """

    def summary(self) -> str:
        """Return the report, or an empty text."""
        return ""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Measure the body of a ``with`` statement.

        Args:
            action_name: Name in the report.
        """
        try:
            self.start(action_name)
            yield action_name
        finally:
            self.stop(action_name)

    @property
    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return 0 if self._local_rank is None else self._local_rank

    def setup(self, stage: str, local_rank: Optional[int] = None, log_dir: Optional[str] = None) -> None:
        """Prepare for a run.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
            local_rank: Rank on this machine; None in a run of one process.
            log_dir: Directory of the report when none was given.
        """
        self._stage = stage
        self._local_rank = local_rank
        self._log_dir = log_dir

    def attach(self, module: Module) -> None:
        """Get to know the module whose run begins; the Trainer calls it after :meth:`setup`.

        Args:
            module: The user's module.
        """

    def describe(self) -> None:
        """Write the report to its file, or print it on rank 0."""
        text = self.summary()
        if not text:
            return
        directory = self._directory()
        if self.filename is None or directory is None:
            rank_zero_info("%s", text)
            return
        path = os.path.join(directory, self._prepare_filename())
        ensure_folder(directory)
        with open_file(path, "a" if is_local(path) else "w") as file:
            file.write(text)

    def teardown(self, stage: Optional[str]) -> None:
        """Release what a run needed, also after it failed.

        Args:
            stage: As given to :meth:`setup`.
        """

    def _directory(self) -> Optional[str]:
        directory = self._log_dir if self.dirpath is None else self.dirpath
        return None if directory is None else os.fspath(directory)

    def _prepare_filename(self, action_name: Optional[str] = None, extension: str = ".txt") -> str:
        rank = None if self._local_rank is None else str(self._local_rank)
        parts = [part for part in (self._stage, self.filename, rank, action_name) if part]
        return _UNSAFE.sub("_", "-".join(parts)) + extension

    def _stats_to_str(self, stats: Mapping[str, str]) -> str:
        lines = [self._title()]
        for action, text in stats.items():
            rank = "" if self._local_rank is None else f" rank: {self._local_rank}"
            lines += [f"Profile stats for: {action}{rank}", text]
        return "\n".join(lines)

    def _title(self) -> str:
        return f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"


class PassThroughProfiler(Profiler):
    """Measures nothing and costs nothing: the Trainer leaves it out altogether."""

    @override
    def start(self, action_name: str) -> None:
        pass

    @override
    def stop(self, action_name: str) -> None:
        pass


Timed = Callable[[str, Function], Function]
"""``timed(action_name, function)`` returns a function in place of ``function``."""


def is_profiling(profiler: Profiler) -> bool:
    """Whether anything is measured at all."""
    return type(profiler) is not PassThroughProfiler


def timer(profiler: Profiler) -> Timed:
    """Return ``timed(action_name, function)``, which wraps a function so that ``profiler`` measures it."""

    def wrap(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **kwargs: object) -> object:
            with profiler.profile(name):
                return function(*args, **kwargs)

        return timed

    return wrap


def untimed(name: str, function: Callable[..., object]) -> Function:
    """Return ``function``: what a run without a profiler has in place of :func:`timer`."""
    return function
