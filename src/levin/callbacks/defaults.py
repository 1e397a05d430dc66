"""The callbacks and loggers that a Trainer adds by itself, and the order of all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from levin import loggers
from levin.callbacks.checkpoint import Checkpoint
from levin.callbacks.model_checkpoint import ModelCheckpoint
from levin.callbacks.progress.progress_bar import ProgressBar
from levin.hooks import Callback
from levin.utilities.collections import as_list
from levin.utilities.exceptions import MisconfigurationException, did_you_mean, require_instance, value_error
from levin.utilities.packages import made_by_packages
from levin.utilities.rank_zero import rank_zero_info

ENTRY_POINTS = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")
"""Groups under which installed packages register callbacks, those of Lightning and of the package of its Trainer alone."""


def default_callbacks(
    given: Any,
    *,
    max_time: str | timedelta | dict[str, int] | None,
    enable_checkpointing: bool,
    enable_progress_bar: bool,
    enable_model_summary: bool,
) -> list[Callback]:
    """Return the user's callbacks, the default ones and those of installed packages, in running order.

    Raises:
        MisconfigurationException: A callback contradicts a flag.
        RuntimeError: Two stateful callbacks have the same state key.
    """
    callbacks: list[Callback] = as_list(given)
    for callback in callbacks:
        if isinstance(callback, type):
            name = callback.__name__
            raise value_error("callbacks", callback, "must hold callbacks, and not their classes", f"Use {name}(...).")
        if not isinstance(callback, Callback) and not hasattr(callback, "on_train_start"):
            raise value_error("callbacks", callback, "must be a Callback or a list of them")
    _add_checkpointing(callbacks, enable_checkpointing)
    _add_timer(callbacks, max_time)
    _add_progress_bar(callbacks, enable_progress_bar)
    _add_summary(callbacks, enable_model_summary)
    callbacks.extend(made_by_packages(*ENTRY_POINTS))
    check_state_keys(callbacks)
    return reorder(callbacks)


def _add_checkpointing(callbacks: list[Callback], enable: bool) -> None:
    has_one = any(isinstance(callback, Checkpoint) for callback in callbacks)
    if has_one and not enable:
        raise MisconfigurationException(
            "Trainer was configured with enable_checkpointing=False but found a Checkpoint callback in `callbacks`. Leave out one of the two."
        )
    if enable and not has_one:
        callbacks.append(ModelCheckpoint())


def _add_timer(callbacks: list[Callback], max_time: str | timedelta | dict[str, int] | None) -> None:
    if max_time is None:
        return
    from levin.callbacks.timer import Timer

    if any(isinstance(callback, Timer) for callback in callbacks):
        rank_zero_info("Ignoring `Trainer(max_time=...)`, since callbacks list already contains a Timer.")
        return
    callbacks.append(Timer(duration=max_time, interval="step"))


def _add_progress_bar(callbacks: list[Callback], enable: bool) -> None:
    bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    if len(bars) > 1:
        raise MisconfigurationException(
            f"callbacks must hold one progress bar, received {[type(bar).__name__ for bar in bars]}. Keep one."
        )
    if bars and not enable:
        raise MisconfigurationException(
            f"Trainer was configured with enable_progress_bar=False but found {type(bars[0]).__name__} in `callbacks`. Leave out one of the two."
        )
    if bars or not enable:
        return
    from levin.callbacks.progress.rich_progress import RichProgressBar

    callbacks.append(RichProgressBar())


def _add_summary(callbacks: list[Callback], enable: bool) -> None:
    if not enable:
        return
    from levin.callbacks.model_summary import ModelSummary

    if any(isinstance(callback, ModelSummary) for callback in callbacks):
        rank_zero_info("Trainer already configured with model summary callbacks. Skipping the default one.")
        return
    from levin.callbacks.rich_model_summary import RichModelSummary

    callbacks.append(RichModelSummary())


def check_state_keys(callbacks: Iterable[Callback]) -> None:
    """Raise RuntimeError when two stateful callbacks share a state key."""
    seen: set[str] = set()
    for callback in callbacks:
        if getattr(type(callback), "state_dict", None) is Callback.state_dict:
            continue
        if callback.state_key in seen:
            raise RuntimeError(
                f"Found more than one stateful callback of type `{type(callback).__name__}` with the state key "
                f"{callback.state_key!r}. Override `state_key` so that each has its own."
            )
        seen.add(callback.state_key)


_FIRST = ("BatchSizeFinder", "LearningRateFinder")


def reorder(callbacks: list[Callback]) -> list[Callback]:
    """Return the callbacks with the tuners first and those that save checkpoints last, others as they stand."""

    def place(callback: Callback) -> int:
        if any(kind.__name__ in _FIRST for kind in type(callback).__mro__):
            return 0
        return 2 if getattr(type(callback), "runs_last", False) else 1  # of a mock, each attribute is true

    return sorted(callbacks, key=place)


def merge_model_callbacks(callbacks: list[Callback], returned: Any) -> list[Callback]:
    """Return ``callbacks`` with what ``configure_callbacks`` returned.

    Each of these replaces those of its own class or, where there are none, those of its base classes.

    Raises:
        TypeError: Something that is no callback.
    """
    added: list[Callback] = list(returned) if isinstance(returned, (list, tuple)) else [returned] if returned else []
    for new in added:
        if not isinstance(new, Callback):
            raise TypeError(f"`configure_callbacks` must return a callback or a list of callbacks, received {new!r}.")
    if not added:
        return callbacks
    replaced: list[Callback] = []
    for new in added:
        same = [callback for callback in callbacks if type(callback) is type(new)]
        replaced += same or [callback for callback in callbacks if isinstance(new, type(callback))]
    if replaced:
        rank_zero_info(
            "The following callbacks returned in `LightningModule.configure_callbacks` will override existing callbacks "
            f"passed to Trainer: {', '.join(sorted(type(c).__name__ for c in replaced))}"
        )
    return reorder([c for c in callbacks if c not in replaced] + added)


def default_loggers(logger: object, root: str, is_dry: bool) -> list[Any]:
    """Return the loggers for ``Trainer(logger=...)``.

    Args:
        logger: True, False, a logger or an iterable of them.
        root: Folder for the default logger.
        is_dry: Whether this is a fast_dev_run, in which loggers record nothing.
    """
    if not logger:
        return []
    if is_dry:
        from levin.loggers.logger import DummyLogger

        return [DummyLogger()]
    if logger is True:
        return [_default_logger(root)]
    found = list(logger) if isinstance(logger, Iterable) and not isinstance(logger, str) else [logger]
    for each in found:
        require_instance("logger", each)
        if not hasattr(each, "log_metrics"):
            names = {name for name in dir(loggers) if name.endswith("Logger")}
            services = {name.removesuffix("Logger") for name in names}
            meant = did_you_mean(each, names) or did_you_mean(each, services).replace("?", "Logger?")
            raise value_error("logger", each, "must be True, False, a Logger or a list of them", meant.strip())
    return found


def _default_logger(root: str) -> object:
    if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX"):
        from levin.environments.slurm import SLURMEnvironment
        from levin.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(save_dir=root, version=SLURMEnvironment.job_id())
    from levin.loggers.csv_logs import CSVLogger

    rank_zero_info(
        "Logging to CSV files, since tensorboard is not installed. Install levin[tensorboard] for its pages."
    )
    return CSVLogger(save_dir=root)
