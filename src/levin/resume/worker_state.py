"""The random states of data-loader workers, batch by batch.

Workers run ahead of the loop: when a run is saved, they have drawn numbers for batches nobody has seen. So each worker
leaves its random states after every batch in memory that the main process shares, enough of them to reach back to
the last batch that was consumed. Batches themselves, and what PyTorch draws, stay untouched.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing.sharedctypes import RawArray
from typing import Any, cast

from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from levin.data.combined import is_stateful
from levin.resume.held_generators import find_generators, read_generators, write_generators
from levin.resume.stateful import leave_epoch
from levin.utilities.rng_states import ProcessRng
from levin.utilities.types import StateDict

# The three global generators take 10 kB; the rest is for those of the data set.
_SLOT_BYTES = 32 * 1024
_TOO_LARGE = 2**63 - 1


class WorkerStateLog:
    """Memory in which each worker writes a state after every batch; the last ``num_slots`` of them can be read.

    Args:
        num_workers: Workers that write.
        num_slots: States kept per worker.
        slot_bytes: Largest size of a state.

    Example:
        >>> log = WorkerStateLog(num_workers=1, num_slots=2)
        >>> log.write(0, b"after the first batch")
        >>> log.count(0), log.read(0, 1)
        (1, b'after the first batch')
    """

    def __init__(self, num_workers: int, num_slots: int, slot_bytes: int = _SLOT_BYTES) -> None:
        self.num_slots: int = num_slots
        self.slot_bytes: int = slot_bytes
        # What a fork or a new process inherits; no lock is needed, since each part has one writer.
        self._counts = RawArray("Q", num_workers)
        self._sizes = RawArray("Q", num_workers * num_slots)
        self._states = RawArray("B", num_workers * num_slots * slot_bytes)

    def write(self, worker: int, state: bytes) -> None:
        """Add the state of ``worker`` after its next batch."""
        count = self._counts[worker] + 1
        slot = self._slot(worker, count)
        fits = len(state) <= self.slot_bytes
        if fits:
            start = slot * self.slot_bytes
            memoryview(self._states).cast("B")[start : start + len(state)] = state
        self._sizes[slot] = len(state) if fits else _TOO_LARGE
        # The count comes last: a state that is counted is whole.
        self._counts[worker] = count

    def count(self, worker: int) -> int:
        """Return how many batches ``worker`` has made."""
        return int(self._counts[worker])

    def read(self, worker: int, count: int) -> bytes | None:
        """Return the state of ``worker`` after batch number ``count`` (from 1), None if it is not kept."""
        if not self.count(worker) - self.num_slots < count <= self.count(worker):
            return None
        slot = self._slot(worker, count)
        size, start = self._sizes[slot], slot * self.slot_bytes
        return None if size == _TOO_LARGE else bytes(memoryview(self._states).cast("B")[start : start + size])

    def _slot(self, worker: int, count: int) -> int:
        return worker * self.num_slots + count % self.num_slots


class RecordingCollate:
    """Calls the user's ``collate_fn``, the last thing that happens to a batch, and records the worker's state.

    Args:
        collate_fn: The user's or PyTorch's.
        log: Where to write.
        batch_size: Samples in a whole batch of an iterable data set; a smaller batch is its worker's last.
    """

    def __init__(
        self, collate_fn: Callable[[object], object], log: WorkerStateLog, batch_size: int | None = None
    ) -> None:
        self.collate_fn: Callable[[object], object] = collate_fn
        self.log: WorkerStateLog = log
        self.batch_size: int | None = batch_size
        self._state: WorkerState | None = None
        self._worker: int = -1

    def __call__(self, samples: Any) -> object:
        """Return the batch of ``samples``."""
        batch = self.collate_fn(samples)
        if self._state is None:
            info = get_worker_info()
            if info is None:
                return batch
            self._worker = info.id
            self._state = WorkerState(info.dataset, self.collate_fn)
        ended = self.batch_size is not None and len(samples) < self.batch_size
        self.log.write(self._worker, pickle.dumps(self._state.read(ended), pickle.HIGHEST_PROTOCOL))
        return batch


class WorkerState:
    """Reads and sets what decides the numbers that a worker (or a loader without workers) draws.

    That is: the global generators, the generators that the data set and the ``collate_fn`` hold, and the data set's own
    ``state_dict``.

    Args:
        dataset: The data set in this process.
        collate_fn: Function that makes the batches.
    """

    def __init__(self, dataset: object, collate_fn: object) -> None:
        self.dataset: Any = dataset
        self.owners: dict[str, object] = {"dataset": dataset, "collate_fn": collate_fn}
        # The state of a module is its weights, not a place in the data.
        self.has_state: bool = is_stateful(dataset) and not isinstance(dataset, nn.Module)
        self._globals: ProcessRng = ProcessRng()
        self._generators: dict[Any, object] = {}
        self._num_read: int = 0

    def read(self, ended: bool = False) -> dict[str, object]:
        """Return the state.

        Args:
            ended: Whether an iterable data set has come to its end.
        """
        state = {"globals": self._globals.read(), **self.read_own()}
        if ended:
            state["ended"] = True
        return state

    def read_own(self) -> StateDict:
        """Return the part of the state that the global generators are not."""
        self._num_read += 1
        # Looking for generators costs more than reading them, and many data sets make theirs when first used: look
        # after batches 1, 2, 4, 8 and so on.
        if self._num_read & (self._num_read - 1) == 0:
            self._generators = find_generators(self.owners)
        state: StateDict = {}
        if self._generators:
            state["generators"] = read_generators(self._generators)
        if self.has_state:
            state["dataset"] = self.dataset.state_dict()
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Set everything that is in ``state``."""
        self._globals.write(state.get("globals", {}))
        self.write_own(state)

    def write_own(self, state: Mapping[str, Any]) -> None:
        """Set all but the global generators."""
        write_generators(self.owners, state.get("generators", {}))
        if "dataset" in state and self.has_state:
            self.dataset.load_state_dict(state["dataset"])

    def write_left(self, state: Mapping[str, Any], is_ended: bool) -> None:
        """Set all but the global generators to a state saved where an epoch was left, to begin a new one.

        The data set may be iterated, which draws from the global generators.
        """
        if "dataset" in state and self.has_state and isinstance(self.dataset, IterableDataset):
            leave_epoch(self.dataset, state["dataset"], is_ended)
            write_generators(self.owners, state.get("generators", {}))
        else:
            self.write_own(state)


class RestoringInit:
    """A ``worker_init_fn`` that calls the user's and then sets each worker to a saved state.

    Args:
        worker_init_fn: The user's, or None.
        states: The state of each worker that has one.
        collate_fn: Function that makes the batches.
    """

    def __init__(
        self,
        worker_init_fn: Callable[[int], None] | None,
        states: Mapping[int, Mapping[str, object]],
        collate_fn: object,
    ) -> None:
        self.worker_init_fn: Callable[[int], None] | None = worker_init_fn
        self.states: Mapping[int, Mapping[str, Any]] = states
        self.collate_fn: object = collate_fn

    def __call__(self, worker_id: int) -> None:
        """Set up the worker that this is called in."""
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)
        state = self.states.get(worker_id)
        info = get_worker_info()
        if state is None or info is None:
            return
        worker = WorkerState(info.dataset, self.collate_fn)
        ended, num_ended = bool(state.get("ended")), state.get("num_ended", 0)
        if ended or (state.get("left") and not num_ended):
            # It gives no batch in this epoch (see `Workers.release`), or has given none yet.
            worker.write_left(state, ended)
        else:
            worker.write_own(state)
        ProcessRng().write(state.get("globals", {}))
        for _ in range(num_ended):
            # It came to its end without a batch, and may have drawn numbers meanwhile.
            deque(cast("IterableDataset[object]", info.dataset), maxlen=0)
