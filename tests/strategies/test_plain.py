"""What strategies decide and do without another process."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from levin.accelerators import CPUAccelerator
from levin.checkpoint import TorchCheckpointIO
from levin.environments import LightningEnvironment
from levin.launchers import MultiProcessingLauncher, SubprocessLauncher
from levin.precision import DoublePrecision, Precision
from levin.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
    TorchSyncBatchNorm,
    collectives,
    ddp,
    fsdp,
    layer_plan,
    parallel,
)
from levin.strategies import strategy as strategy_file
from levin.strategies.contexts import SkipInit, environment_variables, in_forward_context, run_as_forward
from levin.strategies.data_parallel import DataParallelGroup
from levin.strategies.layer_sync import CPUSyncBatchNorm
from levin.strategies.sharding import (
    WeightMaker,
    as_policy,
    outermost_repeated,
    shares_parameters,
    units_of,
    within_budget,
)
from levin.strategies.state_of import load_optimizer_state, numbered, parameter_names
from levin.utilities.exceptions import MisconfigurationException

CPU = torch.device("cpu")


def told(function, *args, **kwargs) -> str:
    """Return what a call is refused with."""
    with pytest.raises(MisconfigurationException) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def of_ddp(start_method: str, **more) -> dict:
    return {"start_method": start_method, **more}


def test_each_name_makes_one_strategy_with_its_arguments():
    offloads = {"offload_optimizer": True, "offload_parameters": True}
    disk = {"offload_optimizer_device": "nvme", "offload_params_device": "nvme", "remote_device": "nvme"}
    ways = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
    expected = {
        **{name: {"start_method": way} for name, way in ways.items()},
        **{
            f"{name}_find_unused_parameters_{str(finds).lower()}": {"start_method": way, "find_unused_parameters": finds}
            for name, way in ways.items()
            for finds in (True, False)
        },
        "fsdp": {}, "fsdp_cpu_offload": {"cpu_offload": True},
        "deepspeed": {}, "deepspeed_stage_1": {"stage": 1}, "deepspeed_stage_2": {"stage": 2}, "deepspeed_stage_3": {"stage": 3},
        "deepspeed_stage_2_offload": {"stage": 2, "offload_optimizer": True},
        "deepspeed_stage_3_offload": {"stage": 3, **offloads},
        "deepspeed_stage_3_offload_nvme": {"stage": 3, **offloads, **disk},
        "single_xla": {}, "xla": {}, "xla_debug": {"debug": True}, "xla_fsdp": {},
        "single_device": {},
    }  # fmt: skip
    found = {name: entry["init_params"] for name, entry in StrategyRegistry.items()}
    expected = {name: arguments for name, arguments in expected.items() if name in found or name != "single_device"}
    assert found == expected
    assert all(StrategyRegistry[name]["description"] for name in found)


def test_the_parts_that_the_user_gave_come_before_those_that_are_chosen():
    own, chosen = TorchCheckpointIO(), TorchCheckpointIO()
    precision, accelerator = DoublePrecision(), CPUAccelerator()
    strategy = SingleDeviceStrategy("cpu", accelerator, own, precision_plugin=precision)
    assert (strategy.accelerator, strategy.checkpoint_io, strategy.precision) == (accelerator, own, precision)
    parts = strategy.user_parts
    assert (parts.accelerator, parts.precision, parts.checkpoint_io) == (accelerator, precision, own)
    strategy.assemble(accelerator=accelerator, precision=Precision(), parallel_devices=[CPU])
    assert strategy.checkpoint_io is own and strategy.num_nodes == 1
    strategy.assemble(
        accelerator=accelerator, precision=precision, parallel_devices=[CPU], checkpoint_io=chosen, num_nodes=2
    )
    assert strategy.checkpoint_io is chosen and strategy.precision is precision and strategy.num_nodes == 2
    bare = SingleDeviceStrategy(0)
    assert bare.root_device == torch.device("cuda", 0) and type(bare.precision) is Precision
    with pytest.raises(RuntimeError, match="SingleDeviceStrategy has no accelerator yet. Pass it to Trainer"):
        assert bare.accelerator
    bare.assemble(accelerator=accelerator, precision=precision, parallel_devices=[CPU])
    assert type(bare.checkpoint_io) is TorchCheckpointIO


def test_one_process_speaks_for_all():
    strategy = SingleDeviceStrategy()
    assert (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size) == (0, 0, 0, 1)
    assert strategy.is_global_zero and not strategy.is_distributed and strategy.distributed_sampler_kwargs is None
    assert strategy.data_parallel == DataParallelGroup(0, 1, None, None)
    tensor = torch.ones(2)
    assert strategy.reduce(tensor) is strategy.all_gather(tensor) is strategy.broadcast(tensor) is tensor
    assert strategy.all_reduce(tensor) is tensor and strategy.barrier() is None and strategy.meet("x") is None
    assert (
        strategy.reduce_boolean_decision(True) is True and strategy.reduce_boolean_decision(False, all=False) is False
    )
    assert strategy.keeps_open_windows and strategy.supports_inference_mode
    assert not strategy.handles_gradient_accumulation and not strategy.restore_checkpoint_after_setup
    assert strategy.copied_parameters(nn.Linear(1, 1)) == []
    optimizer = torch.optim.SGD([tensor], 0.1)
    assert strategy.setup_optimizer(optimizer) is optimizer and strategy.own_optimizer_state(optimizer, 3) == 3


def test_gradients_are_clipped_by_one_of_two_ways():
    strategy, module = SingleDeviceStrategy(), nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for values in ((None, None), (0.0, 0.0)):
        assert told(strategy.clip_gradients, module, optimizer, *values) == (
            f"clip_gradients takes one of clip_val and max_norm, received {values[0]!r} and {values[1]!r}. Use max_norm to bound the "
            "length of the gradient, clip_val to bound each element."
        )
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert strategy.clip_gradients(module, optimizer, clip_val=3.5) is None
    assert module.weight.grad.tolist() == [[3.0, 3.5]]
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert strategy.clip_gradients(module, optimizer, max_norm=1.0).item() == 5.0
    torch.testing.assert_close(module.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert strategy.clip_gradients(module, optimizer, max_norm=9.0, norm_type=torch.inf).item() == pytest.approx(0.8)
    module.weight.grad.fill_(torch.nan)
    assert strategy.clip_gradients(module, optimizer, max_norm=1.0).isnan()
    with pytest.raises(RuntimeError, match="The norm of the gradients is nan"):
        strategy.clip_gradients(module, optimizer, max_norm=1.0, error_if_nonfinite=True)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    strategy.scale_gradients(optimizer, 2.0)
    assert module.weight.grad.tolist() == [[6.0, 8.0]]
    kept = strategy.window_gradients(module)
    module.weight.grad.zero_()
    strategy.load_window_gradients(module.double(), kept)
    assert module.weight.grad.tolist() == [[6.0, 8.0]] and module.weight.grad.dtype == torch.float64
    strategy.load_window_gradients(module, [None])
    assert module.weight.grad is None and strategy.window_gradients(module) == [None]


def test_operations_by_name():
    op = dist.ReduceOp
    expected = {
        "mean": (True, op.SUM), "AVG": (True, op.SUM), op.AVG: (True, op.SUM), None: (False, op.SUM), "sum": (False, op.SUM),
        "min": (False, op.MIN), "max": (False, op.MAX), "product": (False, op.PRODUCT), "band": (False, op.BAND),
        "bor": (False, op.BOR), "bxor": (False, op.BXOR), op.MIN: (False, op.MIN),
    }  # fmt: skip
    assert {name: collectives.parse_reduce_op(name) for name in expected} == expected
    assert told(collectives.parse_reduce_op, 3) == (
        "reduce_op must be a torch.distributed.ReduceOp or one of mean, avg, sum, min, max, product, band, bor, bxor, received 3. "
        "Use 'mean' to average over processes."
    )


def test_who_has_given_up_the_others_gathers_its_own():
    tensor = torch.ones(2, requires_grad=True)
    found = collectives.all_gather({"a": tensor, "b": 3}, sync_grads=True, is_alone=True)
    assert found["a"].shape == (1, 2) and found["a"].requires_grad and found["b"].tolist() == [3]
    assert not collectives.all_gather(tensor, is_alone=True).requires_grad


class Noting(Precision):
    """Notes which of its contexts a step runs in."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def forward_context(self):
        return self._noting("forward")

    def train_step_context(self):
        return self._noting("train")

    def _noting(self, name):
        from contextlib import nullcontext

        self.seen.append(name)
        return nullcontext()


def test_a_step_runs_in_the_context_of_its_precision():
    def step(x, y):
        return x + y

    assert in_forward_context(step, Precision(), "training_step") is step
    precision = Noting()
    for name in ("training_step", "validation_step", "test_step", "predict_step", "forward"):
        assert in_forward_context(step, precision, name)(1, y=2) == 3
    assert precision.seen == ["train", "forward", "forward", "forward", "forward"]


def test_a_method_runs_where_the_caller_runs_forward():
    module = nn.Linear(2, 2)
    caller = nn.Sequential(module)
    seen = []

    def step(x):
        seen.append("forward" in vars(module))
        return module(x) * 0 + 7

    run = run_as_forward(caller, module, step)
    assert run(torch.ones(1, 2)).tolist() == [[7.0, 7.0]]
    assert seen == [False] and "forward" not in vars(module)
    # One that was set on the instance is there in the step, and after an error.
    own = module.forward = lambda x: x
    seen.clear()
    assert run_as_forward(caller, module, lambda x: module(x) + 1)(torch.ones(1, 2)).tolist() == [[2.0, 2.0]]
    with pytest.raises(ZeroDivisionError):
        run_as_forward(caller, module, lambda x: 1 / 0)(1)
    assert vars(module)["forward"] is own


def test_layers_whose_weights_are_loaded_are_not_initialized():
    with SkipInit():
        tensor = torch.full((2, 2), 3.0)
        assert nn.init.zeros_(tensor) is tensor and nn.init.xavier_uniform_(tensor=tensor) is tensor
        assert nn.init.kaiming_uniform_(tensor) is tensor and nn.init.normal_(tensor) is tensor
        assert tensor.eq(3.0).all()
        assert tensor.zero_().sum() == 0 and torch.ones(2).add_(1).tolist() == [2.0, 2.0]
        assert (tensor.__iadd__(1) == 1).all()
    assert nn.init.zeros_(torch.ones(2)).tolist() == [0.0, 0.0]


def test_an_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("LEVIN_A", "a")
    monkeypatch.setenv("LEVIN_C", "c")
    monkeypatch.delenv("LEVIN_B", raising=False)
    with pytest.raises(KeyError), environment_variables(LEVIN_A="1", LEVIN_B=2, LEVIN_C=None):
        assert (os.environ["LEVIN_A"], os.environ["LEVIN_B"], os.environ["LEVIN_C"]) == ("1", "2", "c")
        raise KeyError
    assert (os.environ["LEVIN_A"], os.environ["LEVIN_C"], "LEVIN_B" in os.environ) == ("a", "c", False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_batch_normalization_is_replaced_and_put_back_with_its_tensors(device):
    norm = nn.BatchNorm2d(3, eps=0.5, momentum=None, device=device)
    plain = nn.BatchNorm1d(2, affine=False, track_running_stats=False).eval()
    model = nn.Sequential(norm, nn.Sequential(plain), nn.Linear(2, 2, device=device))
    before = dict(norm.named_parameters()), dict(norm.named_buffers())
    sync = TorchSyncBatchNorm()
    assert sync.apply(model) is model
    kind = CPUSyncBatchNorm if device == "cpu" else nn.SyncBatchNorm
    assert type(model[0]) is type(model[1][0]) is kind and type(model[2]) is nn.Linear
    assert model[0].training and not model[1][0].training
    assert sync.revert(model) is model
    found = model[0]
    assert isinstance(found, nn.BatchNorm2d) and (found.num_features, found.eps, found.momentum) == (3, 0.5, None)
    assert (found.affine, found.track_running_stats, model[1][0].affine, model[1][0].track_running_stats) == (
        True, True, False, False
    )  # fmt: skip
    after = dict(found.named_parameters()), dict(found.named_buffers())
    for old, new in zip(before, after, strict=True):
        assert all(old[name] is new[name] for name in old) and old.keys() == new.keys()
    assert model[1][0].running_mean is None and not model[1][0].training
    assert found.eval()(torch.ones(2, 3, device=device)).shape == (2, 3), "of any number of dimensions"


def test_batch_normalization_of_one_process_is_torchs():
    layer, reference = CPUSyncBatchNorm(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for number in range(2):
        batch = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(number))
        torch.testing.assert_close(layer(batch), reference(batch))
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())
    with pytest.raises(ValueError) as caught:
        layer(torch.ones(3))
    assert str(caught.value) == "The input must have at least 2 dimensions, (batch, channels, ...), received 1."


def test_formats_in_which_fsdp_gathers_weights():
    for name, dtype in (("bf16-mixed", torch.bfloat16), ("float8", torch.bfloat16), ("16-mixed", torch.float16)):
        assert fsdp._policy_of(name) == MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    assert fsdp._policy_of("32-true") is fsdp._policy_of("bf16-true") is fsdp._mixed_precision(None) is None
    policy = MixedPrecisionPolicy(torch.float16)
    assert fsdp._mixed_precision(policy) is policy
    older = SimpleNamespace(param_dtype=torch.float16, reduce_dtype=torch.float32)
    assert fsdp._mixed_precision(older) == MixedPrecisionPolicy(torch.float16, torch.float32, cast_forward_inputs=True)
    older.cast_forward_inputs = False
    assert fsdp._mixed_precision(older) == MixedPrecisionPolicy(torch.float16, torch.float32, cast_forward_inputs=False)
    del older.reduce_dtype
    assert told(fsdp._mixed_precision, older).startswith(
        "mixed_precision must be a torch.distributed.fsdp.MixedPrecisionPolicy"
    )


def test_fsdp_makes_modules_without_memory_unless_they_are_to_be_made_at_once():
    strategy = FSDPStrategy()
    for empty_init, device in ((None, "meta"), (True, "meta"), (False, "cpu")):
        with strategy.module_init_context(empty_init=empty_init):
            assert nn.Linear(1, 1).weight.device.type == device


def test_arguments_of_fsdp_in_all_their_forms():
    plain = FSDPStrategy()
    assert (plain.sharding_strategy, plain.state_dict_type, plain.saves_folders, plain.cpu_offload) == (
        "FULL_SHARD", "full", False, False
    )  # fmt: skip
    assert (plain._recomputes, plain._given_mesh, plain._ignored, plain.uneven) == (None, None, frozenset(), "longest")
    parameter = nn.Parameter(torch.ones(1))
    strategy = FSDPStrategy(
        sharding_strategy=SimpleNamespace(name="_HYBRID_SHARD_ZERO2"), state_dict_type="sharded",
        cpu_offload=SimpleNamespace(offload_params=True), ignored_states=[parameter], activation_checkpointing="full",
        limit_all_gathers=True, forward_prefetch=1, backward_prefetch=1, sync_module_states=0, device_id=0, use_orig_params=True,
    )  # fmt: skip
    assert (strategy.sharding_strategy, strategy.saves_folders, strategy.cpu_offload) == (
        "_HYBRID_SHARD_ZERO2",
        True,
        True,
    )
    assert strategy._ignored == {parameter} and strategy._recomputes == "full"
    assert not FSDPStrategy(cpu_offload=SimpleNamespace(offload_params=False)).cpu_offload
    assert FSDPStrategy(activation_checkpointing_policy={nn.Linear})._recomputes == {nn.Linear}
    for name, way_out in fsdp._REFUSED.items():
        assert told(FSDPStrategy, **{name: None}) == f"FSDPStrategy cannot do {name}=None. {way_out}"
    for strategy, kind in (
        (plain, "TorchCheckpointIO"),
        (FSDPStrategy(state_dict_type="sharded"), "ShardedCheckpointIO"),
    ):
        assert type(strategy.default_checkpoint_io()).__name__ == kind
    assert plain.restore_checkpoint_after_setup and not plain.supports_inference_mode


class Units(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
        self.mixed = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.ReLU(), "c": nn.ReLU(), "d": nn.Linear(3, 2)})
        self.lists = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)]) for _ in range(2))
        self.last = nn.Linear(2, 2)


def test_layers_are_taken_from_the_first_process_of_a_mesh_without_names(monkeypatch):
    taken = []
    monkeypatch.setattr(collectives, "sync_tensors", lambda tensors, group: taken.append(group))
    mesh = SimpleNamespace(mesh_dim_names=None, ndim=3, size=[1, 2, 3].__getitem__, get_group="of dimension {}".format)
    layer = nn.Linear(1, 1, device="meta")
    WeightMaker(layer, CPU, mesh)(layer)
    assert taken == ["of dimension 1", "of dimension 2"] * 2


def test_units_are_the_outermost_blocks_that_are_repeated():
    module = Units()
    found = list(outermost_repeated(module))
    assert found == [*module.blocks, module.mixed["a"], module.mixed["d"]]
    assert units_of(module, None) == found
    module.mixed["a"].bias = module.first.bias = nn.Parameter(torch.ones(3))
    assert units_of(module, None) == [*module.blocks, module.mixed["d"]]
    assert shares_parameters(module.first, module) and not shares_parameters(module.blocks[0], module)
    chosen = units_of(module, lambda part: part in (module.blocks[0], module.blocks[0][1], module))
    assert chosen == [module.blocks[0][1], module.blocks[0]], "inner ones first"
    assert told(units_of, module, lambda part: part is module.first) == (
        "auto_wrap_policy chose a Linear that shares a parameter with another part of Units. Choose the smallest submodule that "
        "holds both."
    )
    assert told(units_of, module, lambda part: part is module) == (
        "auto_wrap_policy chose no submodule of Units, which has LayerNorm, Linear, ModuleDict, ModuleList, ReLU, Sequential. Name one "
        "of these classes, or leave auto_wrap_policy out to have the repeated blocks found."
    )


def test_policies_are_taken_in_every_form():
    module = Units()
    parts = list(module.modules())

    def chosen(value):
        policy = as_policy(value, module, "auto_wrap_policy")
        found = [policy(part) for part in parts]
        assert set(found) <= {True, False}
        return [part for part, is_chosen in zip(parts, found, strict=True) if is_chosen]

    norms = [part for part in parts if isinstance(part, nn.LayerNorm)]
    for value in ({nn.LayerNorm}, [nn.LayerNorm], (nn.LayerNorm,), frozenset([nn.LayerNorm])):
        assert chosen(value) == norms
    assert chosen(SimpleNamespace(_module_classes={nn.LayerNorm})) == norms
    assert chosen(lambda part: isinstance(part, nn.LayerNorm) or None) == norms

    # Torch's are asked from the inside out, with what no chosen one holds, and whether to look inside.
    for least, expected in (
        (0, [*module.blocks, module.mixed, module.lists]),
        (30, [module.blocks, module.mixed, module.lists]),
    ):

        def sized(module, recurse, nonwrapped_numel, least=least):
            return nonwrapped_numel >= (least if recurse else 12)

        assert chosen(sized) == expected
    assert chosen(lambda module, recurse, nonwrapped_numel: not recurse) == []
    assert as_policy(None, module, "x") is None
    assert told(as_policy, [1], module, "x") == (
        "x must be a set of classes, a ModuleWrapPolicy or a function of a module, received [1]. Use x={MyBlock}."
    )


@pytest.mark.parametrize(
    ("budget", "kept"), [(0.0, ""), (0.25, "dh"), (0.5, "bdfh"), (0.75, "bcdfgh"), (1.0, "abcdefgh"), (0.3, "dg")]
)
def test_units_that_are_computed_again_are_spread_evenly(budget, kept):
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(8)))
    policy = within_budget(module, budget, None)
    assert "".join("abcdefgh"[number] for number, unit in enumerate(module) if not policy(unit)) == kept


def test_numbers_and_names_of_an_optimizers_parameters():
    module = nn.Linear(2, 1)
    groups = [{"params": [module.bias], "lr": 0.1}, {"params": [module.weight], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    assert parameter_names(module, optimizer) == ["bias", "weight"]
    state = {
        "state": {"weight": "w"},
        "param_groups": [{"lr": 0.1, "params": ["bias"]}, {"lr": 0.2, "params": ["weight"]}],
    }
    assert numbered(state) == {
        "state": {1: "w"}, "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]
    }  # fmt: skip
    assert told(parameter_names, nn.Linear(2, 1), optimizer) == (
        "SGD steps a parameter that Linear does not have. Make optimizers in `configure_optimizers`, of self.parameters()."
    )
    # What was never stepped has no state afterwards, with that of others and without.
    for kept in ({1: {"momentum_buffer": torch.full((1, 2), 3.0)}}, {}):
        optimizer.state[module.bias]["momentum_buffer"] = torch.ones(1)
        saved = {"state": kept, "param_groups": optimizer.state_dict()["param_groups"]}
        saved["param_groups"][1]["lr"] = 0.5
        load_optimizer_state(module, optimizer, saved)
        assert module.bias not in optimizer.state and bool(optimizer.state.get(module.weight)) == bool(kept)
        assert optimizer.param_groups[1]["lr"] == 0.5 and optimizer.param_groups[0]["lr"] == 0.1
        assert not kept or optimizer.state[module.weight]["momentum_buffer"].tolist() == [[3.0, 3.0]]


def test_arguments_of_ddp_and_of_all_strategies_with_processes():
    strategy = DDPStrategy()
    assert (strategy.timeout, strategy.step_timeout) == (timedelta(minutes=30), timedelta(minutes=10))
    assert (strategy.uneven, strategy.ddp_kwargs, strategy.parallel_devices) == ("longest", {}, [])
    assert strategy.is_distributed and strategy.num_processes == 0 and strategy.is_global_zero
    with pytest.raises(RuntimeError, match="DDPStrategy has no devices yet. Pass it to Trainer"):
        assert strategy.root_device
    for call in (strategy.setup_distributed, lambda: strategy.launch_by("popen")):
        with pytest.raises(
            RuntimeError, match=r"DDPStrategy has no cluster environment. Pass it to Trainer\(strategy="
        ):
            call()
    known = "dim, broadcast_buffers, init_sync, process_group, bucket_cap_mb, find_unused_parameters"
    text = told(DDPStrategy, unknown=1, device_ids=[0])
    assert text.startswith(
        "DDPStrategy takes the keywords of DistributedDataParallel, received unknown, device_ids. Use one of: "
    )
    words = text.partition("Use one of: ")[2].rstrip(".").split(", ")
    assert "find_unused_parameters" in words and not {"self", "module", "device_ids", "output_device"} & set(words), (
        known
    )
    state = type("PostLocalSGDState", (), {"start_localSGD_iter": 3})()
    assert ddp._averaging_period(None, None) is None and ddp._averaging_period(state, 1) == 1
    assert told(ddp._averaging_period, state, None) == (
        "ddp_comm_state is a PostLocalSGDState, with which processes drift apart, and model_averaging_period is None. Set "
        "model_averaging_period to the number of steps between two averages."
    )
    for period in (0, 1.5):
        assert told(ddp._averaging_period, state, period).startswith(
            "model_averaging_period must be an int >= 1, received"
        )
    for name in ("PostLocalSGDOptimizer", "ZeroRedundancyOptimizer", "DistributedOptimizer"):
        optimizer = type(name, (torch.optim.SGD,), {})([torch.ones(1)], lr=0.1)
        assert told(ddp.average_after_steps, optimizer, 1, 0).startswith(
            f"model_averaging_period cannot be used with {name}, which"
        )


def assembled(strategy, devices=2):
    strategy.assemble(
        accelerator=CPUAccelerator(),
        precision=Precision(),
        parallel_devices=[CPU] * devices,
        environment=LightningEnvironment(),
    )
    return strategy


def test_copies_that_may_drift_or_are_left_out_are_not_compared():
    module = nn.Linear(2, 2)
    strategy = assembled(DDPStrategy())
    assert strategy.copied_parameters(module) == [module.weight, module.bias]
    module._ddp_params_and_buffers_to_ignore = ["bias"]
    assert strategy.copied_parameters(module) == [module.weight]
    module.weight.to_local = None
    assert strategy.copied_parameters(module) == []
    module = nn.Linear(2, 2)
    assert DDPStrategy(ddp_comm_hook=print).copied_parameters(module) == []
    assert strategy.unwrap(module) is module


@pytest.mark.parametrize(("arguments", "expected"), [((), [False, True]), ((True,), [False, True]), ((False,), [])])
def test_gradients_of_fsdp_stay_where_they_are_unless_told_otherwise(arguments, expected):
    are_reduced = []

    class Part(FSDPModule, nn.Linear):
        def set_requires_gradient_sync(self, is_reduced, *, recurse):
            are_reduced.append(is_reduced)

    module = nn.Linear(1, 1)
    module.__class__ = Part
    with FSDPStrategy().no_sync(module, *arguments):
        assert are_reduced == expected[:1]
    assert are_reduced == expected


def test_a_module_whose_gradients_are_not_averaged_has_no_sync_to_leave_out():
    with pytest.raises(TypeError) as caught:
        DDPStrategy().no_sync(nn.Linear(1, 1))
    assert str(caught.value) == (
        "no_sync needs a module in DistributedDataParallel, received Linear. Set the module up for training first."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"copies": True}, "copies must be an int >= 1, received True. Use 1 to cut without copies."),
        (
            {"context_parallel_size": 0},
            "context_parallel_size must be an int >= 1, received 0. Use 1 to cut without context_parallel_size.",
        ),
        (
            {"data_parallel_size": "all"}, "data_parallel_size must be 'auto' or an int >= 1, received 'all'. Use 'auto'."
        ),
        (
            {"context_parallel_size": 2, "copies": 2},
            "context_parallel_size=2 goes beside data_parallel_size and tensor_parallel_size alone, received copies=2 and "
            "pipeline_parallel_size=1. Leave these out.",
        ),
        (
            {"plan": {"a": "row", "b": "diagonal"}},
            "plan['b'] must be one of 'column', 'row', 'sequence' or a ParallelStyle, received 'diagonal'.",
        ),
    ],
)  # fmt: skip
def test_sizes_and_plans_that_cannot_be(arguments, message):
    assert told(ModelParallelStrategy, **arguments) == message


def test_sizes_fit_the_processes():
    strategy = ModelParallelStrategy()
    strategy.num_nodes, strategy.parallel_devices = 2, [CPU] * 3
    assert strategy._sizes() == (2, 3)
    strategy.check_mesh(6)
    strategy = ModelParallelStrategy(2, 1, context_parallel_size=2, save_distributed_checkpoint=False)
    strategy.parallel_devices = [CPU] * 3
    assert told(strategy.check_mesh, 3) == (
        "data_parallel_size=2 times tensor_parallel_size=1 times context_parallel_size=2 must be the number of processes, which is 3 "
        "(devices=3, num_nodes=1). Choose sizes whose product is 3, or leave one out and set devices=4."
    )
    assert not strategy.saves_folders and strategy.plan == {} and strategy.copies == 1
    strategy = ModelParallelStrategy(4, 1, copies=3)
    strategy.parallel_devices = [CPU] * 4
    assert told(strategy.check_mesh, 4) == (
        "copies=3 must divide data_parallel_size=4: each copy of the weights is cut over as many processes. Use copies=4 for copies that "
        "are not cut over data-parallel processes at all."
    )


def test_a_second_optimizer_that_joins_parameters_of_one_kind_is_taken():
    strategy = FSDPStrategy()
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for optimizer in (torch.optim.SGD(weights, foreach=True), torch.optim.LBFGS(weights)):
        assert strategy.setup_optimizer(optimizer) is optimizer
    cut = nn.Parameter(torch.ones(2))
    cut.device_mesh = "mesh"
    for optimizer, words in (
        (
            torch.optim.SGD([*weights, cut], foreach=True),
            "SGD(foreach=True) steps all parameters at once, and under FSDPStrategy some",
        ),
        (
            torch.optim.Adam([*weights, cut], fused=True),
            "Adam(fused=True) steps all parameters at once, and under FSDPStrategy some",
        ),
        (
            torch.optim.LBFGS([cut]),
            "LBFGS makes one vector of all parameters, and under FSDPStrategy each process has a part",
        ),
    ):
        assert told(strategy.setup_optimizer, optimizer).startswith(words)
    assert strategy.setup_optimizer(torch.optim.SGD([*weights, cut])) is not None


def test_each_process_takes_its_part_of_the_processors(monkeypatch):
    taken = []
    monkeypatch.setattr(parallel, "count_processors", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    parallel.share_processors(2)
    assert taken == [] and os.environ["OMP_NUM_THREADS"] == "5"
    for num, expected in ((2, 3), (9, 1)):
        monkeypatch.delenv("OMP_NUM_THREADS")
        parallel.share_processors(num)
        assert taken[-1] == expected and os.environ["OMP_NUM_THREADS"] == str(expected)
    monkeypatch.setattr(parallel, "connect_processes", lambda *given: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    DDPStrategy(parallel_devices=[CPU] * 2, cluster_environment=LightningEnvironment()).setup_distributed()
    assert taken[-1] == 3


def test_transports_by_device():
    strategy = DDPStrategy()
    for device, backend, can_infer in (("cpu", "gloo", False), ("cuda:0", "nccl", True), ("meta", "gloo", False)):
        strategy.parallel_devices = [torch.device(device)]
        assert (strategy.process_group_backend, strategy.supports_inference_mode) == (backend, can_infer)
        assert strategy._transport_device == (None if backend == "gloo" else torch.device(device))
    assert DDPStrategy(process_group_backend="mpi").process_group_backend == "mpi"
    cut = FSDPStrategy()
    cut.parallel_devices = [torch.device("cuda:0")]
    assert cut.process_group_backend == "cpu:gloo,cuda:nccl"
    cut.parallel_devices = [CPU]
    assert cut.process_group_backend == "gloo"
    assert FSDPStrategy(process_group_backend="nccl").process_group_backend == "nccl"


def test_processes_are_started_as_asked_for_and_know_their_number():
    strategy = assembled(DDPStrategy())
    assert type(strategy.launcher) is SubprocessLauncher and strategy.local_rank == 0
    strategy = assembled(DDPStrategy(start_method="spawn"))
    assert type(strategy.launcher) is MultiProcessingLauncher
    strategy.enter_process(1)
    assert (strategy.local_rank, strategy.global_rank, strategy.world_size, strategy.is_global_zero) == (1, 1, 2, False)
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 1}
    assert strategy.data_parallel == DataParallelGroup(1, 2) and strategy.data_control is strategy.control
    assert told(parallel.check_start_method, "thread") == (
        "start_method must be one of popen, spawn, fork, forkserver, received 'thread'. Use 'popen' for scripts and 'fork' for "
        "notebooks."
    )


def test_a_machine_that_cannot_fork_says_so(monkeypatch):
    monkeypatch.setattr(parallel, "get_all_start_methods", lambda: ["spawn"])
    parallel.check_start_method("popen")
    parallel.check_start_method("spawn")
    assert told(parallel.check_start_method, "fork") == (
        "start_method='fork' is not supported on this machine, which has ['spawn']. Use 'spawn', or strategy='ddp_spawn'."
    )


def test_all_processes_hear_of_a_save_that_failed_in_one(tmp_path):
    strategy = assembled(DDPStrategy())
    asked, rows = [], [[0.0], [0.0]]
    strategy.control = SimpleNamespace(exchange=lambda own, what: asked.append((own, what)) or rows, is_closed=False)
    strategy.save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt") == {"a": 1} and asked == [([0.0], "a save")]
    rows[1] = [1.0]
    with pytest.raises(RuntimeError) as caught:
        strategy.save_checkpoint({}, tmp_path / "b.ckpt")
    assert str(caught.value) == f"Saving {str(tmp_path / 'b.ckpt')!r} failed on rank 1, which tells why."
    with pytest.raises(RuntimeError, match="Saving in the background failed on rank 1, which tells why"):
        strategy.finish_saves()

    def fail(*_):
        raise OSError("no space left")

    strategy.checkpoint_io.check = fail
    with pytest.raises(OSError, match="no space left"):
        strategy.finish_saves()
    assert asked[-1] == ([1.0], "a save")


def test_a_control_group_that_is_closed_asks_nobody():
    strategy = assembled(DDPStrategy())
    strategy.abandon_peers()
    assert strategy.control.is_closed and strategy.control.exchange([1.0, 2.0], "x") == [[1.0, 2.0]]
    assert strategy.reduce(3) == 3 and strategy.broadcast("x", 1) == "x" and strategy.barrier() is None
    assert strategy.reduce_boolean_decision(False) is False
    assert strategy.all_gather(torch.ones(2)).tolist() == [[1.0, 1.0]]


class Paired(DDPStrategy):
    data_parallel = DataParallelGroup(0, 2, None, (0, 2))


def test_those_with_other_data_have_a_control_group_of_their_own():
    strategy = assembled(Paired())
    own = strategy.data_control
    assert own is not strategy.control and own is strategy.data_control
    assert (own._ranks, own._timeout, own.is_closed) == ([0, 2], strategy.timeout, False)
    strategy.abandon_peers()
    assert own.is_closed
    strategy._data_control = None
    assert strategy.data_control.is_closed


def test_the_parts_of_an_optimizers_state_are_gathered_where_it_spreads_them():
    strategy = assembled(DDPStrategy())
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    assert strategy.optimizer_state(optimizer) == optimizer.state_dict()
    calls = []
    optimizer.consolidate_state_dict = lambda: calls.append("gather")
    assert strategy.optimizer_state(optimizer) == optimizer.state_dict()
    strategy.environment.set_global_rank(1)
    assert strategy.optimizer_state(optimizer) == {} and calls == ["gather", "gather"]


def test_the_commonest_error_of_ddp_and_that_of_parts_come_with_the_way_out():
    for strategy, text, hint in (
        (
            DDPStrategy(),
            "Expected to have finished reduction in the prior iteration",
            "strategy='ddp_find_unused_parameters_true'",
        ),
        (FSDPStrategy(), "aten.add got mixed torch.Tensor and DTensor", "use the optimizer's weight_decay"),
    ):
        error, other = RuntimeError(text), RuntimeError("another")
        strategy.on_exception(error)
        strategy.on_exception(other)
        assert str(error).endswith(text) and hint in str(error) and str(other) == "another"


def test_layers_that_cannot_be_shared_evenly_are_told():
    layer = nn.Linear(3, 5)
    for style, text in (
        (
            "column",
            "a.b has 5 output features, which 2 processes cannot share evenly. Choose a tensor_parallel_size that divides 5,",
        ),
        (
            "row",
            "a.b has 3 input features, which 2 processes cannot share evenly. Choose a tensor_parallel_size that divides 3,",
        ),
    ):
        assert told(layer_plan._check_divisible, "a.b", layer, style, 2) == f"{text} or another width."
    layer_plan._check_divisible("a", layer, "row", 3)
    layer_plan._check_divisible("a", layer, "column", 5)
    # What torch cuts unevenly is left to it.
    layer_plan._check_divisible("a", layer, layer_plan.STYLES["row"](), 2)
    layer_plan._check_divisible("a", nn.Embedding(3, 5), "row", 2)
    layer_plan._check_divisible("a", layer, "sequence", 2)
    assert told(
        layer_plan.apply_plan, nn.Sequential(*[nn.ReLU()] * 1), SimpleNamespace(size=lambda: 2), {"b*": "row"}
    ) == ("plan['b*'] fits no submodule of Sequential. Its submodules are 0.")
    module = nn.Sequential(*(nn.ReLU() for _ in range(21)))
    text = told(layer_plan.apply_plan, module, SimpleNamespace(size=lambda: 2), {"b*": "row"})
    assert text.endswith(f"Its submodules are {', '.join(map(str, range(20)))}, ....")
    assert told(layer_plan.apply_plan, module[:20], None, {"b*": "row"}).endswith("18, 19.")


def model_parallel(*sizes, **arguments) -> ModelParallelStrategy:
    strategy = ModelParallelStrategy(*sizes, **arguments)
    strategy.parallel_devices = [CPU] * 2
    return strategy


def test_what_a_pipeline_cannot_run_is_told_before_a_process_starts():
    plain, piped = model_parallel(), model_parallel(1, 1, pipeline_parallel_size=2)
    module = nn.Sequential(nn.Linear(2, 2))
    module.automatic_optimization = False
    plain.check_module(module)
    assert told(piped.check_module, module) == (
        "A pipeline runs forward and backward of a batch at once, in parts, and Sequential has automatic_optimization=False. Use "
        "automatic optimization, or another strategy."
    )
    module.automatic_optimization = True
    assert "2 stages need as many layers with parameters, received 1 in 0" in told(piped.check_module, module)
    piped.check_module(nn.Sequential())  # whose layers are made later
    piped._pipeline = SimpleNamespace(module=module)
    piped.check_module(module)
    assert told(piped._check_trains_by_itself, module) == (
        "A pipeline runs forward and backward of a batch at once, in parts, which a loop of one's own does not, received a Sequential "
        "in Fabric. Use the Trainer, or torch.distributed.pipelining itself."
    )
    piped._lightning_module = module
    piped._check_trains_by_itself(module)
    assert told(piped.precision_for, "16-mixed", torch.device("cuda")) == (
        "precision='16-mixed' scales the loss before its backward pass, and a pipeline runs both in one. Use 'bf16-mixed'."
    )
    assert piped.precision_for("bf16-mixed", CPU).precision == "bf16-mixed"


def test_a_module_moves_as_a_whole_unless_it_is_cut_or_made_first(monkeypatch):
    moved = []
    monkeypatch.setattr(strategy_file, "move_module", lambda module, device: moved.append((module, device)))
    module, unmade = nn.Linear(1, 1), nn.Linear(1, 1, device="meta")
    model_parallel(1, 1, pipeline_parallel_size=2).module_to_device(module)
    model_parallel().module_to_device(unmade)
    assert moved == []
    model_parallel().module_to_device(module)
    assert moved == [(module, CPU)]


def test_modules_whose_layers_or_sequences_cannot_be_shared_are_told():
    strategy = model_parallel(1, 2, context_parallel_size=2)
    for module, is_by_hand, what in (
        (nn.Sequential(nn.Linear(1, 1)), False, "Sequential has no repeated blocks"),
        (
            nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)),
            True,
            "Sequential is cut by `fully_shard` in `configure_model`",
        ),
    ):
        assert told(strategy._share_sequences, module, is_by_hand) == (
            "context_parallel_size=2 shares sequences in the repeated blocks of a module (of a ModuleList, ModuleDict or Sequential), "
            f"which it cuts itself, and {what}. Change that, or use context_parallel_size=1."
        )
    for size in (1, 2):
        strategy.device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda size=size: size)}
        if size == 1:
            strategy._cut_layers(module)
    assert told(strategy._cut_layers, module) == (
        "2 processes are to share each layer, and no layer of Sequential is cut. Cut it in `configure_model` with "
        "self.device_mesh['tensor_parallel'], or pass ModelParallelStrategy(plan={'blocks.*.up': 'column', 'blocks.*.down': 'row'})."
    )


def test_a_pipeline_needs_a_torch_whose_stages_find_each_other(monkeypatch):
    from levin.strategies import pipeline

    monkeypatch.delattr(pipeline.PipelineStage, "_warmup_forward_vote", raising=False)
    assert told(pipeline.check_cpu) == (
        f"A pipeline on the CPU needs a newer torch (2.13 does it), received torch {torch.__version__}. Install one, or use an "
        "accelerator."
    )
    piped = model_parallel(1, 1, pipeline_parallel_size=2)
    assert "needs a newer torch" in told(piped.check_mesh, 2)
    piped.parallel_devices = [torch.device("cuda:0")] * 2
    piped.check_mesh(2)
    model_parallel(1, 2).check_mesh(2)


def test_a_mesh_of_copies_fits_the_processes():
    strategy = FSDPStrategy(device_mesh=(2, 3))
    strategy.parallel_devices = [torch.device("cuda:0")] * 6
    strategy.check_mesh(6)
    assert told(strategy.check_mesh, 5) == (
        "device_mesh=(2, 3) is made for 6 processes, but there are 5 (devices=6, num_nodes=1). Choose numbers whose product is 5."
    )


def test_a_precision_of_the_users_may_clip():
    class Clipping(Precision):
        clips_gradients = True
        seen: list = []

        def clip_gradients(self, optimizer, clip_val, algorithm):
            self.seen.append((clip_val, algorithm.value))

    module = nn.Linear(1, 1)
    strategy, optimizer = SingleDeviceStrategy(precision=Clipping()), torch.optim.SGD(module.parameters(), 0.1)
    for how in ({"clip_val": 2.0}, {"max_norm": 3.0}, {"max_norm": 0.0}):
        assert strategy.clip_gradients(module, optimizer, **how) is None
    assert Clipping.seen == [(2.0, "value"), (3.0, "norm"), (0.0, "norm")]


def test_weights_are_set_up_saved_and_loaded_where_they_are():
    strategy, module = SingleDeviceStrategy("meta", precision=DoublePrecision()), nn.Linear(1, 1)
    assert strategy.setup_module(module, move_to_device=False) is module
    assert (module.weight.dtype, module.weight.device) == (torch.float64, CPU)
    assert strategy.model is strategy.lightning_module is None
    assert strategy.setup_module(nn.Linear(1, 1)).weight.device.type == "meta"
    strategy._lightning_module = own = nn.Linear(1, 1)
    assert strategy.setup_module(own) is strategy.model is own and own.weight.device.type == "meta"
    state = strategy.module_state(module)
    assert state.keys() == {"weight", "bias"}
    strategy.load_module_state(module, {"weight": torch.full((1, 1), 7.0), "bias": torch.zeros(1)})
    assert module.weight.item() == 7.0
    with pytest.raises(RuntimeError, match="Missing key"):
        strategy.load_module_state(module, {"weight": state["weight"]})
    strategy.load_module_state(module, {"weight": torch.full((1, 1), 8.0)}, strict=False)
    assert module.weight.item() == 8.0
    calls = []
    strategy.checkpoint_io = SimpleNamespace(wait=lambda: calls.append("wait"), check=lambda: calls.append("check"))
    strategy.finish_saves()
    assert calls == ["wait", "check"]
