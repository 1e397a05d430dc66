"""Number formats of other packages, with the real ones: 8-bit floats of torchao, 4 and 8 bits of bitsandbytes."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn

from levin import LightningModule, Trainer
from levin.precision import BitsandbytesPrecision, Float8Precision, TransformerEnginePrecision
from levin.strategies import FSDPStrategy
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.small import QUIET

WAY = "`make test-precision` installs it"


class Wide(LightningModule):
    """Layers that 8-bit floats fit, and a head that they do not."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64))
        self.head = nn.Linear(64, 3)
        self.losses: list[float] = []

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        loss = (self(batch) - 1).pow(2).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def data(size: int = 64) -> torch.utils.data.DataLoader:
    inputs = torch.randn(size, 64, generator=torch.Generator().manual_seed(5))
    return torch.utils.data.DataLoader(inputs, batch_size=16)


def train(module, **settings):
    options = {"max_epochs": 2, "enable_checkpointing": False, "devices": 1, **QUIET, **settings}
    trainer = Trainer(**options)
    trainer.fit(module, data())
    return trainer


@pytest.mark.packages
@pytest.mark.parametrize("recipe", ["float8", "tensorwise", "rowwise"])
def test_float8_trains_nearly_as_bfloat16_does(recipe, tmp_path):
    pytest.importorskip("torchao", reason=f"torchao is not installed; {WAY}")
    from torchao.float8.float8_linear import Float8Linear

    module, reference = Wide(), Wide()
    how = {"precision": "float8"} if recipe == "float8" else {"plugins": [Float8Precision(recipe)]}
    trainer = train(module, **how)
    train(reference, precision="bf16-mixed")
    kinds = [type(layer) for layer in (module.net[0], module.net[2], module.head)]
    assert kinds == [Float8Linear, Float8Linear, nn.Linear]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert module.losses != reference.losses
    torch.testing.assert_close(module.losses, reference.losses, rtol=0.05, atol=0.01)
    # Its checkpoint is one of the plain module, and goes on.
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)
    plain = Wide()
    plain.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    again = Wide()
    Trainer(max_epochs=3, precision="float8", enable_checkpointing=False, devices=1, **QUIET).fit(
        again, data(), ckpt_path=path
    )
    assert len(again.losses) == 4 and again.losses[0] < module.losses[0]


@pytest.mark.packages
def test_float8_multiplies_as_the_user_says():
    pytest.importorskip("torchao", reason=f"torchao is not installed; {WAY}")
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    def layers(precision: Float8Precision) -> nn.Sequential:
        net: nn.Sequential = precision.convert_module(Wide()).net
        return net

    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        assert layers(Float8Precision(recipe))[0].config == Float8LinearConfig.from_recipe_name(recipe)
    config = Float8LinearConfig(pad_inner_dim=True)
    assert layers(Float8Precision(config))[2].config == config
    assert layers(Float8Precision(emulate=True))[0].config.emulate
    chosen = layers(Float8Precision(module_filter_fn=lambda layer, name: name == "net.2"))
    assert [type(layer) for layer in (chosen[0], chosen[2])] == [nn.Linear, Float8Linear]
    precision = Float8Precision(device="cpu")
    with precision.forward_context():
        output = nn.Linear(64, 3)(torch.zeros(2, 64))
    assert output.dtype == torch.bfloat16 and precision.convert_output(output).dtype == torch.float32


@pytest.mark.packages
def test_float8_wants_a_gpu_that_has_it_or_is_emulated(monkeypatch):
    pytest.importorskip("torchao", reason=f"torchao is not installed; {WAY}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match="capability 8.9 or more .*, received an A100"):
        Float8Precision()
    assert Float8Precision(emulate=True).device == "cuda" and Float8Precision(device="cpu").device == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert Float8Precision().device == "cuda"


@pytest.mark.packages
def test_float8_is_refused_where_no_layer_fits():
    pytest.importorskip("torchao", reason=f"torchao is not installed; {WAY}")
    module = Wide()
    module.net = nn.Linear(64, 31)
    module.head = nn.Linear(31, 3)
    with pytest.raises(ValueError, match="multiples of 16"):
        train(module, precision="float8")
    with pytest.raises(ValueError, match="one of 'tensorwise'"):
        Float8Precision("columnwise")


@pytest.mark.packages
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason=f"torchao is not installed; {WAY}")
@world_size(2, connect=False, timeout_s=120)
def test_float8_under_fsdp():
    module, reference = Wide(), Wide()
    train(module, strategy=FSDPStrategy(), devices=2, precision="float8")
    train(reference, strategy=FSDPStrategy(), devices=2, precision="bf16-mixed")
    assert module.losses != reference.losses
    torch.testing.assert_close(module.losses, reference.losses, rtol=0.05, atol=0.02)


@pytest.mark.packages
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
def test_bitsandbytes_predicts_nearly_as_the_whole_weights_do(mode):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=f"bitsandbytes is not installed; {WAY}")
    module = Wide()
    reference = copy.deepcopy(module)
    precision = BitsandbytesPrecision(mode, ignore_modules={"head"})
    trainer = Trainer(plugins=[precision], enable_checkpointing=False, devices=1, **QUIET)
    found, expected = torch.cat(trainer.predict(module, data())), torch.cat(Trainer(**QUIET).predict(reference, data()))
    kind = bitsandbytes.nn.Linear8bitLt if mode == "int8" else bitsandbytes.nn.Linear4bit
    assert [type(layer) for layer in (module.net[0], module.net[2], module.head)] == [kind, kind, nn.Linear]
    assert module.net[0].weight.dtype == (torch.int8 if mode == "int8" else torch.uint8)
    assert module.head.weight.dtype == module.net[3].weight.dtype == torch.bfloat16
    error = (found.float() - expected).norm() / expected.norm()
    assert 0 < error < (0.03 if mode == "int8" else 0.25)


@pytest.mark.packages
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
def test_bitsandbytes_quantizes_in_the_mode_and_the_type_of_the_user(mode):
    pytest.importorskip("bitsandbytes", reason=f"bitsandbytes is not installed; {WAY}")
    module = Wide()
    module.head_of_another = nn.Linear(64, 3)
    bias = module.net[0].bias.detach().clone()
    module.net[0].bias.requires_grad_(False)
    BitsandbytesPrecision(mode, torch.float16, ignore_modules={"head"}).convert_module(module)
    layer = module.net[0]
    assert torch.equal(layer.bias, bias.half()) and not layer.bias.requires_grad and module.net[2].bias.requires_grad
    assert {tensor.dtype for tensor in (layer.bias, module.head.weight, module.net[3].weight)} == {torch.float16}
    assert type(module.head) is nn.Linear and type(module.head_of_another) is type(layer)
    if mode == "int8":
        assert not layer.state.has_fp16_weights
    else:
        assert layer.compute_dtype == torch.float16
        assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (
            mode[:3],
            mode.endswith("-dq"),
        )


@pytest.mark.packages
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_what_is_not_quantized_learns_beside_bitsandbytes(mode):
    pytest.importorskip("bitsandbytes", reason=f"bitsandbytes is not installed; {WAY}")
    module = Wide()
    before = module.head.weight.detach().clone()
    train(module, plugins=[BitsandbytesPrecision(mode, ignore_modules={"head"})])
    assert module.losses[-1] < module.losses[0]
    assert not module.net[0].weight.requires_grad and not torch.equal(module.head.weight.float(), before)


@pytest.mark.packages
def test_bitsandbytes_with_nothing_to_replace_or_of_an_unknown_mode():
    pytest.importorskip("bitsandbytes", reason=f"bitsandbytes is not installed; {WAY}")
    with pytest.raises(TypeError, match="no linear layer to replace in Wide"):
        train(Wide(), plugins=[BitsandbytesPrecision("nf4", ignore_modules={"net", "head"})])
    with pytest.raises(ValueError, match="mode must be one of 'nf4'"):
        BitsandbytesPrecision("nf3")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
            BitsandbytesPrecision("int8-training")


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("torchao", lambda: Trainer(precision="float8", accelerator="cpu", devices=1)),
        ("bitsandbytes", lambda: BitsandbytesPrecision("nf4")),
        ("transformer_engine", lambda: Trainer(precision="transformer-engine", accelerator="cpu", devices=1)),
        ("transformer_engine", lambda: Trainer(precision="transformer-engine-float16", accelerator="cpu", devices=1)),
    ],
    ids=["float8", "bitsandbytes", "transformer-engine", "transformer-engine-float16"],
)
def test_a_package_that_is_missing_is_named(package, make, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}, which is not installed. Run `pip"):
        make()


def test_transformer_engine_wants_weights_of_16_bits():
    with pytest.raises(ValueError, match="weights_dtype must be"):
        TransformerEnginePrecision(weights_dtype=torch.float32)


class Scaled(Wide):
    """In one batch the gradient of the last part of the weights is not finite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            loss = loss + self.head.bias[-1] * torch.inf
        return loss


@cuts_on_cpu
@world_size(2, connect=False)
def test_a_loss_scale_on_shards_skips_a_step_on_all_ranks():
    from torch.amp import GradScaler

    from levin.precision import MixedPrecision

    module, reference = Scaled(), Scaled()
    precisions = [MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**10)) for _ in range(2)]
    settings = {"gradient_clip_val": 0.5, "max_epochs": 1}
    train(module, strategy=FSDPStrategy(precision=precisions[0]), devices=2, **settings)
    train(reference, plugins=[precisions[1]], **settings)
    scales = [precision.state_dict()["scale"] for precision in precisions]
    assert scales == [2.0**9, 2.0**9]
    whole = {name: parameter.full_tensor().detach() for name, parameter in module.named_parameters()}
    assert all(tensor.isfinite().all() for tensor in whole.values())
