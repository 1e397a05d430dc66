"""FSDP2 under the Trainer, on two ranks: what comes out is what one device gives."""

from __future__ import annotations

import os
import warnings
import weakref
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from levin import Fabric, Trainer
from levin.callbacks import ModelCheckpoint, ModelPruning, StochasticWeightAveraging, WeightAveraging
from levin.checkpoint import TorchCheckpointIO, consolidate
from levin.strategies import DDPStrategy, ModelParallelStrategy
from levin.strategies.fsdp import FSDPStrategy
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.numbers import to_numbers
from levin.utilities.parameters import grad_norm
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.small import QUIET, Small, WithLosses, dataset, ordered_loader

pytestmark = cuts_on_cpu


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.layer(self.norm(x)))


class Net(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Deep(WithLosses):
    def __init__(self, batch_size: int = 4, size: int = 16, optimizer: type = torch.optim.AdamW) -> None:
        super().__init__()
        self.batch_size, self.size, self.optimizer = batch_size, size, optimizer
        torch.manual_seed(1)
        self.net = Net()

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).pow(2).mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return ordered_loader(self)

    def val_dataloader(self):
        return DataLoader(dataset(), batch_size=self.batch_size)


def in_rank(strategy: FSDPStrategy | None = None, **settings):
    options = {"max_epochs": 2, "enable_checkpointing": False, **QUIET, **settings}
    return Trainer(strategy=strategy or FSDPStrategy(), devices=2, **options)


def alone(**settings):
    return Trainer(devices=1, **{"max_epochs": 2, "enable_checkpointing": False, **QUIET, **settings})


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=["plain", "accumulated", "clipped by norm", "clipped by value"],
)
@world_size(2, connect=False)
def test_two_processes_are_one_device(settings):
    module, reference = Deep(4), Deep(8)
    reduced: list[bool] = []
    module.on_after_backward = lambda: reduced.append(module.net.head.weight.grad is not None)
    in_rank(**settings).fit(module)
    assert reduced == ([False, True, False, True] if "accumulate_grad_batches" in settings else [True] * 4)
    assert isinstance(module.net.blocks[0], FSDPModule) and not isinstance(module.net.head, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    alone(**settings).fit(reference)
    torch.testing.assert_close(module.losses, reference.losses)
    torch.testing.assert_close(whole(module), whole(reference))


class Adversaries(Deep):
    """Manual optimization: two optimizers, several forwards and backward passes in a step, some through the root."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for _ in range(2):
            loss = (self.net(batch[0]) - self.critic(batch[0])).pow(2).mean()
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
        loss = (self.net(batch[0]).detach() + self.critic(batch[0])).pow(2).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        return loss.detach()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.critic.parameters(), lr=0.1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


@world_size(2, connect=False)
def test_manual_optimization():
    module, reference = Adversaries(4), Adversaries(8)
    in_rank().fit(module)
    alone().fit(reference)
    torch.testing.assert_close(whole(module), whole(reference))


class OnMeta(Deep):
    """Makes its layers in `configure_model`, two of them with one weight."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            torch.manual_seed(1)
            self.net = Net()
            self.net.blocks[2].layer.weight = self.net.blocks[1].layer.weight


@world_size(2, connect=False)
def test_a_module_made_on_the_meta_device_has_the_weights_of_one_made_whole():
    module, reference = OnMeta(4), OnMeta(8)
    trainer = in_rank()
    seen = []
    module.on_fit_start = lambda: seen.append(whole(module))
    trainer.fit(module)
    reference.on_fit_start = lambda: seen.append({k: v.clone() for k, v in whole(reference).items()})
    alone().fit(reference)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(whole(module), whole(reference))


@world_size(2, connect=False)
def test_a_module_made_on_the_meta_device_is_whole_in_no_process():
    class Watched(OnMeta):
        def configure_model(self):
            super().configure_model()
            nn.Linear.reset_parameters = noting  # from here on

    made: list[weakref.ref[nn.Parameter]] = []
    whole_ones: list[int] = []
    reset = nn.Linear.reset_parameters

    def noting(layer):
        reset(layer)
        made.append(weakref.ref(layer.weight))
        alive = [weight() for weight in made]
        whole_ones.append(sum(weight is not None and weight.untyped_storage().nbytes() > 0 for weight in alive))

    with mock.patch.object(nn.Linear, "reset_parameters", reset):
        in_rank(max_epochs=1, limit_train_batches=0).fit(Watched(4))
    # The first block was cut before the second was made. The other two have one weight, and go with what is around them.
    assert whole_ones == [1, 2, 2, 3, 3]


class OnMetaOfOwnNumbers(OnMeta):
    """What its layers begin with is drawn by each rank for itself."""

    def configure_model(self):
        with torch.device("meta"):
            super().configure_model()
        torch.manual_seed(100 + self.global_rank)


@pytest.mark.parametrize("way", ["fsdp", "copies", "layers"])
@world_size(2, connect=False)
def test_layers_made_in_configure_model_begin_alike(way):
    strategy = {
        "fsdp": FSDPStrategy(device_mesh=(2, 1)),
        "copies": ModelParallelStrategy(2, 1, copies=2),
        "layers": ModelParallelStrategy(1, 2, plan={"net.embed": "column", "net.head": "row"}),
    }[way]
    module = OnMetaOfOwnNumbers(4)
    module.first = nn.Linear(4, 4)
    torch.nn.init.constant_(module.first.weight, int(os.environ["RANK"]))
    trainer = in_rank(strategy, max_epochs=1, limit_train_batches=0)
    trainer.fit(module)
    for name, value in whole(module).items():
        first, second = trainer.strategy.all_gather(value)
        assert torch.equal(first, second), name
    assert module.net.blocks[0].layer.weight.std() > 0 == module.first.weight.std()


@world_size(2, connect=False)
def test_evaluation_and_prediction():
    module, reference = Deep(4), Deep(4)
    (ours,) = in_rank().validate(module, verbose=False)
    (theirs,) = alone().validate(reference, verbose=False)
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"])
    found = in_rank().predict(module, DataLoader(dataset(), batch_size=4))
    expected = alone().predict(reference, DataLoader(dataset(), batch_size=4))
    rank = int(os.environ["RANK"])
    torch.testing.assert_close(
        torch.cat(found), torch.cat(expected)[rank::2] if len(found) == 2 else torch.cat(expected)
    )


def saved(folder, name: str, make, **settings):
    module = Deep(settings.pop("batch_size"))
    trainer = make(max_epochs=1, **settings)
    trainer.fit(module)
    path = str(folder / name)
    trainer.save_checkpoint(path)
    return module, path


def go_on(path: str, make, **settings):
    module = Deep(settings.pop("batch_size"))
    make(max_epochs=2, **settings).fit(module, ckpt_path=path)
    return module


@pytest.mark.parametrize("writer", ["fsdp", "one device"])
@pytest.mark.parametrize("reader", ["fsdp", "ddp", "one device"])
@world_size(2, connect=False)
def test_a_full_checkpoint_goes_on_under_any_strategy(tmp_path, writer, reader):
    ways = {
        "fsdp": (in_rank, {"batch_size": 4}),
        "ddp": (in_rank, {"batch_size": 4, "strategy": "ddp"}),
        "one device": (alone, {"batch_size": 8}),
    }
    unbroken = Deep(8)
    alone().fit(unbroken)
    rank = os.environ["RANK"]
    make, settings = ways[writer]
    _, path = saved(tmp_path, "one.ckpt" if writer == "fsdp" else f"{rank}.ckpt", make, **settings)
    if writer == "fsdp":  # as on one device
        (state,) = torch.load(path, weights_only=False)["optimizer_states"]
        assert (
            sorted(state["state"]) == state["param_groups"][0]["params"] == list(range(len([*unbroken.parameters()])))
        )
    make, settings = ways[reader]
    with warnings.catch_warnings():
        # One device and two processes do not draw the same random numbers, which levin says.
        warnings.filterwarnings("ignore", "The checkpoint was saved by")
        module = go_on(path, make, **settings)
    torch.testing.assert_close(whole(module), whole(unbroken))


class Frozen(Deep):
    """The embedding and the first block do not learn, and the head's weight is that of the embedding."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, optimizer=torch.optim.SGD)
        self.net.embed.requires_grad_(False)
        self.net.blocks[0].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Tied(Deep):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.net.blocks[2].layer.weight = self.net.blocks[1].layer.weight


@pytest.mark.parametrize("kind", [Frozen, Tied])
@world_size(2, connect=False)
def test_frozen_and_shared_parameters(kind):
    module, reference = kind(4), kind(8)
    in_rank().fit(module)
    alone().fit(reference)
    torch.testing.assert_close(whole(module), whole(reference))
    assert len(list(module.parameters())) == len(list(reference.parameters()))


class Thawing(Deep):
    """Two parts are frozen in the first epoch; in the second they learn, and another one does not."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.norms: list[list[float]] = []
        self.frozen = nn.ModuleList([self.net.embed, self.net.blocks[0]]).requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:  # there was a validation before
            self.frozen.requires_grad_(True)
            self.net.blocks[1].requires_grad_(False)
            self.optimizers().add_param_group({"params": list(self.frozen.parameters())})
            with torch.no_grad():
                self.net.head.weight.mul_(0.9)

    def on_before_optimizer_step(self, optimizer):
        norms = grad_norm(self.net, 2)
        assert ("grad_2.0_norm/embed.weight" in norms) == (self.current_epoch > 0)
        self.norms.append([float(norm) for norm in norms.values()][-3:])


@world_size(2, connect=False)
def test_what_is_thawed_and_changed_between_epochs_is_as_on_one_device():
    module, reference = Thawing(4), Thawing(8)
    in_rank().fit(module)
    alone().fit(reference)
    torch.testing.assert_close(torch.tensor(module.norms), torch.tensor(reference.norms))
    torch.testing.assert_close(whole(module), whole(reference))


class Looking(Deep):
    """Calls itself in hooks: between backward and the optimizer's step, and before it changes weights after a validation."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self(batch[0])
        # In a step, what was gathered for it stays so.
        return super().training_step(batch, batch_idx) + self.net.head.weight.pow(2).sum()

    def look(self):
        self.seen.append(self(dataset(4)[:][0]).detach())

    def on_after_backward(self):
        self.look()

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.look()
            self.net.head.weight.mul_(0.9)


@world_size(2, connect=False)
def test_what_hooks_compute_with_the_module_is_that_of_one_device_and_leaves_nothing():
    module, reference = Looking(4), Looking(8)
    in_rank().fit(module)
    alone().fit(reference)
    torch.testing.assert_close(module.seen, reference.seen)
    torch.testing.assert_close(whole(module), whole(reference))


class Penalized(Deep):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + sum(p.pow(2).sum() for p in self.parameters())


@world_size(2, connect=False)
def test_weights_that_meet_parts_of_others_are_told():
    warnings.filterwarnings("ignore", "Found a non-scalar tensor")
    with pytest.raises(RuntimeError, match=r"For a penalty on all weights use the optimizer's weight_decay"):
        in_rank().fit(Penalized(4))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@world_size(2, connect=False)
def test_precisions_train_as_on_one_device(precision):
    module, reference = Deep(4), Deep(8)
    in_rank(precision=precision).fit(module)
    alone(precision=precision).fit(reference)
    tolerance = 1e-9 if precision == "64-true" else 0.05
    torch.testing.assert_close(module.losses, reference.losses, rtol=tolerance, atol=tolerance)
    formats = {parameter.dtype for parameter in module.parameters()}
    assert formats == {{"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)}


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


@pytest.mark.parametrize("way", ["classes", "function", "recomputed", "hybrid", "offloaded", "formats"])
@world_size(2, connect=False)
def test_ways_of_cutting(way):
    module, reference = Deep(4), Deep(8)
    for one in (module, reference):
        one.net.head.bias.requires_grad_(False)
    arguments = {
        "classes": {"auto_wrap_policy": {Block}, "sharding_strategy": "HYBRID_SHARD"},
        "function": {"auto_wrap_policy": is_norm, "ignored_states": [module.net.head.bias]},
        "recomputed": {"sharding_strategy": "SHARD_GRAD_OP", "activation_checkpointing_policy": {Block}},
        "hybrid": {"device_mesh": (2, 1)},
        "offloaded": {"cpu_offload": True, "use_orig_params": True, "limit_all_gathers": True},
        "formats": {"mixed_precision": MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)},
    }[way]
    found: list[tuple[bool, torch.dtype]] = []

    def look(loss):
        found.append((isinstance(inner.layer.weight, DTensor), module.net.head.weight.dtype))

    module.on_before_backward = look
    inner = module.net.blocks[0]
    trainer = in_rank(FSDPStrategy(**arguments))
    trainer.fit(module)
    alone().fit(reference)
    close = {"rtol": 1e-6, "atol": 1e-6} if way == "formats" else {}
    torch.testing.assert_close(module.losses, reference.losses, **close)
    block = module.net.blocks[0]
    assert isinstance(block, FSDPModule) == (way != "function")
    assert isinstance(inner.norm, FSDPModule) == (way == "function")
    assert isinstance(module.net.head.bias, DTensor) == (way != "function")
    # Between forward and backward blocks have let go of what they gathered, or not; the function cuts no blocks.
    is_part = way not in ("recomputed", "function")
    assert set(found) == {(is_part, torch.float64 if way == "formats" else torch.float32)}
    assert list(module.state_dict()) == list(reference.state_dict())
    shape = {"hybrid": (2, 1), "classes": (1, 2)}.get(way, (2,))
    assert tuple(trainer.strategy.device_mesh.shape) == shape


class Counting(Deep):
    """Counts the bytes that autograd keeps for backward."""

    def __init__(self) -> None:
        super().__init__(4)
        self.net = Net(depth=8)
        self.num_bytes = 0

    def training_step(self, batch, batch_idx):
        def keep(tensor):
            self.num_bytes += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return super().training_step(batch, batch_idx)


@world_size(2, connect=False)
def test_a_budget_of_activations_is_kept_to():
    def run(budget):
        module = Counting()
        in_rank(FSDPStrategy(activation_checkpointing=budget), max_epochs=1).fit(module)
        return module

    runs = {budget: run(budget) for budget in (None, 1, 0.5, 0.2, 0, "full", "none")}
    every, none = runs[None].num_bytes, runs[0].num_bytes
    assert (runs["full"].num_bytes, runs["none"].num_bytes) == (none, every)
    assert runs[1].num_bytes == every > none > 0
    # Of eight blocks four, and one: two would be more than a fifth.
    assert runs[0.5].num_bytes - none == (every - none) / 2
    assert runs[0.2].num_bytes - none == (every - none) / 8
    assert [type(block).__name__ for block in runs[0.5].net.blocks] == ["FSDPCheckpointWrapper", "FSDPBlock"] * 4
    for module in runs.values():
        assert list(module.state_dict()) == list(runs[None].state_dict())
        found, expected = (list(whole(run).values()) for run in (module, runs[None]))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@world_size(2, connect=False)
def test_a_budget_for_a_module_without_blocks_is_an_error():
    with pytest.raises(ValueError, match=r"activation_checkpointing=0\.5 .* Small has no repeated ones"):
        in_rank(FSDPStrategy(activation_checkpointing=0.5)).fit(Small())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharding_strategy": "NO_SHARD"}, "strategy='ddp'"),
        ({"sharding_strategy": "HALF"}, "must be one of FULL_SHARD"),
        ({"state_dict_type": "local"}, "'full' or 'sharded'"),
        ({"use_orig_params": False}, "Leave it out"),
        ({"ignored_modules": []}, "ignored_states"),
        ({"nonsense": 1}, "cannot do nonsense=1"),
        ({"mp_policy": MixedPrecisionPolicy()}, "cannot do mp_policy=.* Give it as mixed_precision"),
        ({"reshard_after_forward": False}, "'SHARD_GRAD_OP' is False"),
        ({"mixed_precision": "bf16"}, "MixedPrecisionPolicy"),
        ({"activation_checkpointing": nn.Linear, "activation_checkpointing_policy": {nn.Linear}}, "same argument"),
        ({"activation_checkpointing": 1.5}, r"from 0 to 1.* received 1\.5"),
        ({"activation_checkpointing": float("nan")}, "received nan"),
        ({"activation_checkpointing_policy": True}, "received True"),
        ({"activation_checkpointing": "fully"}, "must be 'none', 'selective', 'full', .* received 'fully'"),
    ],
)
def test_arguments_that_cannot_be_met(arguments, message):
    with pytest.raises(ValueError, match=message):
        FSDPStrategy(**arguments)


def test_a_mesh_that_does_not_fit_is_refused_before_a_process_starts():
    with pytest.raises(ValueError, match=r"made for 6 processes, but there are 2"):
        in_rank(FSDPStrategy(device_mesh=(2, 3)))


@world_size(2, connect=False)
def test_a_policy_that_chooses_nothing_names_the_classes_there_are():
    with pytest.raises(ValueError, match="has Block, LayerNorm, Linear, ModuleList, Net"):
        in_rank(FSDPStrategy(auto_wrap_policy={nn.Conv2d})).fit(Deep(4))


@pytest.mark.parametrize("reader", ["sharded", "full", "ddp", "one device"])
@world_size(2, connect=False)
def test_a_folder_goes_on_under_any_strategy(tmp_path, reader):
    unbroken = Deep(8)
    alone().fit(unbroken)
    module = Deep(4)
    trainer = in_rank(FSDPStrategy(state_dict_type="sharded"), max_epochs=1)
    trainer.fit(module)
    path = str(tmp_path / "saved.ckpt")
    trainer.save_checkpoint(path)
    assert {"meta.pt", ".metadata", "__0_0.distcp", "__1_0.distcp"} <= set(os.listdir(path))
    assert not os.path.exists(f"{path}.part")
    make, settings = {
        "sharded": (in_rank, {"batch_size": 4, "strategy": FSDPStrategy(state_dict_type="sharded")}),
        "full": (in_rank, {"batch_size": 4}),
        "ddp": (in_rank, {"batch_size": 4, "strategy": "ddp"}),
        "one device": (alone, {"batch_size": 8}),
    }[reader]
    # A rank of FSDP reads its parts alone.
    never = mock.patch("levin.checkpoint.folder.consolidate", side_effect=AssertionError("The folder was read whole."))
    with warnings.catch_warnings(), never if reader in ("sharded", "full") else nullcontext():
        warnings.filterwarnings("ignore", "The checkpoint was saved by")
        module = go_on(path, make, **settings)
    torch.testing.assert_close(whole(module), whole(unbroken))


@world_size(2, connect=False)
def test_what_writes_files_of_one_process_writes_no_folders():
    trainer = in_rank(FSDPStrategy(state_dict_type="sharded"), plugins=[TorchCheckpointIO()])
    with pytest.raises(
        ValueError, match="TorchCheckpointIO writes checkpoints of one process, and FSDPStrategy is to save"
    ):
        trainer.fit(Deep(4))


@pytest.mark.parametrize("async_save", [False, True])
@world_size(2, connect=False)
def test_model_checkpoint_keeps_the_best_folders(tmp_path, async_save):
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1, filename="{epoch}", async_save=async_save)
    module = Deep(4)
    trainer = in_rank(
        FSDPStrategy(state_dict_type="sharded"), max_epochs=3, callbacks=[callback], enable_checkpointing=True
    )
    trainer.fit(module)
    trainer.strategy.barrier()
    assert os.listdir(tmp_path) == [os.path.basename(callback.best_model_path)]
    weights = consolidate(callback.best_model_path)["state_dict"]
    assert set(weights) == set(whole(Deep(4)))


@pytest.mark.parametrize(
    "policy",
    [None, MixedPrecisionPolicy(torch.bfloat16, torch.float32), MixedPrecisionPolicy(torch.bfloat16)],
    ids=["single", "added up in 32 bits", "in 16"],
)
@world_size(2, connect=False)
def test_an_open_window_goes_on_exactly(tmp_path, policy):
    class Stopping(Deep):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.current_epoch == 0 and batch_idx == 0 and self.path:
                self.trainer.save_checkpoint(self.path)

    def run(path, ckpt_path=None):
        module = Stopping(2)
        module.path = path
        strategy = FSDPStrategy(mixed_precision=policy)
        in_rank(strategy, accumulate_grad_batches=2, max_epochs=1).fit(module, ckpt_path=ckpt_path)
        return whole(module)

    path = str(tmp_path / "open.ckpt")
    unbroken = run(path)
    torch.testing.assert_close(run("", path), unbroken, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["full", "sharded"])
@world_size(2, connect=False)
def test_a_parameter_that_was_never_stepped_has_no_optimizer_state_after_resuming(tmp_path, kind):
    class Late(Deep):
        def __init__(self):
            super().__init__(4)
            self.late = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            out = self.net(batch[0])
            return (self.late(out) if self.current_epoch == 1 else out).pow(2).mean()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.path and self.current_epoch == 0 and batch_idx == 0:
                self.trainer.save_checkpoint(self.path)

    def run(path, ckpt_path=None):
        module = Late()
        module.path = path
        in_rank(FSDPStrategy(state_dict_type=kind)).fit(module, ckpt_path=ckpt_path)
        return whole(module)

    path = str(tmp_path / "saved.ckpt")
    unbroken = run(path)
    torch.testing.assert_close(run("", path), unbroken, rtol=0, atol=0)


@pytest.mark.parametrize(
    "callback",
    [WeightAveraging, partial(StochasticWeightAveraging, 0.1), partial(ModelPruning, "l1_unstructured")],
    ids=["every step", "stochastic", "pruning"],
)
@world_size(2, connect=False)
def test_averages_and_pruning_of_sharded_weights_are_refused(callback):
    with pytest.raises(MisconfigurationException, match="does not work with weights that are sharded"):
        in_rank(callbacks=[callback()]).fit(Deep(4))


class Normed(Deep):
    def __init__(self, batch_size):
        super().__init__(batch_size)
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@world_size(2, connect=False)
def test_norms_with_running_statistics(precision):
    module = Normed(4)
    in_rank(precision=precision, max_epochs=1).fit(module)
    # Each process normalizes its own half of a batch, as under DDP.
    reference = Normed(4)
    in_rank(DDPStrategy(), precision=precision, max_epochs=1).fit(reference)
    torch.testing.assert_close(module.losses, reference.losses, rtol=0.02, atol=0.02)
    for name, parameter in reference.named_parameters():
        assert whole(module)[name].dtype == parameter.dtype


@world_size(2, connect=False)
def test_an_error_in_an_optimizer_is_the_one_that_is_raised():
    class Whole(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            # One vector of all gradients, which parts cannot be.
            torch.cat([parameter.grad.view(-1) for parameter in self.param_groups[0]["params"]])

    with pytest.raises(RuntimeError, match="view"):
        in_rank().fit(Deep(4, optimizer=Whole))


@world_size(2, connect=False)
def test_a_module_is_loaded_from_a_folder(tmp_path):
    class Kept(Deep):
        def __init__(self, size=16):
            super().__init__(4, size)
            self.save_hyperparameters()

    path = str(tmp_path / "saved.ckpt")
    module = Kept(size=8)
    trainer = in_rank(FSDPStrategy(state_dict_type="sharded"), max_epochs=1)
    trainer.fit(module)
    trainer.save_checkpoint(path)
    loaded = Kept.load_from_checkpoint(path, map_location="cpu")
    assert loaded.hparams.size == 8
    torch.testing.assert_close(dict(loaded.named_parameters()), whole(module), rtol=0, atol=0, check_device=True)


@world_size(2, connect=False)
def test_an_error_in_a_forward_is_the_one_that_is_raised():
    class Failing(Deep):
        def training_step(self, batch, batch_idx):
            self.net.embed(batch[0])
            raise RuntimeError("in the middle of a forward")

    with pytest.raises(RuntimeError, match="in the middle of a forward"):
        in_rank().fit(Failing(4))


class Silent(Deep):
    """Validates without a word to the other processes, but for the weights."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).pow(2).mean())

    def val_dataloader(self):
        return DataLoader(dataset(5), batch_size=1)


@world_size(4, connect=False)
def test_hybrid_processes_with_fewer_batches_help_the_others_to_validate():
    module = Silent()
    trainer = Trainer(
        strategy=FSDPStrategy(device_mesh=(2, 2)), devices=4, max_epochs=1, enable_checkpointing=False, **QUIET
    )
    warnings.filterwarnings("ignore", "Each rank has its own value")
    trainer.fit(module)
    assert "val_loss" in trainer.callback_metrics


class LogsNorms(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.norms: list[dict[str, float]] = []

    def on_before_optimizer_step(self, optimizer):
        grad = self.net.embed.weight.grad
        self.log("one", grad.norm())
        self.log("synced", grad.abs().max(), sync_dist=True, on_epoch=True)
        with pytest.raises(ValueError, match="rank_zero_only=True.*received a DTensor of which each rank has a part"):
            self.log("first", grad.norm(), rank_zero_only=True)
        everywhere = self.all_gather(grad.norm())
        norm, largest = float(grad.full_tensor().norm()), float(grad.full_tensor().abs().max())
        assert everywhere.tolist() == pytest.approx([norm, norm])
        self.norms.append({"one": norm, "synced_step": largest})

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        shown = {name: float(self.trainer.callback_metrics[name]) for name in ("one", "synced_step")}
        assert shown == pytest.approx(self.norms[-1])


@world_size(2, connect=False)
def test_a_logged_dtensor_is_that_of_all_ranks_and_not_the_part_of_one():
    module = LogsNorms()
    trainer = in_rank(max_epochs=1)
    trainer.fit(module)
    largest = sum(norms["synced_step"] for norms in module.norms) / len(module.norms)
    assert float(trainer.callback_metrics["synced_epoch"]) == pytest.approx(largest)


@world_size(2, connect=False)
def test_collectives_take_a_dtensor_for_the_whole_and_numbers_refuse_a_part():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    model = fabric.setup(Net())
    torch.manual_seed(fabric.global_rank)
    fabric.backward(model(torch.randn(3, 4)).sum())
    grad = model.head.weight.grad
    whole = grad.full_tensor()
    assert torch.equal(fabric.all_reduce(grad, reduce_op="mean"), whole)
    assert torch.equal(fabric.all_gather({"grad": grad})["grad"], torch.stack([whole, whole]))
    with pytest.raises(ValueError, match=r"broadcast received a DTensor.*full_tensor\(\)"):
        fabric.broadcast(grad)
    with pytest.raises(ValueError, match=r"'norm'\] is a DTensor of which each process has a part"):
        to_numbers({"norm": grad.norm()})
    assert to_numbers({"norm": grad.full_tensor().norm()}) == {"norm": pytest.approx(float(whole.norm()))}


class Grows(Deep):
    """Adds a layer in its second epoch; or thaws one, which is cut."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        if not adds:
            self.net.head.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            if self.adds:
                self.net.head = nn.Sequential(self.net.head, nn.Linear(1, 1))
            late = self.net.head[1] if self.adds else self.net.head
            late.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(late.parameters())})


@pytest.mark.parametrize("adds", [False, True], ids=["thawed", "added"])
@world_size(2, connect=False)
def test_parameters_that_are_made_after_the_cut_are_refused(adds):
    module = Grows(adds)
    trainer = in_rank(max_epochs=2)
    with (
        pytest.raises(MisconfigurationException, match=r"2 parameters .* of shape \(1, 1\)") if adds else nullcontext()
    ):
        trainer.fit(module)
    assert trainer.current_epoch == (1 if adds else 2)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@world_size(2, connect=False)
def test_fabric_refuses_parameters_that_are_made_after_the_cut():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    late = nn.Linear(1, 1)
    for _ in range(2):
        fabric.backward(late(model(torch.randn(3, 4))).sum())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.add_param_group({"params": list(late.parameters())})
    with pytest.raises(MisconfigurationException, match="neither cut nor averaged over processes"):
        optimizer.step()
