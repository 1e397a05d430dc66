"""Seeds of the random generators."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import torch

from levin.utilities.rank_zero import (
    rank_prefixed_message,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from levin.utilities.rng_states import collect_rng_states, set_rng_states
from levin.utilities.xla_generator import XLA_GENERATOR

MAX_SEED = 2**32 - 1
_SEED_VARIABLE = "PL_GLOBAL_SEED"
_WORKERS_VARIABLE = "PL_SEED_WORKERS"


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed the generators of python, numpy and torch (all devices).

    The seed is left in the environment variable ``PL_GLOBAL_SEED``, so that processes started later use the same.

    Args:
        seed: From 0 to 2**32 - 1. None takes ``PL_GLOBAL_SEED``, or 0 with a warning when that is not set.
        workers: Whether the trainer also gives the workers of data loaders without a ``worker_init_fn`` seeds that
            differ for every worker and rank (see :func:`pl_worker_init_function`).
        verbose: Whether to log the seed.

    Returns:
        The seed that was set.

    Raises:
        ValueError: The seed is no integer, or out of range.

    Example:
        >>> seed_everything(42, verbose=False)
        42
    """
    seed = _seed_from_environment() if seed is None else _as_seed(seed, "seed")
    if verbose:
        rank_zero_info(rank_prefixed_message(f"Seed set to {seed}", _global_rank()))
    os.environ[_SEED_VARIABLE] = str(seed)
    os.environ[_WORKERS_VARIABLE] = str(int(workers))
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed)
    torch.manual_seed(seed)
    XLA_GENERATOR.seed(seed)
    return seed


def reset_seed() -> None:
    """Set the seed of the last :func:`seed_everything` again; without one, do nothing.

    Called when the processes of a run are there, so that all of them start from the same state.
    """
    seed = os.environ.get(_SEED_VARIABLE)
    if seed is not None:
        seed_everything(int(seed), workers=os.environ.get(_WORKERS_VARIABLE, "0") == "1", verbose=False)


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Seed a data-loader worker differently from every other worker of every rank.

    PyTorch seeds worker ``w`` with ``base_seed + w``, which repeats on ranks that drew the same base seed. Here
    the base seed, the worker and the rank are hashed together.

    Args:
        worker_id: Number of the worker on this rank.
        rank: Global rank; by default the one that the strategy set.

    Example:
        >>> loader = torch.utils.data.DataLoader(range(4), worker_init_fn=pl_worker_init_function)
    """
    rank = getattr(rank_zero_only, "rank", 0) if rank is None else rank
    base_seed = torch.initial_seed() - worker_id
    name = f"{base_seed}/{worker_id}/{rank}".encode()
    digest = hashlib.blake2b(name, digest_size=48).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    random.seed(int.from_bytes(digest[8:32], "little"))
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed([int.from_bytes(digest[i : i + 4], "little") for i in range(32, 48, 4)])


@contextlib.contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Restore the random states at the end of the block to what they were at its beginning.

    Args:
        include_cuda: Whether the generators of the CUDA devices are restored as well.

    Example:
        >>> _ = torch.manual_seed(1)
        >>> with isolate_rng():
        ...     first = torch.rand(1)
        >>> bool(first == torch.rand(1))
        True
    """
    states = collect_rng_states(include_cuda)
    try:
        yield
    finally:
        set_rng_states(states)


def _numpy() -> Any:
    """Return numpy, or None where it is not installed."""
    try:
        import numpy
    except ModuleNotFoundError:
        return None
    return numpy


def _seed_from_environment() -> int:
    text = os.environ.get(_SEED_VARIABLE)
    if text is None:
        rank_zero_warn("No seed found, seed set to 0. Pass one to seed_everything, or set PL_GLOBAL_SEED.")
        return 0
    return _as_seed(text, _SEED_VARIABLE)


def _as_seed(value: Any, name: str) -> int:
    with contextlib.suppress(TypeError, ValueError):
        if 0 <= int(value) <= MAX_SEED:
            return int(value)
    raise ValueError(f"{name} must be an integer from 0 to {MAX_SEED}, received {value!r}.")


def _global_rank() -> int | None:
    """Return the rank for messages, or None in a run of one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return None
