"""Prints the layers of the model when training starts."""

from __future__ import annotations

from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.model_summary import Column, check_max_depth, format_summary_table
from levin.utilities.model_summary import summarize as summarize_model
from levin.utilities.rank_zero import rank_zero_info


class ModelSummary(Callback):
    """Print a table of the model's layers when fit starts.

    Override :meth:`summarize` to print it elsewhere or in another form.

    Args:
        max_depth: How many levels of nested layers to list: 1 for the direct children, -1 for all, 0 to print
            nothing.
        **summarize_kwargs: Passed on to :meth:`summarize`.

    Raises:
        ValueError: ``max_depth`` is not -1, 0 or a positive integer.

    Example:
        >>> summary = ModelSummary(max_depth=2)
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: object) -> None:
        self._max_depth: int = check_max_depth(max_depth)
        self._summarize_kwargs: dict[str, object] = summarize_kwargs

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._max_depth:
            return
        # Every rank runs the example input: a sharded model answers only when all ranks ask.
        summary = summarize_model(pl_module, max_depth=self._max_depth)
        if trainer.is_global_zero:
            self.summarize(
                summary._get_summary_data(),
                summary.total_parameters,
                summary.trainable_parameters,
                summary.model_size,
                summary.total_training_modes,
                total_flops=summary.total_flops,
                **self._summarize_kwargs,
            )

    @staticmethod
    def summarize(
        summary_data: list[Column],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: object,
    ) -> None:
        """Log the table as text.

        Args:
            summary_data: Title and cells of each column.
            total_parameters: Number of parameters.
            trainable_parameters: Number of those that require a gradient.
            model_size: Size of the parameters in megabytes.
            total_training_modes: How many submodules are in ``"train"`` and in ``"eval"`` mode.
            total_flops: Floating-point operations of one forward pass of the example input.
            **summarize_kwargs: Ignored here.
        """
        table = format_summary_table(
            summary_data, total_parameters, trainable_parameters, model_size, total_training_modes, total_flops
        )
        rank_zero_info("\n" + table)
