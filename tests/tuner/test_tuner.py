"""What a search leaves behind: its answer, and nothing else."""

from __future__ import annotations

import copy
import logging
import random
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import levin
from levin.precision import MixedPrecision
from levin.tuner import BatchSizeFinder, LearningRateFinder, LRFinder, Tuner
from levin.tuner.batch_size import largest
from levin.tuner.learning_rate import rate, steepest
from levin.tuner.search import unchanged
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


def test_each_size_is_told_and_memory_is_freed_after_it(tmp_path, caplog, monkeypatch):
    class Full(Net):
        def training_step(self, batch, batch_idx):
            if len(batch) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    freed = []
    monkeypatch.setattr("levin.tuner.batch_size.free_memory", lambda: freed.append(True))
    tuner = Tuner(levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="levin"):
        assert tuner.scale_batch_size(Full()) == 4
    assert [message for message in caplog.messages if "atch size" in message] == [
        "Batch size 2 succeeded", "Batch size 4 succeeded", "Batch size 8 failed, trying a smaller one",
        "Finished batch size finder, will continue with full run using batch size 4",
    ]  # fmt: skip
    assert len(freed) == 3


def test_no_size_beyond_the_smallest_data_set_is_tried(tmp_path):
    class Several(Net):
        def train_dataloader(self):
            sizes = (64, 40, None)
            stream = torch.utils.data.DataLoader(Stream(), batch_size=self.hparams.batch_size)
            return [stream] + [
                torch.utils.data.DataLoader(torch.zeros(size, 4), batch_size=self.hparams.batch_size)
                for size in sizes if size
            ]  # fmt: skip

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[1], batch_idx)

    tuner = Tuner(levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tuner.scale_batch_size(Several(), steps_per_trial=1) == 64


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(100, 4))


def test_a_search_for_a_size_leaves_schedulers_where_they_are(tmp_path):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    seen = []

    class Finder(BatchSizeFinder):
        def on_fit_start(self, trainer, pl_module):
            before = copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict())
            super().on_fit_start(trainer, pl_module)
            assert trainer.lr_scheduler_configs[0].scheduler.state_dict() == before
            seen.append(self.optimal_batch_size)

    levin.Trainer(**QUIET, max_steps=1, default_root_dir=tmp_path, callbacks=[Finder(max_trials=2)]).fit(Scheduled())
    assert seen == [4]


def test_what_a_module_holds_is_put_back_into_the_same_containers():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("count", torch.zeros(1))
    held = {"list": [1, 2], "dict": {"a": 1}, "set": {3}}
    vars(module).update(**{f"own_{name}": value for name, value in held.items()}, plain=1)
    module.weight.grad = torch.ones(2, 2)
    weights, grad = module.weight.detach().clone(), module.weight.grad
    with pytest.raises(ZeroDivisionError), unchanged(module):
        module.own_list.append(3)
        module.own_dict["b"] = 2
        module.own_set.add(4)
        module.plain, module.new = 2, 3
        module.other = torch.nn.Linear(1, 1)
        with torch.no_grad():
            module.weight.zero_()
            module.count.add_(1)
        module.weight.grad = None
        1 / 0  # noqa: B018
    assert held == {"list": [1, 2], "dict": {"a": 1}, "set": {3}}
    assert all(getattr(module, f"own_{name}") is value for name, value in held.items())
    assert module.plain == 1 and not hasattr(module, "new") and not hasattr(module, "other")
    assert torch.equal(module.weight, weights) and module.weight.grad is grad and module.count.item() == 0
    assert module.weight.requires_grad


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_nothing_is_searched_in_a_fast_run(tmp_path, finder):
    what = "learning rate" if finder is LearningRateFinder else "batch size"
    model, made = Net(), finder()
    settings = {**QUIET, "fast_dev_run": True, "default_root_dir": tmp_path}
    with pytest.warns(UserWarning, match=f"^The {what} is not searched with fast_dev_run.$"):
        levin.Trainer(**settings, callbacks=[made]).fit(model)
    assert (model.steps, model.hparams.lr, model.hparams.batch_size) == (1, 0.1, 2)
    assert getattr(made, "optimal_lr", None) is None and getattr(made, "optimal_batch_size", 2) == 2


def test_too_few_rates_are_told_and_leave_the_rate_as_it_is(tmp_path):
    model, finder = Net(batch_size=8), LearningRateFinder(num_training_steps=5)
    told = "^No learning rate is suggested: 5 rates were tried, .* training goes on with the rate that it has.$"
    with pytest.warns(UserWarning, match=told):
        levin.Trainer(**QUIET, max_steps=1, default_root_dir=tmp_path, callbacks=[finder]).fit(model)
    assert model.hparams.lr == 0.1


def test_a_rate_that_was_found_is_told(tmp_path, caplog):
    finder = LearningRateFinder(num_training_steps=20)
    with caplog.at_level(logging.INFO, logger="levin"):
        levin.Trainer(**QUIET, max_steps=1, default_root_dir=tmp_path, callbacks=[finder]).fit(Net(batch_size=8))
    assert f"Learning rate set to {finder.optimal_lr.suggestion()}" in caplog.messages


class Manual(Net):
    number = 1

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.number)]


def test_a_rate_is_searched_for_one_optimizer_alone(tmp_path):
    model = Manual()
    model.number = 2
    tuner = Tuner(levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path))
    with pytest.raises(MisconfigurationException, match=r"one optimizer, received 2\. Set the learning rates"):
        tuner.lr_find(model)


def test_a_search_ends_where_the_module_makes_no_steps(tmp_path):
    tuner = Tuner(levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path))
    with pytest.raises(MisconfigurationException, match="made no optimizer step in a whole epoch"):
        tuner.lr_find(Manual())
    assert tuner.scale_batch_size(Manual(), max_trials=2) == 4


@pytest.mark.parametrize(
    ("method", "arguments", "told"),
    [
        ("lr_find", {"method": "test"}, "method must be 'fit' to search for a learning rate, received 'test'"),
        ("lr_find", {"dataloaders": [1]}, "With method='fit', pass train_dataloaders, received dataloaders"),
        ("scale_batch_size", {"method": "nonsense"}, r"one of \['fit', 'validate', 'test', 'predict'\], received 'nonsense'"),
        ("scale_batch_size", {"method": "test", "train_dataloaders": [1]}, "With method='test', pass dataloaders"),
        ("scale_batch_size", {"method": "test", "val_dataloaders": [1]}, "With method='test', pass dataloaders"),
        ("scale_batch_size", {"method": "test", "dataloaders": [1]}, "passed directly to the Trainer"),
        ("scale_batch_size", {"batch_arg_name": "size"}, "Field size not found in `model`"),
        ("lr_find", {"attr_name": "rate"}, "received attr_name='rate'"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused(tmp_path, method, arguments, told):
    model = Net()
    model.test_step = model.validation_step
    tuner = Tuner(levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path))
    with pytest.raises((ValueError, AttributeError), match=told):
        getattr(tuner, method)(model, **arguments)


def test_a_search_of_a_test_prints_no_results_and_limits_nothing_afterwards(tmp_path, capsys):
    class Tested(Net):
        test_step = Net.validation_step
        test_dataloader = Net.val_dataloader

    trainer = levin.Trainer(**QUIET, default_root_dir=tmp_path)
    assert Tuner(trainer).scale_batch_size(Tested(), method="test", max_trials=1) == 2
    assert capsys.readouterr().out == ""
    assert trainer.limit_test_batches == 1.0 and trainer.test(Tested(), verbose=False) == [{"size": 2.0}]


def test_a_tuner_leaves_the_trainer_as_it_was(tmp_path):
    model, trainer = Net(), levin.Trainer(**QUIET, max_epochs=3, default_root_dir=tmp_path)
    before = trainer.settings, trainer.callbacks, trainer.max_epochs, trainer.min_epochs, trainer.global_step
    tuner = Tuner(trainer)
    assert (
        tuner.lr_find(model, num_training=20, update_attr=False).suggestion()
        and tuner.scale_batch_size(model, max_trials=2) == 4
    )
    after = trainer.settings, trainer.callbacks, trainer.max_epochs, trainer.min_epochs, trainer.global_step
    assert after == before
    assert model.hparams.lr == 0.1 and model.hparams.batch_size == 4
    trainer.fit(model)
    assert trainer.global_step == 3 * 16


def test_a_search_in_a_requeued_job_begins_and_ends_with_the_weights_that_the_module_has(tmp_path, monkeypatch):
    first = levin.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path)
    first.fit(Net())
    first.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NAME", "train.sh")
    model, trainer = Net(), levin.Trainer(**QUIET, max_epochs=3, default_root_dir=tmp_path)
    tuner = Tuner(trainer)
    assert tuner.lr_find(model, num_training=20, update_attr=False) and tuner.scale_batch_size(model, max_trials=2)
    for ours, theirs in zip(model.state_dict().values(), Net().state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert trainer.global_step == 0


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


@pytest.mark.parametrize(
    ("limit", "arguments", "expected", "found"),
    [
        (5, (64, 25, 1000), [64, 32, 16, 8, 4], 4),
        (5, (64, 25, 1000, "binsearch", 0.0), [64, 32, 16, 8, 4, 6, 5], 5),
        (50, (2, 25, 1000), [2, 4, 8, 16, 32, 64], 32),
        (50, (2, 25, 1000, "binsearch", 0.0), [2, 4, 8, 16, 32, 64, 48, 56, 52, 50, 51], 50),
        (50, (2, 25, 1000, "binsearch", 0.1), [2, 4, 8, 16, 32, 64, 48, 56, 52, 50, 51], 45),
        (1, (2, 25, 1000, "binsearch", 0.5), [2, 1], 1),
        (2, (2, 25, 3, "binsearch", 0.0), [2, 3], 2),
        (2, (4, 25, 1000), [4, 2], 2),
        (3, (3, 25, 1000), [3, 6], 3),
        (1000, (2, 3, 1000), [2, 4, 8], 8),
        (5, (64, 1, 1000), [64, 32, 16, 8, 4], 4),  # sizes that do not fit are not counted
        (50, (2, 6, 1000, "binsearch", 0.0), [2, 4, 8, 16, 32, 64, 48], 48),
        (13, (9, 3, 1000, "binsearch", 0.0), [9, 18, 13, 15, 14], 13),
        (1000, (2, 25, 20), [2, 4, 8, 16, 20], 20),
        (1000, (2, 25, 20, "binsearch", 0.0), [2, 4, 8, 16, 20], 20),
        (1000, (200, 25, 100), [100], 100),
        (99, (200, 25, 100), [100, 50], 50),
        (0, (8, 25, 1000), [8, 4, 2, 1], None),
    ],
)
def test_which_sizes_are_tried(limit, arguments, expected, found):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    if found is None:
        with pytest.raises(RuntimeError, match="batch size of 1 does not fit"):
            largest(fits, *arguments)
    else:
        assert largest(fits, *arguments) == found
    assert tried == expected
    if limit == 1000 and arguments == (2, 25, 20):
        assert largest(fits, *arguments, is_enough=lambda size: size >= 7) == 8


def test_what_an_error_of_full_memory_is():
    assert is_oom_error(MemoryError()) and is_oom_error(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not is_oom_error(RuntimeError("shapes")) and not is_oom_error(ValueError("CUDA out of memory"))


def test_values_that_are_not_finite_are_left_out_of_the_suggestion():
    nan = float("nan")
    assert steepest([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [5.0, nan, 5.0, 3.0, 1.0, nan], 0, 0) == 3
    assert steepest([1.0, 2.0], [nan, nan], 0, 0) is None
    assert steepest([1.0, 2.0, 3.0], [5.0, nan, nan], 0, 0) is None
    assert steepest([1.0, 2.0, 3.0], [5.0, 3.0, nan], 0, 0) == 0  # both fall alike
    falling = [9.0] * 10 + [9.0, 8.0, 1.0, 0.0]
    assert steepest([float(i) for i in range(14)], falling) == 12
    assert [rate(i, 0.1, 1.0, 10, "linear") for i in (0, 9)] == [0.1, pytest.approx(1.0)]


def test_the_plot_shows_losses_over_rates_and_the_suggestion(monkeypatch):
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    found = LRFinder("exponential", 1e-4, 1.0, 20)
    found.results = {
        "lr": [10.0 ** (i / 5 - 4) for i in range(20)],
        "loss": [1.0] * 12 + [0.5, 0.2, 0.1, 0.1, 0.2, 0.5, 1.0, 2.0],
    }
    figure = found.plot(suggest=True)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and (axes.get_xlabel(), axes.get_ylabel()) == ("Learning rate", "Loss")
    curve, suggestion = axes.lines
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == (found.results["lr"], found.results["loss"])
    assert list(suggestion.get_xdata()) == [found.suggestion()]
    assert (list(suggestion.get_ydata()), suggestion.get_markersize()) == ([0.5], 10)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    assert found.plot(ax=axes) is figure and len(axes.lines) == 3 and not shown
    linear = LRFinder("linear", 1e-4, 1.0, 20)
    assert linear.plot(suggest=True, show=True).axes[0].get_xscale() == "linear" and shown == [True]
    assert linear.suggestion() is None
    plt.close("all")
