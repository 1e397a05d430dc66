"""Moving batches to a CUDA device while it computes."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from levin.utilities.move import move_data_to_device

# What crosses the bus in less than the time (about 20 us) that a second stream costs the host.
_MIN_BYTES = 2**20

# Steps that may be unfinished on the device when the host copies a batch for the next one.
_NUM_UNFINISHED = 2


class CopyStream:
    """Moves large tensors on a stream of its own, so that their copies run beside the steps that came before.

    The host is ahead of the device: it asks for a batch when the step before is queued, not when it is done. On the
    stream of the steps the copy would wait for it; here it does not, and the next step waits for the copy. From pinned
    memory the host does not wait for anything, from other memory for the copy alone.

    So that the host does not fill the device with batches for steps that are far ahead, it waits, before it copies, for
    the step before the last two: at most one batch more is on the device than in a loop on one stream.

    Args:
        device: A CUDA device.

    Example::

        copies = CopyStream(torch.device("cuda", 0))
        batch = copies(torch.zeros(1000, 1000).pin_memory(), torch.device("cuda", 0))
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        # Ends of steps whose batches were moved here.
        self.ends: deque[torch.cuda.Event] = deque()
        self.has_copied: bool = False

    def __call__(self, batch: object, device: torch.device) -> object:
        """Return ``batch`` with every leaf that has a ``to`` method on ``device``."""
        if self.has_copied:
            self._bound()
        return move_data_to_device(batch, device, self.move)

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return ``tensor`` on ``device``; the current stream may use it."""
        if not tensor.is_cpu or tensor.nbytes < _MIN_BYTES or tensor.requires_grad or device != self.device:
            return tensor.to(device, non_blocking=True)
        with torch.cuda.stream(self.stream):
            moved = tensor.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(self.stream)
        # Its memory is given to a later copy only when what the current stream did with it is done.
        moved.record_stream(current)
        self.has_copied = True
        return moved

    def _bound(self) -> None:
        """Wait for the step before the last two. The device still has these to do, so that it does not run dry."""
        self.has_copied = False
        end = torch.cuda.Event(blocking=True)
        end.record(torch.cuda.current_stream(self.device))
        self.ends.append(end)
        if len(self.ends) > _NUM_UNFINISHED:
            self.ends.popleft().synchronize()
