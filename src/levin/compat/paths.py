"""What each module of Lightning's holds, and where that is in levin: the data of :mod:`levin.compat.table`.

A key is a path below ``lightning``; ``pytorch`` is also spelled ``pytorch_lightning``, ``fabric`` also
``lightning_fabric``. Below it stand the modules that hold the names, and the names themselves. ``theirs:ours`` is a name
that is another one here. Rooms come first: where a name has a room (``levin.callbacks``), that is its module.
"""

from __future__ import annotations

ABSENT = "levin.compat.absent"
"""Names of features that are not there: they can be imported and mentioned; using one says what to use instead."""

EQUIVALENT_SPIKE = "levin.compat.fabric_spike"
EQUIVALENT_STRATEGIES = "levin.compat._fabric_strategies"
EQUIVALENT_LOGGERS = "levin.compat._fabric_loggers"
"""The loggers of Fabric, which name their folder in another way."""

EQUIVALENTS = "levin.compat.equivalents"
"""Small functions and classes that nothing of levin's own needs, and packages do."""

PRIVATE = "levin.compat.private"
"""Helpers that are private there, and that packages import."""

HPARAMS = "levin.compat.hparams"
"""Helpers for hyper-parameters."""

_DEMOS = "levin.demos"
_ACCELERATORS, _CALLBACKS, _ENVIRONMENTS = "levin.accelerators", "levin.callbacks", "levin.environments"
_CHECKPOINT, _LAUNCHERS, _LOGGERS, _COUNTERS = "levin.checkpoint", "levin.launchers", "levin.loggers", "levin.counters"
_CLI, _TUNER, _PRECISION, _PROFILERS, _STRATEGIES, _TYPES = (
    "levin.cli", "levin.tuner", "levin.precision", "levin.profilers", "levin.strategies", "levin.utilities.types",
)  # fmt: skip
_FABRIC = "levin.fabric"
_RANK_ZERO, _SUMMARY, _BARS = "levin.utilities.rank_zero", "levin.utilities.model_summary", "levin.callbacks.progress"
_ROOT = "Callback LightningDataModule LightningModule Trainer seed_everything"
_ALL_ENVIRONMENTS = (
    "ClusterEnvironment KubeflowEnvironment LSFEnvironment LightningEnvironment MPIEnvironment SLURMEnvironment "
    "TorchElasticEnvironment XLAEnvironment"
)
# Tensors of XLA devices reach the file from the CPU, by the strategy.
_FILES = "TorchCheckpointIO XLACheckpointIO:TorchCheckpointIO"
_PLAIN_PRECISIONS = "DoublePrecision HalfPrecision Precision"
_EARLIER_PRECISIONS = (
    "DoublePrecisionPlugin:DoublePrecision HalfPrecisionPlugin:HalfPrecision MixedPrecisionPlugin:MixedPrecision "
    "PrecisionPlugin:Precision"
)
_PACKAGE_PRECISIONS = "BitsandbytesPrecision DeepSpeedPrecision TransformerEnginePrecision XLAPrecision"
_RANK_ZERO_NAMES = "rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn"
_RANK_ZERO_MODULE = {
    _RANK_ZERO: f"rank_prefixed_message rank_zero_debug {_RANK_ZERO_NAMES}",
    "lightning_utilities.core.rank_zero": "WarningCache",
    "levin.utilities.warnings": "LightningDeprecationWarning",
}
_SUMMARY_NAMES = (
    "LayerSummary ModelSummary get_formatted_model_size get_human_readable_count parse_batch_shape summarize"
)

TABLE: dict[str, dict[str, str]] = {
    "": {"levin": f"{_ROOT} Fabric"},
    # ------------------------------------------------------------------ lightning.pytorch, pytorch_lightning
    "pytorch": {
        "levin": _ROOT, "levin.utilities.warnings": "disable_possible_user_warnings", PRIVATE: "_logger",
    },
    "pytorch.accelerators": {
        _ACCELERATORS: "Accelerator AcceleratorRegistry CPUAccelerator CUDAAccelerator MPSAccelerator XLAAccelerator "
        "find_usable_cuda_devices",
    },
    "pytorch.accelerators.cpu": {_ACCELERATORS: "CPUAccelerator", EQUIVALENTS: "get_cpu_stats"},
    "pytorch.accelerators.cuda": {_ACCELERATORS: "CUDAAccelerator", "levin.accelerators.cuda": "num_cuda_devices"},
    "pytorch.callbacks": {
        _CALLBACKS: "BackboneFinetuning BaseFinetuning BasePredictionWriter Callback Checkpoint DeviceStatsMonitor "
        "EMAWeightAveraging EarlyStopping GradientAccumulationScheduler LambdaCallback LearningRateMonitor "
        "ModelCheckpoint ModelPruning ModelSummary OnExceptionCheckpoint ProgressBar RichModelSummary RichProgressBar "
        "SpikeDetection StochasticWeightAveraging TQDMProgressBar ThroughputMonitor Timer WeightAveraging",
        _TUNER: "BatchSizeFinder LearningRateFinder",
    },
    "pytorch.callbacks.early_stopping": {
        _CALLBACKS: "Callback EarlyStopping", "levin.callbacks.early_stopping": "EarlyStoppingReason",
    },
    "pytorch.callbacks.finetuning": {
        _CALLBACKS: "BackboneFinetuning BaseFinetuning", "levin.callbacks.finetuning": "multiplicative",
    },
    "pytorch.callbacks.model_checkpoint": {
        _CALLBACKS: "ModelCheckpoint", "levin.utilities.filesystem": "_is_local_file_protocol:is_local",
    },
    "pytorch.callbacks.prediction_writer": {_CALLBACKS: "BasePredictionWriter", "levin.callbacks.prediction_writer": "WriteInterval"},
    "pytorch.callbacks.progress": {_CALLBACKS: "ProgressBar RichProgressBar TQDMProgressBar"},
    "pytorch.callbacks.progress.progress_bar": {
        _CALLBACKS: "ProgressBar", f"{_BARS}.progress_bar": "get_standard_metrics",
    },
    "pytorch.callbacks.progress.rich_progress": {
        _CALLBACKS: "RichProgressBar RichProgressBarTheme",
        f"{_BARS}.rich_columns": "BatchesProcessedColumn CustomBarColumn CustomTimeColumn MetricsTextColumn "
        "ProcessingSpeedColumn",
        "rich.progress": "CustomProgress:Progress",
    },
    "pytorch.callbacks.progress.tqdm_progress": {
        _CALLBACKS: "TQDMProgressBar",
        f"{_BARS}.tqdm_progress": "Tqdm",
        f"{_BARS}.progress_bar": "convert_inf",
    },
    "pytorch.callbacks.timer": {_CALLBACKS: "Timer", EQUIVALENTS: "Interval"},
    "pytorch.cli": {
        PRIVATE: "_get_short_description",
        _CLI: "ArgsType LRSchedulerCallable LRSchedulerType LRSchedulerTypeTuple LRSchedulerTypeUnion "
        "LightningArgumentParser LightningCLI OptimizerCallable ReduceLROnPlateau SaveConfigCallback instantiate_class "
        "instantiate_module",
    },
    "pytorch.core": {"levin": "LightningDataModule LightningModule"},
    "pytorch.core.hooks": {"levin.hooks": "CheckpointHooks DataHooks ModelHooks"},
    "pytorch.core.mixins": {"levin.hparams": "HyperparametersMixin"},
    "pytorch.core.mixins.hparams_mixin": {"levin.hparams": "HyperparametersMixin"},
    "pytorch.core.optimizer": {
        "levin.optimizer": "LightningOptimizer _MockOptimizer:MockOptimizer do_nothing_closure:do_nothing",
    },
    "pytorch.demos": {
        _DEMOS: "BoringDataModule BoringModel DemoModel LightningLSTM LightningTransformer SequenceSampler SimpleLSTM "
        "Transformer WikiText2",
    },
    "pytorch.demos.boring_classes": {
        f"{_DEMOS}.boring_classes": "BoringDataModule BoringDataModuleNoLen BoringModel DemoModel "
        "IterableBoringDataModule ManualOptimBoringModel Net RandomDataset RandomDictDataset RandomIterableDataset "
        "RandomIterableDatasetWithLen",
    },
    "pytorch.demos.lstm": {f"{_DEMOS}.lstm": "LightningLSTM SequenceSampler SimpleLSTM"},
    "pytorch.demos.mnist_datamodule": {f"{_DEMOS}.mnist_datamodule": "MNIST MNISTDataModule _MNIST:MNIST"},
    "pytorch.demos.transformer": {
        f"{_DEMOS}.transformer": "Dictionary LightningTransformer PositionalEncoding Transformer WikiText2 tokenize",
    },
    "pytorch.core.module": {"levin": "LightningModule", PRIVATE: "_jit_is_scripting"},
    "pytorch.core.saving": {
        "levin.loading": "_load_from_checkpoint:load_from_checkpoint _default_map_location:default_map_location convert:literal",
        "levin.utilities.filesystem": "get_filesystem",
        HPARAMS: "load_hparams_from_tags_csv load_hparams_from_yaml save_hparams_to_tags_csv save_hparams_to_yaml "
        "update_hparams",
    },
    "pytorch.loggers": {
        _LOGGERS: "CSVLogger Logger TensorBoardLogger",
        "levin.loggers.comet": "CometLogger",
        "levin.loggers.litlogger": "LitLogger",
        "levin.loggers.mlflow": "MLFlowLogger",
        "levin.loggers.wandb": "WandbLogger",
        ABSENT: "NeptuneLogger",
    },
    "pytorch.loggers.csv_logs": {_LOGGERS: "CSVLogger", "levin.loggers.csv_logs": "ExperimentWriter"},
    "pytorch.loggers.mlflow": {
        "levin.loggers.mlflow": "MLFlowLogger", "levin.loggers.utilities": "_convert_params:to_dict", PRIVATE: "_flatten_dict",
    },
    "pytorch.loggers.utilities": {PRIVATE: "_scan_checkpoints"},
    "pytorch.loggers.logger": {
        _LOGGERS: "DummyLogger Logger rank_zero_experiment", "levin.loggers.logger": "DummyExperiment",
        EQUIVALENTS: "merge_dicts",
    },
    "pytorch.loops": {
        _COUNTERS: "_FitLoop:FitLoop _TrainingEpochLoop:EpochLoop _PredictionLoop:EvaluationLoop",
        PRIVATE: "_EvaluationLoop",
    },
    "pytorch.loops.optimization": {},
    "pytorch.loops.optimization.automatic": {ABSENT: "ClosureResult"},
    "pytorch.overrides": {},
    "pytorch.overrides.distributed": {"levin.data.samplers": "UnrepeatedDistributedSampler"},
    "pytorch.plugins": {
        _CHECKPOINT: f"AsyncCheckpointIO CheckpointIO {_FILES}",
        _ENVIRONMENTS: "ClusterEnvironment",
        _PRECISION: f"{_PLAIN_PRECISIONS} MixedPrecision {_EARLIER_PRECISIONS} {_PACKAGE_PRECISIONS}",
        _STRATEGIES: "LayerSync TorchSyncBatchNorm",
        PRIVATE: "_PLUGIN_INPUT",
        ABSENT: "FSDPPrecision",
    },
    "pytorch.plugins.environments": {_ENVIRONMENTS: _ALL_ENVIRONMENTS},
    "pytorch.plugins.io": {_CHECKPOINT: f"AsyncCheckpointIO CheckpointIO {_FILES}"},
    "pytorch.plugins.layer_sync": {_STRATEGIES: "LayerSync TorchSyncBatchNorm"},
    "pytorch.plugins.precision": {
        _PRECISION: f"{_PLAIN_PRECISIONS} MixedPrecision {_EARLIER_PRECISIONS} {_PACKAGE_PRECISIONS}", ABSENT: "FSDPPrecision",
    },
    "pytorch.plugins.precision.double": {
        _PRECISION: "DoublePrecision", EQUIVALENTS: "LightningDoublePrecisionModule",
    },
    "pytorch.profilers": {
        _PROFILERS: "AdvancedProfiler PassThroughProfiler Profiler PyTorchProfiler SimpleProfiler XLAProfiler",
    },
    "pytorch.profilers.pytorch": {_PROFILERS: "PyTorchProfiler", EQUIVALENTS: "_KINETO_AVAILABLE"},
    "pytorch.serve": {_CALLBACKS: "ServableModule ServableModuleValidator"},
    "pytorch.strategies": {
        _STRATEGIES: "DDPStrategy DeepSpeedStrategy FSDPStrategy ModelParallelStrategy ParallelStrategy "
        "SingleDeviceStrategy SingleDeviceXLAStrategy Strategy StrategyRegistry XLAStrategy",
    },
    "pytorch.strategies.launchers": {
        PRIVATE: "_MultiProcessingLauncher _SubprocessScriptLauncher",
        ABSENT: "_XLALauncher",
    },
    "pytorch.strategies.launchers.launcher": {_LAUNCHERS: "_Launcher:Launcher"},
    "pytorch.trainer": {"levin": "Trainer seed_everything"},
    "pytorch.trainer.connectors": {},
    "pytorch.trainer.call": {PRIVATE: "_call_lightning_module_hook"},
    "pytorch.trainer.connectors.accelerator_connector": {EQUIVALENTS: "_AcceleratorConnector", PRIVATE: "_IS_INTERACTIVE"},
    "pytorch.trainer.setup": {},
    "pytorch.trainer.connectors.checkpoint_connector": {"levin.compat.connectors": "_CheckpointConnector"},
    "pytorch.trainer.connectors.callback_connector": {"levin.compat.connectors": "_CallbackConnector"},
    "pytorch.trainer.connectors.logger_connector": {},
    "pytorch.trainer.connectors.logger_connector.result": {
        ABSENT: "_ResultCollection _ResultMetric", EQUIVALENTS: "_OUT_DICT",
    },
    "pytorch.trainer.states": {"levin.utilities.states": "RunningStage TrainerFn TrainerState TrainerStatus"},
    "pytorch.trainer.trainer": {"levin": "Trainer"},
    "pytorch.tuner": {_TUNER: "Tuner"},
    "pytorch.tuner.lr_finder": {"levin.tuner": "_LRFinder:LRFinder", "levin.tuner.learning_rate": "_LRCallback:Recorder"},
    "pytorch.tuner.tuning": {_TUNER: "Tuner"},
    "pytorch.utilities": {
        _RANK_ZERO: _RANK_ZERO_NAMES,
        "levin.utilities.attribute_dict": "AttributeDict",
        "levin.utilities.move": "move_data_to_device",
        "levin.utilities.throughput": "measure_flops",
        "levin.utilities.warnings": "disable_possible_user_warnings",
        "levin.utilities.parameters": "find_shared_parameters grad_norm set_shared_parameters",
        "levin.data.combined": "CombinedLoader",
        "levin.utilities.states": "GradClipAlgorithmType",
        EQUIVALENTS: "FLOAT16_EPSILON FLOAT32_EPSILON FLOAT64_EPSILON LightningEnum is_picklable "
        "is_shared_filesystem suggested_max_num_workers",
    },
    "pytorch.utilities.testing": {"levin.compat.run_if": "_runif_reasons"},
    "pytorch.utilities.cloud_io": {"levin.utilities.filesystem": "get_filesystem"},
    "pytorch.utilities.compile": {
        "levin.trainer.compiled": "from_compiled to_uncompiled", PRIVATE: "_maybe_unwrap_optimized",
    },
    "pytorch.utilities.signature_utils": {PRIVATE: "is_param_in_hook_signature"},
    "pytorch.plugins.io.wrapper": {PRIVATE: "_WrappingCheckpointIO"},
    "pytorch.utilities.consolidate_checkpoint": {},
    "pytorch.utilities.data": {"levin.log_store": "extract_batch_size", EQUIVALENTS: "has_len_all_ranks"},
    "pytorch.utilities.deepspeed": {"levin.checkpoint.zero": "convert_zero_checkpoint_to_fp32_state_dict"},
    "pytorch.utilities.exceptions": {
        "levin.utilities.exceptions": "MisconfigurationException SIGTERMException",
        EQUIVALENTS: "_TunerExitException",
    },
    "pytorch.utilities.imports": {
        "lightning_utilities.core.imports": "RequirementCache compare_version package_available",
        EQUIVALENTS: "_OMEGACONF_AVAILABLE",
    },
    "pytorch.utilities.memory": {
        "levin.utilities.memory": "garbage_collection_cuda:free_memory is_oom_error",
        EQUIVALENTS: "is_cuda_out_of_memory is_cudnn_snafu is_out_of_cpu_memory "
        "recursive_detach",
    },
    "pytorch.utilities.migration": {EQUIVALENTS: "migrate_checkpoint"},
    "pytorch.utilities.migration.utils": {EQUIVALENTS: "migrate_checkpoint"},
    "pytorch.utilities.model_helpers": {
        "levin.utilities.overrides": "is_overridden", EQUIVALENTS: "get_torchvision_model",
    },
    "pytorch.utilities.model_summary": {_SUMMARY: _SUMMARY_NAMES},
    "pytorch.utilities.model_summary.model_summary": {_SUMMARY: f"{_SUMMARY_NAMES} NOT_APPLICABLE UNKNOWN_SIZE"},
    "pytorch.utilities.parsing": {
        "levin.utilities.attribute_dict": "AttributeDict",
        HPARAMS: "clean_namespace collect_init_args get_init_args lightning_getattr lightning_hasattr lightning_setattr "
        "parse_class_init_keys",
        EQUIVALENTS: "is_picklable",
    },
    "pytorch.utilities.rank_zero": _RANK_ZERO_MODULE,
    "pytorch.utilities.seed": {"levin.utilities.seed": "isolate_rng"},
    "pytorch.utilities.types": {
        _TYPES: "EVAL_DATALOADERS LRSchedulerConfig LRSchedulerConfigType LRSchedulerTypeUnion:LRSchedulerType "
        "OptimizerConfig OptimizerLRScheduler OptimizerLRSchedulerConfig STEP_OUTPUT TRAIN_DATALOADERS",
        "torch.optim.lr_scheduler": "LRScheduler ReduceLROnPlateau",
        EQUIVALENTS: "_EVALUATE_OUTPUT _PREDICT_OUTPUT",
    },
    "pytorch.utilities.upgrade_checkpoint": {},
    "pytorch.utilities.warnings": {"levin.utilities.warnings": "PossibleUserWarning"},
    # ------------------------------------------------------------------ lightning.fabric, lightning_fabric
    "fabric": {
        "levin": "seed_everything",
        "levin.utilities.warnings": "disable_possible_user_warnings",
        _FABRIC: "Fabric is_wrapped",
    },
    "fabric.accelerators": {
        _ACCELERATORS: "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator XLAAccelerator "
        "find_usable_cuda_devices",
        f"{_ACCELERATORS}.registry": "ACCELERATOR_REGISTRY:AcceleratorRegistry",
    },
    "fabric.accelerators.cuda": {
        _ACCELERATORS: "CUDAAccelerator find_usable_cuda_devices",
        "levin.accelerators.cuda": "num_cuda_devices",
        "torch.cuda": "is_cuda_available:is_available",
    },
    "fabric.fabric": {_FABRIC: "Fabric"},
    "fabric.loggers": {"levin.loggers.logger": "Logger:FabricLogger", EQUIVALENT_LOGGERS: "CSVLogger TensorBoardLogger"},
    "fabric.loggers.logger": {
        _LOGGERS: "rank_zero_experiment",
        "levin.loggers.logger": "Logger:FabricLogger _DummyExperiment:DummyExperiment",
    },
    "fabric.plugins": {
        _CHECKPOINT: f"CheckpointIO {_FILES}",
        _ENVIRONMENTS: "ClusterEnvironment",
        _PRECISION: f"{_PLAIN_PRECISIONS} {_PACKAGE_PRECISIONS}",
        "levin.precision.mixed": "MixedPrecision:ForwardMixedPrecision",
        ABSENT: "FSDPPrecision",
    },
    "fabric.plugins.collectives": {_STRATEGIES: "Collective SingleDeviceCollective TorchCollective"},
    "fabric.plugins.environments": {_ENVIRONMENTS: _ALL_ENVIRONMENTS},
    "fabric.plugins.environments.lightning": {
        _ENVIRONMENTS: "LightningEnvironment",
        "levin.environments.local": "find_free_network_port:find_free_port",
    },
    "fabric.plugins.io": {_CHECKPOINT: f"CheckpointIO {_FILES}"},
    "fabric.plugins.precision": {
        _PRECISION: f"{_PLAIN_PRECISIONS} {_PACKAGE_PRECISIONS}",
        "levin.precision.mixed": "MixedPrecision:ForwardMixedPrecision", ABSENT: "FSDPPrecision",
    },
    "fabric.strategies": {
        _STRATEGIES: "DDPStrategy DeepSpeedStrategy ParallelStrategy SingleDeviceStrategy SingleDeviceXLAStrategy Strategy "
        "XLAFSDPStrategy XLAStrategy",
        EQUIVALENT_STRATEGIES: "FSDPStrategy ModelParallelStrategy",
        ABSENT: "DataParallelStrategy",
        f"{_STRATEGIES}.registry": "STRATEGY_REGISTRY:StrategyRegistry",
    },
    "fabric.strategies.fsdp": {
        EQUIVALENT_STRATEGIES: "FSDPStrategy", ABSENT: "_get_full_state_dict_context _setup_activation_checkpointing",
    },
    "fabric.strategies.launchers": {
        PRIVATE: "_MultiProcessingLauncher _SubprocessScriptLauncher",
        ABSENT: "_XLALauncher",
    },
    "fabric.utilities": {
        _RANK_ZERO: _RANK_ZERO_NAMES,
        "levin.utilities.attribute_dict": "AttributeDict",
        "levin.utilities.move": "move_data_to_device",
        "levin.fabric.throughput": "ThroughputMonitor",
        "levin.utilities.throughput": "Throughput measure_flops",
        "levin.utilities.warnings": "disable_possible_user_warnings",
        EQUIVALENTS: "LightningEnum is_shared_filesystem suggested_max_num_workers",
    },
    "fabric.utilities.testing": {"levin.compat.run_if": "_runif_reasons"},
    "fabric.utilities.apply_func": {
        "levin.utilities.move": "move_data_to_device",
        "levin.utilities.collections": "apply_to_collection",
        EQUIVALENTS: "convert_tensors_to_scalars convert_to_tensors",
    },
    "fabric.utilities.consolidate_checkpoint": {},
    "fabric.utilities.cloud_io": {
        "levin.utilities.filesystem": "get_filesystem",
        "levin.checkpoint": "_load:load _atomic_save:atomic_save",
        PRIVATE: "_is_dir",
    },
    "fabric.plugins.collectives.torch_collective": {
        _STRATEGIES: "TorchCollective", "torch.distributed.constants": "default_pg_timeout",
    },
    "fabric.plugins.precision.utils": {PRIVATE: "_convert_fp_tensor"},
    "fabric.plugins.precision.bitsandbytes": {
        "levin.precision": "BitsandbytesPrecision", EQUIVALENTS: "_BITSANDBYTES_AVAILABLE",
    },
    "fabric.utilities.data": {
        "levin.utilities.attribute_dict": "AttributeDict",
        "levin.data.loaders": "has_len",
        EQUIVALENTS: "has_iterable_dataset sized_len suggested_max_num_workers",
    },
    "fabric.utilities.distributed": {
        "levin.data.samplers": "DistributedSamplerWrapper",
        "levin.utilities.process_group": "_distributed_is_initialized:is_connected",
        "torch.distributed": "ReduceOp group",
        EQUIVALENTS: "is_shared_filesystem",
    },
    "fabric.utilities.enums": {EQUIVALENTS: "LightningEnum"},
    "fabric.utilities.exceptions": {"levin.utilities.exceptions": "MisconfigurationException"},
    "fabric.utilities.imports": {
        "lightning_utilities.core.imports": "RequirementCache compare_version", EQUIVALENTS: "_IS_WINDOWS",
    },
    "fabric.utilities.init": {PRIVATE: "_materialize_meta_tensors"},
    "fabric.utilities.logger": {
        "levin.loggers.utilities": "_add_prefix:add_prefix _convert_params:to_dict _sanitize_params:sanitize",
        PRIVATE: "_flatten_dict _sanitize_callable_params",
    },
    "fabric.utilities.load": {PRIVATE: "_NotYetLoadedTensor _lazy_load"},
    "fabric.utilities.rank_zero": {
        **_RANK_ZERO_MODULE,
        _RANK_ZERO: f"{_RANK_ZERO_MODULE[_RANK_ZERO]} _get_rank:rank_from_environment",
    },
    "fabric.utilities.registry": {PRIVATE: "_register_classes"},
    "fabric.utilities.seed": {
        "levin": "seed_everything",
        "levin.utilities.seed": "pl_worker_init_function reset_seed max_seed_value:MAX_SEED",
    },
    "fabric.utilities.spike": {EQUIVALENT_SPIKE: "SpikeDetection", _CALLBACKS: "TrainingSpikeException"},
    "fabric.utilities.throughput": {
        "levin.fabric.throughput": "ThroughputMonitor",
        "levin.utilities.throughput": "Throughput get_available_flops measure_flops",
    },
    "fabric.utilities.types": {
        _TYPES: "_DEVICE _MAP_LOCATION_TYPE _PATH",
        EQUIVALENTS: "Optimizable Steppable",
        "torch.distributed": "CollectibleGroup:ProcessGroup ReduceOp",
    },
    "fabric.utilities.warnings": {
        "levin.utilities.warnings": "PossibleUserWarning disable_possible_user_warnings",
    },
    "fabric.wrappers": {
        _FABRIC: "is_wrapped",
        "levin.fabric.wrappers": "_FabricDataLoader:FabricDataLoader _FabricModule:FabricModule "
        "_FabricOptimizer:FabricOptimizer",
    },
}  # fmt: skip

# Package -> those of its modules that hold nothing but names which the package has, too: they are where it has them.
_MODULES = {
    "pytorch.accelerators": "accelerator=Accelerator mps=MPSAccelerator xla=XLAAccelerator",
    "pytorch.callbacks": "batch_size_finder=BatchSizeFinder callback=Callback checkpoint=Checkpoint "
    "device_stats_monitor=DeviceStatsMonitor gradient_accumulation_scheduler=GradientAccumulationScheduler "
    "lambda_function=LambdaCallback lr_finder=LearningRateFinder lr_monitor=LearningRateMonitor "
    "model_summary=ModelSummary on_exception_checkpoint=OnExceptionCheckpoint "
    "pruning=ModelPruning rich_model_summary=RichModelSummary spike=SpikeDetection "
    "stochastic_weight_avg=StochasticWeightAveraging throughput_monitor=ThroughputMonitor "
    "weight_averaging=EMAWeightAveraging,WeightAveraging",
    "pytorch.core": "datamodule=LightningDataModule",
    "pytorch.loggers": "comet=CometLogger litlogger=LitLogger neptune=NeptuneLogger "
    "tensorboard=TensorBoardLogger wandb=WandbLogger",
    "pytorch.loops": "evaluation_loop=_EvaluationLoop fit_loop=_FitLoop prediction_loop=_PredictionLoop "
    "training_epoch_loop=_TrainingEpochLoop",
    "pytorch.plugins.io": "async_plugin=AsyncCheckpointIO checkpoint_plugin=CheckpointIO "
    "torch_plugin=TorchCheckpointIO",
    "pytorch.plugins.precision": "amp=MixedPrecision bitsandbytes=BitsandbytesPrecision deepspeed=DeepSpeedPrecision "
    "fsdp=FSDPPrecision half=HalfPrecision precision=Precision transformer_engine=TransformerEnginePrecision "
    "xla=XLAPrecision",
    "pytorch.profilers": "advanced=AdvancedProfiler base=PassThroughProfiler profiler=Profiler simple=SimpleProfiler "
    "xla=XLAProfiler",
    "pytorch.serve": "servable_module=ServableModule servable_module_validator=ServableModuleValidator",
    "pytorch.strategies": "ddp=DDPStrategy deepspeed=DeepSpeedStrategy fsdp=FSDPStrategy "
    "model_parallel=ModelParallelStrategy parallel=ParallelStrategy single_device=SingleDeviceStrategy "
    "single_xla=SingleDeviceXLAStrategy strategy=Strategy xla=XLAStrategy",
    "pytorch.strategies.launchers": "multiprocessing=_MultiProcessingLauncher "
    "subprocess_script=_SubprocessScriptLauncher",
    "pytorch.utilities": "combined_loader=CombinedLoader enums=GradClipAlgorithmType,LightningEnum grads=grad_norm "
    "parameter_tying=find_shared_parameters,set_shared_parameters",
    "fabric.accelerators": "accelerator=Accelerator cpu=CPUAccelerator mps=MPSAccelerator xla=XLAAccelerator",
    "fabric.loggers": "csv_logs=CSVLogger tensorboard=TensorBoardLogger",
    "fabric.plugins.collectives": "collective=Collective single_device=SingleDeviceCollective",
    "fabric.plugins.environments": "cluster_environment=ClusterEnvironment kubeflow=KubeflowEnvironment "
    "lsf=LSFEnvironment mpi=MPIEnvironment slurm=SLURMEnvironment torchelastic=TorchElasticEnvironment "
    "xla=XLAEnvironment",
    "fabric.plugins.io": "checkpoint_io=CheckpointIO torch_io=TorchCheckpointIO",
    "fabric.plugins.precision": "amp=MixedPrecision deepspeed=DeepSpeedPrecision "
    "double=DoublePrecision half=HalfPrecision precision=Precision transformer_engine=TransformerEnginePrecision "
    "xla=XLAPrecision",
    "fabric.strategies": "ddp=DDPStrategy deepspeed=DeepSpeedStrategy dp=DataParallelStrategy "
    "model_parallel=ModelParallelStrategy parallel=ParallelStrategy single_device=SingleDeviceStrategy "
    "strategy=Strategy xla=XLAStrategy xla_fsdp=XLAFSDPStrategy",
}


def _add_modules() -> None:
    for package, modules in _MODULES.items():
        for module in modules.split():
            name, _, held = module.partition("=")
            TABLE[f"{package}.{name}"] = {
                home: " ".join(kept)
                for home, names in TABLE[package].items()
                if (kept := [entry for entry in names.split() if entry.partition(":")[0] in held.split(",")])
            }


_add_modules()
