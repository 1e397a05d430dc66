"""Which arguments the steps get, by their signatures and the number of loaders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity import trace

SIGNATURES = {
    "batch": "batch",
    "batch_idx": "batch, batch_idx",
    "another_name": "batch, number",
    "default_idx": "batch, batch_idx=7",
    "dataloader_idx": "batch, batch_idx, dataloader_idx",
    "default_dataloader_idx": "batch, batch_idx, dataloader_idx=0",
    "third_of_another_name": "batch, batch_idx, which=0",
    "variadic": "*args",
    "variadic_and_keywords": "*args, **kwargs",
    "batch_and_variadic": "batch, *args",
    "variadic_of_that_name": "batch, batch_idx, *dataloader_idx",
    "keywords": "batch, **kwargs",
    "keyword_only": "batch, *, batch_idx=0",
    "optimizer_idx": "batch, batch_idx, optimizer_idx",
    "nothing": "",
    "dataloader_idx_second": "batch, dataloader_idx=0",
    "defaults_beyond": "batch, batch_idx, dataloader_idx=0, other=1",
}
METHODS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


def make_step(seen: trace.Trace, signature: str) -> Any:
    names: dict[str, Any] = {"note": seen.note, "torch": torch}
    source = (
        f"def step(self, {signature}):\n"
        "    received = {key: value for key, value in locals().items() if key != 'self'}\n"
        "    note('step', received)\n"
        "    return self.layer(torch.ones(2, 4)).sum()\n"
    )
    exec(source, names)
    return names["step"]


def step_code(seen: trace.Trace, method: str, signature: str, num_loaders: int) -> None:
    step = make_step(seen, SIGNATURES[signature])

    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    setattr(Model, METHODS[method], step)
    loaders: Any = [trace.batches(2, seed) for seed in range(num_loaders)]
    trainer = seen.trainer(max_epochs=1)
    seen.attempt(getattr(trainer, method), Model(), loaders[0] if num_loaders == 1 else loaders)


@pytest.mark.lightning_raises("RuntimeError", "TypeError")
@pytest.mark.parametrize("num_loaders", [1, 2])
@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_gets_what_its_signature_asks_for(tmp_path, method, signature, num_loaders):
    trace.same(lambda seen: step_code(seen, method, signature, num_loaders), tmp_path)


def iterating_code(seen: trace.Trace, method: str, takes: int) -> None:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, dataloader_iter):
            for _ in range(takes):
                seen.note("took", *next(dataloader_iter))
            return self.layer(torch.ones(2, 4)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def evaluation_step(self, dataloader_iter):
        for _ in range(takes):
            seen.note("took", *next(dataloader_iter))

    if method != "fit":
        setattr(Model, METHODS[method], evaluation_step)
    seen.attempt(getattr(seen.trainer(max_epochs=2), method), Model(), trace.batches(4))


@pytest.mark.parametrize("takes", [1, 2])
@pytest.mark.parametrize("method", ["fit", "validate", "test"])
def test_a_step_with_dataloader_iter_draws_its_batches(tmp_path, method, takes):
    trace.same(lambda seen: iterating_code(seen, method, takes), tmp_path)


@pytest.mark.parametrize("num_loaders", [1, 2])
@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_batch_hooks_get_the_loader_index_only_with_several_loaders(tmp_path, stage, num_loaders):
    def code(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

        def step(self, batch, batch_idx, dataloader_idx=0):
            return {"at": (batch_idx, dataloader_idx)}

        def start(self, *args, **kwargs):
            seen.note("M start", args, kwargs)

        def end(self, *args, **kwargs):
            seen.note("M end", args, kwargs)

        setattr(Model, f"{stage}_step", step)
        setattr(Model, f"on_{stage}_batch_start", start)
        setattr(Model, f"on_{stage}_batch_end", end)
        callback = seen.callback([f"on_{stage}_batch_start", f"on_{stage}_batch_end"])
        loaders = [trace.batches(2, seed) for seed in range(num_loaders)]
        method = "validate" if stage == "validation" else stage
        seen.attempt(getattr(seen.trainer(callbacks=[callback]), method), Model(), loaders)

    trace.same(code, tmp_path)
