"""Files of older Lightning versions go on to where an unbroken run ends; the files are put together by hand."""

from __future__ import annotations

import copy
import sys
import types
import warnings

import pytest
import torch

from levin import Trainer
from levin.callbacks import EarlyStopping, ModelCheckpoint, Timer
from levin.checkpoint import atomic_save, load
from levin.checkpoint.migrate import migrate
from tests.callbacks.small import Small, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
KEY = "ModelCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None%s}"


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).pow(2).mean())
        optimizer.step()


def trainer(folder, max_epochs, **kwargs):
    settings = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                    callbacks=[ModelCheckpoint(folder), EarlyStopping("val", patience=9), Timer()], num_sanity_val_steps=0)  # fmt: skip
    return Trainer(default_root_dir=str(folder), max_epochs=max_epochs, **settings | kwargs)


def fitted(folder, max_epochs, ckpt_path=None, kind=Small):
    model = kind()
    run = trainer(folder, max_epochs)
    run.fit(model, loader(), loader(2), ckpt_path=ckpt_path)
    return model, run


def newest_layout(folder, kind=Small):
    """What Lightning 2.x writes after two epochs of four batches."""
    _, run = fitted(folder, 2, kind=kind)
    checkpoint = load(run.checkpoint_callback.best_model_path)
    del checkpoint["levin"]
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 8)
    return checkpoint


def counts(*names, value):
    return {part: dict.fromkeys(names, value) for part in ("total", "current")}


# Each takes a file of the version after its own. ----------------------------------------------------------------------


def to_1_9(checkpoint):
    checkpoint["pytorch-lightning_version"] = "1.9.5"
    checkpoint["amp_scaling_state"] = None
    loops = checkpoint["loops"]
    fit, old = loops["fit_loop"], {}
    old["state_dict"] = {}
    old["epoch_progress"] = fit["epoch_progress"]
    old["epoch_loop.state_dict"] = fit["epoch_loop.state_dict"]
    old["epoch_loop.batch_progress"] = fit["epoch_loop.batch_progress"]
    old["epoch_loop.scheduler_progress"] = fit["epoch_loop.scheduler_progress"]
    old["epoch_loop.batch_loop.state_dict"] = {}
    old["epoch_loop.batch_loop.optimizer_loop.state_dict"] = {}
    progress = fit["epoch_loop.automatic_optimization.optim_progress"] | {"optimizer_position": 0}
    old["epoch_loop.batch_loop.optimizer_loop.optim_progress"] = progress
    old["epoch_loop.batch_loop.manual_loop.state_dict"] = {}
    manual = fit["epoch_loop.manual_optimization.optim_step_progress"]
    old["epoch_loop.batch_loop.manual_loop.optim_step_progress"] = manual
    old["epoch_loop.val_loop.state_dict"] = {}
    old["epoch_loop.val_loop.dataloader_progress"] = counts("ready", "completed", value=1)
    old["epoch_loop.val_loop.epoch_loop.state_dict"] = {}
    old["epoch_loop.val_loop.epoch_loop.batch_progress"] = fit["epoch_loop.val_loop.batch_progress"]
    loops["fit_loop"] = old
    for name in ("validate_loop", "test_loop", "predict_loop"):
        loops[name] = {
            "state_dict": {},
            "dataloader_progress": counts("ready", "completed", value=0),
            "epoch_loop.state_dict": {},
            "epoch_loop.batch_progress": loops[name]["batch_progress"],
        }


def to_1_8(checkpoint):
    checkpoint["pytorch-lightning_version"] = "1.8.6"
    checkpoint["callbacks"][KEY % ", 'save_on_train_epoch_end': True"] = checkpoint["callbacks"].pop(KEY % "")


def to_1_6(checkpoint):
    checkpoint["pytorch-lightning_version"] = "1.6.4"
    checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"] = {}


def to_1_5(checkpoint):
    # The counters stood outside the loops, which had none that could be relied on. The epoch was the one to go on with.
    checkpoint["pytorch-lightning_version"] = "1.5.10"
    checkpoint["epoch"] = 2
    fit = checkpoint["loops"]["fit_loop"]
    fit["epoch_progress"] = counts("ready", "started", "processed", "completed", value=0)
    progress = fit["epoch_loop.batch_loop.optimizer_loop.optim_progress"]["optimizer"]
    progress["step"] = counts("ready", "completed", value=0)


def to_1_4(checkpoint):
    # No loops; the state of a callback had its class as the key, which is read as the name of the class.
    checkpoint["pytorch-lightning_version"] = "1.4.9"
    del checkpoint["loops"]
    callbacks = checkpoint["callbacks"]
    checkpoint["callbacks"] = {key.split("{")[0]: state for key, state in callbacks.items()}


def to_0_9(checkpoint):
    checkpoint["pytorch-lightning_version"] = "0.9.0"
    del checkpoint["callbacks"]
    checkpoint["checkpoint_callback_best_model_score"] = torch.tensor(0.5)
    checkpoint["checkpoint_callback_best_model_path"] = "old.ckpt"
    checkpoint["early_stop_callback_wait"] = 1
    checkpoint["early_stop_callback_patience"] = 7


STEPS = {"1.9": to_1_9, "1.8": to_1_8, "1.6": to_1_6, "1.5": to_1_5, "1.4": to_1_4, "0.9": to_0_9}


def of_version(checkpoint, version):
    for name, step in STEPS.items():
        step(checkpoint)
        if name == version:
            break
    return checkpoint


@pytest.mark.parametrize("version", STEPS)
@pytest.mark.parametrize("kind", [Small, Manual], ids=["automatic", "manual"])
def test_a_file_of_an_older_version_goes_on_to_where_an_unbroken_run_ends(tmp_path, version, kind):
    old = of_version(newest_layout(tmp_path, kind), version)
    atomic_save(old, tmp_path / "old.ckpt")
    model, run = fitted(tmp_path, 4, tmp_path / "old.ckpt", kind)
    expected, unbroken = fitted(tmp_path / "unbroken", 4, kind=kind)
    assert (run.current_epoch, run.global_step) == (unbroken.current_epoch, unbroken.global_step) == (4, 16)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_layout_of_1_9_becomes_that_of_2(tmp_path):
    newest = newest_layout(tmp_path)
    for version in ("1.9", "1.8"):
        old = of_version(copy.deepcopy(newest), version)
        migrated = migrate(old)
        assert "amp_scaling_state" not in migrated
        assert migrated["callbacks"].keys() == newest["callbacks"].keys()
        for name, loop in newest["loops"].items():
            found = migrated["loops"][name]
            found.get("epoch_loop.automatic_optimization.optim_progress", {}).pop("optimizer_position", None)
            assert found == loop, name


def test_the_states_of_callbacks_are_found_under_older_keys(tmp_path):
    newest = newest_layout(tmp_path)
    newest["callbacks"]["EarlyStopping{'monitor': 'val', 'mode': 'min'}"]["wait_count"] = 3
    for version in ("1.8", "1.4", "0.9"):
        atomic_save(of_version(copy.deepcopy(newest), version), tmp_path / "old.ckpt")
        run = trainer(tmp_path, 2)
        run.validate(Small(), loader(2), ckpt_path=tmp_path / "old.ckpt", verbose=False)
        stopping = next(callback for callback in run.callbacks if isinstance(callback, EarlyStopping))
        assert stopping.wait_count == (1 if version == "0.9" else 3)
        if version == "0.9":
            assert (stopping.patience, run.checkpoint_callback.best_model_path) == (7, "old.ckpt")


@pytest.mark.parametrize("weights_only", [True, False])
def test_classes_as_keys_are_read_without_the_package(tmp_path, monkeypatch, weights_only):
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.early_stopping")
    kind = type("EarlyStopping", (), {"__module__": names[-1]})
    old = of_version(newest_layout(tmp_path), "1.4")
    old["callbacks"] = {kind: old["callbacks"]["EarlyStopping"] | {"wait_count": 3}}
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[names[-1]].EarlyStopping = kind
        torch.save(old, tmp_path / "old.ckpt")
    run = trainer(tmp_path, 3)
    run.fit(Small(), loader(), loader(2), ckpt_path=tmp_path / "old.ckpt", weights_only=weights_only)
    stopping = next(callback for callback in run.callbacks if isinstance(callback, EarlyStopping))
    assert stopping.wait_count == 4


@pytest.mark.parametrize(("version", "is_told"), [("2.0", False), ("2.99.1", False), ("3.0", True)])
def test_only_the_layout_of_a_newer_major_version_is_told(version, is_told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        migrate({"pytorch-lightning_version": version}, "x.ckpt")
    assert [str(warning.message)[:35] for warning in caught] == [
        f"x.ckpt was written by Lightning {version}"[:35]
    ] * is_told


def test_a_file_that_can_be_rewritten_is_told(tmp_path, caplog):
    newest = newest_layout(tmp_path)
    migrate(of_version(copy.deepcopy(newest), "1.9"), "x.ckpt")
    migrate(newest | {"pytorch-lightning_version": "2.0.0"}, "y.ckpt")
    assert [record.message for record in caplog.records if "levin upgrade" in record.message] == [
        "x.ckpt has the layout of Lightning 1.9.5. `levin upgrade x.ckpt` rewrites it once and for all."
    ]


def test_a_file_of_something_else_is_an_error():
    with pytest.raises(KeyError, match="was not saved by a Trainer"):
        migrate({"state_dict": {}})
