"""DeepSpeed's configuration, from what the user gave: arguments, a dict or a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import StateDict

CONFIG_VARIABLE = "PL_DEEPSPEED_CONFIG_PATH"
# What levin knows better than a file that was written before the run.
_SET_ELSEWHERE = {
    "gradient_accumulation_steps": "Trainer(accumulate_grad_batches=...)",
    "fp16": "Trainer(precision='16-mixed')",
    "bf16": "Trainer(precision='bf16-mixed')",
}


def read_config(config: Any) -> StateDict | None:
    """Return the user's own configuration as a dict; None where there is none.

    Args:
        config: A dict, or the path of a JSON file; None for the file that ``PL_DEEPSPEED_CONFIG_PATH`` names, if any.

    Raises:
        ValueError: It is of another type, there is no such file, it is no JSON, or sets what the Trainer sets.

    Example:
        >>> read_config({"zero_optimization": {"stage": 1}})
        {'zero_optimization': {'stage': 1}}
    """
    config = os.environ.get(CONFIG_VARIABLE) if config is None else config
    if config is None:
        return None
    if isinstance(config, (str, Path)):
        try:
            config = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise MisconfigurationException(
                f"config must be a dict or the path of a JSON file that can be read, received {str(config)!r}: {error}. "
                "Correct the file, or its path."
            ) from error
    if not isinstance(config, Mapping):
        raise MisconfigurationException(
            f"config must be a dict or the path of a JSON file, received {config!r}. See "
            "https://www.deepspeed.ai/docs/config-json/ for what it may hold."
        )
    for name, place in _SET_ELSEWHERE.items():
        is_set = config.get(name) not in (None, "auto") and name in config
        if is_set and (name == "gradient_accumulation_steps" or config[name].get("enabled", False) is True):
            raise MisconfigurationException(
                f"config sets {name}={config[name]!r}, which {place} says. Take it out of the configuration."
            )
    return dict(config)


def make_config(options: Mapping[str, Any]) -> StateDict:
    """Return DeepSpeed's configuration for the arguments of :class:`levin.strategies.DeepSpeedStrategy`.

    Example:
        >>> make_config({"zero_optimization": False, "zero_allow_untested_optimizer": True, "partition_activations": False})
        {'zero_allow_untested_optimizer': True}
    """
    config: StateDict = {"zero_allow_untested_optimizer": options["zero_allow_untested_optimizer"]}
    checkpointing = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
                     "synchronize_checkpoint_boundary")  # fmt: skip
    if any(options.get(name) for name in checkpointing):
        config["activation_checkpointing"] = {name: options[name] for name in checkpointing}
    if not options["zero_optimization"]:
        return config
    copied = ("stage", "contiguous_gradients", "overlap_comm", "allgather_partitions", "reduce_scatter",
              "allgather_bucket_size", "reduce_bucket_size", "sub_group_size")  # fmt: skip
    zero = {name: options[name] for name in copied}
    disk = {"nvme_path": options["nvme_path"], "pin_memory": options["pin_memory"]}
    if options["offload_optimizer"]:
        zero["offload_optimizer"] = {
            "device": options["offload_optimizer_device"], "buffer_count": options["optimizer_buffer_count"], **disk,
        }  # fmt: skip
    if options["offload_parameters"]:
        zero["offload_param"] = {
            "device": options["offload_params_device"], "buffer_count": options["params_buffer_count"],
            "buffer_size": options["params_buffer_size"], "max_in_cpu": options["max_in_cpu"], **disk,
        }  # fmt: skip
    if options["offload_optimizer"] or options["offload_parameters"]:
        # Optimizers of torch step on the host as well.
        config["zero_force_ds_cpu_optimizer"] = False
        names = ("block_size", "queue_depth", "single_submit", "overlap_events", "thread_count")
        config["aio"] = {name: options[name] for name in names}
    config["zero_optimization"] = zero
    return config


def with_precision(config: Mapping[str, Any], precision: str, loss_scaling: Mapping[str, Any]) -> StateDict:
    """Return the configuration with what the run says: its number format, and one batch per call of ``backward``.

    Args:
        config: Of the user, or of :func:`make_config`.
        precision: For example ``"bf16-mixed"``.
        loss_scaling: DeepSpeed's settings of the loss scale, for 16-bit floats.
    """
    # DeepSpeed clips at 1.0 where nothing is said.
    result: StateDict = {"gradient_clipping": 0.0, **config, "gradient_accumulation_steps": 1}
    if "train_batch_size" not in result:
        result.setdefault("train_micro_batch_size_per_gpu", 1)
    if precision.startswith("16-"):
        result["fp16"] = {**loss_scaling, **config.get("fp16", {}), "enabled": True}
    elif precision.startswith("bf16-"):
        result["bf16"] = {**config.get("bf16", {}), "enabled": True}
    return result
