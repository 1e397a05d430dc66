"""What it costs a data-loader worker to leave its random states after each batch, and what a checkpoint grows by.

    python benchmarks/worker_states.py

Processor time of this process, median of rounds; a worker does the same for every batch that it makes.
"""

from __future__ import annotations

import io
import pickle
import random
import statistics
import time

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from levin.resume.position import Position
from levin.resume.worker_state import WorkerState, WorkerStateLog


class Augmented(Dataset):
    """Draws from all three generators for each sample, and has one of its own."""

    def __init__(self) -> None:
        self.rng = numpy.random.default_rng(0)

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(16) + random.random() + numpy.random.rand() + self.rng.random()  # noqa: NPY002  (users draw from it)


def per_batch_us(draws: bool, num_rounds: int = 30, num_batches: int = 50) -> float:
    data = Augmented()
    state, ledger = WorkerState(data, None), WorkerStateLog(1, 8)
    rounds = []
    for _ in range(num_rounds):
        spent = 0.0
        for index in range(num_batches):
            if draws:
                data[index]
            begun = time.process_time()
            ledger.write(0, pickle.dumps(state.read(), pickle.HIGHEST_PROTOCOL))
            spent += time.process_time() - begun
        rounds.append(spent / num_batches * 1e6)
    return statistics.median(rounds)


def bytes_in_checkpoint(num_workers: int) -> int:
    position = Position()
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=num_workers)
    batches = position.iterate(loader)
    for _ in range(4):
        next(batches)
    buffer = io.BytesIO()
    torch.save(position.state_dict(), buffer)
    batches.close()
    return buffer.tell()


def main() -> None:
    print(f"per batch, in the worker, all generators drawn from: {per_batch_us(True):.0f} us")
    print(f"per batch, in the worker, none drawn from:           {per_batch_us(False):.0f} us")
    for num_workers in (0, 1, 2, 4):
        print(f"in a checkpoint, {num_workers} workers: {bytes_in_checkpoint(num_workers) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
