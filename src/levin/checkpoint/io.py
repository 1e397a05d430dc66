"""Checkpoint files: whole or absent, and read without running what is in them."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import urlsplit

import torch

from levin.checkpoint.pickling import explained_pickling
from levin.checkpoint.unpickling import allowed_globals, redirecting_pickle, refused_global
from levin.checkpoint.verify import check_zip, is_zip, open_for_reading
from levin.checkpoint.worker import Save
from levin.utilities.atomic import atomic_open
from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.filesystem import is_local, remove
from levin.utilities.types import PathLike


def atomic_save(obj: Any, path: PathLike) -> None:
    """Save ``obj`` so that ``path`` holds all of it, or what it held before.

    ``torch.save`` writes the file under a temporary name in the same folder; it is synced to the disk and renamed.

    Args:
        obj: Anything that ``torch.save`` takes.
        path: Local path, or URL that fsspec knows. Missing folders are made.

    Raises:
        TypeError, AttributeError or pickle.PicklingError: Something in ``obj`` cannot be pickled; the message says
            what.
        OSError: The disk is full, the folder cannot be written to, and so on. The older file is intact and nothing
            is left behind.

    Example:
        >>> atomic_save({"weight": torch.zeros(2)}, f"{tempfile.mkdtemp()}/weights.ckpt")
    """
    with atomic_open(path) as file, explained_pickling(obj):
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # The writer is in C++, and complains of its position in a file that has refused some bytes.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def load(path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """Load a checkpoint, after checking that it is intact.

    Args:
        path: Local path, URL that fsspec knows, http address (kept in torch's hub folder), or open binary file.
        map_location: Where tensors go, as for ``torch.load``; by default to the device that they were saved from.
        weights_only: False allows the file to run code while it is loaded, which is for files of trusted origin.
            None is True: tensors, plain values and containers, and the classes in
            ``torch.serialization.safe_globals``.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedCheckpointError: The file is damaged, or no checkpoint. It is a ValueError, EOFError, RuntimeError and
            UnpicklingError.
        pickle.UnpicklingError: The file holds objects of classes that are not allowed. The message names them.

    Example:
        >>> checkpoint = load("best.ckpt", map_location="cpu")  # doctest: +SKIP
    """
    if hasattr(path, "read"):
        return _load_file(path, f"the file {getattr(path, 'name', '')}".rstrip(), map_location, weights_only)
    name = os.fspath(path)
    if name.startswith(("http://", "https://")):
        path = _download(name)
    with open_for_reading(path) as file:
        if is_local(path):
            return _load_file(file, name, map_location, weights_only)
        # Reading starts at the end and goes to and fro, and every byte is needed twice.
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy, length=2**20)
            copy.seek(0)
            return _load_file(copy, name, map_location, weights_only)


def _load_file(file: IO[bytes], name: str, map_location: Any, weights_only: bool | None) -> Any:
    if is_zip(file):
        check_zip(file, name)
    elif not _is_legacy(file):
        raise DamagedCheckpointError(f"{name} is no checkpoint, or its first bytes are damaged.")
    if weights_only is False:
        return torch.load(file, map_location, pickle_module=redirecting_pickle(), weights_only=False)
    with allowed_globals() as finish:
        try:
            return finish(torch.load(file, map_location, weights_only=True))
        except Exception as error:
            # What torch raises depends on where in the file it comes upon something odd; all of it has one meaning.
            refusal = _refusal(error, name)
            if refusal is error:
                raise
            raise refusal from error


def _is_legacy(file: IO[bytes]) -> bool:
    """Return whether a file may come from torch before version 1.6, which wrote a row of pickles."""
    position = file.tell()
    first = file.read(1)
    file.seek(position)
    return first == pickle.PROTO


def _refusal(error: Exception, name: str) -> Exception:
    # torch puts a page of advice in place of what its unpickler said.
    said = str(error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error).strip()
    reason = said.splitlines()[0] if said else type(error).__name__
    refused = refused_global(said)
    if refused is not None:
        return pickle.UnpicklingError(
            f"{name} refers to {refused}, which is not loaded, since that could run code. If you trust where the file "
            "comes from, pass weights_only=False; torch.serialization.add_safe_globals allows single classes."
        )
    if isinstance(error, pickle.UnpicklingError):
        return pickle.UnpicklingError(
            f"{name} cannot be loaded without running code: {reason}. If you trust where the file comes from, pass "
            "weights_only=False."
        )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "deserialize object on" in said:
        return error  # the file may be fine, the machine lacks memory or the device
    return DamagedCheckpointError(f"{name} is no checkpoint, or is damaged: {type(error).__name__}: {reason}")


def _download(url: str) -> str:
    """Return the path of the file at ``url`` in torch's hub folder, fetching it when it is not there."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    # Many addresses end in the same name.
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = os.path.join(folder, f"{digest}-{os.path.basename(urlsplit(url).path)}")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=False)
    return path


class CheckpointIO(ABC):
    """Where and how checkpoints are kept. Subclass it to keep them elsewhere; pass it as ``Trainer(plugins=...)``.

    Attributes:
        is_collective: Whether :meth:`save_checkpoint` and :meth:`remove_checkpoint` are called on all ranks, each with
            its own part of the tree; by default on rank 0 alone, with the whole.
    """

    is_collective: bool = False

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` under ``path``.

        Args:
            checkpoint: The tree of a run.
            path: A path, or whatever name this class understands.
            storage_options: As given to ``Trainer.save_checkpoint``.
        """

    @abstractmethod
    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint that was saved under ``path``.

        Args:
            path: As for :meth:`save_checkpoint`.
            map_location: Where tensors go, as for ``torch.load``.
            weights_only: False allows the file to run code while it is loaded.
        """

    @abstractmethod
    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the checkpoint under ``path``."""

    @contextmanager
    def request(self, path: PathLike, in_background: bool = True) -> Iterator[Save]:
        """Tell whether the save of ``path`` in this block has made its file.

        Args:
            path: As for :meth:`save_checkpoint`, which is called in the block.
            in_background: Whether it may go on in the background, where that is possible.

        Yields:
            The save. After the block its file is there, or will be where saves go on in the background.
        """
        save = Save(path)
        yield save
        save.end()

    def wait(self) -> None:
        """Wait until nothing goes on in the background."""

    def check(self) -> None:
        """Raise the error of something that went on in the background; called once per step."""

    def on_exception(self, exception: BaseException) -> None:
        """End what is under way, and raise nothing; called when a run fails, before :meth:`teardown`.

        Args:
            exception: What it failed with.
        """

    def teardown(self) -> None:
        """End what is under way; called at the end of a run."""


class TorchCheckpointIO(CheckpointIO):
    """One file for each checkpoint, in torch's format, on any file system that fsspec knows.

    Example:
        >>> path = f"{tempfile.mkdtemp()}/last.ckpt"
        >>> checkpoint_io = TorchCheckpointIO()
        >>> checkpoint_io.save_checkpoint({"epoch": 1}, path)
        >>> checkpoint_io.load_checkpoint(path)
        {'epoch': 1}
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` at ``path``, atomically (see :func:`atomic_save`).

        Raises:
            TypeError: ``storage_options`` are given.
        """
        reject_storage_options(storage_options, self)
        atomic_save(checkpoint, path)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint at ``path`` (see :func:`load`), with tensors on the CPU by default."""
        checkpoint: dict[str, Any] = load(path, "cpu" if map_location is None else map_location, weights_only)
        return checkpoint

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the file or folder at ``path``, if there is one."""
        remove(path)


def reject_storage_options(storage_options: Any | None, checkpoint_io: CheckpointIO) -> None:
    """Raise TypeError when there are storage options, for a class that has no use for them."""
    if storage_options is not None:
        raise TypeError(
            f"storage_options must be None for {type(checkpoint_io).__name__}, received {storage_options!r}. Write a "
            "CheckpointIO of your own that uses them, and pass it as Trainer(plugins=...)."
        )
