"""What a callback knows about its files while one of them is still being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from levin.checkpoint.worker import Save


class UnconfirmedSave:
    """The newest save of a callback, and what the callback knew before it.

    Attributes change when a save begins, so that the file says so too, and change back if it fails.

    Args:
        owner: The callback.
        names: Its attributes that become untrue when the save that they are about fails.
    """

    def __init__(self, owner: Any, names: Sequence[str]) -> None:
        self._owner = owner
        self._names = names
        self._save: Save | None = None
        self._before: dict[str, Any] = {}

    @contextmanager
    def undone_if_it_fails(self) -> Iterator[None]:
        """Put the attributes back to what they were when the block began, if the save in it fails, now or later."""
        before = {name: getattr(self._owner, name) for name in self._names}
        try:
            yield
        except BaseException:
            vars(self._owner).update(before)
            raise
        self._before = before

    def watch(self, save: Save) -> None:
        """Take the place of the save before, which is confirmed."""
        self._save = save

    def then(self, function: Callable[[], None], name: str) -> None:
        """Call ``function`` once the file is there."""
        if self._save is None:
            function()
        else:
            self._save.then(function, name)

    def wait(self) -> None:
        """Wait until the file is there or cannot be; what it failed with, the next save raises on all ranks."""
        if self._save is not None:
            self._save.wait()

    def confirm(self) -> bool:
        """Return whether the file has come to be there since the last call."""
        if self._save is None or not self._save.is_written:
            return False
        self._save = None
        return True

    def give_up(self) -> str:
        """Put the attributes back if the file is not there and will not be; return its path, else an empty string."""
        save, self._save = self._save, None
        if save is None:
            return ""
        vars(self._owner).update(self._before)
        return str(save.path)
