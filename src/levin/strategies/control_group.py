"""A group of processes that exchanges a few numbers about the run, apart from the tensors of the model."""

from __future__ import annotations

import sys
import traceback
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist

from levin.utilities.stacks import calls_in
from levin.utilities.types import StateDict
from levin.utilities.user_frames import call_under_way, describe_different_calls

# All exchanges begin with a row of this length: rows of different lengths would leave Gloo waiting for ever.
_WIDTH = 16

Rows = Callable[[], list[list[float]]]
"""Waits for the numbers of every process, and returns them."""


class ControlGroup:
    """Exchanges numbers over the CPU, whatever the devices: nobody waits for a GPU, and no gradient is overtaken.

    The process group is made by the first exchange, which all of its processes take part in.

    After an error :attr:`is_closed` is set: the other processes may be gone, or wait elsewhere, and nobody is asked any more.

    Args:
        timeout: How long a process waits for the others; torch's default when None.
        ranks: The global ranks that belong to it, this process among them; all when None.
    """

    def __init__(self, timeout: timedelta | None = None, ranks: Sequence[int] | None = None) -> None:
        self._timeout = timeout
        self._ranks = None if ranks is None else list(ranks)
        self.is_closed: bool = False
        # This group, and that of all which it was made beside. Torch keeps them: when it takes them down their connections
        # close, and whoever still waits for this process hears of it.
        self._group: ref[Any] | None = None
        self._world: ref[Any] | None = None

    def __getstate__(self) -> StateDict:
        """Leave an open group here: another process opens its own."""
        return {**self.__dict__, "is_closed": False, "_group": None, "_world": None}

    @property
    def group(self) -> Any:
        """The process group."""
        world: Any = dist.group.WORLD
        group = None if self._group is None or self._world is None or self._world() is not world else self._group()
        if group is None:
            # Where it is not of all processes, those that are not in it have no part in making it.
            of_some: StateDict = {} if self._ranks is None else {"use_local_synchronization": True}
            group = dist.new_group(self._ranks, timeout=self._timeout, backend="gloo", **of_some)
            self._group, self._world = ref(group), ref(world)
        return group

    def exchange(self, numbers: Sequence[float], what: str = "batches") -> list[list[float]]:
        """Return the numbers of every process, in the order of ranks; each gives as many.

        Args:
            numbers: Of this process. Whole numbers are exact up to 2**53.
            what: What they are about, the same in every process.

        Raises:
            RuntimeError: Another process exchanges something else, in all of them.
        """
        return self.begin(numbers, what)()

    def begin(self, numbers: Sequence[float], what: str = "the run") -> Rows:
        """Begin an exchange without waiting for it; return the function that waits, and returns what :meth:`exchange` does."""
        row = [float(zlib.crc32(what.encode())), float(len(numbers)), *numbers]
        gathered = None if self.is_closed else self._gather(row[:_WIDTH] + [0.0] * (_WIDTH - len(row)))

        def end() -> list[list[float]]:
            if gathered is None or self.is_closed:
                return [row[2:]]
            rows = gathered()
            if any(other[:2] != row[:2] for other in rows):
                self._tell_difference(what)
            if len(row) > _WIDTH:
                rows = [[*first, *rest] for first, rest in zip(rows, self._gather(row[_WIDTH:])())]
            return [other[2 : len(row)] for other in rows]

        return end

    def _gather(self, row: list[float]) -> Rows:
        own = torch.tensor(row, dtype=torch.float64)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        work: Any = dist.all_gather(parts, own, group=self.group, async_op=True)

        def rows() -> list[list[float]]:
            work.wait()
            return [part.tolist() for part in parts]

        return rows

    def _tell_difference(self, what: str) -> None:
        _, line = call_under_way(calls_in(traceback.walk_stack(sys._getframe())))
        told = self._gathered_objects((line, what))
        # One line that does something else on each rank says nothing by itself.
        is_one_line = len({line for line, _ in told}) == 1
        lines: dict[str, list[int]] = {}
        for rank, (line, what) in zip(dist.get_process_group_ranks(self.group), told):
            lines.setdefault(f"{line} for {what}" if is_one_line else line, []).append(rank)
        raise RuntimeError(describe_different_calls(lines))

    def _gathered_objects(self, obj: object) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, obj, group=self.group)
        return found

    def exchange_objects(self, obj: object, what: str) -> list[Any]:
        """Return the objects of every process, any that pickle can carry, in the order of ranks; see :meth:`exchange`."""
        self.exchange([], what)
        return self._gathered_objects(obj)

    def share(self, obj: object, src: int = 0) -> Any:
        """Return the object of number ``src`` of the group, any that pickle can carry, in every process."""
        holder = [obj]
        dist.broadcast_object_list(holder, group=self.group, group_src=src)
        return holder[0]

    def collect(self, data: torch.Tensor) -> list[torch.Tensor] | None:
        """Return the bytes of the other processes, in order, in the first of the group; None in the others.

        They are sent one after the other, so that the first holds no more than what it keeps.

        Args:
            data: Of this process, of type uint8; each may have another length.
        """
        sizes = [int(row[0]) for row in self.exchange([data.numel()], "states of all ranks")]
        if dist.get_rank(self.group) != 0:
            dist.send(data, group=self.group, group_dst=0)
            return None
        found = [torch.empty(size, dtype=torch.uint8) for size in sizes[1:]]
        for number, buffer in enumerate(found, start=1):
            dist.recv(buffer, group=self.group, group_src=number)
        return found
