"""levin and Lightning beside bare PyTorch on a transformer that two processes share: DDP, FSDP2 and tensor parallel.

    python benchmarks/sharded.py [--quick]

Steps, saves and loads: in each process one of the bare program and one of a framework are made in turn, and each block of
steps is compared by the clock on the wall, a step being done when it is done on both ranks; printed are medians, and the
quartiles of the ratios of steps. A save is whole and on the disk when it counts as done: the bare program, too, syncs its
files. Memory: each program trains alone in fresh processes; printed is what rank 0 needed at most beyond what it had with
everything imported. Lightning has FSDP2 in programs that call ``fully_shard`` themselves.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import pkgutil
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddp import Pairs, begin, measure, set_ranks

HERE = Path(__file__).parent
BUDGET = 1.03
HOW = """The processes meet before each look at the clock, so that no program pays for the wait that another has left behind; what levin
imports on first use is there before memory is measured."""
SIZE = 2
KINDS = ("ddp", "fsdp", "tp")
WIDTH, DEPTH, LENGTH, BATCH = 256, 4, 64, 4


def make() -> Any:
    """About 3.2 million parameters in four blocks, with names for a plan of tensor parallelism."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = (
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.Linear(4 * WIDTH, WIDTH),
            )
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Any) -> Any:
            x = x + nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
            return x + self.down(torch.relu(self.up(self.norm(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

        def forward(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(1)
    return Net()


def shard(net: Any, kind: str, mesh: Any = None) -> Any:
    """Cut a network by hand, as one does without a framework."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    if kind == "ddp":
        return DistributedDataParallel(net)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "tp":
        parallelize_module(net, mesh, {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()})
        return net
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def adam(parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=1e-4)


class Bare:
    """The program without a framework."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.net = shard(make(), kind)
        self.optimizer = adam(self.net.parameters())

    def step(self, batch: Any) -> None:
        loss = self.net(batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def save(self, path: Path) -> None:
        import torch
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        if self.kind != "ddp":
            dcp.save(self._state(), storage_writer=dcp.FileSystemWriter(path, sync_files=True))
        elif dist.get_rank() == 0:
            with path.open("wb") as file:
                torch.save({"model": self.net.module.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
                os.fsync(file.fileno())
        dist.barrier()

    def load(self, path: Path) -> None:
        import torch
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        if self.kind == "ddp":
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.net.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            return
        state = self._state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.net, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def strategy_for(name: str, lib: Any, kind: str) -> Any:
    if kind == "ddp":
        return "ddp"
    kinds = lib.strategies
    if kind == "fsdp" and name == "levin":
        return kinds.FSDPStrategy(state_dict_type="sharded")
    sizes = (SIZE, 1) if kind == "fsdp" else (1, SIZE)
    plan = {"net.blocks.*.up": "column", "net.blocks.*.down": "row"}
    return kinds.ModelParallelStrategy(*sizes, **({"plan": plan} if name == "levin" else {}))


def fit(name: str, lib: Any, kind: str, data: Any, at_end: Callable[[Any], None] | None = None) -> None:
    class Model(lib.LightningModule):
        def configure_model(self) -> None:
            if hasattr(self, "net"):
                return
            self.net = make()
            if name == "lightning" and kind != "ddp":
                dimension = "data_parallel" if kind == "fsdp" else "tensor_parallel"
                shard(self.net, kind, self.device_mesh[dimension])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return adam(self.parameters())

        def on_train_end(self) -> None:
            if at_end is not None:
                at_end(self.trainer)

    trainer = lib.Trainer(
        accelerator="cpu", devices=SIZE, strategy=strategy_for(name, lib, kind), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    gc.collect()
    trainer.fit(Model(), data)


def batches(count: int) -> list[Any]:
    import torch

    return list(torch.randn(count, BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2)))


def load_into(trainer: Any, path: Path) -> None:
    """Load weights and optimizer states, by the names that both frameworks have for it."""
    found = trainer.strategy.load_checkpoint(path)
    if "state_dict" in found:
        trainer.strategy.load_model_state_dict(found)
    if "optimizer_states" in found:
        trainer.strategy.load_optimizer_state_dict(found)


def time_pairs(rank: int, size: int, port: int, kind: str, steps: int, turns: int, saves: int, pipe: Any) -> None:
    import torch.distributed as dist

    libs = begin(rank, size, port)
    times: dict[str, dict[str, list[Any]]] = {name: {"step": [], "save": [], "load": []} for name in libs}
    shared: list[Any] = [tempfile.mkdtemp(dir=HERE) if rank == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])

    def timed(function: Callable[[Path], Any], path: Path) -> float:
        dist.barrier()
        start = time.perf_counter()
        function(path)
        dist.barrier()
        return time.perf_counter() - start

    for _ in range(turns):
        for name, lib in libs.items():
            set_ranks(rank, size)
            bare = Bare(kind)
            pairs = Pairs(batches(steps), bare.step, dist.barrier)

            def save_and_load(trainer: Any, name: str = name, bare: Bare = bare) -> None:
                for _ in range(saves):
                    paths = (folder / "bare", folder / "framework")
                    times[name]["save"].append([timed(bare.save, paths[0]), timed(trainer.save_checkpoint, paths[1])])
                    times[name]["load"].append(
                        [timed(bare.load, paths[0]), timed(lambda path: load_into(trainer, path), paths[1])]
                    )
                    for path in paths if rank == 0 else ():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

            fit(name, lib, kind, pairs, save_and_load)
            times[name]["step"] += [pair[:2] for pair in pairs.times()]
    if rank == 0:
        shutil.rmtree(folder)
        pipe.send(json.dumps(times))
    dist.barrier()
    os._exit(0)


def peak_memory(rank: int, size: int, port: int, kind: str, name: str, pipe: Any) -> None:
    import resource

    import torch.distributed as dist
    from torch.utils.data import DataLoader

    libs = begin(rank, size, port)
    data: Any = DataLoader(batches(6), batch_size=None)
    shard(make(), kind)  # imports what the program does
    for module in pkgutil.walk_packages(libs["levin"].__path__, "levin."):  # Lightning has imported all of its own
        with suppress(ImportError):
            importlib.import_module(module.name)
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    if name == "bare":
        bare = Bare(kind)
        for batch in data:
            bare.step(batch)
    else:
        fit(name, libs[name], kind, data)
    if rank == 0:
        pipe.send(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))
    dist.barrier()
    os._exit(0)


def row(kind: str, name: str, times: dict[str, Any], memory: dict[str, int]) -> tuple[float, str]:
    """Return the ratio of steps, and a line of the table."""
    ratios = [other / bare for bare, other in times["step"]]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    cells = [kind, name, f"{statistics.median(bare for bare, _ in times['step']) * 1e3:.1f} ms", f"x{ratio:.3f}"]
    cells.append(f"{low:.3f} to {high:.3f}")
    for what in ("save", "load"):
        middles = [statistics.median(column) * 1e3 for column in zip(*times[what], strict=True)]
        cells.append(f"{middles[0]:.0f} ms, {middles[1]:.0f} ms")
    cells.append(f"{memory['bare'] / 2**20:.0f} MiB, {memory[name] / 2**20:.0f} MiB")
    return ratio, f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and turns; writes no file")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    steps, turns, saves = (40, 1, 2) if options.quick else (48, 2, 3)
    lines = [
        "| | | bare step | step | quartiles | save: bare, this | load: bare, this | memory: bare, this |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    missed = False
    for kind in options.kinds:
        times = measure(SIZE, time_pairs, kind, steps, turns, saves)
        memory = {name: measure(SIZE, peak_memory, kind, name) for name in ("bare", *times)}
        for name in times:
            ratio, line = row(kind, name, times[name], memory)
            missed = missed or (name == "levin" and ratio > BUDGET)
            lines.append(line)
            print(line, flush=True)
    if not options.quick:
        import lightning
        import torch

        versions = f"torch {torch.__version__}, Lightning {lightning.__version__}, Python {platform.python_version()}"
        text = f"# Sharded models\n\nA transformer on {SIZE} processes, {os.cpu_count()} cores, one thread per process, Gloo. {versions}. Method: `sharded.py`.\n\n{HOW}\n\n"
        (HERE / "sharded.md").write_text(text + "\n".join(lines) + "\n")
    print(f"Budget for levin's step: x{BUDGET}: {'MISSED' if missed else 'holds'}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
