"""Processes that run one function: their results, their failures, and what they inherit."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import warnings

import pytest
import torch

from levin.environments import LightningEnvironment
from levin.launchers import MultiProcessingLauncher, multiprocess
from levin.utilities.exceptions import SIGTERMException

METHODS = ["spawn", "fork", "forkserver"]


class Entered:
    """Knows its rank once the launcher has told it, as a strategy does."""

    def __init__(self) -> None:
        self.rank: int | None = None

    def enter(self, local_rank: int) -> None:
        self.rank = local_rank


def launcher_for(start_method: str, entered: Entered, size: int = 2) -> MultiProcessingLauncher:
    return MultiProcessingLauncher(LightningEnvironment(), size, start_method, entered.enter)


def describe(entered: Entered, module: torch.nn.Module, shared: torch.Tensor, factor: int = 1):
    with torch.no_grad():
        module.weight.add_(10.0 * (entered.rank + 1))
    shared[entered.rank] += 1
    return {
        "entered": entered,
        "weight": module.weight.detach(),
        "pid": os.getpid(),
        "factor": factor,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": torch.rand(1),
    }


@pytest.mark.parametrize("start_method", METHODS)
def test_the_result_of_rank_zero_comes_back(start_method, monkeypatch):
    if start_method != "fork":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    entered = Entered()
    module = torch.nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(1.0)
    shared = torch.zeros(2).share_memory_()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    launcher = launcher_for(start_method, entered)
    result = launcher.launch(describe, entered, module, shared, factor=4)
    torch.set_rng_state(state)
    assert result["entered"].rank == 0
    assert result["pid"] != os.getpid()
    assert result["factor"] == 4
    # The other rank has weights of its own, and this process too; what was shared by intention stays shared.
    assert result["weight"].item() == 11.0
    assert module.weight.item() == 1.0
    assert shared.tolist() == [1.0, 1.0]
    assert entered.rank is None
    # Settings and random states are those of this process.
    assert result["threads"] == torch.get_num_threads()
    assert not result["deterministic"]
    assert torch.equal(result["random"], torch.rand(1))
    # They have ended, and nothing of them goes along with the launcher.
    launcher.kill(signal.SIGTERM)
    assert [process.exitcode for process in launcher._processes] == [0, 0]
    copied = pickle.loads(pickle.dumps(launcher))
    assert copied._processes == [] and copied.start_method == start_method


def test_processes_are_not_forked_once_cuda_is_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match=r"cannot be forked after CUDA was used .* in scripts use strategy='ddp'\."):
        launcher_for("fork", Entered()).launch(int)


def load_with_a_worker(entered: Entered) -> list[int]:
    return [int(number) for number in torch.utils.data.DataLoader(range(3), batch_size=None, num_workers=1)]


def test_a_process_may_have_workers_of_its_own():
    assert launcher_for("fork", entered := Entered(), size=1).launch(load_with_a_worker, entered) == [0, 1, 2]


def fail_on(entered: Entered, rank: int, others_wait_s: float) -> None:
    if entered.rank == rank:
        raise KeyError(f"broken on {rank}")
    time.sleep(others_wait_s)
    raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("start_method", "rank", "others_wait_s"),
    [("spawn", 1, 100.0), *(("fork", rank, wait_s) for rank in (0, 1) for wait_s in (1.0, 100.0))],
)
def test_the_first_failure_ends_all_and_is_raised_with_its_traceback(start_method, rank, others_wait_s):
    entered = Entered()
    launcher = launcher_for(start_method, entered)
    with pytest.raises(KeyError, match=f"broken on {rank}") as caught:
        launcher.launch(fail_on, entered, rank, others_wait_s)
    assert f"The process with local rank {rank} failed" in str(caught.value.__cause__)
    assert "in fail_on" in str(caught.value.__cause__)
    assert launcher._processes[rank].exitcode == 1
    if others_wait_s == 100.0:  # they are asked to end
        assert launcher._processes[1 - rank].exitcode == -signal.SIGTERM


def end_one(entered: Entered, delays_s: list[float], end) -> None:
    time.sleep(delays_s[entered.rank])
    if entered.rank == 1:
        end()
    raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "it was ended by signal SIGKILL"),
        (lambda: os._exit(3), "its exit status was 3"),
    ],
    ids=["killed", "left"],
)
@pytest.mark.parametrize("delays_s", [[0.1, 0.0], [0.0, 0.1]], ids=["first", "told last"])
def test_a_process_that_leaves_no_traceback_is_named(end, how, delays_s):
    entered = Entered()
    with pytest.raises(RuntimeError) as caught:
        launcher_for("fork", entered).launch(end_one, entered, delays_s, end)
    assert str(caught.value) == f"The process with local rank 1 failed:\n\nIt left no traceback: {how}."


class Late:
    """A process whose report comes in between its end and the look at its exit status."""

    def __init__(self, context, local_rank: int, failure: multiprocess._Failure | None) -> None:
        self.reader, self.writer = context.Pipe(duplex=False)
        ended, end = os.pipe()
        os.close(end)
        self.sentinel, self.exitcode = ended, 1 if failure else 0
        self.failure = failure

    def join(self) -> None:
        if self.failure is not None:
            self.writer.send(self.failure)
        self.writer.close()
        os.close(self.sentinel)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_report_that_comes_in_late_stands_in_the_place_of_the_exit_status(failing):
    report = multiprocess._Failure(failing, time.time(), "told")
    context = multiprocessing.get_context("fork")
    processes = [Late(context, rank, report if rank == failing else None) for rank in range(2)]
    readers = {process.reader: rank for rank, process in enumerate(processes)}
    assert multiprocess._wait_for_all(processes, readers) == report


def test_an_interrupt_leaves_no_process_behind(tmp_path, monkeypatch):
    def interrupt(processes, readers):
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocess, "_wait_for_all", interrupt)
    launcher = launcher_for("fork", Entered())
    with pytest.raises(KeyboardInterrupt):
        launcher.launch(sleep_long, str(tmp_path / "up"))
    assert [process.exitcode for process in launcher._processes] == [-signal.SIGTERM] * 2


def leave_together(entered: Entered, path: str) -> None:
    if entered.rank == 1:
        time.sleep(0.7)
        with open(path, "w"):
            raise SIGTERMException
    if entered.rank == 2:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    time.sleep(0.2)
    raise SIGTERMException


def test_ranks_that_leave_together_may_end_what_they_do_and_others_are_made_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocess, "GRACE_S", 0.5)
    monkeypatch.setattr(multiprocess, "_LEAVE_TOGETHER_S", 4.0)
    entered = Entered()
    launcher = launcher_for("fork", entered, size=3)
    start = time.monotonic()
    with pytest.raises(SIGTERMException):
        launcher.launch(leave_together, entered, str(tmp_path / "saved"))
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - start < 15
    assert [process.exitcode for process in launcher._processes][2] == -signal.SIGKILL


class Unpicklable(Exception):
    def __init__(self, first, second) -> None:
        super().__init__("one text")


class Disguised(Unpicklable):
    def __reduce__(self):
        return str, ("no exception",)


class Bound(Unpicklable):
    def __reduce__(self):
        return load_only_in, (os.getpid(),)


def load_only_in(pid: int) -> Exception:
    assert os.getpid() == pid
    return Bound(1, 2)


def throw(error: type[Exception]) -> None:
    raise error(1, 2)


@pytest.mark.parametrize("error", [Unpicklable, Disguised, Bound])
def test_an_exception_that_pickle_cannot_carry_still_tells_its_text(error):
    with pytest.raises(
        RuntimeError, match=rf"(?s)^The process with local rank 0 failed:\n\n.*{error.__name__}: one text"
    ):
        launcher_for("fork", Entered(), size=1).launch(lambda: throw(error))


def leave(code: int) -> None:
    raise SystemExit(code)


def test_an_exit_status_passes_on():
    with pytest.raises(SystemExit) as caught:
        launcher_for("fork", Entered(), size=1).launch(leave, 143)
    assert caught.value.code == 143


def test_no_temporary_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launcher = launcher_for("fork", Entered(), size=1)
    assert launcher.launch(lambda: len(list(tmp_path.glob("levin-*")))) == 1
    with pytest.raises(SystemExit):
        launcher.launch(leave, 143)
    assert list(tmp_path.glob("levin-*")) == []


def test_what_cannot_be_pickled_is_explained():
    with pytest.raises(ValueError, match=r"start_method='spawn' sends the function .* use start_method='fork'"):
        launcher_for("spawn", Entered()).launch(lambda: None)
    assert launcher_for("fork", Entered()).launch(lambda: 5) == 5


class Refusing:
    def __reduce__(self):
        raise TypeError("a fault of its own")


def test_an_error_of_an_argument_that_is_sent_stays_what_it_is():
    with pytest.raises(TypeError, match="^a fault of its own$"):
        launcher_for("spawn", Entered()).launch(print, Refusing())


def count_queue(queue) -> None:
    queue.put(1)


def test_queues_can_be_arguments():
    queue = multiprocessing.get_context("spawn").Queue()
    launcher_for("spawn", Entered()).launch(count_queue, queue)
    assert [queue.get(timeout=5), queue.get(timeout=5)] == [1, 1]
    queue.close()


class FakeTrainer:
    """The part of a Trainer that the launcher knows."""

    def __init__(self) -> None:
        self.weights = torch.zeros(2)
        self.state = type("State", (), {})()
        self.state.fn = "fit"
        self.restored: object = None

    def collect_results(self):
        return {"weights": self.weights}

    def restore_results(self, results) -> None:
        self.restored = results

    def __getstate__(self):
        return {"weights": self.weights, "restored": None, "state": None}


def train(trainer: FakeTrainer, entered: Entered) -> str:
    trainer.weights += entered.rank + 1
    return "done"


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_a_trainer_gets_the_results_of_rank_zero_and_fits_once(start_method):
    trainer, entered = FakeTrainer(), Entered()
    launcher = launcher_for(start_method, entered)
    assert launcher.launch(train, trainer, entered, trainer=trainer) == "done"
    assert trainer.restored["weights"].tolist() == [1.0, 1.0]
    trainer.state.fn = "test"
    launcher.launch(train, trainer, entered, trainer=trainer)
    trainer.state.fn = "fit"
    with pytest.raises(NotImplementedError, match=r"fit\(\) was called twice on one Trainer"):
        launcher.launch(train, trainer, entered, trainer=trainer)


def sleep_long(path: str) -> None:
    with open(f"{path}-{os.getpid()}", "w"):
        time.sleep(60)


def test_kill_reaches_the_processes(tmp_path):
    launcher = launcher_for("fork", Entered())

    def kill_soon() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        launcher.kill(signal.SIGTERM)

    thread = threading.Thread(target=kill_soon)
    thread.start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="ended by signal SIGTERM"):
        launcher.launch(sleep_long, str(tmp_path / "up"))
    thread.join()
    assert time.monotonic() - start < 30


def launch_from_child(path: str) -> None:
    launcher_for("fork", Entered()).launch(sleep_long, path)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns about forks beside threads
        middle = context.Process(target=launch_from_child, args=(str(tmp_path / "up"),))
        middle.start()
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.02)
    pids = [int(path.name.split("-")[1]) for path in tmp_path.iterdir()]
    middle.kill()
    middle.join()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}/fd/0") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}/fd/0") for pid in pids)


def test_which_methods_work_at_a_prompt():
    assert launcher_for("fork", Entered()).is_interactive_compatible
    assert not launcher_for("spawn", Entered()).is_interactive_compatible


def multiply() -> float:
    return float((torch.ones(400, 400) @ torch.ones(400, 400)).sum())


def test_forked_processes_may_use_threads_after_this_one_did(caplog):
    before = torch.get_num_threads()
    told = "Forked processes compute with one thread each. Use strategy='ddp' or 'ddp_spawn' for more."
    try:
        for num_threads, messages in ((2, [told]), (1, [])):
            torch.set_num_threads(num_threads)
            expected = multiply()
            caplog.clear()
            with caplog.at_level(logging.INFO, logger="levin"):
                assert launcher_for("fork", Entered()).launch(multiply) == expected
            assert caplog.messages == messages
    finally:
        torch.set_num_threads(before)
