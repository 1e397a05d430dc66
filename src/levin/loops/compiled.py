"""``Trainer(compile=...)``: what of a run goes through ``torch.compile``.

A function is compiled, never the module: parameters keep their names, and a checkpoint says nothing of it. On one device,
where nothing stands between a loss and its gradients, both are one graph. Elsewhere it is the forward pass and torch's
own backward of it. With ``"blocks"``, and where a strategy shards the module, each repeated block is compiled for itself.

What cannot be compiled runs as it is, and a warning says what and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from levin.log_store import LogStore
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn
from levin.utilities.types import StateDict

# A function that was compiled so often is not made for it.
_MANY = 6


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats: the children of each list of two or more modules of one class.

    Example:
        >>> net = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)]))
        >>> len(repeated_blocks(net))
        2
    """
    found: list[nn.Module] = []
    for owner in module.modules():
        if isinstance(owner, (nn.ModuleList, nn.Sequential)):
            kinds = Counter(type(child) for child in owner)
            found += [child for child in owner if kinds[type(child)] > 1 and next(child.parameters(), None) is not None]
    inner = {id(child) for block in found for child in block.modules() if child is not block}
    return [block for block in found if id(block) not in inner]


class Compiler:
    """Compiles the functions of one run, and tells what became of them.

    Args:
        options: For ``torch.compile``.
        module: The user's module.
        store: Returns the log store of the loop that runs, where ``self.log`` of compiled code leaves what it got.
    """

    def __init__(self, options: StateDict, module: nn.Module, store: Callable[[], LogStore]) -> None:
        self.options = {name: value for name, value in options.items() if name != "blocks"}
        self.module = module
        self.store = store
        self.only_blocks = bool(options.get("blocks"))
        self.uses_graphs = options.get("mode") in ("reduce-overhead", "max-autotune")
        self.blocks: list[nn.Module] = []
        self._config: Any = None

    def begin(self, needs_blocks: bool) -> None:
        """Compile the blocks, where these are all that is compiled.

        Args:
            needs_blocks: Whether the steps as a whole cannot be: the module is sharded, or the user steps the optimizers.
        """
        self.only_blocks = self.only_blocks or needs_blocks
        if self.only_blocks:
            self._compile_blocks()

    def _compile_blocks(self) -> None:
        self.blocks = repeated_blocks(self.module)
        if not self.blocks:
            rank_zero_warn(
                f"Trainer(compile=...) found no repeated blocks in {type(self.module).__name__}, that is no ModuleList or "
                "Sequential with two modules of one class: nothing is compiled. Use `module.part.compile()` in "
                "`configure_model`, or compile=True on one device."
            )
        for block in self.blocks:
            # Unlike `block.compile()`, this compiles classes of torch.nn as well.
            block._compiled_call_impl = torch.compile(
                torch._dynamo.external_utils.wrap_inline(block._call_impl), **self.options
            )

    def end(self) -> None:
        """Leave the module as it was."""
        for block in self.blocks:
            block._compiled_call_impl = None
        self.leave_gradients()

    def enter_gradients(self) -> None:
        """Let torch compile gradients that a function computes, and note nothing for a profiler at each of its calls."""
        settings = {"trace_autograd_ops": True, "record_runtime_overhead": False}
        known = {name: value for name, value in settings.items() if hasattr(torch._dynamo.config, name)}
        self._config = torch._dynamo.config.patch(known)
        self._config.__enter__()

    def leave_gradients(self) -> None:
        """Let torch compile no gradients from here on, which it does at some cost for functions that it cuts."""
        config, self._config = self._config, None
        if config is not None:
            config.__exit__(None, None, None)

    def function(self, step: Callable[..., object], name: str) -> CompiledFunction:
        """Return ``step`` compiled, without its backward pass."""
        return CompiledFunction(step, name, self, self.options)


class CompiledFunction:
    """A function of the user's in compiled form.

    Batches of another shape at the end of an epoch are not worth a compilation: they run as they are.

    Args:
        function: What is compiled.
        name: What messages call it.
        compiler: Of the run.
        options: For ``torch.compile``.
    """

    def __init__(self, function: Callable[..., object], name: str, compiler: Compiler, options: StateDict) -> None:
        self.function = function
        self.name = name
        self.compiler = compiler
        self.compiled: Optional[Callable[..., object]] = torch.compile(function, **options)
        self.must_compile = bool(options.get("fullgraph"))
        self.num_compiled: int = 0
        self.has_warned: bool = False

    def __call__(self, *args: object) -> Any:
        """Run it; what it logged is taken up by the loop, as that of any compiled code."""
        compiled = self.compiled
        if compiled is None:
            return self.function(*args)
        if self.compiler.uses_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        before = _num_frames()
        try:
            result = compiled(*args)
        except Exception as error:
            if not _is_of_compiler(error) or self.must_compile:
                raise
            self._give_up(error)
            return self.function(*args)
        if self.compiler.uses_graphs:
            result = self.out_of_graph(result)
        if _num_frames() != before:
            self._tell(before)
        return result

    def out_of_graph(self, result: object) -> object:
        """Return a result that stays as it is when the next batch writes to the memory of the CUDA graph."""
        return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, result)

    def _give_up(self, error: Exception) -> None:
        self.compiled = None
        self.compiler.store().recorded.clear()
        rank_zero_warn(
            f"`{self.name}` could not be compiled and runs as it is, {_text(error)}. "
            "See TORCH_LOGS=dynamo for more, or leave Trainer(compile=...) out."
        )

    def _tell(self, before: int) -> None:
        """Say what was compiled, and why again."""
        is_first = not self.num_compiled
        self.num_compiled += _num_frames() - before
        if is_first:
            reasons = "; ".join(reason.splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"])
            in_parts = f" in {self.num_compiled} parts, cut at: {reasons}" if self.num_compiled > 1 and reasons else ""
            rank_zero_info(f"`{self.name}` was compiled{in_parts}.")
        elif self.num_compiled >= _MANY and not self.has_warned:
            self.has_warned = True
            rank_zero_warn(
                f"`{self.name}` was compiled {self.num_compiled} times{_reason()}. Numbers that change from batch to batch "
                "make torch compile anew: let tensors hold them, and see TORCH_LOGS=recompiles for each reason."
            )


class JointFunction(CompiledFunction):
    """One that returns (output, gradients); the gradients are used up before the next batch."""

    def __init__(self, function: Callable[..., object], name: str, compiler: Compiler, options: StateDict) -> None:
        super().__init__(function, name, compiler, options)
        self.must_compile = True

    def out_of_graph(self, result: Any) -> object:
        """Return a result whose first part stays as it is."""
        return super().out_of_graph(result[0]), result[1]


class CompiledStep:
    """``training_step`` and the gradients of its loss in one compiled function.

    Args:
        step: ``training_step`` as the strategy runs it.
        backward: What runs where the gradients were not computed with the loss.
        compiler: Of the run.
        is_joint: Whether the gradients may be computed in the same graph.
        is_one: Returns whether each batch is a step of the optimizer.
        is_last: Returns whether the batch is the last one of its epoch.
    """

    def __init__(
        self,
        step: Callable[..., object],
        backward: Callable[..., object],
        compiler: Compiler,
        is_joint: bool,
        is_one: Callable[[], bool],
        is_last: Callable[[], bool],
    ) -> None:
        self.is_one = is_one
        self.is_last = is_last
        self.step = step
        self.compiler = compiler
        self.inner_backward = backward
        self.forward = compiler.function(step, "training_step")
        self.joint: Optional[JointFunction] = None
        if is_joint:
            compiler.enter_gradients()
            # A call that torch holds to one graph is slower than one whose code says so for itself.
            options = {name: value for name, value in compiler.options.items() if name != "fullgraph"}
            self.joint = JointFunction(self._with_gradients, "training_step", compiler, options)
        self.parameters: list[nn.Parameter] = list(compiler.module.parameters())
        self.gradients: Any = None
        self.shapes: Optional[list[torch.Size]] = None

    def __call__(self, *args: object) -> object:
        """Return what ``training_step`` returned, with the gradients at hand for :meth:`backward` where that is possible."""
        self.gradients = None
        if self.shapes is None:
            self.shapes = _shapes(args[0])
        elif self.is_last() and _shapes(args[0]) != self.shapes:
            return self.step(*args)
        if self.joint is not None and self.is_one():
            try:
                output, self.gradients = self.joint(*args)
                return output
            except Exception as error:
                if not _is_of_compiler(error):
                    raise
                self.joint = None
                self.compiler.leave_gradients()
                self.compiler.store().recorded.clear()
                rank_zero_info(f"The gradients are not compiled together with `training_step`: {_text(error)}.")
        return self.forward(*args)

    def backward(self, loss: Tensor) -> None:
        """Give the parameters their gradients."""
        gradients, self.gradients = self.gradients, None
        if gradients is None:
            self.inner_backward(loss)
            return
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _with_gradients(self, *args: object) -> tuple[object, object]:
        with torch._dynamo.error_on_graph_break(True):
            return self._output_and_gradients(*args)

    def _output_and_gradients(self, *args: object) -> tuple[object, object]:
        output = self.step(*args)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return output, None
        learning = [parameter for parameter in self.parameters if parameter.requires_grad]
        gradients = iter(torch.autograd.grad(loss, learning, allow_unused=True))
        return tree_map(_detached, output), [next(gradients) if p.requires_grad else None for p in self.parameters]


def may_be_joint(module: nn.Module) -> bool:
    """Return whether gradients may be compiled together with their loss."""
    return traces_gradients() and not has_gradient_hooks(module)


def has_gradient_hooks(module: nn.Module) -> bool:
    """Return whether somebody looks at the gradients of single parameters while they are computed."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(p, name) for p in module.parameters() for name in hooks)


def _shapes(batch: object) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def traces_gradients() -> bool:
    """Return whether this torch can compile gradients into the graph of their loss."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _num_frames() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _reason() -> str:
    # Not every torch knows the reason.
    reasons = [getattr(metrics, "recompile_reason", None) for metrics in torch._dynamo.utils.get_compilation_metrics()]
    last = next((reason for reason in reversed(reasons) if reason), None)
    return "" if last is None else f", the last time because {last.splitlines()[-1].strip()}"


def _text(error: Exception) -> str:
    """Return the first lines of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}".rstrip(".")


def _is_of_compiler(error: Exception) -> bool:
    """Whether it is the compiler that failed, not the code that it compiled."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
