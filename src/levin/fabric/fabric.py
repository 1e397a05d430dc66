"""Fabric: devices, precision, several processes and safe checkpoints for a loop of one's own."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from levin.accelerators import Accelerator
from levin.checkpoint.folder import consolidate
from levin.checkpoint.layout import is_sharded
from levin.data.loaders import prepare_dataloader, shuffles
from levin.engine import Plugins
from levin.fabric.processes import Processes
from levin.fabric.state import Filter, check_filter, check_state, collect, restore, restore_one
from levin.fabric.trainer_shim import TrainerShim
from levin.fabric.wrappers import (
    BACKWARD_PASSES,
    BackwardGuard,
    FabricDataLoader,
    FabricModule,
    FabricOptimizer,
    check_new,
    follow_parameters,
    set_up_module,
    split_compiled,
    unwrap,
)
from levin.module import LightningModule
from levin.ranks.hang_watchdog import RunLocation
from levin.ranks.weighted import divide_by_weight
from levin.strategies import Strategy
from levin.utilities.collections import as_list
from levin.utilities.exceptions import require_instance
from levin.utilities.move import move_data_to_device
from levin.utilities.numbers import to_numbers
from levin.utilities.packages import made_by_packages
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_deprecation, rank_zero_warn
from levin.utilities.seed import seed_everything
from levin.utilities.types import PathLike

ENTRY_POINTS = ("lightning.fabric.callbacks_factory", "lightning_fabric.callbacks_factory")
"""Groups under which installed packages register callbacks, those of Lightning and of the package of its Fabric alone."""


class Fabric(Processes):
    """The engine of the Trainer under a loop of one's own: five changed lines in a loop of plain PyTorch.

    A subclass may define ``run``: calling it launches the processes first.

    Args:
        accelerator: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``, ``"tpu"``, ``"auto"``, or an Accelerator.
        strategy: ``"auto"``, a registered name such as ``"ddp"``, or a Strategy.
        devices: How many, or which; -1 for all.
        num_nodes: Number of machines.
        precision: For example ``"bf16-mixed"``; ``"32-true"`` when None.
        plugins: One or a list of: Precision, CheckpointIO, ClusterEnvironment.
        callbacks: Any objects, one or a list; :meth:`call` runs their methods.
        loggers: One or a list; :meth:`log` writes to all of them.

    Raises:
        ValueError: A value is unknown, or two of them contradict each other, in the code or on the command line.
        RuntimeError: The hardware is not there.
        TypeError: A plugin is of no known kind.

    Example:
        >>> fabric = Fabric(accelerator="cpu", devices=1)
        >>> model = nn.Linear(2, 1)
        >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> fabric.backward(model(torch.ones(4, 2)).mean())
        >>> optimizer.step()
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        plugins: Plugins = None,
        callbacks: object = None,
        loggers: object = None,
    ) -> None:
        # The watchdog asks for their places as soon as the processes are connected.
        self._loaders: list[weakref.ref[FabricDataLoader]] = []
        super().__init__(
            dict(accelerator=accelerator, strategy=strategy, devices=devices, num_nodes=num_nodes, precision=precision),
            plugins,
        )
        self._modules: list[weakref.ref[nn.Module]] = []
        self._loggers: list[Any] = as_list(loggers)
        for each in self._loggers:
            require_instance("loggers", each)
        self._callbacks: list[Any] = as_list(callbacks)
        self._callbacks.extend(made_by_packages(*ENTRY_POINTS))
        self._guard = BackwardGuard(self._strategy)

    loggers: list[Any] = reads("_loggers", "All loggers.")

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            IndexError: There is none.
        """
        return self._loggers[0]

    # Modules, optimizers, loaders

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Prepare a module and the optimizers of its parameters.

        Args:
            module: A module, compiled or not, or a LightningModule.
            optimizers: Its optimizers.
            scheduler: A scheduler, for engines that step it themselves; handed back.
            move_to_device: Whether to move the module; otherwise you have placed it.

        Returns:
            The module; with optimizers or a scheduler, a tuple of all in the order of the arguments.

        Raises:
            TypeError: One of them is of another kind.
            ValueError: One of them was set up before.
            RuntimeError: There are several devices and :meth:`launch` was not called.
        """
        self._check_launched()
        check_new(nn.Module, module)
        check_new(Optimizer, *optimizers)
        original, compiler = split_compiled(module) if _reapply_compile else (module, None)
        names = {parameter: name for name, parameter in original.named_parameters()}
        set_up = self._strategy.setup_module(original, move_to_device=move_to_device)
        follow_parameters(optimizers, names, self._strategy.unwrap(set_up))
        self._modules.append(weakref.ref(set_up))
        wrapped = FabricModule(set_up, self._strategy, self._guard, compiler)
        steppers = [self._setup_optimizer(optimizer, set_up) for optimizer in optimizers]
        if isinstance(original, LightningModule):
            original.fabric = self
            original._fabric_optimizers = steppers
            if original not in self._callbacks:
                self._callbacks.append(original)
        self.call("on_after_setup", fabric=self, module=wrapped)
        rest = [*steppers, *([] if scheduler is None else [scheduler])]
        return (wrapped, *rest) if optimizers else wrapped

    def setup_module(self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True) -> Any:
        """Prepare a module whose optimizers are set up later, or never; see :meth:`setup`."""
        return self.setup(module, move_to_device=move_to_device, _reapply_compile=_reapply_compile)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Prepare optimizers, after their modules.

        Returns:
            One, or a tuple of them.

        Raises:
            TypeError: One is no optimizer.
            ValueError: There is none, or one was set up before.
        """
        self._check_launched()
        if not optimizers:
            raise ValueError("setup_optimizers needs at least one optimizer, received none.")
        check_new(Optimizer, *optimizers)
        steppers = tuple(self._setup_optimizer(optimizer, self._module_of(optimizer)) for optimizer in optimizers)
        return steppers if len(steppers) > 1 else steppers[0]

    def _module_of(self, optimizer: Optimizer) -> nn.Module | None:
        """Return the module that holds the optimizer's first parameter; None where it was not set up here."""
        first = next((parameter for group in optimizer.param_groups for parameter in group["params"]), None)
        modules = (reference() for reference in self._modules)
        found = (module for module in modules if module and any(first is own for own in module.parameters()))
        return next(found, None)

    def _setup_optimizer(self, optimizer: Optimizer, module: nn.Module | None) -> FabricOptimizer:
        has_hook = any(hasattr(callback, "on_after_optimizer_step") for callback in self._callbacks)
        on_step = self._call_after_step if has_hook else None
        return FabricOptimizer(self._strategy.setup_optimizer(optimizer, module), self._strategy, module, on_step)

    def _call_after_step(self, strategy: Strategy, optimizer: Optimizer) -> None:
        self.call("on_after_optimizer_step", strategy=strategy, optimizer=optimizer)

    def setup_dataloaders(
        self, *dataloaders: object, use_distributed_sampler: bool = True, move_to_device: bool = True
    ) -> Any:
        """Prepare loaders: each process sees its part of the data, on its device.

        What this returns can be an entry of :meth:`save`: loaded again, it goes on with the very next batch.

        Args:
            dataloaders: Of torch.
            use_distributed_sampler: Whether to split the data between the processes.
            move_to_device: Whether to move the batches.

        Returns:
            One loader, or a list of them.

        Raises:
            ValueError: There is none, or one was set up before.
            TypeError: One is no DataLoader.
        """
        self._check_launched()
        if not dataloaders:
            raise ValueError("setup_dataloaders needs at least one loader, received none.")
        check_new(DataLoader, *dataloaders)
        kwargs = self._strategy.distributed_sampler_kwargs if use_distributed_sampler else None
        loaders = []
        for loader in dataloaders:
            own = prepare_dataloader(loader, stage="train", sampler_kwargs=kwargs, shuffle=shuffles(loader))
            loaders.append(FabricDataLoader(own, self.device if move_to_device else None))
        self._loaders = [known for known in self._loaders if known() is not None] + [
            weakref.ref(own) for own in loaders
        ]
        return loaders if len(loaders) > 1 else loaders[0]

    def _locate(self) -> RunLocation:
        places = [loader.place for known in self._loaders if (loader := known()) is not None]
        text = "; ".join(f"batch {batch} of epoch {epoch}" for epoch, batch in places if batch)
        return RunLocation(sum(max(0, batch - 1) + epoch for epoch, batch in places), text or "before the first batch")

    # The step

    def backward(self, tensor: Tensor, *args: object, model: nn.Module | None = None, **kwargs: object) -> None:
        """Run ``tensor.backward(*args, **kwargs)`` as precision and strategy want it.

        Args:
            tensor: The loss.
            args: Passed on.
            model: The module it is of, for engines that need it where there are several.
            kwargs: Passed on.
        """
        BACKWARD_PASSES.append(None)
        try:
            if self._guard.is_plain:
                tensor.backward(*args, **kwargs)
            else:
                module = None if model is None else unwrap(model)
                self._strategy.backward(tensor, None, *args, module=module, **kwargs)
        finally:
            BACKWARD_PASSES.pop()

    def average_gradients(self, optimizer: Optimizer, weight: Any) -> None:
        """Divide the gradients of sums by the number of samples (or tokens) that all processes have summed over.

        For batches of unequal size, in an accumulation window or over processes: call :meth:`backward` with sums, and
        this once before the step, in all processes. It comes to the average over all samples, as if they were one batch.

        Args:
            optimizer: Its parameters have the gradients.
            weight: How many this process has summed over since the last step, all together.

        Raises:
            ValueError: There is none.

        Example:
            >>> fabric = Fabric(accelerator="cpu", devices=1)
            >>> model = nn.Linear(1, 1)
            >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> for batch in (torch.ones(3, 1), torch.ones(1, 1)):
            ...     fabric.backward(model(batch).sum())
            >>> fabric.average_gradients(optimizer, weight=4)
            >>> model.weight.grad
            tensor([[1.]])
        """
        if not self._strategy.is_distributed and not weight > 0:
            raise ValueError(f"weight must be the number of samples of this window, received {weight!r}.")
        divide_by_weight(unwrap(optimizer), weight, self._strategy)

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters, without their loss scale.

        Args:
            module: The module.
            optimizer: The optimizer.
            clip_val: Largest absolute value. Give this or ``max_norm``.
            max_norm: Largest norm over all parameters.
            norm_type: p of the p-norm.
            error_if_nonfinite: Whether a norm that is nan or infinite is an error.

        Returns:
            The norm before clipping; None with ``clip_val``.

        Raises:
            ValueError: None, or both, of ``clip_val`` and ``max_norm`` are given.
            RuntimeError: The norm is not finite.
        """
        plain = unwrap(optimizer)
        if (clip_val is None) != (max_norm is None):
            self._strategy.precision.unscale_gradients(plain)
        return self._strategy.clip_gradients(
            set_up_module(module), plain, clip_val, max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context in which operations run in the precision; a module that was set up does so by itself."""
        return self._strategy.precision.forward_context()

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[object]:
        """Return a context in which gradients stay in this process, for all but the last batch of an accumulation.

        Args:
            module: As :meth:`setup` returned it.
            enabled: Whether to; False gives a context that does nothing.

        Raises:
            TypeError: The module was not set up.
        """
        if not isinstance(split_compiled(module)[0], FabricModule):
            raise TypeError(
                f"no_backward_sync needs a module that was set up, received {type(module).__name__}. "
                "Use the one that fabric.setup(...) returned."
            )
        if enabled and self._strategy.is_distributed and type(self._strategy).no_sync is Strategy.no_sync:
            rank_zero_warn(f"{type(self._strategy).__name__} exchanges gradients in every backward pass.")
        return self._strategy.no_sync(set_up_module(module), enabled)

    def to_device(self, obj: object) -> Any:
        """Return ``obj`` on the device of this process: a module moved in place, tensors and collections copied."""
        if not isinstance(obj, nn.Module):
            return move_data_to_device(obj, self.device)
        self._strategy.module_to_device(obj)
        return obj

    def init_tensor(self) -> AbstractContextManager[object]:
        """Return a context in which new tensors are on the device and in the precision."""
        return self._strategy.tensor_init_context()

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[object]:
        """Return a context in which new modules are on the device and in the precision.

        Args:
            empty_init: Whether weights stay uninitialized, because they are loaded afterwards.
        """
        self._check_launched()
        return self._strategy.module_init_context(empty_init=empty_init)

    def sharded_model(self) -> AbstractContextManager[object]:
        """Return a context that does nothing: modules are cut by :meth:`setup`, wherever they were made."""
        rank_zero_deprecation("`Fabric.sharded_model()` is deprecated. Use `Fabric.init_module()`.")
        return nullcontext()

    # Files

    def save(self, path: PathLike, state: Mapping[str, object], filter: Filter | None = None) -> None:
        """Save modules, optimizers, loaders, anything with a ``state_dict``, and plain values. All processes call this.

        The file is whole or not there, and an older one is replaced only by a whole one.

        Args:
            path: A path or URL.
            state: Name -> object.
            filter: Name -> function ``(entry, value) -> bool`` that says which entries of a state are kept.

        Raises:
            TypeError: ``state`` or ``filter`` is of another kind, or ``state`` has a module, an optimizer or a loader
                elsewhere than under a name of its own.
            ValueError: ``filter`` has a name that ``state`` has not.
        """
        self._check_launched()
        check_state(state)
        check_filter(state, filter)
        self._strategy.meet("fabric.save")
        self._strategy.save_checkpoint(collect(state, self._strategy, filter), path)
        self.barrier()

    def load(
        self,
        path: PathLike,
        state: dict[str, object] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load what :meth:`save` wrote into the objects of ``state``. All processes call this.

        Args:
            path: A path or URL.
            state: Name -> object; plain values are replaced in this dict. None loads nothing into anything.
            strict: Whether every name must be in the file, and the names of weights the same.
            weights_only: False allows the file to run code while it is read. Only for files you trust.

        Returns:
            What the file holds beside it; all of it without ``state``.

        Raises:
            TypeError: ``state`` is no dict.
            KeyError: A name of ``state`` is not in the file.
            ValueError: A loader is to go on from what is not the place of one.
        """
        self._check_launched()
        check_state({} if state is None else state)
        if not state and is_sharded(path):
            return consolidate(path)
        checkpoint = self._strategy.load_checkpoint(path, weights_only=weights_only)
        self.barrier()
        return restore(checkpoint, state, self._strategy, strict, weights_only) if state else checkpoint

    def load_raw(
        self,
        path: PathLike,
        obj: nn.Module | Optimizer,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> None:
        """Load a file that holds nothing but the state of one module or optimizer.

        Args:
            path: A path or URL.
            obj: The module or optimizer.
            strict: Whether the names of weights must be the same.
            weights_only: False allows the file to run code while it is read. Only for files you trust.

        Raises:
            TypeError: ``obj`` has no state.
        """
        checkpoint = self._strategy.load_checkpoint(path, weights_only=weights_only)
        if not restore_one(checkpoint, obj, self._strategy, strict, weights_only):
            raise TypeError(f"load_raw takes a module or an optimizer, received {obj!r}. Use load for plain values.")

    # Callbacks and loggers

    def call(self, hook_name: str, *args: object, **kwargs: object) -> None:
        """Run the method of that name of every callback that has it.

        Args:
            hook_name: The method.
            args: Passed to it.
            kwargs: Those that it takes are passed to it.
        """
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if not callable(method):
                rank_zero_warn(f"`{type(callback).__name__}.{hook_name}` is no method and is left out.")
                continue
            parameters = inspect.signature(method).parameters
            takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
            method(*args, **{name: value for name, value in kwargs.items() if takes_all or name in parameters})

    def log(self, name: str, value: object, step: int | None = None) -> None:
        """Give a number, or a tensor with one element, to every logger."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Give several values to every logger; see :meth:`log`."""
        if self._loggers:
            numbers = to_numbers(metrics)
            for logger in self._loggers:
                logger.log_metrics(metrics=numbers, step=step)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed python, numpy and torch, and the workers of loaders; see :func:`levin.seed_everything`."""
        return seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)

    def trainer_shim(self, module: object) -> TrainerShim:
        """Return what ``self.trainer`` is in a LightningModule that was set up here."""
        return TrainerShim(self, module)
