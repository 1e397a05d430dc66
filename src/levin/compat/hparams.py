"""Lightning's helpers for hyper-parameters: their files, the arguments of a constructor, whoever holds one."""

from __future__ import annotations

import csv
import inspect
import os
import types
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from levin.compat.equivalents import is_picklable
from levin.hparams import frame_arguments
from levin.loading import literal, read_hparams_file
from levin.loggers.utilities import json_values
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import StateDict


def get_init_args(frame: types.FrameType) -> dict[str, Any]:
    """Return the arguments of the ``__init__`` that runs in ``frame``, with those caught by ``**kwargs``.

    Args:
        frame: Often ``inspect.currentframe()``.
    """
    if "__class__" not in frame.f_locals:
        return {}
    return frame_arguments(frame)


def collect_init_args(
    frame: types.FrameType,
    path_args: list[dict[str, object]],
    inside: bool = False,
    classes: tuple[type, ...] = (),
) -> list[StateDict]:
    """Return the arguments of each ``__init__`` that runs in ``frame`` and outside of it, the innermost first.

    Args:
        frame: Often ``inspect.currentframe()``.
        path_args: A list that they are appended to.
        inside: Whether ``frame`` is within an ``__init__`` already.
        classes: Only those of subclasses of these.
    """
    at: types.FrameType | None = frame
    while at is not None and at.f_back is not None:
        owner = at.f_locals.get("__class__")
        if owner is not None and (not classes or issubclass(owner, classes)):
            path_args.append(frame_arguments(at))
            inside = True
        elif inside:
            break
        at = at.f_back
    return path_args


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """Return what a constructor calls the object, its positional arguments and its named ones.

    Example:
        >>> class Net:
        ...     def __init__(self, width, *layers, **options): ...
        >>> parse_class_init_keys(Net)
        ('self', 'layers', 'options')
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())  # type: ignore[misc]  # read, not called
    names = {parameter.kind: parameter.name for parameter in parameters}
    return parameters[0].name, names.get(inspect.Parameter.VAR_POSITIONAL), names.get(inspect.Parameter.VAR_KEYWORD)


def clean_namespace(hparams: Any) -> None:
    """Remove from a dict or a namespace, in place, what cannot be pickled."""
    values = vars(hparams) if isinstance(hparams, Namespace) else hparams
    for key in [key for key, value in values.items() if not is_picklable(value)]:
        rank_zero_warn(
            f"The hyper-parameter {key!r} is left out, as a {type(values[key]).__name__} cannot be pickled."
            f" Use save_hyperparameters(ignore=[{key!r}]) to leave it out without this warning."
        )
        del values[key]


def update_hparams(hparams: dict[str, Any], updates: Mapping[str, Any]) -> None:
    """Take up new values, in place; dicts within dicts are merged."""
    for key, value in updates.items():
        if isinstance(value, Mapping) and isinstance(hparams.get(key), dict):
            update_hparams(hparams[key], value)
        else:
            hparams[key] = value


def lightning_hasattr(model: object, attribute: str) -> bool:
    """Return whether the module, its ``hparams`` or its data module has ``attribute``."""
    return next(_holders(model, attribute), None) is not None


def lightning_getattr(model: object, attribute: str) -> Any:
    """Return the attribute from the module, its ``hparams`` or its data module; the last that has it wins.

    Raises:
        AttributeError: None of them has it.
    """
    holders = list(_holders(model, attribute))
    if not holders:
        raise AttributeError(f"{attribute!r} is neither in the module nor in its hparams nor in its data module.")
    holder = holders[-1]
    return holder[attribute] if isinstance(holder, dict) else getattr(holder, attribute)


def lightning_setattr(model: object, attribute: str, value: object) -> None:
    """Set the attribute wherever it is: in the module, its ``hparams`` and its data module.

    Raises:
        AttributeError: None of them has it.
    """
    holders = list(_holders(model, attribute))
    if not holders:
        raise AttributeError(f"{attribute!r} is neither in the module nor in its hparams nor in its data module.")
    for holder in holders:
        if isinstance(holder, dict):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)


def _holders(model: object, attribute: str) -> Iterator[object]:
    if hasattr(model, attribute):
        yield model
    hparams = getattr(model, "hparams", None)
    if attribute in (hparams if isinstance(hparams, dict) else vars(hparams or Namespace())):
        yield hparams
    datamodule = getattr(getattr(model, "_trainer", None), "datamodule", None)
    if datamodule is not None and hasattr(datamodule, attribute):
        yield datamodule


def load_hparams_from_yaml(config_yaml: str | os.PathLike[str], use_omegaconf: bool = True) -> dict[str, Any]:
    """Return the hyper-parameters in a YAML file; an empty dict when there is no such file.

    Args:
        config_yaml: The path.
        use_omegaconf: Without effect: plain values come back.
    """
    return read_hparams_file(config_yaml) if os.path.exists(config_yaml) else {}


def save_hparams_to_yaml(config_yaml: str | os.PathLike[str], hparams: object, use_omegaconf: bool = True) -> None:
    """Write hyper-parameters into a YAML file, those that YAML can hold.

    Args:
        config_yaml: The path; the file is called ``hparams.yaml`` by convention.
        hparams: A dict or a namespace.
        use_omegaconf: Without effect: plain values are written.
    """
    import yaml

    values = dict(hparams) if isinstance(hparams, Mapping) else vars(hparams)
    with open(config_yaml, "w", newline="") as file:
        yaml.safe_dump(json_values(values), file)


def load_hparams_from_tags_csv(tags_csv: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the hyper-parameters in a file of old; an empty dict when there is no such file.

    Args:
        tags_csv: The path of ``meta_tags.csv``.
    """
    if not os.path.exists(tags_csv):
        rank_zero_warn(f"There is no file {str(tags_csv)!r}, so it holds no hyper-parameters.", category=RuntimeWarning)
        return {}
    with open(tags_csv, newline="") as file:
        return {row["key"]: literal(row["value"]) for row in csv.DictReader(file)}


def save_hparams_to_tags_csv(tags_csv: str | os.PathLike[str], hparams: Any) -> None:
    """Write hyper-parameters as rows of a key and a value.

    Args:
        tags_csv: The path.
        hparams: A dict or a namespace.

    Raises:
        RuntimeError: The folder is missing.
    """
    folder = os.path.dirname(tags_csv)
    if folder and not os.path.isdir(folder):
        raise RuntimeError(f"The folder {folder!r} is missing. Make it before the hyper-parameters are saved.")
    values = vars(hparams) if isinstance(hparams, Namespace) else hparams
    with open(tags_csv, "w", newline="") as file:
        csv.writer(file).writerows([("key", "value"), *values.items()])
