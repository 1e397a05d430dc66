"""Which part of a checkpoint it is that cannot be pickled."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

UNPICKLABLE = (TypeError, AttributeError, pickle.PicklingError)
"""What pickling raises when it comes upon something that it has no way for."""


def raise_explained(error: Exception, obj: object) -> NoReturn:
    """Raise ``error``, that pickling ``obj`` has met with, with a message that says which part is at fault."""
    where = _find_unpicklable(obj)
    if not where:
        raise error
    message = f"{where} cannot be saved: {error}. Remove it, or replace it by something that can be pickled."
    raise type(error)(message) from error


def _find_unpicklable(obj: object) -> str:
    """Return the place of the first thing that cannot be pickled, such as ``["hyper_parameters"]["fn"]``."""
    if isinstance(obj, Mapping):
        items: Any = obj.items()
    elif isinstance(obj, Sequence) and not isinstance(obj, (str, bytes)):
        items = enumerate(obj)
    else:
        return ""
    for key, value in items:
        try:
            _Pickler(io.BytesIO(), protocol=2).dump(value)
        except UNPICKLABLE:
            return f"[{key!r}]{_find_unpicklable(value)}"
    return ""


class _Pickler(pickle.Pickler):
    """Pickles everything but the content of tensors."""

    def persistent_id(self, obj: object) -> str | None:
        return "tensor" if isinstance(obj, (torch.Tensor, torch.UntypedStorage, torch.TypedStorage)) else None
