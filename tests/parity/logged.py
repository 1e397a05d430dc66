"""A module and a callback that log what a script says, at any hook, and write down all that a user can see there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

import torch
import torchmetrics
from torch.utils.data import DataLoader, TensorDataset

from tests.parity import both

TRAIN_HOOKS = (
    "on_train_batch_start on_train_batch_end on_before_backward on_after_backward on_before_zero_grad"
    " on_before_optimizer_step"
).split()
OWN_TRAIN_HOOKS = "backward optimizer_step optimizer_zero_grad configure_gradient_clipping".split()
EPOCH_HOOKS = [
    f"on_{stage}_{moment}"
    for stage in ("train", "validation", "test")
    for moment in ("start", "epoch_start", "epoch_end")
]
EVAL_HOOKS = [f"on_{stage}_batch_{moment}" for stage in ("validation", "test") for moment in ("start", "end")]
STEPS = ["training_step", "validation_step", "test_step", "predict_step"]
FORBIDDEN_HOOKS = (
    "setup on_fit_start on_fit_end on_train_end on_validation_end on_test_end on_predict_start on_predict_epoch_start"
    " on_predict_batch_start on_predict_batch_end on_predict_epoch_end on_predict_end teardown configure_optimizers"
    " configure_model train_dataloader val_dataloader prepare_data on_save_checkpoint on_load_checkpoint"
    " lr_scheduler_step configure_callbacks on_validation_model_eval on_validation_model_train"
    " on_validation_model_zero_grad on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer"
).split()
CALLBACK_HOOKS = [*TRAIN_HOOKS, *EPOCH_HOOKS, *EVAL_HOOKS, "on_sanity_check_start", "on_sanity_check_end"]


class Log(NamedTuple):
    """One call of ``self.log``: ``value`` may be a function of (module, batch, index)."""

    hook: str
    name: str
    value: Any = 1.0
    arguments: dict[str, Any] = {}
    by_callback: bool = False


def plain(values: Any) -> dict[str, Any]:
    """Metrics as numbers that can be compared."""
    return {key: number(value) for key, value in values.items()}


def number(value: Any) -> Any:
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if isinstance(value, float):
        return repr(value) if not math.isfinite(value) else float(f"{value:.5g}")
    return value


def observe(trainer: Any) -> tuple[dict[str, Any], ...]:
    return plain(trainer.callback_metrics), plain(trainer.logged_metrics), plain(trainer.progress_bar_metrics)


def scripted(
    framework: SimpleNamespace,
    script: Iterable[Log],
    seen: list[Any],
    reads: bool = True,
    metrics: Optional[Callable[[], dict[str, Any]]] = None,
    stop_at: Optional[tuple[int, int]] = None,
    with_loader_idx: bool = False,
    manual: bool = False,
) -> tuple[Any, Any]:
    """Return a module and a callback that follow ``script``; what they see goes into ``seen``.

    Args:
        reads: Whether the three dictionaries are read at every hook (reading must change nothing later).
        metrics: Makes the torchmetrics attributes of the module.
        stop_at: (epoch, batch) at which ``should_stop`` is set.
        with_loader_idx: Whether the evaluation steps take a ``dataloader_idx``.
    """
    script = list(script)

    def visit(owner: Any, module: Any, hook: str, args: tuple[Any, ...], by_callback: bool) -> None:
        who = "C" if by_callback else "M"
        trainer = module._trainer
        if reads and trainer is not None:
            seen.append((who, hook, "before", observe(trainer)))
        # The outputs come before the batch.
        batch = next((arg for arg in reversed(args) if isinstance(arg, (list, torch.Tensor, dict))), None)
        index = next((arg for arg in args if type(arg) is int), 0)
        did = False
        for entry in script:
            if entry.hook != hook or entry.by_callback != by_callback:
                continue
            did = True
            value = entry.value(module, batch, index) if callable(entry.value) else entry.value
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    if entry.name == "<dict>":
                        owner.log_dict(value, **entry.arguments)
                    else:
                        owner.log(entry.name, value, **entry.arguments)
                except Exception as error:
                    seen.append((who, hook, entry.name, "raises", type(error).__name__))
                    raise
            seen.extend(
                (who, hook, entry.name, "warns", kind) for kind in sorted({w.category.__name__ for w in caught})
            )
        if did and reads and trainer is not None:
            seen.append((who, hook, "after", observe(trainer)))

    class Scripted(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2, bias=False)
            with torch.no_grad():
                self.layer.weight.copy_(torch.arange(8.0).reshape(2, 4) / 8 - 0.4)
            self.automatic_optimization = not manual
            for name, metric in (metrics() if metrics else {}).items():
                setattr(self, name, metric)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).pow(2).mean()
            visit(self, self, "training_step", (batch, batch_idx), False)
            if stop_at == (self.current_epoch, batch_idx):
                self.trainer.should_stop = True
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self):
            visit(self, self, "configure_optimizers", (), False)
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    def add_step(name: str) -> None:
        if with_loader_idx:

            def step(self, batch, batch_idx, dataloader_idx):
                visit(self, self, name, (batch, batch_idx), False)
                return {"x": batch_idx}
        else:

            def step(self, batch, batch_idx):
                visit(self, self, name, (batch, batch_idx), False)
                return {"x": batch_idx}

        setattr(Scripted, name, step)

    for name in STEPS[1:]:
        add_step(name)

    def add_hook(kind: type, name: str, by_callback: bool) -> None:
        original = getattr(kind, name)

        def hook(self, *args, **kwargs):
            module = args[1] if by_callback else self
            visit(self, module, name, args[2:] if by_callback else args, by_callback)
            return original(self, *args, **kwargs)

        setattr(kind, name, hook)

    scripted_hooks = {entry.hook for entry in script if not entry.by_callback}
    own = [name for name in (*OWN_TRAIN_HOOKS, *FORBIDDEN_HOOKS) if name in scripted_hooks]
    for name in (*TRAIN_HOOKS, *EPOCH_HOOKS, *EVAL_HOOKS, "on_train_end", "on_validation_end", "on_test_end", *own):
        if name not in vars(Scripted) and name not in ("train_dataloader", "val_dataloader"):
            add_hook(Scripted, name, False)

    class ScriptedCallback(framework.Callback):
        pass

    extra = [entry.hook for entry in script if entry.by_callback and entry.hook not in CALLBACK_HOOKS]
    for name in (*CALLBACK_HOOKS, *dict.fromkeys(extra)):
        add_hook(ScriptedCallback, name, True)
    return Scripted(), ScriptedCallback()


def batches(sizes: Iterable[int], seed: int = 3) -> DataLoader:
    """A loader of batches of exactly these sizes."""
    sizes = list(sizes)
    data = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(seed))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    indices = [list(range(start, start + size)) for start, size in zip(starts, sizes)]
    return DataLoader(TensorDataset(data), batch_sampler=indices)


def run_one(
    framework: SimpleNamespace,
    folder: Any,
    script: Iterable[Log],
    flags: Optional[dict[str, Any]] = None,
    method: str = "fit",
    num_loaders: int = 1,
    sizes: Iterable[int] = (2, 2, 1),
    **options: Any,
) -> dict[str, Any]:
    """Run the script on one framework, and return what was seen."""
    seen: list[Any] = []
    lines = both.Lines()
    module, callback = scripted(framework, script, seen, with_loader_idx=num_loaders > 1, **options)
    loaders: Any = [batches((2, 3, 1)[: 2 + i % 2], seed=5 + i) for i in range(num_loaders)]
    loaders = loaders if num_loaders > 1 else loaders[0]
    result, error = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {
            "callbacks": [callback], "logger": both.recording_logger(framework, lines),
            "max_epochs": 2, "log_every_n_steps": 1, **(flags or {}),
        }  # fmt: skip
        trainer = both.quiet(framework, folder, **settings)
        try:
            if method == "fit":
                trainer.fit(module, batches(sizes), loaders)
            else:
                loaders = both.loader(2) if method == "predict" else loaders
                quiet = {} if method == "predict" else {"verbose": False}
                result = getattr(trainer, method)(module, loaders, **quiet)
        except Exception as caught:
            both.caught(caught)
            error = type(caught).__name__
    return {
        "seen": seen, "lines": [(step, plain(values)) for step, values in lines if step != "finalize"], "error": error,
        "result": None if method in ("fit", "predict") or result is None else [plain(entry) for entry in result],
        "end": observe(trainer), "global_step": trainer.global_step,
    }  # fmt: skip


def run_both(
    folder: Any, script: Iterable[Log], flags: Any = None, **how: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the script on Lightning and on levin; ``how`` as in :func:`run_one`."""
    script = list(script)
    return run_one(both.lightning(), folder, script, flags, **how), run_one(both.levin(), folder, script, flags, **how)


def assert_same(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Compare piece by piece, so that a failure shows the first difference."""
    assert ours["error"] == theirs["error"]
    for index, (a, b) in enumerate(zip(ours["seen"], theirs["seen"])):
        assert a == b, f"at {index}: levin {a}\nLightning {b}"
    assert len(ours["seen"]) == len(theirs["seen"])
    for key in ("lines", "result", "end", "global_step"):
        assert ours[key] == theirs[key], key


class Halves(torchmetrics.Metric):
    """The mean of what it was given, weighted: small, quick, and its state can be half full."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: torch.Tensor) -> None:
        self.total = self.total + values.sum()
        self.count = self.count + values.numel()

    def compute(self) -> torch.Tensor:
        return self.total / self.count
