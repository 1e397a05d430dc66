"""Callbacks: what runs at the hooks of a Trainer without being part of the model."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
