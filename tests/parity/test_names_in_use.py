"""What released packages read from a Trainer, and what they derive from, on both frameworks."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

from tests.parity import both

# Each is read in a training batch; `t` is the Trainer, `m` the module.
READ = """
t._accelerator_connector.is_distributed
t._accelerator_connector.strategy is t.strategy
t._accelerator_connector.accelerator is t.accelerator
[type(c).__name__ for c in t._callback_connector._reorder_callbacks(t.callbacks[::-1])][-1]
t._checkpoint_connector._loaded_checkpoint
t._checkpoint_connector is t._checkpoint_connector
len(t.fit_loop._combined_loader.flattened)
len(t.fit_loop._combined_loader)
t.fit_loop._data_source.is_defined()
[len(b[0]) for b in t.fit_loop._data_source.dataloader()]
t.fit_loop.epoch_loop.val_loop._data_source.is_defined()
t.validate_loop._data_source.is_defined()
t.test_loop._data_source.is_defined()
t.fit_loop.epoch_loop._batches_that_stepped
t.fit_loop.epoch_loop.batch_progress.current.ready
t.fit_loop.epoch_loop.batch_progress.is_last_batch
t.fit_loop.epoch_progress.current.processed
t.fit_loop.max_epochs
t.fit_loop.epoch_loop.max_steps
t.fit_loop.epoch_loop.global_step
t.fit_loop.epoch_loop.batch_idx
t.predict_loop.epoch_batch_indices
t.checkpoint_callback._monitor_candidates(t)["epoch"]
sorted(t.checkpoint_callback._monitor_candidates(t))
t.checkpoint_callback.best_model_path
t.early_stopping_callback.monitor
t.early_stopping_callback.stopped_epoch
t.early_stopping_callback.wait_count
len(t.callbacks) > 1
t.lr_scheduler_configs
len(t.strategy.optimizers)
t.strategy.lr_scheduler_configs
t.strategy.model is m
str(t.strategy.root_device)
t.strategy.broadcast(3)
t.state.fn == "fit"
t.state.stage == "train"
t.sanity_checking
t.is_global_zero
t.world_size
t.num_devices
list(map(str, t._accelerator_connector._parallel_devices))
t.num_nodes
t.global_rank
t.num_training_batches
t.estimated_stepping_batches
t.log_every_n_steps
t.accumulate_grad_batches
t.gradient_clip_val
t.limit_train_batches
t.precision
t.precision_plugin.precision
t.max_epochs
t.max_steps
t.should_stop
sorted(t.callback_metrics)
t.ckpt_path
t.datamodule
t.logger
t.loggers
t.log_dir == t.default_root_dir
t._default_root_dir == t.default_root_dir
setattr(t, "_default_root_dir", "/elsewhere") or (t.default_root_dir, t.log_dir)
m._trainer is t
m._hparams
m._hparams_initial
m._log_hyperparams
m.hparams.width
m.trainer is t
m.automatic_optimization
m.example_input_array
""".strip().splitlines()


def train(framework: Any, folder: Any, callback: Any) -> Any:
    pl = framework.module
    callbacks = pl.callbacks if hasattr(pl, "callbacks") else None
    assert callbacks is not None

    class Model(framework.LightningModule):
        def __init__(self, width=4):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val", self.layer(batch[0]).pow(2).mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    checkpoint = callbacks.ModelCheckpoint(folder / framework.name)
    module = Model()
    trainer = both.quiet(
        framework, folder, max_epochs=1, enable_checkpointing=True, num_sanity_val_steps=0,
        callbacks=[callback, callbacks.EarlyStopping("val"), checkpoint],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, both.loader(), both.loader())
    return trainer


def answers(framework: Any, folder: Any) -> dict[str, str]:
    found: dict[str, str] = {}

    class Reader(framework.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                for code in READ:
                    try:
                        found[code] = repr(eval(code, {"t": trainer, "m": pl_module}))
                    except (AttributeError, RuntimeError) as error:
                        found[code] = f"raised {error}"

    train(framework, folder, Reader())
    return found


def test_attributes_that_packages_read_answer_the_same(tmp_path):
    theirs, ours = answers(both.lightning(), tmp_path), answers(both.levin(), tmp_path)
    assert ours == theirs


def metrics_at_epoch_ends(framework: Any, folder: Any) -> list[list[str]]:
    found: list[list[str]] = []

    class Reader(framework.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            found.append(sorted(trainer.callback_metrics))

        def on_train_epoch_start(self, trainer, pl_module):
            found.append(sorted(trainer.callback_metrics))

    recorder, _ = both.recording_module(framework, [])
    both.quiet(framework, folder, max_epochs=2, callbacks=[Reader()]).fit(recorder, both.loader())
    return found


def test_values_of_the_last_step_can_be_read_at_the_end_of_the_epoch(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (metrics_at_epoch_ends(framework(), tmp_path) for framework in (both.lightning, both.levin))
    assert ours == theirs
    assert {"plain", "train_step", "train_epoch"} <= set(ours[1])


def test_signatures_that_packages_copy_hold_the_same_arguments():
    theirs, ours = both.lightning().module, both.levin().module
    for find in (
        lambda pl: pl.Trainer.__init__,
        lambda pl: pl.Trainer,
        lambda pl: pl.Trainer.fit,
        lambda pl: pl.LightningModule.log,
        lambda pl: pl.callbacks.ModelCheckpoint.__init__,
        lambda pl: pl.callbacks.EarlyStopping.__init__,
        lambda pl: pl.seed_everything,
    ):
        expected = {name: p.default for name, p in inspect.signature(find(theirs)).parameters.items()}
        found = {name: p.default for name, p in inspect.signature(find(ours)).parameters.items()}
        assert expected == {name: found.get(name, "missing") for name in expected}


@pytest.mark.parametrize("framework", [both.lightning, both.levin], ids=["lightning", "levin"])
def test_subclasses_that_packages_write_run(framework, tmp_path):
    framework = framework()
    pl = framework.module
    from importlib import import_module

    root = "lightning.pytorch" if framework.name == "lightning" else "levin"
    strategies, callbacks, loggers = (
        import_module(f"{root}.{room}") for room in ("strategies", "callbacks", "loggers")
    )
    seen: list[str] = []

    class MyTrainer(pl.Trainer):
        def __init__(self, *args, shout=False, **kwargs):
            super().__init__(*args, **kwargs)
            self.shout = shout
            self._model = None

        def fit(self, *args, **kwargs):
            seen.append("fit")
            super().fit(*args, **kwargs)

    class MyCheckpoint(callbacks.ModelCheckpoint):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            seen.append("saved")
            checkpoint["mine"] = 1

    class MyLogger(loggers.Logger):
        name, version = "mine", 0

        def log_metrics(self, metrics, step=None):
            seen.append("metrics")

        def log_hyperparams(self, params, *args, **kwargs):
            pass

    class MyBar(callbacks.ProgressBar):
        def on_train_batch_end(self, *args):
            seen.append("bar")

    class MyStrategy(strategies.SingleDeviceStrategy):
        def broadcast(self, obj, src=0):
            seen.append("broadcast")
            return super().broadcast(obj, src)

    assert issubclass(type("MyDDP", (strategies.DDPStrategy,), {}), strategies.Strategy)
    recorder, _ = both.recording_module(framework, [])
    trainer = MyTrainer(
        max_steps=2, accelerator="cpu", strategy=MyStrategy(device=torch.device("cpu")), logger=MyLogger(), shout=True,
        log_every_n_steps=1, default_root_dir=tmp_path, enable_model_summary=False,
        callbacks=[MyCheckpoint(tmp_path / framework.name), MyBar()],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(recorder, both.loader())
    assert {"fit", "saved", "metrics", "bar", "broadcast"} == set(seen) and trainer.shout
