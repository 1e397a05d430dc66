"""Walks over collections of the user's own kinds."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from levin.utilities.collections import apply_to_collection, leaves
from levin.utilities.move import move_data_to_device


class Record(dict):
    """A mapping whose ``__init__`` takes something else than a mapping."""

    def __init__(self, source: str, *, size: int) -> None:
        super().__init__(x=torch.ones(size), name=source)
        self.source = source


class Batch(dict):
    """A mapping that needs a second argument."""

    def __init__(self, values: Any, kind: str) -> None:
        super().__init__(values)
        self.kind = kind


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Point:
    x: Any
    y: Any


def test_every_kind_of_collection_is_kept_and_the_other_leaves_in_it():
    def many(one: Any) -> list[Any]:
        made = [
            {"a": one}, OrderedDict(a=one), defaultdict(list, a=one), [one, "a"], (one, b"a"), deque([one, None]), Pair(one, "a"),
            Point([one], Point), one,
        ]  # fmt: skip
        return [*made, made]

    data, expected = many(1), many(-1)
    found = apply_to_collection(data, int, lambda value: -value)
    assert found == expected and data == many(1)
    assert list(map(type, found)) == list(map(type, data))
    assert found[2].default_factory is list
    assert [*leaves(data[:9])] == [1, 1, 1, 1, "a", 1, b"a", 1, None, 1, "a", 1, Point, 1]


def test_mappings_with_an_init_of_their_own_are_moved():
    for batch in (Record("here", size=2), Batch({"x": torch.ones(2), "name": "here"}, "train")):
        moved = move_data_to_device(batch, torch.device("meta"))
        assert type(moved) is type(batch)
        assert moved is not batch
        assert (moved["x"].device.type, batch["x"].device.type, moved["name"]) == ("meta", "cpu", "here")
        assert vars(moved) == vars(batch)


def test_an_error_inside_a_mapping_is_told_as_it_is():
    def fail(value: Any) -> Any:
        raise TypeError("meant")

    for data in ({"a": 1}, Batch({"a": 1}, "train")):
        try:
            apply_to_collection(data, int, fail)
        except TypeError as error:
            assert str(error) == "meant"
