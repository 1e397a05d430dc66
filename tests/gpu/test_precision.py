"""Each number format on a CUDA device: types, the loss scale and its steps that overflow."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from levin import Callback
from levin.precision import MixedPrecision
from tests.gpu.small import DEVICE, Net, Numbers, loader, trainer


class Dtypes(Net):
    """Notes the types of its batch, its output and its parameters."""

    def training_step(self, batch, batch_idx):
        output = self.net(batch)
        self.seen = (batch.dtype, output.dtype, next(self.parameters()).dtype)
        return output.float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


F32, F64, F16, B16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("precision", "batch", "output", "parameters"),
    [
        ("32-true", F32, F32, F32),
        ("64-true", F64, F64, F64),
        ("16-true", F16, F16, F16),
        ("bf16-true", B16, B16, B16),
        ("16-mixed", F32, F16, F32),
        ("bf16-mixed", F32, B16, F32),
    ],
)
def test_each_precision_trains_in_its_types(precision, batch, output, parameters):
    module = Dtypes()
    runner = trainer(precision=precision)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    runner.fit(module, loader())
    assert module.seen == (batch, output, parameters)
    assert runner.global_step == 8
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert any(not torch.equal(a.to(b.dtype), b.cpu()) for a, b in zip(before, module.parameters()))
    assert (runner.scaler is not None) == (precision == "16-mixed")


class Overflowing(Net):
    """A loss that is far too large for float16 in one step, once it is scaled."""

    def __init__(self, at: int) -> None:
        super().__init__(dropout=0.0)
        self.at = at
        self.weights = []

    def on_train_batch_start(self, batch, batch_idx):
        self.weights.append(self.net[0].weight.detach().clone())

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == self.at else loss


def test_a_step_that_overflows_is_left_out_and_halves_the_loss_scale():
    module = Overflowing(at=2)
    runner = trainer(precision="16-mixed")
    runner.fit(module, loader())
    assert runner.scaler.get_scale() == 2.0**15
    assert torch.equal(module.weights[2], module.weights[3])
    assert not torch.equal(module.weights[1], module.weights[2])
    assert not torch.equal(module.weights[3], module.weights[4])


class GradientNorm(Callback):
    """Keeps the norm of all gradients where the optimizer steps, after clipping."""

    def __init__(self) -> None:
        self.norms = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.norms.append(torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_after_they_are_unscaled(precision, algorithm):
    class Large(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 10

    norms = GradientNorm()
    plugins = None
    if precision == "16-mixed":
        # The usual first scale overflows here, and what is not stepped with is not clipped.
        plugins = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cuda", init_scale=256.0))
    trainer(
        precision=None if plugins else precision, plugins=plugins, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm, callbacks=norms
    ).fit(Large(dropout=0.0), loader())  # fmt: skip
    measured = torch.stack(norms.norms)
    assert len(measured) == 7
    num = sum(p.numel() for p in Net().parameters())
    limit = 0.01 if algorithm == "norm" else 0.01 * num**0.5
    assert (measured > limit / 100).all()
    assert (measured <= limit * 1.001).all()


def test_a_fused_optimizer_that_unscales_by_itself_cannot_be_clipped():
    class Fused(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), fused=True)

    runner = trainer(precision="16-mixed")
    runner.fit(Fused(), loader())
    assert runner.global_step == 8
    with pytest.raises(RuntimeError, match="cannot be used with the fused optimizer Adam"):
        trainer(precision="16-mixed", gradient_clip_val=1.0).fit(Fused(), loader())


def test_linear_layers_multiply_in_8_bit_floats():
    pytest.importorskip("torchao", reason="needs torchao")
    losses = {}
    for precision in ("bf16-mixed", "float8"):
        torch.manual_seed(0)
        module = Net(width=16, hidden=32, dropout=0.0)
        module.net.append(torch.nn.Linear(1, 1))
        trainer(precision=precision, max_epochs=3).fit(module, DataLoader(Numbers(256, 16), batch_size=32))
        losses[precision] = torch.stack(module.losses)
        kinds = [type(layer).__name__ for layer in module.net]
        assert kinds[0] == ("Float8Linear" if precision == "float8" else "Linear")
        assert kinds[3] == "Linear"
    assert losses["float8"][-1] < losses["float8"][0]
    torch.testing.assert_close(losses["float8"], losses["bf16-mixed"], rtol=0.1, atol=1e-2)
    assert not torch.equal(losses["float8"], losses["bf16-mixed"])


def test_the_loss_scale_is_in_the_checkpoint_and_taken_up_again(tmp_path):
    runner = trainer(precision="16-mixed")
    runner.fit(Overflowing(at=2), loader())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    resumed = trainer(precision="16-mixed", max_epochs=2)
    resumed.fit(Overflowing(at=-1), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.scaler.get_scale() == 2.0**15


def test_accumulated_half_precision_is_close_to_the_large_batch():
    results = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        module = Net(dropout=0.0)
        trainer(precision="16-mixed", accumulate_grad_batches=accumulate).fit(module, loader(batch_size=batch_size))
        results.append(module.net[0].weight.detach().cpu())
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)


def test_modules_can_be_made_on_the_device_in_the_type_of_the_precision():
    runner = trainer(precision="bf16-true")
    with runner.init_module():
        module = Net()
    weight = module.net[0].weight
    assert (weight.dtype, weight.device) == (torch.bfloat16, DEVICE)
