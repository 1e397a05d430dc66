"""The stages of a pipeline at work: ``training_step`` and forward passes of a module whose layers lie on several processes.

Underneath are torch's schedules. The user's ``training_step`` stays as it is; for each part of a batch it runs twice, in
part: on the first process up to the call of the layers, which gives their input, and on the last one as a whole, where that
call gives the output that has come through all stages. So it is the loss of the schedule::

    first stage   training_step(part) -> input
    all           schedule.step: forward and backward of all parts
    last stage    in it, after each forward: training_step(part) -> loss
    all           the loss and what was logged come from the last stage; the gradients wait for ``loss.backward()``

Source: https://docs.pytorch.org/docs/stable/distributed.pipelining.html
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
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
from torch.nn import Module, ModuleList, Sequential

from levin.strategies import collectives, microbatches
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
    """The layers of one stage.

    Args:
        layers: In the order in which they run.
        context: The number format around them.
    """

    def __init__(self, layers: list[Module], context: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.layers = ModuleList(layers)
        self._context = context

    def forward(self, *inputs: Any) -> Any:
        """Run the layers."""
        result: Any = inputs[0] if len(inputs) == 1 else inputs
        with self._context():
            for layer in self.layers:
                result = layer(result)
        return result


class _ReachedError(BaseException):
    """The layers were called: nothing of ``training_step`` after that runs in the first stage. No ``except`` may hold it."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs


@dataclass
class _Step:
    """One training step under way: its parts, and what came of them in the last stage."""

    parts: list[Batch]
    arguments: tuple[object, ...]
    seed: int
    calls: dict[int, list[Kwargs]] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Any] = field(default_factory=dict)


class _Computed(torch.autograd.Function):
    """Ties gradients that are there already to a loss: backward hands them on, times the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, loss: Tensor, gradients: list[Tensor | None], total: Any, *parameters: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.total = gradients, total
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        factor = grads[0] / ctx.total
        found = [None if gradient is None else gradient.mul_(factor) for gradient in ctx.gradients]
        return None, None, None, None, *found


class Pipeline:
    """The stages of this process, between those of the others.

    Args:
        plan: How the module is cut.
        module: The user's module, of which the layers of other stages are left out.
        chain: Its submodule that the layers belong to; its ``forward`` becomes that of all stages.
        stages: Those of this process, in their order.
        group: The processes that share the layers.
        data_group: The processes that share the weights of these stages; None for no others.
        device: Of this process.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        module: Module,
        chain: Sequential,
        stages: list[Stage],
        group: Group,
        data_group: Group,
        device: torch.device,
    ) -> None:
        assert group is not None
        self.plan, self.module, self.stages = plan, module, stages
        self.group, self.data_group = group, data_group
        self.device = device
        self.rank: int = dist.get_rank(group)
        self.is_first: bool = self.rank == 0
        self.is_last: bool = self.rank == plan.size - 1
        self._last_rank = dist.get_global_rank(group, plan.size - 1)
        # For training and for evaluation: the shapes that the schedule is for, its number of parts, and the schedule.
        self._ways: dict[bool, tuple[object, int, Any]] = {}
        self._step: _Step | None = None
        # What a call of the layers gives; the forward pass of all stages where no training step is under way.
        self._answer: Callable[..., Any] | None = None
        self._log_signature = inspect.signature(getattr(type(module), "log"))  # noqa: B009  # of a class below this room
        self._run_user_step: Function | None = None
        vars(chain)["forward"] = self._called
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
        return self._train

    def _train(self, batch: Batch, *arguments: object) -> object:
        size = microbatches.size_of(batch)
        schedule, num_parts = self._schedule(microbatches.shapes_of(batch), size, is_training=True)
        parts = microbatches.split(batch, num_parts, size)
        # Each process draws this one number, and the rest apart from its own: so all go on with the same.
        step = _Step(parts, arguments, seed=int(torch.randint(2**62, ())))
        parameters = [p for stage in self.stages for p in stage.parameters() if p.requires_grad]
        held = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._step = step
        try:
            given = (torch.cat([self._input_of(number) for number in range(num_parts)]),) if self.is_first else ()
            with self._drawing(step.seed - 1 - self.rank):
                schedule.step(*given, **({"target": torch.arange(num_parts)} if self.is_last else {}))
        finally:
            self._step = None
            gradients = [p.grad for p in parameters]
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient
        value, weight, num, calls = self._told_by_last(step)
        log: Any = self.module.log
        for call in calls:
            log(**call)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        tie: Function = _Computed.apply
        loss = tie(anchor, value.to(self.device), gradients, num if weight is None else weight, *parameters)
        return loss if weight is None else {"loss": loss, "weight": weight}

    def _input_of(self, number: int) -> Tensor:
        """Return what ``training_step`` gives to the layers for one part of the batch."""

        def reached(*inputs: Any) -> None:
            raise _ReachedError(inputs)

        try:
            self._run_part(number, reached)
        except _ReachedError as call:
            if len(call.inputs) == 1 and isinstance(call.inputs[0], Tensor):
                return call.inputs[0]
            raise MisconfigurationException(
                f"The layers of a pipeline take one tensor, received {', '.join(type(i).__name__ for i in call.inputs)}."
            ) from None
        raise self._not_called()

    def _loss_of(self, output: Any, target: Tensor) -> Tensor:
        """Return the loss of one part of the batch, out of what came through all stages."""
        step, number = self._step, int(target)
        assert step is not None
        if number not in self._last_stage.fwd_cache:
            # torch tries out the shapes of gradients with values of its own.
            return sum(
                (part.sum() for part in (output if isinstance(output, tuple) else (output,))), start=torch.zeros(())
            )
        answers = [output]

        def answer(*_: object) -> Any:
            if not answers:
                raise MisconfigurationException(
                    "`training_step` called the layers of a pipeline twice. Call them once."
                )
            return answers.pop()

        result: Any = self._run_part(number, answer)
        if answers:
            raise self._not_called()
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                f"`training_step` in a pipeline must return the loss, or a dict with it under 'loss', received {result!r}."
            )
        if isinstance(result, Mapping) and "weight" in result:
            step.weights[number] = result["weight"]
            loss = loss * result["weight"]
        step.losses[number] = loss.detach()
        return loss

    def _run_part(self, number: int, answer: Callable[..., Any]) -> object:
        """Run ``training_step`` on one part of the batch; what it logs is kept for later."""
        assert self._step is not None and self._run_user_step is not None
        step, self._answer = self._step, answer
        calls = step.calls[number] = []

        def log(*args: object, **kwargs: object) -> None:
            calls.append(dict(list(self._log_signature.bind(self.module, *args, **kwargs).arguments.items())[1:]))

        attributes = vars(self.module)
        attributes["log"] = log
        try:
            # What comes before the layers draws the same numbers in the first and in the last stage.
            with self._drawing(step.seed + number):
                return self._run_user_step(step.parts[number], *step.arguments)
        finally:
            self._answer = None
            del attributes["log"]

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

    # Forward passes

    def _called(self, *inputs: Any, **kwargs: Any) -> Any:
        """Stand in for the ``forward`` of the layers."""
        if kwargs:
            raise MisconfigurationException(
                f"The layers of a pipeline take their input by position, received {', '.join(kwargs)}. Call self.net(x)."
            )
        return (self._answer or self._forward)(*inputs)

    def _forward(self, inputs: Tensor) -> Any:
        """Return the output of the last stage, in all processes, which call this together with the same inputs."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The layers of a pipeline were called outside of `training_step` with gradients. Call them in `training_step`, "
                "or under torch.no_grad() on all processes."
            )
        schedule, _ = self._schedule(microbatches.shapes_of(inputs), len(inputs), is_training=False)
        output = schedule.step(inputs) if self.is_first else schedule.step()
        told: list[Any] = [None]
        if self.is_last:
            told = [_map_output(output, lambda part: part.to("meta"))]
        dist.broadcast_object_list(told, src=self._last_rank, group=self.group)
        if not self.is_last:
            output = _map_output(told[0], lambda part: torch.empty_like(part, device=self.device))
        _map_output(output, lambda part: dist.broadcast(part, src=self._last_rank, group=self.group))
        return output

    # What they share

    def _schedule(self, shapes: object, size: int, is_training: bool) -> tuple[Any, int]:
        """Return torch's schedule for batches of these shapes, and their number of parts; it keeps that of the batch before."""
        num_parts = math.gcd(size, self.plan.parts)
        known_shapes, known_parts, schedule = self._ways.get(is_training, (None, 0, None))
        is_new = shapes != known_shapes
        if self.data_group is not None:
            # Each part, and the trial of a new schedule, gathers weights: all who share these do as much.
            told = collectives.all_gather(
                torch.tensor([num_parts, is_new]), self.data_group, device=self.device
            ).tolist()
            num_parts, is_new = math.gcd(*(num for num, _ in told)), any(new for _, new in told)
        if is_new or num_parts != known_parts:
            schedule = self._new_schedule(num_parts, is_training)
            self._ways[is_training] = (shapes, num_parts, schedule)
        return schedule, num_parts

    def _new_schedule(self, num_parts: int, is_training: bool) -> Any:
        plan = self.plan
        numbers = [self.rank + plan.size * place for place in range(len(self.stages))]
        parts: list[Any] = [
            PipelineStage(stage, number, plan.num_stages, self.device, group=self.group)
            for number, stage in zip(numbers, self.stages, strict=True)
        ]
        loops = plan.schedule == "interleaved"
        kind: Any = ScheduleLoopedBFS if loops else ScheduleGPipe
        if is_training and num_parts % plan.size == 0:
            kind = _SCHEDULES[plan.schedule]
        schedule = kind(
            parts if loops else parts[0], num_parts, loss_fn=self._loss_of if is_training else None, scale_grads=False
        )
        if is_training:
            self._last_stage = parts[-1]
        return schedule

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        """Draw random numbers apart from those of this process."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield

    def _not_called(self) -> MisconfigurationException:
        return MisconfigurationException(
            f"`{type(self.module).__name__}.training_step` did not call the layers of the pipeline. Call them once for each batch."
        )


def _map_output(output: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(output, Tensor):
        return function(output.contiguous())
    if isinstance(output, (tuple, list)) and all(isinstance(part, Tensor) for part in output):
        return tuple(function(part.contiguous()) for part in output)
    raise MisconfigurationException(
        f"The last layer of a pipeline must return a tensor, or a tuple of tensors, received {type(output).__name__}."
    )
