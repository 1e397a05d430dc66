"""A module in the formats of other programs computes what it computed here."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import levin


class Net(levin.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))

    def forward(self, x):
        return self.net(x)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.seen = type(batch).__name__
        return batch


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def with_modes(model: Net) -> Net:
    model.net[1].eval()
    return model


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("given", ["argument", "attribute"])
def test_onnx_graph_is_that_of_eval_mode(tmp_path, dynamo, given):
    onnx = pytest.importorskip("onnx", reason="needs the package onnx")
    from onnx.reference import ReferenceEvaluator

    model, x = with_modes(Net()), torch.randn(2, 4)
    if given == "attribute":
        model.example_input_array = x
        model.to_onnx(tmp_path / "m.onnx", dynamo=dynamo)
    else:
        model.to_onnx(tmp_path / "m.onnx", x, dynamo=dynamo)
    assert model.seen == "Tensor"
    assert [child.training for child in model.net] == [True, False, True]
    graph = onnx.load(str(tmp_path / "m.onnx"))
    (output,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    model.eval()
    assert torch.allclose(torch.from_numpy(output), model(x), atol=1e-5)


def test_onnx_without_inputs_is_an_error_that_names_the_attribute():
    pytest.importorskip("onnx", reason="needs the package onnx")
    with pytest.raises(ValueError, match="example_input_array"):
        Net().to_onnx("m.onnx")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("levin.exports.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs `onnx`"):
        Net().to_onnx("m.onnx", torch.randn(2, 4))
    with pytest.raises(ModuleNotFoundError, match="torch_tensorrt"):
        Net().to_tensorrt("m.ep", torch.randn(2, 4))


@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript_computes_the_same(tmp_path, method):
    model, x = with_modes(Net()), torch.randn(2, 4)
    with pytest.warns(match="`to_torchscript` is deprecated, as TorchScript itself is. Use `torch.export.export`."):
        script = model.to_torchscript(
            tmp_path / "m.pt", method=method, **({"example_inputs": x} if method == "trace" else {})
        )
    assert [child.training for child in model.net] == [True, False, True]
    model.eval()
    expected = model(x)
    assert torch.equal(script(x), expected)
    assert torch.equal(torch.jit.load(str(tmp_path / "m.pt"))(x), expected)


def test_torchscript_by_another_method_is_an_error_with_the_value():
    with pytest.raises(ValueError, match="'compile'"):
        Net().to_torchscript(method="compile")
    with pytest.raises(ValueError, match="example_inputs"):
        Net().to_torchscript(method="trace")
