"""What strategies have in common that cut modules over processes by torch's ``fully_shard`` and DTensors."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from levin.checkpoint.io import CheckpointIO
from levin.checkpoint.layout import is_sharded
from levin.checkpoint.sharded import ShardedCheckpointIO, load_folder
from levin.strategies import collectives, state_of
from levin.strategies.contexts import in_forward_context, run_as_forward
from levin.strategies.gathered import (
    as_step,
    let_go,
    let_go_outside_of_steps,
    load_window_gradients,
    window_gradients,
)
from levin.strategies.parallel import ParallelStrategy
from levin.utilities.exceptions import MisconfigurationException, add_hint
from levin.utilities.types import Function, StateDict


class ShardedStrategy(ParallelStrategy, ABC):
    """Weights, gradients and optimizer states are DTensors: every process keeps its part.

    Subclasses lay out the processes (:meth:`make_mesh`) and cut the module (:meth:`wrap_module`).
    """

    restore_checkpoint_after_setup = True
    # What is gathered under inference mode for a validation could not be used for training after it.
    supports_inference_mode = False

    saves_folders: bool
    """Whether every process writes its part into a folder; otherwise rank 0 writes one file."""

    device_mesh: DeviceMesh | None = None
    """How the processes are laid out; None until they are connected."""

    # Take away what looks after optimizers.
    _watched: Sequence[RemovableHandle] = ()

    def _configure_launcher(self) -> None:
        """Start the script again for each process."""
        self.launch_by("popen")
        self.check_mesh(self.num_nodes * self.num_processes)

    @property
    def process_group_backend(self) -> str:
        """torch.distributed's transport: on CUDA also one for weights that wait on the CPU, or stay there."""
        if self._process_group_backend is None and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"
        return super().process_group_backend

    def check_mesh(self, world_size: int) -> None:
        """Raise before a process starts when the layout does not fit the number of processes."""

    def make_mesh(self) -> DeviceMesh:
        """Return the layout of the processes, which are connected."""
        raise NotImplementedError

    def default_checkpoint_io(self) -> CheckpointIO:
        """Return what writes folders, or one file."""
        return ShardedCheckpointIO() if self.saves_folders else super().default_checkpoint_io()

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.saves_folders and not self.checkpoint_io.is_collective:
            raise MisconfigurationException(
                f"{type(self.checkpoint_io).__name__} writes checkpoints of one process, and {type(self).__name__} is to "
                "save folders that all processes write. Leave one of the two out."
            )
        if self.device_mesh is None:
            self.device_mesh = self.make_mesh()
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = self.device_mesh
        inner = getattr(self.checkpoint_io, "checkpoint_io", self.checkpoint_io)
        if isinstance(inner, ShardedCheckpointIO):
            inner.connect()

    def on_exception(self, exception: BaseException) -> None:
        """Say what to do where whole weights and parts of others met."""
        super().on_exception(exception)
        add_hint(
            exception,
            "got mixed torch.Tensor and DTensor",
            "In a step this process has whole weights of the blocks that run, and of no block until a backward pass; of all others "
            "it has its part (a DTensor). For a penalty on all weights use the optimizer's weight_decay, put a weight that is "
            "used after a backward pass into a submodule, or take `parameter.full_tensor()` of parts on all processes.",
        )
        for twice in ("should only be called once on a module", "has already been applied"):
            add_hint(
                exception,
                twice,
                "`configure_model` runs in every call (fit, validate, test, predict), and these layers are cut already. "
                "Return from it then, for example `if isinstance(self.layer.weight, DTensor): return`.",
            )

    def on_validation_end(self) -> None:
        """Let go of what is kept after a forward for its backward: what hooks find between epochs are the weights that learn."""
        for whole in self.wholes():
            let_go(whole)

    def wholes(self) -> Sequence[Module]:
        """Return the modules that hold what the Trainer's module consists of in this process."""
        return [] if self.lightning_module is None else [self.lightning_module]

    def let_go_in_hooks(self, module: Module) -> None:
        """Have forwards outside of steps keep nothing, once the Trainer's module is cut; others have no steps."""
        if module is self.lightning_module:
            let_go_outside_of_steps(module, self.wholes())

    def teardown(self) -> None:
        """Let go of what a forward that failed had gathered, and free the device."""
        for whole in self.wholes():
            let_go(whole)
        for handle in self._watched:
            handle.remove()
        self._watched = ()
        super().teardown()

    @override
    def num_collectives(self) -> int:
        # Weights are gathered within a dimension of the layout, which may be a part of those that see different data.
        groups = [] if self.device_mesh is None else self.device_mesh.get_all_groups()
        return super().num_collectives() + sum(map(collectives.num_collectives, groups))

    @override
    def setup_optimizer(self, optimizer: Optimizer, module: Module | None = None) -> Optimizer:
        """Return the optimizer, which will not step parameters that are made later.

        Raises:
            MisconfigurationException: It puts parameters together that are not cut in the same way.
        """
        for group in optimizer.param_groups:
            meshes = {getattr(parameter, "device_mesh", None) for parameter in group["params"]}
            together = [name for name in ("foreach", "fused") if group.get(name)]
            if together and len(meshes) > 1:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__}({together[0]}=True) steps all parameters at once, and under {type(self).__name__} some are "
                    f"cut over other processes than the rest, or not at all. Leave {together[0]} out."
                )
            if isinstance(optimizer, LBFGS) and meshes != {None}:
                raise MisconfigurationException(
                    f"LBFGS makes one vector of all parameters, and under {type(self).__name__} each process has a part of them. Use "
                    "another optimizer, or strategy='ddp'."
                )
        owner = self.model if module is None else module
        if owner is not None and any(isinstance(part, FSDPModule) for part in owner.modules()):
            self._watched = (*self._watched, _refuse_new_parameters(optimizer, owner, type(self).__name__))
        return super().setup_optimizer(optimizer, module)

    # The step

    def compose_step(self, module: Module, name: str) -> Function:
        """Return the method, for the time of which the weights that belong to no block are gathered."""
        step = getattr(module, name)
        if name != "forward":
            step = as_step(module, run_as_forward(module, module, step) if isinstance(module, FSDPModule) else step)
        return in_forward_context(step, self.precision, name)

    @override
    def no_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[object]:
        return _without_reduction(module) if enabled else nullcontext()

    # State

    def module_state(self, module: Module) -> StateDict:
        """Return the weights, with DTensors where they are cut; one file holds them whole."""
        return state_of.module_state(module)

    def load_module_state(self, module: Module, state: Any, strict: bool = True) -> None:
        """Load weights that are whole, or in a folder; each process takes its part."""
        state_of.load_module_state(module, state, strict, self.names_elsewhere())

    def names_elsewhere(self) -> Collection[str]:
        """Return the names of weights that other processes have, of which this one has no part."""
        return ()

    def optimizer_state(self, optimizer: Optimizer, module: Module | None = None) -> StateDict:
        """Return the state of an optimizer, with DTensors where its parameters are cut."""
        owner = self.model if module is None else module
        return state_of.optimizer_state(owner, optimizer, is_numbered=not self.saves_folders)

    def load_optimizer_state(self, optimizer: Optimizer, state: Any, module: Module | None = None) -> None:
        """Load the state of an optimizer that is whole, or in a folder; each process takes its part."""
        state_of.load_optimizer_state(self.model if module is None else module, optimizer, state)

    @override
    def window_gradients(self, module: Module) -> list[Tensor | None]:
        return window_gradients(module)

    def load_window_gradients(self, module: Module, gradients: list[Tensor | None]) -> None:
        """Take up :meth:`window_gradients`."""
        load_window_gradients(module, gradients)

    # Files

    def load_checkpoint(self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None) -> StateDict:
        """Return a checkpoint: a file whole; a folder with the places that each process reads its parts from."""
        if is_sharded(checkpoint_path):
            self.checkpoint_io.wait()
            return load_folder(checkpoint_path, weights_only)
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)


def _refuse_new_parameters(optimizer: Optimizer, module: Module, strategy: str) -> RemovableHandle:
    """Look at each step whether the optimizer got parameters that were made after the module was cut."""
    known = set(module.parameters())
    num_stepped = 0

    def check(optimizer: Optimizer, args: object, kwargs: object) -> None:
        nonlocal num_stepped
        num = sum(len(group["params"]) for group in optimizer.param_groups)
        if num == num_stepped:
            return
        num_stepped = num
        stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        new = [parameter for parameter in stepped if not isinstance(parameter, DTensor) and parameter not in known]
        if new:
            raise MisconfigurationException(
                f"The optimizer got {len(new)} parameters that were made after the module was set up, the first of shape "
                f"{tuple(new[0].shape)}: under {strategy} they are neither cut nor averaged over processes. Make their layers "
                "before, frozen until they are to learn."
            )

    return optimizer.register_step_pre_hook(check)


@contextmanager
def _without_reduction(module: Module) -> Iterator[None]:
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)
