"""A composed run as lines: what fit will call, in order, read out of its hook table and its step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Optional

from levin.datamodule import LightningDataModule
from levin.explain.node import ALWAYS, Node, Place, When, unbound
from levin.explain.rules import Rules
from levin.hooks import Callback, DataHooks
from levin.loops.evaluate import compose_evaluation_step
from levin.loops.hook_table import RUN_HOOKS, has_hook, transfer_owners
from levin.loops.run import Run
from levin.loops.stage_loaders import StageLoaders
from levin.loops.step import AutomaticStep, compose_step
from levin.module import LightningModule
from levin.precision.precision import Precision
from levin.utilities.overrides import has_own
from levin.utilities.types import Function

_ARGUMENTS = {
    "on_train_batch_start": "batch, batch_idx",
    "on_train_batch_end": "outputs, batch, batch_idx",
    "on_validation_batch_start": "batch, batch_idx",
    "on_validation_batch_end": "outputs, batch, batch_idx",
    "on_before_zero_grad": "optimizer",
    "on_before_optimizer_step": "optimizer",
    "on_before_backward": "loss",
    "setup": "stage",
    "teardown": "stage",
    "on_save_checkpoint": "checkpoint",
}
"""Hook -> the arguments that it is called with; the others have none."""


class Plan:
    """The lines of a fit.

    Args:
        run: Composed, with its loaders there and with counters of its own.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rules = Rules(run)
        self.step = compose_step(run)
        self.owners = [owner for owner in (run.datamodule, run.module) if owner is not None]

    def lines(self) -> list[Node]:
        """Return all lines, outermost first."""
        run = self.run
        return [
            Node("set-up", body=[*self._set_up()]),
            *self._hooks("on_fit_start"),
            *self._sanity_check(),
            *self._loader(run.loaders.train),
            *(self._loader(run.loaders.val) if self._loads_validation_early() else ()),
            *self._hooks("on_train_start"),
            self._epochs(),
            *self._hooks("on_train_end"),
            *self._hooks("on_fit_end"),
            *self._own([run.datamodule, *run.callbacks, run.module], "teardown"),
        ]

    # ---------------------------------------------------------------- before and after the epochs

    def _set_up(self) -> Iterator[Node]:
        run = self.run
        yield from self._own([run.module], "configure_callbacks")
        yield from self._own([run.datamodule, run.module], "prepare_data")
        yield from self._own([run.datamodule, *run.callbacks, run.module], "setup")
        yield from self._own([run.module], "configure_model")
        found = [*run.optimizers, *(config.scheduler for config in run.schedulers)]
        names = ", ".join(type(each).__name__ for each in found) or "none"
        yield from self._own([run.module], "configure_optimizers", f"  -> {names}")

    def _sanity_check(self) -> Iterator[Node]:
        run, steps = self.run, self.run.settings.num_sanity_val_steps
        if not run.enable_validation or not steps:
            return
        limits = [min(steps, count) for count in run.loaders.val.num_batches]
        yield from self._hooks("on_sanity_check_start")
        yield from self._loader(run.loaders.val)
        if sum(run.loaders.val.batches_per_loader):
            yield Node("sanity check: nothing of it is logged or counted", body=[*self._evaluation(limits, False)])
        yield from self._hooks("on_sanity_check_end")

    # ---------------------------------------------------------------- epochs and batches

    def _epochs(self) -> Node:
        run = self.run
        most = run.loops.fit.max_epochs
        head = f"for epoch in range({most}):" if most is not None and most >= 0 else "for epoch in itertools.count():"
        max_steps = run.loops.fit.max_steps
        limit = f"max_steps={max_steps} or trainer.should_stop" if max_steps >= 0 else "trainer.should_stop"
        body = [
            *self._reloaded(),
            *self._hooks("on_train_epoch_start"),
            self._batches(),
            *self._hooks("on_train_epoch_end"),
            *self._schedulers("epoch", plateau=True, is_after=True),
            *self._loggers("values of the epoch"),
        ]
        return Node(f"{head}  # ends early at {limit}", counts=("epoch", lambda _: self.rules.num_epochs()), body=body)

    def _batches(self) -> Node:
        rules = self.rules
        count = rules.num_batches
        size = "until the data ends" if count == math.inf else f"{int(count)} batches"
        body = [
            *self._transfer(),
            *self._hooks("on_train_batch_start"),
            *(self._automatic() if isinstance(self.step, AutomaticStep) else self._manual()),
            *self._schedulers("step", plateau=False),
            *self._schedulers("epoch", plateau=False),
            *self._hooks("on_train_batch_end"),
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
            yield self._call(step.own_optimizer_step, "epoch, batch_idx, optimizer, closure", when)
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
        yield Node(text + note, module.training_step)
        if isinstance(self.step, AutomaticStep) and self.run.settings.accumulate_grad_batches != 1:
            yield Node("loss /= batches of the window")

    def _zero_grad(self, when: When) -> Iterator[Node]:
        assert isinstance(self.step, AutomaticStep)
        yield from self._hooks("on_before_zero_grad", when)
        if self.step.own_zero_grad is not None:
            yield self._call(self.step.own_zero_grad, "epoch, batch_idx, optimizer", when)
        else:
            yield Node("optimizer.zero_grad()", None, *when)

    def _backward(self) -> Iterator[Node]:
        run, precision = self.run, self.run.strategy.precision
        yield from self._hooks("on_before_backward")
        if type(precision).backward is not Precision.backward:
            yield Node(f"{type(precision).__name__}.backward(loss)")
        if has_own("backward", run.module, LightningModule):
            yield self._call(run.module.backward, "loss")
        else:
            scaled = " (scaled)" if precision.scaler is not None else ""
            reduces = "  # gradients are averaged over the processes" if run.strategy.is_distributed else ""
            yield Node(f"loss.backward(){scaled}{reduces}")
        yield from self._hooks("on_after_backward")

    def _before_step(self, when: When) -> Iterator[Node]:
        assert isinstance(self.step, AutomaticStep)
        yield from self._hooks("on_before_optimizer_step", when)
        if self.step.own_clipping is not None:
            yield self._call(self.step.own_clipping, "optimizer, gradient_clip_val, gradient_clip_algorithm", when)
        elif (clip_val := self.run.settings.gradient_clip_val) and clip_val > 0:
            kind = "value" if self.run.settings.gradient_clip_algorithm == "value" else "norm"
            yield Node(f"clip_grad_{kind}_(parameters, {clip_val})", None, *when)
        yield Node("the update of the parameters", None, *when)

    def _manual(self) -> Iterator[Node]:
        (node,) = self._training_step()
        node.body = [
            Node("where it calls self.manual_backward(loss):", body=[*self._backward()]),
            Node("where it calls optimizer.step():", body=[*self._hooks("on_before_optimizer_step")]),
        ]
        yield node

    def _stepper(self) -> str:
        strategy, precision = self.run.strategy, self.run.strategy.precision
        if type(precision).optimizer_step is not Precision.optimizer_step:
            return f"{type(precision).__name__} (unscales first, skips the update where a gradient is inf)"
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
                yield self._call(run.module.lr_scheduler_step, f"{name}, {argument or None}", when)
            else:
                yield Node(f"{name}.step({argument})", None, *when)

    # ---------------------------------------------------------------- validation

    def _validation(self) -> list[Node]:
        run, rules = self.run, self.rules
        if not run.enable_validation:
            return []
        unless = When(lambda place: not rules.accumulates(place), "unless gradients are being added up")
        frees_when = unless if run.settings.accumulate_grad_batches != 1 else ALWAYS
        body = [
            self._call(run.module.on_validation_model_zero_grad, "", frees_when),
            *self._reloaded_validation(),
            *(self._evaluation(run.loaders.val.num_batches, True) if sum(run.loaders.val.batches_per_loader) else ()),
        ]
        if run.settings.val_check_seconds is not None:
            clock = str(timedelta(seconds=run.settings.val_check_seconds))
            return [Node(f"validation:  # after the first batch that ends {clock} after the one before", body=body)]
        when = self._rule(rules.validates)
        return [Node("validation:", None, *when, body=body)] if when.words else []

    def _evaluation(self, counts: list[int | float], logs: bool) -> Iterator[Node]:
        run, module = self.run, self.run.module
        yield Node(f"{type(module).__name__}.on_validation_model_eval()", module.on_validation_model_eval)
        yield from self._hooks("on_validation_start")
        yield from self._hooks("on_validation_epoch_start")
        total = sum(counts)
        size = "until the data ends" if total == math.inf else f"{int(total)} batches"
        compose_evaluation_step(run, "validation", len(counts))  # says where its signature does not fit
        arguments = "batch, batch_idx, dataloader_idx" if len(counts) > 1 else "batch, batch_idx"
        body = [
            *self._transfer(),
            *self._hooks("on_validation_batch_start"),
            Node(f"{type(module).__name__}.validation_step({arguments})", module.validation_step),
            *self._hooks("on_validation_batch_end"),
        ]
        times = 0 if total == math.inf else int(total)
        head = f"for batch in val_dataloaders:  # {size}, in torch.no_grad()"
        yield Node(head, counts=("validation batch", lambda _: times), body=body)
        yield from self._hooks("on_validation_epoch_end")
        if logs and total:
            yield from self._loggers("values of the validation")
        yield from self._hooks("on_validation_end")
        if has_hook(module, "on_validation_model_train"):
            yield self._call(module.on_validation_model_train, "")
        else:
            yield Node("each submodule back into its own train or eval mode")

    # ---------------------------------------------------------------- parts

    def _hooks(self, name: str, when: When = ALWAYS) -> list[Node]:
        """The functions of the hook table under ``name``, in their order."""
        return [self._call(hook, _ARGUMENTS.get(name, ""), when) for hook in self.run.hooks[name]]

    def _own(self, owners: list[object], name: str, note: str = "") -> Iterator[Node]:
        """The methods ``name`` that somebody wrote, of those who are asked outside of the hook table."""
        for owner in owners:
            if owner is None:
                continue
            parent = next(kind for kind in (Callback, LightningModule, LightningDataModule) if isinstance(owner, kind))
            if has_own(name, owner, parent):
                yield self._call(getattr(owner, name), _ARGUMENTS.get(name, ""), note=note)

    def _loader(self, loaders: StageLoaders, when: When = ALWAYS) -> Iterator[Node]:
        if loaders.owner is not None:
            yield self._call(getattr(loaders.owner, loaders.hook), "", when)

    def _reloaded(self) -> Iterator[Node]:
        every = self.run.settings.reload_dataloaders_every_n_epochs
        if every:
            words = f"every {every} epochs" if every > 1 else "after the first"
            due = When(lambda place: place.epoch > 0 and place.epoch % every == 0, words)
            yield from self._loader(self.run.loaders.train, due)

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
            yield from self._loader(self.run.loaders.val, When(lambda place: place in places, words))

    def _transfer(self) -> Iterator[Node]:
        owners = transfer_owners(self.owners)
        precision, device = self.run.strategy.precision, self.run.strategy.root_device
        if type(precision).convert_input is not Precision.convert_input:
            yield Node(f"{type(precision).__name__}.convert_input(batch)")
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            arguments = "batch, device, dataloader_idx" if name.startswith("transfer") else "batch, dataloader_idx"
            if name in owners:
                yield self._call(getattr(owners[name], name), arguments)
            elif name.startswith("transfer"):
                yield Node(f"batch.to({str(device)!r})")

    def _rule(self, due: Callable[[Place], bool]) -> When:
        return When(due, self.rules.words(due))

    def _loggers(self, what: str, due: Optional[Callable[[Place], bool]] = None) -> list[Node]:
        """What goes to the loggers, where there are values."""
        when = ALWAYS if due is None else self._rule(due)
        if due is not None and not when.words:
            return []
        return [self._call(logger.log_metrics, what, when) for logger in self.run.loggers]

    @staticmethod
    def _call(function: Function, arguments: str, when: When = ALWAYS, note: str = "") -> Node:
        inner = unbound(function)
        owner = getattr(inner, "__self__", None)
        name = inner.__name__ if owner is None else f"{type(owner).__name__}.{inner.__name__}"
        return Node(f"{name}({arguments}){note}", function, *when)

    def left_out(self) -> list[str]:
        """Return the hooks that a run would call and that nobody wrote."""
        has_validation = self.run.enable_validation
        names = [
            name
            for name in RUN_HOOKS
            if not self.run.hooks[name] and "test" not in name and "predict" not in name
            and (has_validation or not ("validation" in name or "sanity" in name))
        ]  # fmt: skip
        owners = transfer_owners(self.owners)
        names += [name for name in vars(DataHooks) if "transfer" in name and name not in owners]
        own = ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "backward", "lr_scheduler_step")
        if self.run.loggers and not self.rules.words(self.rules.logs):
            names.append(f"log_metrics of a step (log_every_n_steps={self.run.settings.log_every_n_steps})")
        return names + [name for name in own if not has_own(name, self.run.module, LightningModule)]
