"""Where the loaders of a stage come from, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from torch.utils.data import Dataset, IterableDataset

from levin.data.combined import CombinedLoader, Joint, combined_length
from levin.data.loaders import capture_init_args, end_workers, hint_at_workers, length_of, prepare_dataloader
from levin.hooks import DataHooks
from levin.utilities.overrides import is_overridden
from levin.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from levin.datamodule import LightningDataModule
    from levin.module import LightningModule


class StageLoaders:
    """The loaders of one stage.

    Args:
        stage: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.hook = f"{stage}_dataloader"
        self.given: object = None
        self.owner: object = None
        self.combined: Optional[CombinedLoader] = None
        self.lengths: list[int | float] = []
        self.limits: list[int | float] = []
        # Of each loader, also of those that make joint batches.
        self.batches_per_loader: list[int | float] = []
        # What the loaders said of their lengths last.
        self._measured: tuple[int | float, ...] = ()
        self.loaded_epoch: float = -math.inf

    @property
    def instance(self) -> object:
        """What gives the loaders, under Lightning's name; another one counts when they are loaded the next time (gandlf)."""
        return self.owner if self.given is None else self.given

    @instance.setter
    def instance(self, instance: object) -> None:
        is_owner = isinstance(instance, DataHooks)
        self.given, self.owner = (None, instance) if is_owner else (instance, None)

    def attach(self, given: object, datamodule: Optional[LightningDataModule], module: LightningModule) -> None:
        """Remember who gives the loaders: the caller, the data module or the module, in this order."""
        self.given = given
        self.owner = None
        if given is None:
            for owner in (datamodule, module):
                if owner is not None and is_overridden(self.hook, owner, DataHooks):
                    self.owner = owner
                    break

    def close(self) -> None:
        """End the workers that live on from epoch to epoch; nothing of the loaders runs on after the run."""
        for loader in [] if self.combined is None else self.combined.flattened:
            end_workers(loader)

    def is_defined(self) -> bool:
        """Whether anybody gives loaders."""
        return self.given is not None or self.owner is not None

    @property
    def user_loaders(self) -> object:
        """The collection in the user's own structure, samplers injected; None before it is loaded."""
        return None if self.combined is None else self.combined.iterables

    def dataloader(self) -> Any:
        """Return the loaders as they were given, or ask for them anew: modules do in ``configure_optimizers`` (opacus)."""
        if self.given is not None:
            return self.given
        with capture_init_args():
            return getattr(self.owner, self.hook)()

    def load(
        self, sampler_kwargs: Optional[dict[str, int]], process: Callable[[object], object], is_overfit: bool = False
    ) -> None:
        """Ask for the loaders and prepare each.

        Args:
            sampler_kwargs: Rank and number of ranks for samplers; None where each rank sees all.
            process: Returns what is iterated in place of a loader.
            is_overfit: Whether all epochs see the same batches.

        Raises:
            TypeError: Something that cannot be iterated.
            ValueError: A mode that this stage cannot use.
        """
        loaders = self.dataloader()
        if loaders is None:
            raise TypeError(f"`{self.hook}` must return a loader, received None. Return [] for no data.")
        mode: Any = "max_size_cycle" if self.stage == "train" else "sequential"
        combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, mode)
        if self.stage == "train" and combined._mode == "sequential":
            raise ValueError(
                'CombinedLoader(mode="sequential") cannot be used for training, received it for train_dataloader. '
                'Use "max_size_cycle", "max_size" or "min_size".'
            )
        if self.stage == "predict" and combined._mode != "sequential":
            raise ValueError(
                f'predict needs CombinedLoader(mode="sequential"), received mode={combined._mode!r}. Pass a list of loaders.'
            )
        if self.stage == "train" and not combined.flattened:
            rank_zero_warn(f"`{self.hook}` gives no loader, so nothing is trained. Make sure this was your intention.")
        for loader in combined.flattened:
            if isinstance(loader, type):
                raise TypeError(
                    f"`{self.hook}` must give iterables, received the class {loader.__name__}. Pass an instance: {loader.__name__}(...)."
                )
            if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
                raise TypeError(
                    f"`{self.hook}` must give iterables, received {type(loader).__name__}. Pass a DataLoader or any iterable of batches."
                )
            hint_at_workers(loader, self.stage)
            if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
                name = type(loader).__name__
                rank_zero_warn(
                    f"`{self.hook}` gives a Dataset ({name}), not a loader: each of its samples is taken for a batch. "
                    f"Wrap it if this was not meant: DataLoader({name.lower()}, batch_size=32)."
                )
        combined.flattened = [
            process(
                prepare_dataloader(
                    loader, stage=self.stage, sampler_kwargs=sampler_kwargs, shuffle=None, overfit=is_overfit
                )
            )
            for loader in combined.flattened
        ]
        combined.is_settled = True
        self.combined = combined

    def measure(self, limit: int | float, name: str, num_from_limit: object) -> None:
        """Find the lengths and limits, per loader, or of the joint batches for a mode that combines."""
        self._limit(self._lengths(), limit, name, num_from_limit)

    def _lengths(self) -> list[int | float]:
        assert self.combined is not None
        return [length_of(loader) for loader in self.combined.flattened]

    def _limit(self, lengths: list[int | float], limit: int | float, name: str, num_from_limit: Any) -> None:
        combined = self.combined
        assert combined is not None
        self._measured = tuple(lengths)
        self.batches_per_loader = [num_from_limit(limit, length, name) for length in lengths]
        if not self.is_sequential:
            lengths = [combined_length(lengths, combined.mode)]
        self.limits = [num_from_limit(limit, length, name) for length in lengths]
        self.lengths = lengths

    def measure_again(self, limit: int | float, name: str, num_from_limit: object) -> bool:
        """Find the lengths that loaders have in this epoch. Returns whether they changed."""
        lengths = self._lengths()
        if self._measured == tuple(lengths):
            return False
        before, limits = self.lengths, self.limits
        self._limit(lengths, limit, name, num_from_limit)
        # The feed has found that a length cannot be relied on.
        self.lengths = [math.inf if old == math.inf else new for old, new in zip(before, self.lengths)]
        return (before, limits) != (self.lengths, self.limits)

    @property
    def is_sequential(self) -> bool:
        """Whether one loader follows the other."""
        return self.combined is not None and self.combined._mode == "sequential"

    @property
    def num_batches(self) -> list[int | float]:
        """Batches that the feed will give of each source."""
        return [min(limit, length) for limit, length in zip(self.limits, self.lengths)]

    def sources(self) -> list[Any]:
        """Return what the feed iterates over: loaders, one after the other, or the joint loader."""
        combined = self.combined
        assert combined is not None
        if self.is_sequential or not combined.flattened:
            return list(combined.flattened)
        # One loader alone needs no combining: its batches are the joint batches.
        if combined.iterables is combined.flattened[0]:
            return [combined.flattened[0]]
        return [Joint(combined.flattened, combined.mode, combined.rebuild)]


@dataclass
class Loaders:
    """The loaders of a run, by stage."""

    train: StageLoaders = field(default_factory=lambda: StageLoaders("train"))
    val: StageLoaders = field(default_factory=lambda: StageLoaders("val"))
    test: StageLoaders = field(default_factory=lambda: StageLoaders("test"))
    predict: StageLoaders = field(default_factory=lambda: StageLoaders("predict"))

    def close(self) -> None:
        """End the workers of all stages."""
        for loaders in (self.train, self.val, self.test, self.predict):
            loaders.close()
