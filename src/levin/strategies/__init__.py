"""How a module is placed and wrapped, how processes talk, and how state is gathered."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
