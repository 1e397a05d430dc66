from levin.callbacks.bad_step_guard import BadStepError as BadStepError
from levin.callbacks.bad_step_guard import BadStepGuard as BadStepGuard
from levin.callbacks.bad_step_guard import replay_bad_step as replay_bad_step
from levin.callbacks.checkpoint import Checkpoint as Checkpoint
from levin.callbacks.device_stats_monitor import DeviceStatsMonitor as DeviceStatsMonitor
from levin.callbacks.early_stopping import EarlyStopping as EarlyStopping
from levin.callbacks.finetuning import BackboneFinetuning as BackboneFinetuning
from levin.callbacks.finetuning import BaseFinetuning as BaseFinetuning
from levin.callbacks.gradient_accumulation_scheduler import (
    GradientAccumulationScheduler as GradientAccumulationScheduler,
)
from levin.callbacks.lambda_function import LambdaCallback as LambdaCallback
from levin.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
from levin.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
from levin.callbacks.model_summary import ModelSummary as ModelSummary
from levin.callbacks.on_exception_checkpoint import OnExceptionCheckpoint as OnExceptionCheckpoint
from levin.callbacks.prediction_writer import BasePredictionWriter as BasePredictionWriter
from levin.callbacks.progress.progress_bar import ProgressBar as ProgressBar
from levin.callbacks.progress.rich_progress import RichProgressBar as RichProgressBar
from levin.callbacks.progress.rich_progress import RichProgressBarTheme as RichProgressBarTheme
from levin.callbacks.progress.tqdm_progress import TQDMProgressBar as TQDMProgressBar
from levin.callbacks.pruning import ModelPruning as ModelPruning
from levin.callbacks.rich_model_summary import RichModelSummary as RichModelSummary
from levin.callbacks.serve import ServableModule as ServableModule
from levin.callbacks.serve import ServableModuleValidator as ServableModuleValidator
from levin.callbacks.spike_detection import SpikeDetection as SpikeDetection
from levin.callbacks.spike_detection import TrainingSpikeException as TrainingSpikeException
from levin.callbacks.stochastic_weight_avg import StochasticWeightAveraging as StochasticWeightAveraging
from levin.callbacks.throughput_monitor import ThroughputMonitor as ThroughputMonitor
from levin.callbacks.timer import Timer as Timer
from levin.callbacks.weight_averaging import EMAWeightAveraging as EMAWeightAveraging
from levin.callbacks.weight_averaging import WeightAveraging as WeightAveraging
from levin.hooks import Callback as Callback
from levin.tuner.finders import BatchSizeFinder as BatchSizeFinder
from levin.tuner.finders import LearningRateFinder as LearningRateFinder
