"""Number formats: what is converted, where, and how the loss is scaled."""

from __future__ import annotations

import copy
import operator
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.demos.boring_classes import BoringModel
from levin.precision import DeepSpeedPrecision, DoublePrecision, HalfPrecision, MixedPrecision, Precision
from levin.precision.choose import check_precision_name, choose_precision, resolve_precision_name
from tests.strategies.small import QUIET, Small

# torch's loss scale is off on machines without CUDA unless it is made for the CPU.
SCALER_DEVICE = "cpu"


def test_single_precision_does_nothing():
    precision = Precision()
    module, batch = nn.Linear(2, 2), {"x": torch.zeros(1)}
    assert precision.convert_module(module) is module
    assert precision.convert_input(batch) is batch
    assert precision.convert_output(batch) is batch
    assert precision.scaler is None
    assert precision.state_dict() == {}
    with precision.forward_context(), precision.tensor_init_context(), precision.module_init_context():
        assert torch.zeros(1).dtype == torch.float32
    loss, optimizers, schedulers = torch.zeros(1), [object()], [object()]
    assert precision.pre_backward(loss, module) is loss and precision.post_backward(loss, module) is loss
    connected = precision.connect(module, optimizers, schedulers)
    assert connected[0] is module and connected[1] is optimizers and connected[2] is schedulers


@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
def test_each_step_runs_in_the_context_of_the_forward_pass(stage):
    for precision, dtype in ((MixedPrecision("bf16-mixed", "cpu"), torch.bfloat16), (DoublePrecision(), torch.float64)):
        module = precision.convert_module(nn.Linear(2, 2))
        with getattr(precision, f"{stage}_step_context")():
            assert module(torch.zeros(1, 2)).dtype == dtype
    with getattr(Precision(), f"{stage}_step_context")():
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "name", "warns"),
    [
        (64, "64-true", False), ("64", "64-true", False), (32, "32-true", False), ("32", "32-true", False),
        (16, "16-mixed", True), ("16", "16-mixed", True), ("bf16", "bf16-mixed", True), ("bf16-true", "bf16-true", False),
    ],
)  # fmt: skip
def test_short_forms_and_which_of_them_are_pointed_out(given, name, warns):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert resolve_precision_name(given) == name
    expected = f"precision={given!r} means {name!r}. Write precision={name!r}."
    assert [str(each.message) for each in told] == [expected] * warns


def test_whether_a_precision_clips_in_its_own_way():
    assert Precision().clips_gradients is MixedPrecision("bf16-mixed", "cpu").clips_gradients is False
    for name in ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value"):
        kind = type("Own", (Precision,), {name: lambda self, optimizer, clip_val, *rest: (optimizer, clip_val)})
        assert kind().clips_gradients is True
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": second.parameters()}, {"params": first.parameters()}], lr=1.0)
    expected = [*second.parameters(), *first.parameters()]
    assert all(map(operator.is_, Precision().main_params(optimizer), expected)) and len(expected) == 4


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_a_precision_that_clips_in_its_own_way_does_so_without_a_bound_of_the_trainer(algorithm):
    calls = []

    class Own(Precision):
        def clip_gradients(self, optimizer, clip_val=0.0, gradient_clip_algorithm="norm"):
            calls.append((clip_val, str(gradient_clip_algorithm.value)))

    class Module(BoringModel):
        def on_before_optimizer_step(self, optimizer):
            calls.append("before")

    for module in (BoringModel(), Module()):
        trainer = Trainer(
            accelerator="cpu", devices=1, plugins=[Own()], gradient_clip_algorithm=algorithm, max_steps=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module)
    each = (0.0, algorithm or "norm")
    assert calls == [each, each, "before", each, "before", each]


@pytest.mark.parametrize("kind", [Precision, lambda: MixedPrecision("16-mixed", SCALER_DEVICE)])
def test_a_step_returns_what_the_optimizer_or_the_closure_returns(kind):
    class Telling(torch.optim.SGD):
        def step(self, closure=None, more=None):
            super().step(closure)
            return "stepped", more

    precision = kind()
    recorder = Recorder(precision, Telling)
    recorder.closure()
    assert precision.optimizer_step(recorder.optimizer, more=3) == ("stepped", 3)
    returned = precision.optimizer_step(recorder.optimizer, recorder.module, recorder.closure, more=4)
    assert returned == ("stepped", 4) if precision.scaler is None else isinstance(returned, torch.Tensor)
    precision.load_state_dict({})  # of a run without a scale


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (HalfPrecision("16-true"), torch.float16),
        (HalfPrecision("bf16-true"), torch.bfloat16),
        (DoublePrecision(), torch.float64),
    ],
)
def test_true_precisions_convert_everything_that_floats(precision, dtype):
    module = precision.convert_module(nn.BatchNorm1d(2))
    assert module.weight.dtype == module.running_mean.dtype == dtype
    assert module.num_batches_tracked.dtype == torch.int64
    batch = precision.convert_input({"x": [torch.zeros(1)], "y": torch.zeros(1, dtype=torch.int64), "name": "a"})
    assert batch["x"][0].dtype == dtype
    assert batch["y"].dtype == torch.int64
    assert precision.convert_output(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    for context in (precision.forward_context, precision.tensor_init_context, precision.module_init_context):
        with context():
            assert torch.zeros(1).dtype == nn.Linear(1, 1).weight.dtype == dtype
        with pytest.raises(RuntimeError, match="inside"), context():
            raise RuntimeError("inside")
        assert torch.get_default_dtype() == torch.float32


def test_complex_numbers_keep_their_imaginary_parts():
    module = nn.Linear(2, 2, dtype=torch.complex64)
    module.register_buffer("phase", torch.tensor([1 + 2j]))
    module.register_parameter("real", nn.Parameter(torch.ones(1)))
    double = DoublePrecision().convert_module(copy.deepcopy(module))
    assert double.weight.dtype == double.phase.dtype == torch.complex128
    assert double.real.dtype == torch.float64
    assert double.phase.item() == 1 + 2j
    assert DoublePrecision().convert_input(torch.tensor([1j])).dtype == torch.complex128
    half = HalfPrecision("bf16-true").convert_module(copy.deepcopy(module))
    assert half.phase.item() == 1 + 2j
    assert (half.weight.dtype, half.real.dtype) == (torch.complex64, torch.bfloat16)
    for name, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16)):
        for_deepspeed = DeepSpeedPrecision(name).convert_module(copy.deepcopy(module))
        assert for_deepspeed.phase.item() == 1 + 2j
        assert (for_deepspeed.weight.dtype, for_deepspeed.real.dtype) == (torch.complex64, dtype)


@pytest.mark.parametrize("name", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_deepspeed_gets_batches_in_the_format_of_its_weights_and_gives_outputs_in_single_precision(name):
    precision = DeepSpeedPrecision(name)
    dtype = {"32-true": torch.float32, "16-mixed": torch.float16}.get(name, torch.bfloat16)
    batch = precision.convert_input([torch.zeros(1), torch.zeros(1, dtype=torch.int64)])
    assert [tensor.dtype for tensor in batch] == [dtype, torch.int64]
    assert precision.convert_output(batch)[0].dtype == torch.float32
    made = torch.float32 if name.endswith("mixed") else dtype
    with precision.module_init_context():
        assert nn.Linear(1, 1).weight.dtype == made
    assert precision.convert_module(nn.Linear(1, 1)).weight.dtype == made


def test_mixed_precision_computes_in_sixteen_bits_and_keeps_weights_in_32():
    precision = MixedPrecision("bf16-mixed", "cpu")
    module = precision.convert_module(nn.Linear(2, 2))
    assert module.weight.dtype == torch.float32
    with precision.forward_context():
        out = module(torch.zeros(1, 2))
    assert out.dtype == torch.bfloat16
    assert precision.convert_output([out])[0].dtype == torch.float32
    assert precision.scaler is None
    assert precision.precision == "bf16-mixed"
    with MixedPrecision("16-mixed", SCALER_DEVICE).forward_context():
        assert module(torch.zeros(1, 2)).dtype == torch.float16


def test_wrong_precision_names():
    with pytest.raises(ValueError, match=r"must be '16-true' or 'bf16-true' for HalfPrecision, received '16-mixed'"):
        HalfPrecision("16-mixed")
    for value in (32.0, [16], True):
        with pytest.raises(ValueError, match="precision must be one of '32-true', .* received"):
            check_precision_name(value)
    with pytest.raises(ValueError, match=r"must be '16-mixed' or 'bf16-mixed' for MixedPrecision, received '16'"):
        MixedPrecision("16", "cpu")
    with pytest.raises(ValueError, match=r"precision='bf16-mixed' takes no scaler"):
        MixedPrecision("bf16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


class Recorder:
    """A tiny training step that writes down in which order things happen."""

    def __init__(self, precision: Precision, optimizer_class=torch.optim.SGD, skip: bool = False, **kwargs) -> None:
        torch.manual_seed(0)
        self.precision = precision
        self.module = nn.Linear(2, 1)
        self.optimizer = optimizer_class(self.module.parameters(), lr=0.1, **kwargs)
        self.skip = skip
        self.events: list[str] = []
        self.gradient: torch.Tensor | None = None

    def closure(self):
        self.events.append("closure")
        if self.skip:
            return None
        loss = self.module(torch.ones(1, 2)).sum()
        self.optimizer.zero_grad()
        self.precision.backward(self.precision.pre_backward(loss, self.module), self.module)
        return loss

    def before_step(self, optimizer) -> None:
        self.events.append("before_step")
        self.gradient = None if self.skip else self.module.weight.grad.clone()

    def step(self):
        self.precision.before_step = self.before_step
        try:
            return self.precision.optimizer_step(self.optimizer, self.module, self.closure)
        finally:
            self.precision.before_step = None


def test_the_step_runs_closure_then_hooks_then_update():
    recorder = Recorder(Precision())
    before = recorder.module.weight.detach().clone()
    loss = recorder.step()
    assert recorder.events == ["closure", "before_step"]
    assert loss.item() == pytest.approx((before.sum() + recorder.module.bias + 0.1).item())
    assert torch.allclose(recorder.module.weight, before - 0.1)
    # Without a hook the closure goes to the optimizer as it is.
    recorder.precision.optimizer_step(recorder.optimizer, recorder.module, recorder.closure)
    # Without a closure the gradients that are there are used.
    recorder.precision.before_step = recorder.before_step
    recorder.events.clear()
    recorder.precision.optimizer_step(recorder.optimizer)
    assert torch.allclose(recorder.module.weight, before - 0.3)
    assert recorder.events == ["before_step"]


@pytest.mark.parametrize("kind", [Precision, lambda: MixedPrecision("16-mixed", SCALER_DEVICE)])
def test_hooks_before_a_step_run_without_a_loss_too(kind):
    recorder = Recorder(kind(), skip=True)
    assert recorder.step() is None
    assert recorder.events == ["closure", "before_step"]


def test_a_backward_of_the_modules_own_is_what_runs_but_under_fabric():
    class Own(LightningModule):
        def backward(self, loss, *args):
            self.calls = [*getattr(self, "calls", ()), args]
            loss.backward(*args)

    module, weight = Own(), nn.Parameter(torch.ones(1))
    Precision().backward(weight.sum(), module, None, torch.tensor(2.0))
    assert module.calls == [(torch.tensor(2.0),)]
    module._fabric = object()
    Precision().backward(weight.sum(), module)
    assert len(module.calls) == 1
    assert weight.grad == 3.0


def test_the_scaled_step_shows_hooks_unscaled_gradients():
    precision = MixedPrecision("16-mixed", SCALER_DEVICE)
    recorder = Recorder(precision)
    before = recorder.module.weight.detach().clone()
    loss = recorder.step()
    assert recorder.events == ["closure", "before_step"]
    assert torch.equal(recorder.gradient, torch.ones(1, 2))
    assert torch.allclose(recorder.module.weight, before - 0.1)
    assert isinstance(loss, torch.Tensor)
    assert precision.scaler.get_scale() == 65536.0


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    precision = MixedPrecision("16-mixed", SCALER_DEVICE)
    recorder = Recorder(precision)
    before = recorder.module.weight.detach().clone()

    def closure():
        recorder.closure()
        recorder.module.weight.grad.fill_(float("inf"))
        return torch.zeros(())

    precision.optimizer_step(recorder.optimizer, recorder.module, closure)
    assert torch.equal(recorder.module.weight, before)
    assert precision.scaler.get_scale() == 32768.0
    state = precision.state_dict()
    fresh = MixedPrecision("16-mixed", SCALER_DEVICE)
    fresh.load_state_dict(state)
    recorder.precision = fresh
    recorder.step()
    assert fresh.scaler.get_scale() == 32768.0


def test_a_skipped_batch_leaves_the_scaler_alone():
    recorder = Recorder(MixedPrecision("16-mixed", SCALER_DEVICE), skip=True)
    before = recorder.module.weight.detach().clone()
    assert recorder.step() is None
    assert torch.equal(recorder.module.weight, before)


def test_what_a_loss_scale_cannot_do():
    recorder = Recorder(MixedPrecision("16-mixed", SCALER_DEVICE), torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"precision='16-mixed' cannot be used with LBFGS"):
        recorder.step()
    Recorder(MixedPrecision("bf16-mixed", "cpu"), torch.optim.LBFGS).step()
    recorder = Recorder(MixedPrecision("16-mixed", SCALER_DEVICE), torch.optim.Adam, fused=True)
    with pytest.raises(RuntimeError, match=r"cannot be used with the fused optimizer Adam .* Pass fused=False"):
        recorder.precision.clip_gradients(recorder.optimizer, 1.0)
    # Without clipping a fused optimizer divides by the scale itself.
    before = recorder.module.weight.detach().clone()
    recorder.step()
    assert torch.allclose(recorder.module.weight, before - 0.1, atol=1e-4)


def test_clipping():
    module = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    precision = Precision()

    def clipped(value, algorithm="norm"):
        module.weight.grad = torch.tensor([[3.0, 4.0]])
        precision.clip_gradients(optimizer, value, algorithm)
        return module.weight.grad

    torch.testing.assert_close(clipped(1.0), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(clipped(3.5, "value"), torch.tensor([[3.0, 3.5]]))
    torch.testing.assert_close(clipped(1.0, None), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(clipped(0.5), torch.tensor([[0.3, 0.4]]))
    for nothing in (None, 0, 0.0, -1):
        assert torch.equal(clipped(nothing), torch.tensor([[3.0, 4.0]]))
    with pytest.raises(ValueError, match=r"gradient_clip_algorithm must be 'norm' or 'value', received 'max'"):
        clipped(1.0, "max")


def test_gradients_can_be_unscaled_by_hand():
    precision = MixedPrecision("16-mixed", SCALER_DEVICE)
    recorder = Recorder(precision)
    recorder.closure()
    assert recorder.module.weight.grad[0, 0] == 65536.0
    precision.unscale_gradients(recorder.optimizer)
    assert recorder.module.weight.grad[0, 0] == 1.0
    Precision().unscale_gradients(recorder.optimizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_training_on_cuda():
    precision = MixedPrecision("16-mixed", "cuda")
    module = nn.Linear(8, 1).cuda()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    batch = torch.randn(32, 8, device="cuda")

    def closure():
        with precision.forward_context():
            out = module(batch)
            assert out.dtype == torch.float16
            loss = out.float().pow(2).mean()
        optimizer.zero_grad()
        precision.backward(precision.pre_backward(loss, module), module)
        return loss

    for _ in range(20):
        precision.before_step = lambda optimizer: precision.clip_gradients(optimizer, 10.0)
        loss = precision.optimizer_step(optimizer, module, closure)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_resumed_run_goes_on_with_its_loss_scale(tmp_path):
    def trainer(max_epochs: int) -> Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        settings = {"limit_train_batches": 3, "limit_val_batches": 0, "enable_checkpointing": False}
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return Trainer(**QUIET, devices=1, max_epochs=max_epochs, plugins=plugin, **settings)

    whole, first, second = trainer(2), trainer(1), trainer(2)
    whole.fit(Small())
    first.fit(Small())
    first.save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt")["MixedPrecision"]
    assert (kept["scale"], kept["_growth_tracker"]) == (512.0, 1)
    second.fit(Small(), ckpt_path=tmp_path / "half.ckpt")
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    assert second.scaler.get_scale() == 2048.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_channels_last_and_fused_optimizers_stay_what_they_are(tmp_path, precision):
    class Net(LightningModule):
        def __init__(self, chooses):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head, self.chooses = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 1), chooses
            self.layouts = set()
            if chooses:
                self.to(memory_format=torch.channels_last)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch.to(memory_format=torch.channels_last) if self.chooses else batch

        def training_step(self, batch, batch_idx):
            images = self.conv(batch)
            both = (images, self.conv.weight)
            self.layouts |= {each.is_contiguous(memory_format=torch.channels_last) for each in both}
            return self.head(images.mean((2, 3))).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.chooses or None)

    torch.manual_seed(1)
    data, settings = torch.randn(8, 3, 6, 6), {
        "accelerator": "cpu", "devices": 1, "precision": precision, "gradient_clip_val": 0.1, "logger": False,
        "accumulate_grad_batches": 2, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
    }  # fmt: skip

    def fit(chooses, epochs, path=None):
        module, trainer = Net(chooses), Trainer(max_epochs=epochs, enable_checkpointing=False, **settings)
        trainer.fit(module, DataLoader(data, 2), ckpt_path=path)
        return module, trainer

    plain, _ = fit(False, 2)
    _, first = fit(True, 1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    module, trainer = fit(True, 2, tmp_path / "a.ckpt")
    assert module.layouts == {True} and trainer.optimizers[0].param_groups[0]["fused"]
    tolerance = 0.01 if precision == "bf16-true" else 1e-3
    torch.testing.assert_close(dict(module.named_parameters()), dict(plain.named_parameters()), atol=tolerance, rtol=0)


def test_formats_are_chosen_for_the_kind_of_device(monkeypatch):
    def chosen(name, device_type):
        precision = choose_precision(name, device_type)
        return type(precision), precision.precision, getattr(precision, "device", None)

    assert chosen("16-mixed", "mps") == (MixedPrecision, "16-mixed", "mps")
    assert chosen("bf16-mixed", "mps") == (MixedPrecision, "bf16-mixed", "mps")
    assert chosen("64-true", "cpu")[:2] == (DoublePrecision, "64-true")
    assert chosen("32-true", "mps")[:2] == (Precision, "32-true")
    for name in ("16-true", "bf16-true"):
        assert chosen(name, "cpu")[:2] == (HalfPrecision, name)
    with pytest.warns(UserWarning, match="^precision='16-mixed' is not supported on the CPU.* Using 'bf16-mixed'"):
        assert chosen("16-mixed", "cpu") == (MixedPrecision, "bf16-mixed", "cpu")
    assert chosen("bf16-mixed", "cpu") == (MixedPrecision, "bf16-mixed", "cpu")
    with pytest.raises(ValueError, match="precision='64-true' cannot be used with accelerator='mps'"):
        choose_precision("64-true", "mps")

    class StandIn(Precision):
        def __init__(self, weights_dtype):
            self.weights_dtype = weights_dtype

    monkeypatch.setattr("levin.precision.transformer_engine.TransformerEnginePrecision", StandIn)
    assert choose_precision("transformer-engine", "cuda").weights_dtype == torch.bfloat16
    assert choose_precision("transformer-engine-float16", "cuda").weights_dtype == torch.float16


def test_mixed_precision_keeps_no_copy_of_a_weight_that_changes():
    layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with MixedPrecision("bf16-mixed", "cpu").forward_context():
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.equal(layer(x), before * 2)
