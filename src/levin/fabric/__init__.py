"""Fabric: the engine of the Trainer under a loop of one's own."""

from levin.fabric.fabric import Fabric
from levin.fabric.wrappers import is_wrapped

__all__ = ["Fabric", "is_wrapped"]
