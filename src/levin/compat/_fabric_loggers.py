"""The loggers of ``lightning.fabric.loggers``: levin's own, whose folder is called ``root_dir``."""

from __future__ import annotations

from levin import loggers
from levin.utilities.types import PathLike


class CSVLogger(loggers.CSVLogger):
    """Metrics as a table below ``root_dir/name/version_N``; see :class:`levin.loggers.CSVLogger`.

    Args:
        root_dir: The folder.
        name: Of the experiment.
        version: Of the run; the next one when None.
        prefix: Before each name.
        flush_logs_every_n_steps: Rows between two writes.
    """

    def __init__(
        self,
        root_dir: PathLike,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(root_dir, name, version, prefix, flush_logs_every_n_steps)


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Metrics for TensorBoard below ``root_dir/name/version_N``; see :class:`levin.loggers.TensorBoardLogger`.

    Args:
        root_dir: The folder.
        name: Of the experiment.
        version: Of the run; the next one when None.
        default_hp_metric: Whether hyper-parameters come with a placeholder metric.
        prefix: Before each name.
        sub_dir: Below the folder of the run.
        kwargs: For the writer of TensorBoard.
    """

    def __init__(
        self,
        root_dir: PathLike,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: PathLike | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(root_dir, name, version, False, default_hp_metric, prefix, sub_dir, **kwargs)
