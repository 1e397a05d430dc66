"""GradientAccumulationScheduler: another accumulation factor from certain epochs on."""

from __future__ import annotations

from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


class GradientAccumulationScheduler(Callback):
    """Sets ``trainer.accumulate_grad_batches`` at the start of certain epochs.

    Args:
        scheduling: Epoch (from 0) -> batches per optimizer step from that epoch on. Before the first entry it is 1.

    Raises:
        TypeError: ``scheduling`` is empty or no dict.
        MisconfigurationException: An epoch < 0 or a factor < 1.
        ValueError: During fit, the Trainer has an ``accumulate_grad_batches`` of its own.
        RuntimeError: During fit, the module optimizes by hand or the strategy accumulates by itself.

    Example:
        >>> scheduler = GradientAccumulationScheduler({0: 8, 4: 4, 8: 1})
        >>> scheduler.get_accumulate_grad_batches(5)
        4
    """

    is_on_all_ranks = True

    def __init__(self, scheduling: dict[int, int]) -> None:
        super().__init__()
        if not isinstance(scheduling, dict) or not scheduling:
            raise TypeError(
                f"scheduling must be a dict with at least one entry, received {scheduling!r}. Use {{4: 2}}."
            )
        for epoch, factor in scheduling.items():
            if not _is_int(epoch, 0):
                raise MisconfigurationException(f"Epoch should be an int greater than or equal to 0. Got [{epoch!r}].")
            if not _is_int(factor, 1):
                raise MisconfigurationException(
                    f"Accumulation factor should be an int greater than 0. Got [{factor!r}]."
                )
        self.scheduling: dict[int, int] = {0: 1, **scheduling}
        self.epochs: list[int] = sorted(self.scheduling)

    def going_to_accumulate_grad_batches(self) -> bool:
        """Return whether any factor is above 1."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Return the factor of an epoch.

        Args:
            epoch: The epoch, from 0.
        """
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "GradientAccumulationScheduler does not work with manual optimization. "
                "Leave the callback out, or set `automatic_optimization = True`."
            )
        if trainer.strategy.handles_gradient_accumulation:
            raise RuntimeError(
                f"GradientAccumulationScheduler does not work with {type(trainer.strategy).__name__}, which accumulates "
                "by itself. Leave the callback out, or use another strategy."
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches must be 1 with the `GradientAccumulationScheduler` callback, received "
                f"{trainer.accumulate_grad_batches}. Either remove `accumulate_grad_batches` from the Trainer or remove the callback."
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
