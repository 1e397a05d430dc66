"""levin and Lightning beside bare DistributedDataParallel, in the same processes.

    python benchmarks/ddp.py [--quick] [--sizes 2 4 8]

Two questions. How much slower is a real step on two processes? And what does levin add to a step in microseconds, on a model so
small that hardly anything else is left, with 2, 4 and 8 processes? The contestants run in turn, in the same processes, one thread
each. A figure is the CPU time that a whole fit takes on rank 0, less what the same fit takes with few steps, divided by the steps
between: on a machine with fewer cores than processes, the clock on the wall measures who waits for a core. Printed are medians,
and the median of the ratios within each turn with its quartiles.
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
NAMES = ("bare", "levin", "lightning")


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


def bare_fit(case: str, num_batches: int) -> Callable[[], None]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    net, data = CASES[case][0](), loader(case, num_batches)

    def fit() -> None:
        wrapped = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-4)
        wrapped.train()
        for batch in data:
            loss = wrapped(batch[0]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return fit


def framework_fit(lib: Any, case: str, num_batches: int, size: int) -> Callable[[], None]:
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
    model, data = Model(), loader(case, num_batches)
    return lambda: trainer.fit(model, data)


def timed(fit: Callable[[], None]) -> float:
    import torch.distributed as dist

    gc.collect()
    gc.disable()
    dist.barrier()
    start = time.process_time()
    fit()
    spent = time.process_time() - start
    gc.enable()
    return spent


def rank_main(rank: int, size: int, port: int, case: str, steps: int, turns: int, pipe: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(size),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
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
    libs = {"levin": levin, "lightning": lightning}
    few = max(2, steps // 20)

    def fit_of(name: str, count: int) -> Callable[[], None]:
        # The environment is put back, as either framework removes parts of it after a run.
        os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
        return bare_fit(case, count) if name == "bare" else framework_fit(libs[name], case, count, size)

    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(turns + 1):
        for name in NAMES if turn % 2 else reversed(NAMES):
            spent = (timed(fit_of(name, steps)) - timed(fit_of(name, few))) / (steps - few)
            if turn:  # the first turn warms up
                times[name].append(spent)
    if rank == 0:
        pipe.send(json.dumps(times))
    dist.barrier()
    os._exit(0)


def measure(size: int, case: str, steps: int, turns: int) -> dict[str, list[float]]:
    context: Any = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=rank_main, args=(r, size, port, case, steps, turns, writer)) for r in range(size)]
    for process in ranks:
        process.start()
    writer.close()
    try:
        times: dict[str, list[float]] = json.loads(reader.recv())
    except EOFError:
        raise SystemExit("a process of the benchmark failed") from None
    finally:
        for process in ranks:
            process.join(60)
            process.kill()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and turns; writes no file")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2, 4, 8], help="numbers of processes for the tiny model"
    )
    options = parser.parse_args()
    rows = [
        ("wide", 2, 20 if options.quick else 40),
        *(("tiny", size, 200 if options.quick else 400) for size in options.sizes),
    ]
    turns = 3 if options.quick else 7
    lines = [
        "| model | processes | bare DDP | levin adds | levin | quartiles | Lightning adds | Lightning |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    failed = False
    for case, size, steps in rows:
        times = measure(size, case, steps, turns)
        bare = statistics.median(times["bare"])
        cells = [case, str(size), f"{bare * 1e6:.0f} us"]
        for name in NAMES[1:]:
            ratios = sorted(a / b for a, b in zip(times[name], times["bare"]))
            adds = statistics.median(a - b for a, b in zip(times[name], times["bare"]))
            cells += [f"{adds * 1e6:+.0f} us", f"x{statistics.median(ratios):.3f}"]
            if name == "levin":
                cells.append(f"{ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}")
                failed = failed or (case == "wide" and statistics.median(ratios) > BUDGET)
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if not options.quick:
        import lightning
        import torch

        versions = f"torch {torch.__version__}, Lightning {lightning.__version__}, Python {platform.python_version()}"
        text = f"# Several processes\n\n{os.cpu_count()} cores, one thread per process, Gloo; CPU time of rank 0 per step. {versions}. Method: `ddp.py`.\n\n"
        (HERE / "ddp.md").write_text(text + "\n".join(lines) + "\n\n" + NOTES)
    print(f"Budget for the wide model: x{BUDGET}: {'MISSED' if failed else 'holds'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
