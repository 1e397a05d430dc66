"""A composed fit as lines: what will be called, in order, read out of its hook table and its step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Optional

from levin.explain.evaluation_plan import evaluation
from levin.explain.node import ALWAYS, Node, Place, When
from levin.explain.parts import call, hooks, left_out, loader, set_up, tear_down, transfer
from levin.explain.rules import Rules
from levin.loops.run import Run
from levin.loops.step import AutomaticStep, compose_step
from levin.module import LightningModule
from levin.precision.precision import Precision
from levin.utilities.overrides import has_own


class FitPlan:
    """The lines of a fit.

    Args:
        run: Composed, with its loaders there and with counters of its own.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rules = Rules(run)
        self.step = compose_step(run)

    def lines(self) -> list[Node]:
        """Return all lines, outermost first."""
        run = self.run
        return [
            set_up(run),
            *hooks(self.run, "on_fit_start"),
            *self._sanity_check(),
            *loader(run.loaders.train),
            *(loader(run.loaders.val) if self._loads_validation_early() else ()),
            *hooks(self.run, "on_train_start"),
            self._epochs(),
            *hooks(self.run, "on_train_end"),
            *hooks(self.run, "on_fit_end"),
            *tear_down(run),
        ]

    # ---------------------------------------------------------------- before and after the epochs

    def _sanity_check(self) -> Iterator[Node]:
        run, steps = self.run, self.run.settings.num_sanity_val_steps
        if not run.enable_validation or not steps:
            return
        limits = [min(steps, count) for count in run.loaders.val.num_batches]
        yield from hooks(self.run, "on_sanity_check_start")
        yield from loader(run.loaders.val)
        if sum(run.loaders.val.batches_per_loader):
            body = [*evaluation(run, "validation", run.loaders.val, limits, logs=False)]
            yield Node("sanity check: nothing of it is logged or counted", body=body)
        yield from hooks(self.run, "on_sanity_check_end")

    # ---------------------------------------------------------------- epochs and batches

    def _epochs(self) -> Node:
        run = self.run
        most = run.loops.fit.max_epochs
        head = f"for epoch in range({most}):" if most is not None and most >= 0 else "for epoch in itertools.count():"
        max_steps = run.loops.fit.max_steps
        limit = f"max_steps={max_steps} or trainer.should_stop" if max_steps >= 0 else "trainer.should_stop"
        body = [
            *self._reloaded(),
            *hooks(self.run, "on_train_epoch_start"),
            self._batches(),
            *hooks(self.run, "on_train_epoch_end"),
            *self._schedulers("epoch", plateau=True, is_after=True),
            *self._loggers("values of the epoch"),
        ]
        return Node(f"{head}  # ends early at {limit}", counts=("epoch", lambda _: self.rules.num_epochs()), body=body)

    def _batches(self) -> Node:
        rules = self.rules
        count = rules.num_batches
        size = "until the data ends" if count == math.inf else f"{int(count)} batches"
        body = [
            *transfer(self.run),
            *hooks(self.run, "on_train_batch_start"),
            *(self._automatic() if isinstance(self.step, AutomaticStep) else self._manual()),
            *self._schedulers("step", plateau=False),
            *self._schedulers("epoch", plateau=False),
            *hooks(self.run, "on_train_batch_end"),
            *self._loggers("values of the step", rules.logs),
            *self._validation(),
            *self._schedulers("step", plateau=True),
        ]
        return Node(f"for batch in train_dataloader:  # {size}", counts=("batch", rules.batches_in), body=body)

    def _automatic(self) -> Iterator[Node]:
        step, rules = self.step, self.rules
        assert isinstance(step, AutomaticStep)
        name = type(step.optimizer).__name__
        when = self._rule(lambda place: not rules.accumulates(place))
        if step.handles_accumulation or when.words in ("", "after every batch"):
            when = ALWAYS
        if step.own_optimizer_step is not None:
            yield call(step.own_optimizer_step, "epoch, batch_idx, optimizer, closure", when)
        around = f", through {self._stepper()}" if not step.is_plain else ""
        head = f"optimizer.step(closure):  # {name}{around}"
        if when is not ALWAYS:
            synced = ", in no_sync of the strategy" if step.is_distributed else ""
            head += f"; {when.words}. After the others the closure alone{synced}: gradients add up"
        opens = ALWAYS if when is ALWAYS else When(rules.opens_window, "on the first batch of each window")
        body = [*self._training_step(), *self._zero_grad(opens), *self._backward(), *self._before_step(when)]
        yield Node(head, body=body)

    def _training_step(self) -> Iterator[Node]:
        strategy, precision, module = self.run.strategy, self.run.strategy.precision, self.run.module
        around = []
        if strategy.model is not module:
            around.append(f"inside of {type(strategy.model).__name__}")
        names = ("forward_context", "train_step_context")
        if any(getattr(type(precision), name) is not getattr(Precision, name) for name in names):
            around.append(f"in the context of {type(precision).__name__} ({precision.precision})")
        arguments = "batch, batch_idx" if self.step.num_arguments == 2 else "batch"  # type: ignore[attr-defined]
        text = f"loss = {type(module).__name__}.training_step({arguments})"
        note = f"  # {', '.join(around)}" if around else ""
        parts = Node("where memory is full: in parts of half the size, each with its own forward and backward")
        yield Node(text + note, module.training_step, body=[parts] if self.run.settings.splits_batches else [])
        if self.run.settings.accumulate_grad_batches != 1:
            yield Node("loss /= batches of the window")

    def _zero_grad(self, when: When) -> Iterator[Node]:
        assert isinstance(self.step, AutomaticStep)
        yield from hooks(self.run, "on_before_zero_grad", when)
        if self.step.own_zero_grad is not None:
            yield call(self.step.own_zero_grad, "epoch, batch_idx, optimizer", when)
        else:
            yield Node("optimizer.zero_grad()", None, *when)

    def _backward(self) -> Iterator[Node]:
        run, precision = self.run, self.run.strategy.precision
        yield from hooks(self.run, "on_before_backward")
        if type(precision).backward is not Precision.backward:
            yield Node(f"{type(precision).__name__}.backward(loss)")
        if has_own("backward", run.module, LightningModule):
            yield call(run.module.backward, "loss")
        else:
            scaled = " (scaled)" if precision.scaler is not None else ""
            reduces = "  # gradients are averaged over the processes" if run.strategy.is_distributed else ""
            yield Node(f"loss.backward(){scaled}{reduces}")
        yield from hooks(self.run, "on_after_backward")

    def _before_step(self, when: When) -> Iterator[Node]:
        assert isinstance(self.step, AutomaticStep)
        yield from hooks(self.run, "on_before_optimizer_step", when)
        if self.step.own_clipping is not None:
            yield call(self.step.own_clipping, "optimizer, gradient_clip_val, gradient_clip_algorithm", when)
        elif (clip_val := self.run.settings.gradient_clip_val) and clip_val > 0:
            kind = "value" if self.run.settings.gradient_clip_algorithm == "value" else "norm"
            yield Node(f"clip_grad_{kind}_(parameters, {clip_val})", None, *when)
        yield Node("the update of the parameters", None, *when)

    def _manual(self) -> Iterator[Node]:
        (node,) = self._training_step()
        node.body = [
            Node("where it calls self.manual_backward(loss):", body=[*self._backward()]),
            Node("where it calls optimizer.step():", body=[*hooks(self.run, "on_before_optimizer_step")]),
        ]
        yield node

    def _stepper(self) -> str:
        strategy, precision = self.run.strategy, self.run.strategy.precision
        if type(precision).optimizer_step is not Precision.optimizer_step:
            scaled = (
                " (unscales first, skips the update where a gradient is inf)" if precision.scaler is not None else ""
            )
            return f"{type(precision).__name__}{scaled}"
        return f"{type(strategy).__name__}.optimizer_step"

    def _schedulers(self, interval: str, plateau: bool, is_after: bool = False) -> Iterator[Node]:
        run, rules = self.run, self.rules
        if not run.module.automatic_optimization:
            return
        own = has_own("lr_scheduler_step", run.module, LightningModule)
        for config in run.schedulers:
            if config.interval != interval or config.reduce_on_plateau != plateau:
                continue
            name = type(config.scheduler).__name__
            argument = f'"{config.monitor}"' if plateau else ""
            when = self._rule(rules.steps(config))
            if is_after:
                when = When(when.due, "" if config.frequency == 1 else f"every {config.frequency} epochs")
            if own:
                yield call(run.module.lr_scheduler_step, f"{name}, {argument or None}", when)
            else:
                yield Node(f"{name}.step({argument})", None, *when)

    # ---------------------------------------------------------------- validation

    def _validation(self) -> list[Node]:
        run, rules, loaders = self.run, self.rules, self.run.loaders.val
        if not run.enable_validation:
            return []
        unless = When(lambda place: not rules.accumulates(place), "unless gradients are being added up")
        frees_when = unless if run.settings.accumulate_grad_batches != 1 else ALWAYS
        body = [
            call(run.module.on_validation_model_zero_grad, "", frees_when),
            *self._reloaded_validation(),
            *(evaluation(run, "validation", loaders, loaders.num_batches) if sum(loaders.batches_per_loader) else ()),
        ]
        if run.settings.val_check_seconds is not None:
            clock = str(timedelta(seconds=run.settings.val_check_seconds))
            return [Node(f"validation:  # after the first batch that ends {clock} after the one before", body=body)]
        when = self._rule(rules.validates)
        return [Node("validation:", None, *when, body=body)] if when.words else []

    # ---------------------------------------------------------------- parts

    def _reloaded(self) -> Iterator[Node]:
        every = self.run.settings.reload_dataloaders_every_n_epochs
        if every:
            words = f"every {every} epochs" if every > 1 else "after the first"
            due = When(lambda place: place.epoch > 0 and place.epoch % every == 0, words)
            yield from loader(self.run.loaders.train, due)

    def _loads_validation_early(self) -> bool:
        """Whether the validation loaders are asked for right before training, and not in the sanity check before it."""
        settings = self.run.settings
        is_soon = settings.check_val_every_n_epoch in (None, 1)
        return self.run.enable_validation and is_soon and not settings.num_sanity_val_steps

    def _reloaded_validation(self) -> Iterator[Node]:
        """Ask for the validation loaders where they are not there, or due again."""
        settings, rules = self.run.settings, self.rules
        every = settings.reload_dataloaders_every_n_epochs
        loaded = 0.0 if settings.num_sanity_val_steps or self._loads_validation_early() else -math.inf
        places: set[Place] = set()
        for epoch in range(rules.num_epochs()):
            for index in range(rules.batches_in(epoch)):
                is_due = loaded == -math.inf or (every and epoch - loaded >= every)
                if is_due and rules.validates(Place(epoch, index)):
                    places.add(Place(epoch, index))
                    loaded = epoch
        if places:
            words = f"{every} epochs after the last time" if every else "the first time"
            yield from loader(self.run.loaders.val, When(lambda place: place in places, words))

    def _rule(self, due: Callable[[Place], bool]) -> When:
        return When(due, self.rules.words(due))

    def _loggers(self, what: str, due: Optional[Callable[[Place], bool]] = None) -> list[Node]:
        """What goes to the loggers, where there are values."""
        when = ALWAYS if due is None else self._rule(due)
        if due is not None and not when.words:
            return []
        return [call(logger.log_metrics, what, when) for logger in self.run.loggers]

    def left_out(self) -> list[str]:
        """Return the hooks that a run would call and that nobody wrote."""
        run, rules = self.run, self.rules
        words = ["_fit_", "_train_", "on_before_", "on_after_"]
        names = left_out(run, [*words, "_sanity_", "_validation_"] if run.enable_validation else words)
        if run.loggers and not rules.words(rules.logs):
            names.append(f"log_metrics of a step (log_every_n_steps={run.settings.log_every_n_steps})")
        own = ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "backward", "lr_scheduler_step")
        return names + [name for name in own if not has_own(name, run.module, LightningModule)]
