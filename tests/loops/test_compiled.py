"""``Trainer(compile=...)``: the same training, faster, and what it says where it is not."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from levin import Callback, LightningModule, Trainer
from levin.loops.compiled import repeated_blocks, traces_gradients

# Torch reads the .grad of each tensor that a cut function goes on with, and then warns of that.
CUTS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
IS_OLD = Version(torch.__version__) < Version("2.7")
EAGER = {"backend": "aot_eager"}  # all but the code generation


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)])
        self.head = nn.Linear(4, 1)
        self.seen: list[int] = []

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss, "one": 1.0}, on_epoch=True, batch_size=2)
        return {"loss": loss, "size": torch.tensor(float(len(batch[0])))}

    def validation_step(self, batch, batch_idx):
        self.log("val", self(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def data(num=10, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(num, 4, generator=generator)), batch_size=batch_size)


def fit(module=Model, train=None, val=None, ckpt_path=None, **flags):
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = module() if isinstance(module, type) else module
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", devices=1, **{"max_epochs": 2, **quiet, **flags})
    trainer.fit(module, data() if train is None else train, data(4) if val is None else val, ckpt_path=ckpt_path)
    return module, trainer


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_same(first, second):
    (module, trainer), (other, other_trainer) = first, second
    for (name, value), (other_name, other_value) in zip(module.state_dict().items(), other.state_dict().items()):
        assert name == other_name
        torch.testing.assert_close(value, other_value)
    assert trainer.callback_metrics.keys() == other_trainer.callback_metrics.keys()
    for name, value in trainer.callback_metrics.items():
        torch.testing.assert_close(value, other_trainer.callback_metrics[name])


@CUTS
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {}), ({"blocks": True}, {}), ({"fullgraph": True}, {"gradient_clip_val": 0.1}),
        ({}, {"accumulate_grad_batches": 2}), ({}, {"precision": "bf16-mixed"}), ({}, {"precision": "64-true"}),
    ],
)  # fmt: skip
def test_compiled_training_is_the_same_training(options, flags):
    assert_same(fit(compile={**EAGER, **options}, **flags), fit(**flags))


@pytest.mark.skipif(IS_OLD, reason="inductor of torch 2.6 warns of its own settings")
def test_generated_code_trains_the_same_and_a_checkpoint_says_nothing_of_it(tmp_path):
    flags = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    compiled = fit(compile=True, **flags)
    saved = torch.load(compiled[1].checkpoint_callback.best_model_path, weights_only=False)
    assert_same(compiled, fit())
    assert saved["state_dict"].keys() == Model().state_dict().keys()


def test_a_step_that_logs_is_one_graph_with_its_gradients():
    before = torch._dynamo.config.get_config_copy()
    fit(compile=EAGER, val=[], limit_val_batches=0)
    assert graphs() == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.config.get_config_copy() == before


@pytest.mark.skipif(IS_OLD, reason="torch 2.6 compiles each block for itself")
@CUTS
def test_blocks_of_one_kind_are_compiled_once_and_left_as_they_were():
    module, _ = fit(compile={**EAGER, "blocks": True}, val=[], limit_val_batches=0)
    assert graphs() == 2  # one for the first block, whose input needs no gradient, and one for all others
    assert all(block._compiled_call_impl is None for block in module.blocks)
    assert repeated_blocks(module) == list(module.blocks)


@CUTS
def test_an_error_of_a_step_leaves_the_blocks_as_they_were_and_is_raised():
    class Failing(Model):
        def on_train_batch_end(self, *args):
            raise KeyError("mine")

    module = Failing()
    with pytest.raises(KeyError, match="mine"):
        fit(module, compile={**EAGER, "blocks": True})
    assert all(block._compiled_call_impl is None for block in module.blocks)


def test_an_odd_last_batch_runs_as_it_is():
    flags = {"val": [], "limit_val_batches": 0, "train": data(9)}
    assert_same(fit(compile=EAGER, **flags), fit(**flags))
    fit(compile=EAGER, **flags)
    assert graphs() == 1


def test_a_resumed_run_goes_on_exactly(tmp_path):
    class Saving(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 7:
                self.trainer.save_checkpoint(tmp_path / "7.ckpt")

    whole, _ = fit(compile=EAGER)
    fit(Saving, compile=EAGER)
    resumed, _ = fit(compile=EAGER, ckpt_path=tmp_path / "7.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_compiler_that_fails_is_told_of_and_training_goes_on():
    def broken(graph, inputs):
        raise NotImplementedError("no such chip.\n\nor it is off\nand a third line")

    with pytest.warns(
        UserWarning,
        match=r"`training_step` could not be compiled and runs as it is, BackendCompilerFailed: backend='broken' raised: "
        r"NotImplementedError: no such chip\. See TORCH_LOGS=dynamo for more, or leave Trainer\(compile=...\) out\.",
    ):
        compiled = fit(compile={"backend": broken}, val=[], limit_val_batches=0)
    assert_same(compiled, fit(val=[], limit_val_batches=0))


def test_an_error_in_the_users_code_is_not_taken_for_one_of_the_compiler():
    class Wrong(Model):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(Wrong(), compile=EAGER)


def test_a_step_that_is_compiled_again_and_again_is_told_of():
    class Changing(Model):
        number = "0"

        def training_step(self, batch, batch_idx):
            self.number += "0"
            return self(batch[0]).mean() * len(self.number)

    reason = "" if IS_OLD else ", the last time because .*number"  # torch 2.6 gives none
    with pytest.warns(UserWarning, match=f"`training_step` was compiled 6 times{reason}"):
        fit(Changing(), compile=EAGER, val=[], limit_val_batches=0)


@pytest.mark.skipif(IS_OLD, reason="torch 2.6 compiles no gradients, so that these are not spoken of")
@CUTS
def test_parts_and_where_they_are_cut_are_told(caplog):
    class Cut(Model):
        def training_step(self, batch, batch_idx):
            loss = self(batch[0]).mean()
            torch._dynamo.graph_break()
            return loss + self.head(batch[0]).mean()

        def on_train_batch_end(self, *args):
            traced.append(getattr(torch._dynamo.config, "trace_autograd_ops", False))

    before, traced = getattr(torch._dynamo.config, "trace_autograd_ops", False), []
    with caplog.at_level(logging.INFO):
        fit(Cut(), compile=EAGER, val=[], limit_val_batches=0)
    assert set(traced) == {before}, "what only compiled gradients need costs functions that are cut"
    assert (
        "The gradients are not compiled together with `training_step`: Unsupported: Call to `torch._dynamo"
        in caplog.text
    )
    assert "`training_step` was compiled in 2 parts, cut at" in caplog.text


def test_settings_of_torch_are_those_of_before_when_a_run_has_ended():
    class Look(Model):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append({name for name, value in torch._dynamo.config.to_dict().items() if value != before[name]})

        def on_train_end(self):
            if fails:
                raise OSError("the disk is full")

    before = torch._dynamo.config.to_dict()
    for fails in (False, True):
        seen = []
        with pytest.raises(OSError) if fails else nullcontext():
            fit(Look, compile=EAGER, max_epochs=1)
        assert "trace_autograd_ops" in seen[0] or not traces_gradients()
        assert torch._dynamo.config.to_dict() == before


def test_parts_that_are_frozen_and_thawed_between_epochs_train_the_same():
    class Thawing(Model):
        def on_train_epoch_start(self):
            first, *_ = self.children()
            first.requires_grad_(self.current_epoch != 1)

    assert_same(fit(Thawing, compile=EAGER, max_epochs=3), fit(Thawing, max_epochs=3))


@pytest.mark.parametrize("value", ["fast", {"mode": "fast"}, {"backends": "inductor"}, 3, ["default"]])
def test_what_is_no_way_to_compile_is_refused(value):
    with pytest.raises(ValueError, match="compile.*Use True, 'blocks', a mode of torch.compile"):
        Trainer(compile=value)


def test_manual_optimization_and_no_blocks_are_told_apart():
    class Flat(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.blocks = nn.ModuleList()

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self(batch[0]).mean())
            optimizer.step()

    with pytest.warns(UserWarning, match="found no repeated blocks in Flat"):
        fit(Flat(), compile=True, val=[], limit_val_batches=0)


class Logging(LightningModule):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 1)
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss if self.automatic_optimization else None

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def own_steps(module):
    """Compile the steps as a user would in the class."""
    for name in ("training_step", "validation_step"):
        setattr(module, name, torch.compile(getattr(module, name), backend="eager"))
    return module


def test_what_compiled_code_logs_in_a_hook_is_of_its_epoch():
    class Hooked(Logging):
        def __init__(self):
            super().__init__()
            self.note = torch.compile(lambda value: self.log("noted", value * 2), backend="eager")

        def on_train_epoch_end(self):
            self.note(torch.tensor(self.current_epoch + 1.0))

    seen = []

    class Seeing(Callback):
        def on_train_epoch_start(self, trainer, *_):
            seen.append(trainer.callback_metrics.get("noted", torch.tensor(0.0)).item())

        def on_train_end(self, trainer, *_):
            seen.append(trainer.callback_metrics["noted"].item())

    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, callbacks=[Seeing()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Hooked(), *[DataLoader(torch.ones(4, 4)) for _ in range(2)])
    assert seen == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(
    "how", [lambda module: torch.compile(module, backend="eager"), own_steps], ids=["module", "steps"]
)
def test_what_code_logs_that_the_user_compiled_is_there_after_each_step(manual, how):
    def run(compiled):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        seen = []

        class Seeing(Callback):
            def on_train_batch_end(self, trainer, *_):
                seen.append(trainer.callback_metrics["loss"])

        module = Logging(manual)
        loaders = [DataLoader(torch.arange(48.0).reshape(12, 4) / 48, batch_size=1) for _ in range(2)]
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, callbacks=[Seeing()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(how(module) if compiled else module, *loaders)
        return [*seen, trainer.callback_metrics["loss_epoch"], trainer.callback_metrics["val"]]

    expected, found = run(False), run(True)
    assert len(found) == 14
    torch.testing.assert_close(found, expected)
    # Not compiled anew for each of the batches.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
