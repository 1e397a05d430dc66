"""Checkpoints of DeepSpeed: a folder with a file of weights, a file of each process, and ``meta.pt`` with the rest.

DeepSpeed writes and reads its own files, with pickle: load folders that you trust. As all checkpoints, a folder is written
under another name, ``meta.pt`` last, and renamed when all of it is there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from glob import glob
from typing import Any

import torch.distributed as dist

from levin.checkpoint.io import CheckpointIO, atomic_save, reject_storage_options
from levin.checkpoint.layout import META_FILE, ZERO_FOLDER, is_zero, local_folder, put_in_place
from levin.checkpoint.reading import load
from levin.checkpoint.verify import verify
from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.filesystem import remove, sync_folder
from levin.utilities.types import PathLike, StateDict

_WORLD_KEY = "zero_world_size"
# What DeepSpeed writes beside the state of a client, in its file of weights.
_KEYS_OF_DEEPSPEED = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
}  # fmt: skip


@dataclass(frozen=True)
class ZeroEntry:
    """What stands in a tree in the place of weights, or an optimizer's state, that DeepSpeed reads itself.

    Args:
        folder: Of the checkpoint.
        world_size: Number of processes that wrote it.
    """

    folder: str
    world_size: int


class ZeroCheckpointIO(CheckpointIO):
    """A folder for each checkpoint, into which DeepSpeed writes what every process holds.

    Without an engine, when nothing was trained, the weights are whole and go into one file.

    Args:
        exclude_frozen: Whether to leave out the weights that do not learn.
    """

    is_collective = True

    def __init__(self, exclude_frozen: bool = False) -> None:
        self.exclude_frozen = exclude_frozen
        self.engine: Any = None

    def save_checkpoint(self, checkpoint: StateDict, path: PathLike, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` as the folder ``path``. All processes call this.

        Raises:
            TypeError: ``storage_options`` are given.
            OSError: The disk is full, and so on; what was under the name before is intact.
        """
        reject_storage_options(storage_options, self)
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if self.engine is None:
            if is_first:
                atomic_save(checkpoint, path)
            return
        folder = local_folder(path)
        unfinished = f"{folder}.part"
        meta = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        if is_first:
            remove(unfinished)
        dist.barrier()
        self.engine.save_checkpoint(
            unfinished,
            tag=ZERO_FOLDER,
            exclude_frozen_parameters=self.exclude_frozen and self.engine.zero_optimization(),
        )
        if is_first:
            _sync(unfinished)
            atomic_save({**meta, _WORLD_KEY: dist.get_world_size()}, os.path.join(unfinished, META_FILE))
            put_in_place(unfinished, folder)
        dist.barrier()

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> StateDict:
        """Return the checkpoint at ``path``: a file, or what the folder holds beside weights and optimizer states."""
        if os.path.isdir(path):
            return load_zero(path, weights_only)
        found: StateDict = load(path, "cpu" if map_location is None else map_location, weights_only)
        return found

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the folder at ``path``. All processes call this."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            remove(path)


def load_zero(path: PathLike, weights_only: bool | None = None) -> StateDict:
    """Return a checkpoint of DeepSpeed with a :class:`ZeroEntry` in the place of weights and optimizer states.

    Args:
        path: The folder, of levin or of Lightning.
        weights_only: As for :func:`levin.checkpoint.load`.

    Raises:
        ValueError: It is no such folder, or is damaged, or lacks the file of a process.
    """
    folder = local_folder(path)
    if not is_zero(folder):
        raise DamagedCheckpointError(
            f"{folder!r} has no `latest` and no `{ZERO_FOLDER}`: it is no folder of DeepSpeed."
        )
    if os.path.isfile(os.path.join(folder, META_FILE)):
        verify(folder)
        checkpoint: StateDict = load(os.path.join(folder, META_FILE), "cpu", weights_only)
        world_size = checkpoint.pop(_WORLD_KEY)
    else:
        files = sorted(glob(os.path.join(folder, ZERO_FOLDER, "*model_states.pt")))
        if not files:
            raise DamagedCheckpointError(
                f"{folder!r} lacks DeepSpeed's file of weights, so it is no complete checkpoint."
            )
        whole = load(files[0], "cpu", weights_only)
        checkpoint = {key: value for key, value in whole.items() if key not in _KEYS_OF_DEEPSPEED}
        world_size = whole["dp_world_size"]
    parts = len(glob(os.path.join(folder, ZERO_FOLDER, "*optim_states.pt")))
    if parts not in (0, world_size):
        raise DamagedCheckpointError(
            f"{folder!r} was written by {world_size} processes, and holds the files of {parts}. Use an older checkpoint."
        )
    entry = ZeroEntry(folder, world_size)
    checkpoint["state_dict"] = entry
    if "lr_schedulers" in checkpoint:
        checkpoint["optimizer_states"] = [entry]
    return checkpoint


def consolidate_zero(path: PathLike, weights_only: bool | None = None) -> StateDict:
    """Return a checkpoint of DeepSpeed with whole weights in single precision, and without optimizer states.

    Raises:
        ValueError: It is no such folder, or is damaged.
        ModuleNotFoundError: deepspeed is not installed.
    """
    checkpoint = load_zero(path, weights_only)
    checkpoint["state_dict"] = whole_weights(checkpoint["state_dict"].folder)
    checkpoint.pop("optimizer_states", None)
    return checkpoint


def whole_weights(folder: str) -> StateDict:
    """Return the weights of a folder of DeepSpeed, in single precision, on the CPU.

    Raises:
        ModuleNotFoundError: deepspeed is not installed.
    """
    if not glob(os.path.join(folder, ZERO_FOLDER, "*optim_states.pt")):
        (file,) = glob(os.path.join(folder, ZERO_FOLDER, "*model_states.pt"))
        state: StateDict = load(file, "cpu", False)["module"]
        return state
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{folder!r} was written by DeepSpeed, and needs the package deepspeed to be read. Run `pip install deepspeed`."
        ) from error
    return dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag=ZERO_FOLDER))


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: PathLike, output_file: PathLike, tag: str | None = None
) -> StateDict:
    """Turn the folder of a DeepSpeed checkpoint into one file that any Trainer reads.

    Args:
        checkpoint_dir: The folder.
        output_file: The file to write.
        tag: Taken for compatibility with scripts that name the folder inside of it, ``checkpoint``.

    Returns:
        What was written: weights in single precision, and the rest but the states of optimizers.

    Raises:
        ValueError: It is no such folder, or is damaged; or another ``tag``.

    Example:
        >>> convert_zero_checkpoint_to_fp32_state_dict("epoch=3.ckpt", "weights.ckpt")  # doctest: +SKIP
    """
    if tag not in (None, ZERO_FOLDER):
        raise ValueError(f"tag must be None or {ZERO_FOLDER!r}, received {tag!r}. Leave it out.")
    checkpoint = consolidate_zero(checkpoint_dir)
    atomic_save(checkpoint, output_file)
    return checkpoint


def _sync(folder: str) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(parent)
