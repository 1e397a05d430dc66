"""Runs of many kinds that are stopped somewhere, gone on with in new objects, and compared with the unbroken run."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import torchmetrics
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from levin import Callback, LightningModule, Trainer
from levin.callbacks import EarlyStopping, ModelCheckpoint
from levin.callbacks.checkpoint import Checkpoint
from levin.data.combined import CombinedLoader
from levin.loggers.logger import Logger
from tests.data.loaders_for_tests import Augmented, Config, StatefulStream, Stream, as_is

MOMENTS = (
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
)


@dataclass(frozen=True)
class Setup:
    """One configuration out of all that there are."""

    train: Config = field(default_factory=lambda: Config(sampler="shuffle", sources="tpn"))
    kind: str = "plain"  # plain, stateful, stream, blind stream, list
    mode: str = ""  # of a combination of two loaders; "" for one loader
    val: str = "plain"  # plain, own, two, workers
    batches: int | None = 5
    val_batches: int | None = 2
    optimization: str = "automatic"  # automatic, overridden, manual
    accumulate: int = 1
    weighted: bool = False
    clip: float | None = None
    scheduler: str = "step"  # step, epoch, plateau step, plateau epoch, none
    val_interval: Any = 1.0
    every_n_epochs: int | None = 1
    reload: int = 0
    hooks: bool = True
    keeps: bool = False
    stops_early: bool = False
    log_every: int = 1
    sanity: int = 1
    epochs: int = 3


class Stop(Exception):
    """Ends a run after its checkpoint was saved."""


def value(batch: Any) -> Any:
    """Return what identifies the samples of a batch."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, (list, tuple)):
        return [value(item) for item in batch]
    return batch


def as_tensor(batch: Any) -> torch.Tensor:
    """Return numbers of a batch of any kind as rows of two."""
    if isinstance(batch, torch.Tensor):
        return batch.reshape(len(batch), -1)[:, :2].float()
    if batch is None:
        return torch.zeros(1, 2)
    numbers: list[float] = []

    def walk(item: Any) -> None:
        if isinstance(item, (list, tuple)) or (isinstance(item, torch.Tensor) and item.dim()):
            for child in item:
                walk(child)
        elif item is not None:
            numbers.append(float(item) / 10)

    walk(batch)
    numbers += [0.0] * (len(numbers) % 2)
    return torch.tensor(numbers).reshape(-1, 2)


class Model(LightningModule):
    def __init__(self, setup: Setup, events: list) -> None:
        super().__init__()
        self.setup_, self.events = setup, events
        self.automatic_optimization = setup.optimization != "manual"
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
        self.metric, self.mine, self.val_metric = (torchmetrics.MeanMetric() for _ in range(3))
        self.register_buffer("average", torch.zeros(1, 2))

    def training_step(self, batch, batch_idx):
        x = as_tensor(batch)
        loss = self.net(x).pow(2).mean()
        self.events.append(("training_step", value(batch), batch_idx, loss.item()))
        self.metric(loss.detach())
        self.mine.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        self.log("largest", loss, reduce_fx="max", on_epoch=True, on_step=False)
        if self.setup_.optimization != "manual":
            return {"loss": loss, "weight": len(x)} if self.setup_.weighted else loss
        first, second = self.optimizers()
        self.manual_backward(loss)
        if batch_idx % 2:
            first.step()
            first.zero_grad()
        if batch_idx % 3 == 0:
            second.step()
            self.lr_schedulers().step()
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x = as_tensor(batch)
        out = self.net(x).mean() + torch.rand(()) * random.random()
        self.events.append(("validation_step", value(batch), batch_idx, dataloader_idx, out.item()))
        self.val_metric.update(out)
        self.log("val", out, batch_size=len(x), on_step=True, on_epoch=True)

    def on_validation_epoch_end(self):
        self.log("val_metric", self.val_metric.compute())
        self.val_metric.reset()

    def configure_optimizers(self):
        setup = self.setup_
        if setup.optimization == "manual":
            first = torch.optim.SGD(self.net[0].parameters(), lr=0.02, momentum=0.9)
            second = torch.optim.Adam(self.net[2].parameters(), lr=0.05)
            return [first, second], [torch.optim.lr_scheduler.StepLR(second, 3, gamma=0.9)]
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        if setup.scheduler == "none":
            return optimizer
        kind, _, interval = setup.scheduler.rpartition(" ")
        if kind == "plateau":
            scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "loss"},
            }
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def on_save_checkpoint(self, checkpoint):
        self.events.append(("on_save_checkpoint",))


class Overriding(Model):
    """Has the hooks that are called in the middle of a step, and those that come after a callback's."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.average.mul_(0.5).add_(as_tensor(batch).mean(0))
        self.log("average", self.average.sum(), on_step=True, on_epoch=True, batch_size=1)
        self.events.append(("module.on_train_batch_end", value(batch), batch_idx, float(outputs["loss"])))

    def on_train_epoch_end(self):
        self.log("mine", self.mine.compute())
        self.mine.reset()
        self.events.append(("module.on_train_epoch_end", self.trainer.current_epoch))

    def on_validation_end(self):
        self.events.append(("module.on_validation_end", torch.rand(()).item(), self.training))

    def on_before_optimizer_step(self, optimizer):
        self.log("norm", sum(p.grad.norm() for p in self.parameters() if p.grad is not None))


class Stepping(Overriding):
    """Steps its optimizer itself."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.events.append(("optimizer_step", epoch, batch_idx))
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val or 1.0)

    def lr_scheduler_step(self, scheduler, metric):
        self.events.append(("lr_scheduler_step", None if metric is None else float(metric)))
        scheduler.step() if metric is None else scheduler.step(metric)


class Record(Callback):
    """Notes the hooks as they come."""

    def __init__(self, name: str, events: list) -> None:
        self.name, self.events, self.count = name, events, 0

    @property
    def state_key(self) -> str:
        return f"Record-{self.name}"

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        self.events.append((f"{self.name}.on_train_batch_end", batch_idx, trainer.global_step, self.count))


def _recorded(name: str) -> Any:
    def hook(self, trainer, pl_module, *args):
        self.events.append((f"{self.name}.{name}", trainer.current_epoch, trainer.global_step, self.count))

    return hook


for _name in (
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_end", "on_validation_start",
    "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_end", "on_train_batch_start",
    "on_validation_batch_start", "on_validation_batch_end",
):  # fmt: skip
    setattr(Record, _name, _recorded(_name))


class Save(Callback):
    """Saves at the n-th time that a moment comes."""

    def __init__(self, path: Path, moment: str, number: int, stops: bool, events: list) -> None:
        self.path, self.moment, self.number, self.stops, self.events = path, moment, number, stops, events
        self.mark: int | None = None

    def come(self, trainer: Trainer, moment: str) -> None:
        if moment != self.moment or trainer.sanity_checking:
            return
        self.number -= 1
        if self.number:
            return
        self.mark = len(self.events)
        trainer.save_checkpoint(self.path)
        del self.events[self.mark :]  # the hooks of this save, which the other run does not make
        if self.stops:
            raise Stop


class SaveLast(Save, Checkpoint):
    """Saves as checkpoint callbacks do, after the others."""


def _saving(name: str) -> Any:
    return lambda self, trainer, pl_module, *args: self.come(trainer, name)


for _name in MOMENTS:
    setattr(Save, _name, _saving(_name))


class Lines(Logger):
    """Keeps the lines."""

    def __init__(self, events: list) -> None:
        super().__init__()
        self.events = events

    name = "lines"
    version = 0

    def log_metrics(self, metrics, step=None):
        self.events.append(("line", step, {key: float(number) for key, number in metrics.items()}))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def train_loader(setup: Setup) -> Any:
    """Return new loaders, as a new process makes them."""
    if setup.kind == "stateful":
        # torchdata keeps no random states of workers.
        data = Augmented("" if setup.train.num_workers else "tn")
        made: Any = StatefulDataLoader(
            data, batch_size=3, shuffle=True, collate_fn=as_is, num_workers=setup.train.num_workers
        )
    elif setup.kind in ("stream", "blind stream"):
        stream = StatefulStream if setup.kind == "stream" else Stream
        made = DataLoader(stream([9, 7]), batch_size=2, num_workers=setup.train.num_workers, collate_fn=as_is)
    elif setup.kind == "list":
        made = [torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(7)]
    else:
        made = setup.train.make()
    if not setup.mode:
        return made
    other = DataLoader(Augmented("tg", size=7), batch_size=3, shuffle=True, collate_fn=as_is)
    return CombinedLoader([made, other], setup.mode)


def val_loader(setup: Setup) -> Any:
    if setup.val == "own":
        return Config(sampler="in_place", sources="ogl", batch_size=4).make()
    if setup.val == "workers":
        return Config(sampler="shuffle", sources="tno", batch_size=4, num_workers=1, persistent=True).make()
    if setup.val == "two":
        return [Config(sampler="shuffle", sources="t", batch_size=4).make() for _ in range(2)]
    return Config(sampler="sequential", sources="p", batch_size=4).make()


class Run:
    """One run of a set-up in new objects."""

    def __init__(
        self, setup: Setup, folder: Path, moment: str, number: int, stops: bool, is_last: bool, more: tuple = ()
    ) -> None:
        self.events: list[Any] = []
        self.numbers: list[Any] = []
        torch.manual_seed(5)
        random.seed(5)
        numpy.random.seed(5)
        kinds = {"automatic": Overriding if setup.hooks else Model, "overridden": Stepping, "manual": Overriding}
        self.model = kinds[setup.optimization](setup, self.events)
        self.path = folder / "stop.ckpt"
        self.save = (SaveLast if is_last else Save)(self.path, moment, number, stops, self.events)
        callbacks = [Record("first", self.events), self.save, Record("last", self.events), *more]
        if setup.stops_early:
            callbacks.append(EarlyStopping("val_metric", patience=50))
        if setup.keeps:
            callbacks.append(ModelCheckpoint(folder / "kept", monitor="loss", save_top_k=2, every_n_train_steps=2))
            callbacks.append(ModelCheckpoint(folder / "epochs", save_top_k=-1))
        limits = {"limit_train_batches": setup.batches, "limit_val_batches": setup.val_batches}
        self.trainer = Trainer(
            accelerator="cpu", max_epochs=setup.epochs, logger=Lines(self.events), callbacks=callbacks,
            enable_checkpointing=setup.keeps or is_last, enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=setup.accumulate, gradient_clip_val=setup.clip,
            val_check_interval=setup.val_interval, check_val_every_n_epoch=setup.every_n_epochs,
            reload_dataloaders_every_n_epochs=setup.reload, log_every_n_steps=setup.log_every,
            num_sanity_val_steps=setup.sanity, default_root_dir=str(folder),
            **{name: limit for name, limit in limits.items() if limit is not None},
        )  # fmt: skip
        if setup.reload:
            self.model.train_dataloader = lambda: train_loader(setup)
            self.model.val_dataloader = lambda: val_loader(setup)
            self.loaders: tuple = ()
        else:
            self.loaders = (train_loader(setup), val_loader(setup))

    def go(self, ckpt_path: Any = None) -> bool:
        """Run; return whether it came to its end."""
        # A new process has generators in another state.
        seed = 5 if ckpt_path is None else 6
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.trainer.fit(self.model, *self.loaders, ckpt_path=ckpt_path)
            except Stop:
                return False
        self.numbers = [torch.rand(1), random.random(), numpy.random.rand()]
        return True

    def expected_after_resume(self) -> list[Any]:
        """Return the events from where a run that goes on at the mark begins."""
        mark = self.save.mark
        assert mark is not None
        if self.save.moment.startswith("on_validation") and self.save.moment != "on_validation_end":
            mark = max(i for i, event in enumerate(self.events[:mark]) if event[0] == "first.on_validation_start")
        return self.events[mark:]

    def after_start(self) -> list[Any]:
        """Return the events of a resumed run from the beginning of training on."""
        return self.events[max(i for i, event in enumerate(self.events) if event[0] == "last.on_train_start") + 1 :]

    def state(self) -> dict[str, Any]:
        """Return everything that must be equal at the end."""
        trainer = self.trainer
        return {
            "weights": dict(self.model.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "callback_metrics": dict(trainer.callback_metrics),
            "logged_metrics": dict(trainer.logged_metrics),
            "callbacks": {
                callback.state_key: callback.state_dict()
                for callback in trainer.callbacks
                if not isinstance(callback, ModelCheckpoint)
            },
            "kept": [
                {Path(path).name: score for path, score in callback.best_k_models.items()}
                for callback in trainer.callbacks
                if isinstance(callback, ModelCheckpoint)
            ],
            "loops": trainer.fit_loop.state_dict(),
            "numbers": self.numbers,
        }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return where two trees differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{path}: {a} != {b}"]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a))} != {sorted(map(str, b))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b)) for line in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]


def first_difference(expected: list[Any], found: list[Any]) -> str:
    """Return where two sequences of events part, or ""."""
    for i, (a, b) in enumerate(zip(expected, found)):
        if a != b:
            before = "\n    ".join(map(str, expected[max(0, i - 4) : i]))
            return f"event {i} of {len(expected)}:\n    {before}\n  expected {a}\n  found    {b}"
    if len(expected) != len(found):
        return f"{len(expected)} events expected, {len(found)} found: {expected[len(found) :][:3]} {found[len(expected) :][:3]}"
    return ""


def check(setup: Setup, folder: Path, moment: str, number: int, is_last: bool = False) -> bool:
    """Compare; return False if the moment never came."""
    if moment == "on_train_epoch_end" and number >= setup.epochs:
        return False  # training is over, and a run that starts from there ends at once
    unbroken = Run(setup, folder / "unbroken", moment, number, stops=False, is_last=is_last)
    unbroken.go()
    if unbroken.save.mark is None:
        return False
    stopped = Run(setup, folder / "stopped", moment, number, stops=True, is_last=is_last)
    assert not stopped.go()
    resumed = Run(setup, folder / "stopped", "never", 0, stops=False, is_last=is_last)
    assert resumed.go(str(stopped.path))
    if unbroken.expected_after_resume() and not resumed.events:
        raise AssertionError("the resumed run did nothing")
    assert not (found := first_difference(unbroken.expected_after_resume(), resumed.after_start())), found
    lines = differences(unbroken.state(), resumed.state())
    assert not lines, "\n".join(lines)
    return True
