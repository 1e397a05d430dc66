"""What a run does when it is told to end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import levin
from levin import Callback, LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
from levin.checkpoint.verify import verify
from levin.ranks.signals import FILE_NAME, Signals, listen_for_sigterm
from tests.checkpoint.exact_runs import Run, Setup, differences, first_difference

ROOT = Path(__file__).parents[2]
SOURCE = Path(levin.__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the signals of POSIX")


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Tell(Callback):
    """Sends a signal to this very process at a hook, and notes what is called afterwards."""

    def __init__(self, hook: str, number: int = signal.SIGTERM) -> None:
        self.number, self.calls = number, []
        setattr(self, hook, self.tell)

    def tell(self, *args, **kwargs) -> None:
        if not self.calls:
            self.calls.append("told")
            os.kill(os.getpid(), self.number)

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.calls.append(type(exception).__name__)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.calls:
            self.calls.append(f"batch {batch_idx}")


def fit(tmp_path, callbacks, fn="fit", **flags):
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(tmp_path), callbacks=callbacks, **flags,
    )  # fmt: skip
    loaders = [DataLoader(torch.ones(4, 2)), DataLoader(torch.ones(3, 2))]
    with pytest.raises(SystemExit) as found:
        getattr(trainer, fn)(Model(), *(loaders if fn == "fit" else loaders[1:]))
    assert found.value.code == 143
    assert trainer.interrupted
    return trainer


def test_the_batch_is_finished_and_the_run_saved(tmp_path):
    tell = Tell("on_before_zero_grad")
    fit(tmp_path, [tell, ModelCheckpoint(tmp_path / "kept")])
    assert tell.calls == ["told", "SIGTERMException"]
    verify(tmp_path / "kept" / FILE_NAME)
    assert torch.load(tmp_path / "kept" / FILE_NAME)["global_step"] == 1


class LostWorker(Tell):
    """Is told, and then what torch raises of a worker that was told as well is lost on its way in another error."""

    def tell(self, *args, **kwargs) -> None:
        super().tell()
        try:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated. ")
        except RuntimeError:
            {}["thread"]


def test_a_worker_that_was_told_as_well_is_no_error_wherever_torch_tells_of_it(tmp_path):
    tell = LostWorker("on_before_zero_grad")
    fit(tmp_path, [tell, ModelCheckpoint(tmp_path / "kept")])
    assert tell.calls == ["told", "SIGTERMException"]
    verify(tmp_path / "kept" / FILE_NAME)
    tell.calls, tell.number = [], 0  # tells nobody
    with pytest.raises(KeyError):
        fit(tmp_path, [tell], enable_checkpointing=False)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_auto_goes_on_from_it(tmp_path):
    fit(tmp_path, [Tell("on_before_zero_grad"), ModelCheckpoint(tmp_path / "kept")])
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(tmp_path), callbacks=[ModelCheckpoint(tmp_path / "kept")],
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(torch.ones(4, 2)), DataLoader(torch.ones(3, 2)), ckpt_path="auto")
    assert trainer.ckpt_path == str(tmp_path / "kept" / FILE_NAME)
    assert trainer.global_step == 4


def test_without_a_checkpoint_callback_nothing_is_saved(tmp_path):
    fit(tmp_path, [Tell("on_before_zero_grad")], enable_checkpointing=False)
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_the_folder_of_weights_alone_is_not_used(tmp_path):
    fit(tmp_path, [Tell("on_before_zero_grad"), ModelCheckpoint(tmp_path / "kept", save_weights_only=True)])
    assert (tmp_path / FILE_NAME).exists()


class NotesWhatFollows(Tell):
    """Is told, and notes whether the hook is gone on with."""

    def tell(self, *args, **kwargs) -> None:
        super().tell()
        self.calls.append("went on")


@pytest.mark.parametrize("hook", ["setup", "on_sanity_check_start", "on_fit_start"])
def test_before_training_the_run_ends_at_once_and_there_is_nothing_to_save(tmp_path, hook):
    tell = NotesWhatFollows(hook)
    fit(tmp_path, [tell, ModelCheckpoint(tmp_path / "kept")])
    # The sanity check has batches, after which it asks.
    assert tell.calls == ["told", *["went on"] * (hook == "on_sanity_check_start"), "SIGTERMException"]
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_validation_alone_ends_after_its_batch(tmp_path):
    tell = Tell("on_validation_batch_start")
    fit(tmp_path, [tell], fn="validate", enable_checkpointing=False)
    assert tell.calls == ["told", "SIGTERMException"]


def test_handlers_of_the_user_are_called_and_come_back(tmp_path):
    seen = []

    def own(number, frame):
        seen.append(number)

    def of_children(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own), signal.signal(signal.SIGCHLD, of_children)
    try:
        fit(tmp_path, [Tell("on_before_zero_grad")], enable_checkpointing=False)
        assert signal.getsignal(signal.SIGTERM) is own and signal.getsignal(signal.SIGCHLD) is of_children
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGCHLD, before[1])
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize("is_forked", [False, True])
def test_a_run_around_this_one_is_told_too_unless_it_is_of_the_process_that_forked_this_one(monkeypatch, is_forked):
    runs = [
        SimpleNamespace(
            signals=Signals(), told=SimpleNamespace(received_sigterm=False), strategy=SimpleNamespace(launcher=None)
        )
        for _ in range(2)
    ]
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        for run in runs:
            run.signals.waits_for_batch = True
            listen_for_sigterm(run)
            if is_forked and run is runs[0]:
                monkeypatch.setattr(os, "getpid", lambda: 2**30)  # no process has such a number
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [run.told.received_sigterm for run in runs] == [not is_forked, True] and seen == [signal.SIGTERM]


def test_in_another_thread_no_handler_is_put_in_place():
    before, seen = signal.getsignal(signal.SIGTERM), []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(signal.getsignal(signal.SIGTERM))

    def work():
        Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Look()],
        ).fit(Model(), DataLoader(torch.ones(2, 2)), DataLoader(torch.ones(3, 2)))  # fmt: skip

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_what_fails_to_be_saved_does_not_keep_the_hooks_from_being_called(tmp_path, monkeypatch, caplog):
    tell = Tell("on_before_zero_grad")
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda *args: 1 / 0)
    fit(tmp_path, [tell, ModelCheckpoint(tmp_path / "kept")])
    assert tell.calls == ["told", "SIGTERMException"]
    assert "was not saved: ZeroDivisionError" in caplog.text


class TellRun(Callback):
    def __init__(self, moment: str, number: int) -> None:
        self.moment, self.number = moment, number
        setattr(self, moment, self.come)

    def come(self, trainer, *args) -> None:
        if not trainer.sanity_checking:
            self.number -= 1
            if self.number == 0:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("moment", "number"),
    [("on_train_batch_start", 3), ("on_train_batch_end", 4), ("on_validation_batch_end", 3), ("on_train_epoch_end", 1)],
)
def test_the_run_that_goes_on_is_the_unbroken_one(tmp_path, moment, number):
    setup = Setup(keeps=True, accumulate=2)
    unbroken = Run(setup, tmp_path / "unbroken", "never", 0, stops=False, is_last=False)
    assert unbroken.go()
    stopped = Run(
        setup, tmp_path / "stopped", "never", 0, stops=False, is_last=False, more=(TellRun(moment, number),)
    )  # fmt: skip
    with pytest.raises(SystemExit):
        stopped.go()
    resumed = Run(setup, tmp_path / "stopped", "never", 0, stops=False, is_last=False)
    assert resumed.go("auto")
    assert Path(resumed.trainer.ckpt_path).name == FILE_NAME
    if moment != "on_validation_batch_end":  # which is begun again
        told = [event for event in stopped.events if event != ("on_save_checkpoint",)]
        events = [event for event in unbroken.events if event != ("on_save_checkpoint",)]
        going_on = [event for event in resumed.after_start() if event != ("on_save_checkpoint",)]
        assert not (found := first_difference(events, told + going_on)), found
    assert not (lines := differences(unbroken.state(), resumed.state())), "\n".join(lines)


PROGRAM = """
import os, sys, time, torch, warnings
warnings.simplefilter("ignore")
from torch.utils.data import DataLoader
from levin import LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
torch.set_num_threads(1)
folder, kind = sys.argv[1:]

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        print("step", self.trainer.global_step, flush=True)
        time.sleep({"hangs": 30, "slurm": 0.05, "slurm again": 0.0}[kind])
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

plugins = []
if kind.startswith("slurm") and "is_found" not in os.environ:
    from levin.environments import SLURMEnvironment
    plugins = [SLURMEnvironment()]
trainer = Trainer(accelerator="cpu", devices=1, max_steps=300, logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, plugins=plugins)
trainer.fit(Model(), DataLoader(torch.ones(2000, 2)))
print("resumed from", trainer.ckpt_path, "at", trainer.global_step)
"""


def start(tmp_path, kind, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
    )  # fmt: skip
    while not (line := process.stdout.readline()).startswith("step"):
        assert line, process.stderr.read()
    return process


def test_a_second_request_ends_the_process_at_once(tmp_path):
    process = start(tmp_path, "hangs")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a launcher that sends it on besides the scheduler
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert list(tmp_path.rglob("*.ckpt")) == []


INTERRUPTED = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from torch.utils.data import DataLoader
from levin import Callback, LightningModule, Trainer

class Stuck(Callback):
    def on_exception(self, trainer, pl_module, exception):
        print("stuck", os.getpid(), flush=True)
        torch.distributed.HashStore().wait(["never"])  # in C, where no handler runs

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            print("step", os.getpid(), flush=True)
        time.sleep(0.1)
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, callbacks=[Stuck()]).fit(Model(), DataLoader(torch.ones(9000, 2)))
"""


def test_ctrl_c_pressed_again_ends_a_shutdown_that_waits_for_another_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(SOURCE)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        for word in ("step", "stuck"):
            while not (line := process.stdout.readline()).startswith(word):
                assert line, f"ended before {word}"
            if word == "step":
                os.killpg(process.pid, signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        told_s = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        # By itself or by the signal: a shell says 130 either way.
        assert process.wait(timeout=60) in (130, -signal.SIGINT)
        assert time.monotonic() - told_s < 20
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


IN_SET_UP = """
import os, signal, sys
from levin import LightningModule, Trainer
from levin.demos.boring_classes import BoringModel

class Told(BoringModel):
    def told(self, where):
        if sys.argv[1] == where:
            os.kill(os.getpid(), signal.SIGUSR1)

    def setup(self, stage):
        self.told("set-up")

    def validation_step(self, batch, batch_idx):
        self.told("sanity check")

    def on_fit_end(self):
        self.told("end")

Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False).fit(Told())
"""


@pytest.fixture
def slurm(tmp_path):
    """Variables of a job of SLURM with one task, whose ``scontrol`` writes down what it is asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (programs / "scontrol").chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train",
    }  # fmt: skip


def run_job(program: str, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *words], cwd=cwd, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(SOURCE), **variables},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("where", "asked"), [("set-up", "requeue 77\n"), ("sanity check", "requeue 77\n"), ("end", "")]
)
def test_a_job_that_has_not_trained_yet_is_put_back_as_it_is(tmp_path, slurm, where, asked):
    done = run_job(IN_SET_UP, where, cwd=tmp_path, **slurm)
    assert done.returncode == (143 if asked else 0), done.stderr
    assert ((tmp_path / "asked").read_text() if asked else "") == asked and (tmp_path / "asked").exists() == bool(asked)
    assert not list(tmp_path.glob("hpc_ckpt_*"))


IN_EVALUATION = """
import os, signal, sys
from levin import Trainer
from levin.demos.boring_classes import BoringModel

fn, before = sys.argv[1:]

class Told(BoringModel):
    where = before

    def told(self, where):
        if where == self.where and "SLURM_RESTART_COUNT" not in os.environ:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_batch_start(self, *args):
        print("trains", flush=True)

    def setup(self, stage):
        self.told(f"set-up of {stage}")

    def evaluate(self, batch, batch_idx):
        if trainer.state.fn == fn and batch_idx == 1:
            self.told("fit")
            self.told("weights")
        return self(batch).sum()

    validation_step = test_step = predict_step = evaluate

options = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
               enable_model_summary=False)
trainer = Trainer(max_epochs=2, limit_train_batches=2, limit_val_batches=3, limit_test_batches=3, limit_predict_batches=3, **options)
model = Told()
if before != "weights":
    trainer.fit(model)
    path = None
else:
    other = Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0, **options)
    other.fit(model)
    path = "weights.ckpt"
    other.save_checkpoint(path)
print("evaluates", flush=True)
getattr(trainer, fn)(model, ckpt_path=path)
print("all is done")
"""


@pytest.mark.parametrize("fn", ["test", "predict"])
def test_a_job_in_an_evaluation_is_put_back_and_trains_no_second_time(tmp_path, slurm, fn):
    done = run_job(IN_EVALUATION, fn, "fit", cwd=tmp_path, **slurm)
    assert done.returncode == 143, done.stderr
    assert done.stdout.split() == ["trains"] * 4 + ["evaluates"]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    verify(tmp_path / "hpc_ckpt_1.ckpt")
    done = run_job(IN_EVALUATION, fn, "fit", cwd=tmp_path, SLURM_RESTART_COUNT="1", **slurm)
    assert done.returncode == 0, done.stderr
    # The fit is known to be over; the evaluation began again.
    assert "trains" not in done.stdout and "evaluates" in done.stdout and "all is done" in done.stdout


@pytest.mark.parametrize("before", ["weights", "set-up of validate"])
def test_a_job_in_an_evaluation_is_put_back_as_it_is_where_nothing_can_be_saved(tmp_path, slurm, before):
    done = run_job(IN_EVALUATION, "validate", before, cwd=tmp_path, **slurm)
    assert done.returncode == 143, done.stderr
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert "all is done" not in done.stdout and not list(tmp_path.glob("hpc_ckpt_*"))


@pytest.mark.parametrize("is_found", [False, True], ids=["given as a plugin", "found by itself"])
def test_slurm_puts_the_job_back_in_the_queue_and_it_goes_on(tmp_path, slurm, is_found):
    slurm = {**slurm, **({"is_found": "yes"} if is_found else {})}
    first = start(tmp_path, "slurm", **slurm)
    first.send_signal(signal.SIGUSR1)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 143, errors
    verify(tmp_path / "hpc_ckpt_1.ckpt")
    second = start(tmp_path, "slurm", SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="7", **slurm)
    second.send_signal(signal.SIGUSR1)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 143, errors
    assert (tmp_path / "asked").read_text() == "requeue 77\nrequeue 70_7\n"
    last = start(tmp_path, "slurm again", **slurm)
    output, errors = last.communicate(timeout=60)
    assert last.returncode == 0, errors
    assert f"resumed from {tmp_path / 'hpc_ckpt_2.ckpt'} at" in output


def tell(folder: Path, way: str, num_signals: int) -> int:
    seed = int.from_bytes(os.urandom(4), "little")
    command = [sys.executable, "-m", "tests.loops.signalled_training", str(folder), way, str(num_signals), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])["num_told"]


@pytest.mark.parametrize("way", ["plain", "workers"])
def test_a_run_told_at_random_moments_is_the_unbroken_one(tmp_path, way):
    tell(tmp_path, way, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["plain", "workers", "persistent", "async", "accumulate"])
def test_runs_told_at_many_random_moments_are_the_unbroken_one(tmp_path, way):
    assert sum(tell(tmp_path / str(number), way, 10) for number in range(5)) >= 10
