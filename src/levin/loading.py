"""Building modules and data modules from checkpoints."""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from levin.hparams import is_omegaconf
from levin.utilities.attribute_dict import AttributeDict
from levin.utilities.move import move_data_to_device
from levin.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from levin.utilities.types import _MAP_LOCATION_TYPE, Function, Kwargs, StateDict

T = TypeVar("T")

_MODULE_KEYS = ("module_arguments", "hparams", "hyper_parameters")
_DATAMODULE_KEYS = ("datamodule_hyper_parameters",)
_CLI = "levin.cli.instantiate_module"

# What a checkpoint may name as its instantiator, and the function of ours that is called for it.
_instantiators: dict[str, str] = {
    "levin.cli.instantiate_module": _CLI,
    "lightning.pytorch.cli.instantiate_module": _CLI,
    "pytorch_lightning.cli.instantiate_module": _CLI,
}


class _RestrictedClassMethod:
    """A ``classmethod`` that raises TypeError when it is called on an instance.

    ``model.load_from_checkpoint(path)`` would leave ``model`` as it is and return another one, which is never meant.

    Example:
        >>> class Shape:
        ...     @restricted_classmethod
        ...     def unit(cls):
        ...         return cls()
        >>> isinstance(Shape.unit(), Shape)
        True
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self.function: Callable[..., object] = function
        functools.update_wrapper(cast(Any, self), function)

    def __get__(self, instance: object, owner: type) -> Function:
        # Reading the attribute of an instance must work: torch.jit and inspect look at every attribute there is.
        @functools.wraps(self.function)
        def bound(*args: object, **kwargs: object) -> object:
            if instance is not None:
                name = f"{owner.__name__}.{self.function.__name__}"
                raise TypeError(
                    f"{name} must be called on the class, received an instance of {owner.__name__}. "
                    f"Use the value that `{name}(...)` returns."
                )
            return self.function(owner, *args, **kwargs)

        return bound


if TYPE_CHECKING:
    restricted_classmethod = classmethod
else:
    restricted_classmethod = _RestrictedClassMethod


def allow_instantiator(path: str) -> None:
    """Let checkpoints name ``path`` as the function that builds their module.

    Such a function is imported and called with values out of the file, so allow only what is safe with any values.

    Args:
        path: Import path of a function ``(cls, hparams) -> instance``, for example ``"my_project.build.from_config"``.

    Raises:
        ValueError: ``path`` is not a dotted import path.

    Example:
        >>> allow_instantiator("levin.cli.instantiate_module")
    """
    if not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise ValueError(f"path must be an import path such as 'package.module.function', received {path!r}.")
    _instantiators[path] = path


def load_from_checkpoint(
    cls: type[T],
    checkpoint_path: str | os.PathLike[str] | IO[bytes],
    map_location: _MAP_LOCATION_TYPE = None,
    hparams_file: str | os.PathLike[str] | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: object,
) -> T:
    """Build a module or data module of class ``cls`` from a checkpoint.

    Args:
        cls: A class of modules or of data modules.
        checkpoint_path: Path, URL or open binary file; also the folder of a sharded checkpoint.
        map_location: Where tensors go, as for ``torch.load``. By default they stay on the device that they were saved
            from, or come to the CPU where this machine lacks it.
        hparams_file: A ``.yaml``, ``.yml`` or ``.csv`` file with hyper-parameters, which replace those in the
            checkpoint.
        strict: Whether the keys of the saved and the new ``state_dict`` must be equal. By default
            ``strict_loading`` of the module.
        weights_only: Whether only tensors and plain values may be read, so that no code of the file can run.
        kwargs: Arguments of ``__init__``, which replace the saved ones.

    Returns:
        The new object, on the device of the first saved tensor.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: ``__init__`` needs an argument that neither the checkpoint nor ``kwargs`` hold.
        ValueError: ``hparams_file`` is of another kind, ``strict`` contradicts ``strict_loading``, or the file
            names a function to build the module that is not allowed.
        KeyError: The file holds no weights.
        RuntimeError: The weights do not fit the module.

    Example:
        >>> net = load_from_checkpoint(Net, "best.ckpt", width=16)  # doctest: +SKIP
    """
    import levin.checkpoint.folder
    import levin.checkpoint.layout
    import levin.checkpoint.migrate
    import levin.checkpoint.reading

    location = default_map_location if map_location is None else map_location
    checkpoint: Any
    path = checkpoint_path if isinstance(checkpoint_path, (str, os.PathLike)) else None
    if path is not None and levin.checkpoint.layout.is_sharded(path):
        checkpoint = levin.checkpoint.folder.consolidate(path, weights_only)
        if isinstance(map_location, (str, int, torch.device)):
            checkpoint = move_data_to_device(checkpoint, torch.device(map_location))
    else:
        checkpoint = levin.checkpoint.reading.load(checkpoint_path, map_location=location, weights_only=weights_only)
    source = getattr(checkpoint_path, "name", None) if path is None else path
    checkpoint = levin.checkpoint.migrate.migrate(checkpoint, source)
    is_module = issubclass(cls, nn.Module)
    if is_module and "state_dict" not in checkpoint:
        raise KeyError(f"{checkpoint_path!s} must hold the key 'state_dict', received {sorted(map(str, checkpoint))}.")

    keys, prefix = (_MODULE_KEYS, "") if is_module else (_DATAMODULE_KEYS, "datamodule_")
    hparams = read_hparams_file(hparams_file) if hparams_file is not None else saved_hparams(checkpoint, keys, prefix)
    if hparams_file is not None:
        _put_hparams(checkpoint, keys[-1], hparams, kwargs)
    instance = _build(cls, hparams, checkpoint.get(f"{prefix}hparams_name"), kwargs)
    if is_module:
        _restore_module(cast(Any, instance), checkpoint, strict)
    elif cls.__qualname__ in checkpoint:
        cast(Any, instance).load_state_dict(checkpoint[cls.__qualname__])
    return instance


def default_map_location(storage: object, location: str) -> object:
    """Return where a saved storage goes: nowhere else if its device exists here (None), else to the CPU.

    Args:
        storage: The storage, on the CPU.
        location: The device it was saved from, for example ``"cuda:1"``.

    Example:
        >>> default_map_location("the storage itself", "xla:0")
        'the storage itself'
    """
    kind, _, index = location.partition(":")
    if kind == "cpu":
        return None
    if kind == "cuda":
        num_devices = torch.cuda.device_count()
    elif kind == "mps":
        num_devices = int(torch.backends.mps.is_available())
    else:
        num_devices = 0
    return None if int(index or 0) < num_devices else storage


def read_hparams_file(path: str | os.PathLike[str]) -> dict[str, object]:
    """Return the hyper-parameters in a YAML or CSV file, local or remote.

    A CSV file has the columns ``key`` and ``value``; values that are Python literals become numbers, lists and so on.

    Raises:
        ValueError: The file is of another kind, or its YAML would create arbitrary objects.
        FileNotFoundError: There is no such file.
    """
    import fsspec

    suffix = os.path.splitext(str(path))[1].lower()
    if suffix not in (".yaml", ".yml", ".csv"):
        raise ValueError(f"hparams_file must be a .yaml, .yml or .csv file, received {str(path)!r}.")
    with fsspec.open(str(path), "r", newline="" if suffix == ".csv" else None) as file:
        if suffix == ".csv":
            return {row["key"]: literal(row["value"]) for row in csv.DictReader(file)}
        return _read_yaml(file, path)


def saved_hparams(checkpoint: Mapping[str, object], keys: tuple[str, ...], prefix: str = "") -> object:
    """Return the hyper-parameters in ``checkpoint`` as they were when saved.

    Args:
        checkpoint: What the file holds.
        keys: Where to look; files of old versions have other keys. Later ones count where several are present.
        prefix: In front of ``hparams_type``: ``""`` or ``"datamodule_"``.
    """
    hparams: Any = {}
    for key in keys:
        value = checkpoint.get(key)
        if value is None:
            continue
        if is_omegaconf(value):
            return value
        hparams = {**hparams, **(value if isinstance(value, Mapping) else vars(value))}
    kind = checkpoint.get(f"{prefix}hparams_type")
    if getattr(kind, "__module__", "").startswith("omegaconf"):
        from omegaconf import OmegaConf

        return OmegaConf.create(hparams)
    return AttributeDict(hparams)


def _put_hparams(checkpoint: StateDict, key: str, hparams: Any, kwargs: Mapping[str, object]) -> None:
    # on_load_checkpoint sees the hyper-parameters that the object is really built with.
    checkpoint[key] = {**hparams, **kwargs}


def _build(cls: type[T], hparams: Any, name: str | None, kwargs: Kwargs) -> T:
    instantiator = hparams.get("_instantiator") if len(hparams) else None
    if instantiator is not None:
        values = {**hparams, **kwargs}
        del values["_instantiator"]
        return cast(T, _instantiator(instantiator)(cls, values))

    if issubclass(cls, nn.Module) and cls is [base for base in cls.__mro__ if "load_from_checkpoint" in vars(base)][-1]:
        raise TypeError(
            f"load_from_checkpoint must be called on the class that was trained, received {cls.__name__}, their base. "
            "Write MyModule.load_from_checkpoint(path)."
        )
    parameters = _init_parameters(cls)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    is_container = name in parameters and name != "kwargs"
    values = {cast(str, name): _updated(hparams, kwargs)} if is_container else hparams
    arguments: dict[str, object] = {**values, **kwargs}
    if not takes_all:
        dropped = [key for key in kwargs if key not in parameters]
        if dropped and not is_container:
            rank_zero_warn(
                f"{cls.__name__}.__init__ has no argument {dropped[0]!r}, which load_from_checkpoint received: "
                f"it is left out. Choose from {sorted(parameters)}."
            )
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    _check_complete(cls, parameters, arguments, sorted(map(str, hparams)))
    return cls(**arguments)


def _init_parameters(cls: type) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(cast(Any, cls).__init__).parameters.items())
    return dict(parameters[1:])


def _check_complete(
    cls: type, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, object], held: list[str]
) -> None:
    for name, parameter in parameters.items():
        is_starred = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not is_starred and parameter.default is parameter.empty and name not in arguments:
            raise TypeError(
                f"{cls.__name__}.__init__ needs the argument {name!r}, and the checkpoint holds {held}. "
                f"Give it: {cls.__name__}.load_from_checkpoint(path, {name}=...), "
                "or call self.save_hyperparameters() in __init__ before training."
            )


def _updated(hparams: Any, kwargs: Mapping[str, object]) -> object:
    if is_omegaconf(hparams):
        from omegaconf import OmegaConf

        return OmegaConf.merge(hparams, dict(kwargs))
    return AttributeDict({**hparams, **kwargs})


def _instantiator(path: str) -> Callable[[type, dict[str, object]], object]:
    if path not in _instantiators:
        raise ValueError(
            f"The checkpoint asks to be built by {path!r}, which must be one of {sorted(_instantiators)}. "
            f"If you trust the file and the function, call levin.loading.allow_instantiator({path!r}) first."
        )
    module, _, function = _instantiators[path].rpartition(".")
    return cast("Callable[[type, dict[str, Any]], Any]", getattr(importlib.import_module(module), function))


def _restore_module(module: Any, checkpoint: StateDict, strict: bool | None) -> None:
    own_strict = getattr(module, "_strict_loading", None)
    if strict is not None and own_strict is not None and strict != own_strict:
        raise ValueError(
            f"strict must equal {type(module).__name__}.strict_loading={own_strict}, received {strict}. "
            "Set one of them only."
        )
    is_strict = bool(getattr(module, "strict_loading", True)) if strict is None else strict

    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    state = checkpoint["state_dict"]
    result = module.load_state_dict(state, strict=is_strict)
    if not is_strict:
        if result.missing_keys:
            rank_zero_warn(f"The checkpoint lacks keys of the model, which keep their values: {result.missing_keys}")
        if result.unexpected_keys:
            rank_zero_warn(
                f"The checkpoint has keys that the model lacks, which are left out: {result.unexpected_keys}"
            )
    device = next((value.device for value in state.values() if isinstance(value, torch.Tensor)), None)
    if device is not None and device.type != "meta":
        module.to(device)


def literal(val: str) -> object:
    """Return the value that a text of a CSV file stands for, the text itself where it is none."""
    try:
        return ast.literal_eval(val)
    except (ValueError, SyntaxError):
        return val


def _read_yaml(file: IO[str], path: str | os.PathLike[str]) -> dict[str, object]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Also reads tuples, which hparams.yaml files of loggers hold."""

    def construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[object, ...]:
        return tuple(loader.construct_sequence(node))

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", construct_tuple)
    try:
        values = yaml.load(file, Loader=Loader)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"hparams_file must hold plain values, received {str(path)!r} with {error.problem}. "
            "Write the value in plain YAML, or pass it as an argument of load_from_checkpoint."
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"hparams_file must hold keys with values, received a {type(values).__name__} in {str(path)!r}."
        )
    return values
