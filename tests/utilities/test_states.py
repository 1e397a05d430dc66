"""What a Trainer is doing, in the words of Lightning."""

from __future__ import annotations

import pytest

from levin.utilities import states
from levin.utilities.states import GradClipAlgorithmType, TrainerFn, TrainerState, TrainerStatus

NAMES = {
    "TrainerStatus": ["stopped"], "TrainerFn": [], "RunningStage": ["evaluating", "dataloader_prefix"],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_members_are_those_of_lightning(name):
    theirs = pytest.importorskip("lightning.pytorch.trainer.states")

    def told(module):
        return {
            (member.name, member.value): [getattr(member, what) for what in NAMES[name]]
            for member in getattr(module, name)
        }

    assert told(states) == told(theirs)
    assert all(f"{member}" == str(member) == member.value for member in getattr(states, name))


def test_a_state_begins_before_the_first_call():
    state = TrainerState()
    assert (state.status, state.fn, state.stage) == ("initializing", None, None)
    seen = {}
    for status in TrainerStatus:
        state.status = status
        seen[status.value] = state.finished, state.stopped
    assert seen == {
        "initializing": (False, False), "running": (False, False), "finished": (True, True), "interrupted": (False, True),
    }  # fmt: skip
    assert TrainerFn("fit") is TrainerFn.FITTING


def test_what_of_the_gradients_may_be_clipped():
    assert GradClipAlgorithmType.supported_types() == ["value", "norm"]
    supported = [GradClipAlgorithmType.supported_type(name) for name in ("value", GradClipAlgorithmType.NORM, "other")]
    assert supported == [True, True, False]
