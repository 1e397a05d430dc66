"""The strategies of ``lightning.fabric.strategies`` whose arguments are not those that a Trainer's have."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Module

from levin import strategies
from levin.strategies.parallel import DEFAULT_TIMEOUT


class FSDPStrategy(strategies.FSDPStrategy):
    """Cuts weights over all processes, and saves folders; see :class:`levin.strategies.FSDPStrategy`.

    Args:
        args: As there.
        kwargs: As there; ``state_dict_type`` is ``"sharded"`` by default, which saves folders.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"state_dict_type": "sharded", **kwargs})


class ModelParallelStrategy(strategies.ModelParallelStrategy):
    """Cuts layers over some processes and data over the others; see :class:`levin.strategies.ModelParallelStrategy`.

    Args:
        parallelize_fn: ``(module, device_mesh) -> module``; the dimensions are ``"data_parallel"`` and
            ``"tensor_parallel"``.
        data_parallel_size: Processes that see different data; ``"auto"`` for the number of machines.
        tensor_parallel_size: Processes that share each layer; ``"auto"`` for the processes of a machine.
        save_distributed_checkpoint: Whether every process writes its part into a folder.
        process_group_backend: torch.distributed's transport.
        timeout: How long a process waits for the others.

    Raises:
        TypeError: ``parallelize_fn`` returns no module.
    """

    def __init__(
        self,
        parallelize_fn: Callable[[Any, DeviceMesh], Module],
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self._parallelize_fn = parallelize_fn

    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        """Let the user's function cut the module; what it leaves whole is cut over the processes that share data."""
        assert self.device_mesh is not None
        parallel: Any = self._parallelize_fn(module, self.device_mesh)
        if not isinstance(parallel, Module):
            raise TypeError(f"parallelize_fn must return the module, received {parallel!r}. Write `return module`.")
        return super().wrap_module(parallel, for_training)
