"""The searches as callbacks: they run when a run begins, which then goes on with what they found."""

from __future__ import annotations

from typing import Optional

from levin.hooks import Callback
from levin.loops.run import Run
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.tuner.batch_size import MODES, scale_batch_size
from levin.tuner.learning_rate import SCALES, LRFinder, lr_find
from levin.tuner.search import holders
from levin.utilities.exceptions import MisconfigurationException, require_choice, value_error
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn


class LearningRateFinder(Callback):
    """Searches for a learning rate when ``fit`` starts, and trains with it.

    Args:
        min_lr: The first rate to try.
        max_lr: The last rate to try.
        num_training_steps: Number of rates.
        mode: How they grow: ``"exponential"`` or ``"linear"``.
        early_stop_threshold: Stop when the loss is so many times the best one; None for never.
        update_attr: Whether to set the attribute, and the rate of the optimizer, to what is suggested.
        attr_name: Name of the attribute of the module or its hyper-parameters; by default ``lr`` or ``learning_rate``.

    Raises:
        MisconfigurationException: An unknown mode; or, when ``fit`` starts, no such attribute.

    Example:
        Search again in the middle of training::

            class Searching(LearningRateFinder):
                def on_train_epoch_start(self, trainer, pl_module):
                    if trainer.current_epoch in (5, 10):
                        self.lr_find(trainer, pl_module)
    """

    is_on_all_ranks = True

    SUPPORTED_MODES = SCALES

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: Optional[float] = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        require_choice("mode", mode.lower(), self.SUPPORTED_MODES)
        self.optimal_lr: Optional[LRFinder] = None
        self._search = (min_lr, max_lr, num_training_steps, mode.lower(), early_stop_threshold)
        self._update_attr: bool = update_attr
        self._attr_name: str = attr_name

    def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search now; the result is ``self.optimal_lr``."""
        if trainer.fast_dev_run:
            rank_zero_warn("The learning rate is not searched with fast_dev_run.")
            return
        run: Run = trainer.run
        name = self._find_name(pl_module) if self._update_attr else ""
        found = self.optimal_lr = lr_find(run, *self._search)
        if not self._update_attr:
            return
        lr = found.suggestion()
        if lr is None:
            rank_zero_warn(
                f"No learning rate is suggested: {len(found.results['lr'])} rates were tried, which are too few. "
                "Raise num_training_steps; training goes on with the rate that it has."
            )
            return
        for owner in holders(name, pl_module, None):
            setattr(owner, name, lr)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
                if "initial_lr" in group:
                    group["initial_lr"] = lr
        for config in run.schedulers:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [lr] * len(config.scheduler.base_lrs)
        rank_zero_info(f"Learning rate set to {lr}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        self.lr_find(trainer, pl_module)

    def _find_name(self, module: object) -> str:
        names = [self._attr_name] if self._attr_name else ["lr", "learning_rate"]
        found = [name for name in names if holders(name, module, None)]
        if not found and self._attr_name:
            raise AttributeError(
                f"{self._attr_name!r} must be an attribute of the model or of its hparams, received attr_name="
                f"{self._attr_name!r}. Set it in __init__."
            )
        if not found:
            raise MisconfigurationException(
                "When update_attr is set to True, either model or model.hparams should have one of these fields: "
                f"{', '.join(names)}. If your model has a different name for the learning rate, set `attr_name=`."
            )
        return found[0]


class BatchSizeFinder(Callback):
    """Searches for the largest batch size that fits into memory when a run starts, and runs with it.

    The loaders must come from hooks of the module or data module that read the attribute.

    Args:
        mode: ``"power"`` doubles until the memory is full; ``"binsearch"`` looks in between then.
        steps_per_trial: Steps with each size.
        init_val: The size to begin with.
        max_trials: Sizes that fit at most.
        batch_arg_name: Name of the attribute.
        margin: Share of the size to leave free, where the mode is ``"binsearch"``.
        max_val: The largest size to try.

    Raises:
        MisconfigurationException: An unknown mode; or, when the run starts, no such attribute, or loaders that were
            passed to the Trainer.
        ValueError: Several processes run.
    """

    SUPPORTED_MODES = MODES

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        require_choice("mode", mode.lower(), self.SUPPORTED_MODES)
        if not 0 <= margin < 1:
            raise value_error(
                "margin", margin, "must be a share of the size in [0.0, 1.0)", "Use 0.05 to leave 5 % free."
            )
        self.optimal_batch_size: Optional[int] = init_val
        self._search = (mode.lower(), steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)

    def scale_batch_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search now; the result is ``self.optimal_batch_size``."""
        if trainer.fast_dev_run:
            rank_zero_warn("The batch size is not searched with fast_dev_run.")
            return
        self.optimal_batch_size = scale_batch_size(trainer.run, *self._search)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        self.scale_batch_size(trainer, pl_module)

    on_test_start = on_predict_start = on_fit_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search, where ``validate`` was called."""
        if trainer.state.fn == "validate":
            self.scale_batch_size(trainer, pl_module)
