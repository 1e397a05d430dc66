"""Subclasses that override every documented method of a strategy, a precision and an accelerator see the same calls."""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from levin.loggers import folder_logger
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
            self.calls: list[str] = []

        def on_before_backward(self, loss):
            self.calls.append("on_before_backward")

        def backward(self, loss, *args, **kwargs):
            self.calls.append("backward")
            super().backward(loss, *args, **kwargs)

        def on_after_backward(self):
            self.calls.append("on_after_backward")

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


def calls_of(framework: SimpleNamespace, folder: Any, case: str, alone: tuple[str, str] | None = None) -> list[str]:
    """Return the calls that subclasses see which override all methods, or the one of ``alone`` (class, method)."""

    def names_of(kind: str, names: list[str]) -> list[str]:
        return names if alone is None else [name for name in names if (kind, name) == alone]

    recorder = Recorder()
    kind = "Mixed" if case == "mixed" else "Precision"
    precision = recorder.subclass(getattr(framework, kind), names_of("Precision", documented(kind)), "Precision")
    hooks = names_of("Accelerator", ["setup_device", "setup", "teardown"])
    accelerator = recorder.subclass(framework.Accelerator, hooks, "Accelerator")()
    strategy = recorder.subclass(framework.Strategy, names_of("Strategy", documented("Strategy")), "Strategy")(
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
    assert module.calls
    return recorder.calls + module.calls


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    ["automatic", "manual", "accumulate", "clip by value", "mixed", "resume", "validate", "test", "predict"],
)
def test_every_overridden_method_is_called_as_lightning_calls_it(tmp_path, case):
    theirs, ours = (calls_of(framework, tmp_path, case) for framework in frameworks())
    assert ours == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Strategy", "Precision"])
@pytest.mark.parametrize("case", ["automatic", "manual"])
def test_a_method_that_alone_is_overridden_is_called_as_lightning_calls_it(tmp_path, case, kind):
    names = [name for name in documented(kind) if name not in OWN_AFFAIR]
    theirs, ours = (
        {name: calls_of(framework, tmp_path, case, (kind, name)) for name in names} for framework in frameworks()
    )
    assert ours == theirs
    assert len([name for name in names if any(call.startswith(kind) for call in ours[name])]) >= 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_what_a_precision_puts_around_the_module_is_what_runs(tmp_path, stage):
    def run(framework: SimpleNamespace) -> list[Any]:
        seen: list[Any] = []

        class Around(torch.nn.Module):
            def __init__(self, inner: torch.nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                seen.append((type(trainer.model).__name__, len(args)))
                return self.inner(*args, **kwargs)

        class Precision(framework.Precision):
            def connect(self, model, optimizers, lr_schedulers):
                return Around(model), [torch.optim.SGD(model.parameters(), lr=0.5) for _ in optimizers], lr_schedulers

        module = module_of(framework, is_manual=False)
        trainer = framework.Trainer(
            accelerator="cpu", plugins=[Precision()], max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        )  # fmt: skip
        data = DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), batch_size=4)
        getattr(trainer, stage)(module, data)
        seen += [trainer.lightning_module is module]
        seen += [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
        return [*seen, module.layer.weight.tolist()]

    theirs, ours = (run(framework) for framework in frameworks())
    assert ours == theirs
    assert ("Around", 2) in ours


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


def calling(kind: type, names: list[str], calls: list[str]) -> type:
    """Return a subclass whose methods ``names`` note that they were called."""

    def noting(name: str) -> Any:
        inherited = inspect.getattr_static(kind, name)
        is_static = isinstance(inherited, staticmethod)

        def method(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return (inherited.__func__ if is_static else inherited)(*args, **kwargs)

        return staticmethod(method) if is_static else method

    return type(f"Noting{kind.__name__}", (kind,), {name: noting(name) for name in names})


@world_size(2, timeout_s=120, connect=False)
def test_what_subclasses_replace_on_two_ranks(tmp_path):
    # As if rank 0 had made its folder before rank 1 looks for the next number.
    folder_logger.next_version = lambda root: int(os.environ["RANK"])
    for framework in (both.lightning(), both.levin()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls: list[str] = []
            strategy = calling(
                framework.module.strategies.DDPStrategy,
                ["setup_distributed", "configure_ddp", "determine_ddp_device_ids"],
                calls,
            )()

            class Checkpoint(framework.module.callbacks.ModelCheckpoint):
                def file_exists(self, filepath, trainer, calls=calls):
                    calls.append(os.path.basename(filepath))
                    return super().file_exists(filepath, trainer) or not str(filepath).endswith("v2.ckpt")

            folder = tmp_path / framework.name
            loggers = framework.module.loggers
            csv, board = loggers.CSVLogger(folder), loggers.TensorBoardLogger(folder / "board")
            trainer = framework.Trainer(
                accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, callbacks=[Checkpoint(folder, "x")],
                logger=[csv, board], enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            data = DataLoader(torch.randn(12, 4), batch_size=4)
            trainer.fit(module_of(framework, False), data, data)
            trainer.test(module_of(framework, False), data, verbose=False)
        assert calls == [
            "setup_distributed", "configure_ddp", "determine_ddp_device_ids", "x.ckpt", "x-v1.ckpt", "x-v2.ckpt",
            "setup_distributed",
        ]  # fmt: skip
        # There a rank may count the folder of another one as an earlier run.
        if framework.name == "levin":
            assert (csv.version, board.version) == (0, 0)
            assert csv.log_dir == f"{folder}/lightning_logs/version_0"


@pytest.mark.filterwarnings("ignore")
def test_what_subclasses_of_callbacks_replace(tmp_path):
    names = {
        "StochasticWeightAveraging": [
            "avg_fn", "update_parameters", "transfer_weights", "reset_batch_norm_and_save_state", "reset_momenta",
        ],
        "ModelPruning": [
            "sanitize_parameters_to_prune", "filter_parameters_to_prune", "apply_pruning",
            "apply_lottery_ticket_hypothesis", "make_pruning_permanent",
        ],
    }  # fmt: skip
    arguments = {
        "StochasticWeightAveraging": {"swa_lrs": 0.05, "swa_epoch_start": 1},
        "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.5, "use_lottery_ticket_hypothesis": True},
    }
    for kind, methods in names.items():
        for framework in (both.lightning(), both.levin()):
            calls: list[str] = []
            callback = calling(getattr(framework.module.callbacks, kind), methods, calls)(**arguments[kind])
            module = module_of(framework, False)
            module.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
            trainer = framework.Trainer(max_epochs=3, callbacks=[callback], default_root_dir=tmp_path, **QUIET)
            trainer.fit(module, DataLoader(torch.randn(8, 4), batch_size=4))
            assert set(calls) == set(methods), framework.name


def test_every_method_of_a_public_class_is_there():
    """What a subclass overrides exists here, so that it is called, or known to be left out."""
    left_out = {
        "set_nvidia_flags", "get_registered_strategies", "init_deepspeed",  # how Lightning does its own part
        "remove_ignored_hparams", "configure_sharded_model",  # of versions before 2.0; the second is called where defined
    }  # fmt: skip
    missing = []
    for theirs, ours in (
        ("strategies", "strategies"), ("callbacks", "callbacks"), ("loggers", "loggers"), ("profilers", "profilers"),
        ("plugins.precision", "precision"), ("plugins.environments", "environments"), ("plugins.io", "checkpoint"),
        ("accelerators", "accelerators"), ("tuner", "tuner"),
    ):  # fmt: skip
        room = importlib.import_module(f"levin.{ours}")
        for name, kind in vars(importlib.import_module(f"lightning.pytorch.{theirs}")).items():
            # These two inherit from Lightning's DDPStrategy what they do not use.
            if inspect.isclass(kind) and hasattr(room, name) and name not in ("DeepSpeedStrategy", "XLAStrategy"):
                missing += [
                    f"{name}.{method}"
                    for method in dir(kind)
                    if callable(getattr(kind, method, None)) and method.islower() and not method.startswith("_")
                    and method not in left_out and not hasattr(getattr(room, name), method)
                ]  # fmt: skip
    assert not missing
