"""Checkpoints: the tree that is saved, and the files it lies in."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
