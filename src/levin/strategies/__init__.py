"""How a module is placed and wrapped, how processes talk, and how state is gathered."""

from typing import TYPE_CHECKING

from levin.strategies.ddp import DDPStrategy
from levin.strategies.layer_sync import LayerSync, TorchSyncBatchNorm
from levin.strategies.parallel import ParallelStrategy
from levin.strategies.registry import StrategyRegistry
from levin.strategies.single_device import SingleDeviceStrategy
from levin.strategies.strategy import Strategy
from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.strategies.deepspeed import DeepSpeedStrategy as DeepSpeedStrategy
    from levin.strategies.fsdp import FSDPStrategy as FSDPStrategy
    from levin.strategies.group_collectives import Collective as Collective
    from levin.strategies.group_collectives import SingleDeviceCollective as SingleDeviceCollective
    from levin.strategies.group_collectives import TorchCollective as TorchCollective
    from levin.strategies.model_parallel import ModelParallelStrategy as ModelParallelStrategy
    from levin.strategies.xla import SingleDeviceXLAStrategy as SingleDeviceXLAStrategy
    from levin.strategies.xla import XLAFSDPStrategy as XLAFSDPStrategy
    from levin.strategies.xla import XLAStrategy as XLAStrategy

# torch's parts for sharding take most of a second to import.
_HOMES = {
    "levin.strategies.deepspeed": "DeepSpeedStrategy",
    "levin.strategies.fsdp": "FSDPStrategy",
    "levin.strategies.group_collectives": "Collective SingleDeviceCollective TorchCollective",
    "levin.strategies.model_parallel": "ModelParallelStrategy",
    "levin.strategies.xla": "SingleDeviceXLAStrategy XLAFSDPStrategy XLAStrategy",
}
__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = [
    "Collective",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "LayerSync",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceCollective",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "Strategy",
    "StrategyRegistry",
    "TorchCollective",
    "TorchSyncBatchNorm",
    "XLAFSDPStrategy",
    "XLAStrategy",
]


def _register() -> None:
    StrategyRegistry.register("single_device", SingleDeviceStrategy, description="one process on one device")
    for name, start_method in (
        ("ddp", "popen"),
        ("ddp_spawn", "spawn"),
        ("ddp_fork", "fork"),
        ("ddp_notebook", "fork"),
    ):
        text = f"DistributedDataParallel, processes started by {start_method}"
        StrategyRegistry.register(name, DDPStrategy, description=text, start_method=start_method)
        for find_unused in (True, False):
            StrategyRegistry.register(
                f"{name}_find_unused_parameters_{str(find_unused).lower()}",
                DDPStrategy,
                description=f"{text}, find_unused_parameters={find_unused}",
                start_method=start_method,
                find_unused_parameters=find_unused,
            )
    fsdp = "levin.strategies.fsdp:FSDPStrategy"
    StrategyRegistry.register("fsdp", fsdp, description="weights cut over all processes by fully_shard")
    StrategyRegistry.register("fsdp_cpu_offload", fsdp, description="the same, kept in host memory", cpu_offload=True)
    deepspeed = "levin.strategies.deepspeed:DeepSpeedStrategy"
    for name, text, arguments in (
        ("deepspeed", "optimizer states and gradients cut over all processes by DeepSpeed", {}),
        ("deepspeed_stage_1", "optimizer states cut over all processes by DeepSpeed", {"stage": 1}),
        ("deepspeed_stage_2", "optimizer states and gradients cut over all processes by DeepSpeed", {"stage": 2}),
        ("deepspeed_stage_2_offload", "the same, stepped on the host", {"stage": 2, "offload_optimizer": True}),
        ("deepspeed_stage_3", "everything cut over all processes by DeepSpeed", {"stage": 3}),
        ("deepspeed_stage_3_offload", "the same, kept in host memory", {"stage": 3, **_OFFLOADS}),
        ("deepspeed_stage_3_offload_nvme", "the same, kept on a disk", {"stage": 3, **_OFFLOADS, **_TO_DISK}),
    ):
        StrategyRegistry.register(name, deepspeed, description=text, **arguments)
    for name, kind, text, is_debug in (
        ("single_xla", "SingleDeviceXLAStrategy", "one process on one XLA device", {}),
        ("xla", "XLAStrategy", "a process for each XLA device, gradients averaged", {}),
        ("xla_debug", "XLAStrategy", "the same, and torch_xla tells what it compiles", {"debug": True}),
        ("xla_fsdp", "XLAFSDPStrategy", "weights cut over all XLA devices of one process", {}),
    ):
        StrategyRegistry.register(name, f"levin.strategies.xla:{kind}", description=text, **is_debug)


_OFFLOADS = {"offload_optimizer": True, "offload_parameters": True}
_TO_DISK = {"offload_optimizer_device": "nvme", "offload_params_device": "nvme", "remote_device": "nvme"}
_register()
