"""Strategies by the name that the user types."""

from __future__ import annotations

from typing import Any

from levin.strategies.ddp import DDPStrategy
from levin.strategies.single_device import SingleDeviceStrategy
from levin.strategies.strategy import Strategy
from levin.utilities.registry import Registry


class StrategyRegistryType(Registry[Strategy]):
    """Maps a name to a :class:`Strategy` class and its arguments.

    Example:
        >>> from levin.strategies import SingleDeviceStrategy
        >>> registry = StrategyRegistryType()
        >>> registry.register("one_cpu", SingleDeviceStrategy, device="cpu")
        >>> registry.get("one_cpu").root_device
        device(type='cpu')
    """

    def __init__(self) -> None:
        super().__init__("strategy")

    def register(
        self,
        name: str,
        strategy: type[Strategy] | str | None = None,
        description: str = "",
        override: bool = False,
        **init_params: object,
    ) -> Any:
        """Make a strategy selectable by ``name``, in lower case; see :meth:`Registry.add`."""
        return self.add(name, strategy, description, override, **init_params)

    def available_strategies(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self)

    def __str__(self) -> str:
        return f"Registered strategies: {', '.join(sorted(self))}"


StrategyRegistry = StrategyRegistryType()


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
