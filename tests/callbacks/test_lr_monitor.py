from __future__ import annotations

import pytest
import torch

from levin.callbacks import LearningRateMonitor
from levin.loggers.logger import Logger
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import TrainOnly, loader, trainer

SGD, Adam, StepLR = torch.optim.SGD, torch.optim.Adam, torch.optim.lr_scheduler.StepLR


class Lines(Logger):
    """Keeps what it is given of learning rates."""

    name = "lines"
    version = 0

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        kept = {key: round(float(value), 6) for key, value in metrics.items() if key not in ("train", "epoch")}
        if kept:
            self.lines.append((step, kept))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Two(TrainOnly):
    def __init__(self, configure):
        super().__init__()
        self.second = torch.nn.Linear(2, 1)
        self.configure = configure

    def configure_optimizers(self):
        return self.configure(self)


def fit(folder, configure, arguments=None, **kwargs):
    logger, callback = Lines(), LearningRateMonitor(**(arguments or {}))
    module = Two(configure)
    run = trainer(folder, [callback], **{"max_epochs": 2, "logger": logger, "log_every_n_steps": 1, **kwargs})
    run.fit(module, loader(2))
    return logger.lines, callback, run


def sgd(module, **schedule):
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    if not schedule:
        return optimizer
    return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), **schedule}]


def test_without_scheduler_steps_and_epochs_are_logged(tmp_path):
    lines, callback, run = fit(tmp_path, sgd)
    assert lines == [(step, {"lr-SGD": 0.1}) for step in (0, 0, 1, 2, 2, 3)]
    assert callback.lrs == {"lr-SGD": [0.1] * 6}
    assert run.callback_metrics["lr-SGD"] == torch.tensor(0.1)


def test_the_interval_of_the_scheduler_decides(tmp_path):
    lines, _, _ = fit(tmp_path, lambda m: sgd(m, interval="step"))
    assert lines == [(0, {"lr-SGD": 0.1}), (1, {"lr-SGD": 0.05}), (2, {"lr-SGD": 0.025}), (3, {"lr-SGD": 0.0125})]
    lines, _, _ = fit(tmp_path, lambda m: sgd(m, interval="epoch"))
    assert lines == [(0, {"lr-SGD": 0.1}), (2, {"lr-SGD": 0.05})]


def test_the_user_may_decide(tmp_path):
    lines, _, _ = fit(tmp_path, lambda m: sgd(m, interval="step"), {"logging_interval": "epoch"})
    assert [step for step, _ in lines] == [0, 2]
    lines, _, _ = fit(tmp_path, lambda m: sgd(m, interval="epoch"), {"logging_interval": "step"}, log_every_n_steps=2)
    assert [step for step, _ in lines] == [1, 3]


def test_momentum_and_weight_decay(tmp_path):
    lines, callback, _ = fit(
        tmp_path,
        lambda m: sgd(m, interval="epoch", name="rate"),
        {"log_momentum": True, "log_weight_decay": True, "log_key_prefix": "optim/"},
    )
    assert lines[0][1] == {"optim/rate": 0.1, "optim/rate-momentum": 0.9, "optim/rate-weight_decay": 0.5}
    assert callback.last_momentum_values == {"optim/rate-momentum": 0.9}
    assert callback.last_weight_decay_values == {"optim/rate-weight_decay": 0.5}


def test_the_first_beta_is_the_momentum(tmp_path):
    lines, _, _ = fit(tmp_path, lambda m: Adam(m.parameters(), lr=torch.tensor(0.1)), {"log_momentum": True})
    assert lines[0][1] == {"lr-Adam": 0.1, "lr-Adam-momentum": 0.9}


def test_an_optimizer_without_momentum_is_warned_about(tmp_path):
    with pytest.warns(RuntimeWarning, match="do not have momentum"):
        lines, _, _ = fit(
            tmp_path,
            lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
            {"log_momentum": True, "log_weight_decay": True},
            max_epochs=1,
        )
    assert lines[0][1] == {"lr-Adagrad": 0.1, "lr-Adagrad-momentum": 0.0, "lr-Adagrad-weight_decay": 0.0}


@pytest.mark.parametrize(
    ("group_names", "expected"),
    [
        ((None, None), ["lr-SGD/pg1", "lr-SGD/pg2"]),
        (("a", "b"), ["lr-SGD/a", "lr-SGD/b"]),
        (("a", None), ["lr-SGD/a", "lr-SGD/pg2"]),
    ],
)
def test_parameter_groups_have_names(tmp_path, group_names, expected):
    def configure(module):
        groups = [{"params": module.layer.parameters()}, {"params": module.second.parameters()}]
        return SGD([{**g, **({"name": name} if name else {})} for g, name in zip(groups, group_names)], lr=0.1)

    lines, _, _ = fit(tmp_path, configure)
    assert list(lines[0][1]) == expected


def test_parameter_groups_of_one_name_are_refused(tmp_path):
    def configure(module):
        parts = (module.layer, module.second)
        return SGD([{"params": part.parameters(), "name": "a"} for part in parts], lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"\['a'\] more than once in lr-SGD"):
        fit(tmp_path, configure)


def test_optimizers_of_one_class_are_numbered_those_with_schedulers_first(tmp_path):
    class Manual(Two):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.step()

    def configure(module):
        first, second = (Adam(part.parameters(), lr=lr) for part, lr in ((module.layer, 0.1), (module.second, 0.2)))
        return [first, second], [StepLR(second, 1)]

    logger = Lines()
    trainer(tmp_path, [LearningRateMonitor()], max_epochs=1, logger=logger, log_every_n_steps=1).fit(
        Manual(configure), loader(1)
    )
    assert logger.lines[0] == (0, {"lr-Adam": 0.2, "lr-Adam-1": 0.1})


def test_a_group_that_is_added_later_renames_the_first(tmp_path):
    class Grows(Two):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": list(self.second.parameters()), "lr": 0.2})

    logger, callback = Lines(), LearningRateMonitor(logging_interval="step")
    run = trainer(tmp_path, [callback], max_epochs=2, logger=logger, log_every_n_steps=1)
    run.fit(Grows(lambda m: SGD(m.layer.parameters(), lr=0.1)), loader(2))
    assert callback.lrs == {"lr-SGD/pg1": [0.1] * 4, "lr-SGD/pg2": [0.2] * 2}


def test_wrong_use_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="logging_interval must be"):
        LearningRateMonitor(logging_interval="batch")
    with pytest.raises(MisconfigurationException, match="no logger"):
        fit(tmp_path, sgd, logger=False)
