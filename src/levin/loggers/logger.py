"""What a logger is, and the one that does nothing."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar, Union

from typing_extensions import override

from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_only
from levin.utilities.types import HParams

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# The class stands above this file, and loggers of users annotate with what they like.
ModelCheckpoint = Any

T = TypeVar("T")


class FabricLogger(ABC):
    """What Fabric asks of a logger. Packages that have one for it and one for Trainer inherit from both (dvclive)."""

    @property
    @abstractmethod
    def name(self) -> Optional[str]:
        """Name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> Optional[Union[int, str]]:
        """Number or name of the run within the experiment."""

    @property
    def root_dir(self) -> Optional[str]:
        """Directory of all runs of the experiment; None when nothing is written to disk."""
        return None

    @property
    def log_dir(self) -> Optional[str]:
        """Directory of this run; None when nothing is written to disk."""
        return None

    @property
    def group_separator(self) -> str:
        """Text between a group and a name in the names of metrics."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: Optional[int] = None) -> None:
        """Record ``metrics``.

        Args:
            metrics: Name -> value.
            step: Position on the x-axis.
        """

    @abstractmethod
    def log_hyperparams(self, params: HParams, *args: Any, **kwargs: Any) -> None:
        """Record hyper-parameters.

        Args:
            params: Name -> value.
            args: For the logger at hand.
            kwargs: For the logger at hand.
        """

    def log_graph(self, model: Module, input_array: Optional[Tensor] = None) -> None:
        """Record the graph of ``model``; by default nothing happens.

        Args:
            model: The model.
            input_array: What to call it with.
        """

    def save(self) -> None:
        """Write out what was recorded. Called after every logging step, so it has to be cheap."""

    def finalize(self, status: str) -> None:
        """Write out everything at the end of a run.

        Args:
            status: ``"success"`` or ``"failed"``.
        """
        self.save()


class Logger(FabricLogger):
    """Base of all loggers, for ``Trainer(logger=...)`` and ``Fabric(loggers=...)`` alike.

    A subclass gives ``name``, ``version``, ``log_metrics`` and ``log_hyperparams``. Decorate what writes with
    :func:`~levin.utilities.rank_zero.rank_zero_only`, because every rank calls it.

    Example:
        >>> class PrintLogger(Logger):
        ...     name = "print"
        ...     version = 0
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, dict(metrics))
        ...     def log_hyperparams(self, params, *args, **kwargs):
        ...         print(params)
        >>> PrintLogger().log_metrics({"loss": 0.5}, step=1)
        1 {'loss': 0.5}
    """

    @property
    def save_dir(self) -> Optional[str]:
        """Directory under which all experiments lie; None when nothing is written to disk."""
        return None

    def last_logged(self) -> Optional[tuple[float, int]]:
        """Return the last place on the x-axis and how many times it was logged; None, the default, where nobody counts."""
        return None

    def continue_from(self, step: int, last_logged: Optional[tuple[float, int]] = None) -> None:
        """Prepare for a fit that goes on from a checkpoint; by default nothing happens. Called before its first values.

        Args:
            step: The first place on the x-axis that comes again.
            last_logged: What :meth:`last_logged` gave when the checkpoint was saved: an epoch may be logged in part by then.
        """

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Do something with the checkpoint that ``checkpoint_callback`` just saved.

        Args:
            checkpoint_callback: The callback, which knows its best and last paths.
        """


class DummyExperiment:
    """Accepts every call and does nothing."""

    def nop(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.nop

    def __getitem__(self, index: object) -> DummyExperiment:
        return self

    def __setitem__(self, *args: object) -> None:
        pass

    def __iter__(self) -> Iterator[object]:
        return iter(())


class DummyLogger(Logger):
    """Accepts every call and does nothing; stands in for the loggers in ``fast_dev_run``."""

    name = ""
    version = ""

    def __init__(self) -> None:
        self._experiment: DummyExperiment = DummyExperiment()

    experiment: DummyExperiment = reads("_experiment", "An object that accepts every call.")

    @override
    def log_metrics(self, *args: object, **kwargs: object) -> None:
        pass

    @override
    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        pass

    def __getitem__(self, index: int) -> DummyLogger:
        # ``self.logger[0]`` of somebody who had several loggers.
        return self

    def __iter__(self) -> Iterator[DummyLogger]:
        return iter((self,))

    def __getattr__(self, name: str) -> Callable[..., None]:
        nothing: Callable[..., None] = getattr(DummyExperiment(), name)
        return nothing


def rank_zero_experiment(fn: Callable[[Any], T]) -> Callable[[Any], T]:
    """Make an ``experiment`` getter return the real object on rank 0 and a :class:`DummyExperiment` elsewhere.

    Example:
        >>> class MyLogger(DummyLogger):
        ...     @property
        ...     @rank_zero_experiment
        ...     def experiment(self):
        ...         return ["real"]
        >>> MyLogger().experiment
        ['real']
    """

    @functools.wraps(fn)
    def experiment(self: object) -> T:
        if getattr(rank_zero_only, "rank", 0) > 0:
            # It has every method that T has.
            return DummyExperiment()  # type: ignore[return-value]
        return fn(self)

    return experiment
