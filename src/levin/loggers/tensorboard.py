"""Metrics, graphs and hyper-parameters for TensorBoard."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Optional, Union

from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from levin.loggers.folder_logger import FolderLogger
from levin.loggers.logger import rank_zero_experiment
from levin.loggers.utilities import HPARAMS_FILE, add_prefix, flatten, join_path, sanitize, to_dict, write_hparams
from levin.utilities.filesystem import ensure_folder, exists, is_local
from levin.utilities.modes import forward_of_example, kept_modes
from levin.utilities.numbers import to_numbers
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_only, rank_zero_warn
from levin.utilities.types import HParams, Kwargs, Metrics, PathLike, StateDict

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoardLogger(FolderLogger):
    """Writes TensorBoard event files to ``save_dir/name/version`` and hyper-parameters to ``hparams.yaml`` beside them.

    Needs ``tensorboard`` (or ``tensorboardX``). The values of one call go into one record, which is written when the
    call returns.

    Args:
        save_dir: Directory of all experiments, local or any URL that TensorBoard can write to.
        name: Name of the experiment, a folder in ``save_dir``. None or ``""`` for no such folder.
        version: Folder of the run. A number N stands for ``version_N``, None for the next free one.
        log_graph: Whether to record the graph of the model; needs ``model.example_input_array``.
        default_hp_metric: Whether hyper-parameters come with a metric ``hp_metric = -1`` when none is given; without
            a metric TensorBoard's table of hyper-parameters stays empty.
        prefix: Text in front of every metric's name, joined by ``-``.
        sub_dir: A folder below the version for the event files.
        kwargs: For ``SummaryWriter``: ``comment``, ``purge_step``, ``max_queue``, ``flush_secs``, ``filename_suffix``.

    Raises:
        ModuleNotFoundError: Neither ``tensorboard`` nor ``tensorboardX`` is installed.

    Example:
        >>> logger = TensorBoardLogger("logs", name="my_model")
        >>> logger.log_metrics({"loss": 0.5}, step=0)
        >>> logger.log_dir
        'logs/my_model/version_0'
    """

    NAME_HPARAMS_FILE = HPARAMS_FILE

    def __init__(
        self,
        save_dir: PathLike,
        name: Optional[str] = "lightning_logs",
        version: Optional[Union[int, str]] = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: Optional[PathLike] = None,
        **kwargs: object,
    ) -> None:
        if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
            raise ModuleNotFoundError(
                "TensorBoardLogger needs the package tensorboard, or tensorboardX. Install it with: pip install tensorboard"
            )
        self.hparams: dict[str, Any] = {}
        super().__init__(save_dir, name, version, prefix)
        self._sub_dir: Optional[str] = None if sub_dir is None else os.fspath(sub_dir)
        self._log_graph: bool = log_graph
        self._default_hp_metric: bool = default_hp_metric
        self._kwargs: Kwargs = kwargs
        self._experiment: Optional[SummaryWriter] = None
        self._hparams_are_saved: bool = False

    sub_dir: Optional[str] = reads("_sub_dir", "Folder below the version, as given.")

    @property
    @override
    def log_dir(self) -> str:
        return join_path(super().log_dir, self._sub_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The ``SummaryWriter``, for images, histograms and all else; the first access creates the directory."""
        if self._experiment is None:
            ensure_folder(self.log_dir)
            self._experiment = _make_writer(self.log_dir, self._kwargs)
        return self._experiment

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Metrics, step: Optional[int] = None) -> None:
        """Record values.

        Args:
            metrics: Name -> number, tensor with one element, or a dict of those (drawn as several lines in one chart).
            step: Position on the x-axis.

        Raises:
            ValueError: A value is none of these.
        """
        writer = self.experiment
        values = to_numbers(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR))
        groups = {name: value for name, value in values.items() if isinstance(value, Mapping)}
        numbers = {name: _as_float(name, value) for name, value in values.items() if name not in groups}
        file_writer: Any = writer._get_file_writer()
        if hasattr(file_writer, "add_values"):
            file_writer.add_values(numbers, step)
        else:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
        for name, group in groups.items():
            writer.add_scalars(name, to_numbers(group), step)

    @rank_zero_only
    @override
    def log_hyperparams(
        self,
        params: HParams,
        metrics: Optional[Union[dict[str, Any], float]] = None,
        step: Optional[int] = None,
    ) -> None:
        """Record hyper-parameters for TensorBoard's table and for ``hparams.yaml``.

        Args:
            params: Name -> value, nested as you like.
            metrics: Name -> value of the metrics to show with them, or one number for ``hp_metric``.
            step: Position of these metrics on the x-axis, 0 by default.
        """
        values = to_dict(params)
        self.hparams.update(values)
        self._hparams_are_saved = False
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        self.log_metrics(metrics, 0 if step is None else step)
        file_writer: Any = self.experiment._get_file_writer()
        for summary in _hparams_summaries(sanitize(flatten(values)), to_numbers(metrics)):
            file_writer.add_summary(summary)

    @rank_zero_only
    @override
    def log_graph(self, model: Module, input_array: Optional[Tensor] = None) -> None:
        """Record the graph of ``model`` if the logger was made with ``log_graph=True``.

        Args:
            model: The model; called once with ``input_array``.
            input_array: What to call it with, by default ``model.example_input_array``.
        """
        if not self._log_graph:
            return
        inputs: Any = getattr(model, "example_input_array", None) if input_array is None else input_array
        if inputs is None:
            rank_zero_warn(
                "Could not log computational graph to TensorBoard: The `model.example_input_array` attribute"
                " is not set or `input_array` was not given."
            )
        elif not isinstance(inputs, (Tensor, tuple)):
            rank_zero_warn(
                "Could not log computational graph to TensorBoard: The `input_array` or `model.example_input_array`"
                f" must be a tensor or a tuple, received {type(inputs).__name__}, which TensorBoard cannot trace."
            )
        else:
            # Tracing puts all layers into one mode.
            with kept_modes(model), forward_of_example(model, inputs) as example:
                self.experiment.add_graph(_traceable(model), example)

    @rank_zero_only
    @override
    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.flush()
        if self._hparams_are_saved:
            return
        directory = self.log_dir
        ensure_folder(directory)
        # Without hyper-parameters of its own, a run that goes on in a directory keeps those that lie there.
        if self.hparams or not exists(os.path.join(directory, HPARAMS_FILE)):
            write_hparams(directory, self.hparams)
        self._hparams_are_saved = True

    @rank_zero_only
    @override
    def finalize(self, status: str) -> None:
        """Close the event file; nothing happens when the logger was never used."""
        if self._experiment is None and not self.hparams:
            return
        self.save()
        if self._experiment is not None:
            self._experiment.close()

    def __getstate__(self) -> StateDict:
        return {**self.__dict__, "_experiment": None}


def _make_writer(log_dir: str, kwargs: dict[str, object]) -> SummaryWriter:
    if find_spec("tensorboard") is None:
        from tensorboardX import SummaryWriter as SummaryWriterX

        writer: SummaryWriter = SummaryWriterX(log_dir=log_dir, **kwargs)
        return writer
    from torch.utils.tensorboard import writer as torch_writer

    # A tracker such as W&B (`sync_tensorboard=True`) puts a class of its own there, to hear of the folder.
    is_watched = not vars(torch_writer)["EventFileWriter"].__module__.startswith("tensorboard.")
    if is_watched or not is_local(log_dir):
        return torch_writer.SummaryWriter(log_dir=log_dir, **kwargs)
    from levin.loggers.summary_writer import DirectSummaryWriter

    return DirectSummaryWriter(log_dir=log_dir, **kwargs)


def _hparams_summaries(hparams: dict[str, Any], metrics: dict[str, Any]) -> tuple[Any, ...]:
    home = "tensorboardX.summary" if find_spec("tensorboard") is None else "torch.utils.tensorboard.summary"
    summaries: tuple[Any, ...] = importlib.import_module(home).hparams(hparams, metrics)
    return summaries


def _as_float(name: str, value: Any) -> float:
    if value is None or isinstance(value, (str, bytes, list, tuple)):
        raise ValueError(
            f"metrics[{name!r}] must be a number, a tensor with one element or a dict of those, received {value!r}."
            " Use logger.experiment.add_text(...) for texts."
        )
    return float(value)


def _traceable(model: Module) -> Module:
    """Return a module with the layers and the forward of ``model`` and nothing else.

    Tracing reads every attribute, and properties of a LightningModule such as ``trainer`` raise while there is none.
    """
    if not hasattr(model, "transfer_batch_to_device"):
        return model

    bare: Module = type(type(model).__name__, (Module,), {})()
    bare.forward = model.forward
    bare._parameters, bare._buffers, bare._modules = model._parameters, model._buffers, model._modules
    return bare
