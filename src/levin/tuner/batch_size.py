"""The search for the largest batch size that fits into memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sized

from levin.data.combined import CombinedLoader
from levin.loops.dataloaders import STAGE_OF, loaders_of
from levin.loops.run import Run
from levin.tuner.search import holders, try_run
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.memory import free_memory, is_oom_error
from levin.utilities.rank_zero import rank_zero_info

MODES = ("power", "binsearch")


def largest(
    fits: Callable[[int], bool],
    first: int,
    max_trials: int,
    max_val: int,
    mode: str = "power",
    margin: float = 0.05,
    is_enough: Callable[[int], bool] = lambda size: False,
) -> int:
    """Return the largest size found that fits.

    Args:
        fits: Whether a size fits.
        first: The size to begin with.
        max_trials: Sizes that fit at most; those that do not are not counted.
        max_val: The largest size to try.
        mode: ``"power"`` doubles until it does not fit; ``"binsearch"`` looks in between then, and leaves room.
        margin: Share of the size to leave free, where the mode is ``"binsearch"``.
        is_enough: Whether no larger size than one that fits makes sense.

    Raises:
        RuntimeError: Not even a size of 1 fits.

    Example:
        >>> largest(lambda size: size <= 50, 2, 25, 1000)
        32
        >>> largest(lambda size: size <= 50, 2, 25, 1000, "binsearch", 0.0)
        50
    """
    size, good, bad, num_fitting = min(first, max_val), 0, max_val + 1, 0
    while True:
        if fits(size):
            good, num_fitting = size, num_fitting + 1
        elif size == 1:
            raise RuntimeError("A batch size of 1 does not fit into memory. Use a smaller model or a lower precision.")
        else:
            bad = size
        has_failed = bad <= max_val
        is_last = num_fitting >= max_trials or is_enough(good) or (mode == "power" and has_failed)
        if bad - good <= 1 or (good and is_last):
            break
        # Half of it where nothing has fitted yet.
        size = (good + bad) // 2 if has_failed else min(good * 2, max_val)
    return max(int(good * (1 - margin)), 1) if mode == "binsearch" else good


def scale_batch_size(
    run: Run,
    mode: str,
    steps_per_trial: int,
    init_val: int,
    max_trials: int,
    batch_arg_name: str,
    margin: float,
    max_val: int,
) -> int:
    """Return the largest batch size that fits into memory; module and data module have it afterwards.

    Args:
        run: A run that is set up, whose loaders come from hooks that read the attribute.
        mode: As in :func:`largest`.
        steps_per_trial: Steps with each size.
        init_val: The size to begin with.
        max_trials: As in :func:`largest`.
        batch_arg_name: Name of the attribute, of module or data module or of the hyper-parameters of either.
        margin: As in :func:`largest`.
        max_val: The largest size to try.

    Raises:
        MisconfigurationException: There is no such attribute, or the loaders were passed to the Trainer.
        ValueError: Several processes run.
    """
    check_batch_size_search(run, batch_arg_name)
    owners = holders(batch_arg_name, run.module, run.datamodule)
    before = getattr(owners[0], batch_arg_name)
    stage = STAGE_OF[run.fn]
    limits = {"limit_val_batches": 0} if run.fn == "fit" else {f"limit_{stage}_batches": steps_per_trial}
    num_samples = sys.maxsize

    def fits(size: int) -> bool:
        nonlocal num_samples
        _set(owners, batch_arg_name, size)
        try:
            tried = try_run(run, [], max_steps=steps_per_trial, **limits)
            num_samples = _num_samples(getattr(tried.loaders, stage).combined)
        except (RuntimeError, MemoryError) as error:
            if not is_oom_error(error):
                raise
            rank_zero_info(f"Batch size {size} failed, trying a smaller one")
            return False
        finally:
            free_memory()
        rank_zero_info(f"Batch size {size} succeeded")
        return True

    try:
        found = largest(fits, init_val, max_trials, max_val, mode, margin, lambda size: size >= num_samples)
    except BaseException:  # Ctrl-C too leaves the size as it was
        _set(owners, batch_arg_name, before)
        raise
    _set(owners, batch_arg_name, found)
    for loaders in (run.loaders.train, run.loaders.val, run.loaders.test, run.loaders.predict):
        loaders.combined = None  # asked for again, with the new size
    rank_zero_info(f"Finished batch size finder, will continue with full run using batch size {found}")
    return found


def check_batch_size_search(run: Run, batch_arg_name: str) -> None:
    """Raise where a search for a batch size cannot be; as :func:`scale_batch_size` says."""
    if run.strategy.is_distributed:
        raise ValueError(
            f"The batch size is searched on one process, received {run.strategy.world_size}. "
            "Search with Trainer(devices=1) and set the size for all."
        )
    loaders = loaders_of(run, run.fn)
    if loaders.given is not None:
        raise MisconfigurationException(
            "The batch size finder cannot be used with dataloaders passed directly to the Trainer. "
            f"Give the module or a data module a `{loaders.hook}` that reads `{batch_arg_name}`."
        )
    if not holders(batch_arg_name, run.module, run.datamodule):
        raise MisconfigurationException(
            f"Field {batch_arg_name} not found in `model`, `datamodule`, nor their `hparams` attributes. "
            f"Set self.{batch_arg_name} and read it where the loader is made, or pass batch_arg_name."
        )


def _num_samples(combined: CombinedLoader) -> int:
    """Return how many samples the smallest data set has: no larger batch makes sense."""
    datasets = [getattr(loader, "dataset", None) for loader in combined.flattened]
    return min((len(each) for each in datasets if isinstance(each, Sized)), default=sys.maxsize)


def _set(owners: list[object], name: str, value: int) -> None:
    for owner in owners:
        setattr(owner, name, value)
