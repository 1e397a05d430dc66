"""levin: a training framework for PyTorch.

Write a LightningModule (what to compute) and perhaps a LightningDataModule (on what); a Trainer does the rest.
Everything here is imported when it is first used, so that ``import levin`` costs nothing.
"""

from levin.utilities.lazy import lazy_face, names_in_stub

__version__ = "0.1.0"

_ROOMS = [name for name, home in names_in_stub(__name__).items() if home == __name__]

__getattr__, __dir__ = lazy_face(__name__)
__all__ = ["__version__", *(name for name in __dir__() if name not in _ROOMS)]
