"""Building objects from configurations, and the hyper-parameters that let a checkpoint do it again."""

from __future__ import annotations

from typing import Any, TypeVar

from levin.hparams import given_hyperparameters
from levin.utilities.types import Function, Kwargs

T = TypeVar("T")

# Lightning's name, which both frameworks know for their own function: Lightning refuses a file that has another.
_INSTANTIATE_MODULE = "lightning.pytorch.cli.instantiate_module"


def instantiate_class(args: Any, init: Kwargs) -> Any:
    """Return an object of the class that ``init["class_path"]`` names.

    Args:
        args: Positional arguments: one value or a tuple.
        init: ``{"class_path": "package.module.Class", "init_args": {...}}``.

    Raises:
        ValueError: The class path is not a dotted one.

    Example:
        >>> instantiate_class(3, {"class_path": "torch.nn.Linear", "init_args": {"out_features": 2}})
        Linear(in_features=3, out_features=2, bias=True)
    """
    module, _, name = init["class_path"].rpartition(".")
    if not module:
        raise ValueError(
            f"class_path must be an import path, received {init['class_path']!r}. Write 'torch.optim.Adam'."
        )
    kind = getattr(__import__(module, fromlist=[name]), name)
    positional = args if isinstance(args, tuple) else (args,)
    return kind(*positional, **init.get("init_args", {}))


def instantiate_module(class_type: type[T], config: Kwargs) -> T:
    """Build a module or data module, nested objects included, from the hyper-parameters that a checkpoint holds.

    Args:
        class_type: The class, or a base of the one that ``config["_class_path"]`` names.
        config: Arguments, nested objects as ``class_path`` and ``init_args``.

    Raises:
        jsonargparse.ArgumentError: The configuration does not fit the class.
    """
    from levin.cli.parser import LightningArgumentParser

    parser = LightningArgumentParser(exit_on_error=False)
    arguments = {key: value for key, value in config.items() if key not in ("_class_path", "_instantiator")}
    if "_class_path" in config:
        parser.add_subclass_arguments(class_type, "module", fail_untyped=False)
        given = class_config(config["_class_path"], arguments)
    else:
        parser.add_class_arguments(class_type, "module", fail_untyped=False)
        given = arguments
    parsed = parser.parse_object({"module": given})
    built: T = parser.instantiate(parsed, instantiators=[saving_instantiator(class_type, config)])["module"]
    return built


def class_config(class_path: str, arguments: dict[str, object]) -> Kwargs:
    """Return hyper-parameters of a class chosen by its path as a configuration."""
    arguments = dict(arguments)
    config: dict[str, object] = {"class_path": class_path}
    if "dict_kwargs" in arguments:
        config["dict_kwargs"] = arguments.pop("dict_kwargs")
    return {**config, "init_args": arguments}


def saving_instantiator(
    class_type: type, config: Kwargs, key: str = "", is_subclass: bool = False
) -> tuple[Function, type, bool]:
    """Return an instantiator for jsonargparse that lets the object save ``config`` as its hyper-parameters.

    Args:
        class_type: The class whose objects are built.
        config: Their configuration in plain values.
        key: Where the object stands among the arguments; values linked to it on instantiation are saved too.
        is_subclass: Whether ``config`` names the class, with ``init_args``.
    """

    def build(kind: type, /, *args: Any, applied_instantiation_links: Kwargs, **kwargs: Any) -> Any:
        values = dict(config)
        if is_subclass:
            values = {"_class_path": config["class_path"], **config.get("init_args", {})}
            if config.get("dict_kwargs"):
                values["dict_kwargs"] = config["dict_kwargs"]
        prefix = f"{key}.init_args." if is_subclass else f"{key}."
        for target, value in applied_instantiation_links.items():
            if key and target.startswith(prefix):
                _put(values, target.removeprefix(prefix).split("."), value)
        with given_hyperparameters(values, _INSTANTIATE_MODULE):
            return kind(*args, **kwargs)

    return build, class_type, True


def _put(values: Kwargs, path: list[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        values[name] = dict(values.get(name) or {})
        values = values[name]
    values[last] = value
