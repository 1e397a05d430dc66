"""DeepSpeed under the Trainer and Fabric, on two ranks: what comes out is what one device gives."""

from __future__ import annotations

import json
import logging
import os
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from levin import Fabric, Trainer
from levin.callbacks import ModelCheckpoint
from levin.checkpoint import consolidate
from levin.checkpoint.verify import verify
from levin.checkpoint.zero import ZeroEntry, convert_zero_checkpoint_to_fp32_state_dict
from levin.precision import DeepSpeedPrecision
from levin.strategies import DeepSpeedStrategy
from levin.strategies.zero_config import with_precision
from tests.distributed import world_size
from tests.strategies.small import QUIET, dataset
from tests.strategies.test_fsdp import Deep, alone

deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed; `make test-deepspeed` installs it")
# DeepSpeed would compile an extension for collectives on the CPU, which takes minutes and needs a compiler.
deepspeed.ops.__compatible_ops__.clear()
pytestmark = pytest.mark.deepspeed


def sgd(batch_size: int) -> Deep:
    return Deep(batch_size, optimizer=torch.optim.SGD)


def in_rank(strategy="deepspeed", **settings):
    return Trainer(
        strategy=strategy, **{"max_epochs": 2, "enable_checkpointing": False, "devices": 2, **QUIET, **settings}
    )


def full_weights(module, stage: int) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[name] = parameter.detach().clone()
    return found


def weights(module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@world_size(2, connect=False, timeout_s=200)
def test_two_processes_are_one_device(stage):
    for settings in (
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        # The last window of an epoch is a short one.
        {"accumulate_grad_batches": 2, "limit_train_batches": 3},
    ):
        size = 24 if "limit_train_batches" in settings else 16
        module, reference = sgd(4), sgd(8)
        module.size = reference.size = size
        trainer = in_rank(DeepSpeedStrategy(zero_optimization=stage > 0, stage=stage or 2), **settings)
        trainer.fit(module)
        assert trainer.strategy.engine.zero_optimization_stage() == stage
        alone(**settings).fit(reference)
        torch.testing.assert_close(module.losses, reference.losses)
        torch.testing.assert_close(full_weights(module, stage), weights(reference))


class Weighted(Deep):
    """Losses averaged by a weight, which is not the same in the batches of a window."""

    def training_step(self, batch, batch_idx):
        return {"loss": self.net(batch[0]).pow(2).mean(), "weight": 1 + batch_idx % 2}


@pytest.mark.parametrize("stage", [1, 2, 3])
@world_size(2, connect=False, timeout_s=120)
def test_weighted_windows(stage):
    module, reference = Weighted(4, optimizer=torch.optim.SGD), Weighted(8, optimizer=torch.optim.SGD)
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    in_rank(DeepSpeedStrategy(stage=stage), **settings).fit(module)
    alone(**settings).fit(reference)
    torch.testing.assert_close(full_weights(module, stage), weights(reference))


class Drops(Deep):
    """Ends its first epoch inside of an accumulation window."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


@pytest.mark.parametrize("stage", [1, 2, 3])
@world_size(2, connect=False, timeout_s=120)
def test_a_window_that_the_user_ended_leaves_nothing_behind(stage):
    module, reference = Drops(2, optimizer=torch.optim.SGD), Drops(4, optimizer=torch.optim.SGD)
    in_rank(DeepSpeedStrategy(stage=stage), accumulate_grad_batches=2).fit(module)
    alone(accumulate_grad_batches=2).fit(reference)
    torch.testing.assert_close(full_weights(module, stage), weights(reference))


class Manual(Deep):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, optimizer=torch.optim.SGD)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            for scale in (0.5, 1.0):
                loss = self.net(batch[0]).pow(2).mean()
                self.manual_backward(scale * loss)
            optimizer.step()
        return loss.detach()


@pytest.mark.parametrize("stage", [1, 2, 3])
@world_size(2, connect=False, timeout_s=120)
def test_manual_optimization(stage):
    module, reference = Manual(4), Manual(8)
    in_rank(DeepSpeedStrategy(stage=stage)).fit(module)
    alone().fit(reference)
    torch.testing.assert_close(full_weights(module, stage), weights(reference))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@world_size(2, connect=False, timeout_s=200)
def test_a_run_goes_on_from_its_folder_as_if_it_had_not_ended(tmp_path, stage):
    strategy = {"zero_optimization": stage > 0, "stage": stage or 2}
    unbroken = Deep(4)

    def trained(module, **settings):
        saves = ModelCheckpoint(dirpath=tmp_path, filename="middle", every_n_train_steps=3)
        in_rank(DeepSpeedStrategy(**strategy), callbacks=[saves], enable_checkpointing=True).fit(module, **settings)

    trained(unbroken)
    resumed = Deep(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        trained(resumed, ckpt_path=tmp_path / "middle.ckpt")
    # The callback saves before the module's own hook of that batch, which the resumed run then calls.
    assert resumed.losses == unbroken.losses[2:]
    assert all(map(torch.equal, full_weights(resumed, stage).values(), full_weights(unbroken, stage).values()))
    module = Deep(4)
    trainer = in_rank(DeepSpeedStrategy(**strategy), max_steps=3)
    trainer.fit(module)
    path = str(tmp_path / "saved.ckpt")
    trainer.save_checkpoint(path)
    assert (
        os.path.isfile(f"{path}/meta.pt") and os.path.isfile(f"{path}/latest") and os.path.isdir(f"{path}/checkpoint")
    )
    verify(path)
    # Evaluation takes the weights alone, and so does any other strategy.
    expected = alone(logger=False).validate(sgd(8), verbose=False, ckpt_path=path)
    (ours,) = in_rank(DeepSpeedStrategy(**strategy)).validate(sgd(4), verbose=False, ckpt_path=path)
    assert ours["val_loss"] == pytest.approx(expected[0]["val_loss"])
    tree = consolidate(path)
    assert list(tree["state_dict"]) == list(weights(module)) and tree["global_step"] == 3
    torch.testing.assert_close(tree["state_dict"], full_weights(module, stage))
    rank = os.environ["RANK"]
    convert_zero_checkpoint_to_fp32_state_dict(path, f"{path}-{rank}")
    loaded = Deep.load_from_checkpoint(f"{path}-{rank}")
    torch.testing.assert_close(weights(loaded), dict(tree["state_dict"]))


@pytest.mark.parametrize("stage", [2, 3])
@world_size(2, connect=False, timeout_s=120)
def test_the_weights_of_one_device_are_loaded(tmp_path, stage):
    reference = sgd(8)
    trainer = alone(max_epochs=1)
    trainer.fit(reference)
    path = str(tmp_path / f"{os.environ['RANK']}.ckpt")
    trainer.save_checkpoint(path)
    (theirs,) = trainer.validate(reference, verbose=False)
    (ours,) = in_rank(DeepSpeedStrategy(stage=stage)).validate(sgd(4), ckpt_path=path, verbose=False)
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"])
    with pytest.raises(ValueError, match="goes on from folders that DeepSpeed wrote"):
        in_rank(DeepSpeedStrategy(stage=stage)).fit(sgd(4), ckpt_path=path)


@world_size(2, connect=False, timeout_s=120)
def test_a_folder_that_lacks_a_rank_or_is_of_more_ranks_is_refused(tmp_path):
    trainer = in_rank(max_epochs=1)
    trainer.fit(sgd(4))
    path = str(tmp_path / "saved.ckpt")
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"written by 3 processes.*there are 2"):
        trainer.strategy.load_module_state(trainer.strategy.model, ZeroEntry(path, 3))
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        (second,) = (tmp_path / "saved.ckpt" / "checkpoint").glob("*pp_rank_1_*optim*")
        second.unlink()
    trainer.strategy.barrier()
    with pytest.raises(ValueError, match="holds the files of 1"):
        in_rank().fit(sgd(4), ckpt_path=path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@world_size(2, connect=False, timeout_s=120)
def test_sixteen_bits(precision):
    module, reference = sgd(4), sgd(8)
    in_rank("deepspeed_stage_2", precision=precision).fit(module)
    alone(precision=precision).fit(reference)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(module.losses, reference.losses, rtol=0.05, atol=0.05)


class Made(Deep):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, optimizer=torch.optim.SGD)
        self.made = self.net
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            torch.manual_seed(1)
            self.net = type(self.made)()
            del self.made


@world_size(2, connect=False, timeout_s=120)
def test_layers_of_configure_model_are_cut_as_they_are_made():
    module, reference = Made(4), Made(8)
    sizes = []
    module.on_fit_start = lambda: sizes.append({parameter.numel() for parameter in module.parameters()})
    in_rank("deepspeed_stage_3").fit(module)
    alone().fit(reference)
    assert sizes == [{0}]
    torch.testing.assert_close(module.losses, reference.losses)


@pytest.mark.parametrize("name", ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"])
@world_size(2, connect=False, timeout_s=120)
def test_offload(name):
    module, reference = sgd(4), sgd(8)
    trainer = in_rank(name)
    trainer.fit(module)
    engine = trainer.strategy.engine
    assert engine.zero_cpu_offload()
    assert (getattr(engine.zero_offload_param(), "device", None) == "cpu") == ("stage_3" in name)
    alone().fit(reference)
    torch.testing.assert_close(module.losses, reference.losses)


def recomputing() -> Deep:
    """Return a module whose blocks are computed again by DeepSpeed."""
    module = sgd(4)
    for block in module.net.blocks:
        block.forward = partial(deepspeed.checkpointing.checkpoint, block.forward)
    return module


@world_size(1, connect=False, timeout_s=120)
def test_activations_that_are_computed_again_are_kept_as_the_arguments_say():
    module, reference = recomputing(), sgd(4)
    strategy = DeepSpeedStrategy(synchronize_checkpoint_boundary=True)
    in_rank(strategy, devices=1).fit(module)
    kept = deepspeed.checkpointing
    assert (kept.SYNCHRONIZE, kept.CPU_CHECKPOINT, kept.PARTITION_ACTIVATIONS) == (True, False, False)
    alone().fit(reference)
    torch.testing.assert_close(module.losses, reference.losses)


class Frozen(Deep):
    """Its first layer does not learn."""

    def __init__(self, strict: bool = True) -> None:
        super().__init__(4, optimizer=torch.optim.SGD)
        self.net.embed.requires_grad_(False)
        self.strict_loading = strict

    def configure_optimizers(self):
        return torch.optim.SGD([weight for weight in self.parameters() if weight.requires_grad], lr=0.05)


@pytest.mark.parametrize("stage", [2, 3])
@world_size(1, connect=False, timeout_s=120)
def test_frozen_weights_are_left_out_of_a_checkpoint_where_the_user_says_so(tmp_path, stage):
    for leaves_out in (False, True):

        def new(**settings):
            strategy = DeepSpeedStrategy(stage=stage, exclude_frozen_parameters=leaves_out)
            return in_rank(strategy, devices=1, **{"max_epochs": 1, **settings})

        path = tmp_path / f"{leaves_out}.ckpt"
        module = Frozen()
        trainer = new()
        trainer.fit(module)
        trainer.save_checkpoint(path)
        expected = [name for name, _ in module.named_parameters() if not (leaves_out and "embed" in name)]
        assert sorted(consolidate(path)["state_dict"]) == sorted(expected)
    with pytest.raises(RuntimeError, match="embed"):
        new(max_epochs=2).fit(Frozen(), ckpt_path=path)
    resumed = Frozen(strict=False)
    new(max_epochs=2).fit(resumed, ckpt_path=path)
    assert len(resumed.losses) == 4


@world_size(2, connect=False, timeout_s=120)
def test_an_optimizer_of_the_configuration_takes_the_place_of_that_of_the_module():
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 1}}
    config["zero_allow_untested_optimizer"] = True
    module, reference = sgd(4), sgd(8)
    reference.configure_optimizers = lambda: torch.optim.SGD(reference.parameters(), lr=0.01)
    in_rank(DeepSpeedStrategy(config=config)).fit(module)
    alone().fit(reference)
    torch.testing.assert_close(module.losses, reference.losses)


@world_size(2, connect=False, timeout_s=120)
def test_under_fabric(tmp_path):
    def losses(fabric, batch_size: int) -> list[float]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        data = dataset().tensors[0]
        mine = data[fabric.global_rank :: fabric.world_size]
        found = []
        for start in range(0, len(mine), batch_size):
            with fabric.no_backward_sync(model, enabled=start % (2 * batch_size) == 0):
                loss = model(mine[start : start + batch_size]).pow(2).mean() / 2
                fabric.backward(loss)
            if start % (2 * batch_size) != 0:
                fabric.clip_gradients(model, optimizer, max_norm=0.1)
                optimizer.step()
                optimizer.zero_grad()
            found.append(float(fabric.all_reduce(loss)))
        return found

    fabric = Fabric(accelerator="cpu", strategy="deepspeed", devices=2)
    fabric.launch()
    ours = losses(fabric, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(ours, losses(Fabric(accelerator="cpu", devices=1), 8))


class Twice(Deep):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.automatic_optimization = False

    def configure_optimizers(self):
        half = list(self.parameters())
        return [torch.optim.SGD(half[:2], lr=0.1), torch.optim.SGD(half[2:], lr=0.1)]


@world_size(2, connect=False, timeout_s=120)
def test_what_deepspeed_cannot_do_is_refused():
    for settings, module, message in (
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, sgd(4), "clips by the 2-norm alone"),
        ({}, Twice(4), "one module by one optimizer"),
    ):
        with pytest.raises(ValueError, match=message):
            in_rank(**settings).fit(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 4}, "stage must be 1, 2 or 3, received 4"),
        ({"stage": 2, "offload_parameters": True}, "needs stage=3"),
        ({"config": "nowhere.json"}, "can be read, received 'nowhere.json'"),
        ({"config": 3}, "must be a dict or the path"),
        ({"config": {"gradient_accumulation_steps": 2}}, "accumulate_grad_batches"),
        ({"config": {"bf16": {"enabled": True}}}, "precision='bf16-mixed'"),
    ],
)
def test_arguments_that_cannot_be_met(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeedStrategy(**arguments)


@pytest.mark.parametrize("precision", ["64-true", "16-mixed"])
def test_number_formats_that_deepspeed_lacks_on_the_cpu(precision):
    with pytest.raises(ValueError, match=f"received '{precision}'|precision='{precision}'"):
        in_rank(precision=precision)


def test_the_configuration_says_what_the_arguments_say():
    strategy = DeepSpeedStrategy(
        stage=3, offload_optimizer=True, offload_parameters=True, offload_optimizer_device="nvme", nvme_path="/fast",
        offload_params_device="nvme", params_buffer_count=6, params_buffer_size=7, max_in_cpu=8, pin_memory=True,
        optimizer_buffer_count=9, block_size=10, queue_depth=11, single_submit=True, overlap_events=False, thread_count=12,
        sub_group_size=13, contiguous_gradients=False, overlap_comm=False, allgather_partitions=False, reduce_scatter=False,
        allgather_bucket_size=14, reduce_bucket_size=15, zero_allow_untested_optimizer=False, logging_batch_size_per_gpu=16,
        logging_level=logging.ERROR,
    )  # fmt: skip
    disk = {"device": "nvme", "nvme_path": "/fast", "pin_memory": True}
    assert strategy.config == {
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 16,
        "aio": {"block_size": 10, "queue_depth": 11, "single_submit": True, "overlap_events": False, "thread_count": 12},
        "zero_optimization": {
            "stage": 3, "sub_group_size": 13, "contiguous_gradients": False, "overlap_comm": False,
            "allgather_partitions": False, "reduce_scatter": False, "allgather_bucket_size": 14, "reduce_bucket_size": 15,
            "offload_optimizer": {"buffer_count": 9, **disk},
            "offload_param": {"buffer_count": 6, "buffer_size": 7, "max_in_cpu": 8, **disk},
        },
    }  # fmt: skip


def test_layers_are_made_where_and_as_the_run_says(monkeypatch):
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(deepspeed.zero, "Init", lambda **settings: asked.append(settings) or nullcontext())
    for settings in ({"offload_parameters": True}, {"offload_parameters": True, "remote_device": "nvme"}, {}):
        strategy = DeepSpeedStrategy(stage=3, precision=DeepSpeedPrecision("bf16-true"), **settings)
        with strategy.model_sharded_context():
            pass
    assert [settings["remote_device"] for settings in asked] == ["cpu", "nvme", None]
    assert {settings["dtype"] for settings in asked} == {torch.bfloat16}
    assert all(settings["config_dict_or_path"]["bf16"]["enabled"] for settings in asked)


def test_the_loss_scale_is_that_of_the_arguments():
    scaling = {"loss_scale": 2, "initial_scale_power": 3, "loss_scale_window": 4, "hysteresis": 5, "min_loss_scale": 6}
    strategy = DeepSpeedStrategy(**scaling)
    assert with_precision(strategy.config, "16-mixed", strategy._loss_scaling)["fp16"] == {**scaling, "enabled": True}


def test_the_configuration_comes_from_a_file_that_a_variable_names(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(tmp_path / "ds.json"))
    assert DeepSpeedStrategy().stage == 3


def test_no_other_checkpoint_io(tmp_path):
    from levin.checkpoint import AsyncCheckpointIO

    with pytest.raises(ValueError, match="writes its checkpoints itself"):
        in_rank(plugins=[AsyncCheckpointIO()]).strategy.setup_environment()
