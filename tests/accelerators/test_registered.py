"""An accelerator of a package's own, selected by its name."""

from __future__ import annotations

from typing import Any

import torch

from levin import Trainer
from levin.accelerators import AcceleratorRegistry, CPUAccelerator
from levin.demos.boring_classes import BoringModel


class Npu(CPUAccelerator):
    def __init__(self, speed: int = 0) -> None:
        self.speed = speed

    @staticmethod
    def name() -> str:
        return "npu"


def test_a_registered_accelerator_by_its_name() -> None:
    AcceleratorRegistry.register("npu", Npu, description="of our own", speed=3)
    try:
        settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="npu", devices=1, fast_dev_run=True, enable_model_summary=False, **settings)
        assert type(trainer.accelerator) is Npu and trainer.accelerator.speed == 3
        trainer.fit(BoringModel())
        assert trainer.strategy.root_device == torch.device("cpu")
    finally:
        AcceleratorRegistry.remove("npu")
    assert "npu" not in AcceleratorRegistry
