"""A module that can be served, and a check that it can before it is trained for days."""

from __future__ import annotations

import copy
import json
import multiprocessing
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.packages import require_package
from levin.utilities.rank_zero import rank_zero_info, rank_zero_only
from levin.utilities.types import Function, Kwargs, StateDict

Functions = dict[str, Function]


class ServableModule(ABC, torch.nn.Module):
    """What a LightningModule gives in order to be served: a second base of it.

    Example:
        >>> class Net(levin.LightningModule, ServableModule):
        ...     def configure_payload(self):
        ...         return {"body": {"x": [0.0, 1.0]}}
        ...     def configure_serialization(self):
        ...         return {"x": torch.tensor}, {"y": torch.Tensor.tolist}
        ...     def serve_step(self, x):
        ...         return {"y": 2 * x}
        ...     def configure_response(self):
        ...         return {"y": [0.0, 2.0]}
    """

    @abstractmethod
    def configure_payload(self) -> Kwargs:
        """Return a request to try: ``{"body": {name: value}}``, of what JSON can hold."""

    @abstractmethod
    def configure_serialization(self) -> tuple[Functions, Functions]:
        """Return functions by name: from JSON to what ``serve_step`` takes, and from what it returns to JSON."""

    @abstractmethod
    def serve_step(self, *args: Any, **kwargs: Any) -> Kwargs:
        """Answer a request, whose values come by their names."""

    @abstractmethod
    def configure_response(self) -> Kwargs:
        """Return the answer that the request to try must get."""


class Response(NamedTuple):
    """What a server answered."""

    status_code: int
    text: str

    def json(self) -> Any:
        """Return the text as values."""
        return json.loads(self.text)


class ServableModuleValidator(Callback):
    """Serves the module in a process of its own when training starts, and compares its answer with the expected one.

    Needs ``fastapi`` and ``uvicorn``. Afterwards ``successful`` and ``resp`` say how it went.

    Args:
        optimization: None; nothing else is there.
        server: ``"fastapi"``.
        host: Where the server listens.
        port: Where the server listens.
        timeout: Seconds in which the server must be up.
        exit_on_failure: Whether a request that fails ends the run.

    Raises:
        NotImplementedError: Another ``optimization`` or ``server``.
        ModuleNotFoundError: ``fastapi`` or ``uvicorn`` is not installed.
    """

    def __init__(
        self,
        optimization: str | None = None,
        server: str = "fastapi",
        host: str = "127.0.0.1",
        port: int = 8080,
        timeout: int = 20,
        exit_on_failure: bool = True,
    ) -> None:
        if optimization is not None:
            raise NotImplementedError(f"optimization must be None, received {optimization!r}: no other is there.")
        if server != "fastapi":
            raise NotImplementedError(f"server must be 'fastapi', received {server!r}: no other is there.")
        for name in ("fastapi", "uvicorn"):
            require_package(name, "ServableModuleValidator", "Both are in levin[serve].")
        self.optimization: str | None = optimization
        self.server: str = server
        self.host: str = host
        self.port: int = port
        self.timeout: int = timeout
        self.exit_on_failure: bool = exit_on_failure
        self.resp: Response | None = None

    @property
    def successful(self) -> bool | None:
        """Whether the module was served; None before it was tried."""
        return None if self.resp is None else self.resp.status_code == 200

    @override
    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Serve a copy of the module, ask it, and compare.

        Raises:
            TypeError: The module is no ServableModule.
            RuntimeError: The server did not come up, or gave an error or another answer.
        """
        if trainer.world_size > 1:
            raise RuntimeError(
                f"ServableModuleValidator runs in one process, received {trainer.world_size}. Check the module with devices=1."
            )
        module: Any = pl_module
        if not isinstance(module, ServableModule):
            raise TypeError(
                f"The module must be a subclass of ServableModule, received {type(pl_module).__name__}. Make it a second base."
            )
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(_detached(module), self.host, self.port), daemon=True
        )
        process.start()
        try:
            self._wait(process)
            self.resp = _ask(f"{self._address}/serve", module.configure_payload())
        finally:
            process.terminate()
            process.join()
        if not self.successful:
            failure = f"The served module answered with an error: {self.resp.status_code} {self.resp.text}"
            if self.exit_on_failure:
                raise RuntimeError(failure)
            rank_zero_info(failure)
        elif self.resp.json() != (expected := module.configure_response()):
            raise RuntimeError(
                f"The served module answered {self.resp.json()}, expected {expected} (configure_response)."
            )
        else:
            rank_zero_info(f"The module {type(module).__name__} can be served.")

    @override
    def state_dict(self) -> StateDict:
        return {"successful": self.successful, "optimization": self.optimization, "server": self.server}

    @property
    def _address(self) -> str:
        return f"http://{self.host}:{self.port}"

    def _wait(self, process: BaseProcess) -> None:
        """Wait until the server answers."""
        end = time.monotonic() + self.timeout
        while time.monotonic() < end and process.is_alive():
            try:
                # Another program may hold the port and say nothing.
                if _ask(f"{self._address}/ping", timeout_s=1).status_code == 200:
                    return
            except OSError:
                time.sleep(0.1)
        why = f"did not answer in {self.timeout} s" if process.is_alive() else "ended at once: is the port in use?"
        raise RuntimeError(f"The server at {self._address} {why}")


def _detached(module: Any) -> Any:
    """Return a copy of the module without its Trainer, on the CPU, for the other process."""
    trainer, module.trainer = module._trainer, None
    try:
        return copy.deepcopy(module).cpu().eval()
    finally:
        module.trainer = trainer


def _ask(url: str, body: object = None, timeout_s: float = 60) -> Response:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return Response(response.status, response.read().decode())
    except urllib.error.HTTPError as error:
        return Response(error.code, error.read().decode())


def _serve(module: object, host: str, port: int) -> None:
    """Serve the module until the process ends."""
    import uvicorn

    uvicorn.run(make_app(module), host=host, port=port, log_level="error")


def make_app(module: Any) -> Any:
    """Return a FastAPI application that answers ``GET /ping`` and ``POST /serve``.

    Args:
        module: A :class:`ServableModule`.
    """
    from fastapi import Body, FastAPI, HTTPException

    app = FastAPI()
    from_json, to_json = module.configure_serialization()

    def serve(payload: Kwargs) -> Kwargs:
        if not isinstance(payload.get("body"), dict):
            raise HTTPException(422, f"The request must be {{'body': {{name: value}}}}, received keys {list(payload)}.")
        body = {name: from_json.get(name, _same)(value) for name, value in payload["body"].items()}
        with torch.no_grad():
            output = module.serve_step(**body)
        if not isinstance(output, dict):
            raise HTTPException(500, f"serve_step must return a dict, received {type(output).__name__}.")
        return {name: to_json.get(name, _same)(value) for name, value in output.items()}

    serve.__annotations__ = {"payload": dict, "return": dict}
    serve.__defaults__ = (Body(),)
    app.get("/ping")(lambda: True)
    app.post("/serve")(serve)
    return app


def _same(value: object) -> Any:
    return value
