"""Averages of weights give back what they changed, go on after a resume, and refuse; numbers stand beside Lightning's in tests/parity."""

from __future__ import annotations

import pytest
import torch

from levin.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from levin.strategies import SingleDeviceStrategy
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import Small, TrainOnly, loader, trainer


class Normed(Small):
    """Has batch norms, one of them with the plain mean over all batches."""

    def __init__(self, schedule=None):
        super().__init__()
        self.norms = torch.nn.Sequential(torch.nn.BatchNorm1d(2, momentum=0.3), torch.nn.BatchNorm1d(2, momentum=None))
        self.schedule = schedule

    def training_step(self, batch, batch_idx):
        return self.layer(self.norms(torch.cat([batch[0], batch_idx - 2 * batch[0]]))).pow(2).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), **self.schedule}]


def fit(folder, callbacks, module, ckpt_path=None, **flags):
    run = trainer(folder, callbacks, **{"max_epochs": 4, **flags})
    run.fit(module, loader(), None if isinstance(module, TrainOnly) else loader(1), ckpt_path=ckpt_path)
    return run


class Asks(Callback):
    """Writes down what an average may have changed, when training is over."""

    def on_fit_end(self, trainer, pl_module):
        self.look(trainer, pl_module)

    def on_exception(self, trainer, pl_module, exception):
        self.look(trainer, pl_module)

    def look(self, trainer, pl_module):
        self.seen = trainer.max_epochs, trainer.accumulate_grad_batches, [norm.momentum for norm in pl_module.norms]


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_average_changes_is_as_before_when_training_is_over(tmp_path, fails):
    class Fails(Normed):
        def training_step(self, batch, batch_idx):
            if fails and self.current_epoch == 3:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    asks, module = Asks(), Fails()
    callbacks = [StochasticWeightAveraging(0.1, swa_epoch_start=1), asks]
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            fit(tmp_path, callbacks, module, max_epochs=3)
    else:
        assert fit(tmp_path, callbacks, module, max_epochs=3).current_epoch == 4
    assert asks.seen == (3, 1, [0.3, None])


def test_a_training_without_an_epoch_leaves_the_number_of_epochs_as_it_was(tmp_path):
    assert fit(tmp_path, [StochasticWeightAveraging(0.1)], Normed(), max_epochs=0).max_epochs == 0


AVERAGES = {
    "swa": lambda: StochasticWeightAveraging([0.02], swa_epoch_start=2, annealing_epochs=3),
    "mean": WeightAveraging,
    "ema": lambda: EMAWeightAveraging(decay=0.8, update_starting_at_epoch=1),
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The checkpoint holds states of callbacks")
@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("schedule", [None, {}], ids=["", "scheduler"])
def test_a_resumed_run_ends_as_the_whole_one(tmp_path, name, epoch, schedule):
    whole = Normed(schedule)
    fit(tmp_path, [AVERAGES[name](), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)], whole, max_epochs=5)
    resumed = Normed(schedule)
    fit(tmp_path, [AVERAGES[name]()], resumed, ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"), max_epochs=5)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_the_average_is_kept_where_the_user_says(tmp_path):
    seen = []

    class Asks(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(average.state_dict()["average_model_state"]["layer.weight"].device.type)

    average = StochasticWeightAveraging(0.1, swa_epoch_start=9, device="meta")
    assert average.state_dict() == {
        "n_averaged": 0, "latest_update_epoch": -1, "scheduler_state": None, "average_model_state": None
    }  # fmt: skip
    fit(tmp_path, [average, Asks()], TrainOnly(), max_epochs=1)
    assert seen == ["meta"]


@pytest.mark.parametrize(
    ("schedule", "warning"),
    [
        ({"interval": "step"}, "interval='step' and frequency=1"),
        ({"frequency": 2}, "interval='epoch' and frequency=2"),
        ({}, None),
    ],
)
def test_a_scheduler_that_is_replaced_is_named(tmp_path, caplog, schedule, warning):
    with caplog.at_level("INFO", "levin"):
        if warning is None:
            fit(tmp_path, [StochasticWeightAveraging(0.1)], Normed(schedule))  # warnings are errors
        else:
            with pytest.warns(UserWarning, match=f"replaces a scheduler with {warning}"):
                fit(tmp_path, [StochasticWeightAveraging(0.1)], Normed(schedule))
    assert "Swapping scheduler `StepLR` for `SWALR`" in caplog.messages


class Manual(TrainOnly):
    automatic_optimization = False

    def __init__(self, num_optimizers, num_schedulers):
        super().__init__()
        self.numbers = num_optimizers, num_schedulers

    def training_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.numbers[0])]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1) for _ in range(self.numbers[1])]


def test_what_cannot_be_averaged_is_refused(tmp_path, monkeypatch):
    for numbers in ((2, 0), (1, 2)):
        with pytest.raises(MisconfigurationException, match=f"received {numbers[0]} and {numbers[1]}"):
            fit(tmp_path, [StochasticWeightAveraging(0.1)], Manual(*numbers))
    with pytest.raises(MisconfigurationException, match="received max_epochs=-1. Set it"):
        fit(tmp_path, [StochasticWeightAveraging(0.1)], TrainOnly(), max_epochs=-1, max_steps=3)
    monkeypatch.setattr(SingleDeviceStrategy, "restore_checkpoint_after_setup", True)
    for average in (StochasticWeightAveraging(0.1), WeightAveraging()):
        with pytest.raises(MisconfigurationException, match=f"{type(average).__name__} does not work with weights"):
            fit(tmp_path, [average], TrainOnly())


class Watched(Small):
    """Keeps the weights that are trained, and those that are validated."""

    def on_train_epoch_end(self):
        self.trained = self.layer.weight.detach().clone()

    def on_validation_start(self):
        self.trained = self.layer.weight.detach().clone()

    def validation_step(self, batch, batch_idx):
        self.validated = self.layer.weight.detach().clone()
        if self.fail_at == "validation":
            raise RuntimeError("broken")


def test_a_failed_validation_leaves_the_trained_weights(tmp_path):
    module = Watched(fail_at="validation")
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, [WeightAveraging()], module, max_epochs=1)
    assert not torch.equal(module.validated, module.trained)
    assert torch.equal(module.layer.weight, module.trained)


def test_the_average_stays_in_the_module_whatever_fails_after_training(tmp_path):
    class Fails(Watched):
        def on_fit_end(self):
            raise RuntimeError("broken")

    module = Fails()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, [WeightAveraging()], module, max_epochs=1)
    assert torch.equal(module.layer.weight, module.validated)


def test_a_checkpoint_after_training_holds_the_average_and_the_trained_weights(tmp_path):
    module, average = Watched(), WeightAveraging()
    run = fit(tmp_path, [average], module, max_epochs=1)
    run.save_checkpoint(tmp_path / "end.ckpt")
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(file["state_dict"]["layer.weight"], module.validated)
    assert torch.equal(file["current_model_state"]["layer.weight"], module.trained)
    assert file["averaging_state"] == {"n_averaged": torch.tensor(4)}
    assert average.state_dict() == {"latest_update_step": 4, "latest_update_epoch": -1}
    other = Watched()
    trainer(tmp_path, [WeightAveraging()]).validate(other, loader(1), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert torch.equal(other.validated, module.validated)


def test_a_checkpoint_without_an_average_is_where_it_starts(tmp_path):
    average = WeightAveraging()
    average.load_state_dict({"latest_update_step": 3})  # of Lightning
    assert average.state_dict() == {"latest_update_step": 3, "latest_update_epoch": -1}
    fit(tmp_path, [], TrainOnly(), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="saved without WeightAveraging"):
        fit(tmp_path, [WeightAveraging()], TrainOnly(), ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
