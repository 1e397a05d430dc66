"""The file that a run saves, and which framework reads whose."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.parity import both


def saved(framework, folder, flags):
    module, _ = both.recording_module(framework, [], scheduler="epoch")
    path = str(folder / f"{framework.name}.ckpt")

    class Save(framework.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 2:
                trainer.save_checkpoint(str(folder / f"{framework.name}-mid.ckpt"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = both.quiet(framework, folder, callbacks=[Save()], max_epochs=2, **flags)
        trainer.fit(module, both.loader(), both.loader(2))
        trainer.save_checkpoint(path)
    return [torch.load(p, weights_only=False) for p in (path, path.replace(".ckpt", "-mid.ckpt"))]


@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 2}, {"val_check_interval": 2}])
def test_files_have_the_same_keys_and_counters(tmp_path, flags):
    for ours, theirs in zip(saved(both.levin(), tmp_path, flags), saved(both.lightning(), tmp_path, flags)):
        assert set(ours) - {"levin"} == set(theirs)
        assert ours["loops"] == theirs["loops"]
        for key in ("epoch", "global_step", "lr_schedulers"):
            assert ours[key] == theirs[key]
        assert list(ours["state_dict"]) == list(theirs["state_dict"])


def test_counters_without_any_hook_are_the_same(tmp_path):
    states = []
    for framework in (both.levin(), both.lightning()):

        class Plain(framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch[0]).sum()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        trainer = both.quiet(framework, tmp_path, max_epochs=2)
        trainer.fit(Plain(), both.loader())
        states.append(trainer.fit_loop.state_dict())
    assert states[0] == states[1]
    assert states[0]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["zero_grad"]["total"]["ready"] > 0


@pytest.mark.parametrize(("writer", "reader"), [("levin", "lightning"), ("lightning", "levin")])
def test_either_framework_goes_on_from_the_others_file(tmp_path, writer, reader):
    saved(getattr(both, writer)(), tmp_path, {})
    framework = getattr(both, reader)()
    module, _ = both.recording_module(framework, [], scheduler="epoch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = both.quiet(framework, tmp_path, max_epochs=4)
        trainer.fit(
            module, both.loader(), both.loader(2), ckpt_path=str(tmp_path / f"{writer}.ckpt"), weights_only=False
        )
    assert (trainer.current_epoch, trainer.global_step) == (4, 16)
