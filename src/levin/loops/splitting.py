"""``Trainer(accumulate_grad_batches="auto")``: a batch that does not fit into memory goes through in parts.

Forward and backward of the parts run inside of what the strategy calls as ``training_step``, so that all that is around it
sees one batch: it gets one loss, tied to the gradients of the parts. Its backward is what DistributedDataParallel waits for,
which reduces gradients as often as ever, however many parts this rank or another has.

Where memory is full the whole batch is begun again, in parts of half the size: what it had logged was only noted, and
buffers and metrics are put back. The size that fits is kept for the batches that follow, and in checkpoints.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from levin.log_store import resolve_reduction
from levin.loops.compiled import has_gradient_hooks
from levin.loops.run import Run
from levin.module import LightningModule
from levin.resume.metric_states import collect_metric_states, load_metric_states
from levin.strategies import microbatches
from levin.strategies.ddp import DDPStrategy
from levin.utilities.collections import apply_to_collection, leaves
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.memory import free_memory, is_oom_error
from levin.utilities.overrides import has_own
from levin.utilities.rank_zero import rank_prefixed_message
from levin.utilities.types import Batch, Function, Kwargs, StateDict

log = logging.getLogger("levin")


def check_splitting(run: Run) -> None:
    """Raise where batches cannot go through in parts.

    Raises:
        MisconfigurationException: Part of the run needs whole batches.
    """
    module, strategy = run.module, run.strategy
    reasons = {
        "manual optimization, which runs backward itself": not module.automatic_optimization,
        "a `training_step` that takes batches from `dataloader_iter`": "dataloader_iter"
        in inspect.signature(module.training_step).parameters,
        "a `backward` of the module's own": has_own("backward", module, LightningModule),
        "gradient hooks on parameters, which would see parts": has_gradient_hooks(module),
        f"{type(strategy).__name__}, whose processes meet in forward": strategy.is_distributed
        and not isinstance(strategy, DDPStrategy),
        "batch norms whose processes meet in forward": strategy.is_distributed
        and any(isinstance(part, torch.nn.SyncBatchNorm) for part in module.modules()),
        "precision='16-mixed', which scales the loss of the batch": strategy.precision.precision == "16-mixed",
        "Trainer(compile=...), which compiles whole steps; compile='blocks' is possible": run.compiler is not None
        and not run.compiler.only_blocks,
        "LBFGS, which computes the loss of a step many times": any(
            isinstance(optimizer, torch.optim.LBFGS) for optimizer in run.optimizers
        ),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches='auto') splits batches, which is not possible with {reason}. Use a number."
            )


class Splitting:
    """Stands in for a module's ``training_step``.

    Args:
        run: Whose module.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._step: Function = run.module.training_step
        self._log: Function = run.module.log
        self._log_signature = inspect.signature(getattr(type(run.module), "log"))  # noqa: B009  # a user may have a log of their own
        self.part_size: Optional[int] = None
        """Of the largest part that fits, in samples; None while whole batches do."""

    def compose(self) -> Function:
        """Return what the strategy makes of this in the place of ``training_step``."""
        module, strategy = self._run.module, self._run.strategy
        attributes = vars(module)
        before = {name: step for name, step in attributes.items() if name == "training_step"}  # one put on the object
        attributes["training_step"] = self
        try:
            return strategy.step_function(strategy.model, "training_step")
        finally:
            del attributes["training_step"]
            attributes.update(before)

    def state_dict(self) -> StateDict:
        """Return the size of parts, on which the last digits of a sum depend."""
        return {} if self.part_size is None else {"part_size": self.part_size}

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        self.part_size = state.get("part_size")

    def __call__(self, batch: Batch, *args: object) -> object:
        """Return what ``training_step`` returns, with the loss of all parts."""
        module = self._run.module
        buffers = [buffer.detach().clone() for buffer in module.buffers()]
        metrics = apply_to_collection(collect_metric_states(module), Tensor, torch.clone)
        while True:
            parts, largest = self._parts(batch)
            try:
                return self._through(parts, args)
            except (RuntimeError, MemoryError) as error:
                if not is_oom_error(error) or largest < 2:
                    raise
            # Only here nothing holds what the attempt has made.
            self.part_size = math.ceil(largest / 2)
            for buffer, before in zip(module.buffers(), buffers):
                buffer.copy_(before)
            load_metric_states(module, apply_to_collection(metrics, Tensor, torch.clone))
            free_memory()
            message = f"{largest} samples do not fit into memory. Batches go through in parts of {self.part_size} now."
            log.info(rank_prefixed_message(message, self._run.strategy.global_rank))

    def _parts(self, batch: Batch) -> tuple[list[Batch], int]:
        """Return the batch in parts, and the number of samples of the largest; 1 where it cannot be split."""
        size = num_samples(batch)
        if size < 2 or self.part_size is None or size <= self.part_size:
            return [batch], size
        return microbatches.split(batch, self.part_size, size), self.part_size

    def _through(self, parts: list[Batch], args: tuple[object, ...]) -> object:
        """Run forward and backward of each part, log, and return the output of all."""
        run, trained = self._run, [p for p in self._run.module.parameters() if p.requires_grad]
        # Those of an open window; what is left of the step before is let go of at once.
        held = [p.grad if run.settings.accumulate_grad_batches != 1 else None for p in trained]
        done: list[_Part] = []
        for parameter in trained:
            parameter.grad = None
        try:
            for part in parts:
                done.append(self._run_part(part, args))
                if done[-1].loss is not None:
                    loss = done[-1].loss if len(parts) == 1 else done[-1].loss * done[-1].weight
                    with torch.autocast(run.strategy.root_device.type, enabled=False):
                        loss.backward()
                    done[-1].loss = done[-1].loss.detach()
        finally:
            gradients = [p.grad for p in trained]
            for parameter, gradient in zip(trained, held):
                parameter.grad = gradient
        for call in done[0].calls if len(parts) == 1 else _merged_calls(done):
            self._log(**call)
        counted = [part for part in done if part.loss is not None]
        if not counted:
            return done[-1].output
        total = 1 if len(parts) == 1 else sum(part.weight for part in counted)
        value = counted[0].loss if len(parts) == 1 else sum(part.loss * part.weight for part in counted) / total
        used = [(p, gradient) for p, gradient in zip(trained, gradients) if gradient is not None]
        tied = microbatches.tied(value, [gradient for _, gradient in used], total, [p for p, _ in used])
        return _merged_outputs(counted, tied)

    def _run_part(self, part: Batch, args: tuple[object, ...]) -> _Part:
        """Run ``training_step`` on a part; what it logs is noted."""
        calls: list[Kwargs] = []

        def note(*given: object, **named: object) -> None:
            call = self._log_signature.bind(self._run.module, *given, **named).arguments
            value = call["value"]
            call["value"] = value.detach().clone() if isinstance(value, Tensor) else value
            calls.append(dict(list(call.items())[1:]))

        attributes = vars(self._run.module)
        attributes["log"] = note
        try:
            output = self._step(part, *args)
        finally:
            del attributes["log"]
        loss = output.get("loss") if isinstance(output, Mapping) else output
        size = num_samples(part)
        weight = output.get("weight", size) if isinstance(output, Mapping) else size
        # One without a graph is told of where backward begins.
        return _Part(output, loss if isinstance(loss, Tensor) and loss.requires_grad else None, weight, size, calls)


@dataclass
class _Part:
    """What came of one part of a batch."""

    output: Any
    loss: Any  # a tensor; None where there is nothing to go back through
    weight: Any
    size: int
    calls: list[Kwargs]


def num_samples(batch: Batch) -> int:
    """Return the size of the first dimension that all tensors of a batch have in common; 1 where they have none.

    Example:
        >>> num_samples({"x": torch.zeros(4, 2), "y": torch.zeros(4), "scale": torch.tensor(2.0)})
        4
    """
    sizes = {len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    return sizes.pop() if len(sizes) == 1 else 1


def _merged_calls(parts: list[_Part]) -> list[Kwargs]:
    """Return one call of ``self.log`` for each name; means are by samples."""
    objects: dict[str, Kwargs] = {}
    numbers: list[list[Kwargs]] = []
    given: set[str] = set()
    for part in parts:
        numbers.append([])
        for call in part.calls:
            if isinstance(call["value"], (int, float, Tensor)):
                given |= {call["name"]} if call.get("batch_size") is not None else set()
                reduction = resolve_reduction(call["name"], call.get("reduce_fx", "mean"))
                numbers[-1].append({"batch_size": part.size, **call, "reduce_fx": reduction})
            else:
                objects[call["name"]] = call  # a metric has seen all parts
    merged = microbatches.merge_logged(numbers)
    for call in merged:
        if call["name"] not in given:
            del call["batch_size"]
    return [*merged, *objects.values()]


def _merged_outputs(parts: list[_Part], loss: Tensor) -> object:
    """Return the output of all parts: tensors of samples in one, of all else that of the last part."""
    last = parts[-1].output
    if not isinstance(last, Mapping):
        return loss
    merged: StateDict = {**last, "loss": loss}
    for key, value in last.items():
        if key == "weight":
            merged[key] = sum(part.weight for part in parts)
        elif key != "loss" and isinstance(value, Tensor) and value.dim() and len(value) == parts[-1].size:
            merged[key] = torch.cat([part.output[key].detach() for part in parts])
    return merged
