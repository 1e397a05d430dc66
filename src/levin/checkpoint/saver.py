"""The one way of a tree to its file: made whole where one rank writes it, handed to the CheckpointIO by those that have to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from levin.checkpoint.dtensors import whole

if TYPE_CHECKING:
    from levin.checkpoint.io import CheckpointIO
    from levin.utilities.types import PathLike


def save_tree(
    checkpoint_io: CheckpointIO,
    checkpoint: dict[str, Any],
    path: PathLike,
    storage_options: Any = None,
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
