"""What is done to the user's loaders before the first batch."""

from __future__ import annotations

import functools
import inspect
import math
import os
import threading
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Optional, cast

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torch.utils.data.distributed import DistributedSampler

from levin.data.samplers import (
    UNSPLIT,
    DistributedSamplerWrapper,
    IndexBatchSampler,
    UnrepeatedDistributedSampler,
    UnrepeatedSamplerWrapper,
)
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.processors import count_processors
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.seed import pl_worker_init_function
from levin.utilities.types import Kwargs
from levin.utilities.warnings import PossibleUserWarning

_ARGUMENTS = "_levin_init_arguments"


class _Capture:
    """Classes whose ``__init__`` records its arguments while anybody, in any thread, asks for that."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_users: int = 0
        self.originals: dict[type, Callable[..., None]] = {}


_capture = _Capture()


@contextmanager
def capture_init_args() -> Iterator[None]:
    """Remember, on each DataLoader and BatchSampler of a subclass made inside, what it was made with.

    That is how such an object can be built again with another sampler. The classes are as they were when the last of
    several threads leaves.
    """
    with _capture.lock:
        _capture.num_users += 1
        for kind in [kind for base in (DataLoader, BatchSampler) for kind in (base, *_subclasses(base))]:
            if "__init__" in vars(kind) and kind not in _capture.originals:
                _capture.originals[kind] = vars(kind)["__init__"]
                setattr(kind, "__init__", _recording(vars(kind)["__init__"]))  # noqa: B010
    try:
        yield
    finally:
        with _capture.lock:
            _capture.num_users -= 1
            if not _capture.num_users:
                for kind, init in _capture.originals.items():
                    setattr(kind, "__init__", init)  # noqa: B010
                _capture.originals.clear()


def _subclasses(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: object, *args: object, **kwargs: object) -> None:
        if _ARGUMENTS not in self.__dict__:
            self.__dict__[_ARGUMENTS] = (args, kwargs)
        init(self, *args, **kwargs)

    return wrapped


def known_length(iterable: Any) -> int | float:
    """Return ``len(iterable)``, or inf if it has none.

    Example:
        >>> known_length(range(3)), known_length(iter(range(3)))
        (3, inf)
    """
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return math.inf


def length_of(loader: object) -> int | float:
    """Return the number of batches, inf when unknown; warn if there are none."""
    length = known_length(loader)
    if length == 0:
        rank_zero_warn(f"`{type(loader).__name__}` returned 0 length. Make sure this was your intention.")
    return length


def has_len(dataloader: object) -> bool:
    """Return whether the number of batches is known."""
    return math.isfinite(length_of(dataloader))


def prepare_dataloader(
    loader: object,
    *,
    stage: str,
    sampler_kwargs: Optional[Kwargs],
    shuffle: Optional[bool] = None,
    overfit: bool = False,
) -> object:
    """Return the loader that is iterated in place of the user's.

    Args:
        loader: Any iterable; only DataLoaders are changed.
        stage: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
        sampler_kwargs: ``num_replicas`` and ``rank`` where data is split between ranks, else None.
        shuffle: Whether a split sampler shuffles; by default in training, and in evaluation if the loader did.
        overfit: Whether to take the data in order, whatever the sampler.
    """
    if not isinstance(loader, DataLoader):
        return loader
    if loader.worker_init_fn is None and _seeds_workers():
        loader.worker_init_fn = functools.partial(pl_worker_init_function, rank=(sampler_kwargs or {}).get("rank", 0))
    if isinstance(loader.dataset, IterableDataset):
        return loader
    sampler = sampler_of(loader)
    is_split = sampler_kwargs is not None and not isinstance(sampler, DistributedSampler)
    if stage != "train" and shuffles(loader):
        rank_zero_warn(
            f"Your `{stage}_dataloader`'s sampler has shuffling enabled; it is strongly recommended to turn it off for "
            "evaluation.",
            category=PossibleUserWarning,
        )
    if overfit and not isinstance(loader.sampler, SequentialSampler) and not is_split:
        rank_zero_warn(
            f"You requested to overfit but enabled shuffling in `{stage}_dataloader`. Its sampler is replaced by one in order."
        )
        return rebuild(loader, SequentialSampler(cast("Sized", loader.dataset)), stage)
    if is_split:
        assert sampler_kwargs is not None
        if shuffle is None:
            shuffle = not overfit if stage == "train" else shuffles(loader)
        return rebuild(loader, _split_sampler(loader, stage, sampler_kwargs, shuffle, overfit), stage)
    return rebuild(loader, sampler, stage) if stage == "predict" else loader


def hint_at_workers(loader: object, stage: str) -> None:
    """Tell of processors that could load data and do not."""
    usable = count_processors()
    if isinstance(loader, DataLoader) and loader.num_workers < 2 < usable:
        rank_zero_warn(
            f"The `{stage}_dataloader` loads with num_workers={loader.num_workers}, which may hold up the loop. "
            f"Consider `DataLoader(..., num_workers={usable - 1})`.",
            category=PossibleUserWarning,
        )


def sampler_of(loader: DataLoader[Any]) -> object:
    """Return what draws the samples: torch gives a loader with a batch sampler another one, which nothing draws from.

    Example:
        >>> batches = BatchSampler(RandomSampler(range(4)), 2, drop_last=False)
        >>> sampler_of(DataLoader(range(4), batch_sampler=batches)) is batches.sampler
        True
    """
    own = getattr(loader.batch_sampler, "sampler", None)
    return loader.sampler if own is None else own


def shuffles(loader: object) -> bool:
    """Return whether a loader draws in random order."""
    return isinstance(getattr(loader, "sampler", None), RandomSampler)


def _seeds_workers() -> bool:
    return bool(int(os.environ.get("PL_SEED_WORKERS", "0") or 0))


def _split_sampler(loader: Any, stage: str, sampler_kwargs: Kwargs, shuffle: bool, overfit: bool) -> Sampler[object]:
    kwargs = dict(sampler_kwargs, shuffle=shuffle, seed=int(os.environ.get("PL_GLOBAL_SEED", "0") or 0))
    # In training the parts are made equal by repeating a few samples; elsewhere each sample counts once.
    sampler = sampler_of(loader)
    is_put_in_order = overfit and isinstance(sampler, RandomSampler)
    if not is_put_in_order and not _draws_each_once(sampler, loader.dataset):
        wrapper = DistributedSamplerWrapper if stage == "train" else UnrepeatedSamplerWrapper
        return wrapper(sampler, **kwargs)
    if stage == "train":
        return DistributedSampler(loader.dataset, **kwargs)
    return UnrepeatedDistributedSampler(loader.dataset, **kwargs)


def _draws_each_once(sampler: object, dataset: object) -> bool:
    """Whether a sampler of torch draws every sample of the dataset once, so that a DistributedSampler can replace it."""
    is_torchs = isinstance(sampler, (RandomSampler, SequentialSampler))
    return is_torchs and not getattr(sampler, "replacement", False) and known_length(sampler) == known_length(dataset)


def rebuild(loader: DataLoader[object], sampler: object, stage: str) -> DataLoader[object]:
    """Return a loader like ``loader`` that draws from ``sampler``.

    Raises:
        MisconfigurationException: A subclass does not take, or did not keep, what it is built with.
    """
    arguments = _init_arguments(loader)
    arguments.update(_sampler_arguments(loader, sampler, stage))
    try:
        return type(loader)(**arguments)
    except TypeError as error:
        raise MisconfigurationException(
            f"`{type(loader).__name__}` could not be built again with another sampler: {error}. "
            f"Let its __init__ take **kwargs for torch's DataLoader, or {UNSPLIT}."
        ) from error


_PLAIN = [
    "dataset",
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
]


def _init_arguments(loader: DataLoader[object]) -> dict[str, Any]:
    parameters = inspect.signature(type(loader).__init__).parameters
    arguments = _recorded_arguments(loader)
    if arguments is None or type(loader) is DataLoader:
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        arguments = {name: getattr(loader, name) for name in _PLAIN if takes_all or name in parameters}
        own = [name for name in parameters if name not in _PLAIN and name in vars(loader) and name != "self"]
        arguments.update((name, getattr(loader, name)) for name in own if type(loader) is not DataLoader)
        missing = [
            name
            for name, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            and name not in arguments
            and name not in ("self", "sampler", "batch_sampler")
        ]
        if missing:
            raise MisconfigurationException(
                f"`{type(loader).__name__}` must keep the arguments {missing} as attributes to be built again with another "
                "sampler, received a loader without them. Set them in its __init__."
            )
    arguments["worker_init_fn"] = loader.worker_init_fn
    return arguments


def _recorded_arguments(obj: object) -> dict[str, object] | None:
    """Return what an object was made with, as far as that was recorded."""
    # A list of batches has no attributes.
    recorded = getattr(obj, "__dict__", {}).get(_ARGUMENTS)
    if recorded is None:
        return None
    kind: Any = type(obj)
    signature = inspect.signature(kind.__init__)
    arguments: dict[str, object] = {}
    for name, value in list(signature.bind_partial(obj, *recorded[0], **recorded[1]).arguments.items())[1:]:
        is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        arguments.update(value if is_rest else {name: value})
    return arguments


def _sampler_arguments(loader: DataLoader[object], sampler: object, stage: str) -> dict[str, object]:
    is_predict = stage == "predict"
    batch_sampler: Any = loader.batch_sampler
    fixed: dict[str, object] = {"shuffle": False}
    if batch_sampler is None:
        return {**fixed, "sampler": sampler, "batch_size": None, "batch_sampler": None, "drop_last": False}
    if type(batch_sampler) is BatchSampler and not is_predict:
        size, drop_last = batch_sampler.batch_size, batch_sampler.drop_last
        return {**fixed, "sampler": sampler, "batch_size": size, "batch_sampler": None, "drop_last": drop_last}
    kind: Any = type(batch_sampler)
    arguments = _recorded_arguments(batch_sampler)
    if arguments is not None and kind is not BatchSampler:
        if "sampler" not in inspect.signature(kind.__init__).parameters:
            raise TypeError(
                f"The batch sampler {kind.__name__} must take an argument `sampler` to draw from another one, "
                f"or {UNSPLIT}."
            )
        arguments["sampler"] = sampler
        if is_predict and "drop_last" in arguments:
            arguments["drop_last"] = False
        built = kind(**arguments)
    else:
        try:
            drop_last = not is_predict and batch_sampler.drop_last
            built = kind(sampler, batch_size=batch_sampler.batch_size, drop_last=drop_last)
        except (TypeError, AttributeError) as error:
            if sampler is not sampler_of(loader):
                raise TypeError(
                    f"The batch sampler {kind.__name__} must look like (sampler, batch_size, drop_last) to be built again. "
                    f"Or {UNSPLIT}."
                ) from error
            built = batch_sampler  # its batches are taken as they are
    built = IndexBatchSampler(built) if is_predict else built
    return {**fixed, "sampler": None, "batch_size": 1, "batch_sampler": built, "drop_last": False}


def set_epoch(loader: object, epoch: int) -> None:
    """Tell the samplers of ``loader``, and those that they draw from, the epoch once, where they want to know."""
    sampler: object = getattr(loader, "sampler", None)
    batch_sampler: object = getattr(loader, "batch_sampler", None)
    if type(batch_sampler) is BatchSampler and batch_sampler.sampler is sampler and type(loader) is DataLoader:
        if type(sampler) in (SequentialSampler, RandomSampler) and "set_epoch" not in vars(sampler):
            return
    told: set[int] = set()
    owners = [loader]
    while owners:
        owner = owners.pop()
        for name in ("sampler", "batch_sampler", "_batch_sampler"):
            sampler = getattr(owner, name, None)
            if sampler is not None and id(sampler) not in told:
                told.add(id(sampler))
                owners.append(sampler)
                if callable(getattr(sampler, "set_epoch", None)):
                    sampler.set_epoch(epoch)


def stop_workers(iterator: object) -> None:
    """End the workers of an iterator of a DataLoader whose epoch is over; those that are persistent live on.

    The garbage collector may end the queues of an abandoned iterator before the iterator, which then waits five seconds for
    each worker in the middle of a step. torchdata's StatefulDataLoader has iterators of its own kind.
    """
    if getattr(iterator, "_persistent_workers", True) is False and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def end_workers(loader: Any) -> None:
    """End persistent workers of ``loader``; its next iteration starts others."""
    iterator = getattr(loader, "_iterator", None)
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()
        loader._iterator = None
