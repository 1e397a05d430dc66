"""A dict whose keys are attributes, and the defaults of a scheduler's settings, beside Lightning's."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
import types

import pytest

from levin.utilities.attribute_dict import AttributeDict
from levin.utilities.types import LRSchedulerConfig
from levin.utilities.xla_generator import XlaGenerator


def test_keys_are_read_set_and_deleted_as_attributes():
    hparams = AttributeDict(lr=0.1, name="a")
    hparams.lr, hparams["new"] = 0.2, 1
    assert (hparams.lr, hparams.new, dict(hparams)) == (0.2, 1, {"lr": 0.2, "name": "a", "new": 1})
    del hparams.new
    for other in (copy.deepcopy(hparams), pickle.loads(pickle.dumps(hparams))):
        assert other == {"lr": 0.2, "name": "a"} and type(other) is AttributeDict and other.name == "a"
    with pytest.raises(AttributeError) as read:
        hparams.missing
    with pytest.raises(KeyError) as deleted:
        del hparams.missing
    assert isinstance(deleted.value, AttributeError)
    assert {str(read.value), str(deleted.value)} == {"Missing attribute 'missing'. Present: ['lr', 'name']."}


@pytest.mark.parametrize("values", [{}, {"lr": 0.1}, {"long name": 1, "a": "text", "b": None}], ids=str)
def test_it_is_shown_as_lightnings(values):
    theirs = pytest.importorskip("lightning.fabric.utilities.data").AttributeDict
    assert repr(AttributeDict(values)) == repr(theirs(values))


def test_a_scheduler_has_the_defaults_of_lightning():
    theirs = pytest.importorskip("lightning.pytorch.utilities.types").LRSchedulerConfig
    assert dataclasses.asdict(LRSchedulerConfig("s")) == dataclasses.asdict(theirs("s"))


def test_each_step_of_an_xla_device_has_a_seed_of_its_own_which_begins_with_torchs(monkeypatch):
    seeds = []
    model = types.SimpleNamespace(set_rng_state=seeds.append)
    for name in ("torch_xla", "torch_xla.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torch_xla.core"].xla_model = model
    monkeypatch.setitem(sys.modules, "torch_xla.core.xla_model", model)
    generator = XlaGenerator()
    generator.seed(3)  # no device is in use
    assert generator.state is None
    generator.follow(2**63 + 5)
    assert generator.state == 5
    generator.begin_step()
    generator.begin_step()
    generator.follow(2**63 + 5)  # the seed of before begins nothing anew
    generator.begin_step()
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**63 for seed in seeds) and generator.state == seeds[-1]
    assert seeds[0] == (5 * 6364136223846793005 + 1442695040888963407) % 2**63
    generator.seed(2**63 + 5)
    generator.begin_step()
    assert seeds[3] == seeds[0]
    generator.follow(6)
    assert generator.state == 6
