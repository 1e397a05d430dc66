"""Let the documentation show docstrings as they are meant: names of other objects as code, examples as programs."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):`~?([^`]+)`")


def without_roles(text: str) -> str:
    """Return ``text`` with the names of objects as plain code."""
    return ROLE.sub(r"`\1`", text)


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = without_roles(text)
