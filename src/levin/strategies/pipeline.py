"""The stages of a pipeline at work: ``training_step`` and forward passes of a module whose layers lie on several processes.

Underneath are torch's schedules. The user's ``training_step`` stays as it is; for each part of a batch it runs on every
process, each time for the part of one stage (see :mod:`levin.strategies.replay`)::

    all           schedule.step: forward and backward of all parts
    each stage    in it: training_step(part) from what it received to what the next stage receives
    last stage    training_step(part) from what it received to the loss
    all           the loss and what was logged come from the last stage; the gradients wait for ``loss.backward()``

Source: https://docs.pytorch.org/docs/stable/distributed.pipelining.html
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.distributed.tensor import DTensor
from torch.nn import Module, ModuleList
from torch.utils._pytree import tree_leaves, tree_map

from levin.strategies import collectives, microbatches
from levin.strategies.gathered import as_step
from levin.strategies.replay import Announced, ReachedError, Replay, needs_values
from levin.strategies.stages import PipelinePlan
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Batch, Function, Group, Kwargs

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B,
}  # fmt: skip


def check_cpu() -> None:
    """Raise where torch's stages cannot find each other over Gloo: in 2.9 they greet with numbers of different sizes.

    Raises:
        MisconfigurationException: Use a newer torch.
    """
    if not hasattr(PipelineStage, "_warmup_forward_vote"):
        raise MisconfigurationException(
            f"A pipeline on the CPU needs a newer torch (2.13 does it), received torch {torch.__version__}. Install one, or use an "
            "accelerator."
        )


class Stage(Module):
    """What FSDP and torch's schedules take for the module of a stage.

    Args:
        parts: The modules that hold its parameters.
        compute: Takes the number of a part of a batch and what was received, and returns what is sent.
    """

    def __init__(self, parts: list[Module], compute: Callable[[int, tuple[Tensor, ...]], Any]) -> None:
        super().__init__()
        self.parts = ModuleList(parts)
        self._compute = compute

    def forward(self, *received: Tensor, number: Tensor) -> Any:
        """Run the code of the user's for this stage."""
        return self._compute(int(number), received)


@dataclass
class _Step:
    """One training step under way: its parts, and what came of them in the last stage."""

    parts: list[Batch]
    arguments: tuple[object, ...]
    seed: int
    calls: dict[int, list[Kwargs]] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Any] = field(default_factory=dict)


@dataclass
class _Evaluation:
    """A forward pass under way: the parts of what the module was called with, and what came of them in the last stage."""

    parts: list[tuple[Any, Any]]
    seed: int
    outputs: dict[int, Any] = field(default_factory=dict)


class _Whole:
    """Told in the place of an output that is not made of one for each part of the batch, such as a loss."""


def local_of(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Pipeline:
    """The stages of this process, between those of the others.

    Args:
        plan: How the module is cut.
        module: The user's module, of which the parameters of other stages are left out.
        body: Its submodule that holds all layers; its ``forward`` becomes that of all stages.
        replay: Runs the user's code for one stage.
        stages: The modules with the parameters of each stage of this process, in their order.
        group: The processes that share the layers.
        data_group: The processes that share the weights of these stages; None for no others.
        shared: Names of the parameters that stages of other processes have, too, and the group of these processes.
        device: Of this process.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        module: Module,
        body: str,
        replay: Replay,
        stages: Sequence[list[Module]],
        group: Group,
        data_group: Group,
        shared: Mapping[str, Group],
        device: torch.device,
    ) -> None:
        assert group is not None
        self.plan, self.module, self.body, self.replay = plan, module, body, replay
        self.group, self.data_group, self.shared = group, data_group, shared
        self.device = device
        self.rank: int = dist.get_rank(group)
        self.is_first: bool = self.rank == 0
        self.is_last: bool = self.rank == plan.size - 1
        self.numbers = [self.rank + plan.size * place for place in range(len(stages))]
        self.stages = [
            Stage(parts, partial(self._compute, number)) for number, parts in zip(self.numbers, stages, strict=True)
        ]
        self._last_rank = dist.get_global_rank(group, plan.size - 1)
        # For training and for evaluation: the shapes that the schedule is for, its number of parts, what each stage lacks
        # where it begins, and the schedule.
        self._ways: dict[bool, tuple[object, int, list[list[Announced]], Any]] = {}
        self._evaluates_whole: bool = False  # its output has no entry for each sample
        self._work: _Step | _Evaluation | None = None
        self._lacks: list[list[Announced]] = []
        self._log_signature = inspect.signature(getattr(type(module), "log"))  # noqa: B009  # of a class below this room
        self._run_user_step: Function | None = None
        owner = module.get_submodule(body)
        self._forward: Function = owner.forward
        vars(owner)["forward"] = self._called
        # What one process draws, all do, so that their random numbers stay the same; see `training_step`.
        state = [torch.get_rng_state()]
        dist.broadcast_object_list(state, src=dist.get_global_rank(group, 0), group=group)
        torch.set_rng_state(state[0])

    # Training

    def training_step(self, step: Function) -> Function:
        """Return ``training_step`` for whole batches, whose loss comes with its gradients; see above.

        Args:
            step: The user's.
        """
        self._run_user_step = step
        return as_step(self.module, self._train)

    def _train(self, batch: Batch, *arguments: object) -> object:
        size = microbatches.size_of(batch)
        num_parts, is_new = self._num_parts(microbatches.shapes_of(batch), size, is_training=True)
        # Each process draws this one number, and the rest apart from its own: so all go on with the same.
        step = _Step(microbatches.split(batch, size // num_parts, size), arguments, seed=int(torch.randint(2**62, ())))
        parameters = [p for stage in self.stages for p in stage.parameters() if p.requires_grad]
        held = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            self._go_through(step, microbatches.shapes_of(batch), is_new, is_training=True)
            self._add_up_shared()
        finally:
            gradients = [p.grad for p in parameters]
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient
        value, weight, num, calls = self._told_by_last(step)
        log: Any = self.module.log
        for call in calls:
            log(**call)
        loss = microbatches.tied(value.to(self.device), gradients, num if weight is None else weight, parameters)
        return loss if weight is None else {"loss": loss, "weight": weight}

    def _add_up_shared(self) -> None:
        """Add the gradients of all stages that have a parameter, so that each steps it alike."""
        for name, group in self.shared.items():
            parameter = self.module.get_parameter(name)
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(local_of(parameter.grad), group=group)

    def _run_part(self, step: _Step, number: int) -> object:
        """Run ``training_step`` on one part of the batch; what it logs is kept for later."""
        assert self._run_user_step is not None
        calls = step.calls[number] = []

        def log(*args: object, **kwargs: object) -> None:
            call = dict(list(self._log_signature.bind(self.module, *args, **kwargs).arguments.items())[1:])
            if self.is_last and self.replay.has_begun:
                self._check_values(f"self.log({call['name']!r}, ...)", call["value"])
            calls.append(call)

        attributes = vars(self.module)
        attributes["log"] = log
        try:
            return self._run_user_step(step.parts[number], *step.arguments)
        finally:
            del attributes["log"]

    def _loss_of(self, step: _Step, number: int, result: Any) -> Tensor:
        """Return the loss of one part of the batch, out of what ``training_step`` returned in the last stage."""
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                f"`training_step` in a pipeline must return the loss, or a dict with it under 'loss', received {result!r}."
            )
        self._check_values("the loss", loss)
        if isinstance(result, Mapping) and "weight" in result:
            step.weights[number] = result["weight"]
            loss = loss * result["weight"]
        step.losses[number] = loss.detach()
        return loss

    def _told_by_last(self, step: _Step) -> tuple[Tensor, Any, int, list[Kwargs]]:
        """Return the loss, its weight if the user gave one, the number of parts, and what is to be logged."""
        told: list[Any] = [None]
        if self.is_last:
            weight = sum(step.weights.values()) if step.weights else None
            num = len(step.losses)
            value = torch.stack([step.losses[number] for number in range(num)]).sum() / (
                num if weight is None else weight
            )
            calls = microbatches.merge_logged([step.calls[number] for number in range(num)])
            told = [(value.cpu(), weight.cpu() if isinstance(weight, Tensor) else weight, num, calls)]
        dist.broadcast_object_list(told, src=self._last_rank, group=self.group)
        value, weight, num, calls = told[0]
        return value, weight.to(self.device) if isinstance(weight, Tensor) else weight, num, calls

    def _check_values(self, name: str, result: Any) -> None:
        if self.replay.has_no_values(result):
            raise self.replay.needs_value(self.plan.num_stages - 1, f"for {name}")

    # Forward passes

    def evaluation_step(self, step: Function) -> Function:
        """Return a step that says what it is to call where it calls layers by themselves."""

        def run(*args: object) -> object:
            try:
                return step(*args)
            except (RuntimeError, AssertionError) as error:
                if not needs_values(error):
                    raise
                called = f"self.{self.body}(x)" if self.body else "self(x)"
                raise MisconfigurationException(
                    f"A step of {type(self.module).__name__} calls layers of a pipeline by themselves, and this process has a part of "
                    f"them. Call {called}, which runs all of them, in all steps but `training_step`."
                ) from error

        return run

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the ``forward`` of the module that holds the layers."""
        return (self._forward if self.replay.is_under_way else self._evaluate)(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the last stage, in all processes, which call this together with the same inputs."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The layers of a pipeline were called outside of `training_step` with gradients. Call them in `training_step`, "
                "or under torch.no_grad() on all processes."
            )
        size = microbatches.size_of((args, kwargs))
        shapes = microbatches.shapes_of((args, kwargs))
        num_parts, is_new = self._num_parts(shapes, size, is_training=False)
        work = _Evaluation(
            microbatches.split((args, kwargs), size // num_parts, size), seed=int(torch.randint(2**62, ()))
        )
        self._go_through(work, shapes, is_new, is_training=False)
        told: list[Any] = [None]
        if self.is_last:
            outputs = [work.outputs[number] for number in range(num_parts)]
            if microbatches.are_of_samples(outputs, size):
                output = microbatches.merge_outputs(outputs)
                told = [tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, output)]
            else:
                told = [_Whole()]
        dist.broadcast_object_list(told, src=self._last_rank, group=self.group)
        if isinstance(told[0], _Whole):
            self._evaluates_whole = True
            return self._evaluate(*args, **kwargs)
        if not self.is_last:
            output = tree_map(
                lambda leaf: torch.empty_like(leaf, device=self.device) if isinstance(leaf, Tensor) else leaf, told[0]
            )
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                dist.broadcast(leaf, src=self._last_rank, group=self.group)
        return output

    # What they share

    def _num_parts(self, shapes: object, size: int, is_training: bool) -> tuple[int, bool]:
        """Return the number of parts of a batch of these shapes, and whether another schedule is needed than for the last."""
        num_parts = 1 if self._evaluates_whole and not is_training else math.gcd(size, self.plan.parts)
        known_shapes, known_parts, *_ = self._ways.get(is_training, (None, 0))
        is_new = shapes != known_shapes
        if self.data_group is not None:
            # Each part, and the trial of a new schedule, gathers weights: all who share these do as much.
            told = collectives.all_gather(
                torch.tensor([num_parts, is_new]), self.data_group, device=self.device
            ).tolist()
            num_parts, is_new = math.gcd(*(num for num, _ in told)), any(new for _, new in told)
        return num_parts, is_new or num_parts != known_parts

    def _go_through(self, work: _Step | _Evaluation, shapes: object, is_new: bool, is_training: bool) -> None:
        """Send all parts through all stages, and back where there are gradients."""
        num_parts = len(work.parts)
        self._work = work
        try:
            if is_new:
                lacks = self._announced(work)
                self._ways[is_training] = shapes, num_parts, lacks, self._new_schedule(num_parts, lacks, is_training)
            _, _, self._lacks, schedule = self._ways[is_training]
            numbers = torch.arange(num_parts)
            schedule.step(
                *((numbers,) if self.is_first else ()),
                number=numbers,
                **({"target": numbers} if self.is_last and is_training else {}),
            )
        except RuntimeError as error:
            if error.__cause__ is None or "failed to run forward" not in str(error):
                raise
            # That of the user's code, which torch wraps.
            cause = error.__cause__
        else:
            return
        finally:
            self._work = None
        raise cause

    def _compute(self, stage: int, number: int, received: tuple[Tensor, ...]) -> Any:
        """Run the user's code on one part for one stage, and return what the next one receives."""
        work = self._work
        assert work is not None

        def enter() -> None:
            # What comes before the layers of a stage draws the same numbers in all stages, and they draw others. Of a seed
            # the generator of the CPU takes the last 32 bits.
            torch.manual_seed(work.seed + number + (stage << 20))

        is_last = stage == self.plan.num_stages - 1
        wanted = [] if is_last else self._lacks[stage + 1]
        with self._drawing(work.seed + number):
            try:
                result = self.replay.run(stage, self._code(work, number), received, wanted, enter)
            except ReachedError as reached:
                return tuple(reached.tensors)
        if not is_last:
            raise self.replay.not_called(stage + 1)
        if isinstance(work, _Step):
            return torch.stack([self._loss_of(work, number, result)])  # no view, of which FSDP warns
        self._check_values("its output", result)
        work.outputs[number] = result
        return torch.zeros(1, device=self.device)

    def _code(self, work: _Step | _Evaluation, number: int) -> Function:
        if isinstance(work, _Step):
            return partial(self._run_part, work, number)
        args, kwargs = work.parts[number]
        return partial(self._forward, *args, **kwargs)

    def _announced(self, work: _Step | _Evaluation) -> list[list[Announced]]:
        """Return what each stage lacks where it begins, found out by each process for its own with the first part."""
        told: list[Any] = [None] * self.plan.size
        error: Exception | None = None
        own: list[list[Announced]] = []
        try:
            with self._drawing(work.seed):
                own = [self.replay.lacks(number, self._code(work, 0)) for number in self.numbers]
        except Exception as raised:  # raised below, when all know of it
            error = raised
        dist.all_gather_object(told, str(error) if error is not None else own, group=self.group)
        if error is not None:
            raise error
        for found in told:
            if isinstance(found, str):
                raise MisconfigurationException(found)
        return [told[number % self.plan.size][number // self.plan.size] for number in range(self.plan.num_stages)]

    def _new_schedule(self, num_parts: int, lacks: list[list[Announced]], is_training: bool) -> Any:
        plan = self.plan

        def like(stage: int) -> tuple[Tensor, ...]:
            return tuple(
                torch.empty(shape, dtype=dtype, device="meta", requires_grad=is_training and dtype.is_floating_point)
                for _, shape, dtype in lacks[stage]
            )

        parts: list[Any] = [
            PipelineStage(
                stage,
                number,
                plan.num_stages,
                self.device,
                input_args=like(number) if number else (torch.zeros(1, dtype=torch.int64),),
                output_args=like(number + 1) if number + 1 < plan.num_stages else (torch.zeros(1),),
                group=self.group,
            )
            for number, stage in zip(self.numbers, self.stages, strict=True)
        ]
        loops = plan.schedule == "interleaved"
        kind: Any = ScheduleLoopedBFS if loops else ScheduleGPipe
        if is_training and num_parts % plan.size == 0:
            kind = _SCHEDULES[plan.schedule]
        return kind(
            parts if loops else parts[0],
            num_parts,
            loss_fn=(lambda loss, _: loss.sum()) if is_training else None,
            scale_grads=False,
        )

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        """Draw random numbers apart from those of this process."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
