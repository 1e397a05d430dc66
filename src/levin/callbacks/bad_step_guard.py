"""BadStepGuard: a step whose loss or gradient is not finite changes nothing, and leaves what is needed to repeat it."""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from levin.checkpoint.io import atomic_save
from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException, require_choice, value_error
from levin.utilities.move import move_data_to_device
from levin.utilities.rank_zero import log
from levin.utilities.rng_states import DEVICES, PROCESS, ProcessRng, RngStates, set_rng_states
from levin.utilities.types import Batch, PathLike, StateDict


class BadStepError(RuntimeError):
    """The loss or the gradient of a step was not finite.

    Args:
        step: Optimizer steps that were taken before it.
        path: Where its evidence is; empty where none was kept.
    """

    def __init__(self, step: int, path: str) -> None:
        way_out = (
            f"Repeat it with replay_bad_step({path!r}, module, trainer)." if path else "Raise max_files to keep it."
        )
        super().__init__(
            f"The loss or the gradient of step {step} was not finite. The weights are those before that step. {way_out}"
        )
        self.step: int = step
        self.path: str = path


class BadStepGuard(Callback):
    """Leaves out the update of a step whose loss or gradient is not finite, and keeps evidence of it.

    The check and the update run on the device, and nothing waits for the device: whether step N was bad is read when the
    gradients of step N + 1 are on their way. So the file is written, and ``"stop"`` raises, one step late; but the bad
    step itself has changed neither weights nor optimizer, whatever is done then. It costs a copy of the weights
    and of the optimizer's state on the device.

    Args:
        action: ``"stop"`` raises :class:`BadStepError`; ``"skip"`` goes on with the next step.
        dirpath: Folder for the evidence, ``bad_steps`` in the Trainer's ``default_root_dir`` by default. A file holds the
            batches of the step (one for each batch of an accumulation window), the random states before each, and the
            weights.
        max_files: How many files are written in one call of ``fit``.

    Raises:
        MisconfigurationException: Arguments out of range, or manual optimization.
        BadStepError: During training, with ``"stop"``.

    Example:
        >>> guard = BadStepGuard(action="skip", dirpath="bad_steps")
        >>> guard.num_bad_steps
        0
    """

    is_on_all_ranks = True

    def __init__(
        self, action: Literal["stop", "skip"] = "stop", dirpath: PathLike | None = None, max_files: int = 10
    ) -> None:
        require_choice("action", action, ("stop", "skip"))
        if max_files < 0:
            raise value_error("max_files", max_files, "must be >= 0")
        self.action: str = action
        self.dirpath: str | None = None if dirpath is None else os.fspath(dirpath)
        self.max_files: int = max_files
        self.num_bad_steps: int = 0
        self.paths: list[str] = []
        self._rng = ProcessRng()
        self._window: _Window = _Window()
        self._pending: _Pending | None = None
        self._loss_is_bad: Tensor | None = None
        self._mask: _MaskedUpdate | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = os.path.join(trainer.default_root_dir, "bad_steps")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "BadStepGuard needs automatic optimization, received a module with automatic_optimization=False. "
                "Check the loss in `training_step` yourself."
            )
        self._window, self._pending, self._loss_is_bad = _Window(), None, None
        self.paths = []
        self._mask = _MaskedUpdate(trainer.optimizers[0])

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window = _Window()
        self._window.batches.append(batch)
        self._window.indices.append(batch_idx)
        self._window.generators.append(self._rng.read(PROCESS + DEVICES))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        is_bad = ~torch.isfinite(loss.detach()).all()
        self._loss_is_bad = is_bad if self._loss_is_bad is None else self._loss_is_bad | is_bad

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._settle(trainer, pl_module)
        # A loss scale makes gradients overflow now and then; its scaler leaves out such steps by itself.
        is_bad = None if trainer.scaler is not None else _any_not_finite(optimizer)
        if self._loss_is_bad is not None:
            is_bad = self._loss_is_bad if is_bad is None else is_bad | self._loss_is_bad
        self._loss_is_bad = None
        if is_bad is None:
            return
        assert self._mask is not None, "it exists from on_train_start on"
        if trainer.world_size > 1:
            is_bad = trainer.strategy.reduce(is_bad.float(), reduce_op="sum") > 0
        self._mask.prepare(is_bad)
        self._pending = _Pending(self._window, trainer.global_step, trainer.current_epoch, _Flag(is_bad))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._pending is not None and self._pending.flag.is_set():
            self._keep(trainer, pl_module, self._pending)
        self._end()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def state_dict(self) -> StateDict:
        return {"num_bad_steps": self.num_bad_steps} if self.num_bad_steps else {}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self.num_bad_steps = state_dict["num_bad_steps"]

    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        pending, self._pending = self._pending, None
        if pending is None or not pending.flag.is_set():
            return
        path = self._keep(trainer, module, pending)
        if self.action == "stop":
            raise BadStepError(pending.step, path)
        log.warning(f"The loss or the gradient of step {pending.step} was not finite: the step is left out. {path}")

    def _keep(self, trainer: Trainer, module: LightningModule, pending: _Pending) -> str:
        self.num_bad_steps += 1
        if len(self.paths) >= self.max_files:
            return ""
        assert self._mask is not None, "it exists until training ends"
        rank = f"-rank={trainer.global_rank}" if trainer.world_size > 1 else ""
        path = os.path.join(str(self.dirpath), f"epoch={pending.epoch}-step={pending.step}{rank}.pt")
        weights = {name: value.detach() for name, value in module.state_dict().items()}
        weights.update(self._mask.weights_before(module))
        evidence = {
            "version": 1,
            "step": pending.step,
            "epoch": pending.epoch,
            "batch_indices": pending.window.indices,
            "batches": pending.window.batches,
            "generators": pending.window.generators,
            "state_dict": weights,
            "precision": str(trainer.precision),
        }
        atomic_save(evidence, path)
        self.paths.append(path)
        return path

    def _end(self) -> None:
        if self._mask is not None:
            self._mask.remove()
        self._mask = self._pending = None


@dataclass
class _Window:
    """The batches of one optimizer step, and the random states before each."""

    batches: list[Batch] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    generators: list[RngStates] = field(default_factory=list)


@dataclass
class _Pending:
    """A step of which it is not known yet whether it was bad."""

    window: _Window
    step: int
    epoch: int
    flag: _Flag


class _Flag:
    """A truth value on its way from the device to this process.

    Args:
        value: A bool tensor with one element.
    """

    def __init__(self, value: Tensor) -> None:
        is_cuda = value.device.type == "cuda"
        self._host = torch.empty(1, dtype=torch.uint8, pin_memory=is_cuda)
        self._host.copy_(value.reshape(1), non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def is_set(self) -> bool:
        """Return the value; waits for the device only if it has not come that far, one step later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(ctypes.c_uint8.from_address(self._host.data_ptr()).value)


class _MaskedUpdate:
    """Takes back, on the device, what an optimizer does in a step that is bad.

    Args:
        optimizer: Is watched until :meth:`remove`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._is_bad: Tensor | None = None
        self._parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._before: list[Tensor] = []
        self._states: list[tuple[Tensor, str, Tensor]] = []
        self._handle = self.optimizer.register_step_post_hook(self._after_step)

    def prepare(self, is_bad: Tensor) -> None:
        """Keep what the step may change."""
        self._is_bad = is_bad
        with torch.no_grad():
            if self._before:
                torch._foreach_copy_(self._before, self._parameters)
            else:
                self._before = [parameter.detach().clone() for parameter in self._parameters]
            self._states = [
                (parameter, name, value.clone())
                for parameter, state in self.optimizer.state.items()
                for name, value in state.items()
                if isinstance(value, Tensor)
            ]

    def weights_before(self, module: LightningModule) -> dict[str, Tensor]:
        """Return the parameters as they were before the last step, by their names in ``module``."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        pairs = zip(self._parameters, self._before)
        return {names[id(parameter)]: before for parameter, before in pairs if id(parameter) in names}

    def remove(self) -> None:
        """Let the optimizer be."""
        self._handle.remove()

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        is_bad, self._is_bad = self._is_bad, None
        if is_bad is None:
            return
        with torch.no_grad():
            for parameter, before in zip(self._parameters, self._before):
                _take_back(parameter, before, is_bad)
            known = {(id(parameter), name): before for parameter, name, before in self._states}
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        old = known.get((id(parameter), name))
                        # A state that the bad step made itself begins with zeros, as optimizers' states do.
                        _take_back(value, torch.zeros_like(value) if old is None else old, is_bad)


def _take_back(value: Tensor, before: Tensor, is_bad: Tensor) -> None:
    # Counts of steps may lie on the CPU while the parameters do not.
    value.copy_(torch.where(is_bad.to(value.device, non_blocking=True), before, value))


def _any_not_finite(optimizer: Optimizer) -> Tensor | None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return None
    norms = torch._foreach_norm(gradients, float("inf"))
    return ~torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms])).all()


@dataclass
class Replayed:
    """What came out of a step that was repeated.

    Args:
        losses: The loss of each batch of the step.
        gradients: Names of the parameters whose gradient is not finite.
    """

    losses: list[float]
    gradients: list[str]


class _Replay(Callback):
    """Sets the random states before each batch, and looks at the gradients instead of taking the step."""

    def __init__(self, evidence: StateDict) -> None:
        self.evidence = evidence
        self.found = Replayed([], [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.load_state_dict(move_data_to_device(self.evidence["state_dict"], pl_module.device))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        set_rng_states(self.evidence["generators"][batch_idx])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        self.found.gradients = [
            name
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.found.losses.append(float((outputs or {}).get("loss", math.nan)))


def replay_bad_step(path: PathLike, module: LightningModule, trainer: Trainer, weights_only: bool = True) -> Replayed:
    """Repeat a step that :class:`BadStepGuard` has kept, and return what comes out.

    Args:
        path: File of the evidence.
        module: A module like the one that was trained; it gets the weights, and one step is taken with it.
        trainer: A new Trainer with the accelerator and precision of the run, and no loggers or checkpoints.
        weights_only: Whether reading the file may run no code; False if the batches hold objects of your own.

    Raises:
        FileNotFoundError: There is no such file.

    Example:
        >>> replay_bad_step("bad_steps/epoch=0-step=3.pt", Model(), Trainer(logger=False))  # doctest: +SKIP
        Replayed(losses=[nan], gradients=['layer.weight'])
    """
    evidence = torch.load(path, map_location="cpu", weights_only=weights_only)
    replay = _Replay(evidence)
    trainer.callbacks.insert(0, replay)
    trainer.accumulate_grad_batches = len(evidence["batches"])
    trainer.fit_loop.epoch_loop.max_steps = 1
    trainer.limit_val_batches = 0
    trainer.fit(module, deque(evidence["batches"]))  # a list would be taken for a list of loaders
    return replay.found
