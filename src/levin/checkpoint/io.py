"""The way of a tree to its file: made whole where one rank writes it, and there as a whole or not at all."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from levin.checkpoint.pickling import UNPICKLABLE, raise_explained
from levin.checkpoint.reading import load
from levin.utilities.exceptions import causes
from levin.utilities.filesystem import atomic_open, remove
from levin.utilities.types import PathLike, StateDict, Tree

if TYPE_CHECKING:
    from levin.checkpoint.worker import Worker

_PLAIN = frozenset((int, float, str, bool, bytes, complex, type(None)))


def save_tree(
    checkpoint_io: CheckpointIO,
    checkpoint: StateDict,
    path: PathLike,
    storage_options: object = None,
    is_writer: bool = True,
    is_alone: bool = False,
) -> None:
    """Hand a tree to ``checkpoint_io``; all ranks call this.

    Args:
        checkpoint_io: On all ranks if it is collective, with each rank's own parts; else on rank 0 with the whole.
        checkpoint: The tree. Tensors that are spread over ranks are gathered where one file holds them.
        path: Where to.
        storage_options: For ``checkpoint_io``.
        is_writer: Whether this is the rank that writes what one rank writes.
        is_alone: Whether the other ranks do not take part, because one has failed.

    Raises:
        RuntimeError: Tensors are spread over ranks that do not take part.
    """
    if not checkpoint_io.is_collective:
        checkpoint = whole(checkpoint, is_kept=is_writer, is_alone=is_alone)
        if not is_writer:
            return
    checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)


def atomic_save(obj: object, path: PathLike) -> None:
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
        >>> atomic_save({"weight": torch.zeros(2)}, "weights.ckpt")
    """
    with atomic_open(path) as file:
        try:
            torch.save(obj, file)
        except UNPICKLABLE as error:
            raise_explained(error, obj)
        except RuntimeError as error:
            # The writer is in C++, and complains of its position in a file that has refused some bytes.
            raise next((cause for cause in causes(error) if isinstance(cause, OSError)), error) from None


class Save:
    """A save that was asked for: whether its file is there.

    Args:
        path: Where to.
        worker: What writes it in the background; None where the save is done when the call returns.
    """

    def __init__(self, path: PathLike, worker: Worker | None = None) -> None:
        self.path: PathLike = path
        self.is_begun: bool = False
        self.is_written: bool = False
        self._worker = worker

    def begin(self, write: Callable[[], None]) -> None:
        """Let ``write``, which takes no arguments, make the file in the background."""

        def job() -> None:
            write()
            self.is_written = True

        assert self._worker is not None
        self.is_begun = True
        self._worker.submit(job, f"Saving {self.path}")

    def end(self) -> None:
        """Note that the call is over; what was not begun in the background is complete, or not this process's to write."""
        self.is_written = self.is_written or not self.is_begun

    def then(self, function: Callable[[], None], name: str) -> None:
        """Call ``function`` once the file is there; in the background, if that is where it is written.

        Args:
            function: Takes no arguments; its error is raised like that of the save.
            name: What it does, for messages.
        """
        if self._worker is None:
            function()
        else:
            self._worker.submit(function, name)

    def wait(self) -> None:
        """Wait until the file is there, or writing it has failed, which the CheckpointIO will tell."""
        if self._worker is not None:
            self._worker.wait()


class CheckpointIO(ABC):
    """Where and how checkpoints are kept. Subclass it to keep them elsewhere; pass it as ``Trainer(plugins=...)``.

    Attributes:
        is_collective: Whether :meth:`save_checkpoint` and :meth:`remove_checkpoint` are called on all ranks, each with
            its own part of the tree; by default on rank 0 alone, with the whole.
    """

    is_collective: bool = False

    @abstractmethod
    def save_checkpoint(self, checkpoint: StateDict, path: PathLike, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` under ``path``.

        Args:
            checkpoint: The tree of a run.
            path: A path, or whatever name this class understands.
            storage_options: As given to ``Trainer.save_checkpoint``.
        """

    @abstractmethod
    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> StateDict:
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
        >>> checkpoint_io = TorchCheckpointIO()
        >>> checkpoint_io.save_checkpoint({"epoch": 1}, "last.ckpt")
        >>> checkpoint_io.load_checkpoint("last.ckpt")
        {'epoch': 1}
    """

    def save_checkpoint(self, checkpoint: StateDict, path: PathLike, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` at ``path``, atomically (see :func:`atomic_save`).

        Raises:
            TypeError: ``storage_options`` are given.
        """
        reject_storage_options(storage_options, self)
        atomic_save(checkpoint, path)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> StateDict:
        """Return the checkpoint at ``path`` (see :func:`load`), with tensors on the CPU by default."""
        checkpoint: StateDict = load(path, "cpu" if map_location is None else map_location, weights_only)
        return checkpoint

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the file or folder at ``path``, if there is one."""
        remove(path)


def reject_storage_options(storage_options: object | None, checkpoint_io: CheckpointIO) -> None:
    """Raise TypeError when there are storage options, for a class that has no use for them."""
    if storage_options is not None:
        raise TypeError(
            f"storage_options must be None for {type(checkpoint_io).__name__}, received {storage_options!r}. Write a "
            "CheckpointIO of your own that uses them, and pass it as Trainer(plugins=...)."
        )


def whole(tree: Tree, is_kept: bool = True, is_alone: bool = False) -> Tree:
    """Return ``tree`` with whole tensors, on the CPU, in the place of those that are spread over ranks.

    All ranks call this with trees of one form; one tensor is gathered after the other.

    Args:
        tree: Dicts, lists and tuples of anything. It stays as it is.
        is_kept: Whether this rank wants them; the others are left with what they had.
        is_alone: Whether the other ranks do not take part.

    Raises:
        RuntimeError: There are such tensors, and the other ranks do not take part.
    """

    def gather(tensor: Tree) -> Any:
        if is_alone:
            raise RuntimeError(
                "A tensor whose parts are on several ranks cannot be saved by one of them, and the others do not answer "
                "since a rank has failed. Go on from an older checkpoint."
            )
        found = tensor.detach().full_tensor()
        return found.cpu() if is_kept else tensor

    return _replaced(tree, gather)


def on_host(tree: Tree) -> Tree:
    """Return ``tree`` with its tensors on the CPU, for devices whose tensors mean nothing in a file."""
    return _walk(tree, torch.Tensor, lambda tensor: tensor.cpu())


def own_parts(tree: Tree) -> Tree:
    """Return ``tree`` with this rank's parts in the place of tensors that are spread over ranks."""
    return _replaced(tree, lambda tensor: tensor.to_local())


def _replaced(tree: Tree, function: Callable[[Any], Any]) -> Tree:
    # Without this module nobody can have made one.
    module = sys.modules.get("torch.distributed.tensor")
    return tree if module is None else _walk(tree, module.DTensor, function)


def _walk(value: Tree, spread: type, function: Callable[[Any], Any]) -> Tree:
    kind = type(value)
    if kind in (dict, OrderedDict):
        # Called for each tensor of a model: most entries need no call of their own.
        changed = {
            key: new
            for key, item in value.items()
            if type(item) not in _PLAIN and (new := _walk(item, spread, function)) is not item
        }
        if not changed:
            return value
        result = kind(value)
        vars(result).update(vars(value)) if kind is OrderedDict else None
        result.update(changed)
        return result
    if kind in (list, tuple):
        # The state of python's random numbers is a tuple of 625 numbers.
        if _PLAIN.issuperset(map(type, value)):
            return value
        row = [_walk(item, spread, function) for item in value]
        return value if all(new is old for new, old in zip(row, value, strict=True)) else kind(row)
    return function(value) if isinstance(value, spread) else value
