"""``self.log``: from the user's call to the log store of the loop that runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

from torch import Tensor

from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from levin.protocols import Run, Trainer
    from levin.utilities.types import Group


class SelfLog:
    """The part of :class:`~levin.LightningModule` that logs."""

    _trainer: Optional[Trainer]
    _fabric: Any
    _logging_run: Optional[Run]

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: Optional[bool] = None,
        on_step: Optional[bool] = None,
        on_epoch: Optional[bool] = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Group = None,
        add_dataloader_idx: bool = True,
        batch_size: Optional[int] = None,
        metric_attribute: Optional[str] = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a value to loggers, progress bar and callbacks.

        Args:
            name: Key; with both ``on_step`` and ``on_epoch`` it becomes ``<name>_step`` and ``<name>_epoch``.
            value: A number, a tensor with one element, or a torchmetrics Metric.
            prog_bar: Whether to show it in the progress bar.
            logger: Whether to send it to the loggers (default True).
            on_step: Whether to log the value of this step (default: True in training steps, else False).
            on_epoch: Whether to log the value reduced over the epoch (default: True outside training steps).
            reduce_fx: ``"mean"`` (weighted by batch size), ``"sum"``, ``"min"`` or ``"max"``.
            enable_graph: Accepted for compatibility; values are always detached.
            sync_dist: Whether to reduce over all ranks.
            sync_dist_group: The process group to reduce over.
            add_dataloader_idx: Whether to append ``/dataloader_idx_<i>`` with several evaluation loaders.
            batch_size: Weight of the value in the epoch's mean; by default dimension 0 of the batch's first tensor.
            metric_attribute: Name of the attribute that holds ``value`` when it is a Metric.
            rank_zero_only: Whether only rank 0 calls this.

        Raises:
            MisconfigurationException: The hook cannot log, or not in this way.
            ValueError: ``value`` is none of the above.
        """
        run = self._logging_run
        if run is None:
            self._log_outside_a_run(name, value, logger)
            return
        # In the order of the fields of log_store.Arguments, which a plain tuple equals.
        arguments = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, sync_dist_group, add_dataloader_idx,
            metric_attribute, rank_zero_only,
        )  # fmt: skip
        run.store.log(name, value, arguments, batch_size)

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: Optional[bool] = None,
        on_step: Optional[bool] = None,
        on_epoch: Optional[bool] = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Group = None,
        add_dataloader_idx: bool = True,
        batch_size: Optional[int] = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log each value of a dict or of a torchmetrics MetricCollection. Arguments as in :meth:`log`."""
        for name, value in dictionary.items():
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, None, rank_zero_only,
            )  # fmt: skip

    def _log_outside_a_run(self, name: str, value: object, logger: Optional[bool]) -> None:
        if self._fabric is not None and self._trainer is None:
            if not isinstance(value, (int, float, Tensor)):
                raise ValueError(f"self.log({name!r}, ...) takes a number or a tensor, received {value!r}.")
            if logger is not False:
                self._fabric.log(name, value)
        elif self._trainer is None:
            rank_zero_warn(
                f"self.log({name!r}, ...) was called without a Trainer and does nothing. "
                "This is fine in a unit test; otherwise run the module with a Trainer."
            )
        elif self._trainer.barebones:
            rank_zero_warn(f"self.log({name!r}, ...) does nothing with Trainer(barebones=True).")
        else:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called while no loop that logs is running. Call it in a step or in a batch or epoch hook."
            )
