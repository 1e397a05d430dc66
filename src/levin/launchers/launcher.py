"""Starting the processes of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from levin.utilities.types import Function

SIGTERM_STATUS = 143
"""Exit status of a process that was asked to terminate, as a shell says it: 128 and the number of the signal."""


class Launcher(ABC):
    """Starts the processes of a run and runs a function in each of them."""

    @property
    @abstractmethod
    def is_interactive_compatible(self) -> bool:
        """Whether it can be used at a Python prompt and in notebooks."""

    runs_elsewhere: bool = False
    """Whether the function runs in other processes only, and its results have to be brought back."""

    @abstractmethod
    def launch(self, function: Function, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run ``function(*args, **kwargs)`` in every process.

        Args:
            function: What to run.
            args: Passed to ``function``.
            trainer: The Trainer whose results have to come back from other processes; None without one.
            kwargs: Passed to ``function``.

        Returns:
            What the function returned in the process with rank 0.
        """

    def kill(self, signum: int) -> None:
        """Send a signal to the processes that this launcher started.

        Args:
            signum: Number of the signal.
        """
