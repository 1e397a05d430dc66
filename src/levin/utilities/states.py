"""What a Trainer is doing, and how."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional


class _StrEnum(str, Enum):
    __str__ = str.__str__


class TrainerStatus(_StrEnum):
    """How far the present call is."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Whether nothing runs any more."""
        return self in (self.FINISHED, self.INTERRUPTED)


class TrainerFn(_StrEnum):
    """The method that was called."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class RunningStage(_StrEnum):
    """The loop that runs."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether it is validation, test or sanity check."""
        return self in (self.VALIDATING, self.TESTING, self.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str:
        """How the loader hooks of the stage begin."""
        return "val" if self in (self.VALIDATING, self.SANITY_CHECKING) else self.value


class GradClipAlgorithmType(_StrEnum):
    """What of the gradients is clipped."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_types() -> list[str]:
        """Return the values."""
        return [member.value for member in GradClipAlgorithmType]

    @staticmethod
    def supported_type(val: str | GradClipAlgorithmType) -> bool:
        """Return whether ``val`` is one of the values."""
        return val in GradClipAlgorithmType.supported_types()


@dataclass
class TrainerState:
    """Status, method and stage of a Trainer."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: Optional[TrainerFn] = None
    stage: Optional[RunningStage] = None

    @property
    def finished(self) -> bool:
        """Whether the call ended well."""
        return self.status == TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether nothing runs any more."""
        return self.status.stopped


@dataclass
class StopFlags:
    """What one process was told by its own callbacks, user and signals."""

    should_stop: bool = False
    received_sigterm: bool = False
