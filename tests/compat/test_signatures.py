"""What programs pass to Lightning's public classes and functions by name, levin's take by the same name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

from levin.compat.paths import ABSENT, TABLE
from levin.compat.table import names_in

# Public names that the oracle has of other packages, or that are no function and no class of its own, are left out.
_OURS_ON_PURPOSE = {
    # Lightning's validator alone calls it so; it is a hook, which the Trainer calls by position.
    "ServableModuleValidator.on_train_start": {"servable_module"},
    # The other strategies call it `tensor`, there too.
    "XLAStrategy.reduce": {"output"},
    # The strategies of Fabric are those of the Trainer: what they save is a tree, and they reduce tensors.
    "fabric Strategy": {"path", "state", "filter", "strict", "collection", "output"},
    # The columns of the Rich bar get the values from the bar.
    "MetricsTextColumn": {"trainer", "text_delimiter", "metrics_format"},
}
_NO_SUCH_METHOD = {
    # Of no use to a caller: helpers of their own constructors and set-up.
    "remove_ignored_hparams", "configure_sharded_model", "configure_ddp", "determine_ddp_device_ids", "init_deepspeed",
    "get_registered_strategies", "set_nvidia_flags",
    # What levin's Strategy has in their place for Trainer and Fabric alike: `clip_gradients`, state functions, `setup`.
    "clip_gradients_norm", "clip_gradients_value", "get_module_state_dict", "get_optimizer_state",
    "load_module_state_dict", "setup_module_and_optimizers", "module_sharded_context",
    # Of the Rich bar's parts: Rich's own Progress does it.
    "add_custom_task", "soft_refresh", "MetricsTextColumn.update",
}  # fmt: skip


def pairs() -> Iterator[tuple[str, Any, Any]]:
    """Yield the public name, Lightning's object, and levin's."""
    for key in TABLE:
        for name, (home, ours) in names_in(key).items():
            if name.startswith("_") or home == ABSENT:
                continue
            try:
                theirs = getattr(import_module(f"lightning.{key}".rstrip(".")), name)
            except (ImportError, AttributeError):
                continue  # a path of an earlier version
            if str(getattr(theirs, "__module__", "")).startswith("lightning.") and callable(theirs):
                yield f"{key}.{name}", theirs, getattr(import_module(home), ours)


PAIRS = list(pairs())


def keywords(function: Callable[..., object]) -> tuple[set[str], bool]:
    """Return the names that may be passed by keyword, and whether any other may."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return set(), True
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in parameters if parameter.kind in by_name}
    return names, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def missing(theirs: Callable[..., object], ours: Callable[..., object]) -> set[str]:
    wanted, _ = keywords(theirs)
    found, takes_any = keywords(ours)
    return set() if takes_any else wanted - found


def required(function: Callable[..., object]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return set()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        parameter.name for parameter in parameters if parameter.kind in kinds and parameter.default is parameter.empty
    }


def test_there_is_something_to_compare():
    assert len(PAIRS) > 440


@pytest.mark.parametrize(("name", "theirs", "ours"), PAIRS, ids=[name for name, _, _ in PAIRS])
def test_what_it_is_made_or_called_with(name, theirs, ours):
    assert missing(theirs, ours) - _OURS_ON_PURPOSE.get(theirs.__name__, set()) == set()
    if keywords(theirs)[0]:
        assert required(ours) <= required(theirs)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"), [pair for pair in PAIRS if inspect.isclass(pair[1])],
    ids=[name for name, theirs, _ in PAIRS if inspect.isclass(theirs)],
)  # fmt: skip
def test_what_its_methods_are_called_with(name, theirs, ours):
    wrong = {}
    is_of_fabric = name.startswith("fabric.strategies")
    for method in dir(theirs):
        own = getattr(theirs, method)
        if method.startswith("_") or not inspect.isroutine(own):
            continue
        if {method, f"{theirs.__name__}.{method}"} & _NO_SUCH_METHOD:
            continue
        if not str(getattr(own, "__module__", "")).startswith("lightning."):
            continue
        mine = getattr(ours, method, None)
        if not callable(mine):
            wrong[method] = "is not there"
            continue
        allowed = _OURS_ON_PURPOSE["fabric Strategy"] if is_of_fabric else set()
        allowed = allowed | _OURS_ON_PURPOSE.get(f"{theirs.__name__}.{method}", set())
        if unknown := missing(own, mine) - allowed:
            wrong[method] = f"does not take {sorted(unknown)}"
    assert wrong == {}


# Where something else is the default here, and why.
_OTHER_DEFAULTS = {
    # What gradients are clipped to is asked of the Trainer, which says None for nothing.
    "clip_gradients.clip_val",
    # litlogger would start the program a second time.
    "LitLogger.save_logs",
    # There is one process of it, which writes one file.
    "XLAFSDPStrategy.state_dict_type",
    # One class serves Trainer and Fabric, and has one default.
    "DeepSpeedStrategy.logging_batch_size_per_gpu", "all_reduce.reduce_op",
    # A search is set up for a stage.
    "setup.stage",
}  # fmt: skip


def other_defaults(theirs: Callable[..., object], ours: Callable[..., object]) -> Iterator[str]:
    """Yield the arguments that both take by name, and that have another plain value by default."""
    try:
        pair = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
    except ValueError:
        return
    for name, parameter in pair[0].items():
        if name in pair[1] and isinstance(parameter.default, (bool, int, float, str, type(None))):
            # Members of enumerations are strings.
            values = [getattr(each.default, "value", each.default) for each in (parameter, pair[1][name])]
            if values[0] != values[1] or isinstance(values[0], bool) is not isinstance(values[1], bool):
                yield f"{theirs.__name__}.{name}"


def test_what_arguments_are_where_they_are_not_given():
    found: set[str] = set()
    for _, theirs, ours in PAIRS:
        found.update(other_defaults(theirs, ours))
        for method in dir(theirs) if inspect.isclass(theirs) else ():
            own, mine = getattr(theirs, method), getattr(ours, method, None)
            is_public = inspect.isroutine(own) and not method.startswith("_") and callable(mine)
            if is_public and str(getattr(own, "__module__", "")).startswith("lightning."):
                found.update(other_defaults(own, mine))
    assert found == _OTHER_DEFAULTS
