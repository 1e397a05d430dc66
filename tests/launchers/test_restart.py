"""The command that starts a program again, for each way in which it can have been started."""

from __future__ import annotations

import sys
import zipfile
from types import ModuleType, SimpleNamespace

import pytest

from levin.launchers import restart

ELSEWHERE = "/where/levin/was/imported"


@pytest.fixture
def project(tmp_path, monkeypatch):
    for path in ("train.py", "app/__main__.py", "pkg/train.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", "")
    monkeypatch.setattr(restart, "_DIRECTORY_AT_IMPORT", ELSEWHERE)
    monkeypatch.delitem(sys.modules, "hydra", raising=False)
    return tmp_path


# What `python` was started with; the name and the file of its main module; what stands first on the path of modules; the
# working directory of the shell -> the words of the command, and the directory.
WAYS = {
    "a script": (["-X", "dev", "train.py", "-m", "x"], None, "train.py", "", "HERE", ["-X", "dev", "HERE/train.py", "-m", "x"], "HERE"),
    "a script by its whole path": (["HERE/train.py", "x"], None, "train.py", "", "HERE", ["HERE/train.py", "x"], ELSEWHERE),
    "a script from another directory": (["train.py", "x"], None, "train.py", "", "/", ["HERE/train.py", "x"], ELSEWHERE),
    "a folder": (["app/", "x"], "__main__", "app/__main__.py", "", "HERE", ["HERE/app", "x"], "HERE"),
    "an archive": (["app.zip", "x"], "__main__", "app.zip/__main__.py", "", "HERE", ["HERE/app.zip", "x"], "HERE"),
    "a module": (["-Om", "pkg.train", "x"], "pkg.train", "pkg/train.py", "HERE", "/", ["-O", "-m", "pkg.train", "x"], "HERE"),
    "a package": (["-m", "app", "x"], "app.__main__", "app/__main__.py", "HERE", "/", ["-m", "app", "x"], "HERE"),
    "a module in a changed path": (["-m", "pkg.train", "x"], "pkg.train", "pkg/train.py", "", "HERE", ["-m", "pkg.train", "x"], ELSEWHERE),
    "a module of another place": (["-m", "pkg.train", "x"], "pkg.train", "pkg/train.py", "/else", "HERE", ["-m", "pkg.train", "x"], ELSEWHERE),
    "a script under another one": (["-O", "profile.py", "train.py", "x"], None, "train.py", "", "HERE", ["HERE/train.py", "given"], ELSEWHERE),
    "a script under a module": (["-O", "-m", "train.py", "x"], None, "train.py", "", "HERE", ["HERE/train.py", "given"], ELSEWHERE),
    "a module under another one": (["-m", "runpy", "pkg.train"], "pkg.train", "pkg/train.py", "HERE", "/", ["-m", "pkg.train", "given"], "HERE"),
    "a module under a script": (["pkg.train", "x"], "pkg.train", "pkg/train.py", "HERE", "/", ["-m", "pkg.train", "given"], ELSEWHERE),
}  # fmt: skip


def start(project, monkeypatch, words, name, file, first, shell) -> None:
    here = str(project)
    monkeypatch.setattr(sys, "orig_argv", ["python", *(word.replace("HERE", here) for word in words)])
    monkeypatch.setattr(sys, "argv", [file, "given"])
    monkeypatch.setattr(sys, "path", [first.replace("HERE", here), *sys.path])
    monkeypatch.setattr("__main__.__spec__", name and SimpleNamespace(name=name))
    monkeypatch.setattr("__main__.__file__", str(project / file), raising=False)
    monkeypatch.setenv("PWD", shell.replace("HERE", here))


@pytest.mark.parametrize("way", WAYS)
def test_a_program_is_started_again_as_it_was(project, monkeypatch, way):
    words, name, file, first, shell, expected, directory = WAYS[way]
    start(project, monkeypatch, words, name, file, first, shell)
    here = str(project)
    command = [sys.executable, *(word.replace("HERE", here) for word in expected)]
    assert restart.script_command(1) == (command, directory.replace("HERE", here))


def test_a_job_of_hydra_is_started_again_where_hydra_was(project, monkeypatch):
    start(project, monkeypatch, ["train.py", "a=1"], None, "train.py", "", "HERE")
    overrides = SimpleNamespace(task=["a=1"], hydra=["hydra.mode=RUN"])
    job = SimpleNamespace(overrides=overrides, runtime=SimpleNamespace(output_dir="/out"))
    names = ("hydra", "hydra.utils", "hydra.core", "hydra.core.hydra_config")
    modules = {name: ModuleType(name) for name in names}
    modules["hydra.utils"].get_original_cwd = lambda: "/original"
    is_on = [True]
    config = SimpleNamespace(get=lambda: job, initialized=lambda: is_on[0])
    modules["hydra.core.hydra_config"].HydraConfig = config
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    place = ["hydra.run.dir='/out'", "hydra.job.name=train_ddp_process_3", "hydra.output_subdir=null"]
    command = [sys.executable, str(project / "train.py"), "a=1"]
    assert restart.script_command(3) == ([*command, *place], "/original")
    is_on[0] = False
    assert restart.script_command(3) == (command, str(project))
