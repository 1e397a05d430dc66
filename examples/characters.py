"""Learns to write Python, one character at a time: a small transformer trained on the standard library's source.

The text is the Python standard library found on this machine, so nothing is downloaded. Run it with

    python examples/characters.py

It takes a minute or two on two CPU cores. After each validation it prints what the model writes by then, and at the end
it compares the loss with that of a bigram table, which guesses each character from the one before it.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.syntax import Syntax
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

import levin
from levin.callbacks import Callback
from levin.loggers import CSVLogger

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # other characters are left out of the text
CODE = {character: index for index, character in enumerate(ALPHABET)}


def encode(text: str) -> Tensor:
    """Returns the characters' numbers, shape `(length,)`."""
    return torch.tensor([CODE[character] for character in text if character in CODE])


def decode(codes: Tensor) -> str:
    """Returns the text again."""
    return "".join(ALPHABET[code] for code in codes.tolist())


class Windows(Dataset[Tensor]):
    """Every stretch of `length + 1` characters in a text, beginning at multiples of `stride`.

    The extra character makes inputs (all but the last) and targets (all but the first) out of one stretch.
    """

    def __init__(self, codes: Tensor, length: int, stride: int = 1) -> None:
        self.codes, self.length, self.stride = codes, length, stride

    def __len__(self) -> int:
        return (len(self.codes) - self.length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.stride
        return self.codes[start : start + self.length + 1]


class StandardLibrary(levin.LightningDataModule):
    """The top-level modules of the standard library, every tenth file kept for validation."""

    def __init__(
        self, length: int = 96, batch_size: int = 32, num_steps: int = 600, num_val_windows: int = 256
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
        # Whole files are held back: neighbouring windows of one file would share names with the training text.
        self.train = encode("".join(text for index, text in enumerate(texts) if index % 10))
        held_back = encode("".join(texts[::10]))
        # The validation windows lie side by side and are spread over all held-back files.
        stride = max(self.hparams.length, len(held_back) // self.hparams.num_val_windows)
        self.val = Windows(held_back, self.hparams.length, stride)

    def train_dataloader(self) -> DataLoader:
        # There are millions of overlapping windows: an epoch is as many random ones as we have time for.
        windows = Windows(self.train, self.hparams.length)
        num_samples = self.hparams.num_steps * self.hparams.batch_size
        sampler = RandomSampler(windows, replacement=True, num_samples=num_samples)
        return DataLoader(windows, batch_size=self.hparams.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=64)


class Block(nn.Module):
    """Attention over the characters so far, then a small network at each position; both are added to the stream."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        # (batch, length, dim) -> three times (batch, heads, length, dim / heads)
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharacterTransformer(levin.LightningModule):
    """A GPT in miniature."""

    def __init__(
        self,
        length: int = 96,
        dim: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        dropout: float = 0.0,
        learning_rate: float = 3e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.characters = nn.Embedding(len(ALPHABET), dim)
        self.positions = nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, dropout) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, len(ALPHABET), bias=False)
        # Small first embeddings, shared with the output: both map between characters and the same space.
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.characters.weight

    def forward(self, codes: Tensor) -> Tensor:
        """Returns the scores of the next character at every position, shape `(batch, length, characters)`."""
        x = self.characters(codes) + self.positions.weight[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, windows: Tensor) -> Tensor:
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.1)
        num_steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:  # a short warm-up, then half a cosine
            return min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * min(1, step / num_steps)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        # A scheduler is stepped once an epoch unless told otherwise; a transformer's wants every step.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def write(self, prompt: str, num_characters: int, temperature: float = 0.8) -> str:
        """Continues the prompt, drawing each next character from the model's own guess."""
        codes = encode(prompt).to(self.device)[None]
        for _ in range(num_characters):
            scores = self(codes[:, -self.hparams.length :])[0, -1]
            drawn = torch.multinomial((scores / temperature).softmax(dim=0), 1)
            codes = torch.cat([codes, drawn[None]], dim=1)
        return decode(codes[0])


class PrintSample(Callback):
    """Shows what the model writes so far. A callback keeps this out of the model, which need not know of it."""

    def __init__(self, prompt: str = "def ", num_characters: int = 160) -> None:
        self.prompt, self.num_characters = prompt, num_characters

    def on_validation_end(self, trainer: levin.Trainer, pl_module: CharacterTransformer) -> None:
        if not trainer.sanity_checking:
            title = f"--- step {trainer.global_step}, validation loss {trainer.callback_metrics['val_loss']:.3f} ---"
            # `pl_module.print` goes through the progress bar, which stays whole, and prints on one process only.
            pl_module.print(f"\n{title}\n{pl_module.write(self.prompt, self.num_characters)}\n")


def bigram_loss(train: Tensor, windows: Windows) -> float:
    """Returns the loss of a table of how often each character follows each other one, on the same windows."""
    num = len(ALPHABET)
    counts = torch.bincount(train[:-1] * num + train[1:], minlength=num * num).view(num, num) + 1.0
    log_probs = (counts / counts.sum(dim=1, keepdim=True)).log()
    rows = torch.stack([windows[index] for index in range(len(windows))])
    return -log_probs[rows[:, :-1], rows[:, 1:]].mean().item()


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Trains and writes; returns the transformer's and the bigram table's loss in nats per character."""
    parser = argparse.ArgumentParser(description="Trains a small character transformer on the standard library.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run folder goes (default: runs)")
    args = parser.parse_args(argv)

    levin.seed_everything(args.seed)
    data = StandardLibrary(num_steps=args.num_steps)
    model = CharacterTransformer(dim=args.dim, num_layers=args.num_layers)
    trainer = levin.Trainer(
        max_epochs=1,
        val_check_interval=0.25,  # four times in the one epoch
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=CSVLogger(args.out, name="characters"),
        callbacks=[PrintSample()],
    )
    trainer.fit(model, datamodule=data)
    (result,) = trainer.validate(model, datamodule=data, verbose=False)
    loss, baseline = result["val_loss"], bigram_loss(data.train, data.val)

    console = Console(highlight=False)
    model.eval()
    for prompt in ("class ", "    def __init__(self", "import "):
        console.rule()
        console.print(Syntax(model.write(prompt, 240), "python", background_color="default"))
    console.rule()
    for name, value in (
        ("every character equally likely", math.log(len(ALPHABET))),
        ("bigram table", baseline),
        ("transformer", loss),
    ):
        console.print(f"{name:<32}{value:.3f} nats per character, as unsure as among {math.exp(value):.1f}")
    return loss, baseline


if __name__ == "__main__":
    main()
