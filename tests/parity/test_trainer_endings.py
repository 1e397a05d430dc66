"""How a call ends: limits, requests to stop, exceptions, interrupts; what is said and who is told."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.parity import both
from tests.parity.trainer_runs import Watched, fit, listening, recording_data, stops, view_all

LIMITS = [
    {"max_epochs": 2}, {"max_epochs": 0}, {"max_steps": 3, "max_epochs": -1}, {"max_steps": 0}, {"max_steps": 8, "max_epochs": 2},
    {"max_steps": 5, "max_epochs": 1}, {"limit_train_batches": 0}, {"max_epochs": 1, "min_epochs": 3},
    {"max_epochs": 3, "min_steps": 100}, {"max_epochs": 0, "limit_train_batches": 0}, {"fast_dev_run": True},
    {"max_epochs": -1, "max_steps": 6, "accumulate_grad_batches": 2}, {"max_time": "00:00:00:00", "max_epochs": 3},
    {"max_steps": 0, "val_check_interval": 0},
]  # fmt: skip


@pytest.mark.parametrize("flags", LIMITS, ids=str)
def test_the_line_that_says_why_training_ended(tmp_path, flags):
    theirs = fit(both.lightning(), tmp_path, flags)
    ours = fit(both.levin(), tmp_path, flags)
    assert stops(ours.heard) == stops(theirs.heard)
    assert ours.calls == theirs.calls
    assert ours.after == theirs.after


def test_no_batches_are_said(tmp_path):
    for framework in (both.lightning(), both.levin()):
        module, _ = both.recording_module(framework, [])
        with listening() as heard:
            both.quiet(framework, tmp_path, max_epochs=1).fit(module, DataLoader(TensorDataset(torch.empty(0, 4))))
        assert stops(heard) == ["`Trainer.fit` stopped: No training batches."]


@pytest.mark.parametrize(
    "flags", [{}, {"max_steps": 2}, {"max_epochs": -1, "max_steps": 2}, {"max_time": "00:00:00:00"}]
)
def test_a_thousand_epochs_by_default_with_a_warning(tmp_path, flags):
    results = []
    for framework in (both.lightning(), both.levin()):
        module, _ = both.recording_module(framework, [])
        trainer = both.quiet(framework, tmp_path, **flags)
        before = trainer.max_epochs
        with listening() as heard:

            def stop(trainer=trainer):
                trainer.should_stop = True

            module.on_train_batch_end = lambda *args, stop=stop: stop()
            trainer.fit(module, both.loader(2))
        said = sum("max_epochs" in line and "1000" in line for line in heard["warnings"])
        results.append((before, trainer.max_epochs, trainer.min_epochs, said))
    assert results[0] == results[1]


@pytest.mark.parametrize("minimum", [{"min_epochs": 3}, {"min_steps": 7}, {"min_epochs": 2, "min_steps": 3}])
def test_minima_delay_a_stop_and_say_so_once(tmp_path, minimum):
    results = []
    for framework in (both.lightning(), both.levin()):
        run = fit(framework, tmp_path, {"max_epochs": 5, **minimum}, {"stop_at": (0, 1)})
        said = [line for line in run.heard["lines"] if "signaled to stop" in line]
        assert len(said) == 1
        results.append((run.calls, said, run.trainer.should_stop, stops(run.heard)))
    assert results[0] == results[1]


@pytest.mark.parametrize("answer", [-1, None, 0])
def test_on_train_batch_start_may_end_the_epoch(tmp_path, answer):
    results = []
    for framework in (both.lightning(), both.levin()):
        calls: list = []
        module, callback = both.recording_module(framework, calls)
        module.on_train_batch_start = lambda batch, batch_idx: answer if batch_idx == 2 else None
        trainer = both.quiet(framework, tmp_path, max_epochs=2, callbacks=[callback])
        with listening():
            trainer.fit(module, both.loader(), both.loader(2))
        results.append((calls, view_all(trainer)))
    assert results[0] == results[1]


def test_stop_iteration_in_the_step_ends_the_epoch(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        calls: list = []
        module, callback = both.recording_module(framework, calls)
        step = module.training_step

        def training_step(batch, batch_idx, step=step):
            if batch_idx == 2:
                raise StopIteration
            return step(batch, batch_idx)

        module.training_step = training_step
        trainer = both.quiet(framework, tmp_path, max_epochs=2, callbacks=[callback])
        with listening():
            trainer.fit(module, both.loader(), both.loader(2))
        results.append((calls, view_all(trainer)))
    assert results[0] == results[1]


ERRORS = [ValueError("meant"), RuntimeError("meant"), SystemExit(3)]
WHERE = [
    ("fit", "setup"), ("fit", "prepare_data"), ("fit", "configure_optimizers"), ("fit", "on_fit_start"), ("fit", "on_train_start"),
    ("fit", "validation_step"), ("fit", "training_step"), ("fit", "on_train_end"), ("fit", "teardown"), ("fit", "on_fit_end"),
    ("validate", "validation_step"), ("test", "test_step"), ("test", "on_test_epoch_end"), ("predict", "on_predict_batch_end"),
    ("predict", "setup"), ("validate", "teardown"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("method", "hook"), WHERE)
def test_who_is_told_of_an_exception(tmp_path, method, hook, error):
    results = []
    for framework in (both.lightning(), both.levin()):
        raised = []

        def act(number, call, raised=raised):
            if call[1] == hook and not raised:
                raised.append(call)
                raise error

        calls = Watched(act)
        lines = both.Lines()
        module, callback = both.recording_module(framework, calls)
        data = recording_data(framework, calls)
        logger = both.recording_logger(framework, lines)
        trainer = both.quiet(framework, tmp_path, max_epochs=1, callbacks=[callback], logger=logger)
        with listening(), pytest.raises(type(error)) as caught:
            getattr(trainer, method)(module, datamodule=data)
        assert caught.value is error and raised
        after = view_all(trainer)
        for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics", "is_last_batch"):
            after.pop(name)
        results.append(
            (list(calls), [line for line in lines if line[0] in ("finalize", "hparams")], after, trainer.interrupted)
        )
    assert results[0] == results[1]
    assert results[1][3]


def test_an_exception_in_on_exception_does_not_hide_the_teardown(tmp_path):
    for framework in (both.lightning(), both.levin()):
        module, _ = both.recording_module(framework, [], raise_at=0)

        class Broken(framework.Callback):
            def on_exception(self, trainer, module, exception):
                raise KeyError("second")

        trainer = both.quiet(framework, tmp_path, max_epochs=1, callbacks=[Broken()])
        with listening(), pytest.raises(KeyError, match="second"):
            trainer.fit(module, both.loader())
        assert trainer.interrupted


def test_on_exception_reads_the_values_of_the_failing_batch(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        seen: list = []

        class Reads(framework.Callback):
            def on_exception(self, trainer, module, exception, seen=seen):
                seen.append((sorted(trainer.callback_metrics), trainer.state.status.value, trainer.state.stage.value))

        module, _ = both.recording_module(framework, [], raise_at=2)
        trainer = both.quiet(framework, tmp_path, max_epochs=1, callbacks=[Reads()], num_sanity_val_steps=0)
        with listening(), pytest.raises(ValueError, match="meant"):
            trainer.fit(module, both.loader(), both.loader(2))
        results.append(seen)
    assert results[0] == results[1]


PROGRAM = """
    import logging, signal, sys, torch, warnings
    warnings.simplefilter("ignore")
    sys.path.insert(0, {root!r})
    from tests.parity import both
    framework = both.{name}()
    calls = []
    module, callback = both.recording_module(framework, calls)
    def step(batch, batch_idx):
        if batch_idx == 1:
            raise KeyboardInterrupt
        return module.layer(batch[0]).sum()
    module.training_step = step
    import pathlib
    trainer = both.quiet(framework, pathlib.Path({folder!r}), max_epochs=1, callbacks=[callback], num_sanity_val_steps=0)
    try:
        trainer.fit(module, both.loader())
        print("returned")
    finally:
        told = [call[1] for call in calls if call[1] in ("on_exception", "teardown")]
        print(told, trainer.state.status.value, trainer.interrupted, signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
"""


def test_an_interrupt_ends_with_exit_code_1(tmp_path):
    import tests

    root = str(__import__("pathlib").Path(tests.__file__).parents[1])
    ends = []
    for name in ("lightning", "levin"):
        code = textwrap.dedent(PROGRAM.format(root=root, name=name, folder=str(tmp_path)))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        ends.append((done.returncode, done.stdout.strip().splitlines()[-1]))
        assert "Detected KeyboardInterrupt, attempting graceful shutdown" in done.stderr + done.stdout
    assert ends[0] == ends[1] == (1, "['on_exception'] interrupted True False")


@pytest.fixture
def slow_clock(monkeypatch):
    """A clock that goes on by ten seconds a batch."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("interval", ["00:00:00:15", timedelta(seconds=25), {"seconds": 35}, "00:00:00:00"], ids=str)
@pytest.mark.parametrize("every", [1, 2, None])
def test_validation_by_the_clock(tmp_path, slow_clock, interval, every):
    results = []
    for framework in (both.lightning(), both.levin()):
        slow_clock[0] = 1000.0

        def act(trainer, number, call, clock=slow_clock):
            if call[:2] == ("M", "training_step"):
                clock[0] += 10

        flags = {"max_epochs": 4, "val_check_interval": interval, "check_val_every_n_epoch": every, "logger": False}
        run = fit(framework, tmp_path, flags, act=act)
        assert run.error is None, run.error
        results.append(run.calls)
    assert results[0] == results[1]


def test_sigint_is_left_alone_by_a_good_run(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for framework in (both.lightning(), both.levin()):
        fit(framework, tmp_path, {"max_epochs": 1})
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_where_inference_mode_is_used(tmp_path, method, mode):
    results = []
    for framework in (both.lightning(), both.levin()):
        seen: list = []
        hooks = {
            "on_validation_start",
            "validation_step",
            "test_step",
            "on_predict_batch_start",
            "on_train_batch_start",
            "on_fit_end",
            "on_train_epoch_end",
            "on_validation_epoch_end",
            "on_sanity_check_end",
        }

        def act(number, call, seen=seen):
            if call[1] in hooks:
                seen.append((call[1], torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

        module, callback = both.recording_module(framework, Watched(act))
        trainer = both.quiet(framework, tmp_path, max_epochs=1, inference_mode=mode, callbacks=[callback])
        with listening():
            getattr(trainer, method)(module, both.loader(2), *([both.loader(2)] if method == "fit" else []))
        results.append((seen, torch.is_grad_enabled()))
    assert results[0] == results[1]
    if method == "fit":
        assert not any(inference for _, inference, _ in results[1][0])


@pytest.mark.parametrize("flags", [{}, {"detect_anomaly": True}])
def test_detect_anomaly_holds_for_training_only(tmp_path, flags):
    results = []
    for framework in (both.lightning(), both.levin()):
        seen: list = []

        def act(number, call, seen=seen):
            seen.append((call[1], torch.is_anomaly_enabled()))

        module, callback = both.recording_module(framework, Watched(act))
        with listening() as heard:
            trainer = both.quiet(framework, tmp_path, max_epochs=1, callbacks=[callback], **flags)
            trainer.fit(module, both.loader(2), both.loader(2))
        results.append((seen, sum("You have turned on" in line for line in heard["lines"])))
    assert results[0] == results[1]
