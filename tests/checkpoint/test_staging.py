"""The copy of a tree is complete, whoever copies which part of it."""

from __future__ import annotations

import io
import threading

import pytest
import torch

from levin.checkpoint import staging
from levin.checkpoint.staging import Stager


def test_large_tensors_are_copied_in_pieces_by_several_threads(monkeypatch):
    monkeypatch.setattr(staging, "_PIECE_BYTES", 2**18 + 24)
    monkeypatch.setattr(staging, "_num_copiers", lambda: 3)
    seen = set()
    move = staging.ctypes.memmove

    def watched(target, source, size):
        seen.add(threading.current_thread().name.rstrip("_0123456789"))
        assert size <= 2**18 + 24
        move(target, source, size)

    monkeypatch.setattr(staging.ctypes, "memmove", watched)
    sizes = (0, 3, 65_535, 65_536, 65_537, 300_001, 1_000_003)
    tree = {str(size): torch.arange(float(size)) for size in sizes}
    stager = Stager()
    for _ in range(3):
        copy = stager.stage(tree).realize()
        assert all(torch.equal(copy[name], tensor) for name, tensor in tree.items())
        for tensor in tree.values():
            tensor += 1
    assert seen <= {threading.current_thread().name.rstrip("_0123456789"), "levin-copy"}
    stager.release()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("levin-copy")]


def test_long_rows_of_plain_values_are_not_walked_through():
    calls = []

    class Watched(staging._Copier):
        def reducer_override(self, obj):
            calls.append(obj)
            return super().reducer_override(obj)

    row = tuple(range(625))
    tree = {"state": (3, row, None), "list": list(row), "weight": torch.ones(2)}
    Watched(io.BytesIO()).dump(tree)
    assert len(calls) == 2  # the tensor, and what stands for it
    copy = Stager().stage(tree).realize()
    assert copy["state"] == (3, row, None) and copy["list"] == list(row)
    assert torch.equal(copy["weight"], torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_device_are_copied_to_page_locked_memory_in_the_order_of_its_work():
    weight = torch.zeros(2**22, device="cuda")
    tree = {"device": weight, "host": torch.arange(3.0)}
    stager = Stager()
    for number in range(3):
        torch.cuda._sleep(10_000_000)
        weight.fill_(number)
        snapshot = stager.stage(tree)
        weight.fill_(-1.0)  # comes after the copy, which may not have begun yet
        copy = snapshot.realize()
        assert copy["device"].device.type == "cpu"
        assert copy["device"].unique().tolist() == [number]
        assert copy["host"].tolist() == [0.0, 1.0, 2.0]
        assert stager._block.tensor.is_pinned()
