"""Loaders: combined, sampled for many ranks, fed to the loops, and remembered where they are."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
