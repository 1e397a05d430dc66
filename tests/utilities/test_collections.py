"""Walks over collections of the user's own kinds."""

from __future__ import annotations

from array import array
from collections import OrderedDict, UserList, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from levin.utilities.collections import apply_to_collection, leaves, named_leaves
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


class Views(dict):
    """A mapping whose ``__init__`` takes one of its values, and so takes a mapping too, for something else."""

    def __init__(self, image: Any, label: Any = None) -> None:
        super().__init__(image=image, label=label)


class Boxes(list):
    """A list whose ``__init__`` takes its items one by one."""

    def __init__(self, *boxes: Any) -> None:
        super().__init__(boxes)
        self.scale = 2


class Sized(list):
    """A list whose ``__init__`` needs a second argument."""

    def __init__(self, items: Any, scale: int) -> None:
        super().__init__(items)
        self.scale = scale


class Both(tuple):
    """A tuple that takes its items one by one."""

    def __new__(cls, *items: Any) -> Both:
        return super().__new__(cls, items)


class Twins(namedtuple("Pair", "first second")):
    """A named tuple that takes another number of arguments than it has fields."""

    def __new__(cls, one: Any) -> Twins:
        return super().__new__(cls, one, one)


class Summed(tuple):
    """A tuple that knows its sum from the beginning."""

    def __new__(cls, items: Any) -> Summed:
        made = super().__new__(cls, items)
        made.total = sum(items)
        return made


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


@pytest.mark.parametrize(
    "make",
    [
        lambda one: Views(one), lambda one: Boxes(one), lambda one: Boxes(one, one), lambda one: Sized([one], scale=3),
        lambda one: Both(one), lambda one: Both(one, one), Twins, lambda one: UserList([one]),
    ],
)  # fmt: skip
def test_collections_with_a_constructor_of_their_own_keep_their_form(make):
    data = make(1)
    found = apply_to_collection(data, int, lambda value: -value)
    assert found == make(-1) and data == make(1) and type(found) is type(data)
    if isinstance(data, (Boxes, Sized)):
        assert found.scale == data.scale


def test_what_a_tuple_has_beside_its_items_is_made_again_or_kept():
    assert apply_to_collection(Summed([1, 2]), int, lambda value: -value).total == -3
    data = Both(1, 2)
    data.source = "train"
    assert vars(apply_to_collection(data, int, lambda value: -value)) == {"source": "train"}


def test_a_bounded_deque_stays_bounded():
    found = apply_to_collection(deque([1, 2], maxlen=2), int, lambda value: -value)
    assert (found, found.maxlen) == (deque([-1, -2]), 2)


def test_sequences_of_plain_numbers_are_leaves():
    for data in (range(3), bytearray(b"ab"), memoryview(b"ab"), array("i", [1, 2])):
        assert apply_to_collection([data], torch.Tensor, lambda value: value)[0] is data
        assert [*leaves([data])] == [data]


def test_an_error_inside_a_mapping_is_told_as_it_is():
    def fail(value: Any) -> Any:
        raise TypeError("meant")

    for data in ({"a": 1}, Batch({"a": 1}, "train")):
        try:
            apply_to_collection(data, int, fail)
        except TypeError as error:
            assert str(error) == "meant"


def test_leaves_with_and_without_names_are_the_same():
    @dataclass
    class Batch:
        x: object
        rest: object

    data = {"a": [1, Batch((2, b"b"), range(3))], 4: memoryview(b"c"), "empty": []}
    names = ["a", "a.x", "a.x", "a.rest", "4"]
    assert [name for name, _ in named_leaves(data)] == names
    assert [leaf for _, leaf in named_leaves(data)] == list(leaves(data)) == [1, 2, b"b", range(3), memoryview(b"c")]
