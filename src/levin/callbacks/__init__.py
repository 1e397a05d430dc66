"""Callbacks: what runs at the hooks of a Trainer without being part of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.callbacks.checkpoint import Checkpoint as Checkpoint
    from levin.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from levin.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from levin.hooks import Callback as Callback

_HOMES = {
    "levin.callbacks.bad_step_guard": "BadStepError BadStepGuard replay_bad_step",
    "levin.callbacks.checkpoint": "Checkpoint",
    "levin.callbacks.device_stats_monitor": "DeviceStatsMonitor",
    "levin.callbacks.early_stopping": "EarlyStopping",
    "levin.callbacks.finetuning": "BackboneFinetuning BaseFinetuning",
    "levin.callbacks.gradient_accumulation_scheduler": "GradientAccumulationScheduler",
    "levin.callbacks.lambda_function": "LambdaCallback",
    "levin.callbacks.lr_monitor": "LearningRateMonitor",
    "levin.callbacks.model_checkpoint": "ModelCheckpoint",
    "levin.callbacks.model_summary": "ModelSummary",
    "levin.callbacks.on_exception_checkpoint": "OnExceptionCheckpoint",
    "levin.callbacks.prediction_writer": "BasePredictionWriter",
    "levin.callbacks.progress.progress_bar": "ProgressBar",
    "levin.callbacks.progress.rich_progress": "RichProgressBar RichProgressBarTheme",
    "levin.callbacks.progress.tqdm_progress": "TQDMProgressBar",
    "levin.callbacks.pruning": "ModelPruning",
    "levin.callbacks.rich_model_summary": "RichModelSummary",
    "levin.callbacks.serve": "ServableModule ServableModuleValidator",
    "levin.callbacks.spike_detection": "SpikeDetection TrainingSpikeException",
    "levin.callbacks.stochastic_weight_avg": "StochasticWeightAveraging",
    "levin.callbacks.throughput_monitor": "ThroughputMonitor",
    "levin.callbacks.timer": "Timer",
    "levin.callbacks.weight_averaging": "EMAWeightAveraging WeightAveraging",
    "levin.hooks": "Callback",
    "levin.tuner.finders": "BatchSizeFinder LearningRateFinder",
}

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = __dir__()
