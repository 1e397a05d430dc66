"""Signals that end a run, and what is done about them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from levin.trainer import Trainer


@contextmanager
def signal_handlers(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM end the run at the next safe point; the user's own handlers are called too.

    A second SIGTERM ends the process at once. Handlers are put in place in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGTERM"):
        yield
        return
    trainer.received_sigterm = False
    previous = signal.getsignal(signal.SIGTERM)

    def on_sigterm(number: int, frame: Any) -> None:
        if trainer.received_sigterm:
            os._exit(143)
        trainer.received_sigterm = True
        launcher = trainer.strategy.launcher
        if launcher is not None and hasattr(launcher, "kill"):
            launcher.kill(number)
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
