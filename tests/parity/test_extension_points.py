"""Subclasses that override every documented method of a strategy, a precision and an accelerator see the same calls."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from levin.strategies import DDPStrategy
from tests.distributed import world_size
from tests.parity import both
from tests.strategies.small import QUIET

# How the frameworks talk to other processes between set-up and end is their own affair, and so is asking for a context.
OWN_AFFAIR = {
    "barrier", "broadcast", "reduce", "all_gather", "reduce_boolean_decision", "is_global_zero", "process_group_backend",
    "forward_context", "main_params", "convert_output", "tensor_init_context", "module_init_context",
    "model_sharded_context", "autocast_context_manager",
}  # fmt: skip


def frameworks() -> tuple[SimpleNamespace, SimpleNamespace]:
    both.lightning()
    from lightning.pytorch import accelerators, plugins, strategies

    import levin
    from levin import accelerators as own_accelerators
    from levin import precision as own_precision
    from levin import strategies as own_strategies

    theirs = both.lightning()
    return (
        SimpleNamespace(
            Trainer=theirs.Trainer, LightningModule=theirs.LightningModule, Strategy=strategies.SingleDeviceStrategy,
            Base=strategies.Strategy, Precision=plugins.Precision, Mixed=plugins.MixedPrecision,
            Accelerator=accelerators.CPUAccelerator,
        ),
        SimpleNamespace(
            Trainer=levin.Trainer, LightningModule=levin.LightningModule, Strategy=own_strategies.SingleDeviceStrategy,
            Base=own_strategies.Strategy, Precision=own_precision.Precision, Mixed=own_precision.MixedPrecision,
            Accelerator=own_accelerators.CPUAccelerator,
        ),
    )  # fmt: skip


def documented(name: str) -> list[str]:
    """The public methods of Lightning's class, which is what users' subclasses override."""
    kind = getattr(frameworks()[0], name)
    names = [each for each in dir(kind) if not each.startswith("_")]
    return [each for each in names if inspect.isfunction(inspect.getattr_static(kind, each))]


def shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)}"
    if isinstance(value, (bool, int, float, type(None))):
        return repr(value)
    if isinstance(value, str):
        return str(getattr(value, "value", value)).rsplit("/", 1)[-1]
    if callable(value) and not isinstance(value, torch.nn.Module):
        return "function"
    return type(value).__name__.removeprefix("Lightning")


class Recorder:
    """Writes down the calls of the methods of its subclasses, and which of them came from inside of which."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.depth = 0

    def subclass(self, kind: type, names: list[str], label: str) -> type:
        def recorded(name: str) -> Any:
            def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
                given = [shown(arg) for arg in args] + [f"{key}={shown(value)}" for key, value in kwargs.items()]
                if name not in OWN_AFFAIR:
                    self.calls.append(f"{'  ' * self.depth}{label}.{name}({', '.join(given)})")
                self.depth += 1
                try:
                    return getattr(super(made, owner), name)(*args, **kwargs)
                finally:
                    self.depth -= 1

            return method

        made: type = type(f"Recorded{label}", (kind,), {name: recorded(name) for name in names})
        return made


def module_of(framework: SimpleNamespace, is_manual: bool) -> Any:
    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)
            self.automatic_optimization = not is_manual

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).pow(2).mean()
            if is_manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
            return loss

        def validation_step(self, batch, batch_idx):
            return self.layer(batch).mean()

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self.layer(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Model()


def calls_of(framework: SimpleNamespace, folder: Any, case: str) -> list[str]:
    recorder = Recorder()
    precision_class = framework.Mixed if case == "mixed" else framework.Precision
    precision = recorder.subclass(precision_class, documented("Mixed" if case == "mixed" else "Precision"), "Precision")
    accelerator = recorder.subclass(framework.Accelerator, ["setup_device", "setup", "teardown"], "Accelerator")()
    strategy = recorder.subclass(framework.Strategy, documented("Strategy"), "Strategy")(
        device="cpu",
        accelerator=accelerator,
        precision_plugin=precision("bf16-mixed", "cpu") if case == "mixed" else precision(),
    )
    trainer = framework.Trainer(
        strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=None if case == "manual" else 0.5, limit_val_batches=1,
        num_sanity_val_steps=0, accumulate_grad_batches=2 if case == "accumulate" else 1, default_root_dir=folder,
        gradient_clip_algorithm="value" if case == "clip by value" else None,
    )  # fmt: skip
    module = module_of(framework, case == "manual")
    data = DataLoader(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), batch_size=4)
    if case in ("validate", "test", "predict"):
        getattr(trainer, case)(module, data, **({} if case == "predict" else {"verbose": False}))
        return recorder.calls
    trainer.fit(module, data, data)
    if case == "resume":
        path = folder / "x.ckpt"
        trainer.save_checkpoint(path)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data, data, ckpt_path=path)
    return recorder.calls


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    ["automatic", "manual", "accumulate", "clip by value", "mixed", "resume", "validate", "test", "predict"],
)
def test_every_overridden_method_is_called_as_lightning_calls_it(tmp_path, case):
    theirs, ours = (calls_of(framework, tmp_path, case) for framework in frameworks())
    assert ours == theirs


@pytest.mark.filterwarnings("ignore")
def test_contexts_stand_around_configure_model(tmp_path):
    seen = []
    for framework in frameworks():
        entered: list[str] = []

        def entering(name: str, entered: list[str] = entered) -> Any:
            def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
                entered.append(name)
                return getattr(super(type(owner), owner), name)(*args, **kwargs)

            return method

        names = ("tensor_init_context", "model_sharded_context", "module_init_context")
        strategy = type("Own", (framework.Strategy,), {name: entering(name) for name in names[:2]})
        precision = type("OwnPrecision", (framework.Precision,), {names[2]: entering(names[2])})

        class Late(type(module_of(framework, False))):
            def configure_model(self, entered=entered):
                entered.append("configure_model")

        trainer = framework.Trainer(
            strategy=strategy(device="cpu", precision_plugin=precision()), max_steps=1, logger=False,
            accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Late(), DataLoader(torch.randn(2, 4)))
        assert entered[-1] == "configure_model"
        seen.append(set(entered))
    assert seen[0] == seen[1]


@world_size(1)
def test_an_own_way_to_keep_gradients_from_other_ranks_is_used():
    entered = []

    class Own(DDPStrategy):
        def block_backward_sync(self):
            entered.append(True)
            return super().block_backward_sync()

    _, ours = frameworks()
    trainer = ours.Trainer(max_epochs=1, devices=1, strategy=Own(), accumulate_grad_batches=3, **QUIET)
    data = DataLoader(torch.randn(12, 4), batch_size=4)
    trainer.fit(module_of(ours, False), data, data)
    assert entered == [True, True]


def test_every_documented_name_is_there():
    theirs, ours = frameworks()
    made = {
        "Strategy": ours.Strategy(accelerator=ours.Accelerator()), "Precision": ours.Precision(),
        "Mixed": ours.Mixed("bf16-mixed", "cpu"), "Accelerator": ours.Accelerator(),
    }  # fmt: skip
    missing = [
        f"{kind}.{name}"
        for kind, owner in made.items()
        for name in dir(getattr(theirs, kind))
        if not name.startswith("_") and not hasattr(owner, name)
    ]
    assert not missing
