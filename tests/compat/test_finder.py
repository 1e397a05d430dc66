"""The parts of the import alias, each by itself in this process."""

from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace

import pytest

import levin
from levin import compat
from levin.compat import finder, launch
from levin.compat.finder import VERSION, AliasFinder, AliasModule
from levin.compat.table import names_in

OTHERWISE = "See docs/migrating.md for what is there, or run this program on Lightning itself, without the alias."


def test_modules_of_the_table_are_found_and_no_others():
    assert AliasFinder().find_spec("torch.nn") is None
    for name, key in (("pytorch_lightning.callbacks", "pytorch.callbacks"), ("lightning", "")):
        spec = AliasFinder().find_spec(name)
        assert (spec.name, spec.origin, spec.submodule_search_locations) == (name, "levin.compat", [])
        module = spec.loader.create_module(spec)
        assert (module.__name__, module.__version__, module.__doc__) == (
            name,
            VERSION,
            f"`{name}` as levin answers for it.",
        )
        assert module.__all__ == [each for each in names_in(key) if not each.startswith("_")]
    assert module.Trainer is levin.Trainer and vars(module)["Trainer"] is levin.Trainer
    assert {"Trainer", "pytorch", "fabric", "__version__"} <= set(dir(module)) and dir(module) == sorted(dir(module))
    assert "callbacks" not in dir(module)  # that is a child of a child


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lightning.app", f"levin has no `lightning.app`. {OTHERWISE}"),
        ("lightning.pytorch.Timer", "levin has no `lightning.pytorch.Timer`. It is `levin.callbacks.Timer`."),
        # Of several homes the shortest is told, and none that is absent.
        (
            "lightning.core.seed_everything",
            "levin has no `lightning.core.seed_everything`. It is `levin.seed_everything`.",
        ),
        ("pytorch_lightning.NeptuneLogger", f"levin has no `pytorch_lightning.NeptuneLogger`. {OTHERWISE}"),
        ("lightning.pytorch.trainer.__main__", f"levin has no `lightning.pytorch.trainer.__main__`. {OTHERWISE}"),
    ],
)
def test_what_is_missing_is_told_with_its_place(name, told):
    with pytest.raises(ModuleNotFoundError) as caught:
        AliasFinder().find_spec(name)
    assert str(caught.value) == told and caught.value.name is None
    module, _, attribute = name.rpartition(".")
    with pytest.raises(AttributeError) as caught:
        getattr(AliasModule(module, "pytorch.core.hooks"), attribute if not attribute.startswith("__") else "nothing")
    if not attribute.startswith("__"):
        assert str(caught.value) == told
    with pytest.raises(AttributeError, match=f"^module '{module}' has no attribute '__wrapped__'$"):
        _ = AliasModule(module, "pytorch.core.hooks").__wrapped__


def test_programs_are_found_by_their_modules(monkeypatch):
    name = "lightning.fabric.utilities.consolidate_checkpoint.__main__"
    spec = AliasFinder().find_spec(name)
    assert spec.origin == "levin.compat" and spec.submodule_search_locations is None
    words = []
    monkeypatch.setattr("levin.checkpoint.folder.main", lambda given: words.append(given) or 3)
    monkeypatch.setattr(sys, "argv", ["program", "a", "b"])
    with pytest.raises(SystemExit) as left:
        exec(spec.loader.get_code(name), {})
    assert left.value.code == 3 and words == [["a", "b"]]


@pytest.mark.parametrize("name", ["lightning", "PyTorch_Lightning", "lightning-fabric"])
def test_the_version_is_told_to_whoever_asks_by_name(name):
    (found,) = AliasFinder().find_distributions(SimpleNamespace(name=name))
    assert (found.metadata["Name"], found.version) == (name.lower().replace("_", "-"), VERSION)
    assert found.read_text("RECORD") is None
    with pytest.raises(FileNotFoundError, match="has no files, asked for 'a/b'"):
        found.locate_file("a/b")


@pytest.mark.parametrize("context", [None, SimpleNamespace(name=None), SimpleNamespace(name="torch")])
def test_a_list_of_all_packages_does_not_have_it(context):
    assert list(AliasFinder().find_distributions(context)) == []


def test_the_finder_is_installed_once_and_before_all_others(monkeypatch):
    ours, theirs = logging.getLogger("levin"), logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(sys, "meta_path", ["others"])
    monkeypatch.setattr(finder, "ROOTS", {"levin": "", "no_such_package": ""})
    with pytest.raises(RuntimeError, match="before the first import of Lightning, but 'levin' is imported already"):
        finder.install_finder()
    assert sys.meta_path == ["others"]
    before = ours.parent, ours.level, theirs.level
    try:
        monkeypatch.setattr(finder, "ROOTS", {"no_such_package": ""})
        for level, expected in ((logging.NOTSET, logging.INFO), (logging.ERROR, logging.ERROR)):
            theirs.setLevel(level)
            sys.meta_path[:] = ["others"]
            finder.install_finder()
            finder.install_finder()
            assert len(sys.meta_path) == 2 and isinstance(sys.meta_path[0], AliasFinder)
            above, names = ours, []
            while above is not theirs:
                above = above.parent
                names.append(above.name)
            assert names == [
                "pytorch_lightning.utilities.rank_zero", "pytorch_lightning", "lightning.pytorch.utilities.rank_zero",
                "lightning.pytorch",
            ]  # fmt: skip
            assert (ours.level, theirs.level) == (logging.NOTSET, expected)
            speakers = [logging.getLogger(names[2]), logging.getLogger(names[0])]
            assert ours.filters == [*speakers, finder._is_heard_in_fabric]
    finally:
        ours.filters.clear()
        ours.parent = before[0]
        ours.setLevel(before[1])
        theirs.setLevel(before[2])


def test_what_a_new_process_inherits(monkeypatch):
    site, installed = compat._SITE, []
    for path, expected in (("", [site]), (f"/a{os.pathsep}{site}{os.pathsep}{os.pathsep}/b", [site, "/a", "/b"])):
        monkeypatch.setenv("PYTHONPATH", path)
        assert compat.inherited_environment() == {"PYTHONPATH": os.pathsep.join(expected)}
    monkeypatch.setattr(finder, "install_finder", lambda: installed.append(True))
    monkeypatch.setenv("PYTHONPATH", "/a")
    compat.install(inherit=False)
    assert os.environ["PYTHONPATH"] == "/a"
    compat.install()
    assert os.environ["PYTHONPATH"] == f"{site}{os.pathsep}/a" and installed == [True, True]


def test_a_program_takes_the_place_of_this_one(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("")
    started = []
    monkeypatch.setattr(launch.os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-O", "-X", "dev", "-m", "levin", "train.py"])
    monkeypatch.setenv("PYTHONPATH", "/a")
    for words in ([str(tmp_path / "train.py"), "--lr"], ["-m", "package", "-v"]):
        launch.run_program(words)
        environment = {**os.environ, "PYTHONPATH": f"{compat._SITE}{os.pathsep}/a"}
        command = [sys.executable, "-O", "-X", "dev", *words]
        assert started.pop() == (sys.executable, command, environment)
    for words, told in (
        (["-m"], "-m must be followed by a module"),
        (["nothing.py"], "'nothing.py' is neither a command"),
    ):
        with pytest.raises(SystemExit, match=told):
            launch.run_program(words)
    for flag in ("ignore_environment", "no_site"):
        flags = SimpleNamespace(**{"ignore_environment": 0, "no_site": 0, flag: 1})
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="which -E, -I and -S switch off"):
            patch.setattr(launch.sys, "flags", flags)
            launch.run_program(["-m", "package"])
