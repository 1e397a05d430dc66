"""Who started the processes: levin, torchrun, or the scheduler of a cluster."""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
