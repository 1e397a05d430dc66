"""What Fabric hands out in place of the user's modules, optimizers and loaders: each looks like the original."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from levin.data.loaders import set_epoch
from levin.precision.precision import Precision
from levin.resume.position import Position
from levin.strategies.contexts import in_forward_context
from levin.strategies.strategy import Strategy
from levin.utilities.collections import apply_to_collection
from levin.utilities.move import move_data_to_device
from levin.utilities.properties import reads
from levin.utilities.torch_optimizer import update_of, zero_grad_of
from levin.utilities.types import Batch, Closure, Function, StateDict

CHECKPOINTED = "_checkpoint_wrapped_module."
"""In the names of parameters whose module computes its activations again in backward."""
CALLS: dict[type, str] = {
    nn.Module: "Write fabric.setup(model, optimizer).",
    Optimizer: "Write fabric.setup(model, *optimizers), and scheduler=scheduler for a scheduler.",
    DataLoader: "Write fabric.setup_dataloaders(DataLoader(dataset), ...).",
}
"""What to write for objects of a kind."""
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


BACKWARD_PASSES: list[None] = []
"""An entry for each that is under way in this process, in whatever thread: one may go through modules of several Fabrics."""


class BackwardGuard:
    """Refuses ``loss.backward()`` where precision or strategy take part in the backward pass.

    Args:
        strategy: Of the Fabric.
    """

    def __init__(self, strategy: Strategy) -> None:
        names = ("pre_backward", "backward", "post_backward")
        kind = type(strategy.precision)
        is_precisions = any(getattr(kind, name) is not getattr(Precision, name) for name in names)
        self.is_needed: bool = is_precisions or type(strategy).backward is not Strategy.backward
        # What remains of the backward pass where nobody takes part in it.
        self.is_plain: bool = not self.is_needed and not any(
            map(strategy.is_overridden, ("pre_backward", "post_backward"))
        )

    def watch(self, output: Any) -> None:
        """Let the tensors of ``output`` refuse gradients that do not come from ``fabric.backward``."""

        def watch(tensor: Tensor) -> Tensor:
            if tensor.requires_grad:
                tensor.register_hook(self._check)
            return tensor

        apply_to_collection(output, Tensor, watch)

    def _check(self, gradient: Tensor) -> None:
        if not BACKWARD_PASSES:
            raise RuntimeError(
                "This precision or strategy takes part in the backward pass, received loss.backward(). "
                "Call fabric.backward(loss) instead of loss.backward()."
            )


class FabricModule(nn.Module):
    """A module that runs as precision and strategy want it. Attributes that it lacks are those of the original.

    Args:
        module: As the strategy set it up.
        strategy: The strategy.
        guard: Shared by all modules of one Fabric.
        compiler: Compiles a module anew as the user had compiled it; None where that was not so.
    """

    def __init__(
        self,
        module: nn.Module,
        strategy: Strategy,
        guard: BackwardGuard,
        compiler: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        compiled = module if compiler is None else compiler(module)
        self._forward_module = compiled
        # Modules that are set as attributes become children; these are there already.
        vars(self).update(
            _original_module=strategy.unwrap(module),
            _set_up=module,
            _strategy=strategy,
            _guard=guard,
            _compiler=compiler,
            _forward_methods=set(),
        )
        # Inputs and outputs are converted as the precision says; where it does not, this is the module itself.
        vars(self)["_run"] = self._compose(in_forward_context(compiled, strategy.precision, "forward"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; what torch looks up around a call it looks up around that of the original."""
        has_hooks = (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or self._compiled_call_impl
        )
        if has_hooks or type(self).forward is not FabricModule.forward:
            return super().__call__(*args, **kwargs)
        return self._run(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as precision and strategy want it; a subclass may put something around it."""
        return self._run(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """The original module."""
        original: nn.Module = vars(self)["_original_module"]
        return original

    def mark_forward_method(self, method: Function | str) -> None:
        """Let a method of the original run through the strategy, as ``forward`` does.

        Args:
            method: The method or its name.

        Raises:
            ValueError: It is ``forward``.
            TypeError: It is neither a method nor a name.
            AttributeError: There is no such method.
        """
        if not isinstance(method, str) and not callable(method):
            raise TypeError(f"method must be a method or its name, received {method!r}.")
        name = method if isinstance(method, str) else method.__name__
        if name == "forward":
            raise ValueError("The forward method cannot be marked: calling the module runs it already.")
        if not inspect.ismethod(getattr(self._original_module, name, None)):
            raise AttributeError(f"{type(self._original_module).__name__} has no method {name!r} to mark.")
        self._forward_methods.add(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original's state: no name tells of the wrappers."""
        return self._original_module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the original's state."""
        return self._original_module.load_state_dict(*args, **kwargs)

    def _compose(self, run: Function) -> Function:
        """Return ``run`` with what stands around it; ``run`` itself where nothing does."""
        precision, guard = self._strategy.precision, self._guard
        kind = type(precision)
        converts = kind.convert_input is not Precision.convert_input or (
            kind.convert_output is not Precision.convert_output
        )
        if not converts and not guard.is_needed:
            return run

        def run_converted(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = precision.convert_input(args), precision.convert_input(kwargs)
            output = precision.convert_output(run(*args, **kwargs))
            if guard.is_needed:
                guard.watch(output)
            return output

        return run_converted

    def _refusing(self, method: Function, name: str) -> Function:
        """Return the method such that it may not run submodules: the strategy would not hear of it."""
        original = self._original_module

        def refuse(module: nn.Module, inputs: Any) -> NoReturn:
            raise RuntimeError(
                f"{type(original).__name__}.{name}() runs the module past the strategy "
                f"{type(self._strategy).__name__}. Call fabric_model.mark_forward_method({name!r}) after fabric.setup()."
            )

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            handles = [module.register_forward_pre_hook(refuse) for module in original.modules()]
            try:
                return method(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()

        return call

    def __getattr__(self, name: str) -> Any:
        fields = vars(self)
        if "_original_module" not in fields or name == "_forward_module":
            return super().__getattr__(name)
        original = fields["_original_module"]
        value = getattr(original, name)
        if not inspect.ismethod(value):
            return value
        if name in STEPS or name in fields["_forward_methods"]:
            # Kept, so that the next call finds it at once.
            fields[name] = self._compose(self._strategy.compose_step(fields["_set_up"], name))
            return fields[name]
        return value if fields["_set_up"] is original else self._refusing(value, name)

    def __setattr__(self, name: str, value: Any) -> None:
        fields = vars(self)
        is_own = "_original_module" not in fields or name in fields or name in fields["_modules"]
        if is_own or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(fields["_original_module"], name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> FabricModule:
        copied = FabricModule(copy.deepcopy(self._set_up, memo), self._strategy, self._guard, self._compiler)
        copied._forward_methods.update(self._forward_methods)
        object.__setattr__(copied, "__class__", type(self))  # whatever its constructor takes
        return copied


class FabricOptimizer:
    """An optimizer whose ``step`` goes through precision and strategy. It is an instance of the original's class.

    Args:
        optimizer: The original, as the strategy set it up.
        strategy: The strategy.
        module: The module it was set up with; None where that is not known.
        on_step: Called with strategy and optimizer after each step; None for nothing.
    """

    _OWN = frozenset(
        {"_optimizer", "_strategy", "_module", "_on_step", "_steps_alone", "_update", "__class__", "step", "zero_grad"}
    )

    def __init__(
        self,
        optimizer: Optimizer,
        strategy: Strategy,
        module: nn.Module | None = None,
        on_step: Callable[[Strategy, Optimizer], None] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._strategy = strategy
        self._module = module
        self._on_step = on_step
        self._steps_alone: bool = (
            on_step is None
            and type(strategy).optimizer_step is Strategy.optimizer_step
            and type(strategy.precision).optimizer_step is Precision.optimizer_step
        )
        self._update: Callable[[], Any] | None = update_of(optimizer) if self._steps_alone else None
        self.zero_grad = zero_grad_of(optimizer)
        # isinstance(wrapped, torch.optim.Adam) must hold for code that looks at the class.
        self.__class__ = type("Fabric" + type(optimizer).__name__, (FabricOptimizer, type(optimizer)), {})

    optimizer: Optimizer = reads("_optimizer", "The original optimizer.")

    def step(self, closure: Closure | None = None, **kwargs: Any) -> Any:
        """Update the parameters.

        Args:
            closure: Computes the loss and its gradients, for optimizers that need it.
            kwargs: Passed to the original's ``step``.

        Returns:
            What the original's ``step`` returns.
        """
        if closure is not None:  # some optimizers call it under no_grad
            closure = torch.enable_grad()(closure)
        if self._steps_alone:
            original = self._optimizer
            if closure is not None:
                return original.step(closure, **kwargs)
            update = self._update
            if update is None or kwargs or "step" in vars(original) or original._optimizer_step_pre_hooks:
                return original.step(**kwargs)
            return update()
        result = self._strategy.optimizer_step(self._optimizer, closure, self._module, **kwargs)
        if self._on_step is not None:
            self._on_step(self._strategy, self._optimizer)
        return result

    def state_dict(self) -> StateDict:
        """Return the original's state; parts that are spread over processes are gathered."""
        return self._strategy.optimizer_state(self._optimizer, self._module)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the original's state."""
        self._strategy.load_optimizer_state(self._optimizer, state_dict, self._module)

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Schedulers replace `step`: of this object, so that theirs runs ours and ours the original's.
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._optimizer, name, value)

    def __repr__(self) -> str:
        return f"Fabric{self._optimizer!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> FabricOptimizer:
        return FabricOptimizer(copy.deepcopy(self._optimizer, memo), self._strategy, self._module, self._on_step)


def follow_parameters(optimizers: Sequence[Any], names: Mapping[nn.Parameter, str], module: nn.Module) -> None:
    """Let optimizers step the parameters that the strategy put in the place of those of the same names.

    Raises:
        RuntimeError: An optimizer has a state of its own already.
    """
    now = {name.replace(CHECKPOINTED, ""): parameter for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", ()):
            found = [now.get(names.get(parameter, ""), parameter) for parameter in group["params"]]
            if optimizer.state and any(new is not old for new, old in zip(found, group["params"])):
                raise RuntimeError(
                    f"setup puts other parameters in the place of those that this {type(optimizer).__name__} has stepped "
                    "already. Call setup before the first step, and load states after it."
                )
            group["params"] = found


class FabricDataLoader:
    """A loader whose batches come on the device, whose samplers know the epoch, and whose place can be saved.

    An epoch ends where the loader is exhausted or a ``for`` loop is left; :meth:`state_dict` taken inside of the loop
    is the place after the batch that is being worked on.

    Args:
        dataloader: A DataLoader.
        device: Where batches go; None leaves them where they are.
    """

    def __init__(self, dataloader: Any, device: torch.device | None = None) -> None:
        self._dataloader = dataloader
        self.device: torch.device | None = device
        self._position = Position()
        self._num_iter_calls: int = 0
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """The epoch, and the number of batches of it that were taken."""
        return max(0, self._num_iter_calls - 1), self._position.num_pulled

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[Batch]:
        set_epoch(self._dataloader, self._num_iter_calls)
        self._num_iter_calls += 1
        if self._is_running:
            # Of two iterations at once, the place is that of the first.
            return (self._placed(batch) for batch in self._dataloader)
        batches = self._follow(self._position.iterate(self._dataloader))
        self._running = weakref.ref(batches)
        return batches

    def state_dict(self) -> StateDict:
        """Return the place of this process in the data."""
        # An epoch that is not over is entered again.
        epoch = self._num_iter_calls - int(self._is_running)
        return {"epoch": epoch, "position": self._position.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        """Let the next iteration go on where ``state`` was taken."""
        self._num_iter_calls = state["epoch"]
        self._position.load_state_dict(state["position"])

    @property
    def _is_running(self) -> bool:
        running = None if self._running is None else self._running()
        return running is not None and inspect.getgeneratorstate(running) != inspect.GEN_CLOSED

    def _placed(self, batch: Batch) -> Any:
        return batch if self.device is None else move_data_to_device(batch, self.device)

    def _follow(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        device = self.device
        try:
            for batch in batches:
                yield batch if device is None else move_data_to_device(batch, device)
        finally:
            self._position.finish()

    def __getattr__(self, name: str) -> Any:
        if name == "_dataloader":
            raise AttributeError(name)
        return getattr(self._dataloader, name)


def is_wrapped(obj: object) -> bool:
    """Return whether ``obj`` came out of a ``setup`` method of :class:`~levin.fabric.Fabric`.

    Example:
        >>> is_wrapped(nn.Linear(1, 1))
        False
    """
    obj, _ = split_compiled(obj)
    return isinstance(obj, (FabricModule, FabricOptimizer, FabricDataLoader))


def check_new(kind: type, *objects: object) -> None:
    """Check what a ``setup`` method was given.

    Raises:
        TypeError: One of them is of another kind.
        ValueError: One of them was set up before.
    """
    for obj in objects:
        if is_wrapped(obj):
            raise ValueError(f"An object is set up once, received a {type(obj).__name__}. Pass the one you made.")
        if not isinstance(obj, kind):
            raise TypeError(f"Objects of {kind.__name__} are set up here, received {type(obj).__name__}. {CALLS[kind]}")


def unwrap(obj: Any) -> Any:
    """Return the user's object inside of what Fabric handed out; any other as it is."""
    obj, _ = split_compiled(obj)
    if isinstance(obj, FabricModule):
        return obj.module
    if isinstance(obj, FabricOptimizer):
        return obj.optimizer
    return obj._dataloader if isinstance(obj, FabricDataLoader) else obj


def set_up_module(module: nn.Module) -> nn.Module:
    """Return the module as the strategy knows it."""
    inner, _ = split_compiled(module)
    set_up: nn.Module = inner._set_up if isinstance(inner, FabricModule) else inner
    return set_up


def split_compiled(module: Any) -> tuple[Any, Callable[[nn.Module], nn.Module] | None]:
    """Return the module inside of a compiled one, and what compiles another in the same way; None where it is plain."""
    # Asked by attribute: the import of torch._dynamo takes a second.
    compiler = vars(module).get("dynamo_ctx") if isinstance(module, nn.Module) else None
    return (module, None) if compiler is None else (module._orig_mod, compiler)
