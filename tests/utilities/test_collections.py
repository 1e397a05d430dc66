"""Walks over collections of the user's own kinds."""

from __future__ import annotations

from typing import Any

import torch

from levin.utilities.collections import apply_to_collection
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
