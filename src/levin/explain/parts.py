"""What every method of the Trainer has: set-up, hooks, loaders, the loop of an evaluation, tear-down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from levin.datamodule import LightningDataModule
from levin.explain.node import ALWAYS, Node, When, unbound
from levin.hooks import Callback, DataHooks
from levin.loops.hook_table import RUN_HOOKS, transfer_owners
from levin.loops.run import Run
from levin.loops.stage_loaders import StageLoaders
from levin.module import LightningModule
from levin.precision.precision import Precision
from levin.utilities.overrides import has_own
from levin.utilities.types import Function

_ARGUMENTS = {
    "batch_start": "batch, batch_idx",
    "batch_end": "outputs, batch, batch_idx",
    "on_before_zero_grad": "optimizer",
    "on_before_optimizer_step": "optimizer",
    "on_before_backward": "loss",
    "setup": "stage",
    "teardown": "stage",
    "on_save_checkpoint": "checkpoint",
}
"""Hook, or its last two words -> the arguments that it is called with; the others have none."""


def call(function: Function, arguments: str, when: When = ALWAYS, note: str = "", name: str = "") -> Node:
    """Return the line of a function that is called, under ``name`` where its own may be another."""
    inner = unbound(function)
    owner = getattr(inner, "__self__", None)
    prefix = "" if owner is None else f"{type(owner).__name__}."
    return Node(f"{prefix}{name or inner.__name__}({arguments}){note}", function, *when)


def hooks(run: Run, name: str, when: When = ALWAYS, more: str = "") -> list[Node]:
    """Return the functions of the hook table under ``name``, in their order; ``more`` follows their arguments."""
    arguments = _ARGUMENTS.get(name, _ARGUMENTS.get("_".join(name.split("_")[-2:]), "")) + more
    return [call(hook, arguments, when, name=name) for hook in run.hooks[name]]


def own(owners: Sequence[object], name: str, note: str = "") -> Iterator[Node]:
    """Yield the methods ``name`` that somebody wrote, of those who are asked outside of the hook table."""
    for owner in owners:
        if owner is None:
            continue
        parent = next(kind for kind in (Callback, LightningModule, LightningDataModule) if isinstance(owner, kind))
        if has_own(name, owner, parent):
            yield call(getattr(owner, name), _ARGUMENTS.get(name, ""), note=note, name=name)


def set_up(run: Run) -> Node:
    """Return what comes before the first hook."""
    found = [*run.optimizers, *(config.scheduler for config in run.schedulers)]
    names = ", ".join(type(each).__name__ for each in found) or "none"
    body = [
        *own([run.module], "configure_callbacks"),
        *own([run.datamodule, run.module], "prepare_data"),
        *own([run.datamodule, *run.callbacks, run.module], "setup"),
        *own([run.module], "configure_model"),
        *(own([run.module], "configure_optimizers", f"  -> {names}") if run.fn == "fit" else ()),
    ]
    return Node("set-up", body=body)


def tear_down(run: Run) -> Iterator[Node]:
    """Yield what comes after the last hook."""
    yield from own([run.datamodule, *run.callbacks, run.module], "teardown")


def loader(loaders: StageLoaders, when: When = ALWAYS) -> Iterator[Node]:
    """Yield the hook that gives the loaders, where it is one."""
    if loaders.owner is not None:
        yield call(getattr(loaders.owner, loaders.hook), "", when, name=loaders.hook)


def transfer(run: Run) -> Iterator[Node]:
    """Yield what brings a batch to the device."""
    owners = transfer_owners(owners_of(run))
    precision, device = run.strategy.precision, run.strategy.root_device
    if type(precision).convert_input is not Precision.convert_input:
        yield Node(f"{type(precision).__name__}.convert_input(batch)")
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        arguments = "batch, device, dataloader_idx" if name.startswith("transfer") else "batch, dataloader_idx"
        if name in owners:
            yield call(getattr(owners[name], name), arguments)
        elif name.startswith("transfer"):
            yield Node(f"batch.to({str(device)!r})")


def owners_of(run: Run) -> list[object]:
    """Return who may have hooks of the data, most important first."""
    return [owner for owner in (run.datamodule, run.module) if owner is not None]


def left_out(run: Run, words: Sequence[str]) -> list[str]:
    """Return the hooks with one of ``words`` in their names, and those of a batch on its way, that nobody wrote."""
    names = [name for name in RUN_HOOKS if not run.hooks[name] and any(word in name for word in words)]
    owners = transfer_owners(owners_of(run))
    return names + [name for name in vars(DataHooks) if "transfer" in name and name not in owners]
