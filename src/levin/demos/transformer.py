"""A language model with PyTorch's Transformer, and words to train it on."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from levin.module import LightningModule
from levin.utilities.rank_zero import rank_zero_info

FILE = "wikitext-2.txt"


class PositionalEncoding(nn.Module):
    """Adds sines and cosines of the position to the features.

    Args:
        dim: Number of features, even.
        dropout: Share of features that are dropped.
        max_len: Longest sequence.
    """

    def __init__(self, dim: int, dropout: float = 0.1, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        self.dim: int = dim
        self.max_len: int = max_len

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of shape (batch, length, dim) with the code of each position added."""
        # Made anew, and no buffer, so that a module on the meta device needs no special care.
        position = torch.arange(x.size(1), device=x.device).unsqueeze(1)
        rate = torch.exp(torch.arange(0, self.dim, 2, device=x.device) * (-math.log(10000.0) / self.dim))
        code = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1).flatten(1)
        encoded: Tensor = self.dropout(x + code)
        return encoded


class Transformer(nn.Module):
    """Encoder and decoder between an embedding and a layer over the words.

    Args:
        vocab_size: Number of words.
        ninp: Features of a word.
        nhead: Heads of attention.
        nhid: Features between the two layers of a block.
        nlayers: Blocks of the encoder, and of the decoder.
        dropout: Share of features that are dropped.
    """

    def __init__(
        self,
        vocab_size: int = 33278,
        ninp: int = 200,
        nhead: int = 2,
        nhid: int = 200,
        nlayers: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        self.embedding = nn.Embedding(vocab_size, ninp)
        self.transformer = nn.Transformer(
            d_model=ninp,
            nhead=nhead,
            num_encoder_layers=nlayers,
            num_decoder_layers=nlayers,
            dim_feedforward=nhid,
            dropout=dropout,
            batch_first=True,
        )
        self.decoder = nn.Linear(ninp, vocab_size)
        self.ninp: int = ninp
        self.vocab_size: int = vocab_size
        self.src_mask: Tensor | None = None

    def generate_square_subsequent_mask(self, size: int) -> Tensor:
        """Return the mask of shape (size, size) that hides what comes later."""
        return nn.Transformer.generate_square_subsequent_mask(size)

    def forward(self, inputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logarithms of the probabilities of the words, shape (batch * length, vocab_size)."""
        if mask is None:
            mask = self.generate_square_subsequent_mask(inputs.size(1)).to(inputs.device)
        source = self.pos_encoder(self.embedding(inputs) * math.sqrt(self.ninp))
        wanted = self.pos_encoder(self.embedding(target) * math.sqrt(self.ninp))
        output = self.transformer(source, wanted, tgt_mask=mask)
        return torch.log_softmax(self.decoder(output), dim=-1).view(-1, self.vocab_size)


class Dictionary:
    """Numbers the words that it is shown."""

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}

    def add_word(self, word: str) -> int:
        """Return the number of ``word``, a new one for a new word."""
        return self.word2idx.setdefault(word, len(self.word2idx))

    @property
    def idx2word(self) -> list[str]:
        """The words in the order of their numbers."""
        return list(self.word2idx)

    def __len__(self) -> int:
        return len(self.word2idx)


def tokenize(path: Path) -> tuple[Tensor, Dictionary]:
    """Return the words of a file as numbers, with ``<eos>`` at the end of each line, and the dictionary."""
    dictionary = Dictionary()
    lines = path.read_text(encoding="utf8").splitlines()
    numbers = [dictionary.add_word(word) for line in lines for word in [*line.split(), "<eos>"]]
    return torch.tensor(numbers, dtype=torch.int64), dictionary


class WikiText2(Dataset[tuple[Tensor, Tensor]]):
    """Blocks of words and the same blocks one word later.

    Args:
        data_dir: Folder of the text, ``wikitext-2.txt``.
        block_size: Words in a block.
        download: Whether to write a made-up text where there is none; nothing is fetched from the network.

    Raises:
        FileNotFoundError: There is no text and ``download`` is False.
    """

    def __init__(self, data_dir: Path = Path("./data"), block_size: int = 35, download: bool = True) -> None:
        self.path: Path = Path(data_dir) / FILE
        if download:
            self.download(self.path)
        self.data, self.dictionary = tokenize(self.path)
        self.block_size: int = block_size

    @property
    def vocab_size(self) -> int:
        """Number of different words."""
        return len(self.dictionary)

    def __len__(self) -> int:
        return len(self.data) // self.block_size - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block_size
        end = start + self.block_size
        return self.data[start:end], self.data[start + 1 : end + 1]

    @staticmethod
    def download(destination: Path) -> None:
        """Write a text of made-up words, the same every time, if the file is not there."""
        if destination.is_file():
            return
        rank_zero_info(f"{destination} is made up. Put the text of WikiText-2 there to train on real language.")
        draw = random.Random(0)
        words = ["".join(draw.choices("aeiolnrst", k=draw.randint(2, 7))) for _ in range(500)]
        lines = [" ".join(draw.choices(words, k=draw.randint(5, 20))) for _ in range(2000)]
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_text("\n".join(lines) + "\n", encoding="utf8")


class LightningTransformer(LightningModule):
    """Trains a :class:`Transformer` to say the next word.

    Args:
        vocab_size: Number of words.
    """

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=vocab_size)

    @override
    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        output: Tensor = self.model(inputs, target)
        return output

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        return nn.functional.nll_loss(self(inputs, target), target.view(-1))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    @override
    def prepare_data(self) -> None:
        WikiText2(download=True)

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(WikiText2())
