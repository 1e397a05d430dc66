"""The processes that see different data."""

from __future__ import annotations

from typing import NamedTuple

from levin.utilities.types import Group


class DataParallelGroup(NamedTuple):
    """Where this process stands among those that see different data: all of them, unless a model is cut over some.

    Whatever has to do with data asks for this group and not for all processes: samplers, averages over batches, values
    that are logged, uneven loaders.

    Args:
        rank: Index of this process in the group: which part of the data it sees.
        size: Number of processes in the group: into how many parts the data is split.
        group: Handle for torch.distributed; None for all processes.
        ranks: The global ranks of the group, in the order of ``rank``; None for all processes.

    Example:
        >>> DataParallelGroup(rank=1, size=2).global_rank(0)
        0
        >>> DataParallelGroup(rank=1, size=2, ranks=(1, 3)).global_rank(0)
        1
    """

    rank: int = 0
    size: int = 1
    group: Group = None
    ranks: tuple[int, ...] | None = None

    def global_rank(self, rank: int) -> int:
        """Return the rank among all processes of number ``rank`` of this group."""
        return rank if self.ranks is None else self.ranks[rank]
