"""The same loop of one's own on the installed Lightning's Fabric and on levin's: values, files and errors."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import levin
from levin.fabric import Fabric as OurFabric
from levin.fabric import is_wrapped as our_is_wrapped
from tests.parity.fabric_rows import Net, Recorder, data, objects, plain, same

lightning = pytest.importorskip("lightning.fabric")
FRAMEWORKS = {"levin": OurFabric, "lightning": lightning.Fabric}
REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, OSError)


def answer(call: Callable[[], Any]) -> Any:
    """Return what a call, right or wrong, is answered with: a value, or the error with which the framework refuses it."""
    try:
        return plain(call())
    except REFUSALS as error:
        return error


def both(function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    found = {}
    for name, framework in FRAMEWORKS.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = answer(lambda framework=framework: function(framework, *args))
    return found


def assert_same(function: Callable[..., Any], *args: Any) -> Any:
    found = both(function, *args)
    assert same(found["lightning"], found["levin"]), found
    return found["levin"]


# ---------------------------------------------------------------- one process


def train(framework: Any, precision: Any = None, num_nets: int = 1, clip: dict[str, Any] | None = None) -> Any:
    fabric = framework(accelerator="cpu", devices=1, precision=precision)
    nets = [Net() for _ in range(num_nets)]
    pairs = [fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.01)) for net in nets]
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=4, shuffle=True))
    seen = []
    for _ in range(3):
        for x, y in loader:
            for model, optimizer in pairs:
                optimizer.zero_grad()
                output = model(x)
                loss = nn.functional.mse_loss(output, y.to(output.dtype))
                fabric.backward(loss)
                norm = fabric.clip_gradients(model, optimizer, **clip) if clip else None
                optimizer.step()
                seen.append((loss, norm, output))
    return seen, [model.state_dict() for model, _ in pairs]


@pytest.mark.parametrize("precision", [None, "32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_a_loop_gives_the_same_losses_and_weights_in_each_precision(precision):
    assert not isinstance(assert_same(train, precision), Exception)


class Seen(nn.Module):
    """Notes in what type its inputs come, what autocast says and what a layer that is used twice learns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.seen: list[Any] = []

    def forward(self, x: Any, *, more: Any) -> Any:
        is_cached = torch.is_autocast_cache_enabled()
        self.seen.append((str(x.dtype), str(more["it"].dtype), is_cached, torch.is_autocast_enabled("cpu")))
        return self.layer(self.layer(x * 1.001)) + more["it"].float().mean()


def run_forward(framework: Any, precision: str, dtype: torch.dtype, is_plugin: bool) -> Any:
    if is_plugin:
        module = "levin.precision" if framework is OurFabric else "lightning.fabric.plugins"
        plugins = importlib.import_module(module).MixedPrecision(precision, "cpu")
        fabric = framework(accelerator="cpu", devices=1, plugins=plugins)
    else:
        fabric = framework(accelerator="cpu", devices=1, precision=precision)
    net = fabric.setup(Seen())
    x = torch.linspace(0, 1, 12).reshape(4, 3).to(dtype)
    output = net(x, more={"it": torch.ones(2) if dtype == torch.float64 else torch.ones(2, dtype=torch.int64)})
    fabric.backward(output.sum())
    with fabric.autocast():
        net.seen.append(torch.is_autocast_cache_enabled())
    return net.seen, str(output.dtype), output, net.layer.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision, is_plugin", [("bf16-mixed", False), ("bf16-mixed", True), ("bf16-true", False)])
def test_inputs_come_in_the_type_of_the_precision_and_weights_are_cast_once(precision, is_plugin, dtype):
    assert not isinstance(assert_same(run_forward, precision, dtype, is_plugin), Exception)


@pytest.mark.parametrize(
    "clip",
    [{"max_norm": 0.01}, {"clip_val": 0.001}, {"max_norm": 0.01, "norm_type": 1.0}, {"max_norm": 1.0, "norm_type": float("inf")}],
    ids=str,
)  # fmt: skip
def test_clipping_gives_the_same_norms_and_weights(clip):
    assert not isinstance(assert_same(train, None, 1, clip), Exception)


def test_two_modules_with_two_optimizers_train_side_by_side():
    assert not isinstance(assert_same(train, None, 2), Exception)


def pieces(framework: Any) -> dict[str, Callable[[], Any]]:
    """Return calls on a Fabric of one process, by name."""
    fabric = framework(accelerator="cpu", devices=1)
    is_wrapped = our_is_wrapped if framework is OurFabric else lightning.is_wrapped
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, stepper = fabric.setup(net, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=4))
    other = nn.Linear(1, 1)

    def one(kind: type) -> Any:
        return torch.optim.SGD(kind(1, 1).parameters(), lr=1)

    def attribute() -> Any:
        model.extra = 3
        return net.extra, model.extra, "extra" in vars(model), model.layers is net.layers, model.module is net

    def modes() -> Any:
        model.eval()
        inner = net.training, net.layers[2].training
        model.train()
        return inner, net.training

    def marked(name: Any) -> Any:
        model.mark_forward_method(name)
        return tuple(model.generate(torch.ones(1, 4)).shape)

    def stepped() -> Any:
        scheduler = torch.optim.lr_scheduler.StepLR(stepper, 1)
        rates = []
        for _ in range(3):
            stepper.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates, stepper.param_groups is optimizer.param_groups, stepper.state is optimizer.state

    def in_contexts() -> Any:
        half = framework(accelerator="cpu", devices=1, precision="bf16-true")
        with half.init_tensor():
            tensor = torch.ones(1)
        with half.init_module():
            module = nn.Linear(2, 2)
        with framework(accelerator="cpu", devices=1, precision="bf16-mixed").autocast():
            product = nn.Linear(2, 2)(torch.ones(1, 2))
        return tensor, str(module.weight.dtype), str(product.dtype), str(torch.get_default_dtype())

    return {
        "setup wrapped": lambda: fabric.setup(model),
        "setup wrapped optimizer": lambda: fabric.setup(other, stepper),
        "setup no optimizer": lambda: type(fabric.setup(other)).__name__.strip("_"),
        "setup order": lambda: [type(x).__name__.strip("_") for x in fabric.setup(other, one(nn.Linear), one(nn.Linear))],
        "setup scheduler": lambda: len(fabric.setup(other, (o := one(nn.Linear)), scheduler=torch.optim.lr_scheduler.StepLR(o, 1))),
        "setup_module wrapped": lambda: fabric.setup_module(model),
        "setup_optimizers none": lambda: fabric.setup_optimizers(),
        "setup_optimizers wrapped": lambda: fabric.setup_optimizers(stepper),
        "setup_optimizers one": lambda: isinstance(fabric.setup_optimizers(one(nn.Linear)), torch.optim.SGD),
        "setup_optimizers two": lambda: isinstance(fabric.setup_optimizers(one(nn.Linear), one(nn.Linear)), tuple),
        "setup_dataloaders none": lambda: fabric.setup_dataloaders(),
        "setup_dataloaders wrapped": lambda: fabric.setup_dataloaders(loader),
        "setup_dataloaders list": lambda: fabric.setup_dataloaders([1, 2]),
        "setup_dataloaders two": lambda: isinstance(fabric.setup_dataloaders(DataLoader(data()), DataLoader(data())), list),
        "loader": lambda: (len(loader), str(loader.device), loader.batch_size, list(loader)),
        "clip none": lambda: fabric.clip_gradients(model, stepper),
        "clip two": lambda: fabric.clip_gradients(model, stepper, clip_val=1.0, max_norm=1.0),
        "clip without gradients": lambda: fabric.clip_gradients(model, stepper, max_norm=1.0),
        "gather": lambda: fabric.all_gather({"a": torch.ones(2), "b": 1.5}),
        "reduce": lambda: fabric.all_reduce(torch.ones(2)),
        "broadcast": lambda: fabric.broadcast({"a": 1}),
        "barrier": lambda: fabric.barrier(),
        "no_backward_sync raw": lambda: fabric.no_backward_sync(net),
        "no_backward_sync": lambda: fabric.no_backward_sync(model).__enter__(),
        "launch no function": lambda: fabric.launch(3),
        "launch without parameters": lambda: fabric.launch(lambda: 3),
        "launch": lambda: fabric.launch(lambda given, x, y: (given is fabric, x, y), 5, y=6),
        "launch nothing": lambda: fabric.launch(),
        "run": lambda: fabric.run(),
        "subclass": lambda: type("Sub", (framework,), {"run": lambda self, a, b=0: (a, b)})(accelerator="cpu", devices=1).run(1, b=2),
        "mark unknown": lambda: marked("nope"),
        "mark forward": lambda: marked("forward"),
        "mark number": lambda: marked(3),
        "mark attribute": lambda: marked("layers"),
        "mark name": lambda: marked("generate"),
        "mark method": lambda: marked(net.generate),
        "attributes": attribute,
        "missing attribute": lambda: model.nope,
        "state": lambda: list(model.state_dict()),
        "names of parameters": lambda: [name for name, _ in model.named_parameters()],
        "modes": modes,
        "steps": stepped,
        "closure": lambda: stepper.step(lambda: torch.tensor(3.0)),
        "is_wrapped": lambda: [is_wrapped(x) for x in (model, stepper, loader, net, optimizer, 3)],
        "isinstance": lambda: (isinstance(stepper, torch.optim.SGD), stepper.optimizer is optimizer, isinstance(model, nn.Module)),
        "properties": lambda: (str(fabric.device), fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.is_global_zero, fabric.loggers),
        "no logger": lambda: fabric.logger,
        "log": lambda: fabric.log("a", 1.0),
        "to_device": lambda: fabric.to_device([torch.ones(1), "a"]),
        "module to_device": lambda: fabric.to_device(other) is other,
        "contexts": in_contexts,
        "seed": lambda: (framework.seed_everything(7), os.environ["PL_SEED_WORKERS"], torch.rand(2)),
    }  # fmt: skip


REFUSED_PIECES = {
    "clip none", "clip two", "launch no function", "launch without parameters", "mark attribute", "mark forward", "mark number",
    "mark unknown", "missing attribute", "no logger", "no_backward_sync raw", "setup wrapped", "setup wrapped optimizer",
    "setup_dataloaders list", "setup_dataloaders none", "setup_dataloaders wrapped", "setup_module wrapped",
    "setup_optimizers none", "setup_optimizers wrapped",
}  # fmt: skip


@pytest.mark.parametrize("name", list(pieces(OurFabric)))
def test_each_method_answers_as_lightnings_does(name):
    found = assert_same(lambda framework: pieces(framework)[name]())
    assert isinstance(found, Exception) == (name in REFUSED_PIECES)


ARGUMENTS: list[dict[str, Any]] = [
    {"devices": 0}, {"devices": []}, {"devices": 2}, {"devices": 2, "strategy": "ddp_spawn"}, {"accelerator": "gpu"},
    {"accelerator": "cuda"}, {"accelerator": "foo"}, {"strategy": "foo"}, {"strategy": 3}, {"precision": "foo"},
    {"plugins": "foo"}, {"plugins": [3]}, {"strategy": "dp"}, {"num_nodes": 2}, {"precision": 16}, {"precision": "bf16"},
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_the_constructor_takes_and_refuses_what_lightnings_does(arguments):
    def make(framework):
        fabric = framework(**{"accelerator": "cpu", **arguments})
        return fabric.world_size, type(fabric.strategy).__name__, fabric.strategy.precision.precision

    assert_same(make)


ENVIRONMENTS: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"LT_DEVICES": "1"}, {"devices": 2}),
    ({"LT_DEVICES": "2"}, {}),
    ({"LT_PRECISION": "64-true"}, {"precision": "32-true"}),
    ({"LT_CLI_USED": "1", "LT_DEVICES": "1"}, {"devices": 2}),
    ({"LT_CLI_USED": "1", "LT_DEVICES": "1"}, {"devices": 1}),
    ({"LT_CLI_USED": "1", "LT_PRECISION": "64-true"}, {"precision": "32-true"}),
    ({"LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu"}, {"accelerator": "cuda"}),
    ({"LT_CLI_USED": "1", "LT_NUM_NODES": "1"}, {"num_nodes": 2}),
]


@pytest.mark.parametrize("environment, arguments", ENVIRONMENTS, ids=str)
def test_the_environment_overrides_what_it_overrides_in_lightning(environment, arguments, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def make(framework):
        fabric = framework(**{"accelerator": "cpu", **arguments})
        return fabric.world_size, fabric.strategy.precision.precision

    assert_same(make)


def test_launching_what_the_command_line_launched_is_refused(monkeypatch):
    monkeypatch.setenv("LT_CLI_USED", "1")
    assert isinstance(assert_same(lambda framework: framework(accelerator="cpu", devices=1).launch()), RuntimeError)
    subclass = {"run": lambda self: 1}
    assert isinstance(
        assert_same(lambda framework: type("Sub", (framework,), subclass)(accelerator="cpu", devices=1)), TypeError
    )


@pytest.mark.parametrize(
    "name",
    ["setup", "setup_module", "setup_optimizers", "setup_dataloaders", "barrier", "broadcast", "all_gather", "all_reduce",
     "save", "load", "init_module", "launch"],
)  # fmt: skip
def test_before_launch_several_devices_refuse_what_lightning_refuses(name, tmp_path):
    torch.save({"a": 1}, tmp_path / "x")

    def call(framework):
        fabric = framework(accelerator="cpu", devices=2, strategy="ddp_spawn")
        net = nn.Linear(1, 1)
        return {
            "setup": lambda: fabric.setup(net),
            "setup_module": lambda: fabric.setup_module(net),
            "setup_optimizers": lambda: fabric.setup_optimizers(torch.optim.SGD(net.parameters(), lr=1)),
            "setup_dataloaders": lambda: fabric.setup_dataloaders(DataLoader(data())),
            "barrier": lambda: fabric.barrier(),
            "broadcast": lambda: fabric.broadcast(1),
            "all_gather": lambda: fabric.all_gather(1.0),
            "all_reduce": lambda: fabric.all_reduce(1.0),
            "save": lambda: fabric.save("x", {}),
            "load": lambda: fabric.load(tmp_path / "x"),
            "init_module": lambda: fabric.init_module().__enter__(),
            "launch": lambda: fabric.launch(),
        }[name]()

    assert isinstance(assert_same(call), Exception)


def test_a_backward_pass_that_precision_takes_part_in_goes_through_fabric():
    def call(framework, precision):
        fabric = framework(accelerator="cpu", devices=1, precision=precision)
        fabric.setup(nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()

    assert isinstance(assert_same(call, "bf16-mixed"), RuntimeError)
    for precision in (None, "bf16-true", "64-true"):
        assert assert_same(call, precision) is None


# ---------------------------------------------------------------- files


FILTERS: list[Any] = [
    None, {}, {"model": lambda name, value: "bias" in name}, {"optimizer": lambda name, value: name == "param_groups"},
    {"step": lambda name, value: False}, {"nope": lambda name, value: True}, {"model": 3}, 3,
]  # fmt: skip


@pytest.mark.parametrize("filter", FILTERS, ids=[str(number) for number in range(len(FILTERS))])
def test_files_hold_the_same_and_each_loads_the_others(filter, tmp_path):
    def save(framework, name):
        fabric = framework(accelerator="cpu", devices=1)
        fabric.save(tmp_path / f"{framework.__module__}.ckpt", objects(fabric), filter=filter)
        return torch.load(tmp_path / f"{framework.__module__}.ckpt", weights_only=True)

    saved = assert_same(save, "x")
    assert isinstance(saved, Exception) == (filter in FILTERS[-3:])
    if isinstance(saved, Exception):
        return
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2

    def load(framework, path, strict):
        fabric = framework(accelerator="cpu", devices=1)
        state = {**objects(fabric, value=0), "more": 1} if not strict else objects(fabric, value=0)
        rest = fabric.load(path, state, strict=strict)
        parts = [state[name].state_dict() for name in ("model", "optimizer", "scheduler", "counter")]
        return rest, parts, state["step"]

    for path in files:
        for strict in (True, False):
            assert_same(load, path, strict)
        assert_same(lambda framework, path: framework(accelerator="cpu", devices=1).load(path), path)


@pytest.mark.parametrize("state", [{"nope": 1}, {}, None], ids=str)
def test_loading_into_other_names(state, tmp_path):
    torch.save({"a": 1, "b": torch.ones(2)}, tmp_path / "x.ckpt")
    for strict in (True, False):
        assert_same(
            lambda framework, strict: framework(accelerator="cpu", devices=1).load(tmp_path / "x.ckpt", state, strict),
            strict,
        )
    assert isinstance(
        assert_same(lambda framework: framework(accelerator="cpu", devices=1).load(tmp_path / "none.ckpt")),
        FileNotFoundError,
    )


def test_load_raw_takes_the_state_of_one_object(tmp_path):
    net = Net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.save(torch.optim.SGD(net.parameters(), lr=0.7).state_dict(), tmp_path / "optimizer.pt")
    torch.save({"layers.0.bias": torch.zeros(8)}, tmp_path / "part.pt")

    def load(framework, name, strict=True):
        fabric = framework(accelerator="cpu", devices=1)
        fresh = nn.Sequential(Net())[0]
        nn.init.zeros_(fresh.layers[0].weight)
        model, optimizer = fabric.setup(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1))
        fabric.load_raw(tmp_path / name, optimizer if "optimizer" in name else model, strict)
        return model.state_dict(), optimizer.param_groups[0]["lr"]

    assert assert_same(load, "net.pt")[0]["layers.0.weight"] == plain(net.layers[0].weight)
    assert assert_same(load, "optimizer.pt")[1] == 0.7
    assert isinstance(assert_same(load, "part.pt"), RuntimeError)
    assert not isinstance(assert_same(load, "part.pt", False), Exception)


# ---------------------------------------------------------------- callbacks, loggers, modules of Lightning's kind


def test_callbacks_and_loggers_see_the_same():
    def run(framework):
        callback, logger = Recorder(), Recorder()
        fabric = framework(accelerator="cpu", devices=1, callbacks=callback, loggers=[logger])
        net = nn.Linear(1, 1)
        _, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1))
        optimizer.step()
        optimizer.step(lambda: 3.0)
        fabric.call("on_one", a=1, b=2, c=3)
        fabric.call("on_one", 5)
        fabric.call("on_all", a=1, c=3)
        fabric.call("attribute")
        fabric.call("nothing")
        fabric.log("a", torch.tensor(2.0))
        fabric.log_dict({"b": 1, "c": torch.tensor(3)}, step=4)
        return callback.seen, logger.seen, fabric.logger is logger

    assert len(assert_same(run)[0]) == 6
    assert isinstance(
        assert_same(
            lambda framework: framework(accelerator="cpu", devices=1, loggers=Recorder()).log("a", torch.ones(2))
        ),
        ValueError,
    )


MODULE_CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "trainer": lambda module, model, optimizer: module.trainer.global_rank,
    "unknown of the trainer": lambda module, model, optimizer: module.trainer.foo,
    "schedulers": lambda module, model, optimizer: module.lr_schedulers(),
    "optimizers": lambda module, model, optimizer: module.optimizers() is optimizer,
    "counters": lambda module, model, optimizer: (module.current_epoch, module.global_step),
    "ranks": lambda module, model, optimizer: (module.global_rank, module.local_rank, str(module.device)),
    "backward": lambda module, model, optimizer: (
        module.manual_backward(model.training_step(torch.ones(2, 2), 0)), module.layer.weight.grad,
    ),
    "clip norm": lambda module, model, optimizer: (
        module.manual_backward(model.training_step(torch.ones(2, 2), 0)),
        module.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm"), module.layer.weight.grad,
    ),
    "clip value": lambda module, model, optimizer: (
        module.manual_backward(model.training_step(torch.ones(2, 2), 0)),
        module.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="value"), module.layer.weight.grad,
    ),
    "clip without a value": lambda module, model, optimizer: module.clip_gradients(optimizer),
    "clip to nothing": lambda module, model, optimizer: (
        module.manual_backward(model.training_step(torch.ones(2, 2), 0)),
        module.clip_gradients(optimizer, gradient_clip_val=0), module.layer.weight.grad,
    ),
    "log a word": lambda module, model, optimizer: module.log("a", "b"),
    "log two values": lambda module, model, optimizer: module.log("a", torch.ones(2)),
    "gather": lambda module, model, optimizer: module.all_gather(torch.ones(2)),
    "logger": lambda module, model, optimizer: (type(module.logger).__name__, len(module.loggers)),
    "hook": lambda module, model, optimizer: module.fabric.call("on_own", a=4, b=5) or module.seen,
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODULE_CALLS))
def test_a_lightning_module_finds_its_surroundings(name):
    import lightning.pytorch

    def run(framework):
        base = levin.LightningModule if framework is OurFabric else lightning.pytorch.LightningModule

        class Module(base):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(1)
                self.layer = nn.Linear(2, 2)
                self.seen: list[Any] = []

            def training_step(self, batch, batch_idx):
                self.log("x", 1.0)
                self.log("y", 2.0, logger=False)
                self.log_dict({"z": torch.tensor(3.0)})
                return self.layer(batch).sum()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

            def on_own(self, a):
                self.seen.append(a)

        logger = Recorder()
        fabric = framework(accelerator="cpu", devices=1, loggers=logger)
        module = Module()
        model, optimizer = fabric.setup(module, module.configure_optimizers())
        return module.fabric is fabric, MODULE_CALLS[name](module, model, optimizer), logger.seen

    found = assert_same(run)
    refused = {"clip without a value", "log a word", "log two values", "schedulers", "unknown of the trainer"}
    assert isinstance(found, Exception) == (name in refused)


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0, 9.0], [2.0, 1.0, float("nan")], [1.0, 1.1, 1.2, 1.0]], ids=str)
def test_a_loop_finds_spikes_of_its_loss(losses, tmp_path):
    from lightning.fabric.utilities import spike

    from levin.compat.fabric_spike import SpikeDetection

    def run(framework):
        kind = SpikeDetection if framework is OurFabric else spike.SpikeDetection
        path = tmp_path / f"{framework.__module__}.json"
        fabric = framework(accelerator="cpu", devices=1)
        detection = kind(window=3, warmup=1, exclude_batches_path=str(path))
        seen = []
        for number, loss in enumerate(losses):
            try:
                detection.on_train_batch_end(fabric, torch.tensor(loss), None, number)
            except RuntimeError as error:
                seen.append((type(error).__name__, str(error), path.read_text()))
        return seen

    found = assert_same(run)
    assert bool(found) == (max(losses) == 9.0 or losses[-1] != losses[-1])


def test_compiled_modules_are_compiled_again_around_the_wrapper():
    def run(framework, again):
        fabric = framework(accelerator="cpu", devices=1)
        net = Net().eval()
        model = fabric.setup(torch.compile(net, backend="eager", dynamic=True), _reapply_compile=again)
        output = model(torch.ones(1, 4))
        return type(model._forward_module).__name__, output, list(model.state_dict())

    assert not isinstance(assert_same(run, True), Exception)
    torch._dynamo.reset()


# ---------------------------------------------------------------- new processes


def worker(fabric: Any, offset: int) -> int:
    return int(fabric.global_rank) + offset


def test_launching_a_function_returns_what_rank_0_returned():
    assert (
        assert_same(lambda framework: framework(accelerator="cpu", devices=2, strategy="ddp_fork").launch(worker, 7))
        == 7
    )
