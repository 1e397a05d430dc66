"""levin, the bare PyTorch loop and Lightning on one CUDA device, in one process, in turn.

Each part trains the same model on the same batches with each of them. A step is timed from its own start to that of a
later step, with the device's work done at both ends, so that whatever runs ahead or behind is in it; set-up is not.
Printed is the median over the rounds, and that of the ratio to the bare loop of the same round.

    tiny     a linear layer: what a step costs the host
    gpt      a transformer of 124 million parameters: bfloat16, fused attention and optimizer
    images   batches of 100 MB from pinned memory: is the copy hidden behind the step
    large    a transformer of a billion parameters with activation checkpointing: tokens per second and share of the peak;
             also with its blocks compiled, and with products in 8-bit floats where torchao is installed

    python benchmarks/gpu.py [--only PART ...] [--quick] [--dry-run] [--out DIR]

``--dry-run`` runs everything once on the CPU, on toy sizes, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

FRAMEWORKS = {"levin": ["levin"], "Lightning": ["lightning.pytorch", "pytorch_lightning"]}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, dense


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model whose output layer is its embedding; returns the loss of predicting each next token."""

    def __init__(self, vocabulary: int, length: int, dim: int, depth: int, num_heads: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.tokens, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        x = self.tokens(inputs) + self.places.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Tiny(nn.Linear):
    """A step that costs the device next to nothing."""

    def __init__(self) -> None:
        super().__init__(32, 2)

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(batch).sum()


class Images(nn.Module):
    """A few convolutions over large pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 8, stride=8), nn.GELU(),
            *[part for _ in range(4) for part in (nn.Conv2d(width, width, 3, padding=1), nn.GELU())],
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000),
        )  # fmt: skip

    def forward(self, batch: Tensor) -> Tensor:
        return functional.log_softmax(self.net(batch).float(), -1)[:, 0].mean().neg()


@dataclass(frozen=True)
class Part:
    """What is trained, on what, for how long.

    Args:
        name: What ``--only`` calls it.
        title: What the table calls it.
        make_net: Returns the model; called on the device.
        make_batch: Returns one batch in host memory.
        warmup: Steps before the clock starts.
        steps: Steps that are timed.
        rounds: How often each contestant runs.
        budget_s: No further round is begun after this time.
        precision: That of the Trainer; the bare loop does the same by torch's autocast.
        num_logged: Values that ``self.log`` gets in each step.
        num_batches: Different batches, taken in turn.
        tokens: Tokens of a step, for tokens per second.
        depth_dim: Blocks and width of a transformer, to count the operations of its attention.
        modes: Of ``torch.compile``, in which it is run as well.
        formats: Precisions in which it is run as well with its blocks compiled.
    """

    name: str
    title: str
    make_net: Callable[[], nn.Module]
    make_batch: Callable[[], Tensor]
    warmup: int
    steps: int
    rounds: int = 5
    budget_s: float = 60.0
    precision: str = "32-true"
    num_logged: int = 0
    num_batches: int = 4
    tokens: int = 0
    depth_dim: tuple[int, int] = (0, 0)
    modes: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


def parts(is_toy: bool) -> list[Part]:
    """Return all parts in full size, or small enough for a processor."""

    def tokens(vocabulary: int, batch_size: int, length: int) -> Tensor:
        return torch.randint(vocabulary, (batch_size, length + 1))

    gpt = dict(vocabulary=50304, length=1024, dim=768, depth=12, num_heads=12, recompute=False)
    large = {**gpt, "dim": 2048, "depth": 18, "num_heads": 16, "recompute": True}
    sizes, side, width, pictures = (16, 8), 224, 256, 175
    if is_toy:
        gpt = dict(vocabulary=64, length=16, dim=16, depth=2, num_heads=2, recompute=False)
        large = {**gpt, "recompute": True}
        sizes, side, width, pictures = (2, 2), 16, 4, 2

    def transformer(name: str, title: str, shape: dict[str, Any], batch_size: int, **settings: Any) -> Part:
        return Part(
            name, title, lambda: GPT(**shape), lambda: tokens(shape["vocabulary"], batch_size, shape["length"]),
            precision="bf16-mixed", tokens=batch_size * shape["length"], depth_dim=(shape["depth"], shape["dim"]),
            **settings,
        )  # fmt: skip

    found = [
        Part("tiny", "tiny linear model, nothing logged", Tiny, lambda: torch.randn(4, 32), 50, 1000, budget_s=25, modes=("default", "reduce-overhead")),
        Part("tiny", "tiny linear model, three self.log", Tiny, lambda: torch.randn(4, 32), 50, 1000, budget_s=25, num_logged=3),
        transformer("gpt", "transformer of 124M", gpt, sizes[0], warmup=5, steps=25, num_logged=1, modes=("default",)),
        Part(
            "images", "batches of 105 MB from pinned memory", lambda: Images(width),
            lambda: torch.randn(pictures, 3, side, side), 5, 40, precision="bf16-mixed", budget_s=40, num_logged=1,
        ),
        transformer("large", "transformer of 1B, activation checkpointing", large, sizes[1], warmup=2, steps=8, rounds=3, budget_s=90, num_logged=1, formats=("bf16-mixed", "float8")),
    ]  # fmt: skip
    if is_toy:  # one compilation is enough to see that it works
        return [
            replace(part, warmup=1, steps=2, rounds=1, modes=part.modes[:1] if part.name == "tiny" else (), formats=())
            for part in found
        ]
    return found


class Clock:
    """Times the steps from number ``first`` to number ``last``; a step calls it with its number at its start."""

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        self.start_s = self.end_s = 0.0

    def __call__(self, index: int) -> None:
        if index == self.first:
            self.start_s = self._now_s()
        elif index == self.last:
            self.end_s = self._now_s()

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return (self.end_s - self.start_s) / (self.last - self.first)


class Batches:
    """Ready batches in host memory, in turn, ``num`` in all; ``clock`` is called with the number of each before it is given."""

    def __init__(self, batches: list[Tensor], num: int, clock: Callable[[int], None] = lambda index: None) -> None:
        self.batches, self.num, self.clock = batches, num, clock

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.num):
            self.clock(i)
            yield self.batches[i % len(self.batches)]


def make_optimizer(net: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of all contestants."""
    return torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device.type == "cuda")


def forward_context(precision: str, device: torch.device) -> Any:
    """Return what the bare loop runs its forward passes in."""
    if precision == "32-true":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def run_bare(
    part: Part, batches: Batches, clock: Clock, device: torch.device, mode: str = "", with_blocks: bool = False
) -> None:
    """Train as people write it by hand, with ``torch.compile`` in a ``mode`` if one is given, or of the blocks alone."""
    with device:
        net = part.make_net()
    if part.precision == "float8":
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(net)
    optimizer = make_optimizer(net, device)
    if mode or with_blocks:
        torch._dynamo.reset()
    if mode:
        net.compile(mode=mode)
    elif with_blocks:
        for block in net.blocks:
            block.compile()
    for index, batch in enumerate(batches):
        clock(index)
        batch = batch.to(device, non_blocking=True)
        with forward_context(part.precision, device):
            loss = net(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def run_ahead(part: Part, batches: Batches, clock: Clock, device: torch.device) -> None:
    """Train as people write it by hand who move the next batch on a stream of its own."""
    with device:
        net = part.make_net()
    optimizer = make_optimizer(net, device)
    copies = torch.cuda.Stream(device)
    iterator = iter(batches)

    def fetch() -> Optional[Tensor]:
        batch = next(iterator, None)
        with torch.cuda.stream(copies):
            return None if batch is None else batch.to(device, non_blocking=True)

    batch, index = fetch(), 0
    while batch is not None:
        clock(index)
        torch.cuda.current_stream(device).wait_stream(copies)
        batch.record_stream(torch.cuda.current_stream(device))
        following = fetch()
        with forward_context(part.precision, device):
            loss = net(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batch, index = following, index + 1


def run_framework(
    library: Any, part: Part, batches: Batches, clock: Clock, device: torch.device, **settings: Any
) -> None:
    """Train with a Trainer."""
    if settings:
        torch._dynamo.reset()

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            with device:
                self.net = part.make_net()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.net(batch)
            for name in "abcdef"[: part.num_logged]:
                self.log(name, loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.net, device)

    runner = library.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=1, precision=part.precision,
        **QUIET, **settings,
    )  # fmt: skip
    # Not in the step, where a compiler would find it.
    runner.fit(Module(), Batches(batches.batches, batches.num, clock))


def measure(part: Part, contestants: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the row of ``part``: seconds of a step of each, in each round, and what follows from them."""
    torch.manual_seed(0)
    batches = [part.make_batch() for _ in range(part.num_batches)]
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    runs: dict[str, Any] = {"bare": run_bare}
    if part.name == "images" and device.type == "cuda":
        runs["bare, copying ahead"] = run_ahead
    for name, library in contestants.items():
        runs[name] = lambda *args, library=library: run_framework(library, *args)
    for mode in part.modes:
        runs[f"bare, compiled ({mode})"] = lambda *args, mode=mode: run_bare(*args, mode=mode)
        library = contestants["levin"]
        runs[f"levin, compile={mode!r}"] = lambda *args, mode=mode: run_framework(library, *args, compile=mode)
    for name in part.formats if device.type == "cuda" else ():
        if name == "float8" and importlib.util.find_spec("torchao") is None:
            continue
        runs[f"bare, blocks compiled, {name}"] = lambda part, *args, name=name: run_bare(
            replace(part, precision=name), *args, with_blocks=True
        )
        runs[f"levin, compile='blocks', {name}"] = lambda part, *args, name=name: run_framework(
            contestants["levin"], replace(part, precision=name), *args, compile="blocks"
        )
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    begun_s = time.perf_counter()
    for turn in range(part.rounds):
        if turn and time.perf_counter() - begun_s > part.budget_s:
            break
        for name, run in runs.items():
            if name in failed:
                continue
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            clock = Clock(device, part.warmup, part.warmup + part.steps)
            try:
                run(part, Batches(batches, part.warmup + part.steps + 1), clock, device)
            except RuntimeError as error:
                # What others measured is not lost for it.
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            times[name].append(clock.step_s)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    times = {name: values for name, values in times.items() if name not in failed}
    row: dict[str, Any] = {"part": part.name, "title": part.title, "step_s": times, "peak_gib": peaks, "failed": failed}
    row["median_s"] = {name: statistics.median(values) for name, values in times.items()}
    row["ratio"] = {
        name: statistics.median(ours / bare for ours, bare in zip(values, times["bare"]))
        for name, values in times.items()
    }
    if part.name == "images":
        row["alone_s"] = copy_and_compute(part, batches, device)
    if part.tokens:
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in part.make_net().parameters())
        depth, dim = part.depth_dim
        length = batches[0].shape[1] - 1
        row["flops"] = (6 * num_parameters + 12 * depth * dim * length) * part.tokens
        row["tokens_per_s"] = {name: part.tokens / median for name, median in row["median_s"].items()}
        peak = next((p for card, p in PEAK_FLOPS.items() if card in card_name(device)), None)
        row["mfu"] = {name: row["flops"] / median / peak for name, median in row["median_s"].items()} if peak else {}
    return row


def copy_and_compute(part: Part, batches: list[Tensor], device: torch.device) -> dict[str, float]:
    """Return the seconds of a step's copy alone, and of its work alone on a batch that is there."""
    there = [batch.to(device) for batch in batches]
    result = {}
    clock = Clock(device, part.warmup, part.warmup + part.steps)
    for index in range(part.warmup + part.steps + 1):
        clock(index)
        there[index % len(there)].copy_(batches[index % len(batches)], non_blocking=True)
    result["copy"] = clock.step_s
    run_bare(part, Batches(there, part.warmup + part.steps + 1), clock, device)
    result["compute"] = clock.step_s
    return result


def card_name(device: torch.device) -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]], header: str) -> str:
    """Return the rows as Markdown."""
    lines = [
        "# Measured on a CUDA device", "", header, "",
        "| part | contestant | ms a step | against bare | tokens/s | MFU | peak GiB |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        for name, median in row["median_s"].items():
            tokens = f"{row['tokens_per_s'][name]:,.0f}" if "tokens_per_s" in row else ""
            mfu = f"{row['mfu'][name]:.1%}" if row.get("mfu") else ""
            peak = f"{row['peak_gib'][name]:.2f}" if row["peak_gib"] else ""
            lines.append(
                f"| {row['title']} | {name} | {median * 1e3:.3f} | x{row['ratio'][name]:.3f} | {tokens} | {mfu} | {peak} |"
            )
        lines += [f"| {row['title']} | {name} | failed: {reason} | | | | |" for name, reason in row["failed"].items()]
        for name, alone_s in row.get("alone_s", {}).items():
            lines.append(f"| {row['title']} | {name} alone | {alone_s * 1e3:.3f} | | | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts that were asked for, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["tiny", "gpt", "images", "large"], help="run these parts")
    parser.add_argument("--quick", action="store_true", help="two rounds of each but the tiny ones")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in toy sizes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", Path(__file__).parent)), help="folder")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; use --dry-run to try the script without one")
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    contestants = {}
    for name, modules in FRAMEWORKS.items():
        if found := next((module for module in modules if importlib.util.find_spec(module.split(".")[0])), None):
            contestants[name] = importlib.import_module(found)
    torch.set_float32_matmul_precision("high")
    header = f"{card_name(device)}, torch {torch.__version__}, Python {platform.python_version()}"
    rows = []
    for part in parts(options.dry_run):
        if options.only and part.name not in options.only:
            continue
        is_short = options.quick and part.name != "tiny"
        rows.append(measure(replace(part, rounds=2) if is_short else part, contestants, device))
        # After each part, so that what was measured is there whatever comes next.
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps({"machine": header, "rows": rows}, indent=1))
        (options.out / "gpu.md").write_text(table(rows, header))
    print(table(rows, header))


if __name__ == "__main__":
    main()
