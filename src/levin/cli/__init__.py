"""The command line: a program whose arguments are those of Trainer, module and data module.

What needs ``jsonargparse`` is imported when it is first used.
"""

from levin.utilities.lazy import lazy_face

__getattr__, __dir__ = lazy_face(__name__)
__all__ = __dir__()
