"""Whether a module and its data have what a call needs, asked before anything starts."""

from __future__ import annotations

from levin.loops.dataloaders import loaders_of
from levin.loops.run import Run
from levin.module import LightningModule
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.overrides import has_own
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.warnings import PossibleUserWarning

_REMOVED = {
    "fit": ("training_epoch_end", "validation_epoch_end"),
    "validate": ("validation_epoch_end",),
    "test": ("test_epoch_end",),
}
"""Method -> hooks of Lightning 1 that it would have called, and that nothing calls any more."""


def hint_at_eval_mode(module: LightningModule) -> None:
    """Tell the user of submodules that will not train, as nobody puts them into train mode."""
    num_eval = sum(not child.training for child in module.modules())
    if num_eval:
        rank_zero_warn(
            f"Found {num_eval} module(s) in eval mode at the start of training. This is right for frozen layers; "
            "otherwise call `model.train()` before `Trainer.fit`.",
            category=PossibleUserWarning,
        )


def verify(run: Run) -> None:
    """Check that the hooks a run needs are there, before anything starts.

    Raises:
        MisconfigurationException: One is missing, or settings do not fit the module.
    """
    module, fn = run.module, run.fn

    def has(name: str) -> bool:
        return has_own(name, module, LightningModule)

    def require(name: str) -> None:
        if not has(name):
            raise MisconfigurationException(
                f"`Trainer.{fn}` requires `{name}`, which {type(module).__name__} does not define. Define it."
            )

    for old in _REMOVED.get(fn, ()):
        if callable(getattr(module, old, None)):
            new = f"on_{old.replace('training', 'train')}"
            raise NotImplementedError(
                f"`{type(module).__name__}.{old}` is not supported. Override `{new}` and keep the outputs yourself."
            )
    if fn == "fit":
        require("training_step")
        require("configure_optimizers")
        if not run.loaders.train.is_defined():
            raise MisconfigurationException(
                f"`Trainer.fit` requires training data, received none for {type(module).__name__}. Pass "
                "`train_dataloaders`, a `datamodule`, or define `train_dataloader`."
            )
        if has("validation_step") != run.loaders.val.is_defined():
            lack, category = (
                ("defined a `validation_step` but have no `val_dataloader`", PossibleUserWarning)
                if has("validation_step")
                else ("passed in a `val_dataloader` but have no `validation_step`", UserWarning)
            )
            rank_zero_warn(f"You {lack}. Skipping validation.", category=category)
        if not module.automatic_optimization:
            if run.settings.gradient_clip_val:
                raise MisconfigurationException(
                    "Automatic gradient clipping is not possible in manual optimization, received "
                    f"Trainer(gradient_clip_val={run.settings.gradient_clip_val!r}). Call `self.clip_gradients` in `training_step`."
                )
            if run.settings.accumulate_grad_batches != 1 or run.settings.splits_batches:
                raise MisconfigurationException(
                    "Automatic gradient accumulation is not possible in manual optimization, received "
                    f"Trainer(accumulate_grad_batches={'auto' if run.settings.splits_batches else run.settings.accumulate_grad_batches!r})."
                    " Step every N batches yourself."
                )
        return
    if fn != "predict":
        require("validation_step" if fn == "validate" else "test_step")
    elif module.predict_step is None:  # it says so, though there is a forward to stand in for it
        require("predict_step")
    elif not has("predict_step") and not has("forward"):
        raise MisconfigurationException("`Trainer.predict` requires `predict_step` or `forward`. Define one of them.")
    loaders = loaders_of(run, fn)
    if not loaders.is_defined():
        raise MisconfigurationException(
            f"`Trainer.{fn}` requires data, received none. Pass `dataloaders`, a `datamodule`, or define `{loaders.hook}`."
        )


def check_restored_epoch(run: Run) -> None:
    """Raise MisconfigurationException when a checkpoint is from a later epoch than training may reach."""
    maximum = run.loops.fit.max_epochs
    if maximum is not None and 0 <= maximum < run.current_epoch:
        raise MisconfigurationException(
            f"The restored checkpoint is at current_epoch={run.current_epoch}, "
            f"received Trainer(max_epochs={maximum}). Set max_epochs to more than that."
        )
