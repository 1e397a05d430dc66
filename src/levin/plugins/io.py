"""Where and how checkpoints are kept."""

from levin.checkpoint.background import AsyncCheckpointIO
from levin.checkpoint.io import CheckpointIO, TorchCheckpointIO

__all__ = ["AsyncCheckpointIO", "CheckpointIO", "TorchCheckpointIO"]
