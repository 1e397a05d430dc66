"""Prints the layers of the model with Rich when training starts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from typing_extensions import override

from levin.callbacks.model_summary import ModelSummary
from levin.utilities.model_summary import Column, get_human_readable_count, summary_totals

_RIGHT_ALIGNED = ("Params", "Params per Device", "FLOPs", "In sizes", "Out sizes")


class RichModelSummary(ModelSummary):
    """Print a table of the model's layers with Rich when fit starts.

    Args:
        max_depth: How many levels of nested layers to list: 1 for the direct children, -1 for all, 0 to print
            nothing.
        **summarize_kwargs: ``header_style``, the Rich style of the titles (``"bold magenta"`` by default).

    Raises:
        ValueError: ``max_depth`` is not -1, 0 or a positive integer.

    Example:
        >>> summary = RichModelSummary(max_depth=-1, header_style="bold green")
    """

    @staticmethod
    @override
    def summarize(
        summary_data: list[Column],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the table."""
        table = Table(header_style=summarize_kwargs.get("header_style", "bold magenta"))
        for title, _ in summary_data:
            if title in _RIGHT_ALIGNED:
                table.add_column(title, justify="right", overflow="fold")
            elif title == "Name":
                table.add_column(title, no_wrap=True)
            else:
                table.add_column(title, style="dim" if title == " " else None, overflow="fold")
        for row in zip(*(cells for _, cells in summary_data)):
            table.add_row(*(cell.strip() for cell in row))
        totals = summary_totals(total_parameters, trainable_parameters, model_size, total_training_modes)
        if total_flops:  # 0: there was no example input to count with
            totals["Total FLOPs"] = get_human_readable_count(total_flops)
        console = Console()
        console.print(table, markup=False)
        for label, value in totals.items():
            console.print(f"[bold]{label}[/]: {value.strip()}", highlight=False)
