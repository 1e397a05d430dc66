"""Pure functions that every logger needs: names of metrics and runs, hyper-parameters, saved checkpoints."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any, Optional, Union

from levin.utilities.filesystem import get_filesystem, is_local, local_path, replace_text
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import Metrics, PathLike

HPARAMS_FILE = "hparams.yaml"

Params = Union[Mapping[str, Any], Namespace, None]


def add_prefix(metrics: Metrics, prefix: str, separator: str = "-") -> Metrics:
    """Return ``metrics`` with ``prefix`` and ``separator`` in front of every name.

    Example:
        >>> add_prefix({"loss": 1.0}, "run")
        {'run-loss': 1.0}
    """
    if not prefix:
        return metrics
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()}


def to_dict(params: Params) -> dict[str, Any]:
    """Return hyper-parameters as a new dict; None gives an empty one, OmegaConf containers are resolved."""
    if params is None:
        return {}
    resolved = _resolve_omegaconf(params)
    items = vars(resolved) if isinstance(resolved, Namespace) else resolved
    return {key: _resolve_omegaconf(value) for key, value in items.items()}


def _resolve_omegaconf(value: object) -> Any:
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(value, (omegaconf.DictConfig, omegaconf.ListConfig)):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    return value


def flatten(params: Mapping[str, object], separator: str = "/") -> dict[str, object]:
    """Return nested hyper-parameters as one flat dict.

    Mappings, namespaces, dataclass instances and lists of those are opened; everything else is a value.

    Example:
        >>> flatten({"model": {"width": 8, "layers": [{"kind": "conv"}]}})
        {'model/width': 8, 'model/layers/0/kind': 'conv'}
    """
    flat: dict[str, object] = {}
    for key, value in params.items():
        branch = _branch(value)
        if branch is None:
            flat[str(key)] = value
        else:
            flat.update((f"{key}{separator}{name}", leaf) for name, leaf in flatten(branch, separator).items())
    return flat


def _branch(value: object) -> Optional[Mapping[str, object]]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
        return {str(index): item for index, item in enumerate(value)}
    return None


def sanitize(params: Mapping[str, object]) -> dict[str, Union[bool, int, float, str]]:
    """Return ``params`` with every value as a bool, a number or a text, which is all that dashboards accept.

    Example:
        >>> sanitize({"lr": torch.tensor(0.5), "sizes": [1, 2], "name": None})
        {'lr': 0.5, 'sizes': '[1, 2]', 'name': 'None'}
    """
    return {name: _primitive(value) for name, value in params.items()}


def _primitive(value: object) -> Union[bool, int, float, str]:
    if isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum):
        return value
    # A number of torch's or numpy's, recognised without importing numpy.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        number = value.item()
        return number if isinstance(number, (bool, int, float)) else str(number)
    return str(value)


# ---- directories ----


def join_path(*parts: Optional[PathLike]) -> str:
    """Return the parts as one path; ``~`` and environment variables are expanded in local ones."""
    path = os.path.join(*(os.fspath(part) for part in parts if part is not None))
    return os.path.expanduser(os.path.expandvars(local_path(path))) if is_local(path) else path


def version_name(version: Union[int, str, None]) -> str:
    """Return the directory of a run: a text as it is, a number ``N`` as ``version_N``."""
    return version if isinstance(version, str) else f"version_{version}"


def next_version(directory: str) -> int:
    """Return one more than the highest N of the folders ``version_N`` in ``directory``, 0 without any."""
    numbers = [-1]
    for name in _subfolders(directory):
        match = re.fullmatch(r"version_(\d+)", name)
        if match:
            numbers.append(int(match[1]))
    return max(numbers) + 1


def _subfolders(directory: str) -> Iterable[str]:
    if is_local(directory):
        if not os.path.isdir(directory):
            return []
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    filesystem = get_filesystem(directory)
    if not filesystem.isdir(directory):
        return []
    entries_ = filesystem.ls(directory, detail=True)
    return [os.path.basename(str(entry["name"]).rstrip("/")) for entry in entries_ if entry["type"] == "directory"]


# ---- hparams.yaml ----


# A value of a subclass becomes one of the class itself.
_PLAIN_TYPES: tuple[Any, ...] = (bool, int, float, str, bytes)


class _CannotHold(TypeError):
    """YAML has no plain form for this value."""


def write_hparams(directory: str, hparams: Mapping[str, object]) -> None:
    """Write ``hparams.yaml`` into ``directory``.

    The file holds plain YAML that any reader accepts. Enum members are written by name, paths as text, tensors and
    arrays as lists, namespaces and dataclass instances as mappings. What YAML has no form for (modules, classes,
    functions) is left out with a warning and mentioned in a comment.

    Args:
        directory: Local path or URL of an existing directory.
        hparams: The hyper-parameters.
    """
    import yaml

    left_out: dict[str, object] = {}
    text = yaml.dump(_plain_tree(hparams, left_out), sort_keys=False)
    if left_out:
        text += "".join(f"# {name}: {_describe(value)}\n" for name, value in sorted(left_out.items()))
        rank_zero_warn(
            f"{HPARAMS_FILE} leaves out {sorted(left_out)}, because YAML has no form for values such as"
            f" {_describe(next(iter(left_out.values())))}. Skip them with save_hyperparameters(ignore=[...])."
        )
    replace_text(os.path.join(directory, HPARAMS_FILE), text)


def _plain_tree(
    params: Mapping[str, object], left_out: Optional[dict[str, object]] = None, parents: str = ""
) -> dict[str, object]:
    """Return ``params`` as YAML and JSON can hold them.

    Args:
        params: Hyper-parameters.
        left_out: Takes what cannot be held, by its name with dots; without it, a text that describes it takes its place.
        parents: The names above these, each with a dot behind.
    """
    values: dict[str, object] = {}
    for key, value in params.items():
        branch = None if isinstance(value, (list, tuple)) else _branch(value)
        try:
            values[key] = _plain(value) if branch is None else _plain_tree(branch, left_out, f"{parents}{key}.")
        except _CannotHold:
            if left_out is None:
                values[key] = _describe(value)
            else:
                left_out[f"{parents}{key}"] = value
    return values


def _plain(value: object) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    for kind in _PLAIN_TYPES:
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    branch = None if isinstance(value, (list, tuple)) else _branch(value)
    if branch is not None:
        return {key: _plain(item) for key, item in branch.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return {_plain(item) for item in value}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return _plain(value.tolist())
    raise _CannotHold


def json_values(params: Mapping[str, object]) -> dict[str, object]:
    """Return ``params`` with what YAML and JSON have no form for replaced by a text that describes it.

    Example:
        >>> json_values({"lr": 0.1, "activation": torch.nn.ReLU})
        {'lr': 0.1, 'activation': 'torch.nn.modules.activation.ReLU'}
    """
    return _plain_tree(params)


def _describe(value: object) -> str:
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    return f"an instance of {type(value).__module__}.{type(value).__qualname__}"
