"""Checkpoint files read: only what is intact, and without running what is in it."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
import tempfile
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch

from levin.checkpoint.unpickling import allowed_globals, redirecting_pickle, refused_global
from levin.checkpoint.verify import check_zip, is_zip, open_for_reading
from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.filesystem import is_local, is_web

# What torch and pickle raise of a damaged file by themselves.
_OF_TORCH = (EOFError, RuntimeError, UnicodeDecodeError, pickle.UnpicklingError, struct.error)


def load(path: Any, map_location: object = None, weights_only: bool | None = None) -> Any:
    """Load a checkpoint, after checking that it is intact.

    Args:
        path: Local path, URL that fsspec knows, http address (kept in torch's hub folder), or open binary file.
        map_location: Where tensors go, as for ``torch.load``, or the number of a GPU; by default to the device that they
            were saved from.
        weights_only: False allows the file to run code while it is loaded, which is for files of trusted origin.
            None is True: tensors, plain values and containers, and the classes in
            ``torch.serialization.safe_globals``.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedCheckpointError: The file is damaged, or no checkpoint. It is a ValueError, EOFError, RuntimeError,
            UnpicklingError, OSError and TypeError.
        pickle.UnpicklingError: The file holds objects of classes that are not allowed. The message names them.

    Example:
        >>> checkpoint = load("best.ckpt", map_location="cpu")  # doctest: +SKIP
    """
    if isinstance(map_location, int):
        map_location = torch.device("cuda", map_location)
    if hasattr(path, "read"):
        return _load_file(path, f"the file {getattr(path, 'name', '')}".rstrip(), map_location, weights_only)
    name = os.fspath(path)
    if is_web(name):
        path = _download(name)
    with open_for_reading(path) as file:
        if is_local(path):
            return _load_file(file, name, map_location, weights_only)
        # Reading starts at the end and goes to and fro, and every byte is needed twice.
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy, length=2**20)
            copy.seek(0)
            return _load_file(copy, name, map_location, weights_only)


def _load_file(file: IO[bytes], name: str, map_location: Any, weights_only: bool | None) -> object:
    if is_zip(file):
        check_zip(file, name)
    elif not _is_legacy(file):
        raise DamagedCheckpointError(f"{name} is no checkpoint, or its first bytes are damaged.")
    try:
        if weights_only is False:
            return torch.load(file, map_location, pickle_module=redirecting_pickle(), weights_only=False)
        with allowed_globals() as finish:
            return finish(torch.load(file, map_location, weights_only=True))
    except Exception as error:
        refusal = _refusal(error, name, map_location, weights_only is False)
        if refusal is error:
            raise
        raise refusal from error


def _is_legacy(file: IO[bytes]) -> bool:
    """Return whether a file may come from torch before version 1.6, which wrote a row of pickles."""
    position = file.tell()
    first = file.read(1)
    file.seek(position)
    return first == pickle.PROTO


def _refusal(error: Exception, name: str, map_location: Any, runs_code: bool) -> Exception:
    """Return what to raise: what torch does depends on where in the file it comes upon something odd."""
    # torch puts a page of advice in place of what its unpickler said.
    said = str(error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error).strip()
    reason = said.splitlines()[0] if said else type(error).__name__
    refused = None if runs_code else refused_global(said)
    if refused is not None:
        return pickle.UnpicklingError(
            f"{name} refers to {refused}, which is not loaded, since that could run code. If you trust where the file "
            "comes from, pass weights_only=False; torch.serialization.add_safe_globals allows single classes."
        )
    if isinstance(error, pickle.UnpicklingError) and not runs_code:
        return pickle.UnpicklingError(
            f"{name} cannot be loaded without running code: {reason}. If you trust where the file comes from, pass "
            "weights_only=False."
        )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "deserialize object on" in said:
        return error  # the file may be fine, the machine lacks memory or the device
    if runs_code and type(error) not in _OF_TORCH:
        return error  # of a class in the file, which is not found here, or fails
    where = ""
    if map_location is not None and not str(getattr(map_location, "__module__", "")).startswith("levin."):
        where = f", or cannot be loaded with map_location={map_location!r}"
    return DamagedCheckpointError(f"{name} is no checkpoint, or is damaged{where}: {type(error).__name__}: {reason}")


def _download(url: str) -> str:
    """Return the path of the file at ``url`` in torch's hub folder, fetching it when it is not there."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    # Many addresses end in the same name.
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = os.path.join(folder, f"{digest}-{os.path.basename(urlsplit(url).path)}")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, progress=False)
        except URLError as error:
            if isinstance(error, HTTPError):
                error.close()  # it has the connection
            raise FileNotFoundError(f"Checkpoint file not found: {url} ({error})") from error
    return path
