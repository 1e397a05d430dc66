"""Generated combinations of settings, hooks and user code: every hook call, loss, learning rate and weight, bit for bit."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from tests.distributed import run_ranks
from tests.parity import both, trace


@dataclass(frozen=True)
class Plan:
    """What the user code of one run does."""

    hooks: tuple[str, ...] = ()
    form: str = "tensor"
    none_at: tuple[int, ...] = ()
    skip_at: tuple[int, int] | None = None
    stop_iteration_at: tuple[int, int] | None = None
    raise_at: tuple[int, int] | None = None
    stop_at: tuple[int, int] | None = None
    scheduler: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    optimizer: str = "sgd"
    has_callback: bool = True
    validates: bool = True
    num_batches: int = 4
    data: str = "shuffled"
    is_manual: bool = False
    fails_in: str = ""
    fails_at: int = 2
    then: str = ""
    trainer: dict[str, Any] = field(default_factory=dict)


def make_module(seen: trace.Trace, plan: Plan) -> Any:
    accumulate = plan.trainer.get("accumulate_grad_batches", 1)

    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
            self.dropout = torch.nn.Dropout(0.2)
            self.automatic_optimization = not plan.is_manual

        def forward(self, batch):
            parts = batch if isinstance(batch, (list, tuple)) else [batch]
            return torch.cat([self.layer(part) for part in parts if part is not None])

        def training_step(self, batch, batch_idx):
            at = (self.current_epoch, batch_idx)
            seen.note("training_step", at, self.global_step, batch)
            if plan.stop_at == at:
                self.trainer.should_stop = True
            if plan.raise_at == at:
                raise KeyError("meant")
            if plan.stop_iteration_at == at:
                raise StopIteration
            loss = self.dropout(self(batch)).pow(2).mean()
            self.log("train", loss, on_step=True, on_epoch=True)
            if plan.is_manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            if batch_idx in plan.none_at:
                return None
            return {"loss": loss, "extra": batch_idx} if plan.form == "dict" else loss

        def validation_step(self, batch, batch_idx):
            value = self(batch).pow(2).mean()
            seen.note("validation_step", batch_idx, value, self.training)
            self.log("val", value)

        def test_step(self, batch, batch_idx):
            value = self(batch).pow(2).mean()
            seen.note("test_step", batch_idx, value, self.training)
            self.log("test", value)

        def predict_step(self, batch, batch_idx):
            seen.note("predict_step", batch_idx, batch, self.training)
            return self(batch)

        def on_train_batch_start(self, batch, batch_idx):
            if plan.skip_at == (self.current_epoch, batch_idx):
                return -1
            return None

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if "loss" in outputs:
                # Differs on purpose (outputs["loss"]): Lightning's is divided by the accumulation window.
                outputs = {**outputs, "loss": outputs["loss"] / (accumulate if seen.is_levin else 1)}
            rates = [group["lr"] for group in self.optimizers().param_groups]
            seen.note("on_train_batch_end", outputs, batch_idx, rates, self.global_step, *self.parameters())

        def on_train_epoch_end(self):
            metrics = self.trainer.callback_metrics
            mean = trace.Near(metrics.get("train_epoch", 0.0))
            loop = self.trainer.fit_loop.epoch_loop
            seen.note("on_train_epoch_end", self.current_epoch, mean, metrics.get("val"), self.training)
            seen.note("counters", loop.batch_progress.state_dict(), loop.scheduler_progress.state_dict())

        def configure_optimizers(self):
            if plan.optimizer == "lbfgs":
                optimizer = torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
            elif plan.optimizer == "adam":
                optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
            else:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            if plan.scheduler is None:
                return optimizer
            config = {"interval": plan.interval, "frequency": plan.frequency}
            if plan.scheduler == "plateau":
                plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
                config |= {"scheduler": plateau, "monitor": "train_step" if plan.interval == "step" else "train"}
            else:
                config |= {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)}
            return {"optimizer": optimizer, "lr_scheduler": config}

    seen.module(Model, comparable(plan.hooks, plan))
    return Model()


def comparable(hooks: list[str], plan: Plan) -> list[str]:
    """Return the hooks whose arguments are the same on both."""
    is_divided = plan.trainer.get("accumulate_grad_batches", 1) > 1
    left_out = {"on_train_batch_end"} if is_divided else set()
    if plan.scheduler == "plateau":
        left_out.add("lr_scheduler_step")  # the last bits of a mean, see on_train_epoch_end
    return [name for name in hooks if name not in left_out]


class Stream(IterableDataset):
    """Batches of unknown number."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(trace.batches(self.num_batches).dataset.split(2))


class Sized:
    """A loader of the user's own; it draws no random numbers, since Lightning iterates it twice when training begins."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(trace.batches(self.num_batches).dataset.split(2))


class Unsized(Stream):
    """The same without a length."""


def combined(mode: str, framework: Any, number: int) -> Any:
    """Return a loader of ``number`` batches, made of two loaders of which one is longer by a batch."""
    package = "lightning.pytorch.utilities" if framework.name == "lightning" else "levin.data"
    parts = [trace.batches(number), trace.batches(number + 1 if mode == "min_size" else max(1, number - 1), 7)]
    return importlib.import_module(package).CombinedLoader(parts, mode)


def in_batches_of_its_own(framework: Any, number: int) -> Any:
    pairs = [[index, index + 1] for index in range(0, 2 * number, 2)]
    return DataLoader(trace.batches(number).dataset, batch_sampler=pairs)


KINDS_OF_DATA: dict[str, Callable[[Any, int], Any]] = {
    "shuffled": lambda framework, number: trace.batches(number, shuffle=True),
    "stream": lambda framework, number: DataLoader(Stream(number), batch_size=None),
    "sized": lambda framework, number: Sized(number),
    "unsized": lambda framework, number: Unsized(number),
    "own batches": in_batches_of_its_own,
    **{mode: functools.partial(combined, mode) for mode in ("min_size", "max_size", "max_size_cycle")},
}


def failing(framework: Any, hook: str, at: int) -> Any:
    """Return a callback that raises when the hook is called for that time."""
    calls: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise OSError("meant")

    return type("Failing", (framework.Callback,), {hook: fail})()


def user_code(seen: trace.Trace, plan: Plan) -> None:
    module = make_module(seen, plan)
    callbacks = [seen.callback(comparable(both.HOOKS_OF_CALLBACK, plan))] if plan.has_callback else []
    if plan.fails_in:
        callbacks.append(failing(seen.framework, plan.fails_in, plan.fails_at))
    trainer = seen.trainer(**{"max_epochs": 2, "callbacks": callbacks, "log_every_n_steps": 1, **plan.trainer})
    # Where a loader is split, each process has as many batches as one alone.
    number = plan.num_batches * (plan.trainer.get("devices", 1) if plan.data in SPLIT else 1)
    loaders = [KINDS_OF_DATA[plan.data](seen.framework, number)] + ([trace.batches(2, 5)] if plan.validates else [])
    seen.attempt(trainer.fit, module, *loaders)
    seen.note("end", trainer.global_step, trainer.current_epoch)
    seen.note("weights", *module.state_dict().values())
    if "validation" in plan.fails_in or "sanity" in plan.fails_in:
        return  # Lightning leaves the module in eval mode, which differs on purpose.
    seen.note("modes", [child.training for child in module.modules()])
    if plan.fails_in or plan.raise_at or plan.then == "fit":
        module.dropout.p = (
            0.0  # A later fit, and one after an error, draws other random numbers, which differs on purpose.
        )
    if plan.then:
        seen.attempt(after_the_fit, trainer, module, plan.then)


def after_the_fit(trainer: Any, module: Any, method: str) -> Any:
    result = getattr(trainer, method)(module, trace.batches(4, 6))
    if method in ("validate", "test"):
        return [{name: trace.Near(value) for name, value in values.items()} for values in result]
    return result


QUIET_HOOKS = [
    "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step",
    "optimizer_zero_grad", "backward", "lr_scheduler_step", "configure_gradient_clipping", *trace.TRANSFER,
]  # fmt: skip

FAILING_HOOKS = [
    "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_validation_start",
    "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end", "on_before_optimizer_step", "on_before_backward",
]  # fmt: skip
ONCE_A_FIT = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_end",
    "on_fit_end",
]

# From which seed on, and how many: `make test-parity-fuzz` says so. One seed gives 120 programs, and 12 for two processes.
FIRST = int(os.environ.get("LEVIN_PARITY_SEED", "0"))
STARTS = range(FIRST, FIRST + int(os.environ.get("LEVIN_PARITY_SEEDS", "1")))
SPLIT = ("shuffled", "own batches", "min_size", "max_size", "max_size_cycle")

moments = st.none() | st.tuples(st.integers(0, 1), st.integers(0, 3))


@st.composite
def plans(draw: Any, strategies: tuple[str, ...] = ("auto",)) -> Plan:
    strategy = draw(st.sampled_from(strategies))
    num_batches = draw(st.sampled_from([4, 4, 4, 1, 2, 3, 6]))
    # A last window that is shorter than the others differs on purpose.
    accumulate = draw(st.sampled_from([number for number in (1, 1, 2, 4) if num_batches % number == 0]))
    trainer: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    if strategy != "auto":
        trainer |= {"strategy": strategy, "devices": 2}
    is_manual = accumulate == 1 and draw(st.integers(0, 4)) == 0
    data = draw(st.sampled_from([kind for kind in KINDS_OF_DATA if strategy == "auto" or kind != "own batches"]))
    # Lightning refuses the others.
    intervals = [1.0, 1.0, 2 if num_batches > 1 else 1]
    if data not in ("stream", "unsized") and num_batches >= 4:
        intervals.append(0.25)
    if not is_manual and draw(st.booleans()):
        trainer["gradient_clip_val"] = draw(st.sampled_from([0.05, 0.5]))
        trainer["gradient_clip_algorithm"] = draw(st.sampled_from(["norm", "value", None]))
    trainer["val_check_interval"] = draw(st.sampled_from(intervals))
    if draw(st.integers(0, 4)) == 0:
        trainer["max_steps"] = draw(st.integers(1, 5))
    if draw(st.integers(0, 4)) == 0:
        trainer["num_sanity_val_steps"] = 0
    special = draw(st.sampled_from(["", "", "", "skip_at", "stop_iteration_at", "raise_at", "stop_at"]))
    hooks = draw(st.sampled_from(["none", "all", "some"]))
    names = {"none": [], "all": [n for n in both.HOOKS_OF_MODULE if "checkpoint" not in n]}.get(hooks)
    if names is None:
        names = draw(st.lists(st.sampled_from(QUIET_HOOKS), unique=True, max_size=5))
    optimizer = draw(st.sampled_from(["sgd", "sgd", "adam", *([] if is_manual else ["lbfgs"])]))
    fails_in = draw(st.sampled_from(["", "", "", *FAILING_HOOKS, draw(st.sampled_from(ONCE_A_FIT))]))
    # With manual optimization a StopIteration differs on purpose.
    special = "" if is_manual and special == "stop_iteration_at" else special
    moment = draw(moments) if special else None
    none_at = tuple(draw(st.sets(st.integers(0, 3), max_size=2))) if optimizer != "lbfgs" else ()
    # An epoch that is skipped from its first batch on, or in all of them, has no loss to go by: both refuse.
    is_skipped = special == "skip_at" and moment is not None and moment[1] == 0
    has_loss = not is_skipped and not set(range(num_batches)) <= set(none_at)
    schedulers = [None, "step", *(["plateau"] if has_loss else [])]
    return Plan(
        hooks=tuple(names),
        form=draw(st.sampled_from(["tensor", "dict"])),
        none_at=none_at,
        scheduler=draw(st.sampled_from(schedulers)),
        interval=draw(st.sampled_from(["epoch", "step"])),
        frequency=draw(st.sampled_from([1, 2, 3])),
        optimizer=optimizer,
        has_callback=draw(st.booleans()),
        validates=draw(st.integers(0, 3)) > 0,
        num_batches=num_batches,
        data=data,
        is_manual=is_manual,
        fails_in=fails_in,
        fails_at=1 if fails_in in ONCE_A_FIT else 2,
        then=draw(st.sampled_from(["", "", "validate", "test", "predict", "fit"])),
        trainer=trainer,
        **({special: moment} if special else {}),
    )


def drawn(start: int, number: int, **arguments: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Call a function with ``number`` drawn arguments, the same for the same start."""
    own = settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return lambda test: seed(start)(own(given(**arguments)(test)))


@pytest.mark.lightning_raises("RuntimeError")
@pytest.mark.parametrize("start", STARTS)
def test_a_generated_fit_is_the_same(tmp_path: Path, start: int) -> None:
    @drawn(start, 120, plan=plans())
    def program(plan: Plan) -> None:
        trace.same(functools.partial(user_code, plan=plan), tmp_path)

    program()


def differences(programs: list[Plan], tmp_path: Path) -> None:
    """Run each program on this rank, and raise with all that differ."""
    found = []
    for index, plan in enumerate(programs):
        both.errors_of_lightning.clear()
        try:
            trace.same(functools.partial(user_code, plan=plan), tmp_path / str(index))
            assert {type(error).__name__ for error in both.errors_of_lightning} <= {"RuntimeError"}
        except AssertionError as error:
            found.append(f"{plan}\n{error}")
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("start", STARTS)
def test_a_generated_fit_on_two_processes_is_the_same(tmp_path: Path, start: int) -> None:
    plan = plans(("ddp", "ddp_find_unused_parameters_true"))

    @drawn(start, 1, programs=st.lists(plan, min_size=12, max_size=12))
    def ranks(programs: list[Plan]) -> None:
        run_ranks(differences, 2, {"programs": programs, "tmp_path": tmp_path}, timeout_s=200.0)

    ranks()
