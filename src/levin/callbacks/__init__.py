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
    "BadStepError": "levin.callbacks.bad_step_guard",
    "BadStepGuard": "levin.callbacks.bad_step_guard",
    "BackboneFinetuning": "levin.callbacks.finetuning",
    "BaseFinetuning": "levin.callbacks.finetuning",
    "BatchSizeFinder": "levin.tuner.finders",
    "BasePredictionWriter": "levin.callbacks.prediction_writer",
    "Callback": "levin.hooks",
    "Checkpoint": "levin.callbacks.checkpoint",
    "DeviceStatsMonitor": "levin.callbacks.device_stats_monitor",
    "EMAWeightAveraging": "levin.callbacks.weight_averaging",
    "EarlyStopping": "levin.callbacks.early_stopping",
    "GradientAccumulationScheduler": "levin.callbacks.gradient_accumulation_scheduler",
    "LambdaCallback": "levin.callbacks.lambda_function",
    "LearningRateFinder": "levin.tuner.finders",
    "LearningRateMonitor": "levin.callbacks.lr_monitor",
    "ModelCheckpoint": "levin.callbacks.model_checkpoint",
    "ModelPruning": "levin.callbacks.pruning",
    "ModelSummary": "levin.callbacks.model_summary",
    "OnExceptionCheckpoint": "levin.callbacks.on_exception_checkpoint",
    "ProgressBar": "levin.callbacks.progress.progress_bar",
    "RichModelSummary": "levin.callbacks.rich_model_summary",
    "RichProgressBar": "levin.callbacks.progress.rich_progress",
    "RichProgressBarTheme": "levin.callbacks.progress.rich_progress",
    "ServableModule": "levin.callbacks.serve",
    "ServableModuleValidator": "levin.callbacks.serve",
    "SpikeDetection": "levin.callbacks.spike_detection",
    "StochasticWeightAveraging": "levin.callbacks.stochastic_weight_avg",
    "TQDMProgressBar": "levin.callbacks.progress.tqdm_progress",
    "ThroughputMonitor": "levin.callbacks.throughput_monitor",
    "Timer": "levin.callbacks.timer",
    "TrainingSpikeException": "levin.callbacks.spike_detection",
    "WeightAveraging": "levin.callbacks.weight_averaging",
    "replay_bad_step": "levin.callbacks.bad_step_guard",
}

__all__ = sorted(_HOMES)


__getattr__, __dir__ = lazy_face(__name__, _HOMES)
