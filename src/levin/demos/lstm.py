"""A language model with an LSTM that carries its state from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from typing_extensions import override

from levin.demos.transformer import WikiText2
from levin.module import LightningModule


class SimpleLSTM(nn.Module):
    """An LSTM between an embedding and a layer over the words.

    Args:
        vocab_size: Number of words.
        ninp: Features of a word.
        nhid: Features of the state.
        nlayers: Layers of the LSTM.
        dropout: Share of features that are dropped.
    """

    def __init__(
        self, vocab_size: int = 33278, ninp: int = 512, nhid: int = 512, nlayers: int = 4, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.vocab_size: int = vocab_size
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout, batch_first=True)
        self.decoder = nn.Linear(nhid, vocab_size)
        self.nlayers: int = nlayers
        self.nhid: int = nhid
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights of embedding and decoder between -0.1 and 0.1."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, input: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the logarithms of the probabilities of the words, and the state after them.

        Args:
            input: Words, shape (batch, length).
            hidden: The state before them.
        """
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        decoded = self.decoder(self.drop(output)).view(-1, self.vocab_size)
        return torch.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the state before the first word, two tensors of shape (nlayers, batch_size, nhid)."""
        weight = self.decoder.weight
        shape = (self.nlayers, batch_size, self.nhid)
        return weight.new_zeros(shape), weight.new_zeros(shape)


class SequenceSampler(Sampler[list[int]]):
    """Batches of places so that each row of a batch goes on where that row of the batch before ended.

    Args:
        dataset: The data.
        batch_size: Rows of a batch.

    Example:
        >>> list(SequenceSampler(range(6), batch_size=2))
        [[0, 3], [1, 4], [2, 5]]
    """

    def __init__(self, dataset: Sized, batch_size: int) -> None:
        super().__init__()
        self.dataset: Sized = dataset
        self.batch_size: int = batch_size
        self.chunk_size: int = len(dataset) // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for place in range(self.chunk_size):
            yield [row * self.chunk_size + place for row in range(self.batch_size)]

    def __len__(self) -> int:
        return self.chunk_size


class LightningLSTM(LightningModule):
    """Trains a :class:`SimpleLSTM` to say the next word.

    Args:
        vocab_size: Number of words.
    """

    def __init__(self, vocab_size: int = 33278) -> None:
        super().__init__()
        self.model = SimpleLSTM(vocab_size=vocab_size)
        self.hidden: tuple[Tensor, Tensor] | None = None

    @override
    def on_train_epoch_end(self) -> None:
        self.hidden = None

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        words, target = batch
        before = self.model.init_hidden(words.size(0)) if self.hidden is None else self.hidden
        output, (state, cell) = self.model(words, before)
        self.hidden = state.detach(), cell.detach()
        loss = nn.functional.nll_loss(output, target.view(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def prepare_data(self) -> None:
        WikiText2(download=True)

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        dataset = WikiText2()
        return DataLoader(dataset, batch_sampler=SequenceSampler(dataset, batch_size=20))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=20.0)
