"""Which checkpoint a call starts from.

``select_checkpoint`` goes by what the user passed: a path, ``"best"`` and ``"last"`` of the checkpoint callbacks, ``"hpc"``
of a requeued job, ``"auto"``, which is the newest intact checkpoint that this run or an earlier process of the same script
left, or ``"registry"`` and its longer forms, through the package litmodels.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Optional, Protocol

from levin.utilities.filesystem import exists, is_local, list_folder, local_path, modified_s
from levin.utilities.interactive import is_slurm_shell
from levin.utilities.packages import require_package
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.states import TrainerFn, TrainerState


class Call(Protocol):
    """What of a call of the Trainer says which checkpoint it starts from."""

    trainer: object
    settings: Any
    strategy: Any
    state: TrainerState
    callbacks: list[Any]
    loggers: list[Any]

    @property
    def checkpoint_callbacks(self) -> list[object]:
        """Those that save checkpoints."""


def select_checkpoint(run: Call, given: Any, model_given: bool) -> Any:
    """Return the path to restore from, or None.

    Args:
        run: With callbacks attached.
        given: What the user passed: None, a path or URL, ``"best"``, ``"last"``, ``"hpc"``, ``"auto"`` or
            ``"registry:NAME"``.
        model_given: Whether a model was passed with the call.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The name stands for nothing, or is empty.
    """
    run.strategy.checkpoint_io.wait()  # what is being written in the background may be what is asked for
    if given is None:
        given = _implicit(run, model_given)
    if given is None:
        return None
    if given == "best":
        return _best(run)
    if given == "last":
        path = _last(run)
        if path is None:
            rank_zero_warn(
                f'.{run.state.fn}(ckpt_path="last") is set, but there is no last checkpoint available. No checkpoint will be loaded.'
            )
        return path
    if given == "hpc":
        numbered = hpc_checkpoints(run.settings.default_root_dir)
        if not numbered:
            raise ValueError(
                f'.{run.state.fn}(ckpt_path="hpc") is set, but no hpc_ckpt_N.ckpt is in {run.settings.default_root_dir!r}. Pass a path.'
            )
        return max(numbered)[1]
    if given == "auto":
        return find_newest(run)
    if is_registry(given):
        return download_checkpoint(run, given)
    if given == "":
        raise ValueError(
            f"ckpt_path must be a path, received '', as the `best_model_path` of a ModelCheckpoint that has not saved. Aborting {run.state.fn}."
        )
    if is_local(given) and not os.path.exists(local_path(given)):
        raise FileNotFoundError(
            f"ckpt_path must be an existing file, received {str(given)!r}. Aborting {run.state.fn}."
        )
    return given


def _implicit(run: Call, model_given: bool) -> Optional[str]:
    if model_given:
        if run.state.fn != TrainerFn.FITTING:
            return None  # the weights that the model has are those that are meant
        wishes = {getattr(callback, "resumes_by_itself", None) for callback in run.callbacks}
        if False in wishes:
            return None
        if True in wishes:
            return "last"
        return "hpc" if _is_job() and hpc_checkpoints(run.settings.default_root_dir) else None
    rank_zero_warn(
        f"`.{run.state.fn}(ckpt_path=None)` was called without a model. The best model of the previous `fit` call will be used. "
        f'Pass `ckpt_path="best"` to say so, or the model to use its present weights.'
    )
    return "best"


def _best(run: Call) -> str:
    callbacks: list[object] = run.checkpoint_callbacks
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
    times = {path: modified_s(path) for path in candidates if _leads_to_something(path)}
    return max(times, key=lambda path: (times[path], path), default=None)


def agree(run: Call, path: object) -> Any:
    """Return what rank 0 starts from: each process has looked by itself, and may have seen another state of the disk.

    Args:
        run: With its processes connected.
        path: What :func:`select_checkpoint` found in this process.
    """
    if run.strategy.world_size > 1 and (path is None or isinstance(path, str)):
        return run.strategy.broadcast(path)
    return path


def _leads_to_something(path: str) -> bool:
    return os.path.exists(local_path(path)) if is_local(path) else exists(path)


def _is_job() -> bool:
    """Whether this is a job of SLURM, and no shell for a person."""
    return bool(os.environ.get("SLURM_JOB_ID")) and not is_slurm_shell()


def hpc_checkpoints(folder: str) -> list[tuple[int, str]]:
    """Return the numbers N and the paths of what is called ``hpc_ckpt_N.ckpt`` in ``folder``."""
    matches = ((re.search(r"hpc_ckpt_(\d+)\.ckpt$", path), path) for path in list_folder(folder))
    return [(int(match[1]), path) for match, path in matches if match]


def find_newest(run: Call) -> Optional[str]:
    """Return the newest intact checkpoint of the run's folders, or None for a fresh start.

    The folders are ``default_root_dir``, those of the checkpoint callbacks, and for a callback that saves in the folder
    of the logger's version those of earlier versions: the newest version that has an intact checkpoint. Files that are
    damaged or incomplete are named in a warning each. Fit leaves out callbacks that save weights only.

    Args:
        run: With callbacks and loggers attached.
    """
    from levin.checkpoint.verify import find_newest_intact

    rows: list[list[str]] = [[str(run.settings.default_root_dir)]]
    for callback in run.checkpoint_callbacks:
        if run.state.fn == TrainerFn.FITTING and getattr(callback, "save_weights_only", False):
            continue  # there is nothing to go on from
        rows.append(_folders_of(run, callback))
    found: dict[str, float] = {}
    seen: set[str] = set()
    for row in rows:
        for folder in row:
            if folder in seen:
                continue
            seen.add(folder)
            path = find_newest_intact(folder)
            if path is not None:
                found[path] = modified_s(path)
                break
    return max(found, key=lambda path: (found[path], path), default=None)


def _folders_of(run: Call, callback: object) -> list[str]:
    """Return the folders that hold the files of a callback, the newest first."""
    resolve = getattr(callback, "_resolve_ckpt_dir", None)
    folder = resolve(run.trainer) if resolve is not None else getattr(callback, "dirpath", None)
    if not folder:
        return []
    folder = str(folder)
    parent, name = os.path.split(folder)
    parent, version = os.path.split(parent)
    logger = run.loggers[0] if run.loggers else None
    is_numbered = getattr(logger, "_numbers_versions", False) and name == "checkpoints"
    if not is_numbered or version != f"version_{getattr(logger, 'version', None)}":
        return [folder]
    # Each process takes the next number, so that the files of the one before are in another folder.
    earlier = [os.path.join(parent, f"version_{number}", name) for number in _versions_in(parent)]
    return [folder, *(other for other in earlier if other != folder)]


def _versions_in(parent: str) -> list[int]:
    """Return the numbers N of what is called ``version_N`` in a folder, the highest first."""
    matches = (re.fullmatch(r"version_(\d+)", os.path.basename(path)) for path in list_folder(parent))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def is_registry(given: object) -> bool:
    """Return whether ``ckpt_path`` names something in a registry rather than a file.

    Example:
        >>> is_registry("registry:owner/model:version:v2"), is_registry("registry.ckpt")
        (True, False)
    """
    return isinstance(given, str) and (given == "registry" or given.startswith("registry:"))


def name_in_registry(given: str, default: str | None) -> str:
    """Return the name that the registry knows, with its version behind a colon if one was given.

    Args:
        given: ``"registry"``, ``"registry:NAME"``, ``"registry:NAME:version:V"`` or ``"registry:version:V"``.
        default: The name where none is given: that of ``Trainer(model_registry=...)``.

    Raises:
        ValueError: It has another form, or there is no name at all.

    Example:
        >>> name_in_registry("registry:version:v2", "owner/model")
        'owner/model:v2'
    """
    match = re.fullmatch(r"registry(?::(?!version:)(?P<name>[^:]+))?(?::version:(?P<version>[^:]+))?", given)
    if match is None:
        raise ValueError(
            "ckpt_path must be 'registry', 'registry:NAME', 'registry:NAME:version:V' or 'registry:version:V', "
            f"received {given!r}."
        )
    name = match["name"] or default
    if not name:
        raise ValueError(
            f"ckpt_path={given!r} names no model. Name it ('registry:NAME'), or give Trainer(model_registry=NAME)."
        )
    return f"{name}:{match['version']}" if match["version"] else name


def download_checkpoint(run: Call, given: str) -> str | None:
    """Download a checkpoint into a folder below ``default_root_dir``, and return the path of its first ``.ckpt`` file.

    One process per machine downloads; the others get None, and learn the path from rank 0.

    Raises:
        ModuleNotFoundError: litmodels is not installed.
        ValueError: The name has another form, or ``default_root_dir`` is remote.
        FileNotFoundError: What was downloaded holds no ``.ckpt`` file.
    """
    name = name_in_registry(given, run.settings.model_registry)
    require_package("litmodels", f"ckpt_path={given!r}")
    root = run.settings.default_root_dir
    if not is_local(root):
        raise ValueError(f"ckpt_path={given!r} needs a local default_root_dir, received {root!r}.")
    from litmodels import download_model

    folder = Path(local_path(root)) / re.sub("[/:]", "_", name)
    if run.strategy.local_rank != 0:
        return None
    download_model(name, download_dir=str(folder))
    files = sorted(folder.rglob("*.ckpt"))
    if not files:
        raise FileNotFoundError(
            f"The model {name!r} of the registry holds no .ckpt file; it was downloaded to {folder}."
        )
    return str(files[0])
