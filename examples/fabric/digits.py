"""Reads handwritten digits with a loop of one's own; the run can be killed at any moment and goes on where it was.

    python examples/fabric/digits.py                                        on one process
    python examples/fabric/digits.py --devices 2                            on two
    levin launch --nproc-per-node 2 --max-restarts 3 examples/fabric/digits.py --devices 2

Started again, it goes on from `runs/fabric/digits.ckpt`: with the very next batch, and with weights that equal those of a run
that was never ended, bit for bit. SIGTERM saves once more before the process leaves.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from levin import Fabric


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def make_data() -> tuple[TensorDataset, TensorDataset]:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:-360], order[-360:]
    targets = torch.tensor(labels)
    return TensorDataset(images[train], targets[train]), TensorDataset(images[test], targets[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--save-every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--path", type=Path, default=Path("runs/fabric/digits.ckpt"))
    options = parser.parse_args()

    strategy = "ddp" if options.devices > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=options.devices, strategy=strategy, precision=options.precision)
    fabric.launch()
    fabric.seed_everything(0)
    train, test = make_data()
    model = make_model()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    loader = fabric.setup_dataloaders(DataLoader(train, batch_size=32 // fabric.world_size, shuffle=True))
    test_loader = fabric.setup_dataloaders(DataLoader(test, batch_size=360))

    state = {"model": model, "optimizer": optimizer, "loader": loader, "epoch": 0, "step": 0}
    if options.path.exists():
        fabric.load(options.path, state)
        fabric.print(f"goes on at epoch {state['epoch']}, step {state['step']}")

    for epoch in range(state["epoch"], options.epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            state["step"] += 1
            is_told_to_end = fabric.received_sigterm
            if is_told_to_end or state["step"] % options.save_every == 0:
                fabric.save(options.path, state)
            if is_told_to_end:
                sys.exit(143)
        state["epoch"] = epoch + 1
        model.eval()
        with torch.no_grad():
            correct = sum((model(images).argmax(1) == labels).float().mean() for images, labels in test_loader)
        fabric.print(f"epoch {epoch}: accuracy {float(fabric.all_reduce(correct)):.3f}")
    fabric.save(options.path.with_name("final.ckpt"), {"model": model})


if __name__ == "__main__":
    main()
