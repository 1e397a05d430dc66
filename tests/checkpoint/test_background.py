"""Saving in the background: the copy is that of one moment, errors surface, and only complete files count."""

from __future__ import annotations

import os
import pickle
import threading

import pytest
import torch

from levin import Callback
from levin.callbacks import ModelCheckpoint
from levin.checkpoint import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO, load
from levin.loggers.logger import DummyLogger
from tests.callbacks.small import Small, TrainOnly, loader, names, trainer


class Adam(TrainOnly):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Gate:
    """Holds the writer up until it is opened, and fails where it is told to.

    Args:
        fail_at: Number of the save, from 1, that fails.
    """

    def __init__(self, monkeypatch, is_open=False, fail_at=()):
        self.opened = threading.Event()
        self.num_saves = 0
        self.fail_at = fail_at
        if is_open:
            self.opened.set()
        write = AsyncCheckpointIO._write

        def gated(checkpoint_io, snapshot, path, storage_options):
            self.num_saves += 1
            number = self.num_saves
            assert self.opened.wait(20), "nobody opened the gate"
            if number in self.fail_at:
                raise OSError(28, "No space left on device", str(path))
            write(checkpoint_io, snapshot, path, storage_options)

        monkeypatch.setattr(AsyncCheckpointIO, "_write", gated)


class AtBatch(Callback):
    """Calls a function at the end of one batch."""

    def __init__(self, number, function):
        self.number, self.function, self.seen = number, function, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += 1
        if self.seen == self.number:
            self.function(trainer)


class Recording(ModelCheckpoint):
    """Notes the weights and the optimizer's state at each save."""

    def _save_checkpoint(self, trainer, filepath):
        self.__dict__.setdefault("moments", {})[filepath] = pickle.dumps(
            (trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict())
        )
        super()._save_checkpoint(trainer, filepath)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def background(way, folder, **arguments):
    """The Trainer's arguments and the callback for one of the two ways to save in the background."""
    callback = Recording(folder, async_save=way == "async_save", **arguments)
    return callback, {"plugins": AsyncCheckpointIO() if way == "plugin" else None}


WAYS = pytest.mark.parametrize("way", ["async_save", "plugin"])


# The moment of the save ---------------------------------------------------------------------------------------------


@WAYS
def test_training_goes_on_and_the_file_holds_the_moment_of_the_save(tmp_path, monkeypatch, way):
    gate = Gate(monkeypatch)
    callback, plugins = background(way, tmp_path / "saved", every_n_train_steps=3)
    at_third_later = []

    def look(trainer):
        at_third_later.extend(names(tmp_path / "saved"))
        gate.opened.set()

    run = trainer(tmp_path, [callback, AtBatch(5, look)], max_epochs=1, **plugins)
    run.fit(Adam(), loader(5))
    assert at_third_later == []
    path = str(tmp_path / "saved" / "epoch=0-step=3.ckpt")
    weights, optimizer = pickle.loads(callback.moments[path])
    saved = load(path)
    assert same(saved["state_dict"], dict(weights))
    assert same(saved["optimizer_states"][0], optimizer)
    assert not same(dict(run.lightning_module.state_dict()), dict(weights))


@WAYS
def test_the_files_are_those_of_a_blocking_save(tmp_path, way):
    found = []
    for name, chosen in (("blocking", None), ("background", way)):
        os.makedirs(tmp_path / name)
        os.chdir(tmp_path / name)
        torch.manual_seed(3)
        callback, plugins = background(chosen, "saved", every_n_train_steps=2, save_top_k=-1, save_last=True)
        trainer(tmp_path / name, [callback], max_epochs=2, **plugins).fit(Adam(), loader())
        files = names(tmp_path / name / "saved")
        trees = [load(tmp_path / name / "saved" / file) for file in files]
        for tree in trees:
            del tree["callbacks"]  # paths
        found.append((files, trees))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 5
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("save_last", [None, True, "link"])
@pytest.mark.parametrize("save_top_k", [1, 2, -1])
def test_the_same_files_are_kept_as_by_blocking_saves(tmp_path, save_last, save_top_k):
    values, found = (3.0, 1.0, 2.0, 0.5), []
    for name in ("blocking", "background"):
        callback = ModelCheckpoint(
            tmp_path / name, monitor="val", save_top_k=save_top_k, save_last=save_last, async_save=name == "background"
        )
        trainer(tmp_path, [callback], max_epochs=4).fit(Small(values), loader(), loader(2))
        kept = {os.path.basename(path): float(score) for path, score in callback.best_k_models.items()}
        assert all(map(os.path.exists, callback.best_k_models))
        found.append((names(tmp_path / name), kept, os.path.basename(callback.last_model_path)))
    assert found[0] == found[1]


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    checkpoint_io = AsyncCheckpointIO()
    weight = torch.zeros(3)
    checkpoint_io.save_checkpoint({"weight": weight}, tmp_path / "1.ckpt")
    threading.Timer(0.2, gate.opened.set).start()
    checkpoint_io.save_checkpoint({"weight": weight.add_(1)}, tmp_path / "2.ckpt")
    assert (tmp_path / "1.ckpt").exists()
    checkpoint_io.teardown()
    assert [load(tmp_path / f"{n}.ckpt")["weight"][0].item() for n in (1, 2)] == [0.0, 1.0]


def test_the_memory_for_copies_is_used_again_and_given_back(tmp_path):
    checkpoint_io = AsyncCheckpointIO()
    blocks = []
    for n in range(3):
        checkpoint_io.save_checkpoint({"weight": torch.zeros(1000)}, tmp_path / f"{n}.ckpt")
        blocks.append(checkpoint_io._stager._block)
    assert blocks[0] is blocks[1] is blocks[2]
    checkpoint_io.teardown()
    assert checkpoint_io._stager._block is None


def test_a_save_by_hand_is_there_at_once_with_async_save(tmp_path):
    seen = []

    def save(trainer):
        trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
        seen.append((tmp_path / "by_hand.ckpt").exists())

    callback = ModelCheckpoint(tmp_path / "saved", async_save=True)
    trainer(tmp_path, [callback, AtBatch(2, save)], max_epochs=1).fit(TrainOnly(), loader())
    assert seen == [True]


def test_a_checkpoint_that_is_being_written_can_be_asked_for(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, is_open=True)
    run = trainer(tmp_path, [], max_epochs=1, plugins=AsyncCheckpointIO(), enable_checkpointing=False)
    run.fit(Small(), loader(), loader(2))
    gate.opened.clear()
    run.save_checkpoint(tmp_path / "end.ckpt")
    threading.Timer(0.2, gate.opened.set).start()
    run.validate(Small(), loader(2), ckpt_path=str(tmp_path / "end.ckpt"), verbose=False)


def test_another_checkpoint_io_can_write_in_the_background(tmp_path):
    class Noting(CheckpointIO):
        def __init__(self):
            self.seen = []

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.seen.append((checkpoint["weight"].clone(), storage_options, threading.current_thread().name))

        def load_checkpoint(self, path, map_location=None, weights_only=None):
            return {}

        def remove_checkpoint(self, path):
            self.seen.append(path)

    inner = Noting()
    checkpoint_io = AsyncCheckpointIO(inner)
    weight = torch.ones(2)
    checkpoint_io.save_checkpoint({"weight": weight}, "a", storage_options={"ttl": 3})
    weight.zero_()
    checkpoint_io.remove_checkpoint("b")
    checkpoint_io.teardown()  # no warning of torch has become an error in the writer
    (saved, options, thread), removed = inner.seen
    assert saved.tolist() == [1.0, 1.0]
    assert (options, thread, removed) == ({"ttl": 3}, "levin-checkpoint_0", "b")


def test_it_can_be_sent_to_another_process(tmp_path):
    checkpoint_io = AsyncCheckpointIO()
    checkpoint_io.save_checkpoint({"epoch": 1}, tmp_path / "a.ckpt")
    copy = pickle.loads(pickle.dumps(checkpoint_io))
    assert copy.load_checkpoint(tmp_path / "a.ckpt") == {"epoch": 1}
    assert type(copy.checkpoint_io) is TorchCheckpointIO


def test_it_has_the_names_that_users_know():
    import levin.checkpoint

    assert levin.checkpoint.AsyncCheckpointIO is AsyncCheckpointIO
    assert all(getattr(levin.checkpoint, name) is not None for name in levin.checkpoint.__all__)


# Errors -------------------------------------------------------------------------------------------------------------


@WAYS
def test_an_error_surfaces_while_training_goes_on(tmp_path, monkeypatch, way):
    Gate(monkeypatch, is_open=True, fail_at=[2])
    callback, plugins = background(way, tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    run = trainer(tmp_path, [callback, Settled(callback)], max_epochs=1, **plugins)
    with pytest.raises(OSError, match=r"No space left on device: .*step=4.ckpt"):
        run.fit(TrainOnly(), loader(100))
    assert run.global_step in (4, 5)
    assert run.interrupted
    assert names(tmp_path / "saved") == ["epoch=0-step=2.ckpt"]


class Settled(Callback):
    """Lets the writer finish before the end of each batch, so that it is certain when its error is seen."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.strategy.checkpoint_io.wait()


@WAYS
def test_an_error_of_the_last_save_surfaces_at_the_end(tmp_path, monkeypatch, way):
    Gate(monkeypatch, is_open=True, fail_at=[3])
    callback, plugins = background(way, tmp_path / "saved")
    run = trainer(tmp_path, [callback], **plugins)
    with pytest.raises(OSError, match=r"No space left on device: .*step=12.ckpt"):
        run.fit(TrainOnly(), loader())
    assert run.interrupted
    assert names(tmp_path / "saved") == ["epoch=1-step=8.ckpt"]
    assert callback.best_model_path == str(tmp_path / "saved" / "epoch=1-step=8.ckpt")


@WAYS
@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_a_save_that_failed_does_not_count(tmp_path, monkeypatch, way, save_last):
    Gate(monkeypatch, is_open=True, fail_at=[2 if save_last is not True else 3])
    folder = tmp_path / "saved"
    callback, plugins = background(way, folder, monitor="val", save_top_k=1, save_last=save_last)
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, [callback], **plugins).fit(Small((2.0, 1.0, 0.5)), loader(), loader(2))
    first = str(folder / "epoch=0-step=4.ckpt")
    assert names(folder) == ["epoch=0-step=4.ckpt", *(["last.ckpt"] if save_last else [])]
    assert callback.best_k_models == {first: 2.0}
    assert callback.best_model_path == callback.kth_best_model_path == first
    assert callback.best_model_score == 2.0
    assert callback.last_model_path == (str(folder / "last.ckpt") if save_last else "")
    assert load(folder / ("last.ckpt" if save_last else first))["global_step"] == 4


@WAYS
def test_the_first_link_is_not_known_when_its_file_failed(tmp_path, monkeypatch, way):
    Gate(monkeypatch, is_open=True, fail_at=[1])
    callback, plugins = background(way, tmp_path / "saved", save_last="link")
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, [callback], **plugins).fit(TrainOnly(), loader())
    assert (callback.best_model_path, callback.last_model_path) == ("", "")
    assert names(tmp_path) == []


@WAYS
def test_a_failed_run_waits_for_its_file(tmp_path, monkeypatch, way):
    gate = Gate(monkeypatch)
    callback, plugins = background(way, tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)

    def fail(trainer):
        threading.Timer(0.2, gate.opened.set).start()
        raise RuntimeError("broken")

    run = trainer(tmp_path, [callback, AtBatch(3, fail)], **plugins)
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(TrainOnly(), loader())
    assert names(tmp_path / "saved") == ["epoch=0-step=2.ckpt"]
    assert not any(thread.name == "levin-checkpoint" for thread in threading.enumerate())


@WAYS
def test_the_error_of_the_run_is_not_hidden_by_that_of_the_writer(tmp_path, monkeypatch, way, caplog):
    gate = Gate(monkeypatch, fail_at=[1])
    callback, plugins = background(way, tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)

    def fail(trainer):
        gate.opened.set()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, [callback, AtBatch(3, fail)], **plugins).fit(TrainOnly(), loader())
    assert callback.best_model_path == ""
    assert "in the background failed" in caplog.text


@WAYS
def test_an_exception_saves_what_there_is_after_a_failed_save(tmp_path, monkeypatch, way):
    Gate(monkeypatch, is_open=True, fail_at=[1])
    callback, plugins = background(way, tmp_path / "saved", every_n_train_steps=2, save_on_exception=True)
    run = trainer(tmp_path, [callback, Settled(callback)], **plugins)
    with pytest.raises(OSError, match="No space left"):
        run.fit(TrainOnly(), loader())
    assert run.global_step in (2, 3)  # the writer may be so fast that its error is seen in the same step
    last = f"epoch=0-step={run.global_step}.ckpt"
    assert names(tmp_path / "saved") == [last]
    assert load(tmp_path / "saved" / last)["global_step"] == run.global_step


def test_a_trainer_works_again_after_a_failed_save(tmp_path, monkeypatch):
    Gate(monkeypatch, is_open=True, fail_at=[1])
    callback = ModelCheckpoint(tmp_path / "saved", async_save=True)
    run = trainer(tmp_path, [callback], max_epochs=1)
    with pytest.raises(OSError, match="No space left"):
        run.fit(TrainOnly(), loader())
    run = trainer(tmp_path, [callback], max_epochs=1)
    run.fit(TrainOnly(), loader())
    assert names(tmp_path / "saved") == ["epoch=0-step=4.ckpt"]


def test_a_removal_that_fails_is_an_error_and_the_new_file_counts(tmp_path, monkeypatch):
    def refuse(self, path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(TorchCheckpointIO, "remove_checkpoint", refuse)
    callback = ModelCheckpoint(tmp_path / "saved", async_save=True)
    with pytest.raises(PermissionError, match="epoch=0-step=4.ckpt"):
        trainer(tmp_path, [callback]).fit(TrainOnly(), loader())
    assert names(tmp_path / "saved") == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]
    assert callback.best_model_path == str(tmp_path / "saved" / "epoch=1-step=8.ckpt")


def test_what_cannot_be_pickled_is_an_error_at_once(tmp_path):
    class Odd(TrainOnly):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["odd"] = {"function": lambda: None}

    callback = ModelCheckpoint(tmp_path / "saved", async_save=True)
    with pytest.raises((AttributeError, TypeError), match=r"\['odd'\]\['function'\] cannot be saved"):
        trainer(tmp_path, [callback]).fit(Odd(), loader())
    assert callback.best_model_path == ""


# Others -------------------------------------------------------------------------------------------------------------


@WAYS
def test_loggers_hear_of_complete_files_only(tmp_path, way):
    heard = []

    class Listening(DummyLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            path = checkpoint_callback.best_model_path
            heard.append((os.path.basename(path), os.path.exists(path)))

    callback, plugins = background(way, tmp_path / "saved")
    run = trainer(tmp_path, [callback], logger=Listening(), log_every_n_steps=1, **plugins)
    run.fit(TrainOnly(), loader())
    assert heard == [(f"epoch={n}-step={4 * n + 4}.ckpt", True) for n in range(3)]


def test_loggers_hear_of_a_file_after_the_batch_in_which_it_became_complete(tmp_path, monkeypatch):
    gate, heard = Gate(monkeypatch), []

    class Listening(DummyLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            heard.append(run.global_step)

    def complete(run):
        gate.opened.set()
        run.strategy.checkpoint_io.wait()

    callbacks = [ModelCheckpoint(tmp_path / "saved", async_save=True), AtBatch(6, complete)]
    run = trainer(tmp_path, callbacks, logger=Listening(), log_every_n_steps=1, max_epochs=2)
    run.fit(TrainOnly(), loader())
    assert heard == [6, 8]


@pytest.mark.parametrize("saves_then", [False, True])
def test_loggers_hear_of_files_that_become_complete_as_the_run_fails(tmp_path, monkeypatch, saves_then):
    gate, heard = Gate(monkeypatch), []

    class Listening(DummyLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            heard.append(names(tmp_path / "saved"))

    class Opening(Callback):
        def on_exception(self, trainer, pl_module, exception):
            gate.opened.set()

    def fail(run):
        raise RuntimeError("in the middle")

    callback = ModelCheckpoint(tmp_path / "saved", async_save=True, save_on_exception=saves_then)
    run = trainer(tmp_path, [callback, AtBatch(6, fail), Opening()], logger=Listening(), log_every_n_steps=1)
    with pytest.raises(RuntimeError, match="in the middle"):
        run.fit(TrainOnly(), loader())
    files = ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt"]
    assert heard == ([files[:1], files] if saves_then else [files[:1]])
    assert callback.best_model_path == str(tmp_path / "saved" / files[0])


def test_a_background_save_is_off_unless_asked_for(tmp_path):
    callback = ModelCheckpoint(tmp_path)
    assert callback.async_save is False
    run = trainer(tmp_path, [callback], max_epochs=1)
    run.fit(TrainOnly(), loader())
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO


def test_what_is_saved_after_a_snapshot_is_newer_than_the_file_of_the_snapshot(tmp_path):
    # Times that the file system takes by itself are up to some milliseconds behind the clock.
    checkpoint_io = AsyncCheckpointIO()
    for number in range(20):
        earlier, later = tmp_path / f"{number}-earlier.ckpt", tmp_path / f"{number}-later.ckpt"
        checkpoint_io.save_checkpoint({"step": 1}, earlier)
        TorchCheckpointIO().save_checkpoint({"step": 2}, later)
        checkpoint_io.wait()
        assert later.stat().st_mtime_ns > earlier.stat().st_mtime_ns
    checkpoint_io.teardown()
