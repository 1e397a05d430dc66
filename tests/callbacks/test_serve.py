"""ServableModuleValidator: a module served by a real server in another process."""

from __future__ import annotations

import importlib.util
import socket
import time

import pytest
import torch

import levin
from levin.callbacks import ServableModule, ServableModuleValidator, serve
from levin.callbacks.serve import Response
from levin.demos.boring_classes import BoringModel

needs_server = pytest.mark.skipif(
    not (importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn")),
    reason="needs fastapi and uvicorn",
)


class Served(BoringModel, ServableModule):
    def configure_payload(self):
        return {"body": {"x": [float(n) for n in range(32)]}}

    def configure_serialization(self):
        return {"x": torch.tensor}, {"y": torch.Tensor.tolist}

    def serve_step(self, x):
        assert not torch.is_grad_enabled() and not self.training
        return {"y": self.layer(x)}

    def configure_response(self):
        with torch.no_grad():
            return {"y": self.layer(torch.arange(32.0)).tolist()}


class Wrong(Served):
    def configure_response(self):
        return {"y": [1.0]}


class Fails(Served):
    def serve_step(self, x):
        raise ValueError("no")


def validate(model, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    validator = ServableModuleValidator(port=port, **options)
    trainer = levin.Trainer(
        fast_dev_run=True, callbacks=[validator], enable_progress_bar=False, enable_model_summary=False, logger=False,
        accelerator="cpu",
    )  # fmt: skip
    try:
        trainer.fit(model)
    finally:
        with socket.socket() as after:
            assert after.connect_ex(("127.0.0.1", port)) != 0  # the server is gone
    return validator


@needs_server
def test_a_module_that_can_be_served():
    model = Served()
    validator = validate(model)
    assert validator.successful and validator.resp.status_code == 200
    assert validator.state_dict() == {"successful": True, "optimization": None, "server": "fastapi"}
    assert model.training and model.trainer is not None


@needs_server
def test_what_is_wrong_ends_the_run():
    with pytest.raises(RuntimeError, match=r"expected \{'y': \[1.0\]\}"):
        validate(Wrong())
    with pytest.raises(RuntimeError, match="500"):
        validate(Fails())
    assert validate(Fails(), exit_on_failure=False).successful is False
    with pytest.raises(TypeError, match="ServableModule"):
        validate(BoringModel())


@needs_server
def test_a_port_in_use_is_told_at_once():
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        validator = ServableModuleValidator(port=used.getsockname()[1], timeout=60)
        trainer = levin.Trainer(
            fast_dev_run=True,
            callbacks=[validator],
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="ended at once: is the port in use"):
            trainer.fit(Served())
        assert time.monotonic() - start < 30


@needs_server
def test_a_server_that_says_nothing_is_waited_for_as_long_as_was_said(monkeypatch):
    monkeypatch.setattr(serve, "_serve", lambda *_: time.sleep(60))
    with pytest.raises(RuntimeError, match="did not answer in 1 s"):
        validate(Served(), timeout=1)


def test_what_is_not_there_is_said():
    with pytest.raises(NotImplementedError, match="onnx"):
        ServableModuleValidator(optimization="onnx")
    with pytest.raises(NotImplementedError, match="sagemaker"):
        ServableModuleValidator(server="sagemaker")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="levin\\[serve\\]"):
        ServableModuleValidator()
    with pytest.raises(TypeError, match="abstract"):
        ServableModule()
    assert Response(200, '{"a": 1}').json() == {"a": 1}
