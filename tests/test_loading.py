"""What can be built again from a checkpoint is, and the message of what cannot says what the file holds."""

from __future__ import annotations

import pytest
import torch

from levin import LightningModule
from tests.callbacks.small import TrainOnly, loader, trainer

DEFAULTS = {"width": 1, "depth": 2}


class Base(TrainOnly):
    def __init__(self, cfg):
        super().__init__()
        cfg = DEFAULTS | cfg
        self.save_hyperparameters(cfg)


class Same(Base):
    def __init__(self, cfg):
        super().__init__(cfg)


class More(Base):
    def __init__(self, cfg, more=3):
        super().__init__(cfg)
        self.more = more


class Grandchild(More):
    def __init__(self, more, cfg):
        super().__init__(cfg, more)


class Renamed(Base):
    def __init__(self, settings):
        super().__init__(settings)


class Second(TrainOnly):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.save_hyperparameters(second)


def saved(folder, module):
    run = trainer(folder, [], enable_checkpointing=False, max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.mark.parametrize("cls", [Base, Same, More])
def test_a_child_of_a_class_that_fills_in_defaults_is_loaded_again(tmp_path, cls):
    loaded = cls.load_from_checkpoint(saved(tmp_path, cls({"depth": 5})))
    assert dict(loaded.hparams) == {"width": 1, "depth": 5}


def test_the_argument_that_was_kept_is_found_among_others_of_its_type(tmp_path):
    loaded = Second.load_from_checkpoint(saved(tmp_path, Second({"a": 1}, {"b": 2})), first={"c": 3})
    assert (loaded.first, loaded.second["b"]) == ({"c": 3}, 2)


def test_what_the_file_lacks_can_be_given(tmp_path):
    path = saved(tmp_path, Grandchild(4, {"depth": 5}))
    with pytest.raises(TypeError, match=r"needs the argument 'more', and the checkpoint holds \['depth', 'width'\]"):
        Grandchild.load_from_checkpoint(path)
    loaded = Grandchild.load_from_checkpoint(path, more=7)
    assert (loaded.more, loaded.hparams.depth) == (7, 5)


def test_an_argument_of_another_name_is_asked_for_and_what_is_there_is_said(tmp_path):
    path = saved(tmp_path, Renamed({"depth": 5}))
    with pytest.raises(
        TypeError, match=r"needs the argument 'settings', and the checkpoint holds \['depth', 'width'\]"
    ):
        Renamed.load_from_checkpoint(path)
    loaded = Renamed.load_from_checkpoint(path, settings={"depth": 6})
    assert torch.equal(loaded.layer.weight, torch.load(path, weights_only=True)["state_dict"]["layer.weight"])


def test_the_base_of_all_modules_is_no_class_to_load(tmp_path):
    path = saved(tmp_path, Base({"depth": 5}))
    with pytest.raises(TypeError, match=r"on the class that was trained, received LightningModule.*MyModule\.load"):
        LightningModule.load_from_checkpoint(path)


@pytest.mark.parametrize("where", ["gpu", {"cpu": "nowhere"}, lambda storage: storage])
def test_a_place_that_is_none_is_not_called_damage_alone(tmp_path, where):
    path = saved(tmp_path, Base({"depth": 5}))
    with pytest.raises(RuntimeError, match="or cannot be loaded with map_location="):
        Base.load_from_checkpoint(path, map_location=where, cfg={})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the first GPU is there")
def test_a_number_is_a_gpu(tmp_path):
    path = saved(tmp_path, Base({"depth": 5}))
    with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
        Base.load_from_checkpoint(path, map_location=0, cfg={})


def test_a_misspelt_name_to_ignore_is_told():
    class Ignoring(LightningModule):
        def __init__(self, network, width=1):
            super().__init__()
            self.save_hyperparameters(ignore=["netwrok", "elsewhere"])

    with pytest.warns(
        UserWarning, match=r"ignore=\['netwrok'\]\) names no argument of __init__. Did you mean network"
    ) as told:
        assert dict(Ignoring(3).hparams) == {"network": 3, "width": 1}
    assert len(told) == 1
