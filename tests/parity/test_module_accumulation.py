"""Accumulation windows, whole, short and weighted; when schedulers step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from tests.parity import trace


def make_module(seen: trace.Trace, training_step: Any = None, **schedule: Any) -> Any:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).pow(2).mean()
            self.log("train", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val", self.layer(batch).pow(2).mean())

        def on_train_batch_start(self, batch, batch_idx):
            seen.note("rate", self.current_epoch, batch_idx, [group["lr"] for group in self.optimizers().param_groups])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            if not schedule:
                return optimizer
            kind = schedule.get("kind")
            made = (
                ReduceLROnPlateau(optimizer, patience=0, factor=0.5) if kind == "plateau" else StepLR(optimizer, 1, 0.9)
            )
            config = {key: value for key, value in schedule.items() if key != "kind"}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, **config}}

    if training_step is not None:
        Model.training_step = training_step
    return Model()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "interval", "frequency", "monitor"),
    [
        *((kind, interval, frequency, None) for kind, interval, frequency in itertools.product(["step"], ["step", "epoch"], [1, 2, 3])),
        *(("plateau", "epoch", frequency, monitor) for frequency, monitor in itertools.product([1, 2], ["train", "train_epoch", "val"])),
        *(("plateau", "step", frequency, "train_step") for frequency in (1, 2)),
        ("plateau", "step", 1, "val"),
    ],
)  # fmt: skip
def test_the_rate_of_every_batch(tmp_path, kind, interval, frequency, monitor, accumulate):
    def code(seen: trace.Trace) -> None:
        schedule = {"kind": kind, "interval": interval, "frequency": frequency, "strict": monitor != "val"}
        model = make_module(seen, **schedule, **({"monitor": monitor} if monitor else {}))
        trainer = seen.trainer(max_epochs=4, accumulate_grad_batches=accumulate, num_sanity_val_steps=0)
        seen.attempt(trainer.fit, model, trace.batches(6), trace.batches(1))
        seen.note(trainer.optimizers[0].param_groups[0]["lr"], trainer.global_step)

    trace.same(code, tmp_path)


def run(seen: trace.Trace, num_batches: int, accumulate: int, training_step: Any = None) -> None:
    model = make_module(seen, training_step)
    seen.trainer(max_epochs=1, accumulate_grad_batches=accumulate).fit(model, trace.batches(num_batches))
    seen.events.append([p.detach().clone() for p in model.parameters()])


@pytest.mark.parametrize(("num_batches", "accumulate"), [(4, 2), (6, 3), (4, 4)])
def test_whole_windows_are_the_same(tmp_path, num_batches, accumulate):
    theirs, ours = trace.on_both(lambda seen: run(seen, num_batches, accumulate), tmp_path)
    assert trace.plain(ours.events[-1]) == trace.plain(theirs.events[-1])


@pytest.mark.parametrize(("num_batches", "accumulate"), [(3, 2), (5, 4), (6, 4), (1, 2)])
def test_a_short_window_is_divided_by_what_it_holds(tmp_path, num_batches, accumulate):
    """Differs on purpose, row "last, short accumulation window": Lightning divides it by the whole N."""
    held = num_batches % accumulate
    start = num_batches - held

    def corrected(self, batch, batch_idx):
        loss = self.layer(batch).pow(2).mean()
        return loss * (accumulate / held) if batch_idx >= start else loss

    theirs, ours = trace.on_both(lambda seen: run(seen, num_batches, accumulate), tmp_path)
    assert trace.plain(ours.events[-1]) != trace.plain(theirs.events[-1])
    right = trace.run(lambda seen: run(seen, num_batches, accumulate, corrected), trace.both.lightning(), tmp_path)
    assert trace.plain(ours.events[-1]) == trace.plain(right.events[-1])


def test_a_window_is_averaged_by_weight(tmp_path):
    """Differs on purpose, same row: `{"loss": ..., "weight": n}` averages by n, which Lightning takes for an output."""
    weights = [1.0, 3.0]

    def weighted(self, batch, batch_idx):
        return {"loss": self.layer(batch).pow(2).mean(), "weight": weights[batch_idx]}

    def by_hand(self, batch, batch_idx):
        # Lightning divides each by 2.
        return self.layer(batch).pow(2).mean() * 2 * weights[batch_idx] / sum(weights)

    theirs, ours = trace.on_both(lambda seen: run(seen, 2, 2, weighted), tmp_path)
    right = trace.run(lambda seen: run(seen, 2, 2, by_hand), trace.both.lightning(), tmp_path)
    for mine, other in zip(ours.events[-1], right.events[-1]):
        torch.testing.assert_close(mine, other)
    assert not all(torch.equal(mine, other) for mine, other in zip(ours.events[-1], theirs.events[-1]))


def test_a_window_left_in_the_middle_of_an_epoch_is_dropped(tmp_path):
    def stopping(self, batch, batch_idx):
        if self.current_epoch == 0 and batch_idx == 1:
            raise StopIteration
        return self.layer(batch).pow(2).mean()

    def code(seen: trace.Trace) -> None:
        model = make_module(seen, stopping)
        trainer = seen.trainer(max_epochs=2, accumulate_grad_batches=2)
        trainer.fit(model, trace.batches(4))
        seen.note(trainer.global_step, *model.parameters())

    trace.same(code, tmp_path)


def test_a_step_that_ends_the_epoch_leaves_nothing_behind(tmp_path):
    def stopping(self, batch, batch_idx):
        if self.current_epoch == 0 and batch_idx == 1:
            raise StopIteration
        return self.layer(batch).pow(2).mean()

    def code(seen: trace.Trace) -> None:
        model = make_module(seen, stopping)
        trainer = seen.trainer(max_epochs=2)
        trainer.fit(model, trace.batches(2))
        seen.note(trainer.global_step, *model.parameters(), *(p.grad for p in model.parameters()))

    trace.same(code, tmp_path)


@pytest.mark.parametrize("start", ["here", "ddp_fork"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_whether_a_window_is_open_is_known_in_every_hook(tmp_path, accumulate, start):
    """Callbacks that average weights ask, and cellarium-ml when it saves."""

    def code(seen: trace.Trace) -> None:
        model = make_module(seen)
        asked: list[Any] = []

        def ask(name: str) -> None:
            fit = model.trainer.fit_loop
            assert fit.trainer is fit.epoch_loop.trainer is fit.epoch_loop.val_loop.trainer is model.trainer
            answers = {fit._should_accumulate(), fit.epoch_loop._should_accumulate()}
            asked.append((name, answers, fit.epoch_loop.val_loop.num_dataloaders))

        for name in (
            "on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end",
            "on_validation_start", "on_train_epoch_end",
        ):  # fmt: skip
            setattr(model, name, lambda *args, name=name: ask(name))
        model.on_fit_end = lambda: (tmp_path / seen.framework.name).write_text(repr(asked))
        where = {} if start == "here" else {"strategy": start}
        trainer = seen.trainer(max_epochs=2, accumulate_grad_batches=accumulate, num_sanity_val_steps=0, **where)
        trainer.fit(model, trace.batches(5), trace.batches(1))

    trace.on_both(code, tmp_path)
    theirs, ours = ((tmp_path / name).read_text() for name in ("lightning", "levin"))
    assert ours == theirs
    assert ("True" in ours) == (accumulate > 1)
