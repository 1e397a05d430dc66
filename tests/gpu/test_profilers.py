"""Profilers of kernels."""

from __future__ import annotations

import pytest

from levin.profilers import PyTorchProfiler
from tests.gpu.small import Net, loader, trainer


def test_the_profiler_records_kernels(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="profile")
    trainer(profiler=profiler).fit(Net(), loader())
    report = "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert "CUDA" in report
    traces = list(tmp_path.glob("*.json*"))
    assert traces
    assert any('"cat": "kernel"' in path.read_text() for path in traces)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_error_in_a_step_that_is_profiled_is_raised_as_it_is(tmp_path, at):
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == at:
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    profiler = PyTorchProfiler(dirpath=tmp_path, filename="profile")
    with pytest.raises(KeyError, match="mine"):
        trainer(profiler=profiler).fit(Failing(), loader())
    trainer(profiler=profiler).fit(Net(), loader())
    assert list(tmp_path.glob("*.json"))
