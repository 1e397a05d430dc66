from __future__ import annotations

import pytest

from levin.accelerators import AcceleratorRegistry, CPUAccelerator
from levin.strategies import DDPStrategy, StrategyRegistry
from levin.strategies.registry import StrategyRegistryType
from levin.utilities.registry import Registry


def test_an_entry_reads_as_packages_read_it():
    assert StrategyRegistry["ddp_spawn"]["strategy"] is DDPStrategy
    assert StrategyRegistry["ddp_spawn"]["strategy_name"] == "ddp_spawn"
    assert StrategyRegistry["ddp_spawn"]["init_params"] == {"start_method": "spawn"}
    assert AcceleratorRegistry["cpu"]["accelerator"] is CPUAccelerator
    assert len(AcceleratorRegistry) == 4 and "cpu" in AcceleratorRegistry and len(StrategyRegistry) > 10
    assert str(AcceleratorRegistry) == "Registered accelerators: cpu, cuda, mps, tpu"


def test_names_are_added_once_replaced_on_request_and_removed():
    registry = StrategyRegistryType()

    @registry.register("mine", description="my own", start_method="spawn")
    class Mine(DDPStrategy):
        pass

    assert registry.get_class("mine") is Mine
    assert type(registry.get("mine")) is Mine
    with pytest.raises(ValueError, match="'mine' is taken"):
        registry.register("mine", DDPStrategy)
    registry.register("mine", strategy=DDPStrategy, override=True)
    assert registry.get_class("mine") is DDPStrategy and registry.available_strategies() == ["mine"]
    registry.remove("mine")
    with pytest.raises(KeyError, match="No strategy is named 'mine'"):
        registry.get("mine")
    assert registry.get("mine", default=3) == 3
    with pytest.raises(TypeError, match="received 1"):
        registry.register(1, DDPStrategy)


def test_arguments_reach_the_class():
    registry = Registry("pair")
    registry.add("pair", dict, a=1)
    assert registry.get("pair") == {"a": 1}
