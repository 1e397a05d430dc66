from __future__ import annotations

import math
import os
import time
from datetime import timedelta

import pytest
import torch

from levin.callbacks import Callback, ModelCheckpoint
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import Small, TrainOnly, loader, names, trainer

nan = math.nan


def fit(folder, callback, module=None, ckpt_path=None, **kwargs):
    run = trainer(folder, [callback], **kwargs)
    module = Small() if module is None else module
    run.fit(module, loader(), None if isinstance(module, TrainOnly) else loader(2), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize(
    "arguments",
    [
        {"every_n_train_steps": 1, "every_n_epochs": 1},
        {"every_n_train_steps": 1, "train_time_interval": timedelta(1)},
        {"every_n_train_steps": -1},
        {"every_n_epochs": -1},
        {"save_top_k": -2},
        {"save_top_k": 2},
        {"monitor": "val", "save_top_k": -2},
        {"mode": "best"},
        {"save_last": "always"},
    ],
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(MisconfigurationException):
        ModelCheckpoint(**arguments)


def test_a_link_needs_a_local_folder():
    with pytest.raises(ValueError, match="save_last='link' needs a local dirpath"):
        ModelCheckpoint("memory://x", save_last="link")


def test_a_time_interval_must_be_a_timedelta():
    with pytest.raises(TypeError, match="timedelta"):
        ModelCheckpoint(train_time_interval=60)


def test_the_newest_checkpoint_is_kept_by_default(tmp_path):
    callback = ModelCheckpoint(tmp_path)
    fit(tmp_path, callback)
    assert names(tmp_path) == ["epoch=2-step=12.ckpt"]
    assert callback.best_model_path == str(tmp_path / "epoch=2-step=12.ckpt")
    assert callback.best_model_score is None


def test_without_logger_files_go_to_the_root(tmp_path):
    callback = ModelCheckpoint()
    fit(tmp_path, callback)
    assert callback.dirpath == str(tmp_path / "checkpoints")


def test_files_go_to_the_version_of_the_first_logger(tmp_path):
    from levin.loggers import CSVLogger

    callback = ModelCheckpoint()
    fit(tmp_path, callback, logger=CSVLogger(tmp_path, name="runs", version=3), log_every_n_steps=1)
    assert callback.dirpath == str(tmp_path / "runs" / "version_3" / "checkpoints")


def test_the_best_are_kept_and_nan_is_the_worst(tmp_path):
    callback = ModelCheckpoint(tmp_path, monitor="val", save_top_k=2)
    fit(tmp_path, callback, Small((nan, 3.0, 1.0, 2.0, nan)), max_epochs=5)
    assert names(tmp_path) == ["epoch=2-step=12.ckpt", "epoch=3-step=16.ckpt"]
    assert callback.best_model_path == str(tmp_path / "epoch=2-step=12.ckpt")
    assert callback.kth_best_model_path == str(tmp_path / "epoch=3-step=16.ckpt")
    assert (callback.best_model_score, callback.kth_value, callback.current_score) == (1.0, 2.0, 2.0)


def test_validation_decides_when_it_does_not_run_once_per_epoch(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=-1), max_epochs=1, val_check_interval=2)
    assert names(tmp_path) == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]


@pytest.mark.parametrize("flags", [{"check_val_every_n_epoch": 2}, {"val_check_interval": 0.5}])
def test_epochs_decide_when_there_is_no_validation(tmp_path, flags):
    fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=-1), TrainOnly(), max_epochs=2, **flags)
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]


def test_a_save_waits_for_a_metric_that_is_not_there_yet(tmp_path):
    callback = ModelCheckpoint(tmp_path, monitor="val", save_top_k=-1, every_n_train_steps=3)
    fit(tmp_path, callback, Small((5.0, 4.0)), max_epochs=1)
    assert names(tmp_path) == ["epoch=0-step=4.ckpt"]
    assert callback.best_model_score == 5.0


@pytest.mark.parametrize(
    ("every_n", "expected"),
    [(1, {4: 0.0, 8: 1.0, 12: 2.0, 16: 3.0, 20: 4.0, 24: 5.0}), (3, {12: 2.0, 16: 2.0, 20: 2.0, 24: 5.0})],
)
def test_a_save_on_the_last_batch_waits_for_fresh_metrics(tmp_path, every_n, expected):
    callback = ModelCheckpoint(
        tmp_path, "{step}", monitor="val", save_top_k=-1, every_n_train_steps=4, save_on_train_epoch_end=False
    )
    fit(tmp_path, callback, Small(range(6)), max_epochs=6, check_val_every_n_epoch=every_n)
    found = {os.path.basename(path): float(score) for path, score in callback.best_k_models.items()}
    assert found == {f"step={step}.ckpt": score for step, score in expected.items()}


def test_last_is_renewed_by_a_save_that_waited_also_if_it_is_not_among_the_best(tmp_path):
    callback = ModelCheckpoint(
        tmp_path, monitor="val", every_n_train_steps=4, save_on_train_epoch_end=False, save_last=True
    )
    fit(tmp_path, callback, Small((1.0, 2.0, 3.0)))
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 12


class LogsLate(Small):
    """Logs a value at the end of each training epoch, better each time."""

    def on_train_epoch_end(self):
        self.log("late", 2.0 - self.current_epoch)


def test_a_save_does_not_wait_for_a_validation_that_does_not_log_its_metric(tmp_path):
    callback = ModelCheckpoint(tmp_path, monitor="late", save_top_k=-1, every_n_train_steps=3)
    fit(tmp_path, callback, LogsLate(), max_epochs=2)
    assert names(tmp_path) == ["epoch=1-step=6.ckpt"]


def test_the_link_follows_a_save_that_waited_until_the_end(tmp_path):
    class NotValidated(LogsLate, TrainOnly):
        pass

    callback = ModelCheckpoint(tmp_path, monitor="late", every_n_train_steps=3, save_last="link")
    fit(tmp_path, callback, NotValidated(), max_epochs=2)
    assert names(tmp_path) == ["epoch=2-step=8.ckpt", "last.ckpt"]
    assert str((tmp_path / "last.ckpt").readlink()) == "epoch=2-step=8.ckpt"


def test_a_metric_that_never_comes_is_an_error_after_validation(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"monitor='typo'.*'val'"):
        fit(tmp_path, ModelCheckpoint(tmp_path, monitor="typo"))


@pytest.mark.parametrize("trigger", [{}, {"every_n_train_steps": 2}])
def test_a_metric_that_never_comes_is_a_warning_without_validation(tmp_path, trigger):
    with pytest.warns(UserWarning, match="could not find the monitored key"):
        fit(tmp_path, ModelCheckpoint(tmp_path, monitor="typo", **trigger), TrainOnly(), max_epochs=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("seconds", "steps"), [(0, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (9, [])])
def test_time_is_a_trigger(tmp_path, monkeypatch, seconds, steps):
    from types import SimpleNamespace

    now = [0.0]
    monkeypatch.setattr("levin.ranks.clock.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("levin.loops.run.Run.now_s", property(lambda run: now[0]), raising=True)

    class Second(Small):
        def on_train_batch_start(self, batch, batch_idx):
            now[0] += 1.0

    callback = ModelCheckpoint(tmp_path, save_top_k=-1, train_time_interval=timedelta(seconds=seconds))
    fit(tmp_path, callback, Second(), max_epochs=1)
    assert names(tmp_path) == [f"epoch=0-step={step}.ckpt" for step in steps]


def test_last_is_written_when_anything_is_saved(tmp_path):
    callback = ModelCheckpoint(tmp_path, monitor="val", save_last=True)
    fit(tmp_path, callback, Small((1.0, 2.0, 3.0)))
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_last_alone_is_kept_up_to_date_during_training(tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        fit(
            tmp_path,
            ModelCheckpoint(tmp_path, save_top_k=0, save_last=True),
            Small(fail_at=(2, 1, RuntimeError("broken"))),
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8


def test_last_is_written_at_the_end_if_never_before(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True), max_epochs=1)
    assert names(tmp_path) == ["last.ckpt"]


def test_last_can_be_a_link_to_the_newest_file(tmp_path):
    callback = ModelCheckpoint(tmp_path, save_last="link")
    fit(tmp_path, callback)
    assert str((tmp_path / "last.ckpt").readlink()) == "epoch=2-step=12.ckpt"


def test_the_link_never_points_to_nothing(tmp_path):
    class Watch(ModelCheckpoint):
        def _remove_checkpoint(self, trainer, filepath):
            super()._remove_checkpoint(trainer, filepath)
            assert (tmp_path / "last.ckpt").exists()

    fit(tmp_path, Watch(tmp_path, save_last="link"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_link_never_points_to_itself_in_a_resumed_run_that_saves_nothing_better(tmp_path):
    for max_epochs, ckpt_path in ((1, None), (2, str(tmp_path / "last.ckpt"))):
        callback = ModelCheckpoint(tmp_path, monitor="train", every_n_train_steps=1, save_last="link")
        fit(tmp_path, callback, TrainOnly(), ckpt_path=ckpt_path, max_epochs=max_epochs)
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8


def test_last_may_have_fields_and_the_old_one_goes(tmp_path):
    class Named(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "last-{epoch}"
        CHECKPOINT_EQUALS_CHAR = ":"
        FILE_EXTENSION = ".pt"

    fit(tmp_path, Named(tmp_path, save_last=True))
    assert names(tmp_path) == ["epoch:2-step:12.pt", "last-epoch:2.pt"]


def test_a_file_that_was_there_gets_a_version(tmp_path):
    (tmp_path / "model.ckpt").write_text("precious")
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(tmp_path, ModelCheckpoint(tmp_path, filename="model"))
    assert names(tmp_path) == ["model-v1.ckpt", "model.ckpt"]
    assert (tmp_path / "model.ckpt").read_text() == "precious"


def test_files_that_are_there_are_not_spoken_of_where_no_ranking_is_kept(tmp_path):
    (tmp_path / "model.ckpt").write_text("precious")
    fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=0), max_epochs=1)  # warnings are errors
    trainer(tmp_path, [ModelCheckpoint(tmp_path)]).validate(Small(), loader(2), verbose=False)
    assert names(tmp_path) == ["model.ckpt"]


def test_the_name_of_a_file_that_went_is_free_again(tmp_path):
    class Turns(Small):
        def on_train_epoch_end(self):
            self.log("turn", self.current_epoch % 2)

    callback = ModelCheckpoint(tmp_path, "{turn:.0f}", monitor="val")
    fit(tmp_path, callback, Turns((3.0, 2.0, 1.0)))
    assert names(tmp_path) == ["turn=0.ckpt"]


def test_versions_can_be_switched_off(tmp_path):
    callback = ModelCheckpoint(tmp_path, filename="model", monitor="val", save_top_k=2, enable_version_counter=False)
    fit(tmp_path, callback, Small((3.0, 2.0, 1.0)))
    assert names(tmp_path) == ["model.ckpt"]


def test_a_failing_save_leaves_the_files_and_what_is_known_of_them(tmp_path):
    class FullDisk(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            if trainer.current_epoch == 1:
                raise OSError("No space left on device")
            super()._save_checkpoint(trainer, filepath)

    callback = FullDisk(tmp_path, monitor="val")
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, callback, Small((2.0, 1.0)))
    assert names(tmp_path) == ["epoch=0-step=4.ckpt"]
    assert callback.best_model_path == str(tmp_path / "epoch=0-step=4.ckpt")
    assert callback.best_k_models == {callback.best_model_path: 2.0}


def test_the_new_file_is_there_before_the_old_one_goes(tmp_path):
    class Watch(ModelCheckpoint):
        def _remove_checkpoint(self, trainer, filepath):
            assert len(names(tmp_path)) == 2
            super()._remove_checkpoint(trainer, filepath)

    fit(tmp_path, Watch(tmp_path))


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(3)])
def test_an_exception_saves_what_there_is(tmp_path, error, caplog):
    with pytest.raises(type(error)), caplog.at_level("INFO", "levin"):
        fit(tmp_path, ModelCheckpoint(tmp_path, save_on_exception=True, save_last=True), Small(fail_at=(1, 2, error)))
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    name, path = type(error).__name__, tmp_path / "epoch=1-step=6.ckpt"
    assert f"{name} was raised ({error}); saved a checkpoint to {path}" in caplog.messages


def test_an_exception_before_the_first_step_saves_nothing(tmp_path):
    class Fails(Small):
        def on_fit_start(self):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, ModelCheckpoint(tmp_path, save_on_exception=True), Fails())
    assert names(tmp_path) == []


@pytest.mark.parametrize("verbose", [False, True])
def test_decisions_are_told_when_asked_for(tmp_path, caplog, verbose):
    with caplog.at_level("INFO", "levin"):
        fit(tmp_path, ModelCheckpoint(tmp_path, monitor="val", verbose=verbose), Small((2.0, 3.0, 1.0)))
    told = [text for text in caplog.messages if "'val'" in text]
    assert (
        told
        == [
            "Epoch 0, global step 4: 'val' reached 2.00000 (best 2.00000), saving model to "
            f"{str(tmp_path / 'epoch=0-step=4.ckpt')!r} as top 1",
            "Epoch 1, global step 8: 'val' was not in top 1",
            "Epoch 2, global step 12: 'val' reached 1.00000 (best 1.00000), saving model to "
            f"{str(tmp_path / 'epoch=2-step=12.ckpt')!r} as top 1",
        ]
        * verbose
    )


def test_an_exception_saves_nothing_twice(tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        fit(
            tmp_path,
            ModelCheckpoint(tmp_path, save_on_exception=True),
            Small(fail_at=(1, 0, RuntimeError("broken"))),
        )
    assert names(tmp_path) == ["epoch=0-step=4.ckpt"]


def test_a_file_outside_the_folder_is_never_deleted(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path / "a"), max_epochs=1)
    first = str(tmp_path / "a" / "epoch=0-step=4.ckpt")
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        fit(tmp_path, ModelCheckpoint(tmp_path / "b"), max_epochs=2, ckpt_path=first)
    assert names(tmp_path) == ["a/epoch=0-step=4.ckpt", "b/epoch=1-step=8.ckpt"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_file_that_was_resumed_from_is_never_deleted(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path), max_epochs=1)
    fit(tmp_path, ModelCheckpoint(tmp_path), max_epochs=3, ckpt_path=str(tmp_path / "epoch=0-step=4.ckpt"))
    assert names(tmp_path) == ["epoch=0-step=4.ckpt", "epoch=2-step=12.ckpt"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_goes_on_with_its_ranking(tmp_path):
    values = (3.0, 1.0, 2.0, 4.0)
    fit(tmp_path, ModelCheckpoint(tmp_path, monitor="val", save_top_k=2, save_last=True), Small(values), max_epochs=2)
    callback = ModelCheckpoint(tmp_path, monitor="val", save_top_k=2, save_last=True)
    fit(tmp_path, callback, Small(values), max_epochs=4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert names(tmp_path) == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "last.ckpt"]
    assert callback.best_model_score == 1.0


def test_a_callback_saves_again_in_another_run(tmp_path):
    callback = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    for _ in range(2):
        fit(tmp_path, callback, max_epochs=1)
        assert names(tmp_path) == [f"step={step}.ckpt" for step in (1, 2, 3, 4)]
        for path in tmp_path.iterdir():
            path.unlink()


def test_nothing_is_saved_in_a_fast_dev_run_or_outside_fit(tmp_path):
    callback = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    fit(tmp_path, callback, fast_dev_run=True)
    trainer(tmp_path, [callback]).validate(Small(), loader(2), verbose=False)
    assert names(tmp_path) == []


def test_the_sanity_check_saves_nothing(tmp_path):
    callback = ModelCheckpoint(tmp_path, monitor="val", save_top_k=-1, save_on_train_epoch_end=False)
    fit(tmp_path, callback, max_epochs=1, num_sanity_val_steps=2)
    assert names(tmp_path) == ["epoch=0-step=4.ckpt"]


def test_weights_only_files_hold_no_optimizer(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path, save_weights_only=True), max_epochs=1)
    assert "optimizer_states" not in torch.load(tmp_path / "epoch=0-step=4.ckpt", weights_only=True)


def test_files_can_be_remote(tmp_path):
    import fsspec

    fit(tmp_path, ModelCheckpoint("memory://remote", monitor="val", save_last=True), Small((2.0, 1.0)), max_epochs=2)
    filesystem = fsspec.filesystem("memory")
    found = sorted(path.rsplit("/", 1)[1] for path in filesystem.ls("/remote", detail=False))
    assert found == ["epoch=1-step=8.ckpt", "last.ckpt"]


def test_manual_optimization_by_steps_is_warned_about(tmp_path):
    class Manual(TrainOnly):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch[0]).pow(2).mean())
            optimizer.step()

    with pytest.warns(UserWarning, match="manual optimization"):
        fit(tmp_path, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1), Manual(), max_epochs=1)
    assert names(tmp_path) == [f"step={step}.ckpt" for step in (1, 2, 3, 4)]


def test_loggers_hear_of_each_file_when_it_is_there(tmp_path):
    from levin.loggers.logger import DummyLogger

    heard = []

    class Listening(DummyLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            heard.append((run.global_step, checkpoint_callback.best_model_path))

    run = trainer(tmp_path, [ModelCheckpoint(tmp_path)], max_epochs=2, logger=Listening(), log_every_n_steps=1)
    run.fit(Small(), loader(), loader(2))
    assert heard == [(step, str(tmp_path / f"epoch={epoch}-step={step}.ckpt")) for epoch, step in enumerate((4, 8))]


def test_two_callbacks_keep_their_states_apart(tmp_path):
    callbacks = [ModelCheckpoint(tmp_path, monitor="val"), ModelCheckpoint(tmp_path, monitor="val", mode="max")]
    run = trainer(tmp_path, callbacks, max_epochs=1)
    run.fit(Small(), loader(), loader(2))
    keys = set(torch.load(callbacks[0].best_model_path, weights_only=True)["callbacks"])
    assert keys == {callback.state_key for callback in callbacks}


def test_the_scores_can_be_written_as_yaml(tmp_path):
    callback = ModelCheckpoint(tmp_path / "files")
    callback.best_k_models = {"/a": torch.tensor(1.0), "/b": torch.tensor(2.0)}
    (tmp_path / "files").mkdir()
    for path in (None, tmp_path / "other.yaml"):
        callback.to_yaml(path)
        assert (path or tmp_path / "files" / "best_k_models.yaml").read_text() == "/a: 1.0\n/b: 2.0\n"
    assert sorted(names(tmp_path)) == ["files/best_k_models.yaml", "other.yaml"]


def test_it_runs_after_the_other_callbacks(tmp_path):
    class Plain(Callback):
        pass

    run = trainer(tmp_path, [ModelCheckpoint(tmp_path), Plain()])
    assert [type(callback).__name__ for callback in run.callbacks] == ["Plain", "ModelCheckpoint"]


def test_saving_in_the_background_keeps_the_same_files(tmp_path):
    from levin.checkpoint.background import AsyncCheckpointIO

    class Slow(AsyncCheckpointIO):
        def _write(self, snapshot, path, storage_options):
            time.sleep(0.05)
            super()._write(snapshot, path, storage_options)

    values = (3.0, 1.0, 2.0, 0.5)
    arguments = {"monitor": "val", "save_top_k": 2, "save_last": "link", "filename": "fixed"}
    found = []
    for name, plugins in (("blocking", None), ("background", Slow())):
        callback = ModelCheckpoint(tmp_path / name, **arguments)
        fit(tmp_path, callback, Small(values), max_epochs=4, plugins=plugins)
        scores = {os.path.basename(path): float(score) for path, score in callback.best_k_models.items()}
        link = str((tmp_path / name / "last.ckpt").readlink())
        found.append((names(tmp_path / name), scores, link, (tmp_path / name / "last.ckpt").exists()))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize("folder", ["memory://one", "memory://two"])
def test_a_remote_file_that_a_run_began_with_is_never_deleted(tmp_path, folder):
    import fsspec

    filesystem = fsspec.filesystem("memory")
    for path in ("/one", "/two"):
        filesystem.rm(path, recursive=True) if filesystem.exists(path) else None
    fit(tmp_path, ModelCheckpoint("memory://one"), max_epochs=1)
    fit(tmp_path, ModelCheckpoint(folder), max_epochs=3, ckpt_path="memory://one/epoch=0-step=4.ckpt")
    assert filesystem.exists("/one/epoch=0-step=4.ckpt")
    found = [path.rsplit("/", 1)[1] for path in filesystem.ls(folder.replace("memory:/", ""), detail=False)]
    assert sorted(found)[-1] == "epoch=2-step=12.ckpt"
    assert len(found) == (2 if folder == "memory://one" else 1)


def test_with_validation_by_the_clock_files_come_with_validation(tmp_path):
    class Rare(Small):
        def on_train_batch_start(self, batch, batch_idx):
            time.sleep(0.4 if (self.current_epoch, batch_idx) == (1, 2) else 0.0)

    callback = ModelCheckpoint(tmp_path, monitor="val", save_top_k=-1)
    fit(tmp_path, callback, Rare((5.0, 4.0)), max_epochs=2, val_check_interval=timedelta(seconds=0.35))
    assert [(name.rsplit("/", 1)[1], float(score)) for name, score in callback.best_k_models.items()] == [
        ("epoch=1-step=7.ckpt", 4.0)
    ]


OVERRIDDEN = {
    "_save_topk_checkpoint": {"best", "newest"},
    "_save_monitor_checkpoint": {"best"},
    "_update_best_and_save": {"best"},
    "_save_none_monitor_checkpoint": {"newest"},
    "_save_last_checkpoint": {"best", "newest"},
    "_save_checkpoint": {"best", "newest"},
    "_remove_checkpoint": {"best", "newest"},
    "_should_remove_checkpoint": {"best", "newest"},
    "_should_skip_saving_checkpoint": {"best", "newest"},
    "_should_save_on_train_epoch_end": {"best", "newest"},
    "_monitor_candidates": {"best", "newest"},
    "_get_metric_interpolated_filepath_name": {"best", "newest"},
    "check_monitor_top_k": {"best"},
    "format_checkpoint_name": {"best", "newest"},
}


@pytest.mark.parametrize("way", ["best", "newest"])
def test_methods_that_packages_override_are_called(tmp_path, way):
    called = set()

    def recording(name):
        def method(self, *args, **kwargs):
            called.add(name)
            return getattr(super(Recording, self), name)(*args, **kwargs)

        return method

    Recording = type("Recording", (ModelCheckpoint,), {name: recording(name) for name in OVERRIDDEN})
    fit(tmp_path, Recording(tmp_path, monitor="val" if way == "best" else None, save_last=True), Small((2.0, 1.0)))
    assert called == {name for name, ways in OVERRIDDEN.items() if way in ways}


def test_a_package_may_put_its_own_file_in_the_place_of_the_best(tmp_path):
    class Own(ModelCheckpoint):
        """Keeps folders instead of files, as scvi-tools does."""

        def _update_best_and_save(self, current, trainer, monitor_candidates):
            super()._update_best_and_save(current, trainer, monitor_candidates)
            folder = self.best_model_path.removesuffix(".ckpt")
            os.makedirs(folder, exist_ok=True)
            (tmp_path / folder / "model").write_text("own")
            if os.path.exists(self.best_model_path):
                os.remove(self.best_model_path)
            self.best_model_path = folder

    callback = Own(tmp_path, monitor="val", save_top_k=-1)
    fit(tmp_path, callback, Small((2.0, 1.0)), max_epochs=2)
    assert names(tmp_path) == ["epoch=0-step=4/model", "epoch=1-step=8/model"]
    assert callback.best_model_path == str(tmp_path / "epoch=1-step=8")


@pytest.mark.parametrize("given", [ModelCheckpoint, [ModelCheckpoint]])
def test_the_class_of_a_callback_is_refused_by_name(tmp_path, given):
    from levin import Trainer

    with pytest.raises(MisconfigurationException, match=r"Use ModelCheckpoint\(\.\.\.\)"):
        Trainer(callbacks=given, accelerator="cpu", default_root_dir=str(tmp_path))


@pytest.mark.parametrize("is_async", [False, True])
def test_files_are_written_in_the_background_in_a_fit_that_asks_for_it(tmp_path, is_async):
    from levin.checkpoint import AsyncCheckpointIO, TorchCheckpointIO

    callback = ModelCheckpoint(tmp_path, async_save=is_async)
    run = trainer(tmp_path, [callback])
    run.validate(Small(), loader(2), verbose=False)
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO
    run.fit(Small(), loader(), loader(2))
    assert type(run.strategy.checkpoint_io) is (AsyncCheckpointIO if is_async else TorchCheckpointIO)
