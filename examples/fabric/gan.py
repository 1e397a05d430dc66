"""A GAN on handwritten digits: two modules with an optimizer each, stepped in turn.

python examples/fabric/gan.py
python examples/fabric/gan.py --devices 2
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from levin import Fabric

LATENT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=options.devices, strategy="ddp" if options.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0)
    pixels, _ = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 8 - 1  # 17 grey levels -> -1 to 1
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True))

    generator = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())
    critic = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    generator, generator_optimizer = fabric.setup(generator, torch.optim.Adam(generator.parameters(), lr=1e-3))
    critic, critic_optimizer = fabric.setup(critic, torch.optim.Adam(critic.parameters(), lr=1e-3))
    torch.manual_seed(1 + fabric.global_rank)  # every process draws noise of its own

    for epoch in range(options.epochs):
        for (real,) in loader:
            noise = torch.randn(len(real), LATENT, device=fabric.device)
            # The critic learns to tell real images from those of the generator.
            both = critic(torch.cat([real, generator(noise).detach()]))
            is_real = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]).to(both)
            critic_loss = F.binary_cross_entropy_with_logits(both, is_real)
            critic_optimizer.zero_grad()
            fabric.backward(critic_loss)
            critic_optimizer.step()
            # The generator learns to pass for real.
            judged = critic(generator(noise))
            generator_loss = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
            generator_optimizer.zero_grad()
            fabric.backward(generator_loss)
            norm = fabric.clip_gradients(generator, generator_optimizer, max_norm=10.0)
            generator_optimizer.step()
        losses = fabric.all_reduce({"critic": critic_loss.detach(), "generator": generator_loss.detach()})
        values = ", ".join(f"{name} {float(loss):.3f}" for name, loss in losses.items())
        fabric.print(f"epoch {epoch}: {values}, norm {float(norm):.3f}")
    fabric.save("gan.ckpt", {"generator": generator, "critic": critic})


if __name__ == "__main__":
    main()
