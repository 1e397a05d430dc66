"""Checkpoints out of a model registry: ``ckpt_path="registry"`` and its longer forms, through the package litmodels."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from levin.checkpoint.newest import Call
from levin.utilities.filesystem import is_local, local_path


def is_registry(given: object) -> bool:
    """Return whether ``ckpt_path`` names something in a registry rather than a file.

    Example:
        >>> is_registry("registry:owner/model:version:v2"), is_registry("registry.ckpt")
        (True, False)
    """
    return isinstance(given, str) and (given == "registry" or given.startswith("registry:"))


def name_in_registry(given: str, default: str | None) -> str:
    """Return the name that the registry knows, with its version behind a colon if one was given.

    Args:
        given: ``"registry"``, ``"registry:NAME"``, ``"registry:NAME:version:V"`` or ``"registry:version:V"``.
        default: The name where none is given: that of ``Trainer(model_registry=...)``.

    Raises:
        ValueError: It has another form, or there is no name at all.

    Example:
        >>> name_in_registry("registry:version:v2", "owner/model")
        'owner/model:v2'
    """
    match = re.fullmatch(r"registry(?::(?!version:)(?P<name>[^:]+))?(?::version:(?P<version>[^:]+))?", given)
    if match is None:
        raise ValueError(
            "ckpt_path must be 'registry', 'registry:NAME', 'registry:NAME:version:V' or 'registry:version:V', "
            f"received {given!r}."
        )
    name = match["name"] or default
    if not name:
        raise ValueError(
            f"ckpt_path={given!r} names no model. Name it ('registry:NAME'), or give Trainer(model_registry=NAME)."
        )
    return f"{name}:{match['version']}" if match["version"] else name


def download_checkpoint(run: Call, given: str) -> str | None:
    """Download a checkpoint into a folder below ``default_root_dir``, and return the path of its first ``.ckpt`` file.

    One process per machine downloads; the others get None, and learn the path from rank 0.

    Raises:
        ModuleNotFoundError: litmodels is not installed.
        ValueError: The name has another form, or ``default_root_dir`` is remote.
        FileNotFoundError: What was downloaded holds no ``.ckpt`` file.
    """
    name = name_in_registry(given, run.settings.model_registry)
    if importlib.util.find_spec("litmodels") is None:
        raise ModuleNotFoundError(
            f"ckpt_path={given!r} needs the package litmodels, which is not installed. Run `pip install litmodels`."
        )
    root = run.settings.default_root_dir
    if not is_local(root):
        raise ValueError(f"ckpt_path={given!r} needs a local default_root_dir, received {root!r}.")
    from litmodels import download_model

    folder = Path(local_path(root)) / re.sub("[/:]", "_", name)
    if run.strategy.local_rank != 0:
        return None
    download_model(name, download_dir=str(folder))
    files = sorted(folder.rglob("*.ckpt"))
    if not files:
        raise FileNotFoundError(
            f"The model {name!r} of the registry holds no .ckpt file; it was downloaded to {folder}."
        )
    return str(files[0])
