"""The engine: what is chosen, what is refused, and how it says so."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import re

import pytest
import torch
from torch import nn

from levin.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator
from levin.checkpoint.io import TorchCheckpointIO
from levin.engine import build_engine, describe_devices, resolve_precision_name
from levin.environments import LightningEnvironment, TorchElasticEnvironment
from levin.launchers import MultiProcessingLauncher, SubprocessLauncher
from levin.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from levin.strategies import (
    DDPStrategy,
    LayerSync,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
    TorchSyncBatchNorm,
)
from levin.strategies.extension_points import ExtensionPoints
from levin.strategies.registry import StrategyRegistryType
from levin.utilities.exceptions import MisconfigurationException


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    validation_step = test_step = predict_step = training_step


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def prompt(monkeypatch):
    for place in ("levin.engine", "levin.accelerators.cuda"):
        monkeypatch.setattr(f"{place}.is_interactive", lambda: True)


def test_the_default_is_one_cpu_in_single_precision():
    engine = build_engine()
    assert isinstance(engine.accelerator, CPUAccelerator)
    assert isinstance(engine.strategy, SingleDeviceStrategy)
    assert type(engine.precision) is Precision
    assert (engine.num_devices, engine.device_ids, engine.num_nodes) == (1, [0], 1)
    assert engine.environment is engine.layer_sync is None
    assert engine.strategy.launcher is None
    assert engine.strategy.accelerator is engine.accelerator
    assert engine.strategy.precision is engine.strategy.precision_plugin is engine.precision
    assert isinstance(engine.strategy.checkpoint_io, TorchCheckpointIO)


def test_on_one_device_in_single_precision_the_step_is_the_users_own():
    strategy = build_engine().strategy
    model = Model()
    strategy.setup_environment()
    assert strategy.setup_module(model, for_training=True) is model
    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        assert strategy.step_function(model, name) == getattr(model, name)
    with pytest.raises(ValueError, match=r"name must be a method of Model, received 'fit'"):
        strategy.step_function(model, "fit")


def test_other_precisions_put_their_context_around_the_step():
    strategy = build_engine(precision="bf16-mixed").strategy
    strategy.setup_environment()
    model = strategy.setup_module(Model(), for_training=True)
    assert strategy.step_function(model, "training_step")(torch.ones(3, 2), 0).dtype == torch.bfloat16


def test_a_strategy_of_the_users_may_replace_a_step():
    class Doubling(SingleDeviceStrategy):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs) * 2

    strategy = build_engine(strategy=Doubling()).strategy
    strategy.setup_environment()
    model = Model()
    strategy.connect(model)
    strategy.setup_module(model, for_training=True)
    batch = torch.ones(1, 2)
    assert strategy.step_function(model, "training_step")(batch, 0) == model.training_step(batch, 0) * 2
    assert strategy.step_function(model, "test_step") == model.test_step


@pytest.mark.parametrize(
    ("precision", "kind", "name"),
    [
        (None, Precision, "32-true"),
        ("64-true", DoublePrecision, "64-true"),
        ("16-true", HalfPrecision, "16-true"),
        ("bf16-true", HalfPrecision, "bf16-true"),
        ("bf16-mixed", MixedPrecision, "bf16-mixed"),
        (64, DoublePrecision, "64-true"),
        ("64", DoublePrecision, "64-true"),
        (32, Precision, "32-true"),
        ("32", Precision, "32-true"),
    ],
)
def test_precisions(precision, kind, name):
    engine = build_engine(precision=precision)
    assert type(engine.precision) is kind
    assert engine.precision.precision == name


@pytest.mark.parametrize(("short", "name"), [(16, "16-mixed"), ("16", "16-mixed"), ("bf16", "bf16-mixed")])
def test_short_precisions_warn(short, name):
    with pytest.warns(UserWarning, match=rf"precision={short!r} means '{name}'\. Write precision='{name}'"):
        assert resolve_precision_name(short) == name


def test_half_precision_on_the_cpu_becomes_bfloat16():
    with pytest.warns(UserWarning, match=r"precision='16-mixed' is not supported on the CPU.* Using 'bf16-mixed'"):
        engine = build_engine(precision="16-mixed", accelerator="cpu")
    assert engine.precision.precision == "bf16-mixed"


def test_several_devices_become_ddp():
    engine = build_engine(accelerator="cpu", devices=2)
    assert isinstance(engine.strategy, DDPStrategy)
    assert isinstance(engine.strategy.launcher, SubprocessLauncher)
    assert isinstance(engine.environment, LightningEnvironment)
    assert engine.strategy.environment is engine.strategy.cluster_environment is engine.environment
    assert engine.device_ids == [0, 1]
    assert build_engine(accelerator="cpu", num_nodes=2).strategy.world_size == 2
    for name, method in (("ddp_spawn", "spawn"), ("ddp_fork", "fork"), ("ddp_notebook", "fork")):
        launcher = build_engine(accelerator="cpu", devices=2, strategy=name).strategy.launcher
        assert isinstance(launcher, MultiProcessingLauncher)
        assert launcher.start_method == method


def test_gpus_are_taken_when_they_are_there(two_gpus):
    engine = build_engine()
    assert isinstance(engine.accelerator, CUDAAccelerator)
    assert isinstance(engine.strategy, DDPStrategy)
    assert engine.device_ids == [0, 1]
    assert engine.strategy.root_device == torch.device("cuda", 0)
    assert engine.strategy.process_group_backend == "nccl"
    assert engine.strategy.supports_inference_mode
    one = build_engine(accelerator="gpu", devices=[1], precision="bf16-mixed")
    assert isinstance(one.strategy, SingleDeviceStrategy)
    assert one.strategy.root_device == torch.device("cuda", 1)
    assert one.device_ids == [1]
    # What a strategy was given says more than what there is.
    given = build_engine(strategy=SingleDeviceStrategy("cuda:1"), devices=1)
    assert given.strategy.root_device == torch.device("cuda", 1) and given.device_ids == [1]
    given = build_engine(strategy=DDPStrategy(parallel_devices=[torch.device("cpu")] * 2))
    assert isinstance(given.accelerator, CPUAccelerator) and given.num_devices == 2
    # A strategy by its name, in whatever letters, runs on the device that was chosen.
    named = build_engine(accelerator="gpu", devices=[1], strategy="Single_Device")
    assert named.strategy.root_device == torch.device("cuda", 1)


def test_at_a_prompt(two_gpus, prompt):
    assert build_engine().num_devices == 1
    strategy = build_engine(devices=2).strategy
    assert strategy.launcher.start_method == "fork"
    with pytest.raises(ValueError, match=r"strategy='ddp' starts the script again .* Use strategy='ddp_notebook'"):
        build_engine(devices=2, strategy="ddp")
    with pytest.raises(ValueError, match=r"strategy='ddp_spawn' starts the script again|Use strategy='ddp_notebook'"):
        build_engine(devices=2, strategy="ddp_spawn")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"accelerator": "warp"}, ValueError, r"accelerator must be .* one of auto, gpu, .*cpu.* received 'warp'\. Use 'auto'"),
        ({"accelerator": "gpu"}, RuntimeError, r"accelerator='gpu' is not available on this machine, which has \['cpu'\]"),
        ({"accelerator": "mps"}, MisconfigurationException, r"accelerator='mps' is not available"),
        ({"accelerator": CUDAAccelerator()}, RuntimeError, r"'CUDAAccelerator' is not available"),
        ({"strategy": "magic"}, ValueError, r"strategy must be .* ddp, .* received 'magic'\. Use 'auto'"),
        ({"devices": 0}, ValueError, r"devices must be > 0, received 0\. Use 1 for one process"),
        ({"devices": []}, ValueError, r"devices must name at least one device, received \[\]"),
        ({"devices": [0]}, TypeError, r"devices must be an int > 0 with accelerator='cpu'"),
        ({"num_nodes": 0}, ValueError, r"num_nodes must be an int >= 1, received 0\. Use 1 for a single machine"),
        ({"num_nodes": "2"}, ValueError, r"num_nodes must be an int >= 1, received '2'"),
        ({"precision": "half"}, ValueError, r"precision must be one of '32-true', .* received 'half'\. Use '32-true'"),
        ({"plugins": [5]}, TypeError, r"received 5 of type int"),
        ({"plugins": ["ddp"]}, ValueError, r"plugins must be objects of Precision, CheckpointIO, .* received 'ddp'"),
        ({"plugins": [Precision(), DoublePrecision()]}, ValueError, r"may hold one Precision, received Precision and DoublePrecision"),
        ({"plugins": Precision(), "precision": "32-true"}, ValueError, r"precision='32-true' and the plugin Precision both"),
        ({"strategy": "single_device", "devices": 2}, ValueError, r"runs on one device, received devices=2 and num_nodes=1"),
        (
            {"strategy": "single_device", "devices": 1, "num_nodes": 2},
            ValueError,
            r"runs on one device, received devices=1 and num_nodes=2",
        ),
        (
            {"strategy": SingleDeviceStrategy(accelerator=CPUAccelerator()), "accelerator": "cpu"},
            ValueError,
            r"accelerator is set twice: CPUAccelerator in SingleDeviceStrategy\(accelerator=\.\.\.\) and cpu beside",
        ),
        (
            {"strategy": DDPStrategy(parallel_devices=[torch.device("cpu")] * 2), "devices": 2},
            ValueError,
            r"devices=2 and DDPStrategy\(parallel_devices=\.\.\.\) both name the devices",
        ),
        ({"strategy": SingleDeviceStrategy("cuda:0")}, ValueError, r"does not fit the accelerator 'cpu'"),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_came_and_the_way_out(kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        build_engine(**{"accelerator": "auto", **kwargs})
    assert not isinstance(caught.value, AssertionError)


def test_layer_sync():
    class Other(LayerSync):
        def apply(self, model):
            return model

        def revert(self, model):
            return model

    engine = build_engine(accelerator="cpu", devices=2, sync_batchnorm=True)
    assert isinstance(engine.strategy.layer_sync, TorchSyncBatchNorm)
    given = TorchSyncBatchNorm()
    assert build_engine(plugins=given, sync_batchnorm=True).layer_sync is given
    with pytest.raises(ValueError, match=r"sync_batchnorm=True means TorchSyncBatchNorm, received the plugin Other"):
        build_engine(plugins=[Other()], sync_batchnorm=True)


def test_mps_runs_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    engine = build_engine()
    assert isinstance(engine.accelerator, MPSAccelerator)
    assert engine.strategy.root_device == torch.device("mps", 0)
    for strategy in ("ddp", "ddp_spawn", DDPStrategy()):
        with pytest.raises(ValueError, match=r"cannot be used with accelerator='mps'"):
            build_engine(strategy=strategy)
    with pytest.raises(ValueError, match=r"precision='64-true' cannot be used with accelerator='mps'"):
        build_engine(precision="64-true")


def test_torchrun_is_found_and_its_numbers_are_checked(monkeypatch):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    engine = build_engine(accelerator="cpu", devices=2)
    assert isinstance(engine.environment, TorchElasticEnvironment)
    assert engine.strategy.global_rank == engine.strategy.local_rank == 1
    with pytest.raises(
        ValueError, match=r"must be the 2 processes that torchrun started.* strategy='single_device' where"
    ):
        build_engine(accelerator="cpu", devices="auto")
    # Those that are meant for one of the processes alone.
    with pytest.warns(
        UserWarning, match=r"works for itself: .* the 2 processes that torchrun started.*'single_device' says"
    ):
        assert build_engine(accelerator="cpu", devices=1).strategy.world_size == 1
    for strategy in ("single_device", SingleDeviceStrategy("cpu")):
        assert build_engine(accelerator="cpu", strategy=strategy).strategy.world_size == 1
    monkeypatch.setattr("levin.utilities.rank_zero.rank_zero_only.rank", 0)


def test_a_machine_that_is_not_counted_is_told(monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(
        ValueError, match=r"make 2 processes, and this one would be number 2: it is on machine 1, counted"
    ):
        build_engine(accelerator="cpu", devices=2)


def test_an_engine_can_be_pickled_and_copied():
    for strategy in ("auto", "ddp", "ddp_spawn"):
        engine = build_engine(accelerator="cpu", strategy=strategy)
        for copied in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
            assert type(copied.strategy) is type(engine.strategy)


def test_one_strategy_object_serves_two_trainers():
    strategy = DDPStrategy()
    build_engine(accelerator="cpu", devices=2, strategy=strategy, precision="64-true")
    engine = build_engine(accelerator="cpu", devices=3, strategy=strategy, precision="bf16-true")
    assert engine.strategy.world_size == 3
    assert engine.strategy.precision.precision == "bf16-true"


def test_devices_are_described(caplog, two_gpus):
    caplog.set_level(logging.INFO, logger="levin")
    with pytest.warns(UserWarning, match=r"There is a GPU, and it is not used\. Use `accelerator='gpu'`"):
        describe_devices(build_engine(accelerator="cpu"))
    describe_devices(build_engine(accelerator="gpu", devices=1))
    assert [record.message for record in caplog.records] == [
        "GPU available: True (cuda), used: False",
        "TPU available: False, using: 0 TPU cores",
        "GPU available: True (cuda), used: True",
        "TPU available: False, using: 0 TPU cores",
    ]


def test_what_our_strategies_change_is_in_the_table_of_what_a_strategy_answers():
    strategies = [StrategyRegistry.get_class(name) for name in StrategyRegistry.available_strategies()]
    kinds = {kind for strategy in (*strategies, ModelParallelStrategy) for kind in strategy.__mro__} - set(
        Strategy.__mro__
    )
    table = (inspect.getdoc(Strategy) or "").partition("::")[2].partition("Args:")[0]
    listed = set(re.findall(r"\b[a-z]\w+\b", re.sub(r"(?m)^ {4}\S.*?  ", "", table)))
    assert {name for name in listed if not hasattr(Strategy, name)} == set()
    public = {
        name
        for name, value in inspect.getmembers(Strategy)
        if not name.startswith("_") and not hasattr(ExtensionPoints, name) and not isinstance(value, bool)
    }
    changed = {name for kind in kinds for name in vars(kind) if name in public}
    assert len(changed) > 30 and changed - listed == set()


def test_strategy_registry():
    registry = StrategyRegistryType()
    registry.register("mine", SingleDeviceStrategy, description="mine", device="cpu")
    assert isinstance(registry.get("mine"), SingleDeviceStrategy)
    with pytest.raises(ValueError, match=r"'mine' is taken\. Pass override=True"):
        registry.register("mine", DDPStrategy)

    @registry.register("other", find_unused_parameters=True)
    class Other(DDPStrategy):
        pass

    assert registry.get("other").ddp_kwargs == {"find_unused_parameters": True}
    assert registry.get_class("other") is Other
    registry.remove("mine")
    assert registry.available_strategies() == ["other"]
    with pytest.raises(KeyError, match=r"No strategy is named 'mine'\. Available names: other"):
        registry.get("mine")
    with pytest.raises(TypeError, match="name must be a str"):
        registry.register(DDPStrategy)
    names = {"ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"}
    assert names <= set(StrategyRegistry.available_strategies())
    for name in names:
        assert StrategyRegistry.get(f"{name}_find_unused_parameters_true").ddp_kwargs == {
            "find_unused_parameters": True
        }
        assert StrategyRegistry.get(f"{name}_find_unused_parameters_false").ddp_kwargs == {
            "find_unused_parameters": False
        }


def test_tensors_and_modules_are_made_in_place():
    strategy = build_engine(precision="64-true").strategy
    with strategy.tensor_init_context():
        assert torch.zeros(1).dtype == torch.float64
    with strategy.module_init_context():
        assert nn.Linear(1, 1).weight.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    with strategy.module_init_context(empty_init=True):
        tensor = torch.full((2, 2), 7.0)
        assert nn.init.kaiming_uniform_(tensor) is tensor
        for initialize in (
            nn.init.ones_,
            nn.init.zeros_,
            nn.init.xavier_uniform_,
            nn.init.trunc_normal_,
            nn.init.orthogonal_,
        ):
            initialize(tensor=tensor)
        assert tensor.eq(7.0).all()
        # What is no initialization is done.
        assert tensor.fill_(1.0).eq(1.0).all()


def test_teardown_brings_states_to_the_cpu_and_parts_are_told():
    told = []

    class Telling(TorchCheckpointIO):
        def teardown(self) -> None:
            told.append("io")

    strategy = build_engine(plugins=[Telling()]).strategy
    strategy.setup_environment()
    model = Model()
    strategy.connect(model)
    strategy.setup_module(model, for_training=True)
    optimizer = torch.optim.Adam(model.parameters())
    strategy.optimizers = [strategy.setup_optimizer(optimizer)]
    loss = strategy.step_function(model, "training_step")(torch.ones(1, 2), 0)
    assert strategy.backward(loss) is loss
    strategy.optimizer_step(optimizer)
    strategy.teardown()
    assert told == ["io"]
    assert strategy.model is model
    assert all(value.device.type == "cpu" for state in optimizer.state.values() for value in state.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_real_gpu():
    engine = build_engine(accelerator="gpu", devices=1, precision="16-mixed")
    strategy = engine.strategy
    strategy.setup_environment()
    model = Model()
    strategy.connect(model)
    strategy.setup_module(model, for_training=True)
    assert model.layer.weight.device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters())
    strategy.optimizers = [strategy.setup_optimizer(optimizer)]
    step = strategy.step_function(model, "training_step")
    batch = strategy.batch_to_device(torch.ones(4, 2))

    def closure():
        loss = step(batch, 0)
        assert loss.dtype == torch.float16
        strategy.backward(loss)
        return loss

    strategy.optimizer_step(optimizer, closure)
    strategy.teardown()
    assert model.layer.weight.device.type == "cpu"
    assert all(value.device.type == "cpu" for state in optimizer.state.values() for value in state.values())
