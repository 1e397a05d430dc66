"""Names of features that levin does not have: to be imported and mentioned, not used.

Many packages import ``FSDPPrecision`` or ``NeptuneLogger`` at their top and use it in one function. They run as long as nobody calls
that function; whoever does reads what to use instead.
"""

from __future__ import annotations

from typing import NoReturn

from levin.loggers.logger import Logger
from levin.precision.precision import Precision
from levin.strategies.strategy import Strategy


class AbsentFeatureError(NotImplementedError):
    """A feature of Lightning's that levin does not have was used."""


def _absent(name: str, way_out: str, base: type = object) -> type:
    """Return a class that can be imported, subclassed and asked about, and whose constructor says what to do.

    Args:
        name: Lightning's name.
        way_out: What to use instead, as a sentence.
        base: What users expect it to be a kind of.
    """

    def refuse(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise AbsentFeatureError(f"levin has no `{name}`. {way_out}")

    # Abstract methods of the base must not speak first.
    body = {"__init__": refuse, "__doc__": f"Not there. {way_out}", "__abstractmethods__": frozenset()}
    body |= dict.fromkeys(getattr(base, "__abstractmethods__", ()), refuse)
    return type(name, (base,), {**body, "__module__": __name__})


_BUILT_IN = 'Use `Trainer(precision="bf16-mixed")` or another of the precisions in docs/trainer.md.'

NeptuneLogger = _absent("NeptuneLogger", "Use one of levin.loggers, or subclass levin.loggers.Logger.", Logger)

DataParallelStrategy = _absent("DataParallelStrategy", 'Use `strategy="ddp"`.', Strategy)
_XLALauncher = _absent("_XLALauncher", "Use `XLAStrategy(start_method=...)`.")
_get_full_state_dict_context = _absent("_get_full_state_dict_context", "Use torch.distributed.fsdp itself.")
_setup_activation_checkpointing = _absent(
    "_setup_activation_checkpointing", "Use torch.utils.checkpoint in the module's forward."
)

FSDPPrecision = _absent("FSDPPrecision", _BUILT_IN, Precision)

ClosureResult = _absent("ClosureResult", "Write `optimizer_step` so that it calls `optimizer_closure` in each step.")
_ResultCollection = _absent("_ResultCollection", "Read `trainer.callback_metrics` and `trainer.logged_metrics`.")
_ResultMetric = _absent("_ResultMetric", "Read `trainer.callback_metrics` and `trainer.logged_metrics`.")
