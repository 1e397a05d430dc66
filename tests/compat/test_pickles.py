"""Files that Lightning wrote load through the alias where no Lightning is installed."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch

from tests.compat.programs import MODULE, output, without_lightning


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint, and a pickle of objects and classes, as Lightning writes them."""
    folder = tmp_path_factory.mktemp("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch as pl
        from lightning.fabric.utilities.data import AttributeDict
        from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
        from lightning.pytorch.trainer.states import RunningStage
        from lightning.pytorch.utilities.parsing import AttributeDict as Parsed

        namespace: dict = {}
        exec(MODULE, namespace)
        torch.manual_seed(0)
        model = namespace["Model"](name="b")
        trainer = namespace["trainer"](
            callbacks=[ModelCheckpoint(folder, "last"), EarlyStopping("loss")], default_root_dir=folder
        )
        trainer.fit(model, namespace["loader"]())
        objects = {
            "hparams": AttributeDict(lr=0.1), "parsed": Parsed(width=2), "stage": RunningStage.TRAINING,
            "classes": [pl.Trainer, pl.LightningModule, ModelCheckpoint, pl.callbacks.early_stopping.EarlyStopping],
        }  # fmt: skip
        (folder / "objects.pickle").write_bytes(pickle.dumps(objects))
        torch.save({"hyper_parameters": AttributeDict(lr=0.1), "x": torch.ones(2)}, folder / "plain.pt")
    torch.save(model.layer.weight.detach(), folder / "weight.pt")
    return folder


def under_the_alias(tmp_path, folder, code):
    script = tmp_path / "script.py"
    script.write_text(MODULE + f"\nfolder = {str(folder)!r}\n" + code)
    return output(["-m", "levin", str(script)], without_lightning(tmp_path / "site"))


def test_pickled_objects_and_classes(written, tmp_path):
    code = """
import pickle
import levin
objects = pickle.load(open(folder + "/objects.pickle", "rb"))
assert objects["hparams"].lr == 0.1 and objects["parsed"].width == 2
assert type(objects["hparams"]).__module__ == "levin.utilities.attribute_dict"
assert objects["stage"] is levin.utilities.states.RunningStage.TRAINING
assert objects["classes"][0] is levin.Trainer and objects["classes"][3] is levin.callbacks.EarlyStopping
print("all")
"""
    assert under_the_alias(tmp_path, written, code) == "all\n"


def test_checkpoints_and_hyper_parameters(written, tmp_path):
    code = """
path = folder + "/last.ckpt"
model = Model.load_from_checkpoint(path)
assert model.hparams.name == "b" and model.hparams.width == 4
assert torch.equal(model.layer.weight, torch.load(folder + "/weight.pt"))
plain = torch.load(folder + "/plain.pt", weights_only=False)
assert plain["hyper_parameters"].lr == 0.1
fitter = trainer(max_epochs=2, enable_checkpointing=False)
fitter.fit(Model(), loader(), ckpt_path=path)
print(fitter.current_epoch, fitter.global_step)
"""
    assert under_the_alias(tmp_path, written, code) == "2 8\n"


def test_a_whole_pickled_module(tmp_path):
    """`torch.save(model)` names the module's class and Lightning's, with everything in its `__dict__`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sys
        import types

        module = types.ModuleType("my_models")
        exec(MODULE, module.__dict__)
        sys.modules["my_models"] = module
        try:
            module.Model.__module__ = "my_models"
            model = module.Model(name="c")
            torch.save(model, tmp_path / "model.pt")
        finally:
            del sys.modules["my_models"]
    (tmp_path / "my_models.py").write_text(MODULE)
    code = """
model = torch.load(folder + "/model.pt", weights_only=False)
print(type(model).__module__, model.hparams.name, tuple(model.layer(torch.ones(1, 4)).shape))
trainer(enable_checkpointing=False).fit(model, loader())
print(model.trainer.global_step, model.current_epoch)
"""
    assert under_the_alias(tmp_path, tmp_path, code) == "my_models c (1, 2)\n4 1\n"
