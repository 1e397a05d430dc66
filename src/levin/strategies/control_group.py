"""A line between the processes for a few numbers about the run, apart from the tensors of the model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class ControlGroup:
    """Exchanges numbers over the CPU, whatever the devices: nobody waits for a GPU, and no gradient is overtaken.

    The line is opened by the first exchange, which all processes take part in.

    After an error :attr:`is_closed` is set: the other processes may be gone, or wait elsewhere, and nobody is asked any more.

    Args:
        timeout: How long a process waits for the others; torch's default when None.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self.is_closed: bool = False
        self._group: Any = None
        # The process group that the line was opened beside: it ends with it.
        self._world: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave an open line here: another process opens its own."""
        return {"is_closed": False, "_timeout": self._timeout, "_group": None, "_world": None}

    @property
    def group(self) -> Any:
        """The process group of the line."""
        world = dist.group.WORLD
        if self._group is None or self._world is not world:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)  # type: ignore[no-untyped-call]
            self._world = world
        return self._group

    def exchange(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every process, in the order of ranks; each gives as many.

        Args:
            numbers: Of this process. Whole numbers are exact up to 2**53.
        """
        if self.is_closed:
            return [[float(number) for number in numbers]]
        own = torch.tensor(numbers, dtype=torch.float64)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own, group=self.group)
        return [part.tolist() for part in parts]

    def share(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank ``src``, any that pickle can carry, in every process."""
        holder = [obj]
        dist.broadcast_object_list(holder, src=src, group=self.group)
        return holder[0]

    def gather(self, obj: Any) -> list[Any] | None:
        """Return the objects of all processes, in the order of ranks, in rank 0; None in the others, and when cut."""
        if self.is_closed:
            return None
        found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(obj, found, dst=0, group=self.group)
        return found
