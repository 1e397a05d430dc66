"""Exports: a LightningModule in the formats of other programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch
from torch import Tensor, nn

from levin.utilities.exceptions import MisconfigurationException, value_error
from levin.utilities.modes import eval_mode, transfer_example
from levin.utilities.packages import require_package
from levin.utilities.rank_zero import rank_zero_deprecation

if TYPE_CHECKING:
    from levin.utilities.types import PathLike


class Exports:
    """The ``to_...`` methods of a LightningModule."""

    _is_scripting: bool

    def to_onnx(
        self, file_path: Union[PathLike, Any, None] = None, input_sample: Optional[Any] = None, **kwargs: Any
    ) -> Any:
        """Write the module as an ONNX graph, traced in eval mode. Needs ``onnx`` (and ``onnxscript``, see below).

        Args:
            file_path: Where to write it: a path or an open binary file. May be left out with ``dynamo=True``.
            input_sample: Inputs to trace with: a tensor, a tuple of positional inputs, or a dict of named ones;
                ``example_input_array`` by default. It goes through the batch-transfer hooks.
            kwargs: For :func:`torch.onnx.export`, such as ``dynamo=True``, which needs ``onnxscript``.

        Returns:
            What ``torch.onnx.export`` returns: a ``torch.onnx.ONNXProgram`` with ``dynamo=True``, else None.

        Raises:
            ModuleNotFoundError: A package is missing.
            ValueError: There are no inputs to trace with.

        Example:
            >>> model.to_onnx("model.onnx", torch.randn(1, 64), dynamo=True)  # doctest: +SKIP
        """
        module = self._as_module()
        uses_dynamo = kwargs.setdefault("dynamo", False)
        for package in ("onnx", "onnxscript") if uses_dynamo else ("onnx",):
            if find_spec(package) is None:
                raise ModuleNotFoundError(
                    f"`{type(self).__name__}.to_onnx()` needs `{package}`, which is not installed. "
                    f"Install it with: pip install {package}"
                )
        sample = self._example(input_sample, "to_onnx", "input_sample")
        args, named = (() if isinstance(sample, dict) else sample), (sample if isinstance(sample, dict) else None)
        if isinstance(args, list):
            args = tuple(args)
        with eval_mode(module), torch.no_grad():
            return torch.onnx.export(module, args, file_path, kwargs=named, **kwargs)

    def to_torchscript(
        self,
        file_path: Optional[PathLike] = None,
        method: Optional[str] = "script",
        example_inputs: Optional[Any] = None,
        **kwargs: Any,
    ) -> Any:
        """Return the module in TorchScript, compiled in eval mode. Deprecated by PyTorch: use ``torch.export``.

        Args:
            file_path: Where to write it too: a path or URL.
            method: ``"script"`` or ``"trace"``.
            example_inputs: Inputs to trace with; ``example_input_array`` by default.
            kwargs: For :func:`torch.jit.script` or :func:`torch.jit.trace`.

        Returns:
            A ``torch.jit.ScriptModule``.

        Raises:
            ValueError: Another method, or nothing to trace with.
        """
        rank_zero_deprecation("`to_torchscript` is deprecated, as TorchScript itself is. Use `torch.export.export`.")
        module = self._as_module()
        with eval_mode(module), torch.no_grad(), _scripting(module):
            if method == "script":
                script = torch.jit.script(module, **kwargs)
            elif method == "trace":
                inputs = self._example(example_inputs, "to_torchscript(method='trace')", "example_inputs")
                script = torch.jit.trace(func=module, example_inputs=inputs, **kwargs)
            else:
                raise value_error("method", method, "must be 'script' or 'trace'")
        if file_path is not None:
            import fsspec

            with fsspec.open(str(file_path), "wb") as file:
                torch.jit.save(script, file)
        return script

    def to_tensorrt(
        self,
        file_path: Optional[PathLike] = None,
        input_sample: Optional[Any] = None,
        ir: Literal["default", "dynamo", "ts"] = "default",
        output_format: Literal["exported_program", "torchscript"] = "exported_program",
        retrace: bool = False,
        default_device: Union[str, torch.device] = "cuda",
        **compile_kwargs: Any,
    ) -> Any:
        """Compile the module with TensorRT, in eval mode. Needs ``torch_tensorrt`` and a CUDA device.

        Args:
            file_path: Where to write it too.
            input_sample: Inputs to compile for; ``example_input_array`` by default.
            ir: How the graph is found: ``"default"`` or ``"dynamo"`` (``torch.export``), or ``"ts"`` (TorchScript).
            output_format: ``"exported_program"`` or ``"torchscript"``; ``ir="ts"`` can write ``"torchscript"`` only.
            retrace: Whether to export the compiled graph once more when it is written.
            default_device: Where a module goes that is not on a CUDA device.
            compile_kwargs: For ``torch_tensorrt.compile``.

        Returns:
            The compiled module.

        Raises:
            ModuleNotFoundError: ``torch_tensorrt`` is not installed.
            MisconfigurationException: The device is not a CUDA device, or the format does not go with ``ir``.
            ValueError: There are no inputs to compile for.
        """
        require_package("torch_tensorrt", f"`{type(self).__name__}.to_tensorrt()`")
        device = torch.device(default_device)
        if device.type != "cuda":
            raise MisconfigurationException(
                f"to_tensorrt needs a CUDA device, received default_device={default_device!r}."
            )
        if ir == "ts" and output_format != "torchscript" and file_path is not None:
            raise MisconfigurationException(
                f"to_tensorrt(ir='ts') can write output_format='torchscript' only, received {output_format!r}."
            )
        import torch_tensorrt  # used when present

        module = self._as_module()
        module.to(device)
        inputs = self._example(input_sample, "to_tensorrt", "input_sample")
        with eval_mode(module), torch.no_grad():
            compiled = torch_tensorrt.compile(module, ir=ir, inputs=_listed(inputs), **compile_kwargs)
            if file_path is not None:
                torch_tensorrt.save(
                    compiled, str(file_path), inputs=_listed(inputs), output_format=output_format, retrace=retrace
                )
        return compiled

    def _as_module(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self

    def _example(self, given: Any, method: str, argument: str) -> Any:
        """Return the inputs to trace with, on the module's device."""
        module: Any = self
        sample = module.example_input_array if given is None else given
        if sample is None:
            raise ValueError(
                f"`{method}` needs inputs, received none. Pass `{argument}`, or set `self.example_input_array`."
            )
        return transfer_example(module, sample)


@contextmanager
def _scripting(module: Any) -> Iterator[None]:
    """Let TorchScript look at every attribute of the module without an error."""
    children = [child for child in module.modules() if isinstance(child, Exports)]
    for child in children:
        child._is_scripting = True
    try:
        yield
    finally:
        for child in children:
            child._is_scripting = False


def _listed(inputs: Any) -> list[Any]:
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)
