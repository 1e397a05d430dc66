"""What a run on many processes will need, found out without them, and what two real ones need."""

from __future__ import annotations

import ctypes
import operator
import resource
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.planning import Collectives, Plan, main, plan_run
from levin.strategies.context import share_sequences
from levin.strategies.layer_plan import apply_plan
from levin.strategies.model_parallel import ModelParallelStrategy
from levin.strategies.sharding import ShardingPlan, apply_sharding, repeated_blocks
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.small import QUIET
from tests.strategies.test_pipeline import pipelines

PLAN = {"blocks.*.up": "column", "blocks.*.down": "row"}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 50)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).tanh()


def make():
    return Net(), torch.zeros(2, 8, dtype=torch.int64)


def make_large():
    return Net(1024, 6), torch.zeros(2, 64, dtype=torch.int64)


def train(net: nn.Module, batch: torch.Tensor, **settings) -> tuple[list[int], dict]:
    """Train two steps, and return what is kept and what was sent in the second."""
    optimizer = torch.optim.AdamW(net.parameters(), **settings)
    for _ in range(2):
        moved = Collectives()
        optimizer.zero_grad()
        with moved:
            net(batch).sum().backward()
        optimizer.step()
    parameters = list(net.parameters())
    states = [value for values in optimizer.state.values() for value in values.values()]
    kept = [
        sum(part.numel() * part.element_size() for part in (getattr(t, "to_local", lambda t=t: t)() for t in tensors))
        for tensors in (parameters, [parameter.grad for parameter in parameters], states)
    ]
    return kept, moved.seen


@pytest.mark.parametrize("kind", ["dp", "tp"])
@world_size(2, timeout_s=120)
def test_the_plan_is_what_two_processes_keep_and_send(kind):
    net, batch = make()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
    if kind == "dp":
        apply_sharding(net, ShardingPlan(mesh=mesh))
    else:
        apply_plan(net, mesh, PLAN)
    kept, moved = train(net, batch)
    torch.distributed.destroy_process_group()
    plan = plan_run(make, f"mesh:{kind}=2", plan=PLAN)
    assert [plan.parameters, plan.gradients, plan.optimizer_states] == kept
    assert dict(plan.collectives) == moved
    assert moved


@pytest.mark.slow
@world_size(2, timeout_s=300)
def test_the_peak_is_what_two_processes_need():
    mesh = init_device_mesh("cpu", (2,))
    with torch.device("meta"):
        net, _ = make_large()
    batch = torch.zeros(2, 64, dtype=torch.int64)
    # Memory that is freed goes back at once, so that what is resident is in use.
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    allocator.mallopt(-1, 0)  # M_TRIM_THRESHOLD
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    apply_sharding(net, ShardingPlan(mesh=mesh))
    train(net, batch, foreach=False)
    needed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    torch.distributed.destroy_process_group()
    plan = plan_run(make_large, "mesh:dp=2", optimizer=lambda params: torch.optim.AdamW(params, foreach=False))
    assert plan.peak == pytest.approx(needed, rel=0.2)


class Attending(Block):
    """A block whose attention looks over the sequence."""

    def forward(self, x):
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return super().forward(x + attended.transpose(1, 2).flatten(2))


def make_attending():
    net, batch = make()
    net.blocks = nn.ModuleList(Attending(32) for _ in range(3))
    return net, batch


@pytest.mark.slow
@pytest.mark.parametrize("data", [1, 2])
@world_size(4, timeout_s=120)
def test_the_plan_of_shared_sequences_is_what_processes_keep_and_send(data):
    net, batch = make_attending()
    mesh = init_device_mesh("cpu", (data, 4 // data), mesh_dim_names=("data", "context"))
    share_sequences(repeated_blocks(net), mesh["context"].get_group())
    apply_sharding(net, ShardingPlan(mesh=mesh._flatten("all")))
    kept, moved = train(net, batch)
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    plan = plan_run(make_attending, f"mesh:dp={data},cp={4 // data}")
    # The plan is that of the first process; 50 rows make the last one smaller.
    planned = [plan.parameters, plan.gradients, plan.optimizer_states]
    assert planned == kept if rank == 0 else all(map(operator.ge, planned, kept))
    assert dict(plan.collectives) == moved
    assert moved["all_to_all"][0] == 3 * 4 * 2


class Staged(LightningModule):
    width = 32

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, self.width)
        self.blocks = nn.ModuleList(Block(self.width) for _ in range(4))
        self.head = nn.Linear(self.width, 50)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).tanh()

    def training_step(self, batch, batch_idx):
        return self(batch).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self):
        return DataLoader(torch.zeros(16, 8, dtype=torch.int64), batch_size=8)


def make_staged():
    return Staged(), torch.zeros(8, 8, dtype=torch.int64)


class Kept:
    """What autograd keeps, in bytes: now, and at most."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def pack(self, tensor):
        is_batch = tensor.dtype == torch.int64
        if is_batch or isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor
        storage = _local(tensor).untyped_storage()
        self.counts[storage._cdata] += 1
        self.sizes[storage._cdata] = storage.nbytes()
        self.most = max(self.most, sum(self.sizes[key] for key, count in self.counts.items() if count))
        holder = Holder(tensor)
        weakref.finalize(holder, self.counts.subtract, [storage._cdata])
        return holder


class Holder:
    def __init__(self, tensor) -> None:
        self.tensor = tensor


class OfWeights(Collectives):
    """Leaves out what ranks tell each other about the run, which is in other formats than the weights."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if any(leaf.dtype == torch.float32 for leaf in leaves):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def check_stage(mesh: str, **degrees: int) -> Plan:
    """Plan, train one step on processes that are there, and compare; return the plan of this process's stage."""
    cut = PLAN if degrees.get("tensor_parallel_size", 1) > 1 else None
    plan = plan_run(make_staged, mesh, plan=cut)
    module = Staged()
    strategy = ModelParallelStrategy(plan=cut, pipeline_parallel_size=2, **degrees)
    trainer = Trainer(
        strategy=strategy, devices=plan.num_processes, max_steps=1, enable_checkpointing=False, barebones=True
    )
    kept, moved = Kept(), OfWeights()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: getattr(held, "tensor", held)), moved:
        trainer.fit(module)
    [optimizer] = trainer.optimizers
    states = [value for values in optimizer.state.values() for value in values.values()]
    own = plan.stages[trainer.global_rank * 2 // plan.num_processes]
    assert own.parameters == own.gradients == sum(map(_num_bytes, module.parameters())) > 0
    assert own.optimizer_states == sum(map(_num_bytes, states))
    assert own.activations == kept.most
    moved.seen.pop("broadcast", None)  # first values
    assert moved.seen == own.collectives, (moved.seen, own.collectives)
    assert own.collectives["send"][0] == 4
    assert plan.bubble == 1 / 5 and plan.peak == max(stage.peak for stage in plan.stages)
    return own


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "to_local", lambda: tensor)()


def _num_bytes(tensor: torch.Tensor) -> int:
    return _local(tensor).numel() * tensor.element_size()


@pipelines
@world_size(2, connect=False, timeout_s=120)
def test_the_plan_of_a_pipeline_is_what_two_processes_keep_and_send():
    check_stage("mesh:pp=2", data_parallel_size=1, tensor_parallel_size=1)


@cuts_on_cpu
@pipelines
@world_size(4, connect=False, timeout_s=120)
def test_the_plan_of_a_pipeline_whose_stages_share_weights_is_what_four_processes_keep_and_send():
    own = check_stage("mesh:pp=2,dp=2", data_parallel_size=2, tensor_parallel_size=1)
    assert own.collectives["reduce_scatter"][0] == 3


@pipelines
@world_size(4, connect=False, timeout_s=120)
def test_the_plan_of_a_pipeline_whose_stages_share_layers_is_what_four_processes_keep_and_send():
    own = check_stage("mesh:pp=2,tp=2", data_parallel_size=1, tensor_parallel_size=2)
    assert own.collectives["all_reduce"][0] == 2 * 2 * 4  # blocks, directions and parts of the batch


@cuts_on_cpu
@pipelines
@world_size(4, connect=False, timeout_s=120)
def test_the_plan_of_copies_of_a_pipeline_is_what_four_processes_keep_and_send():
    own = check_stage("mesh:pp=2,ddp=2", data_parallel_size=2, tensor_parallel_size=1, copies=2)
    assert own.collectives["all_reduce"] == (3, own.gradients)


class Wide(Staged):
    """Weights that outweigh what a process has of its own; made where the process is known."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self):
        if not hasattr(self, "embed"):
            with torch.device("meta"):
                whole = WideNet()
            self.embed, self.blocks, self.head = whole.embed, whole.blocks, whole.head

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), foreach=False)

    def train_dataloader(self):
        return DataLoader(torch.zeros(16, 64, dtype=torch.int64), batch_size=8)


class WideNet(Staged):
    width = 1024


@pytest.mark.slow
@pipelines
@world_size(2, connect=False, timeout_s=300)
def test_the_peak_of_a_pipeline_is_what_two_processes_need():
    plan = plan_run(lambda: (Wide(), torch.zeros(8, 64, dtype=torch.int64)), "mesh:pp=2")
    settings = {"strategy": "mesh:pp=2", "devices": 2, "max_epochs": 1, "enable_checkpointing": False}
    # What is imported on first use is in memory before the measurement.
    trainer = Trainer(**settings, **QUIET)
    trainer.fit(Staged())
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    allocator.mallopt(-1, 0)  # M_TRIM_THRESHOLD
    allocator.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Trainer(**settings, **QUIET).fit(Wide())
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    needed = int(line.split()[1]) * 1024 - before
    assert plan.stages[trainer.global_rank].peak == pytest.approx(needed, rel=0.2)


class Staying(Staged):
    """What the first stage computes is used in the last."""

    def forward(self, x):
        first = x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + first)


class Looking(Staged):
    """Its loss is read."""

    def training_step(self, batch, batch_idx):
        loss = self(batch).mean()
        assert loss.item() < 100
        return loss


class Tied(Staged):
    """The first layer and the last have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("mesh", ["mesh:pp=2", "mesh:pp=2,tp=2", "mesh:pp=2,ddp=4"])
def test_what_goes_wrong_in_a_pipeline_goes_wrong_in_its_plan(mesh):
    batch = torch.zeros(8, 8, dtype=torch.int64)
    cut = PLAN if "tp" in mesh else None
    with pytest.raises(ValueError, match=r"blocks.2, needs the value .* at .*test_planning.py:\d+"):
        plan_run(lambda: (Staying(), batch), mesh, plan=cut)
    with pytest.raises(RuntimeError, match=r"reads a value of a tensor"):
        plan_run(lambda: (Looking(), batch), mesh, plan=cut)


def test_stages_share_the_gradient_of_a_weight_that_they_share():
    batch = torch.zeros(8, 8, dtype=torch.int64)
    for mesh, ways in (("mesh:pp=2", 1), ("mesh:pp=2,dp=2", 2)):
        for stage in plan_run(lambda: (Tied(), batch), mesh).stages:
            assert stage.collectives["all_reduce"] == (1, 50 * 32 * 4 // ways)


def test_parts_that_are_too_few_for_1f1b_are_all_under_way_at_once():
    few, many = (
        plan_run(lambda size=size: (Staged(), torch.zeros(size, 8, dtype=torch.int64)), "mesh:pp=4").stages
        for size in (6, 8)
    )
    # Two parts of three samples, where each of four stages wants a part; and eight of one sample.
    assert [stage.collectives["send"][0] for stage in few] == [2, 4, 4, 2]
    assert [stage.collectives["send"][0] for stage in many] == [8, 16, 16, 8]
    assert few[1].activations == 6 * many[1].activations // 3
    assert few[3].activations == 6 * many[3].activations


def test_pipelines_and_shared_sequences_of_many_processes_are_planned_on_one():
    plan = plan_run(make_staged, "mesh:pp=4")
    assert len(plan.stages) == 4
    assert "stage 3\nparameters" in str(plan) and "waiting for other stages: 27% of a step" in str(plan)
    assert sum(stage.parameters for stage in plan.stages) == sum(p.numel() * 4 for p in Staged().parameters())
    with pytest.raises(ValueError, match="cp goes beside dp and tp alone, received 'mesh:pp=2,cp=2'"):
        plan_run(make_staged, "mesh:pp=2,cp=2")
    with pytest.raises(ValueError, match="7 stages need as many layers"):
        plan_run(make_staged, "mesh:pp=7")
    with pytest.raises(ValueError, match="must take .batch, sequence, features. whose sequence 3 processes can share"):
        plan_run(make_attending, "mesh:cp=3")
    with pytest.raises(ValueError, match="cp goes beside dp and tp alone, received 'mesh:ddp=2,cp=2'"):
        plan_run(make_attending, "mesh:ddp=2,cp=2")
    shared = plan_run(make_attending, "mesh:cp=2").parameters
    assert shared == pytest.approx(plan_run(make_attending, "mesh:dp=1").parameters / 2, rel=0.01)
    assert plan_run(make_attending, "mesh:dp=64,cp=4").parameters < shared / 20


def test_weights_fall_with_the_number_of_processes():
    plans = {size: plan_run(make, f"mesh:dp={size}") for size in (1, 2, 64)}
    total = sum(parameter.numel() for parameter in Net().parameters()) * 4
    assert plans[1].parameters == total
    assert plans[2].parameters == pytest.approx(total / 2, rel=0.01)
    assert plans[64].parameters < total / 30
    assert plans[1].collectives == {}
    assert plan_run(make, "mesh:ddp=64").collectives == {"all_reduce": (1, total)}
    both = plan_run(make, "mesh:dp=4,tp=2", plan=PLAN)
    assert both.num_processes == 8
    assert {"all_gather", "reduce_scatter", "all_reduce"} == set(both.collectives)


class Module(LightningModule):
    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads

    def configure_model(self):
        self.net = Net()

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).mean()
        return {"loss": loss * loss.item() if self.reads else loss}

    def configure_optimizers(self):
        return {"optimizer": torch.optim.SGD(self.parameters(), lr=0.1)}


def test_a_lightning_module_has_its_own_step_and_optimizer():
    plan = plan_run(lambda: (Module(), make()[1]), "mesh:dp=4")
    assert plan.optimizer_states == 0
    assert plan.gradients == plan.parameters


class Called(Module):
    """Its step calls the module itself, as most do."""

    def forward(self, batch):
        return self.net(batch)

    def training_step(self, batch, batch_idx):
        return self(batch).mean()


@pytest.mark.parametrize("mesh", ["mesh:dp=4", "mesh:ddp=4"])
def test_a_step_that_calls_its_module_is_planned_as_one_that_calls_its_parts(mesh):
    parts, whole = (plan_run(lambda kind=kind: (kind(), make()[1]), mesh) for kind in (Module, Called))
    # FSDP gathers what belongs to no block for the call of the step, and for that of the module in it.
    once_more = {"mesh:dp=4": 1, "mesh:ddp=4": 0}[mesh]
    (one, _), (other, _) = (plan.collectives.pop("all_gather", (0, 0)) for plan in (parts, whole))
    assert other == one + once_more
    assert parts == whole


class OnMeta(Module):
    def configure_model(self):
        with torch.device("meta"):
            super().configure_model()


@pytest.mark.parametrize("mesh", ["mesh:dp=2", "mesh:ddp=2", "mesh:tp=2"])
def test_layers_made_on_the_meta_device_are_planned_as_those_made_whole(mesh):
    cut = {f"net.{name}": style for name, style in PLAN.items()}
    whole, on_meta = (plan_run(lambda kind=kind: (kind(), make()[1]), mesh, plan=cut) for kind in (Module, OnMeta))
    assert whole == on_meta


def test_a_batch_that_was_there_before_is_planned_for_as_one_that_is_made():
    batch = make()[1]
    for mesh in ("mesh:dp=2", "mesh:ddp=2"):
        assert plan_run(lambda: (Net(), batch), mesh) == plan_run(make, mesh)


def test_what_goes_wrong_on_many_processes_goes_wrong_here():
    with pytest.raises(ValueError, match="has 128 output features, which 3 processes cannot share"):
        plan_run(make, "mesh:tp=3", plan=PLAN)
    with pytest.raises(ValueError, match="fits no submodule"):
        plan_run(make, "mesh:tp=2", plan={"layers.*": "row"})
    with pytest.raises(RuntimeError, match=r"reads a value of a tensor"):
        plan_run(lambda: (Module(reads=True), make()[1]), "mesh:dp=2")
    assert not torch.distributed.is_initialized()


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "large.py").write_text("from tests.test_planning import make\n")
    monkeypatch.chdir(tmp_path)
    cuts = [word for pattern, style in PLAN.items() for word in ("--cut", f"{pattern}={style}")]
    assert main(["large:make", "mesh:dp=4,tp=2", *cuts]) == 0
    assert "each of 8 processes" in capsys.readouterr().out
    for words in (["large:nothing", "mesh:dp=2"], ["nothing:make", "mesh:dp=2"], ["large:make", "mesh:zz=2"]):
        with pytest.raises(SystemExit):
            main(words)
    assert "zz" in capsys.readouterr().err
