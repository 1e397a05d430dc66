"""Small models and data sets to try a Trainer with, as tests and examples do."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
