"""CombinedLoader: several loaders iterated as one."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, cast

from levin.data.loaders import known_length, stop_workers
from levin.utilities.collections import is_namedtuple
from levin.utilities.properties import reads
from levin.utilities.types import Batch, Tree

Mode = Literal["min_size", "max_size_cycle", "max_size", "sequential"]
NumberedBatch = tuple[Batch, int, int]
"""``(batch, batch_idx, dataloader_idx)``."""
Rebuild = Callable[[Sequence[Any]], Any]

MODES: tuple[Mode, ...] = ("min_size", "max_size_cycle", "max_size", "sequential")
_PRIMITIVES = (bool, int, float, str)
_END: Any = object()


class CombinedLoader(Iterable[Batch]):
    """Iterates several loaders together or one after the other, and yields ``(batch, batch_idx, dataloader_idx)``.

    Args:
        iterables: An iterable, or any nesting of dicts, lists and tuples of iterables. A list of plain numbers or
            strings is one iterable.
        mode: When it ends, and what a batch is.

            - ``"min_size"``: with the shortest iterable; a batch has an item of each.
            - ``"max_size_cycle"``: with the longest; the shorter ones start again.
            - ``"max_size"``: with the longest; exhausted ones give None.
            - ``"sequential"``: one iterable after the other; a batch is an item of one of them.

            But for ``"sequential"``, a batch has the structure of ``iterables``.

    Raises:
        ValueError: The mode is unknown.

    Example:
        >>> loader = CombinedLoader({"a": range(3), "b": range(2)}, mode="max_size_cycle")
        >>> [batch for batch, batch_idx, dataloader_idx in loader]
        [{'a': 0, 'b': 0}, {'a': 1, 'b': 1}, {'a': 2, 'b': 0}]
    """

    def __init__(self, iterables: object, mode: Mode = "min_size") -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {list(MODES)}, received {mode!r}.")
        self._iterables: Any = iterables
        self._mode: Mode = mode
        self._flattened: list[Any] = flatten(iterables)
        self._rebuild: Rebuild = rebuilder(iterables)
        self._limits: list[int | float] | None = None
        self._iterator: Iterator[NumberedBatch] | None = None
        self.is_settled: bool = False  # set where the loaders are prepared: from then on the length is known

    iterables: Any = reads("_iterables", "The iterables in their structure.")
    rebuild: Rebuild = reads("_rebuild", "Puts a list of one item per iterable into the structure of ``iterables``.")
    mode: Mode = reads("_mode", "How the iterables are combined.")

    @property
    def flattened(self) -> list[Any]:
        """The iterables as a list, depth first. Setting a list of the same length replaces them in the structure."""
        return self._flattened

    @flattened.setter
    def flattened(self, flattened: list[object]) -> None:
        if len(flattened) != len(self._flattened):
            raise ValueError(
                f"flattened must have as many iterables as there are ({len(self._flattened)}), received "
                f"{len(flattened)}. Make another CombinedLoader."
            )
        self._flattened = list(flattened)
        self._iterables = self._rebuild(self._flattened)

    @property
    def sampler(self) -> Any:
        """The samplers of the loaders, in the structure of ``iterables``; None for one that has none."""
        return self._rebuild([getattr(iterable, "sampler", None) for iterable in self._flattened])

    @property
    def batch_sampler(self) -> Any:
        """The batch samplers of the loaders, in the structure of ``iterables``; None for one that has none."""
        return self._rebuild([getattr(iterable, "batch_sampler", None) for iterable in self._flattened])

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches of each iterable are taken; one number holds for all."""
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        elif limits is not None and len(limits) != len(self._flattened):
            raise ValueError(
                f"limits must be one number, or one for each of the {len(self._flattened)} iterables, received {limits!r}."
            )
        self._limits = limits

    def lengths(self) -> list[int | float]:
        """Return how many batches each iterable gives within its limit; inf where that is unknown."""
        lengths = [known_length(iterable) for iterable in self._flattened]
        return lengths if self._limits is None else [min(pair) for pair in zip(lengths, self._limits, strict=True)]

    def __len__(self) -> int:
        """Return how many batches there are.

        Raises:
            RuntimeError: It is not being iterated yet; the lengths of loaders are settled by then only.
            TypeError: The number is unknown.
        """
        if self._iterator is None and not self.is_settled:
            raise RuntimeError("len(combined_loader) is known once iter(combined_loader) was called. Call it first.")
        length = combined_length(self.lengths(), self._mode)
        if math.isinf(length):
            raise TypeError(f"len() needs iterables with a length in mode {self._mode!r}. Set `limits`.")
        return int(length)

    def __iter__(self) -> Iterator[NumberedBatch]:
        self.reset()
        if self._mode == "sequential":
            limits = self._limits or [math.inf] * len(self._flattened)
            self._iterator = _numbered_sequence(self._flattened, limits)
        else:
            openers = [_opener(iterable) for iterable in self._flattened]
            total = None if self._limits is None else combined_length(self.lengths(), self._mode)
            batches = joint(openers, self._mode, self._rebuild)
            if total is not None and not math.isinf(total):
                batches = islice(batches, int(total))
            self._iterator = _numbered(batches)
        return self._iterator

    def __next__(self) -> NumberedBatch:
        if self._iterator is None:
            raise RuntimeError("next(combined_loader) needs iter(combined_loader) to be called first.")
        return next(self._iterator)

    def reset(self) -> None:
        """Forget the present iteration; the workers of loaders that are not persistent end."""
        self._iterator = None


def is_stateful(obj: object) -> bool:
    """Return whether ``obj`` can save where it is, by ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


def combined_length(lengths: Sequence[int | float], mode: Mode) -> int | float:
    """Return how many batches iterables of these ``lengths`` give together.

    Example:
        >>> combined_length([3, 2], "max_size_cycle"), combined_length([3, 2], "sequential")
        (3, 5)
    """
    if not lengths or (mode == "max_size_cycle" and 0 in lengths):
        # What is empty cannot be begun again, and there is no batch without an item of it.
        return 0
    if mode == "sequential":
        return sum(lengths)
    return min(lengths) if mode == "min_size" else max(lengths)


class Joint(Iterable[Batch]):
    """Several loaders whose items make joint batches; see :func:`joint`.

    Args:
        loaders: The loaders.
        mode: How they are combined.
        rebuild: Makes a batch out of one item of each.

    Example:
        >>> list(Joint([range(3), "ab"], "max_size_cycle", tuple))
        [(0, 'a'), (1, 'b'), (2, 'a')]
    """

    def __init__(self, loaders: Sequence[Iterable[object]], mode: Mode, rebuild: Rebuild) -> None:
        self.loaders: list[Iterable[Batch]] = list(loaders)
        self.mode: Mode = mode
        self.rebuild: Rebuild = rebuild

    @property
    def shown_as(self) -> str:
        """What messages call it: nobody made it by its own name."""
        return f"CombinedLoader of {', '.join(type(loader).__name__ for loader in self.loaders)}"

    def __iter__(self) -> Iterator[Batch]:
        return joint([_opener(loader) for loader in self.loaders], self.mode, self.rebuild)


def joint(
    openers: Sequence[Callable[[], Iterator[object]]],
    mode: Mode,
    rebuild: Rebuild,
    exhausted: list[bool] | None = None,
) -> Iterator[Batch]:
    """Iterate several iterables at once.

    Args:
        openers: One function per iterable, which starts it (again) and returns the iterator. All are called at once.
        mode: One of ``"min_size"``, ``"max_size_cycle"`` and ``"max_size"``.
        rebuild: Makes a batch out of one item of each.
        exhausted: Which iterables have come to their end. Kept up to date, and read at the start, so that whoever
            holds it can go on in the middle.

    Example:
        >>> list(joint([range(3).__iter__, "ab".__iter__], "max_size", tuple))
        [(0, 'a'), (1, 'b'), (2, None)]
    """
    exhausted = [False] * len(openers) if exhausted is None else exhausted
    # An exhausted iterable of this mode gives nothing more: starting it again would draw random numbers for nothing.
    is_over = exhausted if mode == "max_size" else [False] * len(openers)
    iterators = [iter(()) if over else opener() for opener, over in zip(openers, is_over, strict=True)]
    if not iterators:
        return iter(())
    if mode == "min_size":
        return iter(map(rebuild, zip(*iterators, strict=False)))
    if mode == "max_size":
        return _max_size(iterators, rebuild, exhausted)
    return _max_size_cycle(iterators, openers, rebuild, exhausted)


def _max_size(iterators: list[Iterator[object]], rebuild: Rebuild, exhausted: list[bool]) -> Iterator[object]:
    while True:
        items = [None if exhausted[index] else next(iterator, _END) for index, iterator in enumerate(iterators)]
        for index, item in enumerate(items):
            if item is _END:
                exhausted[index] = True
                items[index] = None
        if all(exhausted):
            return
        yield rebuild(items)


def _max_size_cycle(
    iterators: list[Iterator[object]],
    openers: Sequence[Callable[[], Iterator[object]]],
    rebuild: Rebuild,
    exhausted: list[bool],
) -> Iterator[object]:
    while True:
        items = []
        for index, iterator in enumerate(iterators):
            item = next(iterator, _END)
            if item is _END:
                exhausted[index] = True
                if all(exhausted):
                    return
                iterators[index] = openers[index]()
                item = next(iterators[index], _END)
                if item is _END:
                    return
            items.append(item)
        yield rebuild(items)


def _numbered(batches: Iterator[object]) -> Iterator[tuple[object, int, int]]:
    for batch_idx, batch in enumerate(batches):
        yield batch, batch_idx, 0


def _numbered_sequence(iterables: Sequence[Any], limits: Sequence[int | float]) -> Iterator[NumberedBatch]:
    for dataloader_idx, (iterable, limit) in enumerate(zip(iterables, limits, strict=True)):
        if limit <= 0:
            continue
        last = limit - 1
        for batch_idx, batch in enumerate(iterable):
            yield batch, batch_idx, dataloader_idx
            if batch_idx >= last:
                break


def _opener(iterable: object) -> Callable[[], Iterator[object]]:
    return lambda: iterate(iterable)


def iterate(iterable: Any) -> Iterator[Batch]:
    """Begin to iterate ``iterable``; what is returned may be handed to ``for``, ``zip`` and the like.

    These call ``iter`` of what they get. A loader that is its own iterator begins anew then: with the next shard, or in
    another order.
    """
    return _items(iter(iterable))


def _items(iterator: Iterator[object]) -> Iterator[object]:
    try:
        while (item := next(iterator, _END)) is not _END:
            yield item
    finally:
        stop_workers(iterator)


def is_leaf(tree: object) -> bool:
    """Return whether ``tree`` is one iterable rather than a collection of iterables."""
    if isinstance(tree, (list, tuple)):
        return all(isinstance(item, _PRIMITIVES) for item in tree)
    return not isinstance(tree, Mapping) or not tree


def is_nothing(tree: object) -> bool:
    """Return whether ``tree`` is a collection without an iterable; within another collection that is an empty iterable."""
    return isinstance(tree, (list, tuple, Mapping)) and not tree


def flatten(tree: Tree) -> list[Any]:
    """Return the iterables in a nesting of dicts, lists and tuples, depth first.

    Example:
        >>> flatten({"a": [range(1), (range(2),)], "b": [1, 2, 3]})
        [range(0, 1), range(0, 2), [1, 2, 3]]
    """
    if is_nothing(tree):
        return []
    if is_leaf(tree):
        return [tree]
    children = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for child in children for leaf in ([child] if is_leaf(child) else flatten(child))]


def rebuilder(tree: Tree) -> Rebuild:
    """Return a function that puts a flat sequence of items into the structure of ``tree``.

    Example:
        >>> rebuilder({"a": [range(1), range(2)], "b": range(3)})((10, 20, 30))
        {'a': [10, 20], 'b': 30}
    """
    # Batches go through it, so that the common flat structures have a short way.
    if is_leaf(tree) and not is_nothing(tree):
        return _first
    children = list(tree.values()) if isinstance(tree, Mapping) else list(tree)
    join = _joiner(tree)
    if all(is_leaf(child) for child in children):
        return join

    sizes = [1 if is_leaf(child) else len(flatten(child)) for child in children]
    rebuilders = [_first if is_leaf(child) else rebuilder(child) for child in children]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = list(zip(rebuilders, starts, sizes, strict=True))

    def rebuild(items: Sequence[object]) -> object:
        return join([part(items[start : start + size]) for part, start, size in parts])

    return rebuild


def _first(items: Sequence[object]) -> object:
    return items[0]


def _joiner(tree: object) -> Rebuild:
    kind = cast(Any, type(tree))
    if isinstance(tree, Mapping):
        keys = list(tree)
        if isinstance(tree, defaultdict):
            factory = tree.default_factory
            return lambda items: defaultdict(factory, zip(keys, items, strict=True))
        if kind is dict:
            return lambda items: dict(zip(keys, items, strict=True))
        return lambda items: kind(OrderedDict(zip(keys, items, strict=True)))
    if is_namedtuple(tree):
        return lambda items: kind(*items)
    return cast(Rebuild, kind)
