"""Every row of what Fabric can do, on one and on two processes, under Lightning's Fabric and under levin's."""

from __future__ import annotations

import pytest

from tests.distributed import run_ranks
from tests.parity.fabric_rows import ROWS, compare_rows

pytest.importorskip("lightning.fabric")


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def compared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return run_ranks(compare_rows, request.param, {"folder": folder}, timeout_s=240, connect=request.param > 1)


@pytest.mark.parametrize("name", list(ROWS))
def test_a_row_does_the_same_in_each_process(name, compared):
    for rank, found in enumerate(compared):
        assert not found[name], f"rank {rank}: {found[name]}"
