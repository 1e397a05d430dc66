"""What a search leaves behind: its answer, and nothing else."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import textwrap

import pytest
import torch

import levin
from levin.precision import MixedPrecision
from levin.tuner import BatchSizeFinder, LearningRateFinder, LRFinder, Tuner
from levin.tuner.batch_size import largest
from levin.tuner.learning_rate import rate, steepest
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.memory import is_oom_error

QUIET = dict(
    accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
)


class Net(levin.LightningModule):
    def __init__(self, lr: float = 0.1, batch_size: int = 2):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(), torch.nn.Linear(4, 1)
        )
        self.seen: list[float] = []
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.seen.append(float(batch.sum()))
        loss = self.layers(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("size", float(len(batch)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)

    def train_dataloader(self):
        data = torch.arange(256.0).reshape(64, 4) / 256
        return torch.utils.data.DataLoader(data, batch_size=self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(64, 4), batch_size=self.hparams.batch_size)


def state_of(model, trainer):
    optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
    return (
        copy.deepcopy(model.state_dict()),
        optimizers,
        [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        model.seen[:],
        model.steps,
        model.training,
    )


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_fit_with_a_search_in_it_is_the_fit_without(tmp_path, epoch):
    class Searching(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                before = state_of(pl_module, trainer)
                self.lr_find(trainer, pl_module)
                assert same(before, state_of(pl_module, trainer))

    def fit(*callbacks):
        torch.manual_seed(3)
        model = Net(batch_size=8)
        trainer = levin.Trainer(**QUIET, max_epochs=2, default_root_dir=tmp_path, callbacks=list(callbacks))
        torch.manual_seed(4)
        trainer.fit(model)
        return state_of(model, trainer), dict(trainer.callback_metrics), trainer.global_step

    finder = Searching(num_training_steps=20, update_attr=False)
    assert same(fit(), fit(finder))
    assert len(finder.optimal_lr.results["loss"]) == 20


def test_the_scale_of_the_loss_is_put_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
    scales = []

    class Searching(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            scales.append(scaler.get_scale())

    finder = Searching(num_training_steps=5, update_attr=False)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = levin.Trainer(**QUIET, max_steps=2, default_root_dir=tmp_path, callbacks=[finder], plugins=[plugin])
    trainer.fit(Net(batch_size=8))
    assert scales == [256.0] and scaler.get_scale() == 1024.0


def test_schedulers_start_from_the_rate_that_was_found(tmp_path):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]

    model = Scheduled(batch_size=8)
    finder = LearningRateFinder(num_training_steps=30)
    trainer = levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path, callbacks=[finder])
    trainer.fit(model)
    found = finder.optimal_lr.suggestion()
    (group,) = trainer.optimizers[0].param_groups
    assert found != 0.1 and (model.hparams.lr, group["initial_lr"], group["lr"]) == (found, found, found / 2)


def test_a_fit_with_validation_is_searched_once(tmp_path):
    class Counting(BatchSizeFinder):
        searches = 0

        def scale_batch_size(self, trainer, pl_module):
            self.searches += 1
            super().scale_batch_size(trainer, pl_module)

    finder = Counting(max_trials=1)
    levin.Trainer(**QUIET, max_epochs=2, default_root_dir=tmp_path, callbacks=[finder]).fit(Net())
    assert finder.searches == 1


def test_a_tuner_leaves_the_trainer_as_it_was(tmp_path):
    model, trainer = Net(), levin.Trainer(**QUIET, max_epochs=3, default_root_dir=tmp_path)
    before = trainer.settings, trainer.callbacks, trainer.max_epochs, trainer.global_step
    tuner = Tuner(trainer)
    assert (
        tuner.lr_find(model, num_training=20, update_attr=False).suggestion()
        and tuner.scale_batch_size(model, max_trials=2) == 4
    )
    assert (trainer.settings, trainer.callbacks, trainer.max_epochs, trainer.global_step) == before
    assert model.hparams.lr == 0.1 and model.hparams.batch_size == 4
    trainer.fit(model)
    assert trainer.global_step == 3 * 16


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_an_unknown_mode_is_refused_where_the_finder_is_made(finder):
    with pytest.raises(MisconfigurationException, match="mode must be .* received 'nonsense'"):
        finder(mode="nonsense")


def test_a_search_of_a_fit_validates_nothing(tmp_path):
    class Unvalidated(Net):
        def validation_step(self, batch, batch_idx):
            raise AssertionError("validated")

    tuner = Tuner(levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path))
    assert tuner.lr_find(Unvalidated(batch_size=32), num_training=4, update_attr=False)
    assert tuner.scale_batch_size(Unvalidated(), init_val=32, max_trials=1) == 32


def test_a_search_goes_on_over_as_many_epochs_as_it_needs(tmp_path):
    trainer = levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path)
    assert (
        len(Tuner(trainer).lr_find(Net(batch_size=32), num_training=25, early_stop_threshold=None).results["lr"]) == 25
    )


def test_each_rate_has_its_loss_where_the_last_window_of_an_epoch_is_short(tmp_path):
    settings = dict(accumulate_grad_batches=3, limit_train_batches=8, max_epochs=1)
    trainer = levin.Trainer(**QUIET, **settings, default_root_dir=tmp_path)
    results = Tuner(trainer).lr_find(Net(), num_training=9, early_stop_threshold=None, update_attr=False).results
    assert len(results["lr"]) == len(results["loss"]) > 4
    assert results["lr"] == sorted(set(results["lr"]))


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_an_evaluation_runs_with_the_size_that_was_found(tmp_path, method):
    class Evaluated(Net):
        test_step = Net.validation_step

        def test_dataloader(self):
            return self.val_dataloader()

        def predict_dataloader(self):
            return self.val_dataloader()

        def predict_step(self, batch, batch_idx):
            return len(batch)

    model = Evaluated()
    trainer = levin.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[BatchSizeFinder(max_trials=4)])
    result = getattr(trainer, method)(model)
    assert model.hparams.batch_size == 16
    assert result == [16] * 4 if method == "predict" else result == [{"size": 16.0}]


def test_the_batch_size_is_put_back_where_the_search_fails(tmp_path):
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if len(batch) > 4:
                raise RuntimeError("another error")
            return super().training_step(batch, batch_idx)

    model = Failing()
    with pytest.raises(RuntimeError, match="another error"):
        Tuner(levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path)).scale_batch_size(model)
    assert model.hparams.batch_size == 2 and model.steps == 0


PROGRAM = """
import resource, sys
import torch
import levin
from levin.tuner import Tuner

class Net(levin.LightningModule):
    def __init__(self, batch_size=2):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        # 16 MB for each sample
        return self.layer(torch.ones(len(batch) << 22, 1)).mean() * 0 + self.layer.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1000, 1), batch_size=self.hparams.batch_size)

torch.set_num_threads(1)
trainer = levin.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False)
model = Net()
Tuner(trainer).scale_batch_size(model, max_trials=1)  # all that is imported late is there now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
print(Tuner(trainer).scale_batch_size(model, mode=sys.argv[1], margin=0.1), model.hparams.batch_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_memory_that_is_really_full_ends_the_search(mode):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), mode], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found, set_to = map(int, done.stdout.split()[-2:])
    assert found == set_to and (found in (8, 16) if mode == "power" else 8 <= found < 32)
    assert "failed, trying a smaller one" in done.stderr


def test_sizes_are_searched_from_above_too():
    tried = []

    def fits(size):
        tried.append(size)
        return size <= 5

    assert largest(fits, 64, 25, 1000) == 4
    assert tried == [64, 32, 16, 8, 4]
    assert largest(fits, 64, 25, 1000, "binsearch", 0.0) == 5
    with pytest.raises(RuntimeError, match="batch size of 1 does not fit"):
        largest(lambda size: False, 8, 25, 1000)
    assert largest(lambda size: True, 2, 25, 100) == 100
    assert largest(lambda size: True, 2, 25, 100, is_enough=lambda size: size >= 20) == 32


def test_what_an_error_of_full_memory_is():
    assert is_oom_error(MemoryError()) and is_oom_error(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not is_oom_error(RuntimeError("shapes")) and not is_oom_error(ValueError("CUDA out of memory"))


def test_values_that_are_not_finite_are_left_out_of_the_suggestion():
    nan = float("nan")
    assert steepest([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [5.0, nan, 5.0, 3.0, 1.0, nan], 0, 0) == 3
    assert steepest([1.0, 2.0], [nan, nan], 0, 0) is None
    assert [rate(i, 0.1, 1.0, 10, "linear") for i in (0, 9)] == [0.1, pytest.approx(1.0)]


def test_the_plot_shows_losses_over_rates_and_the_suggestion():
    import matplotlib

    matplotlib.use("agg")
    found = LRFinder("exponential", 1e-4, 1.0, 20)
    found.results = {
        "lr": [10.0 ** (i / 5 - 4) for i in range(20)],
        "loss": [1.0] * 12 + [0.5, 0.2, 0.1, 0.1, 0.2, 0.5, 1.0, 2.0],
    }
    figure = found.plot(suggest=True)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and len(axes.lines) == 2
    assert list(axes.lines[1].get_xdata()) == [found.suggestion()]
    assert found.plot(ax=axes) is figure
