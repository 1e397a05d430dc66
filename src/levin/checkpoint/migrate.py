"""Files of older Lightning versions, brought to the present layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from packaging.version import Version

from levin.checkpoint.layout import COMPATIBLE_VERSION
from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn

Checkpoint = dict[str, Any]


def migrate(checkpoint: Checkpoint, source: object = None) -> Checkpoint:
    """Bring ``checkpoint`` to the present layout, in place, and return it.

    Args:
        checkpoint: What a file of Lightning 0.10 or newer, or of levin, holds.
        source: Where it is from, for messages; None for none.

    Raises:
        DamagedCheckpointError: It is no dict.
        KeyError: The version of the writer is missing, so this is no checkpoint of a Trainer.
    """
    file = "The file" if source is None else str(source)
    if not isinstance(checkpoint, dict):
        raise DamagedCheckpointError(
            f"{file} must hold a checkpoint (a dict), received a {type(checkpoint).__name__}. Give a file that "
            "Trainer.save_checkpoint wrote."
        )
    if "pytorch-lightning_version" not in checkpoint:
        keys = [str(key) for key in checkpoint]
        raise KeyError(
            f"{file} has no 'pytorch-lightning_version', so it was not saved by a Trainer; it holds {keys[:5]}"
            f"{'...' if len(keys) > 5 else ''}. Load plain weights with `model.load_state_dict(torch.load(path))`."
        )
    version = Version(checkpoint["pytorch-lightning_version"])
    if source is not None and version.major > Version(COMPATIBLE_VERSION).major:
        rank_zero_warn(
            f"{source} was written by Lightning {version}, whose layout may be newer than the one known here."
        )
    if source is not None and version < Version(MIGRATIONS[-1][0]):
        rank_zero_info(
            f"{source} has the layout of Lightning {version}. `levin upgrade {source}` rewrites it once and for all."
        )
    for limit, steps in MIGRATIONS:
        if version < Version(limit):
            for step in steps:
                step(checkpoint)
    return checkpoint


def _callback_keys(checkpoint: Checkpoint) -> None:
    """0.10 kept the states of two callbacks under keys of their own."""
    renamed = {
        "checkpoint_callback_best_model_score": ("ModelCheckpoint", "best_model_score"),
        "checkpoint_callback_best": ("ModelCheckpoint", "best_model_score"),
        "checkpoint_callback_best_model_path": ("ModelCheckpoint", "best_model_path"),
        "early_stop_callback_wait": ("EarlyStopping", "wait_count"),
        "early_stop_callback_patience": ("EarlyStopping", "patience"),
    }
    if not any(key in checkpoint for key in renamed):
        return
    callbacks = checkpoint.setdefault("callbacks", {})
    for old, (callback, name) in renamed.items():
        if old in checkpoint:
            callbacks.setdefault(callback, {})[name] = checkpoint.pop(old)


def _loops_from_counters(checkpoint: Checkpoint) -> None:
    """Before 1.6 the counters stood outside the loops."""
    step, epoch = checkpoint.get("global_step", 0), checkpoint.get("epoch", 0)
    loop = checkpoint.setdefault("loops", {}).setdefault("fit_loop", {})
    optimizer = loop.setdefault("epoch_loop.batch_loop.optimizer_loop.optim_progress", {}).setdefault("optimizer", {})
    counts = {"ready": step, "completed": step}
    optimizer.setdefault("step", {"total": dict(counts), "current": dict(counts)})
    total = optimizer["step"].setdefault("total", {})
    total["ready"] = total["completed"] = step
    # Which of the two counts, the module says; the file does not.
    manual = loop.setdefault("epoch_loop.batch_loop.manual_loop.optim_step_progress", {})
    manual.setdefault("current", dict(counts))
    manual["total"] = dict(counts)
    progress = loop.setdefault("epoch_progress", {}).setdefault("current", {})
    progress["completed"] = epoch
    progress["processed"] = progress["ready"] = progress["started"] = epoch


def _batches_that_stepped(checkpoint: Checkpoint) -> None:
    """Before 1.6.5 the loggers' axis was the global step."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    loop.setdefault("epoch_loop.state_dict", {}).setdefault("_batches_that_stepped", checkpoint.get("global_step", 0))


def _checkpoint_keys(checkpoint: Checkpoint) -> None:
    """Before 1.9 the key of ModelCheckpoint held ``save_on_train_epoch_end``."""
    callbacks = checkpoint.get("callbacks")
    if not callbacks:
        return
    for key in list(callbacks):
        if isinstance(key, str) and key.startswith("ModelCheckpoint{"):
            short = key
            for value in ("None", "True", "False"):
                short = short.replace(f", 'save_on_train_epoch_end': {value}", "")
            callbacks[short] = callbacks.pop(key)


_EMPTY_LEVELS = ("epoch_loop.batch_loop.state_dict", "epoch_loop.val_loop.epoch_loop.state_dict")


def _flat_loops(checkpoint: Checkpoint) -> None:
    """Before 2.0 the loops were nested deeper."""
    checkpoint.pop("amp_scaling_state", None)
    loops = checkpoint.get("loops", {})
    loop = loops.get("fit_loop", {})
    for key in list(loop):
        if key in _EMPTY_LEVELS:  # their names are those of levels that stay
            del loop[key]
            continue
        new = key.replace("epoch_loop.batch_loop.", "epoch_loop.")
        new = new.replace("optimizer_loop", "automatic_optimization").replace("manual_loop", "manual_optimization")
        new = new.replace("val_loop.epoch_loop.", "val_loop.")
        if new.endswith("dataloader_progress"):
            del loop[key]
        elif new != key:
            loop[new] = loop.pop(key)
    for name in ("validate_loop", "test_loop", "predict_loop"):
        state = loops.get(name, {})
        for key in list(state):
            if key.endswith("dataloader_progress"):
                del state[key]
            elif key.startswith("epoch_loop."):
                state[key.removeprefix("epoch_loop.")] = state.pop(key)


MIGRATIONS: list[tuple[str, list[Callable[[Checkpoint], None]]]] = [
    ("0.10.0", [_callback_keys]),
    ("1.6.0", [_loops_from_counters]),
    ("1.6.5", [_batches_that_stepped]),
    ("1.9.0", [_checkpoint_keys]),
    ("2.0.0", [_flat_loops]),
]
"""First version with the layout -> what brings older files to it, oldest first."""
