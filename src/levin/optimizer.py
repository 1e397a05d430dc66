"""What ``configure_optimizers`` may return, brought into one form, and the optimizer that users step by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from levin.utilities.exceptions import MisconfigurationException, value_error
from levin.utilities.overrides import is_overridden
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import Closure, Function, LRSchedulerConfig, StateDict

if TYPE_CHECKING:
    from levin.hooks import LightningModule

_OWN = ("_optimizer", "_on_step", "_on_before_step", "_on_after_step", "_no_sync", "_module", "__class__")
_OPTIMIZER_API = ("step", "param_groups", "defaults", "state", "state_dict", "load_state_dict")


def do_nothing() -> None:
    """What runs before and after a step that is not counted."""


class LightningOptimizer:
    """A torch optimizer whose ``step`` goes through precision and strategy and is counted.

    It is an instance of the wrapped optimizer's class, and all other attributes are the wrapped optimizer's.

    Args:
        optimizer: The torch optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._on_step: Optional[Function] = None
        self._on_before_step: Callable[[], object] = do_nothing
        self._on_after_step: Callable[[], object] = do_nothing
        self._no_sync: Callable[[], AbstractContextManager[object]] = nullcontext
        self._module: Optional[LightningModule] = None
        # isinstance(wrapped, torch.optim.Adam) must hold for code that looks at the class.
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    optimizer: Optimizer = reads("_optimizer", "The torch optimizer itself.")

    def step(self, closure: Optional[Closure] = None, **kwargs: Any) -> Any:
        """Update the parameters.

        Args:
            closure: Computes the loss again, for optimizers that need it.
            kwargs: Passed to the torch optimizer's ``step``.

        Raises:
            MisconfigurationException: ``closure`` cannot be called.
        """
        if closure is not None and not callable(closure):
            raise value_error("optimizer.step(closure=...)", closure, "must be callable or None")
        if closure is not None:  # some optimizers call it under no_grad
            closure = torch.enable_grad()(closure)
        if self._on_step is None:
            return self._optimizer.step(closure, **kwargs) if closure is not None else self._optimizer.step(**kwargs)
        self._on_before_step()
        result = self._on_step(self._optimizer, closure, **kwargs)
        self._on_after_step()
        return result

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Only this optimizer's parameters require gradients inside; with ``sync_grad=False`` ranks do not exchange them."""
        assert self._module is not None
        self._module.toggle_optimizer(self)
        try:
            with nullcontext() if sync_grad else self._no_sync():
                yield
        finally:
            self._module.untoggle_optimizer(self)

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._optimizer, name, value)

    # The torch base class defines these, so __getattr__ does not reach the wrapped ones.
    def state_dict(self) -> StateDict:
        """Return the wrapped optimizer's state."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the wrapped optimizer's state."""
        self._optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of the wrapped optimizer's parameters."""
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Add a group of parameters to the wrapped optimizer."""
        self._optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"Lightning{self._optimizer!r}"

    def __reduce__(self) -> Any:
        return (LightningOptimizer, (self._optimizer,))


def hook_steps(
    optimizers: Iterable[LightningOptimizer],
    before: Callable[[], object] = do_nothing,
    after: Callable[[], object] = do_nothing,
) -> None:
    """Let every step of ``optimizers`` call ``before`` and ``after``, until it is said anew or a program puts its own there.

    Programs do so for steps that are not to be counted, those of a discriminator for example.
    """
    for optimizer in optimizers:
        vars(optimizer).update(_on_before_step=before, _on_after_step=after)


class MockOptimizer(Optimizer):
    """Stands in when ``configure_optimizers`` returns None: a step runs the closure and updates nothing."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {})
        self.param_groups = []

    def step(self, closure: Any = None) -> Any:
        """Run the closure."""
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to zero."""

    def state_dict(self) -> StateDict:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Nothing to load."""

    def __repr__(self) -> str:
        return "No Optimizer"


def is_optimizer(obj: object) -> bool:
    """Return whether ``obj`` behaves like a torch optimizer."""
    return isinstance(obj, Optimizer) or all(hasattr(obj, name) for name in _OPTIMIZER_API)


def resolve_optimizers(returned: object, module: LightningModule) -> tuple[list[Any], list[LRSchedulerConfig]]:
    """Return the optimizers and scheduler configs for what ``configure_optimizers`` returned.

    Args:
        returned: Any of the accepted forms.
        module: The module, for the checks that depend on its hooks.

    Raises:
        MisconfigurationException: The form or one of its values is not understood.
    """
    if returned is None:
        rank_zero_warn("`configure_optimizers` returned None: the run trains without an optimizer.")
        return [MockOptimizer()], []
    optimizers, schedulers, monitor = _split(returned)
    if not optimizers and module.automatic_optimization:
        raise value_error(
            "configure_optimizers", returned, "must return an optimizer", "Return None to train without one."
        )
    configs = [_config(scheduler, monitor, module) for scheduler in schedulers]
    for config in configs:
        owner = getattr(config.scheduler, "optimizer", None)
        if owner is not None and not any(owner is optimizer for optimizer in optimizers):
            raise MisconfigurationException(
                "Some schedulers are attached to an optimizer that was not returned from `configure_optimizers`, "
                f"received a scheduler of {owner!r}. Return that optimizer as well."
            )
    if module.automatic_optimization and len(optimizers) > 1:
        raise RuntimeError(
            f"Training with several optimizers is only possible with manual optimization, received {len(optimizers)}. "
            "Set `self.automatic_optimization = False` and step them in `training_step`."
        )
    return optimizers, configs


def _split(returned: object) -> tuple[list[object], list[object], Optional[str]]:
    if is_optimizer(returned):
        return [returned], [], None
    if isinstance(returned, Mapping):
        return _from_dicts([returned])
    if isinstance(returned, Sequence):
        if len(returned) == 2 and isinstance(returned[0], list):
            if all(map(is_optimizer, returned[0])):
                schedulers = returned[1]
                return (
                    list(returned[0]),
                    list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers],
                    None,
                )
        elif returned and all(isinstance(item, Mapping) for item in returned):
            return _from_dicts(returned)
        elif all(map(is_optimizer, returned)):
            return list(returned), [], None
    raise value_error(
        "configure_optimizers",
        returned,
        "must return an optimizer, a list of optimizers, ([optimizers], [schedulers]), "
        "a dict with 'optimizer' and perhaps 'lr_scheduler', or a list of such dicts",
    )


def _from_dicts(dicts: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any], Optional[str]]:
    optimizers, schedulers, monitor = [], [], None
    for item in dicts:
        if "optimizer" not in item or not is_optimizer(item["optimizer"]):
            raise value_error(
                "configure_optimizers", dict(item), "must return dicts with an optimizer under 'optimizer'"
            )
        extra = set(item) - {"optimizer", "lr_scheduler", "monitor"}
        if extra:
            rank_zero_warn(
                f"`configure_optimizers` returned a dict with unknown keys, ignored: {sorted(extra)}. "
                "Known are 'optimizer', 'lr_scheduler' and 'monitor'.",
                category=RuntimeWarning,
            )
        optimizers.append(item["optimizer"])
        monitor = item.get("monitor", monitor)
        scheduler = item.get("lr_scheduler")
        if scheduler is not None:
            if isinstance(scheduler, Mapping) or "monitor" not in item:
                schedulers.append(scheduler)
            else:
                schedulers.append({"scheduler": scheduler, "monitor": item["monitor"]})
    return optimizers, schedulers, monitor


_KEYS = ("scheduler", "name", "interval", "frequency", "reduce_on_plateau", "monitor", "strict")


def _config(entry: Any, monitor: Optional[str], module: LightningModule) -> LRSchedulerConfig:
    values = dict(entry) if isinstance(entry, Mapping) else {"scheduler": entry}
    if values.get("scheduler") is None:
        raise value_error(
            "configure_optimizers", values, "must return scheduler dicts with a scheduler under 'scheduler'"
        )
    scheduler = values["scheduler"]
    if isinstance(scheduler, type):
        raise value_error(
            "The scheduler",
            scheduler,
            "must be an instance, not a class",
            f"Return {scheduler.__name__}(optimizer, ...).",
        )
    # In manual optimization nobody but the user steps it.
    needed = ["step"] * module.automatic_optimization + ["state_dict", "load_state_dict"]
    if not all(hasattr(scheduler, name) for name in needed):
        raise TypeError(
            f"A scheduler must have {', '.join(needed[:-1])} and {needed[-1]}, received {type(scheduler).__name__}. "
            "Several schedulers are returned as ([optimizer], [scheduler, scheduler])."
        )
    extra = sorted(set(values) - set(_KEYS))
    if extra:
        rank_zero_warn(
            f"The scheduler dict has unknown keys, ignored: {extra}. Known are {list(_KEYS)}.", category=RuntimeWarning
        )
    known = {key: value for key, value in values.items() if key in _KEYS}
    if not module.automatic_optimization:
        ignored = sorted({"monitor", "strict", "reduce_on_plateau", "interval", "frequency"} & set(known))
        if ignored:
            rank_zero_warn(
                f"The scheduler keys {ignored} are ignored in manual optimization: step it in `training_step`.",
                category=RuntimeWarning,
            )
        return LRSchedulerConfig(
            **{key: known[key] for key in ("scheduler", "name", "interval", "frequency") if key in known}
        )
    config = LRSchedulerConfig(**known)
    if "reduce_on_plateau" not in values:
        config.reduce_on_plateau = isinstance(scheduler, ReduceLROnPlateau)
    if config.interval not in ("epoch", "step"):
        raise value_error("The scheduler's interval", config.interval, "must be 'epoch' or 'step'")
    if not isinstance(config.frequency, int) or config.frequency < 1:
        raise value_error("The scheduler's frequency", config.frequency, "must be an int >= 1")
    if config.reduce_on_plateau and config.monitor is None:
        config.monitor = monitor
        if monitor is None:
            raise MisconfigurationException(
                "`configure_optimizers` must name the value a ReduceLROnPlateau scheduler watches, received none. "
                "Return {'optimizer': ..., 'lr_scheduler': ..., 'monitor': 'val_loss'}."
            )
    if isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR) and config.interval == "epoch":
        rank_zero_warn("A OneCycleLR scheduler is used with 'interval': 'epoch'; it is usually stepped with 'step'.")
    is_torch = isinstance(scheduler, (LRScheduler, ReduceLROnPlateau))
    if not is_torch and not is_overridden("lr_scheduler_step", module):
        raise MisconfigurationException(
            f"The scheduler {type(scheduler).__name__} is not a torch scheduler. "
            "Override `LightningModule.lr_scheduler_step` and step it there."
        )
    return config
