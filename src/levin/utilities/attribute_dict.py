"""A dict whose keys can be read and set as attributes."""

from __future__ import annotations

from typing import Any


class MissingAttributeError(AttributeError, KeyError):
    """An attribute that is to be deleted is not there; some programs catch it as the KeyError of a dict."""

    __str__ = AttributeError.__str__


class AttributeDict(dict[str, Any]):
    """A dict with attribute access; a missing name raises AttributeError.

    Example:
        >>> hparams = AttributeDict(lr=0.1)
        >>> hparams.lr = 0.2
        >>> hparams
        "lr": 0.2
    """

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"Missing attribute {name!r}. Present: {sorted(self)}.") from None

    def __setattr__(self, name: str, value: object) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise MissingAttributeError(f"Missing attribute {name!r}. Present: {sorted(self)}.")
        del self[name]

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0) + 2
        rows = (
            f'"{key}":'.ljust(width + 1) + f" {value}" for key, value in sorted(self.items(), key=lambda kv: str(kv[0]))
        )
        return "\n".join(rows)
