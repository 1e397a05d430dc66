"""validate, test and predict on Lightning and on levin."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.parity import both


def run(framework, folder, method, num_loaders, flags):
    calls, lines = [], both.Lines()
    module, callback = both.recording_module(framework, calls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = both.recording_logger(framework, lines)
        trainer = both.quiet(framework, folder, callbacks=[callback], logger=logger, **flags)
        loaders = [both.loader(3, seed=i) for i in range(num_loaders)]
        result = getattr(trainer, method)(module, loaders if num_loaders > 1 else loaders[0])
    metrics = {key: round(float(value), 5) for key, value in trainer.callback_metrics.items()}
    return calls, list(lines), metrics, result


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"limit_val_batches": 2, "limit_test_batches": 1, "limit_predict_batches": 2},
        {"fast_dev_run": True},
        {"inference_mode": False},
    ],
)
@pytest.mark.parametrize(("method", "num_loaders"), [("validate", 1), ("validate", 2), ("test", 1), ("predict", 1)])
def test_an_evaluation_looks_the_same(tmp_path, method, num_loaders, flags):
    theirs = run(both.lightning(), tmp_path, method, num_loaders, flags)
    ours = run(both.levin(), tmp_path, method, num_loaders, flags)
    assert ours[:3] == theirs[:3]
    if method == "predict":
        for a, b in zip(ours[3], theirs[3]):
            torch.testing.assert_close(a, b)
    else:
        assert [{k: pytest.approx(v, rel=1e-5) for k, v in result.items()} for result in theirs[3]] == ours[3]
