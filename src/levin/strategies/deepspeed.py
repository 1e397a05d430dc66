"""Optimizer states, gradients and weights cut over all processes, on the host or on disk, by DeepSpeed (ZeRO)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from levin.checkpoint.layout import ZERO_FOLDER, is_sharded, is_zero
from levin.checkpoint.zero import ZeroCheckpointIO, ZeroEntry, load_zero, whole_weights
from levin.precision.deepspeed import DeepSpeedPrecision
from levin.strategies import collectives
from levin.strategies.contexts import environment_variables, in_forward_context, run_as_forward
from levin.strategies.parallel import DEFAULT_TIMEOUT, ParallelStrategy
from levin.strategies.zero_config import make_config, read_config, with_precision
from levin.strategies.zero_parts import forgetting, load_into_parts
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.filesystem import local_path
from levin.utilities.packages import require_package
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import StateDict

if TYPE_CHECKING:
    import os

    from levin.accelerators.accelerator import Accelerator
    from levin.checkpoint.io import CheckpointIO
    from levin.environments.environment import ClusterEnvironment
    from levin.precision.precision import Precision


class DeepSpeedStrategy(ParallelStrategy):
    """DeepSpeed's ZeRO: optimizer states (stage 1), gradients (2) and weights (3) are cut over all processes.

    DeepSpeed's engine is made of one module and one optimizer. Checkpoints are folders that every process writes into.

    Source: https://www.deepspeed.ai/docs/config-json/

    Args:
        accelerator: The hardware.
        zero_optimization: Whether to cut anything; otherwise every process keeps a copy of everything.
        stage: 1, 2 or 3.
        remote_device: Where stage 3 puts the parts of new layers; by default ``offload_params_device`` where weights are
            offloaded.
        offload_optimizer: Whether optimizer states lie on the host or on disk.
        offload_parameters: The same for weights, in stage 3.
        offload_params_device: ``"cpu"`` or ``"nvme"``.
        nvme_path: Folder on a fast disk, for ``"nvme"``.
        params_buffer_count: Buffers for weights on disk.
        params_buffer_size: Elements in each.
        max_in_cpu: Elements of weights that stay on the host when the rest is on disk.
        offload_optimizer_device: ``"cpu"`` or ``"nvme"``.
        optimizer_buffer_count: Buffers for optimizer states on disk.
        block_size: Bytes of a block read from disk.
        queue_depth: Depth of the queue of the disk.
        single_submit: Whether requests go to the disk one by one.
        overlap_events: Whether they are submitted while others are completed.
        thread_count: Threads of a request to the disk.
        pin_memory: Whether the memory of the host is page-locked.
        sub_group_size: Elements of the weights that are stepped at once in stage 3.
        contiguous_gradients: Whether gradients are copied into one buffer as they appear.
        overlap_comm: Whether they are reduced while backward goes on.
        allgather_partitions: Whether weights are gathered by all-gather, not by broadcasts.
        reduce_scatter: Whether gradients are averaged by reduce-scatter, not by all-reduce.
        allgather_bucket_size: Elements that are gathered at once.
        reduce_bucket_size: Elements that are reduced at once.
        zero_allow_untested_optimizer: Whether optimizers may be used that DeepSpeed has not tested.
        logging_batch_size_per_gpu: Batch size for DeepSpeed's own reports of speed; ``"auto"`` for 1.
        config: DeepSpeed's own configuration, a dict or a JSON file, in the place of all arguments above; by default the
            file that ``PL_DEEPSPEED_CONFIG_PATH`` names, if any.
        logging_level: Of DeepSpeed's log.
        parallel_devices: One device per process of this machine.
        cluster_environment: Who starts the processes.
        loss_scale: For ``"16-mixed"`` and ``"16-true"``; 0 adapts it.
        initial_scale_power: The first loss scale is 2 to the power of this.
        loss_scale_window: Steps without an overflow after which it is doubled.
        hysteresis: Overflows after which it is halved.
        min_loss_scale: Its least value.
        partition_activations: Whether activations that DeepSpeed's checkpointing keeps are cut, too.
        cpu_checkpointing: Whether they lie on the host.
        contiguous_memory_optimization: Whether they are copied into one buffer.
        synchronize_checkpoint_boundary: Whether the device is waited for at each checkpointed layer.
        load_full_weights: Taken for compatibility: files of other strategies are loaded in any case.
        precision_plugin: The number format.
        process_group_backend: torch.distributed's transport; NCCL on CUDA, otherwise Gloo, when None.
        timeout: How long a process waits for the others before it gives up, until its first batch is done.
        exclude_frozen_parameters: Whether checkpoints leave out the weights that do not learn.
        precision: Another name for ``precision_plugin``.
        step_timeout: How long a process waits from its first batch on; see :class:`ParallelStrategy`.
        uneven: When an epoch ends for ranks with different numbers of batches; see :class:`ParallelStrategy`.

    Raises:
        ModuleNotFoundError: deepspeed is not installed.
        ValueError: ``stage`` or ``config`` cannot be met, with the way out.

    Example:
        >>> DeepSpeedStrategy(stage=3, offload_optimizer=True).stage  # doctest: +SKIP
        3
    """

    restore_checkpoint_after_setup = True
    # What is gathered under inference mode for a validation could not be used for training after it.
    supports_inference_mode = False
    keeps_open_windows = False

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        zero_optimization: bool = True,
        stage: int = 2,
        remote_device: str | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        offload_params_device: str = "cpu",
        nvme_path: str = "/local_nvme",
        params_buffer_count: int = 5,
        params_buffer_size: int = 100_000_000,
        max_in_cpu: int = 1_000_000_000,
        offload_optimizer_device: str = "cpu",
        optimizer_buffer_count: int = 4,
        block_size: int = 1_048_576,
        queue_depth: int = 8,
        single_submit: bool = False,
        overlap_events: bool = True,
        thread_count: int = 1,
        pin_memory: bool = False,
        sub_group_size: int = 1_000_000_000_000,
        contiguous_gradients: bool = True,
        overlap_comm: bool = True,
        allgather_partitions: bool = True,
        reduce_scatter: bool = True,
        allgather_bucket_size: int = 200_000_000,
        reduce_bucket_size: int = 200_000_000,
        zero_allow_untested_optimizer: bool = True,
        logging_batch_size_per_gpu: str | int = "auto",
        config: str | Path | StateDict | None = None,
        logging_level: int = logging.WARNING,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        loss_scale: float = 0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        min_loss_scale: int = 1,
        partition_activations: bool = False,
        cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False,
        synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        exclude_frozen_parameters: bool = False,
        precision: Precision | None = None,
        step_timeout: timedelta | None = None,
        uneven: str = "longest",
    ) -> None:
        options = dict(locals())
        require_package("deepspeed", "DeepSpeedStrategy", "Or use strategy='fsdp', which cuts the same.")
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision=precision,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            step_timeout=step_timeout,
            uneven=uneven,
        )
        own = read_config(config)
        self.config: StateDict = make_config(options) if own is None else own
        self.stage: int = int((self.config.get("zero_optimization") or {}).get("stage", 0))
        if self.stage not in (0, 1, 2, 3) or (zero_optimization and own is None and self.stage == 0):
            raise MisconfigurationException(f"stage must be 1, 2 or 3, received {stage!r}. Use 2, or 3 to cut weights.")
        if offload_parameters and self.stage != 3:
            raise MisconfigurationException(
                f"offload_parameters=True needs stage=3, in which weights are cut, received stage={stage}. Set stage=3."
            )
        if logging_batch_size_per_gpu != "auto":
            self.config.setdefault("train_micro_batch_size_per_gpu", logging_batch_size_per_gpu)
        names = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
        self._loss_scaling = {name: options[name] for name in names}
        self._remote_device = remote_device or (offload_params_device if offload_parameters else None)
        self._knows_windows = True
        self._has_scaled = False
        self._exclude_frozen = exclude_frozen_parameters
        self._logging_level = logging_level
        self.engine: Any = None
        """DeepSpeed's engine, of the one module and its optimizer; None until they are set up."""

    def precision_for(self, name: str, device: torch.device) -> Precision:
        """Return the number format of a name; see :meth:`Strategy.precision_for`."""
        if name.startswith("16-") and device.type == "cpu":
            raise MisconfigurationException(
                f"precision={name!r} cannot be used with DeepSpeed on the CPU, which has no float16. Use 'bf16-mixed'."
            )
        return DeepSpeedPrecision(name)

    def _configure_launcher(self) -> None:
        """Start the script again for each process."""
        if not isinstance(self.precision, DeepSpeedPrecision):
            raise MisconfigurationException(
                f"DeepSpeedStrategy needs a DeepSpeedPrecision, received {type(self.precision).__name__}: DeepSpeed keeps the "
                "weights and the loss scale itself. Use DeepSpeedPrecision('bf16-mixed'), or Trainer(precision=...)."
            )
        self.launch_by("popen")

    def default_checkpoint_io(self) -> CheckpointIO:
        """Return what lets DeepSpeed write its folders."""
        return ZeroCheckpointIO(self._exclude_frozen)

    def setup_environment(self) -> None:
        """Connect the processes; see :meth:`Strategy.setup_environment`."""
        if not isinstance(self.checkpoint_io, ZeroCheckpointIO):
            raise MisconfigurationException(
                f"DeepSpeed writes its checkpoints itself, in the foreground, received {type(self.checkpoint_io).__name__}. "
                "Leave it out, and async_save=True of ModelCheckpoint, too."
            )
        super().setup_environment()

    # Modules and optimizers

    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        """Return the module; with its optimizer it becomes an engine (see :meth:`setup_optimizer`)."""
        self._set_engine(None)
        self.check_same_module(module, for_training)
        if for_training:
            return module
        if self.stage == 3:
            self._set_engine(self._initialize(model=module))
            wrapped: Module = self.engine
            return wrapped
        collectives.sync_tensors([*module.parameters(), *module.buffers()])
        return module

    def setup_optimizer(self, optimizer: Optimizer, module: Module | None = None) -> Optimizer:
        """Make the engine of the module and the optimizer, and return the optimizer, or what ``config`` has in its place.

        Raises:
            ValueError: There is an engine with an optimizer already, or the module is not known.
        """
        if module is None or self.engine is not None:
            raise MisconfigurationException(
                "DeepSpeed trains one module by one optimizer, received "
                f"{'a second optimizer' if self.engine is not None else 'an optimizer without its module'}. Return one from "
                "`configure_optimizers`; with Fabric, call fabric.setup(module, optimizer)."
            )
        # Where the user says when to step, the engine learns only then that what it has accumulated is to be reduced.
        self._knows_windows = bool(getattr(module, "automatic_optimization", False))
        engine = self._initialize(
            model=module,
            model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
            optimizer=None if "optimizer" in self.config else optimizer,
        )
        self._set_engine(engine)
        if module is self.lightning_module:
            self.model = engine
        found: Optimizer = engine.basic_optimizer
        if engine.optimizer is not found:
            setattr(found, "zero_grad", forgetting(engine.optimizer))  # noqa: B010  (a method of its class)
        return found

    def _initialize(self, **parts: Any) -> Any:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(self._logging_level)
        config = with_precision(self.config, self.precision.precision, self._loss_scaling)
        config["managed_gradient_accumulation"] = self._knows_windows
        if not self._knows_windows and self.stage in (1, 3):
            config["zero_optimization"] = {**config["zero_optimization"], "overlap_comm": False}
        with environment_variables(LOCAL_RANK=str(self.local_rank)):
            engine, *_ = deepspeed.initialize(config=config, dist_init_required=False, **parts)
        if "activation_checkpointing" in config:
            # The engine leaves this part of its configuration to whoever made it.
            deepspeed.checkpointing.configure(None, deepspeed_config=config)
        return engine

    def _set_engine(self, engine: Any) -> None:
        if self.engine is not None:
            self.engine.destroy()
        self.engine = engine
        assert isinstance(self.precision, DeepSpeedPrecision)
        assert isinstance(self.checkpoint_io, ZeroCheckpointIO)
        self.precision.engine = self.checkpoint_io.engine = engine

    def unwrap(self, module: Module) -> Module:
        """Return the module inside of DeepSpeed's engine."""
        inner: Module = module.module if module is self.engine else module
        return inner

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Cut each layer as soon as it is made, in stage 3."""
        if self.stage != 3:
            yield
            return
        import deepspeed

        config = with_precision(self.config, self.precision.precision, self._loss_scaling)
        with environment_variables(LOCAL_RANK=str(self.local_rank)):
            context = deepspeed.zero.Init(
                remote_device=self._remote_device,
                config_dict_or_path=config,
                dtype=self.precision.dtype,  # type: ignore[attr-defined]  # checked
            )
        with context:
            yield

    # The step

    def compose_step(self, module: Module, name: str) -> Callable[..., Any]:
        """Return the method, run by the engine, which is there as soon as the optimizer is set up."""
        user_module = self.unwrap(module)
        step = getattr(user_module, name)

        def run_engine(*args: Any, **kwargs: Any) -> Any:
            return (self.engine or user_module)(*args, **kwargs)

        return in_forward_context(run_as_forward(run_engine, user_module, step), self.precision, name)  # type: ignore[arg-type]  # is called

    def no_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Return a context in which gradients are accumulated; see :meth:`Strategy.no_sync`."""
        return self._inside_of_window() if enabled and self._knows_windows else nullcontext()

    @contextmanager
    def _inside_of_window(self) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        """Multiply the gradients; see :meth:`Strategy.scale_gradients`."""
        zero = self.engine.optimizer
        if zero is optimizer:
            super().scale_gradients(optimizer, factor)
        else:
            # They lie in DeepSpeed's own buffers, and are divided by the loss scale in the step that follows.
            zero.override_loss_scale(zero.loss_scale / float(factor))
            self._has_scaled = True

    def clip_gradients(
        self,
        module: Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """Tell DeepSpeed to clip the norm in the step that follows; see :meth:`Strategy.clip_gradients`.

        DeepSpeed learns the norm in that step, so ``error_if_nonfinite`` is not looked at.

        Returns:
            None: the norm is known in the step.

        Raises:
            ValueError: DeepSpeed cannot clip like that.
        """
        if self.engine.optimizer is optimizer:
            return super().clip_gradients(module, optimizer, clip_val, max_norm, norm_type, error_if_nonfinite)
        if clip_val is not None or norm_type != 2.0:
            raise MisconfigurationException(
                f"DeepSpeed clips by the 2-norm alone, received {clip_val=}, {norm_type=}. Use gradient_clip_algorithm='norm'."
            )
        self.engine.optimizer.clip_grad = max_norm
        return None

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any] | None = None,
        model: Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step DeepSpeed's engine; see :meth:`Strategy.optimizer_step`."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._has_scaled:
            self.engine.optimizer.custom_loss_scaler = self._has_scaled = False
        return result

    # State

    def module_state(self, module: Module) -> StateDict:
        """Return the weights; nothing in stage 3, where only DeepSpeed's own files hold them."""
        return {} if self.stage == 3 and self.engine is not None else super().module_state(module)

    def load_module_state(self, module: Module, state: Any, strict: bool = True) -> None:
        """Load weights that are whole, or in DeepSpeed's folder; then, in fit, with the states of the optimizer.

        Raises:
            ValueError: The folder was written by another number of processes.
        """
        # For evaluation in stage 3 DeepSpeed has an object in the place of its optimizer.
        is_training = getattr(self.engine, "basic_optimizer", None) is not None
        if isinstance(state, ZeroEntry):
            if is_training:
                self._load_folder(state, strict)
                return
            state = whole_weights(state.folder)
        user_module = self.unwrap(module)
        if self.stage == 3 and self.engine is not None:
            load_into_parts(user_module, state, strict)
        else:
            user_module.load_state_dict(state, strict=strict)
        if is_training and self.stage == 3:
            self.engine.optimizer._restore_from_bit16_weights()
        elif is_training and self.stage:
            from deepspeed.utils import safe_set_full_fp32_param

            for name, parameter in user_module.named_parameters():
                if name in state and parameter.requires_grad:
                    safe_set_full_fp32_param(parameter, state[name])

    def _load_folder(self, entry: ZeroEntry, strict: bool) -> None:
        if entry.world_size != self.world_size:
            raise MisconfigurationException(
                f"{entry.folder!r} was written by {entry.world_size} processes of DeepSpeed, and there are "
                f"{self.world_size}. Use as many to go on, or load its weights with `load_from_checkpoint` and start a new fit."
            )
        self.engine.load_checkpoint(
            entry.folder, tag=ZERO_FOLDER, load_module_strict=strict, load_lr_scheduler_states=False
        )

    def optimizer_state(self, optimizer: Optimizer, module: Module | None = None) -> StateDict:
        """Return nothing: DeepSpeed's own files hold the state."""
        return {}

    def load_optimizer_state(self, optimizer: Optimizer, state: Any, module: Module | None = None) -> None:
        """Take note that the state of a folder was loaded with the weights.

        Raises:
            ValueError: It is the state of another strategy.
        """
        if not isinstance(state, ZeroEntry):
            raise MisconfigurationException(
                "DeepSpeed goes on from folders that DeepSpeed wrote, received the file of another strategy. Load its "
                "weights with `load_from_checkpoint` and start a new fit."
            )

    def window_gradients(self, module: Module) -> list[Tensor | None]:
        """Return nothing, with a warning: DeepSpeed does not give out what it has accumulated."""
        rank_zero_warn(
            "This checkpoint is saved inside of an accumulation window, whose gradients DeepSpeed does not give out. A run "
            "that goes on from it does not learn from the batches of that window so far."
        )
        return []

    # Files

    def load_checkpoint(self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None) -> StateDict:
        """Return a checkpoint: a file, or a folder with places that DeepSpeed reads; see :meth:`Strategy.load_checkpoint`."""
        if is_sharded(checkpoint_path) and is_zero(local_path(checkpoint_path)):
            return load_zero(checkpoint_path, weights_only)
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if "optimizer_states" in checkpoint:
            # Only their places, for a sentence about them when they are needed.
            checkpoint["optimizer_states"] = [None for _ in checkpoint["optimizer_states"]]
        return checkpoint
