"""One call of a Trainer of either framework, watched from all sides."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from tests.parity import both

LIMITS = (
    "max_epochs min_epochs max_steps min_steps limit_train_batches limit_val_batches limit_test_batches"
    " limit_predict_batches overfit_batches fast_dev_run num_sanity_val_steps val_check_interval val_check_batch"
    " check_val_every_n_epoch log_every_n_steps accumulate_grad_batches gradient_clip_val"
    " reload_dataloaders_every_n_epochs barebones enable_autolog_hparams"
).split()
PLACE = (
    "global_step current_epoch is_last_batch should_stop training validating testing predicting sanity_checking"
    " evaluating interrupted received_sigterm num_training_batches num_sanity_val_batches num_val_batches"
    " num_test_batches num_predict_batches"
).split()
MACHINE = (
    "global_rank local_rank node_rank world_size num_nodes device_ids num_devices is_global_zero precision".split()
)


class Watched(list):
    """The calls of a run; ``act(number, call)`` runs with each, from inside the hook."""

    def __init__(self, act: Callable[[int, tuple], None] | None = None) -> None:
        super().__init__()
        self.act = act

    def append(self, call: tuple) -> None:
        super().append(call)
        if self.act is not None:
            self.act(len(self) - 1, call)


@contextmanager
def listening():
    """Yield the lines logged and the warnings given, of both frameworks."""
    heard: dict[str, list[str]] = {"lines": [], "warnings": []}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard["lines"].append(record.getMessage())

    handler = Handler(level=logging.DEBUG)
    loggers = [logging.getLogger(name) for name in ("levin", "lightning.pytorch", "lightning.fabric")]
    before = [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
    finally:
        heard["warnings"] = [str(warning.message) for warning in caught]
        for logger, (level, propagates, handlers) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagates
            logger.setLevel(level)


def stops(heard: dict[str, list[str]]) -> list[str]:
    return [line for line in heard["lines"] if "stopped:" in line]


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float) and math.isfinite(value):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def view(trainer: Any, names: list[str]) -> dict[str, Any]:
    """The properties by name; an exception stands in for a value."""
    seen = {}
    for name in names:
        try:
            seen[name] = plain(getattr(trainer, name))
        except Exception as error:
            seen[name] = type(error).__name__
    return seen


def view_all(trainer: Any) -> dict[str, Any]:
    seen = view(trainer, [*LIMITS, *PLACE, *MACHINE, "callback_metrics", "logged_metrics", "progress_bar_metrics"])
    state = trainer.state
    seen["state"] = [getattr(part, "value", part) for part in (state.status, state.fn, state.stage)]
    for name in ("train_dataloader", "val_dataloaders", "test_dataloaders", "predict_dataloaders"):
        seen[name] = type(getattr(trainer, name)).__name__
    seen["has"] = [getattr(trainer, name) is not None for name in ("logger", "lightning_module", "datamodule")]
    seen["optimizers"] = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    seen["schedulers"] = len(trainer.lr_scheduler_configs)
    return seen


def recording_data(framework: SimpleNamespace, calls: list, train: Any = None, val: Any = None) -> Any:
    """A data module whose loader hooks are among the calls."""

    class Data(framework.DataModule):
        def train_dataloader(self):
            calls.append(("D", "train_dataloader"))
            return both.loader() if train is None else train

        def val_dataloader(self):
            calls.append(("D", "val_dataloader"))
            return both.loader(2, seed=5) if val is None else val

        def test_dataloader(self):
            calls.append(("D", "test_dataloader"))
            return both.loader(2, seed=6)

        def predict_dataloader(self):
            calls.append(("D", "predict_dataloader"))
            return both.loader(2, seed=7)

        def prepare_data(self):
            calls.append(("D", "prepare_data"))

        def setup(self, stage):
            calls.append(("D", "setup", stage))

        def teardown(self, stage):
            calls.append(("D", "teardown", stage))

        def on_exception(self, exception):
            calls.append(("D", "on_exception"))

        def state_dict(self):
            calls.append(("D", "state_dict"))
            return {"data": 1}

        def load_state_dict(self, state):
            calls.append(("D", "load_state_dict"))

    return Data()


def without_own_key(calls: list[tuple]) -> list[tuple]:
    """The calls, the key of the exact state left out of the checkpoints that hooks saw."""
    return [
        tuple([key for key in part if key != "levin"] if isinstance(part, list) else part for part in call)
        for call in calls
    ]


def fit(
    framework: SimpleNamespace,
    folder: Any,
    flags: dict[str, Any],
    options: dict[str, Any] | None = None,
    *,
    act: Callable[[Any, int, tuple], None] | None = None,
    train: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
) -> SimpleNamespace:
    """Fit a recording module; returns what was seen and the trainer."""
    lines = both.Lines()
    holder: list[Any] = []
    calls = Watched((lambda number, call: act(holder[0], number, call)) if act is not None else None)
    module, callback = both.recording_module(framework, calls, **(options or {}))
    error = None
    with listening() as heard:
        settings = {"max_epochs": 2, "log_every_n_steps": 1, "logger": both.recording_logger(framework, lines), **flags}
        extra = settings.pop("callbacks", [])
        trainer = both.quiet(framework, folder, callbacks=[callback, *extra], **settings)
        holder.append(trainer)
        try:
            trainer.fit(module, datamodule=recording_data(framework, calls, train, val), ckpt_path=ckpt_path)
        except BaseException as caught:
            both.caught(caught)
            error = caught
    return SimpleNamespace(
        calls=list(calls), lines=list(lines), heard=heard, trainer=trainer, module=module, error=error,
        after=view_all(trainer), weights=[p.detach().clone() for p in module.parameters()],
    )  # fmt: skip


MOMENTS = [*PLACE, "val_check_batch"]
TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def watch(seen: list[dict[str, Any]], then: Callable[[Any, int], None] | None = None) -> Any:
    """An ``act`` that notes where the trainer is at each hook, then calls ``then(trainer, number)``."""

    def act(trainer: Any, number: int, call: tuple) -> None:
        now = view(trainer, MOMENTS)
        now["stage"] = [getattr(part, "value", part) for part in (trainer.state.fn, trainer.state.stage)]
        now["batch"] = (trainer.fit_loop.batch_idx, trainer.fit_loop.total_batch_idx)
        if call[1] in TRANSFERS or call[1] == "on_exception":
            # Here a batch counts from its hooks on, there from the moment that it is drawn.
            now["batch"] = now["is_last_batch"] = now["val_check_batch"] = None
        seen.append(now)
        if then is not None:
            then(trainer, number)

    return act


def stop_at(where: int) -> Callable[[Any, int], None]:
    def then(trainer: Any, number: int) -> None:
        if number == where:
            trainer.should_stop = True

    return then


def raise_at(where: int, error: BaseException) -> Callable[[Any, int], None]:
    def then(trainer: Any, number: int) -> None:
        if number == where:
            raise error

    return then


def assert_alike(theirs: SimpleNamespace, ours: SimpleNamespace, *, values: bool = True) -> None:
    """Compare all that a user sees of two runs; ``values=False`` leaves out what was logged, but not when and under which names."""
    assert type(ours.error).__name__ == type(theirs.error).__name__, (ours.error, theirs.error)
    assert ours.calls == theirs.calls
    assert stops(ours.heard) == stops(theirs.heard)
    if values:
        assert ours.lines == theirs.lines
        for ours_now, theirs_now in zip(ours.weights, theirs.weights):
            torch.testing.assert_close(ours_now, theirs_now)
    else:
        assert [step for step, *_ in ours.lines] == [step for step, *_ in theirs.lines]
    metrics = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
    # After a failure the values of the batch that failed are still read here, there those of the one before.
    hidden = (*metrics, "is_last_batch", "val_check_batch") if theirs.error is not None else ()
    for name, value in theirs.after.items():
        if name in hidden:
            continue
        if name in metrics and not values:
            assert sorted(ours.after[name]) == sorted(value), name
        else:
            assert ours.after[name] == value, name
