"""Which functions each action spends its time in."""

from __future__ import annotations

import cProfile
import io
import marshal
import os
import pstats
from typing import Optional

from typing_extensions import override

from levin.profilers.profiler import Profiler
from levin.utilities.filesystem import ensure_folder, open_file
from levin.utilities.types import PathLike


class AdvancedProfiler(Profiler):
    """Runs every action under ``cProfile``.

    An action that runs inside another one is measured by itself: its functions are listed under its own name, not under
    that of the outer one. Only the thread that starts an action is measured.

    Args:
        dirpath: Directory of the report, by default the ``log_dir`` of the Trainer.
        filename: Name of the report; None prints it.
        line_count_restriction: How much of each list is shown: a number of lines if an int, a fraction of them if a
            float between 0 and 1.
        dump_stats: Whether to write a ``.prof`` file per action too, for ``snakeviz`` and the like.

    Raises:
        ValueError: An action is started twice or stopped without having been started, or ``dump_stats`` is on and there
            is no directory.

    Example:
        >>> profiler = AdvancedProfiler()
        >>> with profiler.profile("work"):
        ...     values = sorted(range(1000))
        >>> "sorted" in profiler.summary()
        True
    """

    def __init__(
        self,
        dirpath: Optional[PathLike] = None,
        filename: Optional[str] = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        self.line_count_restriction: float = line_count_restriction
        self.dump_stats: bool = dump_stats
        # Only one cProfile can run at a time; the innermost action's does.
        self._stack: list[str] = []

    @override
    def start(self, action_name: str) -> None:
        """Begin to collect calls for an action."""
        if action_name in self._stack:
            raise ValueError(f"Attempted to start {action_name} which has already started.")
        if self._stack:
            self.profiled_actions[self._stack[-1]].disable()
        self._stack.append(action_name)
        self.profiled_actions.setdefault(action_name, cProfile.Profile()).enable()

    @override
    def stop(self, action_name: str) -> None:
        """End collecting calls for an action."""
        if action_name not in self._stack:
            raise ValueError(f"Attempting to stop recording an action ({action_name}) which was never started.")
        self.profiled_actions[self._stack[-1]].disable()
        self._stack.remove(action_name)
        if self._stack:
            self.profiled_actions[self._stack[-1]].enable()

    @override
    def summary(self) -> str:
        texts = {}
        for action, profile in self.profiled_actions.items():
            if self.dump_stats:
                self._dump_stats(action, profile)
            text = io.StringIO()
            stats = pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative")
            stats.print_stats(self.line_count_restriction)
            texts[action] = text.getvalue()
        return self._stats_to_str(texts)

    @override
    def teardown(self, stage: Optional[str]) -> None:
        """Forget everything; actions under way are ended."""
        if self._stack:
            self.profiled_actions[self._stack[-1]].disable()
        self._stack = []
        self.profiled_actions = {}

    def _dump_stats(self, action_name: str, profile: cProfile.Profile) -> None:
        directory = self._directory()
        if directory is None:
            raise ValueError(
                "dump_stats=True needs a directory, received dirpath=None. Give AdvancedProfiler a dirpath."
            )
        path = os.path.join(directory, self._prepare_filename(action_name, extension=".prof"))
        ensure_folder(directory)
        profile.create_stats()
        with open_file(path, "wb") as file:
            marshal.dump(profile.stats, file)
