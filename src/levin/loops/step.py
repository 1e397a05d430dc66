"""One optimization step, automatic or manual: composed once per run, then called for each batch.

automatic                                        manual
  optimizer.step(closure)                          training_step   (the user calls manual_backward, opt.step)
    training_step -> loss / window
    zero_grad (first batch of a window)
    backward
    on_before_optimizer_step, clipping
  update
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from levin.loops.compiled import CompiledStep, may_be_joint
from levin.loops.run import Run, Step, step_arguments
from levin.loops.splitting import Splitting, check_splitting
from levin.module import LightningModule
from levin.optimizer import hook_steps
from levin.precision.precision import Precision
from levin.ranks.uneven import Uneven
from levin.ranks.weighted import divide_by_weight
from levin.strategies.strategy import Strategy
from levin.utilities.exceptions import MisconfigurationException, add_hint
from levin.utilities.overrides import has_own
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.torch_optimizer import update_of, zero_grad_of
from levin.utilities.types import Batch, Closure, StateDict


def compose_step(run: Run) -> Step:
    """Return the step for the module's kind of optimization: ``step(batch, batch_idx, is_last) -> outputs``."""
    return AutomaticStep(run) if run.module.automatic_optimization else ManualStep(run)


def plain_backward(loss: Tensor, *args: object, **kwargs: object) -> None:
    """Run ``loss.backward``, also that of a subclass of tensors."""
    loss.backward(*args, **kwargs)


def compose_backward(run: Run, optimizer: Any) -> Callable[..., None]:
    """Return ``backward(loss, *args, **kwargs)``: precision, hooks and the user's override around ``loss.backward``.

    Args:
        run: Whose steps.
        optimizer: The one that is stepped next; None where the user steps them.
    """
    hooks, owner, module, precision = run.hooks, run, run.module, run.strategy.precision
    before, after = hooks["on_before_backward"], hooks["on_after_backward"]
    own = _own(module, "backward")
    by_precision = type(precision).backward is not Precision.backward
    if not (before or after or own or by_precision):
        return run.strategy.backward_function(optimizer, plain_backward)

    def backward(loss: Tensor, *args: object, **kwargs: object) -> None:
        if before:
            owner.call("on_before_backward", loss)
        if by_precision:
            precision.backward(loss, module, optimizer, *args, **kwargs)
        elif own is not None:
            owner.call_own("backward", own, loss, *args, **kwargs)
        else:
            loss.backward(*args, **kwargs)
        if after:
            owner.call("on_after_backward")

    return run.strategy.backward_function(optimizer, backward)


def compose_compiled(
    run: Run, step: Callable[..., object], backward: Callable[..., object]
) -> tuple[Callable[..., object], Callable[..., object]]:
    """Return ``step`` and ``backward`` compiled, where the user wants that; see :mod:`levin.loops.compiled`."""
    compiler, settings, progress = run.compiler, run.settings, run.loops.fit.epoch_loop.batch_progress
    if compiler is None or compiler.only_blocks:
        return step, backward
    is_joint = backward is plain_backward and not run.strategy.is_distributed and not settings.detect_anomaly
    compiled = CompiledStep(
        step, backward, compiler, is_joint=is_joint and may_be_joint(run.module),
        is_one=lambda: run.settings.accumulate_grad_batches == 1, is_last=lambda: progress.is_last_batch,
    )  # fmt: skip
    return compiled, compiled.backward


class AutomaticStep:
    """training_step, zero_grad, backward, clipping and update, by the Trainer."""

    def __init__(self, run: Run) -> None:
        module, strategy = run.module, run.strategy
        self.run = run
        self.progress = run.loops.fit.epoch_loop.optim_progress
        # Of batches that do not fit; None where they are not split.
        self.splitting: Optional[Splitting] = None
        whole = strategy.step_function(strategy.model, "training_step")
        if run.settings.splits_batches:
            check_splitting(run)
            self.splitting = Splitting(run)
            whole = self.splitting.compose()
        step, backward = compose_compiled(run, whole, compose_backward(run, run.optimizers[0]))
        self.training_step = run.timed(f"[Strategy]{type(strategy).__name__}.training_step", step)
        self.num_arguments = step_arguments(module, "training_step", 1)
        self.backward = run.timed(f"[Strategy]{type(strategy).__name__}.backward", backward)
        self.own_zero_grad = _own(module, "optimizer_zero_grad", run.is_profiled)
        self.own_optimizer_step = _own(module, "optimizer_step", run.is_profiled)
        # The hook calls the other one.
        clips_itself = run.is_profiled or has_own("clip_gradients", module, LightningModule)
        self.own_clipping = _own(module, "configure_gradient_clipping", clips_itself)
        self.zero_grad_hooks = run.hooks["on_before_zero_grad"]
        self.step_hooks = run.hooks["on_before_optimizer_step"]
        self.is_distributed = strategy.is_distributed
        self.handles_accumulation = strategy.handles_gradient_accumulation
        # The window: batches whose gradients are summed into one update.
        self.window: int = 1
        self.held: int = 0
        self.weight: object = 0
        self.is_weighted: bool = False
        self.batch, self.batch_idx = None, 0
        self.outputs: dict[str, Any] = {}
        self.clips_always = run.strategy.precision.clips_gradients
        clips = self.own_clipping or self.clips_always or run.settings.gradient_clip_val
        self._needs_before_step = bool(self.step_hooks or clips)
        plain_strategy = type(strategy).optimizer_step is Strategy.optimizer_step
        plain_precision = type(strategy.precision).optimizer_step is Precision.optimizer_step
        self.is_plain = plain_strategy and plain_precision and self.own_optimizer_step is None
        # Kept for `on_train_batch_end` alone; without one, nobody sees what the step returned.
        self.keeps_loss = not self.is_plain or bool(run.hooks["on_train_batch_end"])
        strategy.precision.before_step = self.before_step
        self._closure_ran: bool = False
        # On several ranks: steps for which not all of them have a batch, and how many batches the window lacks so.
        self.uneven: Optional[Uneven] = None
        self.lacks: int = 0
        self.take_optimizers()

    def take_optimizers(self) -> None:
        """Step those of the run from now on."""
        self.optimizer: Any = self.run.optimizers[0]
        self.lightning_optimizer = self.run.lightning_optimizers[0]
        self.lightning_optimizer._on_step = self._step_through_strategy
        self.update = update_of(self.optimizer) if self.is_plain else None
        self.zero_grad = zero_grad_of(self.optimizer)

    def state_dict(self) -> StateDict:
        """Return the unfinished window: sizes, weight and gradients."""
        state = {} if self.splitting is None else self.splitting.state_dict()
        if not self.held:
            return state
        gradients = self.run.strategy.window_gradients(self.run.module)
        return state | {
            "window": self.window, "held": self.held, "weight": self.weight, "is_weighted": self.is_weighted,
            "gradients": gradients, "lacks": self.lacks,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        if self.splitting is not None:
            self.splitting.load_state_dict(state)
        if "gradients" not in state:
            return
        if "window" not in state:
            rank_zero_warn(
                "The checkpoint was saved with manual optimization while gradients were accumulated, and the module now has "
                "automatic optimization, which cannot tell of how many batches they are: they are left out."
            )
            return
        self.window, self.held = state["window"], state["held"]
        self.weight, self.is_weighted = state["weight"], state["is_weighted"]
        self.lacks = state.get("lacks", 0)
        self.run.strategy.load_window_gradients(self.run.module, state["gradients"])

    def __call__(self, batch: Batch, batch_idx: int, is_last: bool) -> dict[str, object]:
        """Train on one batch; returns what ``on_train_batch_end`` gets."""
        self.batch, self.batch_idx = batch, batch_idx
        accumulate = self.run.settings.accumulate_grad_batches
        if self.held == 0 or batch_idx % accumulate == 0:
            # One that an epoch left open, ended by the user in its middle, is dropped.
            self.held = self.lacks = 0
            self.window = 1 if accumulate == 1 else self._size_of_window(accumulate, batch_idx)
            if self.is_weighted:
                self.weight, self.is_weighted = 0, False
        self.held += 1
        if self.uneven is not None:
            self.lacks += self.uneven.num_lacking
        self._closure_ran = False
        if accumulate == 1 or is_last or (batch_idx + 1) % accumulate == 0 or self.handles_accumulation:
            step = self.progress.step
            step.increment_ready()
            optimizer = self.optimizer
            # Schedulers, users and hooks may come at any time, and want the call that torch gives them.
            if self.update is not None and "step" not in vars(optimizer) and not optimizer._optimizer_step_pre_hooks:
                self.closure()
                if self._needs_before_step or self.is_weighted or self.held != self.window or self.lacks:
                    self.before_step(self.optimizer)
                self.update()
            elif self.is_plain:
                self.optimizer.step(self.closure_and_before_step)
            elif self.own_optimizer_step is not None:
                epoch = self.run.current_epoch
                self.run.call_own(
                    "optimizer_step", self.own_optimizer_step, epoch, batch_idx, self.lightning_optimizer, self.closure
                )
            else:
                self._step_through_strategy(self.optimizer, self.closure)
            if not self._closure_ran:
                raise MisconfigurationException(
                    "`optimizer_step` was overridden and did not run `optimizer_closure`, so no loss was computed. "
                    "Call `optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` yourself."
                )
            step.increment_completed()
            self.held = self.lacks = 0
        else:
            with self.run.strategy.block_backward_sync() if self.is_distributed else nullcontext():
                self.closure()
        self.batch = None
        return self.outputs

    def close_window(self) -> None:
        """Step on the gradients of an open window, after whose last batch the data has ended unexpectedly."""
        if not self.held:
            return
        loss = self.outputs.get("loss") if self.keeps_loss else 0.0
        step = self.progress.step
        step.increment_ready()
        if self.own_optimizer_step is not None:
            self.run.call_own(
                "optimizer_step", self.own_optimizer_step, self.run.current_epoch, self.batch_idx, self.lightning_optimizer,
                lambda: loss,
            )  # fmt: skip
        else:
            self._step_through_strategy(self.optimizer, lambda: loss)
        step.increment_completed()
        self.held = self.lacks = 0

    def _size_of_window(self, accumulate: int, batch_idx: int) -> int:
        """Return of how many batches a window is that begins here."""
        remaining = self.run.loops.fit.max_batches - batch_idx
        return accumulate if remaining > accumulate else max(1, int(remaining))

    def closure(self) -> Optional[Tensor]:
        """Compute the loss and its gradients. Returns the loss, or None when the user skipped the batch."""
        if not torch.is_grad_enabled():
            # Some optimizers call it inside of their own no_grad.
            with torch.enable_grad():
                return self.closure()
        self._closure_ran = True
        run = self.run
        store = run.store
        previous, store.hook = store.hook, "training_step"
        if self.num_arguments == 2:
            output = self.training_step(self.batch, self.batch_idx)
        else:
            output = self.training_step(self.batch)
        store.hook = previous
        if store.recorded:
            store.take_recorded()
        if isinstance(output, Tensor):
            self.outputs = {"loss": output.detach()} if self.keeps_loss else {}
            loss: Optional[Tensor] = output
        else:
            loss = self._take(output)
        if self.held == 1:
            self._zero_grad()
        if loss is None:
            return None
        if self.is_weighted:
            loss = loss * self.outputs["weight"]
        elif self.window != 1:
            loss = loss / self.window
        if self.lacks and self.uneven is not None and self.uneven.is_filler:
            loss = loss * 0.0
        try:
            self.backward(loss)
        except RuntimeError as error:
            if loss.requires_grad:
                _hint_at_shape(loss, error)
                raise
            raise _graphless(loss) from error
        return loss

    def _take(self, output: object) -> Optional[Tensor]:
        """Return the loss of a step that did not return it alone."""
        if output is None:
            self.outputs = {}
            if self.is_distributed:
                raise RuntimeError(
                    "`training_step` returned None on one of several ranks, which would leave the others waiting. "
                    "Return a loss of zero that depends on the parameters instead."
                )
            rank_zero_warn(
                "`training_step` returned None: the batch is skipped. Return the loss if this was not meant."
            )
            return None
        if not isinstance(output, Mapping):
            raise MisconfigurationException(
                "`training_step` must return a tensor (the loss), a dict with the key 'loss', or None, "
                f"received {type(output).__name__}."
            )
        if "loss" not in output:
            raise MisconfigurationException(
                f"The dict that `training_step` returns must hold the loss under 'loss', received keys {list(output)}. "
                "Return None to skip the batch."
            )
        self.outputs = _detached(output)
        loss: Tensor = output["loss"]
        if "weight" in output and (self.is_distributed or self.window != 1):
            if self.held > 1 and not self.is_weighted:
                raise MisconfigurationException(
                    "`training_step` returned a 'weight' for some batches of an accumulation window and none for others. "
                    "Return one for every batch."
                )
            self.is_weighted = True
            if not (self.lacks and self.uneven is not None and self.uneven.is_filler):
                self.weight = self.weight + output["weight"]
        return loss

    def _zero_grad(self) -> None:
        progress = self.progress.zero_grad
        if not self.zero_grad_hooks and self.own_zero_grad is None:
            self.zero_grad()
            progress.increment_all()
            return
        progress.increment_ready()
        if self.zero_grad_hooks:
            self.run.call("on_before_zero_grad", self.optimizer)
        progress.increment_started()
        if self.own_zero_grad is not None:
            run = self.run
            run.call_own("optimizer_zero_grad", self.own_zero_grad, run.current_epoch, self.batch_idx, self.optimizer)
        else:
            self.zero_grad()
        progress.increment_completed()

    def closure_and_before_step(self) -> Optional[Tensor]:
        """What a plain torch optimizer runs before it updates: the closure, then the hooks and clipping."""
        loss = self.closure()
        if self._needs_before_step or self.is_weighted or self.held != self.window or self.lacks:
            self.before_step(self.optimizer)
        return loss

    def before_step(self, optimizer: Any) -> None:
        """Average the window, call on_before_optimizer_step, clip."""
        self._average_window()
        if self.step_hooks:
            self.run.call("on_before_optimizer_step", optimizer)
        clip_val, algorithm = self.run.settings.gradient_clip_val, self.run.settings.gradient_clip_algorithm
        if self.own_clipping is not None:
            self.run.call_own(
                "configure_gradient_clipping", self.own_clipping, optimizer,
                gradient_clip_val=clip_val, gradient_clip_algorithm=algorithm,
            )  # fmt: skip
        elif self.clips_always or (clip_val and clip_val > 0):
            clip: dict[str, Any] = {"clip_val" if algorithm == "value" else "max_norm": clip_val or 0.0}
            self.run.strategy.clip_gradients(self.run.module, optimizer, **clip)

    def _average_window(self) -> None:
        """Divide the summed gradients by what the window really held, where that was not known beforehand."""
        if self.is_weighted:
            divide_by_weight(self.optimizer, self.weight, self.run.strategy)
        elif (self.held != self.window or self.lacks) and not self.handles_accumulation:
            # Every rank divides by the window, and the reduction by the number of ranks.
            size = 1 if self.uneven is None else self.uneven.size
            self.run.strategy.scale_gradients(self.optimizer, self.window * size / (self.held * size - self.lacks))
            self.window = self.held

    def _step_through_strategy(self, optimizer: Any, closure: Optional[Closure] = None, **kwargs: Any) -> Any:
        return _step(self.run.strategy, optimizer, closure, **kwargs)


class ManualStep:
    """training_step alone; the user runs backward and steps the optimizers."""

    def __init__(self, run: Run) -> None:
        strategy = run.strategy
        self.run = run
        self.progress = run.loops.fit.epoch_loop.manual_step_progress
        self.training_step = run.timed(
            f"[Strategy]{type(strategy).__name__}.training_step",
            strategy.step_function(strategy.model, "training_step"),
        )
        self.num_arguments = step_arguments(run.module, "training_step", 1)
        self.step_hooks = run.hooks["on_before_optimizer_step"]
        self._backward = compose_backward(run, None)
        strategy.precision.before_step = self._before_step if self.step_hooks else None
        self.uneven: Optional[Uneven] = None
        self.take_optimizers()

    def take_optimizers(self) -> None:
        """Let the user step those of the run from now on."""
        for optimizer in self.run.lightning_optimizers:
            optimizer._on_step = partial(_step, self.run.strategy)
            optimizer._no_sync = self.run.strategy.block_backward_sync

    def close_window(self) -> None:
        """The user's own steps have no window."""

    def state_dict(self) -> StateDict:
        """Nothing is unfinished between batches that levin knows of; accumulated gradients are kept."""
        gradients = [None if p.grad is None else p.grad.detach().clone() for p in self.run.module.parameters()]
        return {"gradients": gradients} if any(gradient is not None for gradient in gradients) else {}

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        for param, gradient in zip(self.run.module.parameters(), state.get("gradients", [])):
            param.grad = None if gradient is None else gradient.to(param.device, param.dtype)

    def __call__(self, batch: object, batch_idx: int, is_last: bool) -> dict[str, object]:
        """Train on one batch; returns what ``on_train_batch_end`` gets."""
        store = self.run.store
        previous, store.hook = store.hook, "training_step"
        hook_steps(self.run.lightning_optimizers, self._before_update, self._after_update)
        if self.num_arguments == 2:
            output = self.training_step(batch, batch_idx)
        else:
            output = self.training_step(batch)
        hook_steps(self.run.lightning_optimizers)
        store.hook = previous
        if store.recorded:
            store.take_recorded()
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        if output is None:
            return {}
        if isinstance(output, Mapping):
            return _detached(output)
        raise MisconfigurationException(
            "In manual optimization `training_step` must return a tensor, a dict or None, "
            f"received {type(output).__name__}."
        )

    def backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
        """Run the backward pass of the user's ``manual_backward``."""
        if self.uneven is not None and self.uneven.num_lacking:
            loss = loss * self.uneven.share
        try:
            self._backward(loss, *args, **kwargs)
        except RuntimeError as error:
            if loss.requires_grad:
                _hint_at_shape(loss, error)
                raise
            raise _graphless(loss) from error

    def _before_update(self) -> None:
        self.progress.increment_ready()
        self.run.profiler.start("optimizer_step")

    def _after_update(self) -> None:
        self.run.profiler.stop("optimizer_step")
        self.progress.increment_completed()

    def _before_step(self, optimizer: object) -> None:
        self.run.call("on_before_optimizer_step", optimizer)


def _graphless(loss: Tensor) -> RuntimeError:
    """Return the error for a loss that has no graph to go back through."""
    return RuntimeError(
        "The loss must depend on parameters that require gradients, received one without a graph "
        f"(requires_grad=False, value {loss.detach().cpu().tolist()}). Compute it without torch.no_grad(), .detach() or "
        ".item(), and leave some parameters unfrozen."
    )


def _hint_at_shape(loss: Tensor, error: RuntimeError) -> None:
    """Say what is wrong with a loss of more than one number, if that is what torch refused."""
    hint = f"The loss must have one element, received a tensor of shape {tuple(loss.shape)}. Reduce it, for example with .mean()."
    add_hint(error, "only for scalar outputs", hint)


def _detached(output: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of what ``training_step`` returned, its loss without the graph."""
    outputs = dict(output)
    if "loss" in outputs:
        if not isinstance(outputs["loss"], Tensor):
            raise MisconfigurationException(
                "The dict that `training_step` returns must hold a tensor under 'loss', "
                f"received {outputs['loss']!r}. Return None, not a dict, to skip the batch."
            )
        outputs["loss"] = outputs["loss"].detach()
    return outputs


def _step(strategy: Strategy, optimizer: Any, closure: Optional[Closure], **kwargs: Any) -> Any:
    """Return what the optimizer's ``step`` returns, also without a closure."""
    if closure is not None:
        return strategy.optimizer_step(optimizer, closure, **kwargs)
    nothing = torch.zeros(())  # not None, which would mean a skip
    result = strategy.optimizer_step(optimizer, lambda: nothing, **kwargs)
    return None if result is nothing else result


def _own(module: object, name: str, is_profiled: bool = False) -> Optional[Callable[..., object]]:
    """Return the method ``name`` where the user overrode it; a profiler measures the default one as well."""
    is_own = is_profiled or has_own(name, module, LightningModule)
    return getattr(module, name) if is_own else None
