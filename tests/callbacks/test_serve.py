"""ServableModuleValidator: a module served by a real server in another process."""

from __future__ import annotations

import importlib.util
import re
import socket
import time
from types import SimpleNamespace

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
        return {"body": {"x": [float(n) for n in range(32)], "n": 2}}

    def configure_serialization(self):
        return {"x": torch.tensor}, {"y": torch.Tensor.tolist}

    def serve_step(self, x, n=5):
        assert not torch.is_grad_enabled() and not self.training
        return {"y": self.layer(x), "n": n + 1}

    def configure_response(self):
        with torch.no_grad():
            return {"y": self.layer(torch.arange(32.0)).tolist(), "n": 3}


class Wrong(Served):
    def configure_response(self):
        return {"y": [1.0]}


class Fails(Served):
    def serve_step(self, x, n):
        return [x]


class NoBody(Served):
    def configure_payload(self):
        return {"x": 1}


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
def test_a_module_that_can_be_served(caplog):
    model = Served()
    with caplog.at_level("INFO", "levin"):
        validator = validate(model)
    assert "The module Served can be served." in caplog.messages
    assert validator.successful and validator.resp.status_code == 200
    assert validator.state_dict() == {"successful": True, "optimization": None, "server": "fastapi"}
    assert model.training and model.trainer is not None


@needs_server
def test_what_is_wrong_ends_the_run(caplog):
    with pytest.raises(RuntimeError, match=r"expected \{'y': \[1.0\]\}"):
        validate(Wrong())
    failure = 'The served module answered with an error: 500 {"detail":"serve_step must return a dict, received list."}'
    with pytest.raises(RuntimeError, match=re.escape(failure)):
        validate(Fails())
    with caplog.at_level("INFO", "levin"):
        assert validate(Fails(), exit_on_failure=False).successful is False
    assert failure in caplog.messages
    with pytest.raises(RuntimeError, match="with an error: 422 .*received keys ..x.."):
        validate(NoBody())
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


@needs_server
def test_it_runs_in_one_process():
    with pytest.raises(RuntimeError, match="runs in one process, received 2. Check the module with devices=1"):
        ServableModuleValidator().on_train_start(SimpleNamespace(world_size=2), Served())


@needs_server
def test_before_it_is_tried_nothing_is_known():
    assert ServableModuleValidator().state_dict() == {"successful": None, "optimization": None, "server": "fastapi"}


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
