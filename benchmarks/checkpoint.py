"""What saving a checkpoint costs the training loop: levin and Lightning, blocking and in the background.

A small model is trained whose buffers make up the size of the state. Every so often a checkpoint is saved, and training
goes on until the file is complete. The loop is held up by the time that the call takes, and by the time that the steps
take longer than as many steps just before the save. Printed are the first save, which finds no memory to copy to yet,
and the median of the others. Files lie in a temporary folder and are removed.

On a machine whose processors share memory and whose disk is served by the same hardware, training is also slower while
any other program writes to the disk. How much that is shows a row in which `dd` writes as many bytes and the loop does
nothing: no way of saving costs less, and the last column leaves it out.

Training has one thread, so that on a machine with two idle processors the writer has one of its own. The column of
processor time says what the save costs where it has none: that of the training thread beyond its usual steps, and that
of all other threads of the process.

    python benchmarks/checkpoint.py [--large] [--quick] [--folder FOLDER]

On a machine that others use, run it in a group of processes that comes before theirs (Linux, as root):

    setsid sh -c 'echo -20 > /proc/self/autogroup; exec python benchmarks/checkpoint.py --large'
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).parent
BUFFER_BYTES = 4 * 2**20
NUM_USUAL_STEPS = 60
NUM_STEPS_AFTER = 5
OTHER_PROGRAM = "nobody saves; dd writes as much"


def module_for(framework: Any, num_bytes: int) -> Any:
    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(384, 384)
            for number, start in enumerate(range(0, num_bytes, BUFFER_BYTES)):
                size = min(BUFFER_BYTES, num_bytes - start)
                self.register_buffer(f"state_{number}", torch.rand(size // 4))

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    return Model()


def clocks() -> tuple[float, float, float]:
    """Return the time, and the processor time of this thread and of the process."""
    return time.perf_counter(), time.thread_time(), time.process_time()


def saver_for(framework: Any, write: Callable[[Any, Path], None], folder: Path, num_saves: int) -> Any:
    """A callback that saves, watches the steps and notes by how much the loop is held up."""

    class Saver(framework.Callback):
        def __init__(self) -> None:
            self.usual: list[tuple[float, float]] = []
            self.steps: list[tuple[float, float]] = []
            self.num_usual = NUM_USUAL_STEPS
            self.results: list[dict[str, float]] = []
            self.path: Path | None = None
            self.num_complete = 0
            self.before = clocks()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            now = clocks()
            step = (now[0] - self.before[0], now[1] - self.before[1])
            self.before = now
            if self.path is None:
                self.usual.append(step)
                if len(self.usual) > self.num_usual:
                    self.save(trainer)
                return
            self.steps.append(step)
            if self.num_complete == 0 and self.path.exists():
                self.written_s = now[0] - self.began[0]
            self.num_complete += self.path.exists()
            if self.num_complete > NUM_STEPS_AFTER:
                self.finish(trainer)

        def save(self, trainer) -> None:
            self.path = folder / f"{len(self.results)}.ckpt"
            self.steps, self.num_complete, self.written_s = [], 0, 0.0
            self.began = clocks()
            write(trainer, self.path)
            self.before = clocks()
            self.call_s, self.call_cpu_s = self.before[0] - self.began[0], self.before[1] - self.began[1]

        def finish(self, trainer) -> None:
            end = clocks()
            # The first step after a save finds cold caches, and belongs to that save; here it is left out.
            usual = self.usual[1:]
            wall_s, cpu_s = (statistics.mean(times) * len(self.steps) for times in zip(*usual, strict=True))
            training_s = sum(cpu for _, cpu in self.steps) - cpu_s + self.call_cpu_s
            others_s = (end[2] - self.began[2]) - (end[1] - self.began[1])
            self.results.append({
                "call": self.call_s,
                "slower": sum(wall for wall, _ in self.steps) - wall_s,
                "written": self.written_s,
                "training": training_s,
                "others": others_s,
            })  # fmt: skip
            self.path.unlink()
            self.num_usual = max(NUM_USUAL_STEPS, len(self.steps))
            self.path, self.usual = None, []
            trainer.should_stop = len(self.results) >= num_saves
            self.before = clocks()

    return Saver()


def save(trainer: Any, path: Path) -> None:
    trainer.save_checkpoint(str(path))


class OtherProgram:
    """Writes a file of some size past the page cache when it is told to, and renames it; it is started before."""

    def __init__(self, num_bytes: int) -> None:
        count = -(-num_bytes // BUFFER_BYTES)
        self.command = f'read -r path || exit; dd if=/dev/zero of="$path.tmp" bs={BUFFER_BYTES} count={count} oflag=direct conv=fsync'
        self.command += ' 2>/dev/null; mv "$path.tmp" "$path"'
        self.started = self.start()

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(["sh", "-c", self.command], stdin=subprocess.PIPE, text=True, bufsize=1)

    def __call__(self, trainer: Any, path: Path) -> None:
        print(path, file=self.started.stdin)
        self.started = self.start()


def measure(
    framework: Any, plugin: Any, num_bytes: int, num_saves: int, folder: Path, write: Callable[[Any, Path], None] = save
) -> list[dict[str, float]]:
    saver = saver_for(framework, write, folder, num_saves)
    trainer = framework.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saver], plugins=[plugin] if plugin is not None else None,
        default_root_dir=str(folder),
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.randn(100 * 256, 384)), batch_size=256)
    trainer.fit(module_for(framework, num_bytes), data)
    gc.collect()
    return saver.results


def contestants() -> list[tuple[str, Any, Any]]:
    import lightning.pytorch
    import lightning.pytorch.plugins

    import levin
    from levin.checkpoint import AsyncCheckpointIO

    theirs = f"Lightning {lightning.pytorch.__version__}"
    return [
        ("levin, blocking", levin, lambda: None),
        ("levin, background", levin, AsyncCheckpointIO),
        (OTHER_PROGRAM, levin, lambda: None),
        (f"{theirs}, blocking", lightning.pytorch, lambda: None),
        (f"{theirs}, background", lightning.pytorch, lightning.pytorch.plugins.AsyncCheckpointIO),
    ]


def median(results: list[dict[str, float]], *keys: str) -> float:
    return statistics.median(sum(result[key] for key in keys) for result in results)


def rows_for(num_bytes: int, num_saves: int, folder: Path) -> list[str]:
    names, measured = [], []
    for name, framework, make_plugin in contestants():
        write = OtherProgram(num_bytes) if name == OTHER_PROGRAM else save
        names.append(name)
        measured.append(measure(framework, make_plugin(), num_bytes, num_saves, folder, write))
    disk_s = max(0.0, median(measured[names.index(OTHER_PROGRAM)][1:], "call", "slower"))
    rows, blocking_s = [], {}
    for name, results in zip(names, measured, strict=True):
        first, others = results[:1], results[1:]
        held_up_s = median(others, "call", "slower")
        owner = name.split(",")[0]
        blocking_s.setdefault(owner, held_up_s)
        times = (
            median(first, "call", "slower"), held_up_s, median(others, "call"), median(others, "slower"),
            median(others, "written"), median(others, "training"), median(others, "others"),
        )  # fmt: skip
        cells = [f"{num_bytes / 1e6:.0f} MB", name, *(f"{1e3 * seconds:.1f}" for seconds in times)]
        if name == OTHER_PROGRAM:
            cells += ["", ""]
        elif name.endswith("blocking"):
            cells += ["1", ""]
        else:
            cells += [f"{(held_up_s - left_out_s) / blocking_s[owner]:.3f}" for left_out_s in (0.0, disk_s)]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def group() -> str:
    """Say whether this process comes before others."""
    try:
        text = Path("/proc/self/autogroup").read_text().split()[-1]
    except OSError:
        return ""
    return f" (group of processes with nice {text})" if text != "0" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="also 2 GB")
    parser.add_argument("--quick", action="store_true", help="10 MB and few saves; writes no file")
    parser.add_argument("--folder", help="where the temporary folder is made")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "levin"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    header = [
        "| state | who | first save held up training, ms | others, median, ms | of which the call | and slower steps "
        "| file complete after, ms | processor time of training, ms | and of other threads | share of the blocking save "
        "| without what the disk costs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(header), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="levin-bench-", dir=options.folder))
    sizes = [10 * 10**6] if options.quick else [10 * 10**6, 500 * 10**6, *([2 * 10**9] if options.large else [])]
    try:
        rows = [
            row
            for num_bytes in sizes
            for row in rows_for(num_bytes, 3 if options.quick else 5 if num_bytes > 10**9 else 31, folder)
        ]
    finally:
        shutil.rmtree(folder)
    if not options.quick:
        text = f"""# What saving a checkpoint costs the training loop

{os.cpu_count()} CPUs, one thread of training{group()}, Python {platform.python_version()}, torch {torch.__version__}; times in milliseconds.
levin syncs each file to the disk before it takes its name, blocking or not; Lightning leaves that to the system.
Made by `python benchmarks/checkpoint.py`, which says what is measured.

"""
        (HERE / "checkpoint.md").write_text(text + "\n".join([*header, *rows]) + "\n")


if __name__ == "__main__":
    main()
