"""A step that is not finite changes nothing, and its evidence repeats it."""

from __future__ import annotations

import math
import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.callbacks import BadStepError, BadStepGuard, replay_bad_step

BAD = 3  # index of the bad batch


class Loss(torch.autograd.Function):
    """Zero, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return torch.full((1, 4), ctx.gradient), None


class Model(LightningModule):
    """Finite but for one batch, in which the loss or the gradient is not."""

    def __init__(self, kind: str, optimizer: str = "Adam") -> None:
        super().__init__()
        self.kind, self.optimizer = kind, optimizer
        self.layer = torch.nn.Linear(4, 4)
        self.dropout = torch.nn.Dropout(0.5)
        self.masks: list[torch.Tensor] = []
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        out = self.dropout(self.layer(batch))
        self.masks.append(out.detach() != 0)
        loss = out.pow(2).mean()
        if (batch > 50).any():
            loss = loss + (math.nan if self.kind == "loss" else Loss.apply(out, math.inf))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        kinds = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
        more = {"momentum": 0.9, "weight_decay": 0.1} if self.optimizer == "SGD" else {"weight_decay": 0.1}
        return kinds[self.optimizer](self.parameters(), lr=0.1, **more)


def batches(bad: int | None = BAD) -> DataLoader:
    data = [torch.randn(1, 4, generator=torch.Generator().manual_seed(index)) for index in range(8)]
    if bad is not None:
        data[bad] = data[bad] + 100
    return DataLoader(data, batch_size=None)


def make_trainer(tmp_path, *callbacks, **flags):
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=str(tmp_path),
        **{"max_epochs": 1, **flags},
    )  # fmt: skip


def trained(tmp_path, kind, guard, data=None, optimizer="Adam", **flags):
    torch.manual_seed(2)
    model = Model(kind, optimizer)
    trainer = make_trainer(tmp_path, guard, **flags)
    trainer.fit(model, batches() if data is None else data)
    return model, trainer


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_evidence_repeats_the_step(tmp_path, kind, clip, accumulate):
    """With a loss that is not finite, the gradient may be."""
    guard = BadStepGuard(dirpath=tmp_path / "bad")
    torch.manual_seed(2)
    model = Model(kind)
    trainer = make_trainer(tmp_path, guard, gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    with pytest.raises(BadStepError) as error:
        trainer.fit(model, batches())
    step = BAD // accumulate
    assert error.value.step == step
    assert error.value.path == str(tmp_path / "bad" / f"epoch=0-step={step}.pt")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    begin, end = step * accumulate, (step + 1) * accumulate

    class Again(Model):
        def val_dataloader(self):
            raise AssertionError("nothing is validated")

        def validation_step(self, batch, batch_idx):
            pass

    again = Again(kind)
    found = replay_bad_step(error.value.path, again, make_trainer(tmp_path, max_epochs=3))
    assert found.gradients == ([] if kind == "loss" else ["layer.weight", "layer.bias"])
    # With the same weights, and the same units were dropped.
    assert found.losses == pytest.approx(model.losses[begin:end], nan_ok=True)
    assert torch.equal(torch.stack(again.masks), torch.stack(model.masks[begin:end]))
    evidence = torch.load(error.value.path)
    assert all(torch.equal(a, b) for a, b in zip(evidence.pop("batches"), list(batches())[begin:end], strict=True))
    assert (
        len(evidence.pop("generators")) == accumulate
        and evidence.pop("state_dict").keys() == dict(model.named_parameters()).keys()
    )
    assert evidence == {
        "version": 1, "step": step, "epoch": 0, "batch_indices": list(range(begin, end)), "precision": "32-true"
    }  # fmt: skip


def test_the_evidence_holds_the_weights_of_the_step_whatever_changes_them_after_it(tmp_path):
    seen = []

    class Scaled(Model):
        def on_before_optimizer_step(self, optimizer):
            seen.append({name: value.detach().clone() for name, value in self.named_parameters()})

        def on_train_batch_end(self, outputs, batch, batch_idx):
            with torch.no_grad():
                self.layer.weight.mul_(0.5)

    guard = BadStepGuard(action="skip", dirpath=tmp_path)
    make_trainer(tmp_path, guard).fit(Scaled("loss"), batches())
    kept = torch.load(guard.paths[0])["state_dict"]
    assert all(torch.equal(kept[name], value) for name, value in seen[BAD].items())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
@pytest.mark.parametrize("bad", [0, BAD, 7])
def test_a_step_left_out_changes_neither_weights_nor_optimizer(tmp_path, kind, optimizer, bad, caplog):
    states = []

    class Watch(BadStepGuard):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
            state = trainer.optimizers[0].state_dict()["state"]
            states.append((weights, {key: {k: v.clone() for k, v in s.items()} for key, s in state.items()}))

    guard = Watch(action="skip", dirpath=tmp_path / "bad")
    _, trainer = trained(tmp_path, kind, guard, batches(bad), optimizer)
    assert guard.state_dict() == {"num_bad_steps": 1}
    assert (
        guard.paths
        == [str(path) for path in (tmp_path / "bad").iterdir()]
        == [str(tmp_path / "bad" / f"epoch=0-step={bad}.pt")]
    )
    told = [record.getMessage() for record in caplog.records if "finite" in record.getMessage()]
    assert told == [f"The loss or the gradient of step {bad} was not finite: the step is left out. {guard.paths[0]}"]
    assert not trainer.optimizers[0]._optimizer_step_post_hooks, "the optimizer is watched on"
    assert len(states) == 8
    assert all(torch.isfinite(weight).all() for weights, _ in states for weight in weights)
    if bad:
        before, after = states[bad - 1], states[bad]
        assert all(torch.equal(a, b) for a, b in zip(before[0], after[0]))
        assert all(torch.equal(s[k], after[1][key][k]) for key, s in before[1].items() for k in s)
    else:
        assert all(not value.any() for state in states[0][1].values() for value in state.values())
    if bad < 7:
        assert not torch.equal(states[bad][0][0], states[bad + 1][0][0])


def test_steps_that_are_finite_are_those_without_the_guard(tmp_path):
    guarded, _ = trained(tmp_path, "loss", BadStepGuard(), batches(None))
    torch.manual_seed(2)
    plain = Model("loss")
    make_trainer(tmp_path).fit(plain, batches(None))
    assert all(torch.equal(a, b) for a, b in zip(guarded.parameters(), plain.parameters()))
    assert not (tmp_path / "bad_steps").exists()


@pytest.mark.parametrize(("arguments", "num_files"), [({"max_files": 0}, 0), ({"max_files": 1}, 1), ({}, 10)])
def test_no_more_files_than_wanted(tmp_path, caplog, arguments, num_files):
    guard = BadStepGuard("skip", **arguments)
    guard.load_state_dict({"num_bad_steps": 2})
    trained(tmp_path, "loss", guard, batches(), max_epochs=11, limit_train_batches=BAD + 1)
    assert guard.num_bad_steps == 13
    assert guard.paths == [str(tmp_path / "bad_steps" / f"epoch={n}-step={4 * n + BAD}.pt") for n in range(num_files)]
    assert all(os.path.exists(path) for path in guard.paths)
    told = [record.getMessage() for record in caplog.records if "finite" in record.getMessage()]
    assert [text.partition(" is left out. ")[2] for text in told] == guard.paths + [""] * (11 - num_files)


def test_an_error_does_not_speak_of_a_file_that_was_not_written(tmp_path):
    with pytest.raises(BadStepError, match=r"before that step\. Raise max_files to keep it\.$") as error:
        trained(tmp_path, "loss", BadStepGuard(max_files=0))
    assert error.value.path == ""


@pytest.mark.parametrize("fails_at", [BAD, BAD + 1])
def test_a_failure_of_the_next_step_keeps_the_evidence(tmp_path, fails_at):
    class Fails(Model):
        def training_step(self, batch, batch_idx):
            if batch_idx == fails_at:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    guard, model = BadStepGuard(dirpath=tmp_path / "bad"), Fails("loss")
    trainer = make_trainer(tmp_path, guard)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(model, batches())
    expected = [str(tmp_path / "bad" / f"epoch=0-step={BAD}.pt")] if fails_at > BAD else []
    assert (guard.paths, guard.num_bad_steps) == (expected, len(expected))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks, "the optimizer is watched on"


def test_a_failure_before_the_first_step_is_the_one_that_is_told(tmp_path):
    class Fails(Model):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    guard = BadStepGuard()
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tmp_path, guard).fit(Fails("loss"), batches())
    assert guard.state_dict() == {}


@pytest.mark.filterwarnings("ignore:`training_step` returned None")
@pytest.mark.parametrize(("accumulate", "step"), [(1, 2), (2, 1)])
def test_a_batch_without_a_loss_is_no_bad_step(tmp_path, accumulate, step):
    class Skips(Model):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 == 1 else super().training_step(batch, batch_idx)

    guard = BadStepGuard("skip")
    make_trainer(tmp_path, guard, accumulate_grad_batches=accumulate).fit(Skips("gradient"), batches(2))
    assert guard.paths == [str(tmp_path / "bad_steps" / f"epoch=0-step={step}.pt")]
    found = replay_bad_step(guard.paths[0], Skips("gradient"), make_trainer(tmp_path))
    assert [math.isnan(loss) for loss in found.losses] == [False, True][:accumulate]


def test_reading_the_evidence_runs_no_code(tmp_path):
    torch.save({"batches": [Model]}, tmp_path / "step.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        replay_bad_step(tmp_path / "step.pt", Model("loss"), make_trainer(tmp_path))


def test_the_guard_reads_nothing_from_the_device(tmp_path):
    reads = {"item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"}

    class Count(torch.overrides.TorchFunctionMode):
        number = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.number += getattr(func, "__name__", "") in reads
            return func(*args, **(kwargs or {}))

    class Quiet(Model):
        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

    counts = []
    for number in (2, 6):
        trainer = make_trainer(tmp_path, BadStepGuard(), limit_train_batches=number)
        with Count() as count:
            trainer.fit(Quiet("loss", "SGD"), DataLoader(torch.randn(8, 4), batch_size=1))
        counts.append(count.number)
    assert counts[0] == counts[1]


def test_manual_optimization_is_refused(tmp_path):
    model = Model("loss")
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization"):
        make_trainer(tmp_path, BadStepGuard()).fit(model, batches())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="action must be 'stop' or 'skip', received 'ignore'"):
        BadStepGuard("ignore")
    with pytest.raises(ValueError, match="max_files must be >= 0, received -1"):
        BadStepGuard(max_files=-1)
