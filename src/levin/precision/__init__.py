"""Number formats: what is converted, where autocast holds, how the loss is scaled."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
