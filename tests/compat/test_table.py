"""Every row of the table, in a fresh process where no Lightning can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from levin.compat.finder import VERSION
from levin.compat.paths import ABSENT, EQUIVALENTS, TABLE
from levin.compat.table import ROOMS, ROOTS, names_in, path_of

# Paths of earlier versions, which packages still try first.
EARLIER = {"pytorch.utilities.cloud_io", "pytorch.loggers.NeptuneLogger"}


def in_fresh_process(code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_row_resolves_to_the_named_object_of_levin():
    code = """
import importlib, json, sys
from levin.compat import install
from levin.compat.paths import TABLE
from levin.compat.table import ROOTS, names_in
install()
wrong = []
for root, start in ROOTS.items():
    for key in TABLE:
        if key != start and start and not key.startswith(start + "."):
            continue
        path = ".".join(part for part in (root, key[len(start):].strip(".")) if part)
        module = importlib.import_module(path)
        for name, (home, ours) in names_in(key).items():
            try:
                if getattr(module, name) is not getattr(importlib.import_module(home), ours):
                    wrong.append(f"{path}.{name}: another object")
            except Exception as error:
                wrong.append(f"{path}.{name}: {error!r}")
print(json.dumps(wrong))
"""
    assert json.loads(in_fresh_process(code)) == []


def test_every_name_that_packages_use_is_there():
    code = """
import sys
from importlib import import_module
from levin.compat import install
install()
for path in open(sys.argv[1]).read().split():
    for spelled in {path, path.replace("lightning.pytorch", "pytorch_lightning").replace("lightning.fabric", "lightning_fabric")}:
        parts = spelled.split(".")
        for end in range(len(parts), 0, -1):
            try:
                found = import_module(".".join(parts[:end]))
                break
            except ModuleNotFoundError:
                continue
        for part in parts[end:]:
            if not hasattr(found, part):
                print("missing", spelled)
                break
            found = getattr(found, part)
"""
    assert in_fresh_process(code, str(Path(__file__).parent / "names_in_use.txt")) == ""


def test_the_table_holds_only_paths_that_lightning_has():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = []
        for key in TABLE:
            path = ".".join(part for part in ("lightning", key) if part)
            if key in EARLIER:
                continue
            module = import_module(path)
            wrong += [
                f"{path}.{name}"
                for name in names_in(key)
                if not hasattr(module, name) and f"{key}.{name}" not in EARLIER
            ]
    assert wrong == []


def test_every_documented_name_of_lightning_is_in_the_table():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = []
        for key in TABLE:
            module = (
                import_module(".".join(part for part in ("lightning", key) if part)) if key not in EARLIER else None
            )
            known = set(names_in(key)) | {path.rpartition(".")[2] for path in TABLE}
            missing += [f"{key}.{name}" for name in getattr(module, "__all__", []) if name not in known]
    other = ("HPU", "is_shared_filesystem", "__version__")
    assert [name for name in missing if not any(part in name for part in (*other, "._"))] == []


def test_every_public_name_of_lightning_resolves_through_the_alias():
    """All names of all `__all__` lists of the installed package, found by importing every module of it."""
    walk = """
import importlib, json, pkgutil, warnings
warnings.simplefilter("ignore")
found = {}
for root in ("lightning", "lightning.pytorch", "lightning.fabric"):
    package = importlib.import_module(root)
    below = [] if root == "lightning" else [each.name for each in pkgutil.walk_packages(package.__path__, root + ".")]
    for name in [root, *below]:
        if "_graveyard" in name or name.endswith(".__main__"):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # needs a package that is not there
            continue
        found[name] = list(getattr(module, "__all__", []))
print(json.dumps(found))
"""
    theirs = subprocess.run([sys.executable, "-c", walk], capture_output=True, text=True, timeout=200)
    names = json.loads(theirs.stdout.splitlines()[-1])
    assert sum(map(len, names.values())) > 150, theirs.stderr
    resolve = """
import importlib, json, sys
from levin.compat import install
install()
for path, names in json.loads(sys.argv[1]).items():
    for name in names:
        try:
            if not hasattr(importlib.import_module(path), name):
                importlib.import_module(f"{path}.{name}")
        except Exception as error:
            print(path, name, error)
"""
    assert in_fresh_process(resolve, json.dumps({path: each for path, each in names.items() if each})) == ""


def test_an_absent_feature_leaves_the_table_when_it_comes():
    import levin

    public = set(levin.__all__)
    for room in ("callbacks", "loggers", "strategies", "precision", "checkpoint"):
        public |= set(import_module(f"levin.{room}").__all__)
    absent = {name for key in TABLE for name, (home, _) in names_in(key).items() if home == ABSENT}
    assert absent & public == set()


@pytest.mark.parametrize(
    "name, base",
    [
        ("_XLALauncher", None),
        ("DataParallelStrategy", "Strategy"),
        ("FSDPPrecision", "Precision"),
        ("NeptuneLogger", "Logger"),
    ],
)
def test_an_absent_feature_can_be_mentioned_and_not_used(name, base):
    from levin.compat import absent

    kind = getattr(absent, name)
    assert base is None or base in {parent.__name__ for parent in kind.__mro__}
    assert not isinstance(object(), kind)
    with pytest.raises(NotImplementedError, match=f"levin has no `{name}`. (Use|Set) "):
        kind("anything", at="all")

    class Mine(kind):
        pass

    with pytest.raises(NotImplementedError, match=name):
        Mine()


@pytest.mark.parametrize(
    "statement, message",
    [
        ("from lightning.pytorch.callbacks import Nonsense", "levin has no `lightning.pytorch.callbacks.Nonsense`"),
        ("import lightning.pytorch.callback.Callback", "levin has no `lightning.pytorch.callback`"),
        ("from pytorch_lightning.trainer import ModelCheckpoint", "It is `levin.callbacks.ModelCheckpoint`"),
        ("import lightning.app", "levin has no `lightning.app`"),
    ],
)
def test_a_name_that_is_not_there_says_so(statement, message):
    code = f"""
from levin.compat import install
install()
try:
    {statement}
except ImportError as error:
    print(error)
"""
    assert message in in_fresh_process(code)


def test_modules_behave_like_modules():
    code = f"""
from levin.compat import install
install()
import importlib.metadata, importlib.util, inspect, pickle, sys
import lightning, lightning as L, pytorch_lightning as pl, lightning.pytorch
from lightning.pytorch import *
import levin
assert Trainer is levin.Trainer is L.Trainer is pl.Trainer
assert not hasattr(pl, "nonsense") and hasattr(pl.utilities, "rank_zero_only")
assert L.__version__ == pl.__version__ == lightning.pytorch.__version__ == {VERSION!r}
assert lightning.pytorch.__doc__ == "`lightning.pytorch` as levin answers for it."
assert pl.callbacks.progress.TQDMProgressBar and "callbacks" in dir(pl) and "Trainer" in dir(pl)
assert L.pytorch.utilities.types.STEP_OUTPUT is not None
assert importlib.util.find_spec("lightning.pytorch.callbacks") is not None
for name in ("lightning", "pytorch-lightning", "pytorch_lightning", "lightning-fabric"):
    assert importlib.metadata.version(name) == {VERSION!r}
assert importlib.metadata.version("levin")
inspect.getmodule(sys._getframe())
"""
    in_fresh_process(code)


def test_lightning_that_is_imported_already_is_an_error():
    code = """
import warnings; warnings.simplefilter("ignore")
import lightning.fabric.utilities.types
from levin.compat import install
try:
    install()
except RuntimeError as error:
    print(error)
"""
    assert "before the first import of Lightning" in in_fresh_process(code.replace("-W error", ""))


def test_rooms_are_attributes_of_levin():
    import levin

    assert {home.removeprefix("levin.") for home in ROOMS} <= set(levin._ROOMS)


def test_paths_by_their_three_roots():
    assert path_of("lightning.pytorch.callbacks") == path_of("pytorch_lightning.callbacks") == "pytorch.callbacks"
    assert path_of("lightning_fabric.utilities") == "fabric.utilities"
    assert path_of("lightning_utilities.core") is None
    assert set(ROOTS.values()) == {"", "pytorch", "fabric"}
    assert EQUIVALENTS in TABLE["pytorch.utilities"]
