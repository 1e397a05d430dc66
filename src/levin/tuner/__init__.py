"""Searches for a learning rate and for a batch size: short runs beside a run, of which nothing is left but the answer."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
