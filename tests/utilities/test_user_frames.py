"""Which of the calls that are under way is the user's."""

from __future__ import annotations

import torch

import levin
from levin.utilities.stacks import Call
from levin.utilities.user_frames import call_under_way, describe_different_calls, is_users, name_ranks


def test_files_of_torch_and_levin_are_not_the_users():
    assert is_users(__file__) and is_users("train.py")
    assert not any(map(is_users, (levin.__file__, torch.__file__, "<frozen runpy>")))


def test_the_call_of_the_user_is_told_by_its_line(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import levin\n    trainer.fit(model)\n")
    calls = [Call(torch.__file__, 1, "wait"), Call(levin.__file__, 2, "save"), Call(str(script), 2, "train"), Call("main.py", 1, "main")]  # fmt: skip
    assert call_under_way(calls) == ("save", "`trainer.fit(model)` (train.py:2, train)")
    assert call_under_way([calls[1], calls[3]]) == ("save", "`save` (main.py:1, main)")
    assert call_under_way(calls[:2]) == ("", "") == call_under_way([])


def test_ranks_that_call_something_else_are_named_the_first_of_many():
    assert name_ranks(range(8)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7"
    assert name_ranks(range(9)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ..."
    text = describe_different_calls({"`save()`": [2], "`fit()`": [0, 1]})
    assert "received `save()` on rank 2; `fit()` on ranks 0, 1. Make them on all ranks" in text
