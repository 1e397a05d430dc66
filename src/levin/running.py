"""Running: the state of a Trainer between and during its calls, and how a call runs and fails."""

from __future__ import annotations

import math
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Optional

import torch

from levin.checkpoint import state as tree
from levin.data.loaders import set_epoch
from levin.data.source import StageLoaders
from levin.datamodule import LightningDataModule
from levin.log_store import LogStore, Metrics
from levin.loops import launched, sequence
from levin.loops.exact import Exact
from levin.loops.logging import to_floats
from levin.loops.progress import EvaluationLoop, FitLoop
from levin.loops.results_table import print_results
from levin.loops.resume import select_checkpoint
from levin.loops.run import new_store
from levin.module import LightningModule
from levin.utilities.exceptions import MisconfigurationException, SIGTERMException
from levin.utilities.move import move_data_to_device
from levin.utilities.overrides import is_overridden
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn
from levin.utilities.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from levin.utilities.timing import call_timed

if TYPE_CHECKING:
    from levin.data.feed import Feed
    from levin.loops.run import Run
    from levin.utilities.types import PathLike


class Running:
    """What the loops need of a Trainer besides its settings.

    Args:
        fit_loop: The limits and counters of training.
    """

    # Settings, given by the Trainer's constructor.
    limit_train_batches: int | float
    limit_val_batches: int | float
    limit_test_batches: int | float
    limit_predict_batches: int | float

    def __init__(self, fit_loop: FitLoop) -> None:
        self.fit_loop = fit_loop
        self.validate_loop = EvaluationLoop()
        self.test_loop = EvaluationLoop()
        self.predict_loop = EvaluationLoop(has_last=False)
        self.state = TrainerState()
        self.should_stop: bool = False
        self.received_sigterm: bool = False
        self.datamodule: Optional[LightningDataModule] = None
        self._module: Optional[LightningModule] = None
        self._run: Optional[Run] = None
        self._step: Any = None
        self._val_step: Any = None
        self._metrics = Metrics({}, {}, {})
        self._sanity_metrics: Optional[Metrics] = None
        self._lightning_optimizers: list[Any] = []
        self._is_setting_up: bool = False
        self._predictions: list[list[Any]] = []
        self._returns_predictions: bool = True
        self._num_training_batches: int | float = math.inf
        self._num_sanity_val_batches: list[int | float] = []
        self._last_validation_time: float = 0.0
        self._warns_about_max_epochs: bool = False
        self._explained_minima: bool = False
        self._exact = Exact()
        self._ckpt_path: Optional[PathLike] = None
        self._ckpt_path_is_set: bool = False

    # ---------------------------------------------------------------- a call, from begin to end

    def _begin(
        self: Any, fn: TrainerFn, model: Any, datamodule: Optional[LightningDataModule], given: dict[str, Any]
    ) -> None:
        """Attach module and data for a call of ``fn``."""
        first = next(iter(given))
        if isinstance(given[first], LightningDataModule):
            datamodule, given[first] = given[first], None
        if datamodule is not None and any(value is not None for value in given.values()):
            raise MisconfigurationException(
                f"You cannot pass loaders and a `datamodule` to `Trainer.{fn}`, received both. Pass one of the two."
            )
        if model is None:
            model = self._module
            if model is None:
                raise TypeError(
                    f"`Trainer.{fn}()` requires a `LightningModule` when it hasn't been passed in a previous run, received None."
                )
        model = _uncompiled(model)
        if not isinstance(model, LightningModule):
            raise TypeError(f"`model` must be a `LightningModule`, received {type(model).__qualname__}.")
        self._module = model
        model.trainer = self
        if datamodule is not None:
            self.datamodule = datamodule
            datamodule.trainer = self
        elif any(value is not None for value in given.values()) or fn == TrainerFn.FITTING:
            self.datamodule = None
        self.state.fn = fn
        self.state.status = TrainerStatus.RUNNING
        self.state.stage = sequence.stage_of(str(fn))
        for stage, value in given.items():
            getattr(self, f"_{stage}_loaders").attach(value, self.datamodule, model)
        if fn == TrainerFn.FITTING:
            self._val_step = None
            loop = self.fit_loop
            if loop.max_epochs is None:
                if self._warns_about_max_epochs:
                    rank_zero_warn(
                        "`max_epochs` was not set. Setting it to 1000 epochs. To train without an epoch limit, set `max_epochs=-1`."
                    )
                    loop.max_epochs = 1000
                else:
                    loop.max_epochs = -1
            if loop.min_epochs is None:
                loop.min_epochs = 1 if loop.min_steps is not None else 0
            self._last_validation_time = time.monotonic()

    def _execute(self: Any, ckpt_path: Any, weights_only: Optional[bool], model_given: bool) -> Any:
        """Run the sequence, in this process or in those that the strategy launches; handle what goes wrong."""
        self._attach_model_callbacks()
        launcher = self.strategy.launcher
        runs_elsewhere = False
        try:
            path = select_checkpoint(self, ckpt_path, model_given)
            if launcher is not None:
                runs_elsewhere = launcher.runs_elsewhere
                function = launched.run_sequence if runs_elsewhere else sequence.run_sequence
                result = launcher.launch(function, self, path, weights_only, trainer=self)
            else:
                result = sequence.run_sequence(self, path, weights_only)
        except KeyboardInterrupt as error:
            self._fail(error, runs_elsewhere)
            rank_zero_info("Detected KeyboardInterrupt, attempting graceful shutdown ...")
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if launcher is not None and hasattr(launcher, "kill"):
                launcher.kill(signal.SIGTERM)
            sys.exit(1)
        except BaseException as error:
            self._fail(error, runs_elsewhere)
            raise
        finally:
            self._is_setting_up = False
        self.state.status = TrainerStatus.FINISHED
        self.state.stage = None
        return result

    def _fail(self: Any, error: BaseException, is_told: bool = False) -> None:
        """Tell everybody that the run failed, unless they are told where it ran, and leave nothing half done."""
        self.state.status = TrainerStatus.INTERRUPTED
        if is_told:
            self.state.stage = None
            return
        try:
            for callback in self.callbacks:
                call_timed(self, "Callback", callback, "on_exception", self, self._module, error)
            if self.datamodule is not None:
                self.datamodule.on_exception(error)
        finally:
            self.strategy.on_exception(error)
            for logger in self.loggers:
                logger.finalize("failed")
            sequence._detach_log_store(self._module)
            self.strategy.teardown()
            self.profiler.teardown(str(self.state.fn))
            self.state.stage = None

    def _attach_model_callbacks(self: Any) -> None:
        from levin.callbacks.defaults import merge_model_callbacks

        configured = call_timed(self, "LightningModule", self._module, "configure_callbacks")
        self.callbacks = merge_model_callbacks(self.callbacks, configured)
        for callback in self.callbacks:
            callback.log = self._module.log
            callback.log_dict = self._module.log_dict

    def _evaluated(self: Any, results: list[dict[str, float]], verbose: bool) -> list[dict[str, float]]:
        if verbose and results and self.is_global_zero:
            print_results(results, "validate" if self.state.fn == TrainerFn.VALIDATING else "test")
        return results

    def _resolve_return_predictions(self: Any, value: Optional[bool]) -> bool:
        launcher = self.strategy.launcher
        spawns = launcher is not None and launcher.runs_elsewhere
        if value and spawns:
            raise MisconfigurationException(
                "return_predictions=True is not possible with a strategy that spawns processes. Write predictions with BasePredictionWriter."
            )
        return not spawns if value is None else value

    def collect_results(self: Any) -> dict[str, Any]:
        """Return what the Trainer in the process that started this one shall know of the run."""
        return launched.collect_results(self)

    def restore_results(self: Any, results: dict[str, Any]) -> None:
        """Take up the results of a run in another process."""
        launched.restore_results(self, results)

    # ---------------------------------------------------------------- what the loops ask for

    def _loaders_of(self: Any, fn: str) -> StageLoaders:
        loaders: StageLoaders = getattr(self, {"validate": "_val_loaders"}.get(fn, f"_{fn}_loaders"))
        return loaders

    def _limit_of(self: Any, fn: str) -> int | float:
        limit: int | float = getattr(self, {"validate": "limit_val_batches"}.get(fn, f"limit_{fn}_batches"))
        return limit

    @property
    def _uses_inference_mode(self: Any) -> bool:
        return self._inference_mode and getattr(self.strategy, "supports_inference_mode", True)

    @property
    def _is_profiling(self: Any) -> bool:
        return type(self.profiler).__name__ != "PassThroughProfiler"

    def _profiler_dir(self: Any) -> Optional[str]:
        return self.log_dir if self._is_profiling else None

    def _new_store(self: Any, run: Run, training: bool) -> LogStore:
        return new_store(self, run.module, training)

    def _merge(self, metrics: Metrics) -> Metrics:
        """Take reduced values into the three dictionaries that users read."""
        self._metrics.callback.update(metrics.callback)
        self._metrics.logged.update(metrics.logged)
        self._metrics.progress_bar.update(metrics.progress_bar)
        return metrics

    def _reset_metrics(self) -> None:
        self._metrics = Metrics({}, {}, {})

    def _moved_metrics_to(self, device: torch.device) -> None:
        self._metrics = Metrics(*(move_data_to_device(values, device) for values in self._metrics))

    def _val_feed(self: Any, run: Run) -> Feed:
        return sequence.next_validation_feed(run)

    def _skip_empty_batch(self) -> None:
        rank_zero_warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")

    def _explain_minima_once(self: Any) -> None:
        if not self._explained_minima:
            self._explained_minima = True
            rank_zero_info(
                f"Trainer was signaled to stop but the required `min_epochs={self.fit_loop.min_epochs!r}` or "
                f"`min_steps={self.fit_loop.min_steps!r}` has not been met. Training will continue..."
            )

    def _manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self._step.backward(loss, *args, **kwargs)

    def _raise_sigterm_unless_done(self: Any) -> None:
        if not fit_is_done(self):
            raise SIGTERMException

    # ---------------------------------------------------------------- data

    def _prepare_epoch(self: Any, run: Run, feed: Feed) -> None:
        """Load the training data again when that is due, and tell samplers the epoch."""
        if sequence.load_training(self):
            fresh = sequence.make_feed(run, self._train_loaders)
            feed.sources, feed.limits, feed.lengths = fresh.sources, fresh.limits, fresh.lengths
        for loader in self._train_loaders.combined.flattened:
            set_epoch(loader, self.current_epoch)

    def _batch_indices(self: Any, feed: Feed, dataloader_idx: int) -> Optional[list[int]]:
        sampler: Any = getattr(feed.sources[dataloader_idx], "batch_sampler", None)
        seen: Optional[list[list[int]]] = getattr(sampler, "seen_batch_indices", None)
        # A loader with workers draws ahead, so the batch is found by its own index.
        index = self.predict_loop.batch_progress.current.ready - 1
        return seen[index] if seen and index < len(seen) else None

    # ---------------------------------------------------------------- what users read and set

    @property
    def training(self) -> bool:
        """Whether the training loop runs."""
        return self.state.stage == RunningStage.TRAINING

    @training.setter
    def training(self, value: bool) -> None:
        self._set_stage(RunningStage.TRAINING, value)

    @property
    def validating(self) -> bool:
        """Whether a validation runs."""
        return self.state.stage == RunningStage.VALIDATING

    @validating.setter
    def validating(self, value: bool) -> None:
        self._set_stage(RunningStage.VALIDATING, value)

    @property
    def testing(self) -> bool:
        """Whether a test runs."""
        return self.state.stage == RunningStage.TESTING

    @testing.setter
    def testing(self, value: bool) -> None:
        self._set_stage(RunningStage.TESTING, value)

    @property
    def predicting(self) -> bool:
        """Whether predictions run."""
        return self.state.stage == RunningStage.PREDICTING

    @predicting.setter
    def predicting(self, value: bool) -> None:
        self._set_stage(RunningStage.PREDICTING, value)

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation before training runs."""
        return self.state.stage == RunningStage.SANITY_CHECKING

    @sanity_checking.setter
    def sanity_checking(self, value: bool) -> None:
        self._set_stage(RunningStage.SANITY_CHECKING, value)

    def _set_stage(self, stage: RunningStage, value: bool) -> None:
        if value:
            self.state.stage = stage
        elif self.state.stage == stage:
            self.state.stage = None

    @property
    def evaluating(self) -> bool:
        """Whether validation, test or sanity check runs."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the last call failed."""
        return self.state.status == TrainerStatus.INTERRUPTED

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""
        return self.fit_loop.epoch_loop.global_step

    @property
    def current_epoch(self) -> int:
        """Completed epochs."""
        return self.fit_loop.epoch_progress.current.completed

    @property
    def max_epochs(self) -> Optional[int]:
        """Epochs at most."""
        return self.fit_loop.max_epochs

    @property
    def min_epochs(self) -> Optional[int]:
        """Epochs at least."""
        return self.fit_loop.min_epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps at most."""
        return self.fit_loop.epoch_loop.max_steps

    @property
    def min_steps(self) -> Optional[int]:
        """Optimizer steps at least."""
        return self.fit_loop.epoch_loop.min_steps

    @property
    def is_last_batch(self) -> bool:
        """Whether the present batch is the last of its epoch."""
        return self.fit_loop.epoch_loop.batch_progress.is_last_batch

    @property
    def enable_validation(self: Any) -> bool:
        """Whether validation runs inside fit: there is a loader, a step, and a limit above 0."""
        module = self._module
        return (
            self._val_loaders.is_defined
            and module is not None
            and ("validation_step" in vars(module) or is_overridden("validation_step", module, LightningModule))
            and self.limit_val_batches > 0
        )

    @property
    def estimated_stepping_batches(self: Any) -> int | float:
        """Optimizer steps that a whole fit will take, as far as known. Loads the training data if needed."""
        if self.max_epochs == -1:
            return math.inf if self.max_steps == -1 else int(self.max_steps)
        sequence.load_training(self)
        batches = self._num_training_batches
        if batches == math.inf:
            return int(self.max_steps)
        steps: int | float = math.ceil(batches / self.accumulate_grad_batches) * max(self.max_epochs or 1, 1)
        return min(self.max_steps, steps) if self.max_steps != -1 else steps

    # ---------------------------------------------------------------- metrics

    @property
    def callback_metrics(self: Any) -> dict[str, Any]:
        """All logged values: in training those of the step and the epoch, in evaluation those of the epoch."""
        self._refresh_metrics()
        found: dict[str, Any] = self._metrics.callback
        return found

    @property
    def logged_metrics(self: Any) -> dict[str, Any]:
        """The values that went, or go, to the loggers."""
        self._refresh_metrics()
        found: dict[str, Any] = self._metrics.logged
        return found

    @property
    def progress_bar_metrics(self: Any) -> dict[str, float]:
        """The values logged with ``prog_bar=True``, as floats; reading them waits for the device."""
        self._refresh_metrics()
        return to_floats(self._metrics.progress_bar)

    def _refresh_metrics(self: Any) -> None:
        run = self._run
        if run is not None and self.state.status == TrainerStatus.RUNNING:
            store = run.store
            metrics: Metrics = store.read(on_step=not store.is_epoch_end)
            if self.sanity_checking:
                self._metrics = metrics
            else:
                self._merge(metrics)

    # ---------------------------------------------------------------- checkpoints

    @property
    def ckpt_path(self) -> Optional[PathLike]:
        """The checkpoint that the present or last run started from."""
        return self._ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, path: Optional[PathLike]) -> None:
        self._ckpt_path = path
        self._ckpt_path_is_set = bool(path)

    def save_checkpoint(
        self: Any, filepath: PathLike, weights_only: Optional[bool] = None, storage_options: Any = None
    ) -> None:
        """Save the run, so that ``fit(ckpt_path=filepath)`` goes on from here.

        Args:
            filepath: Path or URL.
            weights_only: Whether to save only what inference needs.
            storage_options: Passed to the CheckpointIO.

        Raises:
            AttributeError: No model was attached yet.
        """
        if self._module is None:
            raise AttributeError(
                "Saving a checkpoint is only possible after a model was attached, received none. Call `fit` first."
            )
        with self.profiler.profile("save_checkpoint"):
            checkpoint = tree.collect(self, weights_only=bool(weights_only))
            self.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            self.strategy.barrier("Trainer.save_checkpoint")


def fit_is_done(trainer: Any) -> bool:
    """Whether training has reached a limit."""
    loop = trainer.fit_loop
    return bool(0 <= loop.max_steps <= trainer.global_step)


def _uncompiled(model: Any) -> Any:
    original = getattr(model, "_orig_mod", None)
    if original is None or not isinstance(original, LightningModule):
        return model
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        if name == "forward" or is_overridden(name, original, LightningModule):
            original.__dict__[name] = (
                torch.compile(getattr(original, name)) if name != "forward" else model.dynamo_ctx(original.forward)
            )
    original._compiler_ctx = model.dynamo_ctx
    return original
