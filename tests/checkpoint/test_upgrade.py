"""``levin upgrade`` rewrites old files and keeps what they were."""

from __future__ import annotations

import pytest
import torch

from levin.__main__ import main
from levin.checkpoint import atomic_save, load, upgrade
from levin.checkpoint.layout import COMPATIBLE_VERSION
from tests.callbacks.small import Small, loader
from tests.checkpoint.test_migrate import fitted, newest_layout, of_version
from tests.parity import both

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")


class Own:
    """A class that no list allows."""


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.ckpt"
    atomic_save(of_version(newest_layout(tmp_path / "run"), "1.5"), path)
    return path


def test_a_file_is_rewritten_and_kept(old):
    before = old.read_bytes()
    assert upgrade(old) is True
    assert old.with_name("old.ckpt.bak").read_bytes() == before
    checkpoint = load(old)
    assert checkpoint["pytorch-lightning_version"] == COMPATIBLE_VERSION
    assert checkpoint["legacy_pytorch-lightning_version"] == "1.5.10"
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"] == {"_batches_that_stepped": 8}
    after = old.read_bytes()
    assert upgrade(old) is False
    assert old.read_bytes() == after
    assert old.with_name("old.ckpt.bak").read_bytes() == before


def test_tensors_of_a_device_that_is_gone_are_mapped_where_that_is_asked_for(old, monkeypatch):
    checkpoint = load(old)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(checkpoint, old)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            upgrade(old)
    assert upgrade(old, map_to_cpu=True) is True
    # By torch alone, which leaves every tensor where it was saved from.
    weights = torch.load(old, weights_only=False)["state_dict"].values()
    assert {value.device.type for value in weights} == {"cpu"}


def test_training_goes_on_from_an_upgraded_file(tmp_path, old):
    expected, _ = fitted(tmp_path / "a", 4, old)
    upgrade(old)
    model, run = fitted(tmp_path / "b", 4, old)
    assert run.global_step == 16
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_from_an_upgraded_file(tmp_path, old):
    upgrade(old)
    lightning = both.lightning()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        training_step = Small.training_step
        validation_step = Small.validation_step
        configure_optimizers = Small.configure_optimizers
        values, fail_at = (1.0,), None

    expected, _ = fitted(tmp_path / "a", 4, old)
    module = Module()
    trainer = both.quiet(lightning, tmp_path, max_epochs=4)
    trainer.fit(module, loader(), loader(2), ckpt_path=str(old), weights_only=False)
    assert (trainer.current_epoch, trainer.global_step) == (4, 16)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in module.state_dict().items())


def test_the_command_upgrades_a_folder_to_its_bottom(tmp_path, old, capsys):
    folder = tmp_path / "all"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.ckpt", "deep/b.ckpt", "c.pt"):
        (folder / name).write_bytes(old.read_bytes())
    (folder / "broken.ckpt").write_bytes(b"no checkpoint")
    assert main(["upgrade", str(folder), "--map-to-cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"upgraded  {folder}/a.ckpt"
    assert lines[1].startswith(f"FAILED    {folder}/broken.ckpt: ")
    assert lines[2] == f"upgraded  {folder}/deep/b.ckpt"
    assert len(lines) == 3
    (folder / "broken.ckpt").unlink()
    assert main(["upgrade", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"up to date  {folder}/{name}" for name in ("a.ckpt", "deep/b.ckpt")
    ]
    assert main(["upgrade", str(folder), "-e", ".pt"]) == 0
    assert capsys.readouterr().out == f"upgraded  {folder}/c.pt\n"


def test_classes_of_ones_own_need_an_explicit_word(tmp_path, old, capsys):
    checkpoint = load(old)
    checkpoint["hyper_parameters"] = {"own": Own()}
    atomic_save(checkpoint, old)
    before = old.read_bytes()
    assert main(["upgrade", str(old)]) == 1
    said = capsys.readouterr().out
    assert "refers to tests.checkpoint.test_upgrade.Own, which is not loaded, since that could run code" in said
    assert "use --trust" in said
    assert old.read_bytes() == before
    assert not old.with_name("old.ckpt.bak").exists()
    assert main(["upgrade", str(old), "--trust"]) == 0
    assert type(load(old, weights_only=False)["hyper_parameters"]["own"]) is Own


def test_what_is_no_checkpoint_of_a_trainer_stays_as_it_is(tmp_path, capsys):
    atomic_save({"weight": torch.zeros(1)}, tmp_path / "weights.ckpt")
    assert main(["upgrade", str(tmp_path / "weights.ckpt")]) == 1
    assert "was not saved by a Trainer" in capsys.readouterr().out
    for words in ([str(tmp_path / "gone.ckpt")], [str(tmp_path), "-e", ".none"]):
        with pytest.raises(SystemExit) as caught:
            main(["upgrade", *words])
        assert caught.value.code == 2
