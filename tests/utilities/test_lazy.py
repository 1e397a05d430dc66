"""A package gives out the names of its stub, and imports what is behind one when it is asked for."""

from __future__ import annotations

import importlib
import sys
import zipfile

import pytest

FACE = "from levin.utilities.lazy import lazy_face\n\n__getattr__, __dir__ = lazy_face(__name__)\n__all__ = __dir__()\n"
FILES = {
    "__init__.py": FACE,
    "__init__.pyi": "from faced import rooms as rooms\nfrom faced.late import Late as Late\nfrom faced.late import hidden\n",
    "late.py": "class Late:\n    pass\n\nhidden = 1\n",
    "rooms.py": "",
}


@pytest.fixture(params=["folder", "archive"])
def faced(request, tmp_path, monkeypatch):
    """A package with a stub, in a folder or in a zip file."""
    path = tmp_path / "faced.zip" if request.param == "archive" else tmp_path
    if request.param == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in FILES.items():
                archive.writestr(f"faced/{name}", text)
    else:
        (tmp_path / "faced").mkdir()
        for name, text in FILES.items():
            (tmp_path / "faced" / name).write_text(text)
    monkeypatch.syspath_prepend(path)
    yield importlib.import_module("faced")
    for name in [name for name in sys.modules if name.split(".")[0] == "faced"]:
        del sys.modules[name]


def test_names_are_imported_when_they_are_asked_for(faced):
    assert dir(faced) == faced.__all__ == ["Late", "rooms"]
    assert "faced.late" not in sys.modules
    assert faced.Late is importlib.import_module("faced.late").Late
    assert vars(faced)["Late"] is faced.Late  # the next time at once
    assert faced.rooms is importlib.import_module("faced.rooms")


def test_what_the_stub_does_not_give_out_is_not_there(faced):
    with pytest.raises(AttributeError, match="module 'faced' has no attribute 'hidden'"):
        _ = faced.hidden
