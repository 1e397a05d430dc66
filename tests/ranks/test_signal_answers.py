"""What each signal does, in this process and with stand-ins for a run and its launcher."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from levin.environments import SLURMEnvironment
from levin.ranks import signals
from levin.ranks.signals import Signals, as_ended, second_interrupt_ends, signal_handlers
from levin.utilities.exceptions import SIGTERMException

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the signals of POSIX")


class Exited(BaseException):
    """In the place of the end of this process."""


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands still; ending the process raises, with the status."""

    def end(status):
        raise Exited(status)

    monkeypatch.setattr(os, "_exit", end)
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.s)
    return now


@pytest.fixture(autouse=True)
def handlers():
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGCHLD)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Calls(list):
    """Notes what is called, by name."""

    def noting(self, name, result=None):
        return lambda *args: self.append((name, *args)) or result


def a_run(calls, has_launcher=True, runs_elsewhere=False, **more):
    launcher = SimpleNamespace(kill=calls.noting("kill"), runs_elsewhere=runs_elsewhere) if has_launcher else None
    strategy = SimpleNamespace(
        launcher=launcher, cluster_environment=None, is_global_zero=True, finish_saves=calls.noting("finish"),
        reduce_boolean_decision=lambda decision, all: decision if all is False else None, broadcast=lambda obj: obj,
    )  # fmt: skip
    return SimpleNamespace(
        signals=Signals(), told=SimpleNamespace(received_sigterm=False), strategy=strategy,
        settings=SimpleNamespace(fast_dev_run=False, default_root_dir="root"), state=SimpleNamespace(fn="fit"),
        trainer=SimpleNamespace(save_checkpoint=calls.noting("save"), global_step=0), checkpoint_callbacks=[],
        loggers=[SimpleNamespace(finalize=calls.noting("finalize"))], **more,
    )  # fmt: skip


def test_before_batches_a_request_ends_the_run_and_the_processes_that_it_started(clock):
    calls = Calls()
    run = a_run(calls)
    signal.signal(signal.SIGTERM, calls.noting("own"))
    with signal_handlers(run):
        with pytest.raises(SIGTERMException):
            signal.raise_signal(signal.SIGTERM)
        # The same request, which a launcher has forwarded.
        clock.s = 1.0
        signal.raise_signal(signal.SIGTERM)
        assert [call[:2] for call in calls] == [
            ("kill", signal.SIGTERM),
            ("own", signal.SIGTERM),
            ("own", signal.SIGTERM),
        ]
        assert run.told.received_sigterm
        clock.s = 1.01
        with pytest.raises(Exited, match="143"):
            signal.raise_signal(signal.SIGTERM)
    assert len(calls) == 3
    signal.raise_signal(signal.SIGTERM)
    assert calls[3][0] == "own"


@pytest.mark.parametrize(
    ("has_launcher", "runs_elsewhere", "is_forwarded"),
    [(True, False, False), (True, True, True), (False, False, False)],
)
def test_a_request_that_waits_for_a_batch_is_forwarded_to_processes_that_agree_on_nothing(
    clock, has_launcher, runs_elsewhere, is_forwarded
):
    calls = Calls()
    run = a_run(calls, has_launcher, runs_elsewhere)
    run.signals.waits_for_batch = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with signal_handlers(run):
        signal.raise_signal(signal.SIGTERM)
    assert calls == [("kill", signal.SIGTERM)] * is_forwarded
    assert run.told.received_sigterm and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_job_that_is_in_the_queue_again_heeds_no_request(clock, caplog):
    calls = Calls()
    run = a_run(calls)
    run.signals.is_requeued = True
    with caplog.at_level(logging.INFO, "levin"), signal_handlers(run):
        signal.raise_signal(signal.SIGTERM)
    assert caplog.messages == ["SIGTERM is not heeded: the job is saved and in the queue again."]
    assert not calls and not run.told.received_sigterm


def test_a_process_that_was_forked_off_ends_as_if_there_were_no_handler(monkeypatch):
    calls = Calls()
    run = a_run(calls)
    monkeypatch.setattr(os, "kill", calls.noting("send"))
    with signal_handlers(run):
        monkeypatch.setattr(os, "getpid", lambda: 2**30)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert calls == [("send", 2**30, signal.SIGTERM)] and not run.told.received_sigterm


def test_what_torch_does_at_the_end_of_a_worker_is_undone_by_a_request(clock):
    def of_torch(number, frame):
        pass

    run = a_run(Calls())
    run.signals.waits_for_batch = True
    for module, expected in (("torch.utils.data", signal.SIG_DFL), ("mine", of_torch)):
        of_torch.__module__ = module
        signal.signal(signal.SIGCHLD, of_torch)
        run.told.received_sigterm = False
        with signal_handlers(run):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGCHLD) is expected


@pytest.mark.parametrize("waits", [False, True])
def test_slurms_signal_asks_for_a_requeue(caplog, waits):
    run = a_run(Calls())
    run.strategy.cluster_environment = SLURMEnvironment()
    run.signals.waits_for_batch = waits
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with caplog.at_level(logging.INFO, "levin"), signal_handlers(run):
        if waits:
            signal.raise_signal(signal.SIGUSR1)
        else:
            with pytest.raises(SIGTERMException):
                signal.raise_signal(signal.SIGUSR1)
    assert caplog.messages == ["SLURM requeues this job after SIGUSR1."]
    assert run.signals.wants_requeue and run.told.received_sigterm
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_of_slurms_signal_the_users_handler_stays_and_a_forked_process_hears_nothing(caplog, monkeypatch):
    calls = Calls()
    run = a_run(calls)
    run.strategy.cluster_environment = SLURMEnvironment()
    signal.signal(signal.SIGUSR1, own := calls.noting("own"))
    with caplog.at_level(logging.INFO, "levin"), signal_handlers(run):
        signal.raise_signal(signal.SIGUSR1)
    assert caplog.messages == ["There is a handler for SIGUSR1 already: levin does not requeue the job."]
    assert calls[0][0] == "own" and not run.signals.wants_requeue and signal.getsignal(signal.SIGUSR1) is own
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with signal_handlers(run):
        monkeypatch.setattr(os, "getpid", lambda: 2**30)
        signal.raise_signal(signal.SIGUSR1)
    assert not run.signals.wants_requeue and not run.told.received_sigterm
    for environment in (SLURMEnvironment(auto_requeue=False), None):
        run.strategy.cluster_environment = environment
        with signal_handlers(run):
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


DEFAULT = signal.default_int_handler


@pytest.mark.parametrize(
    ("previous", "presses", "ended_s"),
    [
        # The shutdown is the answer to a first one, at 0.
        (None, [0.5, 1.0, 99.0], None),
        (None, [0.5, 1.2], 1.2),
        # A KeyboardInterrupt only begins to be an answer.
        (DEFAULT, [5.0, 5.5, 6.0], None),
        (DEFAULT, [5.0, 6.5], 6.5),
        # The user's handler has answered all of them, or not the last two.
        (print, [2.0, 4.0, 6.0], None),
        (print, [0.0, 0.3, -2.0, -3.0], None),
        (print, [0.0, 0.3, -2.0, -3.5], 3.5),
    ],
)  # fmt: skip
def test_the_second_interrupt_ends_what_has_not_answered_the_first(clock, previous, presses, ended_s):
    calls = Calls()
    own = calls.noting("own") if previous is print else previous
    interrupts = signals._Interrupts(SimpleNamespace(kill=calls.noting("kill")), own)
    left = list(presses)

    class Reader:
        """Gives a press at a time, which the main thread comes to unless it is negative; other signals between them."""

        def recv(self, num):
            if not left:
                return b""
            clock.s = abs(left[0])
            if previous is print and left[0] >= 0:
                interrupts.answer(signal.SIGINT, None)
            del left[0]
            return bytes([signal.SIGINT if clock.s < 50 else signal.SIGTERM])

        def close(self):
            calls.append(("close",))

    if ended_s is None:
        interrupts.watch(Reader())
        assert calls[-1] == ("close",)
        assert ("kill", signal.SIGKILL) not in calls
    else:
        with pytest.raises(Exited, match="130"):
            interrupts.watch(Reader())
        assert calls[-1] == ("kill", signal.SIGKILL) and clock.s == ended_s


def test_ctrl_c_works_as_before_around_a_shutdown():
    def inside():
        return signal.getsignal(signal.SIGINT), any(
            thread.name == "levin-interrupt" for thread in threading.enumerate()
        )

    signal.signal(signal.SIGINT, DEFAULT)
    with second_interrupt_ends(None, is_shutdown=True):
        signal.raise_signal(signal.SIGINT)
        assert inside() != (DEFAULT, False) and inside()[1]
    assert inside() == (DEFAULT, False) and signal.set_wakeup_fd(-1) == -1
    with pytest.raises(KeyboardInterrupt), second_interrupt_ends(None, is_shutdown=False):
        signal.raise_signal(signal.SIGINT)
    assert inside() == (DEFAULT, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with second_interrupt_ends(None, is_shutdown=False):
        assert inside() == (signal.SIG_IGN, False)
    with second_interrupt_ends(None, is_shutdown=True):
        assert inside()[1]
    found = []

    def elsewhere():
        with second_interrupt_ends(None, is_shutdown=True):
            found.append(inside())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(signal.SIG_IGN, False)]


def lost(text: str) -> Exception:
    error = KeyError("thread")
    error.__context__ = RuntimeError(text)
    return error


@pytest.mark.parametrize(
    ("error", "told", "runs_elsewhere", "is_ended"),
    [
        (RuntimeError("a process has ended"), True, True, True),
        (RuntimeError("a process has ended"), False, True, False),
        (RuntimeError("a process has ended"), True, False, False),
        (RuntimeError("a process has ended"), True, None, False),
        (KeyError("x"), True, True, False),
        (lost("DataLoader worker (pid 1) is killed"), True, False, True),
        (lost("DataLoader worker (pid 1) is killed"), False, False, False),
        (lost("another"), True, False, False),
        (SIGTERMException(), True, True, False),
    ],
)
def test_an_error_that_a_request_has_caused_elsewhere_is_the_end_that_was_asked_for(
    error, told, runs_elsewhere, is_ended
):
    run = a_run(Calls(), runs_elsewhere is not None, bool(runs_elsewhere))
    run.told.received_sigterm = told
    found = as_ended(run, error)
    assert (type(found) is SIGTERMException and found is not error) if is_ended else found is error


ASKED = ("requeue",)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"wants": True}, [("save", "root/hpc_ckpt_4.ckpt"), ("finish",), ("finalize", "finished"), ASKED]),
        ({"wants": True, "is_zero": False}, [("save", "root/hpc_ckpt_4.ckpt"), ("finish",), ("finalize", "finished")]),
        ({"wants": True, "fn": "test"}, [("finalize", "finished"), ASKED]),
        ({"wants": True, "fn": "test", "step": 3}, [("save", "root/hpc_ckpt_4.ckpt"), ("finish",), ("finalize", "finished"), ASKED]),
        ({"wants": True, "is_looping": False}, [ASKED]),
        ({"wants": True, "is_looping": False, "is_zero": False}, []),
        ({"wants": True, "is_looping": False, "is_before": False}, []),
        ({"is_looping": False}, []),
        ({"wants": True, "fast": True}, []),
        ({"callbacks": [{"dirpath": "a"}, {"dirpath": "b"}]}, [("save", "a/sigterm.ckpt"), ("finish",)]),
        ({"callbacks": [{"dirpath": "a", "save_weights_only": True}, {"dirpath": "b"}]}, [("save", "b/sigterm.ckpt"), ("finish",)]),
        ({"callbacks": [{"dirpath": None}, {}]}, [("save", "root/sigterm.ckpt"), ("finish",)]),
        ({"callbacks": [{"dirpath": "a"}], "fn": "validate", "step": 3}, []),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_saved_and_asked_for_when_a_run_is_to_end(monkeypatch, tmp_path, caplog, change, expected):
    calls = Calls()
    run = a_run(calls)
    monkeypatch.setattr(signals, "requeue", calls.noting("requeue"))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "hpc_ckpt_3.ckpt").touch()
    run.signals.wants_requeue = change.get("wants", False)
    run.signals.is_looping = change.get("is_looping", True)
    run.signals.is_before_training = change.get("is_before", True)
    run.strategy.is_global_zero = change.get("is_zero", True)
    run.state.fn, run.trainer.global_step = change.get("fn", "fit"), change.get("step", 0)
    run.settings.fast_dev_run = change.get("fast", False)
    run.checkpoint_callbacks = [SimpleNamespace(**attributes) for attributes in change.get("callbacks", ())]
    with caplog.at_level(logging.INFO, "levin"):
        signals.save_for_restart(run)
    assert calls == expected
    assert run.signals.is_requeued == (ASKED in calls or ("finalize", "finished") in calls)
    saved = [
        f"Saved a checkpoint to {call[1]}, from which fit(ckpt_path='auto') goes on."
        for call in calls
        if call[0] == "save"
    ]
    assert caplog.messages == (saved if "callbacks" in change else [])


def test_the_first_file_of_a_requeued_job_has_number_one(tmp_path):
    assert signals._next_hpc_path(str(tmp_path)) == str(tmp_path / "hpc_ckpt_1.ckpt")


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("exit 0", {"SLURM_JOB_ID": "77"}, "Requeued job 77."),
        ("exit 0", {"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"}, "Requeued job 70_7."),
        ("exit 0", {"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "70"}, "Requeued job 77."),
        (
            "echo no >&2; exit 3", {"SLURM_JOB_ID": "77"},
            "'scontrol requeue 77' ended with status 3: no Requeue the job yourself.",
        ),
        (
            None, {},
            "'scontrol requeue ' failed: [Errno 2] No such file or directory: 'scontrol'. Requeue the job yourself.",
        ),
    ],
)  # fmt: skip
def test_a_requeue_tells_what_came_of_it(monkeypatch, tmp_path, caplog, script, variables, message):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if script is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "levin"):
        signals.requeue()
    assert caplog.messages == [message]
    assert caplog.records[0].levelname == ("INFO" if message.startswith("Requeued") else "ERROR")
