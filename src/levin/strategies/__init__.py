"""How a module is placed and wrapped, how processes talk, and how state is gathered."""

from levin.strategies.ddp import DDPStrategy
from levin.strategies.layer_sync import LayerSync, TorchSyncBatchNorm
from levin.strategies.parallel import ParallelStrategy
from levin.strategies.registry import StrategyRegistry
from levin.strategies.single_device import SingleDeviceStrategy
from levin.strategies.strategy import Strategy

__all__ = [
    "DDPStrategy",
    "LayerSync",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "Strategy",
    "StrategyRegistry",
    "TorchSyncBatchNorm",
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


_register()
