"""levin and Lightning beside bare DistributedDataParallel, in the same processes.

    python benchmarks/ddp.py [--quick] [--sizes 2 4 8]

Two questions. How much slower is a real step on two processes? And what does levin add to a step in microseconds, on a model so
small that hardly anything else is left, with 2, 4 and 8 processes? In each process a step of a bare loop and one of a framework are
made in turn, one thread each, and each pair is compared: by the clock on the wall, and by the processor time of rank 0, which
on a machine with fewer cores than processes leaves out who waits for a core. Printed are medians over all pairs but the first tenth,
and the quartiles of the ratios. What is cheap but rare (an exchange a few times a second) is in few of the pairs, so that the medians
leave it out; the means of the processor time, in the last columns, do not.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BUDGET = 1.03


def tiny() -> Any:
    from torch import nn

    return nn.Linear(32, 2)


def wide() -> Any:
    """About 3.2 million parameters: a step is matrix products and an exchange of 13 MB of gradients."""
    from torch import nn

    return nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 10))


NOTES = """## With thousands of processes

What levin adds to a step is, by construction, work of one process: it calls the strategy's step, the hooks that exist, and counts.
Nothing of it asks how many processes there are. The rows with 4 and 8 processes on 2 cores show more all the same: processes that
take turns on a core lose their caches, and the exchanges below cost a larger part of a second in which fewer steps are done. More
than 8 processes were not measured; what is said about thousands follows from the design.

Two things do talk to other processes, neither of them per step. A few times a second the ranks exchange four numbers (has anybody
been told to stop, to end, has a save failed, what time is it), one small all-gather over the CPU: with 2000 processes 64 kB for
each of them. And a thread writes about once a second where its process is into the store of the process group, some 200 bytes; from
1000 processes on it does so more seldom, so that the store never sees more than about 1000 writes a second.
"""
# So many batches are fetched ahead of a loader whose length cannot be relied on: single steps cannot be told apart.
BLOCK = 8
CASES = {"tiny": (tiny, 32, 4), "wide": (wide, 512, 64)}


def loader(case: str, num_batches: int) -> Any:
    """Return batches for one rank: data in memory, no sampler of torch's own for ranks."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    _, width, batch_size = CASES[case]
    rows = torch.randn(batch_size * 8, width)
    return DataLoader(
        TensorDataset(rows.repeat(-(-num_batches // 8), 1)[: num_batches * batch_size]), batch_size=batch_size
    )


class Pairs:
    """A loader that makes a step of the bare loop before each batch that it hands out, and times both.

    Args:
        batches: What it hands out.
        bare_step: A step of the bare loop.
        meet: Waits for the other ranks, before each look at the clock. Ranks end a step some milliseconds apart; without it the
            program that makes them meet at its end, as levin's exchange does, pays for that wait in both programs.
    """

    def __init__(
        self, batches: list[Any], bare_step: Callable[[Any], None], meet: Callable[[], object] | None = None
    ) -> None:
        self.batches, self.bare_step = batches, bare_step
        self.meet = meet or (lambda: None)
        self.clocks: list[tuple[tuple[float, float], ...]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            start = self.look()
            self.bare_step(batch)
            middle = self.look()
            yield batch
            self.clocks.append((start, middle, self.look()))

    def look(self) -> tuple[float, float]:
        self.meet()
        return time.perf_counter(), time.process_time()

    def times(self) -> list[list[float]]:
        """Return for each block of pairs: wall time of a bare step and of the framework's, processor time of both."""
        pairs = [[b[0] - a[0], c[0] - b[0], b[1] - a[1], c[1] - b[1]] for a, b, c in self.clocks]
        blocks = [pairs[first : first + BLOCK] for first in range(BLOCK, len(pairs) - BLOCK + 1, BLOCK)]
        return [[sum(column) / BLOCK for column in zip(*block)] for block in blocks]


def bare_step_for(case: str) -> Callable[[Any], None]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(CASES[case][0]())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-4)

    def step(batch: Any) -> None:
        loss = wrapped(batch[0]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def fit(lib: Any, case: str, size: int, data: Pairs) -> None:
    import torch

    class Model(lib.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = CASES[case][0]()

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    trainer = lib.Trainer(
        accelerator="cpu", devices=size, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    gc.collect()
    gc.disable()
    trainer.fit(Model(), data)
    gc.enable()


def set_ranks(rank: int, size: int) -> None:
    """Say who this process is; either framework removes parts of it after a run."""
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))


def begin(rank: int, size: int, port: int) -> dict[str, Any]:
    """Connect a process with the others, make it quiet, and return the frameworks."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    set_ranks(rank, size)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import lightning.pytorch as lightning
    import torch
    import torch.distributed as dist

    import levin

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(minutes=10))
    return {"levin": levin, "lightning": lightning}


def rank_main(rank: int, size: int, port: int, case: str, steps: int, turns: int, pipe: Any) -> None:
    import torch.distributed as dist

    libs = begin(rank, size, port)
    times: dict[str, list[list[float]]] = {name: [] for name in libs}
    batches = list(loader(case, steps))
    for _ in range(turns):
        for name, lib in libs.items():
            set_ranks(rank, size)
            # In a tiny step an exchange is rare, and a meeting would be the larger part.
            pairs = Pairs(batches, bare_step_for(case), dist.barrier if case == "wide" else None)
            fit(lib, case, size, pairs)
            times[name] += pairs.times()
    if rank == 0:
        pipe.send(json.dumps(times))
    dist.barrier()
    os._exit(0)


def columns(pairs: list[list[float]]) -> dict[str, list[float]]:
    return {
        "bare": [wall for wall, _, _, _ in pairs],
        "ratio": [other / wall for wall, other, _, _ in pairs],
        "adds": [other - spent for _, _, spent, other in pairs],
    }


def measure(size: int, function: Callable[..., None], *arguments: Any) -> Any:
    """Return what ``function(rank, size, port, *arguments, pipe)`` sends through the pipe as JSON from one of its processes."""
    context: Any = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=function, args=(r, size, port, *arguments, writer)) for r in range(size)]
    for process in ranks:
        process.start()
    writer.close()
    try:
        return json.loads(reader.recv())
    except EOFError:
        raise SystemExit("a process of the benchmark failed") from None
    finally:
        for process in ranks:
            process.join(60)
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and turns; writes no file")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2, 4, 8], help="numbers of processes for the tiny model"
    )
    options = parser.parse_args()
    rows = [
        ("wide", 2, 40 if options.quick else 150),
        *(("tiny", size, (400 if options.quick else 2400) // size) for size in options.sizes),
    ]
    turns = 2 if options.quick else 3
    lines = [
        "| model | processes | bare DDP | levin | quartiles | Lightning | levin adds | Lightning adds | and in the mean |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    failed = False
    for case, size, steps in rows:
        found = {name: columns(pairs) for name, pairs in measure(size, rank_main, case, steps, turns).items()}
        ours, theirs = found["levin"], found["lightning"]
        low, ratio, high = statistics.quantiles(ours["ratio"], n=4)
        failed = failed or (case == "wide" and ratio > BUDGET)
        cells = [
            case, str(size), f"{statistics.median(ours['bare']) * 1e6:.0f} us", f"x{ratio:.3f}", f"{low:.3f} to {high:.3f}",
            f"x{statistics.median(theirs['ratio']):.3f}", f"{statistics.median(ours['adds']) * 1e6:+.0f} us",
            f"{statistics.median(theirs['adds']) * 1e6:+.0f} us",
            f"{statistics.mean(ours['adds']) * 1e6:+.0f} us, {statistics.mean(theirs['adds']) * 1e6:+.0f} us",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if not options.quick:
        import lightning
        import torch

        versions = f"torch {torch.__version__}, Lightning {lightning.__version__}, Python {platform.python_version()}"
        text = f"# Several processes\n\n{os.cpu_count()} cores, one thread per process, Gloo; ratios of the time of a step, what is added in processor time of rank 0. {versions}. Method: `ddp.py`.\n\n"
        (HERE / "ddp.md").write_text(text + "\n".join(lines) + "\n\n" + NOTES)
    print(f"Budget for the wide model: x{BUDGET}: {'MISSED' if failed else 'holds'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
