from __future__ import annotations

from collections import Counter

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
    assert registry.add("pair", dict, a=1) is None and registry.get("pair") == {"a": 1}
    assert registry == {"pair": {"pair": dict, "pair_name": "pair", "description": "", "init_params": {"a": 1}}}
    registry.add("counter", "collections:Counter", "counts", a=2)
    assert (
        registry.get_class("counter") is Counter is registry["counter"]["pair"] and registry.get("counter", 1)["a"] == 2
    )
    with pytest.raises(KeyError) as caught:
        registry.get("other")
    assert caught.value.args == ("No pair is named 'other'. Available names: counter, pair.",)
    with pytest.raises(ValueError, match="The pair name 'pair' is taken. Pass override=True to replace it."):
        registry.add("pair", None)
