"""Kinds of hardware: how devices are found, named, prepared and measured."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
