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
    "ArgsType": "levin.cli.callables",
    "LRSchedulerCallable": "levin.cli.callables",
    "LRSchedulerType": "levin.cli.callables",
    "LRSchedulerTypeTuple": "levin.cli.callables",
    "LRSchedulerTypeUnion": "levin.cli.callables",
    "LightningArgumentParser": "levin.cli.parser",
    "LightningCLI": "levin.cli.lightning_cli",
    "OptimizerCallable": "levin.cli.callables",
    "ReduceLROnPlateau": "levin.cli.callables",
    "SaveConfigCallback": "levin.cli.save_config",
    "instantiate_class": "levin.cli.instantiate",
    "instantiate_module": "levin.cli.instantiate",
}

__all__ = sorted(_HOMES)


__getattr__, __dir__ = lazy_face(__name__, _HOMES)
