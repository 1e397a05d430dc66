"""What levin needs to know of a kind of hardware."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from levin.utilities.exceptions import MisconfigurationException


class Accelerator(ABC):
    """A kind of hardware: how many devices there are, how the user names them, how one is prepared and measured.

    Subclass it for hardware that levin does not know, and register the subclass or pass an instance as
    ``Trainer(accelerator=...)``.

    Example:
        >>> class Toy(Accelerator):
        ...     @staticmethod
        ...     def name():
        ...         return "toy"
        ...     @staticmethod
        ...     def parse_devices(devices):
        ...         return int(devices)
        ...     @staticmethod
        ...     def get_parallel_devices(devices):
        ...         return [torch.device("cpu")] * devices
        ...     @staticmethod
        ...     def auto_device_count():
        ...         return 1
        ...     @staticmethod
        ...     def is_available():
        ...         return True
        >>> Toy().get_parallel_devices(Toy.parse_devices("2"))
        [device(type='cpu'), device(type='cpu')]
    """

    # The ``type`` of its devices; None where it takes any.
    _device_type: str | None = None

    @staticmethod
    @abstractmethod
    def name() -> str:
        """Return the name that the user types, for example ``"cuda"``."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: Any) -> Any:
        """Return the user's ``devices`` in the form that :meth:`get_parallel_devices` takes.

        Raises:
            ValueError: There is no such device, or one is named twice.
            TypeError: ``devices`` has a form that this hardware cannot use.
        """

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return one torch device per process of this machine."""

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """Return how many devices ``devices="auto"`` means."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Return whether this machine has such hardware and torch can use it."""

    @classmethod
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Add this class to a registry under its names."""

    def setup_device(self, device: torch.device) -> None:
        """Prepare the device of this process, before anything is placed on it.

        Args:
            device: The device that this process will use.

        Raises:
            ValueError: It is of another type than those of this accelerator.
        """
        if self._device_type not in (None, device.type):
            article = "an" if self._device_type in ("mps", "xla") else "a"
            raise MisconfigurationException(
                f"The {self.name()} accelerator needs {article} {self._device_type} device, received {device}. Pass the "
                "accelerator of that device."
            )

    def setup(self, trainer: Any) -> None:
        """Run once at the start of each fit, validate, test or predict.

        Args:
            trainer: The Trainer that runs.
        """

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, float]:
        """Return measurements of a device, by name.

        Args:
            device: The device to look at.
        """
        return {}

    def teardown(self) -> None:
        """Free what :meth:`setup_device` took."""
