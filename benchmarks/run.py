"""levin, the bare PyTorch loop and Lightning side by side, in one process and on one thread.

Each case trains the same model on the same batches; the bare loop does the same training (zero_grad, forward, backward,
step) and logs nothing. Figures are CPU time.

Steps are measured in pairs: the framework's loader runs a step of the bare loop before it hands out each batch, and the
framework's step is what passes from there to the next batch. The two are next to each other in time, so that what else
the machine does falls on both. A bare loop beside itself measures x1.00. Printed is the median of the ratios of all pairs
with its quartiles.

Other cases are run in turn, several times; a run's figure is the time of the whole call divided by its steps (or epochs),
less what the same call costs with one step, so that set-up does not count.

Peak memory is that of the whole process, with an allocator that gives freed memory back, so that it is what is in use.

    python benchmarks/run.py [--quick] [--only NAME]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).parent
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def module_for(framework: Any, make_net: Callable[[], nn.Module], log: str) -> Any:
    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, batch_idx):
            loss = self.net(batch[0]).sum()
            if log == "step":
                for name in ("a", "b", "c"):
                    self.log(name, loss)
            elif log == "epoch":
                self.log("a", loss, on_step=True, on_epoch=True, prog_bar=True)
                self.log("b", loss, on_step=True, on_epoch=True)
                self.log("c", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("v", self.net(batch[0]).sum())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    return Model()


def tiny() -> nn.Module:
    return nn.Linear(32, 2)


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 14 * 14, 10))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Linear(32, 64), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)
    )


def loader(num_batches: int, shape: tuple[int, ...] = (32,), batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(num_batches * batch_size, *shape)), batch_size=batch_size)


def bare_fit(net: nn.Module, train: Any, epochs: int = 1, val: Any = None) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    for _ in range(epochs):
        net.train()
        for batch in train:
            loss = net(batch[0]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if val is not None:
            bare_validate(net, val)


def bare_validate(net: nn.Module, val: Any) -> None:
    net.eval()
    with torch.no_grad():
        for batch in val:
            net(batch[0]).sum()


def cpu_time(call: Callable[[], Any]) -> float:
    gc.collect()
    gc.disable()
    start = time.process_time()
    with open(os.devnull, "w") as null:
        out, err = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = null
        try:
            call()
        finally:
            sys.stdout, sys.stderr = out, err
    spent = time.process_time() - start
    gc.enable()
    return spent


class Case:
    """One row: what each contestant runs for ``n`` steps, and the budget for levin's ratio to the bare loop."""

    def __init__(self, name: str, budget: float, count: int, bare: Any, framework: Any) -> None:
        self.name, self.budget, self.count, self.bare, self.framework = name, budget, count, bare, framework

    def measure(self, frameworks: dict[str, Any], turns: int) -> dict[str, Any]:
        times: dict[str, list[float]] = {name: [] for name in ("bare", *frameworks)}
        for turn in range(turns + 1):
            for name in times:

                def run(count: int, name: str = name) -> float:
                    call = self.bare(count) if name == "bare" else self.framework(frameworks[name], count)
                    return cpu_time(call)

                spent = (run(self.count) - run(1)) / (self.count - 1)
                if turn:  # the first turn warms up
                    times[name].append(spent)
        row: dict[str, Any] = {"name": self.name, "budget": self.budget, "bare": statistics.median(times["bare"]) * 1e6}
        for name in frameworks:
            ratios = sorted(a / b for a, b in zip(times[name], times["bare"]))
            row[name] = statistics.median(ratios)
            row[f"{name}_quartiles"] = (ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4])
        return row


class Interleaved:
    """A loader that runs a step of the bare loop before each batch that it hands out, and times both sides."""

    def __init__(self, batches: list[Any], bare_step: Callable[[Any], None]) -> None:
        self.batches, self.bare_step = batches, bare_step
        self.bare: list[float] = []
        self.framework: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            start = time.thread_time()
            self.bare_step(batch)
            middle = time.thread_time()
            yield batch
            self.bare.append(middle - start)
            self.framework.append(time.thread_time() - middle)


class PairedCase:
    """One row about a step: a bare step and a framework's step in turn."""

    def __init__(
        self,
        name: str,
        budget: float,
        count: int,
        net: Callable[[], nn.Module] = tiny,
        data: Callable[[int], Any] = loader,
        log: str = "",
        run: Callable[[Any, PairedCase, Interleaved], None] | None = None,
        only: str = "",
    ) -> None:
        self.name, self.budget, self.count = name, budget, count
        self.net, self.data, self.log = net, data, log
        self.run = run or with_trainer
        self.only = only  # the one framework that has what this row measures

    def measure(self, frameworks: dict[str, Any], turns: int) -> dict[str, Any]:
        batches = list(self.data(self.count))
        if self.only:
            frameworks = {self.only: frameworks[self.only]}
        ratios: dict[str, list[float]] = {name: [] for name in frameworks}
        bare: list[float] = []
        for _ in range(max(1, turns // 3)):
            for name, lib in frameworks.items():
                net = self.net()
                optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

                def bare_step(batch: Any, net: nn.Module = net, optimizer: Any = optimizer) -> None:
                    loss = net(batch[0]).sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

                pairs = Interleaved(batches, bare_step)
                self.run(lib, self, pairs)
                warm = len(batches) // 10
                bare += pairs.bare[warm:]
                ratios[name] += [ours / theirs for ours, theirs in zip(pairs.framework[warm:], pairs.bare[warm:])]
        row: dict[str, Any] = {"name": self.name, "budget": self.budget, "bare": statistics.median(bare) * 1e6}
        for name, values in ratios.items():
            row[name] = statistics.median(values)
            row[f"{name}_quartiles"] = tuple(statistics.quantiles(values, n=4)[::2])
        return row


def with_trainer(framework: Any, case: PairedCase, pairs: Interleaved) -> None:
    runner = trainer(framework, max_epochs=1)
    cpu_time(lambda: runner.fit(module_for(framework, case.net, case.log), pairs))


def with_hook(framework: Any, case: PairedCase, pairs: Interleaved) -> None:
    class Hook(framework.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            pass

    runner = trainer(framework, max_epochs=1, callbacks=[Hook()])
    cpu_time(lambda: runner.fit(module_for(framework, case.net, case.log), pairs))


def compiled(framework: Any, case: PairedCase, pairs: Interleaved) -> None:
    runner = trainer(framework, max_epochs=1, compile=True)
    cpu_time(lambda: runner.fit(module_for(framework, case.net, case.log), pairs))


def with_fabric(framework: Any, case: PairedCase, pairs: Interleaved) -> None:
    is_levin = framework.__name__ == "levin"
    fabric = importlib.import_module("levin" if is_levin else "lightning.fabric").Fabric(accelerator="cpu", devices=1)
    wrappers = importlib.import_module("levin.fabric.wrappers" if is_levin else "lightning.fabric.wrappers")
    # What `setup_dataloaders` makes; it takes torch's loaders only, whose own time would count.
    loader_of: Any = wrappers.FabricDataLoader if is_levin else wrappers._FabricDataLoader
    net = case.net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1e-4))

    def loop() -> None:
        for batch in loader_of(pairs, fabric.device):
            loss = model(batch[0]).sum()
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()

    cpu_time(loop)


def trainer(framework: Any, **settings: Any) -> Any:
    return framework.Trainer(accelerator="cpu", devices=1, **{**QUIET, **settings})


def extras_case(name: str, budget: float, count: int) -> Case:
    def bare(n: int) -> Any:
        model, train = tiny(), loader(n)
        return lambda: bare_fit(model, train)

    def framework(lib: Any, n: int) -> Any:
        callbacks = [
            lib.callbacks.LearningRateMonitor(logging_interval="step"),
            lib.callbacks.EarlyStopping("a_epoch", patience=100),
            lib.callbacks.Timer(duration={"days": 1}),
        ]
        extras = {
            **dict.fromkeys(QUIET, True), "enable_model_summary": False, "default_root_dir": tempfile.mkdtemp(),
            "callbacks": callbacks,
        }  # fmt: skip
        model, train, runner = module_for(lib, tiny, "epoch"), loader(n), trainer(lib, max_epochs=1, **extras)
        return lambda: runner.fit(model, train)

    return Case(name, budget, count, bare, framework)


def validation_case(count: int) -> Case:
    def bare(n: int) -> Any:
        model, val = tiny(), loader(n)
        return lambda: bare_validate(model, val)

    def framework(lib: Any, n: int) -> Any:
        model, val, runner = module_for(lib, tiny, ""), loader(n), trainer(lib)
        return lambda: runner.validate(model, val, verbose=False)

    return Case("validation step, one value logged", 2.0, count, bare, framework)


def epoch_case(count: int) -> Case:
    def bare(n: int) -> Any:
        model, train, val = tiny(), loader(4), loader(4)
        return lambda: bare_fit(model, train, n, val)

    def framework(lib: Any, n: int) -> Any:
        model, train, val = module_for(lib, tiny, ""), loader(4), loader(4)
        runner = trainer(lib, max_epochs=n, num_sanity_val_steps=0)
        return lambda: runner.fit(model, train, val)

    return Case("one epoch of 4 batches with validation", 1.4, count, bare, framework)


def cases(quick: bool) -> list[Case | PairedCase]:
    n = 300 if quick else 800
    return [
        PairedCase("tiny linear step, nothing logged", 1.08, n),
        PairedCase("tiny linear step, an epoch hook in a callback", 1.08, n, run=with_hook),
        PairedCase("tiny linear step, compiled", 0.8, n, run=compiled, only="levin"),
        PairedCase("+ three self.log, on_step", 1.18, n, log="step"),
        PairedCase("+ three self.log with on_epoch and progress bar value", 1.22, n, log="epoch"),
        PairedCase("tiny linear step under Fabric", 1.03, n, run=with_fabric),
        extras_case("+ TensorBoard, progress bar, checkpointing, three callbacks", 1.35, n),
        validation_case(n),
        epoch_case(30 if quick else 100),
        PairedCase(
            "small convolutional net", 1.01, 40 if quick else 150, convolutions, lambda k: loader(k, (1, 28, 28), 32)
        ),
        PairedCase("small transformer", 1.01, 40 if quick else 150, transformer, lambda k: loader(k, (32, 32), 16)),
    ]


def import_seconds(name: str, turns: int) -> float:
    """Return what importing the framework and the two classes that everybody uses takes, compiled before."""
    # What torch has made is looked through before, as in `cpu_time`.
    code = (
        f"import gc, torch, time; gc.collect(); t = time.process_time(); from {name} import Trainer, LightningModule; "
        "print(time.process_time() - t)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:

        def run() -> float:
            command = [sys.executable, "-W", "ignore", "-X", f"pycache_prefix={folder}", "-c", code]
            return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

        run()
        return statistics.median(run() for _ in range(turns))


def peak_mib(contestant: str) -> float:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import run; run.memory({contestant!r})"
    # glibc keeps freed memory for later, by how much depends on chance.
    calm = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **calm},
    )
    return float(done.stdout.split()[-1])


def memory(contestant: str) -> None:
    """Train a wide net and print the peak memory of the process, in MiB."""
    import resource

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    lib = None if contestant == "bare" else importlib.import_module(contestant)

    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))

    train = loader(30, (1024,), 512)
    if lib is None:
        bare_fit(wide(), train)
    else:
        trainer(lib, max_epochs=1).fit(module_for(lib, wide, ""), train)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and turns")
    parser.add_argument("--only", default="", help="part of the name of the rows to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import lightning.pytorch as lightning

    import levin

    logging.disable(logging.WARNING)
    frameworks = {"levin": levin, "lightning": lightning}
    lines = [
        "| case | bare | levin | quartiles | budget | | Lightning |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    failed = 0

    def add(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    for case in cases(options.quick):
        if options.only not in case.name:
            continue
        row = case.measure(frameworks, 3 if options.quick else 9)
        low, high = row["levin_quartiles"]
        theirs = f"x{row['lightning']:.2f}" if "lightning" in row else ""
        holds = row["levin"] <= row["budget"]
        failed += not holds
        add(
            f"| {row['name']} | {row['bare']:.0f} us | x{row['levin']:.3f} | {low:.2f} to {high:.2f} | x{row['budget']:.2f} | "
            f"{'holds' if holds else 'MISSED'} | {theirs} |"
        )
    if options.only in "import of Trainer beyond torch":
        ours, theirs = (import_seconds(name, 3 if options.quick else 5) for name in ("levin", "lightning.pytorch"))
        failed += ours > 0.15
        add(
            f"| import of Trainer beyond torch | | +{ours:.3f} s | | +0.15 s | {'holds' if ours <= 0.15 else 'MISSED'} | +{theirs:.2f} s |"
        )
    if options.only in "peak memory":
        bare, ours, theirs = (
            statistics.median(peak_mib(name) for _ in range(3)) for name in ("bare", "levin", "lightning.pytorch")
        )
        holds = ours <= bare * 1.05
        failed += not holds
        add(
            f"| peak memory of a wide net | {bare:.0f} MiB | x{ours / bare:.3f} | | x1.05 | {'holds' if holds else 'MISSED'} | x{theirs / bare:.2f} |"
        )
    if not options.only and not options.quick:
        versions = f"torch {torch.__version__}, Lightning {lightning.__version__}, levin {levin.__version__}, Python {platform.python_version()}"
        text = f"# Results\n\n{processor()}, {os.cpu_count()} cores, one thread. {versions}. Method: `run.py`.\n\n"
        (HERE / "results.md").write_text(text + "\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
