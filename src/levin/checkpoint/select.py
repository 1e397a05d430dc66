"""Which checkpoint a call starts from."""

from __future__ import annotations

import os
import re
from typing import Any, Optional

from levin.checkpoint.model_registry import download_checkpoint, is_registry
from levin.checkpoint.newest import Call, find_newest, modified
from levin.utilities.filesystem import get_filesystem, is_local, local_path
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.states import TrainerFn


def select_checkpoint(run: Call, given: Any, model_given: bool) -> Any:
    """Return the path to restore from, or None.

    Args:
        run: With callbacks attached.
        given: What the user passed: None, a path or URL, ``"best"``, ``"last"``, ``"hpc"``, ``"auto"`` or
            ``"registry:NAME"``.
        model_given: Whether a model was passed with the call.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The name stands for nothing.
    """
    if (wait := getattr(run.strategy.checkpoint_io, "wait", None)) is not None:
        wait()  # what is being written in the background may be what is asked for
    if given is None:
        given = _implicit(run, model_given)
    path: Any = None
    if given is None:
        path = None
    elif given == "best":
        path = _best(run)
    elif given == "last":
        path = _last(run)
        if path is None:
            rank_zero_warn(
                f'.{run.state.fn}(ckpt_path="last") is set, but there is no last checkpoint available. No checkpoint will be loaded.'
            )
    elif given == "hpc":
        path = find_hpc_checkpoint(run.settings.default_root_dir)
        if path is None:
            raise ValueError(
                f'.{run.state.fn}(ckpt_path="hpc") is set, but no hpc_ckpt_N.ckpt is in {run.settings.default_root_dir!r}. Pass a path.'
            )
    elif given == "auto":
        path = find_newest(run)
    elif is_registry(given):
        path = download_checkpoint(run, given)
    else:
        path = given
        if is_local(path) and not os.path.exists(local_path(path)):
            raise FileNotFoundError(
                f"ckpt_path must be an existing file, received {str(path)!r}. Aborting {run.state.fn}."
            )
    return path


def _implicit(run: Call, model_given: bool) -> Optional[str]:
    if model_given:
        if run.state.fn == TrainerFn.FITTING and any(
            type(callback).__name__ == "OnExceptionCheckpoint" for callback in run.callbacks
        ):
            return "last"
        if os.environ.get("SLURM_JOB_ID") and find_hpc_checkpoint(run.settings.default_root_dir):
            return "hpc"
        return None
    rank_zero_warn(
        f"`.{run.state.fn}(ckpt_path=None)` was called without a model. The best model of the previous `fit` call will be used. "
        f'Pass `ckpt_path="best"` to say so, or the model to use its present weights.'
    )
    return "best"


def _best(run: Call) -> str:
    callbacks: list[Any] = run.checkpoint_callbacks
    if not callbacks:
        raise ValueError(
            f'`.{run.state.fn}(ckpt_path="best")` is set but `ModelCheckpoint` is not configured. '
            "Add one to Trainer(callbacks=...), or pass the model to use the weights that it has."
        )
    if len(callbacks) > 1:
        rank_zero_warn(
            f'`.{run.state.fn}(ckpt_path="best")` found several `ModelCheckpoint` callbacks; the first is used.'
        )
    best = getattr(callbacks[0], "best_model_path", "")
    if not best:
        if run.settings.fast_dev_run:
            raise ValueError(
                f'You cannot execute `.{run.state.fn}(ckpt_path="best")` with `fast_dev_run=True`, which saves no checkpoints. '
                "Pass an exact path, or leave ckpt_path out."
            )
        raise ValueError(
            f'`.{run.state.fn}(ckpt_path="best")` is set but `ModelCheckpoint` has not saved a best checkpoint yet. '
            "Call `fit` first, or pass the model to use the weights that it has."
        )
    return str(best)


def _last(run: Call) -> Optional[str]:
    candidates: list[str] = []
    for callback in run.checkpoint_callbacks:
        found = getattr(callback, "_find_last_checkpoints", None)
        if found is not None:
            candidates.extend(str(path) for path in found(run.trainer))
        path = getattr(callback, "ckpt_path", None)
        if path:
            candidates.append(str(path))
    # A link may point to nothing, and the file of an exception is there after one only.
    times = {path: modified(path) for path in candidates if get_filesystem(path).exists(path)}
    return max(times, key=lambda path: (times[path], path), default=None)


def agree(run: Call, path: Any) -> Any:
    """Return what rank 0 starts from: each process has looked by itself, and may have seen another state of the disk.

    Args:
        run: With its processes connected.
        path: What :func:`select_checkpoint` found in this process.
    """
    if run.strategy.world_size > 1 and (path is None or isinstance(path, str)):
        return run.strategy.broadcast(path)
    return path


def find_hpc_checkpoint(folder: str) -> Optional[str]:
    """Return ``hpc_ckpt_N.ckpt`` with the highest N in ``folder``, or None."""
    filesystem = get_filesystem(folder)
    if not filesystem.exists(folder):
        return None
    numbered = [
        (int(match.group(1)), str(path) if is_local(folder) else str(filesystem.unstrip_protocol(path)))
        for path in filesystem.ls(folder, detail=False)
        if (match := re.search(r"hpc_ckpt_(\d+)\.ckpt$", str(path)))
    ]
    return max(numbered)[1] if numbered else None
