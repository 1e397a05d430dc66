"""What finetuning refuses and says, and how it goes on; its numbers stand beside Lightning's in tests/parity."""

from __future__ import annotations

import pytest
import torch

from levin.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from levin.strategies import SingleDeviceStrategy
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import TrainOnly, loader, trainer


class Net(TrainOnly):
    """A backbone with a batch norm, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))

    def training_step(self, batch, batch_idx):
        return self.layer(self.backbone(torch.cat([batch[0], -2 * batch[0] + batch_idx]))).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.3)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


def fit(folder, callbacks, module=None, ckpt_path=None, **flags):
    module = Net() if module is None else module
    trainer(folder, callbacks, **flags).fit(module, loader(), ckpt_path=ckpt_path)
    return module


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The checkpoint holds states of callbacks")
@pytest.mark.parametrize("tells", [True, False], ids=["its own file", "a file that does not say what was frozen"])
def test_a_resumed_run_trains_what_was_thawed(tmp_path, tells):
    whole = fit(tmp_path, [Thaw(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)])
    file = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert file["callbacks"]["Thaw"].keys() == {"internal_optimizer_metadata", "trainable"}
    if not tells:
        del file["callbacks"]["Thaw"]["trainable"]
        torch.save(file, tmp_path / "epoch=1.ckpt")
    callback = Thaw()
    resumed = fit(tmp_path, [callback], ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert all(parameter.requires_grad for parameter in resumed.parameters())
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    again = fit(tmp_path, [callback], max_epochs=1)
    assert not any(parameter.requires_grad for parameter in again.backbone.parameters()), "a new run begins anew"


@pytest.mark.filterwarnings("ignore:The provided params")
def test_rates_are_told_when_asked_for(tmp_path, caplog):
    callback = BackboneFinetuning(1, lambda epoch: 1.0 + epoch / 10, 1 / 3, verbose=True, rounding=2)
    with caplog.at_level("INFO", "levin"):
        fit(tmp_path, [callback])
        fit(tmp_path, [BackboneFinetuning(1)])
    assert [text for text in caplog.messages if "lr" in text] == [
        "Current lr: 0.3, Backbone lr: 0.1",
        "Current lr: 0.3, Backbone lr: 0.13",
    ]


def test_parameters_that_the_optimizer_has_are_left_out_with_a_warning():
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="already exist within another group"):
        BaseFinetuning.unfreeze_and_add_param_group([first, second], optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    with pytest.warns(UserWarning, match="already exist within another group"):
        BaseFinetuning.unfreeze_and_add_param_group(first, optimizer)
    assert len(optimizer.param_groups) == 2


def test_what_cannot_work_is_refused(tmp_path):
    class DeepSpeedLike(SingleDeviceStrategy):
        pass

    with pytest.raises(NotImplementedError, match="Thaw does not work with DeepSpeed"):
        fit(tmp_path, [Thaw()], strategy=DeepSpeedLike(torch.device("cpu")))
    with pytest.raises(MisconfigurationException, match="received TrainOnly without one"):
        fit(tmp_path, [BackboneFinetuning()], TrainOnly())
    with pytest.raises(NotImplementedError, match="BaseFinetuning must define `freeze_before_training`"):
        fit(tmp_path, [BaseFinetuning()])
