"""DDP: what the ranks compute together is what one process computes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook
from torch.nn.parallel import DistributedDataParallel

from levin.accelerators import CPUAccelerator
from levin.environments import LightningEnvironment
from levin.precision import DoublePrecision, MixedPrecision, Precision
from levin.strategies import DDPStrategy, StrategyRegistry, TorchSyncBatchNorm
from levin.strategies.layer_sync import CPUSyncBatchNorm
from tests.distributed import world_size


class Model(nn.Module):
    automatic_optimization = True

    def __init__(self, has_unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 2)
        if has_unused:
            self.unused = nn.Linear(4, 2)
        self.forward_calls = 0

    def forward(self, x):
        self.forward_calls += 1
        return self.layer(self.norm(x))

    def training_step(self, batch, batch_idx):
        # The user's own call of forward inside the step is the real one.
        return self(batch).pow(2).mean() + batch_idx

    def validation_step(self, batch, batch_idx):
        return self(batch).mean()


def assembled(strategy=None, precision=None, layer_sync=None, size=2):
    strategy = strategy or DDPStrategy()
    strategy.assemble(
        accelerator=CPUAccelerator(),
        precision=precision or Precision(),
        parallel_devices=[torch.device("cpu")] * size,
        environment=LightningEnvironment(),
        layer_sync=layer_sync,
    )
    strategy.setup_environment()
    return strategy


def set_up(strategy, model, for_training):
    """Set up the module of a Trainer."""
    strategy.connect(model)
    return strategy.setup_module(model, for_training=for_training)


def batch_of(rank: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(rank))


def without_norm(model: Model) -> Model:
    model.norm = nn.Identity()
    return model


@world_size(2)
def test_gradients_are_those_of_one_process_with_all_data():
    rank = dist.get_rank()
    strategy = assembled()
    model = without_norm(Model())
    assert isinstance(set_up(strategy, model, for_training=True), DistributedDataParallel)
    step = strategy.step_function(strategy.model, "training_step")
    strategy.backward(step(batch_of(rank), 0))
    alone = without_norm(Model())
    alone.training_step(torch.cat([batch_of(0), batch_of(1)]), 0).backward()
    torch.testing.assert_close(model.layer.weight.grad, alone.layer.weight.grad)
    assert model.forward_calls == 1
    assert "forward" not in vars(model)


@world_size(2)
def test_ranks_start_from_the_weights_of_rank_zero_and_stay_together():
    rank = dist.get_rank()
    strategy = assembled()
    model = Model()
    with torch.no_grad():
        model.layer.weight.fill_(float(rank))
    set_up(strategy, model, for_training=True)
    assert model.layer.weight.eq(0).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy.setup_optimizer(optimizer)
    step = strategy.step_function(strategy.model, "training_step")
    for index in range(3):
        optimizer.zero_grad()

        def closure(index=index):
            loss = step(batch_of(2 * index + rank), index)
            strategy.backward(loss)
            return loss

        strategy.optimizer_step(optimizer, closure)
    weights = strategy.all_gather(model.layer.weight)
    assert torch.equal(weights[0], weights[1])


@world_size(2)
def test_evaluation_syncs_the_module_once_and_needs_nobody_afterwards():
    rank = dist.get_rank()
    strategy = assembled()
    model = Model()
    with torch.no_grad():
        model.layer.weight.fill_(float(rank))
        model.layer.bias.fill_(float(rank))
        model.norm.running_mean.fill_(float(rank))
        model.norm.running_var.fill_(float(rank))
    model._ddp_params_and_buffers_to_ignore = ["layer.bias", "norm.running_var"]
    assert set_up(strategy, model, for_training=False) is model
    assert model.layer.weight.eq(0).all()
    assert model.norm.running_mean.eq(0).all()
    assert model.layer.bias.eq(rank).all() and model.norm.running_var.eq(rank).all(), "left to each process"
    del model._ddp_params_and_buffers_to_ignore
    step = strategy.step_function(strategy.model, "validation_step")
    assert step == model.validation_step
    # Ranks with different numbers of batches do not wait for each other.
    for index in range(1 + 3 * rank):
        step(batch_of(index), index)


@world_size(2)
def test_validation_in_fit_starts_from_the_buffers_of_rank_zero():
    rank = dist.get_rank()
    strategy = assembled()
    model = Model()
    set_up(strategy, model, for_training=True)
    strategy.step_function(strategy.model, "training_step")(batch_of(rank), 0)
    means = strategy.all_gather(model.norm.running_mean)
    assert not torch.equal(means[0], means[1])
    model._ddp_params_and_buffers_to_ignore = ["norm.running_var"]
    variance = model.norm.running_var.clone()
    strategy.model.broadcast_buffers = False
    strategy.on_validation_start()
    assert torch.equal(model.norm.running_mean, means[rank])
    strategy.model.broadcast_buffers = True
    strategy.on_validation_start()
    assert torch.equal(model.norm.running_mean, means[0]) and torch.equal(model.norm.running_var, variance)
    assert strategy.step_function(strategy.model, "validation_step") == model.validation_step


@world_size(2)
def test_no_sync_keeps_gradients_to_each_rank_until_the_window_closes():
    rank = dist.get_rank()
    strategy = assembled()
    model = without_norm(Model())
    set_up(strategy, model, for_training=True)
    step = strategy.step_function(strategy.model, "training_step")
    with strategy.no_sync(strategy.model):
        strategy.backward(step(batch_of(rank), 0))
    apart = strategy.all_gather(model.layer.weight.grad)
    assert not torch.equal(apart[0], apart[1])
    strategy.backward(step(batch_of(rank + 2), 0))
    together = strategy.all_gather(model.layer.weight.grad)
    assert torch.equal(together[0], together[1])
    with strategy.no_sync(strategy.model, enabled=False):
        pass
    with pytest.raises(TypeError, match=r"no_sync needs a module in DistributedDataParallel, received Model"):
        strategy.no_sync(model)


class ManualModel(Model):
    automatic_optimization = False
    strategy: DDPStrategy

    def training_step(self, batch, batch_idx):
        for factor in (1.0, 3.0):
            self.zero_grad()
            self.strategy.backward(self(batch).mean() * factor)
            gathered = self.strategy.all_gather(self.layer.weight.grad)
            assert torch.equal(gathered[0], gathered[1]), "the gradients of this backward were not averaged"
        with self.strategy.no_sync(self.strategy.model):
            self.zero_grad()
            self.strategy.backward(self(batch).mean())
            gathered = self.strategy.all_gather(self.layer.weight.grad)
            assert not torch.equal(gathered[0], gathered[1])


@pytest.mark.parametrize("setting", ["plain", "find_unused_parameters", "static_graph"])
@world_size(2)
def test_manual_optimization_averages_in_each_backward(setting):
    rank = dist.get_rank()
    strategy = assembled(DDPStrategy(**({} if setting == "plain" else {setting: True})))
    model = without_norm(ManualModel(has_unused=setting == "find_unused_parameters"))
    model.strategy = strategy
    set_up(strategy, model, for_training=True)
    step = strategy.step_function(strategy.model, "training_step")
    for index in range(3):
        step(batch_of(rank + 2 * index), index)
    assert strategy.model.require_backward_grad_sync


@world_size(2)
def test_unused_parameters_are_explained():
    rank = dist.get_rank()
    strategy = assembled()
    set_up(strategy, Model(has_unused=True), for_training=True)
    step = strategy.step_function(strategy.model, "training_step")
    strategy.backward(step(batch_of(rank), 0))
    with pytest.raises(RuntimeError) as caught:
        step(batch_of(rank), 1)
    strategy.on_exception(caught.value)
    assert "use strategy='ddp_find_unused_parameters_true'" in str(caught.value)
    strategy.on_exception(ValueError("another"))

    strategy = assembled(StrategyRegistry.get("ddp_find_unused_parameters_true"))
    set_up(strategy, Model(has_unused=True), for_training=True)
    step = strategy.step_function(strategy.model, "training_step")
    for index in range(3):
        strategy.backward(step(batch_of(rank), index))


@world_size(2)
def test_static_graph_and_other_keywords_reach_torch():
    strategy = assembled(DDPStrategy(static_graph=True, gradient_as_bucket_view=True, bucket_cap_mb=5))
    wrapper = set_up(strategy, without_norm(Model()), for_training=True)
    assert wrapper.static_graph
    assert wrapper.gradient_as_bucket_view
    step = strategy.step_function(strategy.model, "training_step")
    for index in range(3):
        strategy.backward(step(batch_of(index + dist.get_rank()), index))


@world_size(2)
def test_a_static_graph_can_accumulate():
    rank = dist.get_rank()
    strategy = assembled(DDPStrategy(static_graph=True))
    model, alone = without_norm(Model()), without_norm(Model())
    set_up(strategy, model, for_training=True)
    step = strategy.step_function(strategy.model, "training_step")
    for window in range(3):
        model.zero_grad()
        alone.zero_grad()
        for index in (2 * window, 2 * window + 1):
            with strategy.no_sync(strategy.model, enabled=index % 2 == 0):
                strategy.backward(step(batch_of(2 * index + rank), 0))
            for other in range(2):
                (alone.training_step(batch_of(2 * index + other), 0) / 2).backward()
        torch.testing.assert_close(model.layer.weight.grad, alone.layer.weight.grad)


@world_size(2)
def test_communication_hooks_exchange_the_gradients():
    rank = dist.get_rank()
    strategy = assembled(DDPStrategy(ddp_comm_hook=default_hooks.fp16_compress_hook))
    model = without_norm(Model())
    set_up(strategy, model, for_training=True)
    strategy.backward(strategy.step_function(strategy.model, "training_step")(batch_of(rank), 0))
    gradient = model.layer.weight.grad
    # What went through sixteen bits can be said in sixteen bits.
    assert torch.equal(gradient * 2, (gradient * 2).half().float())

    calls = []

    def wrapper(hook):
        def counted(state, bucket):
            calls.append(bucket.index())
            return hook(state, bucket)

        return counted

    strategy = assembled(DDPStrategy(ddp_comm_hook=default_hooks.allreduce_hook, ddp_comm_wrapper=wrapper))
    set_up(strategy, without_norm(Model()), for_training=True)
    strategy.backward(strategy.step_function(strategy.model, "training_step")(batch_of(rank), 0))
    assert calls == [0]


@world_size(2)
def test_weights_are_averaged_in_the_given_period():
    rank = dist.get_rank()
    state = post_localSGD_hook.PostLocalSGDState(
        process_group=None, subgroup=None, start_localSGD_iter=3, post_local_gradient_allreduce=False
    )
    strategy = assembled(
        DDPStrategy(ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook.post_localSGD_hook, model_averaging_period=2)
    )
    model = without_norm(Model())
    set_up(strategy, model, for_training=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy.setup_optimizer(optimizer)
    step = strategy.step_function(strategy.model, "training_step")
    are_equal = []
    for index in range(6):
        optimizer.zero_grad()
        strategy.backward(step(batch_of(2 * index + rank), index))
        strategy.optimizer_step(optimizer)
        weights = strategy.all_gather(model.layer.weight)
        are_equal.append(torch.equal(weights[0], weights[1]))
    # Gradients are shared in the first three steps; from then on each rank goes alone, and every second step they meet.
    assert are_equal == [True, True, True, True, False, True]
    strategy.teardown()
    assert not optimizer._optimizer_step_post_hooks


@world_size(2)
def test_batch_norm_over_all_ranks_is_that_of_one_process():
    rank = dist.get_rank()
    strategy = assembled(layer_sync=TorchSyncBatchNorm())
    model = Model()
    statistics = model.norm.running_mean
    set_up(strategy, model, for_training=True)
    assert type(model.norm).__name__ == "CPUSyncBatchNorm"
    # Batches of different sizes count by their samples.
    batches = [batch_of(0), torch.cat([batch_of(1), 3 + batch_of(2)])]
    out = strategy.model.module(batches[rank])
    (out.pow(2).sum() + 0).backward()
    alone = Model()
    expected = alone(torch.cat(batches))
    expected.pow(2).sum().backward()
    start = 0 if rank == 0 else 6
    torch.testing.assert_close(out, expected[start : start + len(batches[rank])])
    torch.testing.assert_close(model.norm.running_mean, alone.norm.running_mean)
    torch.testing.assert_close(model.norm.running_var, alone.norm.running_var)
    assert model.norm.num_batches_tracked == 1

    strategy.teardown()
    assert isinstance(model.norm, nn.BatchNorm1d)
    assert model.norm.running_mean is statistics
    assert strategy.model is model
    model.eval()
    alone.eval()
    torch.testing.assert_close(model(batches[0]), alone(batches[0]))

    set_up(strategy, model, for_training=False)
    assert isinstance(model.norm, nn.BatchNorm1d)


@world_size(2)
def test_gradients_flow_through_the_statistics_of_all_ranks():
    rank = dist.get_rank()
    strategy = assembled(layer_sync=TorchSyncBatchNorm())
    model = Model()
    set_up(strategy, model, for_training=True)
    strategy.backward(strategy.step_function(strategy.model, "training_step")(batch_of(rank), 0))
    alone = Model()
    alone.training_step(torch.cat([batch_of(0), batch_of(1)]), 0).backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    parts = [torch.randn(4 + each, 4, 3, generator=torch.Generator().manual_seed(each)) for each in range(2)]
    for settings in ({"momentum": None, "eps": 0.3}, {"affine": False}, {"track_running_stats": False}):
        sync, plain = CPUSyncBatchNorm(4, **settings), nn.BatchNorm1d(4, **settings)
        for _ in range(2):
            found, expected = sync(parts[rank]), plain(torch.cat(parts))
            torch.testing.assert_close(found, expected[:4] if rank == 0 else expected[4:])
        torch.testing.assert_close(sync.state_dict(), plain.state_dict())
        torch.testing.assert_close(sync.eval()(parts[rank]), plain.eval()(parts[rank]))


@world_size(2)
def test_precision_holds_inside_the_wrapper():
    rank = dist.get_rank()
    seen = []

    class Seeing(Model):
        def training_step(self, batch, batch_idx):
            out = self(batch)
            seen.append(out.dtype)
            return out.float().mean()

    for precision, dtype in ((MixedPrecision("bf16-mixed", "cpu"), torch.bfloat16), (DoublePrecision(), torch.float64)):
        strategy = assembled(precision=precision)
        set_up(strategy, Seeing(), for_training=True)
        batch = precision.convert_input(batch_of(rank))
        strategy.backward(strategy.step_function(strategy.model, "training_step")(batch, 0))
        assert seen[-1] == dtype


@world_size(2)
def test_frozen_modules_are_not_wrapped_but_made_equal():
    rank = dist.get_rank()
    strategy = assembled()
    model = Model().requires_grad_(False)
    model.layer.weight.fill_(float(rank))
    assert set_up(strategy, model, for_training=True) is model
    assert model.layer.weight.eq(0).all()


@world_size(2)
def test_zero_redundancy_optimizer_state_is_gathered_on_rank_zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank = dist.get_rank()
    strategy = assembled()
    model = without_norm(Model())
    set_up(strategy, model, for_training=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    strategy.setup_optimizer(optimizer)
    strategy.backward(strategy.step_function(strategy.model, "training_step")(batch_of(rank), 0))
    strategy.optimizer_step(optimizer)
    state = strategy.optimizer_state(optimizer)
    assert bool(state) == (rank == 0)
    if rank == 0:
        assert len(state["state"]) == 2


@world_size(2)
def test_the_strategy_speaks_for_all_ranks(tmp_path):
    rank = dist.get_rank()
    strategy = assembled()
    assert (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size) == (rank, rank, 0, 2)
    assert strategy.is_global_zero == (rank == 0)
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": rank}
    assert strategy.process_group_backend == "gloo"
    assert not strategy.supports_inference_mode
    assert strategy.reduce(torch.tensor(float(rank))).item() == 0.5
    assert strategy.all_reduce(float(rank), reduce_op="sum").item() == 1.0
    assert strategy.all_gather(torch.tensor(rank)).tolist() == [0, 1]
    assert strategy.broadcast(rank, src=1) == 1
    assert strategy.reduce_boolean_decision(rank == 0, all=False)
    assert not strategy.reduce_boolean_decision(rank == 0)
    own = [dist.new_group([each]) for each in range(2)][rank]
    assert strategy.reduce(torch.tensor(float(rank)), group=own).item() == rank
    assert strategy.all_gather(torch.zeros(rank + 1), group=own).shape == (1, rank + 1)
    flag = tmp_path / "flag"
    if rank == 1:
        time.sleep(0.5)
        flag.touch()
    strategy.barrier("test")
    assert flag.exists()
    from levin.utilities.rank_zero import rank_zero_only

    assert rank_zero_only.rank == rank


@world_size(2)
def test_a_process_that_has_given_up_the_others_speaks_for_itself():
    rank = dist.get_rank()
    strategy = assembled()
    strategy.barrier("before")
    if rank == 0:  # the other one takes no part any more
        strategy.abandon_peers()
        strategy.barrier("test")
        assert strategy.broadcast("own", src=1) == "own"
        assert strategy.reduce(torch.tensor(3.0)).item() == 3.0
        assert strategy.reduce_boolean_decision(True) and not strategy.reduce_boolean_decision(False, all=False)
        assert strategy.all_gather({"a": torch.tensor(3.0), "b": 2}) == {
            "a": torch.tensor([3.0]),
            "b": torch.tensor([2]),
        }


@world_size(2, connect=False)
def test_processes_connect_once_and_start_from_the_same_seed():
    import os

    from levin.utilities.seed import seed_everything

    rank = int(os.environ["RANK"])
    seed_everything(7, verbose=False)
    torch.rand(rank + 1)
    before = dict(os.environ)
    strategy = assembled(DDPStrategy(timeout=timedelta(seconds=40)))
    # Nothing is left behind but what switches on torch's flight recorder.
    changed = {name for name, value in os.environ.items() if before.get(name) != value}
    assert changed == {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"}
    assert before.keys() <= os.environ.keys()
    values = strategy.all_gather(torch.rand(1))
    assert torch.equal(values[0], values[1])
    strategy.setup_environment()
    with pytest.raises(RuntimeError, match=r"shall be rank 0 of 1, but it is rank"):
        other = DDPStrategy()
        os.environ["LOCAL_RANK"] = "0"
        assembled(other, size=1)


def test_before_the_processes_are_connected(monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    strategy = DDPStrategy()
    assert (strategy.node_rank, strategy.local_rank, strategy.global_rank, strategy.world_size) == (0, 0, 0, 1)
    strategy.assemble(
        accelerator=CPUAccelerator(),
        precision=Precision(),
        parallel_devices=[torch.device("cpu")] * 2,
        num_nodes=3,
        environment=LightningEnvironment(),
    )
    assert (strategy.node_rank, strategy.local_rank, strategy.global_rank, strategy.world_size) == (1, 1, 3, 6)
    assert strategy.broadcast("x") == "x"
    strategy.barrier()


def test_the_environment_is_torn_down_with_the_strategy():
    ended = []

    class Noting(LightningEnvironment):
        def teardown(self):
            ended.append(self)

    strategy = DDPStrategy(cluster_environment=Noting())
    strategy.teardown()
    assert ended == [strategy.environment]
    DDPStrategy().teardown()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start_method": "thread"}, r"start_method must be one of popen, .* received 'thread'"),
        (
            {"find_unused": True},
            r"keywords of DistributedDataParallel, received find_unused\. Use one of: .*find_unused_parameters",
        ),
        ({"timeout": 30}, r"timeout must be a timedelta > 0, received 30"),
        ({"ddp_comm_wrapper": print}, r"ddp_comm_wrapper wraps a ddp_comm_hook"),
        ({"model_averaging_period": 0}, r"model_averaging_period must be an int >= 1, received 0"),
        ({"model_averaging_period": 2}, r"model_averaging_period=2 needs ddp_comm_state=PostLocalSGDState"),
        ({"precision": Precision(), "precision_plugin": Precision()}, r"precision and precision_plugin are the same"),
    ],
)
def test_wrong_arguments_fail_in_the_constructor(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DDPStrategy(**kwargs)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="torch 2.6 gives the threads of Gloo no names to find them by"
)
@pytest.mark.parametrize("work", ["pass", "time.sleep(0.002)", "sum(range(20000))"])
def test_a_run_that_is_complete_ends_well_though_a_thread_of_gloo_is_late(tmp_path, work):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import atexit, time, weakref
            import torch
            import torch.distributed as dist
            from levin.utilities.process_group import disconnect_processes

            def be_slow():
                end = time.monotonic() + 1.5
                while time.monotonic() < end:
                    WORK

            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
            atexit.register(disconnect_processes)
            group = dist.group.WORLD  # which a user may keep: the threads of the group stay with it
            tensor = torch.zeros(1)
            weakref.finalize(tensor, be_slow).atexit = False
            work = dist.all_reduce(tensor, async_op=True)
            del tensor, work  # from here on the thread has the tensor alone
            """
        ).replace("WORK", work)
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
