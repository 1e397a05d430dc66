"""Errors: their words, what is found behind them, and what is made of those of torch."""

from __future__ import annotations

import pickle

import pytest
import torch

from levin.utilities.exceptions import (
    MisconfigurationException,
    SIGTERMException,
    add_hint,
    causes,
    did_you_mean,
    require_choice,
    value_error,
)
from levin.utilities.memory import is_oom_error


def test_the_end_by_a_signal_is_sent_from_process_to_process():
    error = pickle.loads(pickle.dumps(SIGTERMException()))
    assert type(error) is SIGTERMException and error.code == 143


def test_the_causes_of_an_error_in_their_order():
    first, second, third = ValueError(1), KeyError(2), OSError(3)
    third.__cause__, third.__context__, second.__context__ = second, RuntimeError(), first
    assert list(causes(third)) == [third, second, first]


@pytest.mark.parametrize(
    ("word", "question"),
    [
        ("dpp", " Did you mean ddp?"), ("DDP_Spawn", " Did you mean ddp-spawn?"), ("16 mixed", " Did you mean 16-mixed?"),
        ("nothing like it", ""), (3, ""), (None, ""),
    ],
)  # fmt: skip
def test_the_nearest_word_is_named(word, question):
    assert did_you_mean(word, ["ddp", "ddp-spawn", "16-mixed"]) == question


def test_an_error_says_what_is_expected_what_came_and_the_way_out():
    error = value_error("devices", "x", "must be >= 1")
    assert type(error) is MisconfigurationException and str(error) == "devices must be >= 1, received 'x'."
    assert str(value_error("devices", 0, "must be >= 1", "Use 1.")) == "devices must be >= 1, received 0. Use 1."
    require_choice("mode", "b", ("a", "b", 3))
    with pytest.raises(MisconfigurationException) as caught:
        require_choice("mode", "c", ("a", "b", 3))
    assert str(caught.value) == "mode must be 'a', 'b' or 3, received 'c'."


@pytest.mark.parametrize(
    ("args", "after"),
    [
        (("the sign is here", 2), ("the way out\nthe sign is here", 2)), ((7,), (7,)), ((), ()),
        ((ValueError("sign"),), ("the way out\nsign",)),
    ],
)  # fmt: skip
def test_a_way_out_stands_before_the_message(args, after):
    error = RuntimeError(*args)
    add_hint(error, "sign", "the way out")
    assert error.args == after


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (torch.cuda.OutOfMemoryError("x"), True), (MemoryError(), True), (RuntimeError("CUDA out of memory. Tried"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This"), True), (RuntimeError("x: can't allocate memory"), True),
        (RuntimeError("shapes"), False), (RuntimeError("CUDA out of memory", 1), False), (RuntimeError(), False),
        (ValueError("CUDA out of memory"), False),
    ],
)  # fmt: skip
def test_memory_that_is_full_is_told_from_other_errors(error, is_full):
    assert is_oom_error(error) is is_full
