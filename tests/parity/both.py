"""The same user code on Lightning and on levin."""

from __future__ import annotations

import os
import traceback
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

HOOKS_OF_MODULE = (
    "prepare_data setup teardown configure_model on_fit_start on_fit_end on_train_start on_train_end on_train_epoch_start"
    " on_train_epoch_end on_train_batch_start on_train_batch_end on_validation_start on_validation_end"
    " on_validation_epoch_start on_validation_epoch_end on_validation_batch_start on_validation_batch_end on_test_start"
    " on_test_end on_test_epoch_start on_test_epoch_end on_test_batch_start on_test_batch_end on_predict_start"
    " on_predict_end on_predict_epoch_start on_predict_epoch_end on_predict_batch_start on_predict_batch_end"
    " on_validation_model_zero_grad on_validation_model_eval on_test_model_eval on_predict_model_eval"
    " on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step"
    " optimizer_step optimizer_zero_grad backward lr_scheduler_step configure_gradient_clipping"
    " on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer on_save_checkpoint on_load_checkpoint"
).split()
HOOKS_OF_CALLBACK = (
    "setup teardown on_fit_start on_fit_end on_sanity_check_start on_sanity_check_end on_train_batch_start"
    " on_train_batch_end on_train_epoch_start on_train_epoch_end on_validation_epoch_start on_validation_epoch_end"
    " on_test_epoch_start on_test_epoch_end on_predict_epoch_start on_predict_epoch_end on_validation_batch_start"
    " on_validation_batch_end on_test_batch_start on_test_batch_end on_predict_batch_start on_predict_batch_end"
    " on_train_start on_train_end on_validation_start on_validation_end on_test_start on_test_end on_predict_start"
    " on_predict_end on_exception state_dict load_state_dict on_save_checkpoint on_load_checkpoint on_before_backward"
    " on_after_backward on_before_optimizer_step on_before_zero_grad"
).split()


def lightning() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch as pl
        from lightning.pytorch.loggers.logger import Logger
        from lightning.pytorch.plugins import Precision
    return SimpleNamespace(
        name="lightning",
        module=pl,
        LightningModule=pl.LightningModule,
        Trainer=pl.Trainer,
        Callback=pl.Callback,
        DataModule=pl.LightningDataModule,
        Logger=Logger,
        Precision=Precision,
    )


def levin() -> SimpleNamespace:
    import levin as lv
    from levin.loggers.logger import Logger
    from levin.precision import Precision

    return SimpleNamespace(
        name="levin",
        module=lv,
        LightningModule=lv.LightningModule,
        Trainer=lv.Trainer,
        Callback=lv.Callback,
        DataModule=lv.LightningDataModule,
        Logger=Logger,
        Precision=Precision,
    )


errors_of_lightning: list[BaseException] = []
"""What a test caught that did not come out of levin, see ``conftest.py``."""


def caught(error: BaseException) -> None:
    """Note an error that a test caught in order to compare it; every ``except`` of this folder calls this.

    Two frameworks that fail alike are no proof of anything, so the test has to say which errors of Lightning it expects.
    """
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = any("/levin/" in frame.filename.replace(os.sep, "/") for frame in frames)
    if not is_ours and error.args != ("meant",):
        errors_of_lightning.append(error)


def describe(value: Any) -> Any:
    """What of an argument is compared: plain values, and the kind of everything else."""
    if isinstance(value, (int, float, str, type(None))):
        return value
    if isinstance(value, dict):
        return sorted(map(str, value))
    return "batch" if isinstance(value, (list, tuple)) else "object"


def recording_module(framework: SimpleNamespace, calls: list, **options: Any) -> Any:
    """A module of the framework that writes every hook call into ``calls``."""

    class Recorder(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 2)
            self.automatic_optimization = not options.get("manual", False)

        def training_step(self, batch, batch_idx):
            calls.append(("M", "training_step", batch_idx))
            loss = self.layer(batch[0]).pow(2).mean()
            if options.get("log", True):
                self.log("train", loss, on_step=True, on_epoch=True, prog_bar=True)
                self.log("plain", loss * 2)
            if options.get("stop_at") == (self.current_epoch, batch_idx):
                self.trainer.should_stop = True
            if options.get("none_at") == batch_idx:
                return None
            if options.get("raise_at") == batch_idx:
                raise ValueError("meant")
            if options.get("manual"):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return {"loss": loss, "extra": 1} if options.get("as_dict") else loss

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            calls.append(("M", "validation_step", batch_idx, dataloader_idx))
            self.log("val", self.layer(batch[0]).mean())
            return {"v": 1}

        def test_step(self, batch, batch_idx):
            calls.append(("M", "test_step", batch_idx))
            self.log_dict({"t1": self.layer(batch[0]).mean(), "t2": 3.0})

        def predict_step(self, batch, batch_idx):
            return self.layer(batch[0])

        def on_train_epoch_end(self):
            calls.append(("M", "on_train_epoch_end"))
            if options.get("log", True):
                self.log("at_end", float(self.current_epoch))

        def configure_optimizers(self):
            calls.append(("M", "configure_optimizers"))
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            interval = options.get("scheduler")
            if interval is None:
                return optimizer
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {
                    "scheduler": scheduler,
                    "interval": interval,
                    "frequency": options.get("frequency", 1),
                },
            }

    def wrap(kind: type, name: str, who: str, skip: int) -> None:
        original = getattr(kind, name)

        def hook(self, *args, **kwargs):
            described = tuple(map(describe, args[skip:])) + tuple(
                (key, describe(kwargs[key])) for key in sorted(kwargs)
            )
            calls.append((who, name, *described))
            return original(self, *args, **kwargs)

        setattr(kind, name, hook)

    for name in HOOKS_OF_MODULE:
        if name not in vars(Recorder):
            wrap(Recorder, name, "M", 0)

    class RecorderCallback(framework.Callback):
        pass

    for name in HOOKS_OF_CALLBACK:
        wrap(RecorderCallback, name, "C", 2)
    return Recorder(), RecorderCallback()


class Lines(list):
    """What a logger received."""


def recording_logger(framework: SimpleNamespace, lines: Lines) -> Any:
    class ListLogger(framework.Logger):
        name = "list"
        version = 0

        def log_metrics(self, metrics, step=None):
            lines.append((step, {key: round(float(value), 5) for key, value in sorted(metrics.items())}))

        def log_hyperparams(self, params, *args, **kwargs):
            lines.append(("hparams", dict(params)))

        def finalize(self, status):
            lines.append(("finalize", status))

    return ListLogger()


def loader(num_batches: int = 4, seed: int = 3) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(torch.randn(num_batches * 2, 4, generator=generator)), batch_size=2)


def quiet(framework: SimpleNamespace, folder: Any, **kwargs: Any) -> Any:
    settings = dict(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder / framework.name),
    )
    return framework.Trainer(**{**settings, **kwargs})
