"""A loop of plain PyTorch, and the same loop with Fabric: five lines are others, marked `# 1` to `# 5`.

    python examples/fabric/five_lines.py
    python examples/fabric/five_lines.py --devices 2 --precision bf16-mixed

On one device in single precision both give the same weights, bit for bit. With Fabric the same script runs on a GPU, on
several of them, or in another precision.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from levin import Fabric


def make_parts() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    return model, torch.optim.AdamW(model.parameters(), lr=2e-3), DataLoader(data, batch_size=64, shuffle=True)


def bare(epochs: int) -> nn.Module:
    model, optimizer, loader = make_parts()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
    return model


def with_fabric(epochs: int, fabric: Fabric) -> nn.Module:
    fabric.launch()  # 1 (and `fabric = Fabric(...)` above it)
    model, optimizer, loader = make_parts()
    model, optimizer = fabric.setup(model, optimizer)  # 2
    loader = fabric.setup_dataloaders(loader)  # 3
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            fabric.backward(loss)  # 4
            optimizer.step()
    fabric.save("digits.ckpt", {"model": model, "optimizer": optimizer, "loader": loader})  # 5
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", default="1")
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=options.devices, precision=options.precision)
    ours = with_fabric(options.epochs, fabric).state_dict()
    if fabric.world_size == 1:
        theirs = bare(options.epochs).state_dict()
        largest = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
        print(f"largest difference of a weight to the bare loop: {largest}")
    fabric.print("done")


if __name__ == "__main__":
    main()
