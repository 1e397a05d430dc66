"""The command line: a program whose arguments are those of Trainer, module and data module.

What needs ``jsonargparse`` is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.cli.callables import ArgsType as ArgsType
    from levin.cli.callables import LRSchedulerCallable as LRSchedulerCallable
    from levin.cli.callables import LRSchedulerType as LRSchedulerType
    from levin.cli.callables import LRSchedulerTypeTuple as LRSchedulerTypeTuple
    from levin.cli.callables import LRSchedulerTypeUnion as LRSchedulerTypeUnion
    from levin.cli.callables import OptimizerCallable as OptimizerCallable
    from levin.cli.callables import ReduceLROnPlateau as ReduceLROnPlateau
    from levin.cli.instantiate import instantiate_class as instantiate_class
    from levin.cli.instantiate import instantiate_module as instantiate_module
    from levin.cli.lightning_cli import LightningCLI as LightningCLI
    from levin.cli.parser import LightningArgumentParser as LightningArgumentParser
    from levin.cli.save_config import SaveConfigCallback as SaveConfigCallback

_HOMES = {
    "levin.cli.callables": "ArgsType LRSchedulerCallable LRSchedulerType LRSchedulerTypeTuple LRSchedulerTypeUnion "
    "OptimizerCallable ReduceLROnPlateau",
    "levin.cli.instantiate": "instantiate_class instantiate_module",
    "levin.cli.lightning_cli": "LightningCLI",
    "levin.cli.parser": "LightningArgumentParser",
    "levin.cli.save_config": "SaveConfigCallback",
}

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = __dir__()
