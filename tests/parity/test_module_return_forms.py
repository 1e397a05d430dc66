"""What steps may return, and what becomes of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.parity import trace

Forms = dict[str, Callable[[torch.Tensor], Any]]
TRAINING: Forms = {
    "tensor": lambda loss: loss,
    "dict": lambda loss: {"loss": loss, "kept": 3, "graph": loss * 2},
    "ordered_dict": lambda loss: OrderedDict(loss=loss),
    "none": lambda loss: None,
    "float": lambda loss: 1.5,
    "string": lambda loss: "loss",
    "list": lambda loss: [loss],
    "tuple": lambda loss: (loss, loss),
    "dict_without_loss": lambda loss: {"other": loss},
    "empty_dict": lambda loss: {},
    "vector_of_one": lambda loss: loss.reshape(1),
    "vector": lambda loss: torch.stack([loss, loss]),
    "no_graph": lambda loss: loss.detach(),
    "true": lambda loss: True,
}


def training_code(seen: trace.Trace, form: str, manual: bool) -> None:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            return TRAINING[form](self.layer(batch).pow(2).mean())

        def on_train_batch_end(self, outputs, batch, batch_idx):
            graphs = [key for key, value in dict(outputs).items() if getattr(value, "requires_grad", False)]
            seen.note("end", outputs, graphs, self.global_step, self.layer.weight)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = seen.callback(["on_train_batch_end", "on_exception", "on_before_backward", "on_before_optimizer_step"])
    trainer = seen.trainer(max_epochs=1, callbacks=[callback])
    seen.attempt(trainer.fit, Model(), trace.batches(3))
    seen.note(trainer.global_step, trainer.state.status.value)


@pytest.mark.lightning_raises("MisconfigurationException", "RuntimeError")
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("form", TRAINING)
def test_training_step_returns(tmp_path, form, manual):
    trace.same(lambda seen: training_code(seen, form, manual), tmp_path)


@pytest.mark.lightning_raises("AttributeError", "MisconfigurationException")
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("loss", [None, 1.5], ids=str)
def test_a_dict_whose_loss_is_no_tensor_is_an_error(tmp_path, loss, manual):
    TRAINING["wrong"] = lambda _: {"loss": loss}
    try:
        theirs, ours = trace.on_both(lambda seen: training_code(seen, "wrong", manual), tmp_path)
    finally:
        del TRAINING["wrong"]
    # Lightning fails on the way, with no word about the cause.
    assert theirs.events[-2][1] in ("AttributeError", "MisconfigurationException")
    assert ours.events[-2:] == [("raised", "MisconfigurationException"), (0, "interrupted")]


EVALUATION: Forms = {
    "nothing": lambda value: None,
    "tensor": lambda value: value,
    "string": lambda value: "text",
    "nested": lambda value: {"a": [value, (1, "b")], "c": None},
    "number": lambda value: 3,
}


@pytest.mark.parametrize("form", EVALUATION)
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_evaluation_steps_return_anything(tmp_path, method, form):
    def code(seen: trace.Trace) -> None:
        name = {"validate": "validation"}.get(method, method)

        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(1)
                self.layer = torch.nn.Linear(4, 1)

        setattr(Model, f"{name}_step", lambda self, batch, batch_idx: EVALUATION[form](self.layer(batch).sum()))
        trainer = seen.trainer(callbacks=[seen.callback([f"on_{name}_batch_end"])])
        seen.attempt(getattr(trainer, method), Model(), trace.batches(2))

    trace.same(code, tmp_path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_batch_still_steps_the_optimizer(tmp_path, accumulate):
    def code(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(1)
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                return None if batch_idx in (1, 2) else self.layer(batch).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

        names = ["on_before_zero_grad", "on_before_backward", "on_before_optimizer_step", "optimizer_step"]
        model = seen.module(Model, names)()
        trainer = seen.trainer(max_epochs=2, accumulate_grad_batches=accumulate)
        trainer.fit(model, trace.batches(4))
        seen.note(trainer.global_step, *model.parameters())

    ours = trace.same(code, tmp_path)
    assert trace.warned(ours, "training_step", "none")


def test_a_batch_of_none_is_skipped_with_a_warning(tmp_path):
    def code(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(1)
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                seen.note("step", batch_idx)
                return self.layer(batch).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        module = seen.module(Model, ["on_train_batch_start", "on_train_batch_end"])()
        trainer = seen.trainer(max_epochs=1)
        items = torch.arange(3)
        loader = torch.utils.data.DataLoader(items, collate_fn=lambda x: None if x[0] == 1 else torch.ones(2, 4))
        trainer.fit(module, loader)
        seen.note(trainer.global_step)

    theirs, ours = trace.on_both(code, tmp_path)
    assert ours.events == theirs.events
    assert trace.warned(ours, "yielded None")
    assert trace.warned(theirs, "yielded None")


def test_outputs_hold_the_loss_that_the_user_returned(tmp_path):
    """Differs on purpose, row `outputs["loss"]`: Lightning's is divided by accumulate_grad_batches."""

    def code(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1))

            def training_step(self, batch, batch_idx):
                return {"loss": self.weight.sum() * 8.0}

            def on_train_batch_end(self, outputs, batch, batch_idx):
                seen.events.append(float(outputs["loss"]))

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.0)

        seen.trainer(max_epochs=1, accumulate_grad_batches=2).fit(Model(), trace.batches(4))

    theirs, ours = trace.on_both(code, tmp_path)
    assert theirs.events == [4.0] * 4
    assert ours.events == [8.0] * 4
