"""`levin explain`, in this process."""

from __future__ import annotations

import sys

import pytest

from levin.cli import commands, explain
from levin.trainer import Trainer

PROGRAM = """
import os, sys
from levin import Trainer
from levin.demos.boring_classes import BoringModel

quiet = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer, model = Trainer(max_epochs=1, **quiet), BoringModel()
assert __name__ == "__main__" and os.path.dirname(os.path.abspath(__file__)) in sys.path
told = sys.argv
"""


@pytest.fixture
def explained(tmp_path, monkeypatch, capsys):
    """A function that explains a program of these lines with these words, and returns the status and what is said."""
    for name in explain.METHODS:
        monkeypatch.setattr(Trainer, name, getattr(Trainer, name))
    monkeypatch.setattr(explain, "install", lambda: None)
    monkeypatch.setattr(explain, "_passed_over", {})
    monkeypatch.setattr(sys, "argv", ["levin"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)

    def run(lines: str, *words: str) -> tuple[int, str, str]:
        (tmp_path / "train.py").write_text(PROGRAM + lines)
        status = explain.main(words)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def lines_of(method: str, tmp_path) -> str:
    from levin.demos.boring_classes import BoringModel

    quiet = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return Trainer(max_epochs=1, **quiet).explain(BoringModel(), fn=method)


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        (["train.py", "--call", "x"], ["train.py", "--call", "x"]),
        (["-m", "train", "--lr", "1"], [None, "--lr", "1"]),
        (["--call", "fit", "train.py"], ["train.py"]),
        (["--call=fit", "train.py"], ["train.py"]),
    ],
)
def test_the_first_call_of_a_program_is_explained(explained, tmp_path, words, argv):
    ending = f"assert (told[1:], sys.path[0]) == ({argv[1:]!r}, {str(tmp_path)!r}), (told, sys.path)\ntrainer.fit(model)\nraise AssertionError('trained')\n"
    assert explained(ending, *words) == (0, lines_of("fit", tmp_path), "")


def test_calls_of_other_methods_are_passed_over(explained, tmp_path):
    lines = (
        "assert trainer.fit(model) is None and trainer.validate() == []\n"
        "assert model.trainer is trainer and trainer.state.finished\n"
    )
    status, out, err = explained(lines + "trainer.test()\n", "--call", "test", "train.py")
    assert (status, out, err) == (0, lines_of("test", tmp_path), "")
    explain._passed_over.clear()
    passed_over = (
        "levin explain: Trainer.fit, Trainer.validate were passed over, so what they would have made is not there.\n"
    )
    for name in explain.METHODS:  # as in a new process
        setattr(Trainer, name, getattr(Trainer, name).__wrapped__)
    never = "levin explain: train.py never called `Trainer.predict`.\n"
    assert explained(lines, "--call=predict", "train.py") == (1, "", passed_over + never)


def test_a_program_that_fails_for_what_was_passed_over(explained, capsys):
    with pytest.raises(FileNotFoundError):
        explained("trainer.fit(model)\nopen('best.ckpt')\n", "--call", "test", "train.py")
    told = "levin explain: Trainer.fit were passed over, so what they would have made is not there.\n"
    assert capsys.readouterr().err == told


def test_a_program_that_trains_nothing(explained):
    never = "levin explain: train.py x never called a method of the Trainer that runs.\n"
    assert explained("", "train.py", "x") == (1, "", never)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["absent.py"], "levin explain: 'absent.py' is no script that exists. See `levin explain --help`."),
        (["-m", "no_such.module"], "levin explain: there is no module 'no_such.module'. See `levin explain --help`."),
        (["-m"], "levin explain: '-m' is no script that exists. See `levin explain --help`."),
    ],
)
def test_a_program_that_is_not_there(explained, words, told):
    with pytest.raises(SystemExit) as left:
        explained("", *words)
    assert str(left.value) == told


def test_what_levin_fit_would_do(explained, monkeypatch):
    run = []
    monkeypatch.setattr(commands, "run", lambda *arguments: run.append(arguments))
    told = "levin explain: test --model=Net never called a method of the Trainer that runs.\n"
    assert explained("", "test", "--model=Net") == (1, "", told)
    assert run == [("test", ("--model=Net",))] or run == [("test", ["--model=Net"])]


@pytest.mark.parametrize(
    ("words", "status"),
    [([], 2), (["--call"], 2), (["--call", "nothing", "x"], 2), (["-h"], 0), (["--call", "fit", "--help"], 0)],
)
def test_the_command_line_of_the_command_itself(explained, words, status):
    with pytest.raises(SystemExit) as left:
        explained("", *words)
    assert left.value.code == status
