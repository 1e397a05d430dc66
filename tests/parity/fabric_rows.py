"""What Fabric can do, row by row, as programs that run under Lightning's Fabric and under levin's, in any number of processes.

Each row takes the framework's class and a folder and returns what is compared. An error that belongs to it is caught by
:func:`outcome`; any other one fails the row.
"""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

ROWS: dict[str, Callable[[Any, Path], Any]] = {}


def row(function: Callable[[Any, Path], Any]) -> Callable[[Any, Path], Any]:
    ROWS[function.__name__] = function
    return function


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x)

    def generate(self, x):
        return self.layers(x) * 2

    def name(self):
        return "net"

    def training_step(self, x):
        return self.layers(x).mean()


class Counter:
    """An object with a state."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Recorder:
    """Any object can be a callback and, with log_metrics, a logger."""

    attribute = 3

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_one(self, a, b=1):
        self.seen.append(("one", a, b))

    def on_all(self, **kwargs):
        self.seen.append(("all", sorted(kwargs)))

    def on_after_setup(self, fabric, module):
        self.seen.append(("setup", type(module).__name__.strip("_")))

    def on_after_optimizer_step(self, strategy, optimizer):
        self.seen.append(("step", type(strategy).__name__, type(optimizer).__name__))

    def log_metrics(self, metrics, step=None):
        self.seen.append(("log", dict(metrics), step))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def data(size: int = 12) -> TensorDataset:
    torch.manual_seed(5)
    return TensorDataset(torch.randn(size, 4), torch.randn(size, 1))


def objects(fabric: Any, value: int = 3) -> dict[str, Any]:
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.01))
    if value:
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "counter": Counter(value), "step": value}


# ---------------------------------------------------------------- comparing


def plain(value: Any) -> Any:
    """Return what can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.detach().tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def outcome(call: Callable[[], Any], raises: type[Exception] | None = None) -> Any:
    """Return what the call returns, or the error that belongs to it; another one, or none, fails the row."""
    if raises is None:
        return plain(call())
    try:
        value = call()
    except raises as error:
        return error
    raise AssertionError(f"{raises.__name__} was expected, received {value!r}")


def same(theirs: Any, ours: Any) -> bool:
    return not list(differences(theirs, ours))


def differences(theirs: Any, ours: Any, place: str = "") -> Any:
    """Yield where two results differ. Of an error the kind counts, and ours may be a special case of it."""
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        if not isinstance(ours, type(theirs)):
            yield f"{place}: {theirs!r} of theirs, {ours!r} of ours"
    elif isinstance(theirs, dict) and isinstance(ours, dict) and theirs.keys() == ours.keys():
        for key in theirs:
            yield from differences(theirs[key], ours[key], f"{place}.{key}")
    elif isinstance(theirs, (list, tuple)) and type(theirs) is type(ours) and len(theirs) == len(ours):
        for number, (one, other) in enumerate(zip(theirs, ours)):
            yield from differences(one, other, f"{place}[{number}]")
    elif theirs != ours and not (theirs != theirs and ours != ours):
        yield f"{place}: {theirs!r} of theirs, {ours!r} of ours"


def compare_rows(folder: Path) -> dict[str, str]:
    """Run all rows under both frameworks, in this process as one of those that are there; return what is wrong with each."""
    import lightning.fabric

    from levin.fabric import Fabric

    found = {}
    for name, function in ROWS.items():
        results = {}
        for framework in (lightning.fabric.Fabric, Fabric):
            own = folder / name / framework.__module__
            own.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results[framework] = plain(function(framework, own))
            except Exception as error:
                line = traceback.extract_tb(error.__traceback__)[1].lineno
                found[name] = f"{framework.__module__}: {error!r} in line {line}"
                break
        else:
            found[name] = "\n".join(differences(*results.values()))
    return found


# ---------------------------------------------------------------- the rows


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def make(framework: Any, **arguments: Any) -> Any:
    """Return a Fabric over the processes that are there."""
    size = num_processes()
    fabric = framework(
        **{"accelerator": "cpu", "devices": size, "strategy": "ddp" if size > 1 else "auto", **arguments}
    )
    fabric.launch()
    return fabric


class environment:
    """Sets variables for the time of a block."""

    def __init__(self, **variables: str) -> None:
        self.variables = variables

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@row
def constructor_and_environment(framework, folder):
    size = num_processes()
    strategy = "ddp" if size > 1 else "auto"

    def facts(**arguments: Any) -> Any:
        fabric = framework(**arguments)
        return (
            fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.is_global_zero,
            str(fabric.device), type(fabric.strategy).__name__, type(fabric.accelerator).__name__, fabric.loggers,
            fabric.strategy.precision.precision,
        )  # fmt: skip

    def from_outside(variables: dict[str, str], raises: type[Exception] | None = None, **arguments: Any) -> Any:
        with environment(**variables):
            return outcome(lambda: facts(**arguments), raises)

    said = {"LT_ACCELERATOR": "cpu", "LT_DEVICES": str(size), "LT_STRATEGY": strategy, "LT_NUM_NODES": "1"}
    by_command = {**said, "LT_CLI_USED": "1", "LT_PRECISION": "64-true"}
    return {
        "code": facts(accelerator="cpu", devices=size, strategy=strategy, precision="bf16-mixed"),
        "auto": facts(accelerator="cpu", devices=size),
        "words": facts(accelerator="cpu", devices=str(size), strategy=strategy),
        "environment": from_outside(said),
        "environment wins": from_outside({"LT_PRECISION": "16-true"}, accelerator="cpu", devices=size, precision=64),
        "command": from_outside(by_command),
        "command says the same": from_outside(by_command, devices=size, precision="64-true"),
        "command says another": from_outside(by_command, ValueError, devices=size + 1),
        "another precision": from_outside(by_command, ValueError, precision="32-true"),
        "another number of machines": from_outside(by_command, ValueError, num_nodes=2),
        "no devices": outcome(lambda: facts(accelerator="cpu", devices=0), ValueError),
        "no such strategy": outcome(lambda: facts(accelerator="cpu", devices=size, strategy="foo"), ValueError),
        "no GPU": outcome(lambda: facts(accelerator="gpu", devices=size), RuntimeError),
        "a plugin of no kind": outcome(lambda: facts(accelerator="cpu", devices=size, plugins="foo"), TypeError),
    }


@row
def launch_and_run(framework, folder):
    size = num_processes()
    arguments: Any = {"accelerator": "cpu", "devices": size, "strategy": "ddp" if size > 1 else "auto"}
    fabric = framework(**arguments)
    early = outcome(fabric.barrier, RuntimeError if size > 1 else None)

    class Program(framework):
        def run(self, a, b=0):
            return self.all_reduce(torch.tensor(float(self.global_rank))), a, b

    with environment(LT_CLI_USED="1"):
        by_command = {
            "launch": outcome(lambda: framework(**arguments).launch(), RuntimeError),
            "run": outcome(lambda: Program(**arguments), TypeError),
        }
    return {
        "before": early,
        "nothing": fabric.launch(),
        "function": fabric.launch(lambda given, x, y: (given is fabric, given.global_rank, x, y), 5, y=6),
        "number": outcome(lambda: fabric.launch(3), TypeError),
        "without parameters": outcome(lambda: fabric.launch(lambda: 3), TypeError),
        "run": Program(**arguments).run(1, b=2),
        "default run": fabric.run(),
        "by the command line": by_command,
    }


@row
def setup(framework, folder):
    fabric = make(framework)
    net, other = Net(), nn.Linear(1, 1)
    model, first, second = fabric.setup(
        net, torch.optim.SGD(net.layers[0].parameters(), lr=0.1), torch.optim.Adam(net.layers[3].parameters(), lr=0.01)
    )
    separate = fabric.setup_module(other)
    third, fourth = fabric.setup_optimizers(
        torch.optim.SGD([other.weight], lr=0.1), torch.optim.SGD([other.bias], lr=1.0)
    )
    train = fabric.setup_dataloaders(DataLoader(data(), batch_size=3, shuffle=True))
    for epoch in range(2):
        for number, (x, _) in enumerate(train):
            fabric.backward(separate(model(x)).square().mean())
            for optimizer in (first, second, third, fourth)[: 2 + 2 * (number % 2)]:
                optimizer.step()
                optimizer.zero_grad(set_to_none=epoch == 0)
    samples: dict[str, Any] = {}
    for kwargs in ({"shuffle": True}, {}, {"sampler": [4, 3, 2, 1, 0]}, {"batch_size": 2, "drop_last": True}):
        split = fabric.setup_dataloaders(DataLoader(range(5), **kwargs))
        samples[str(kwargs)] = [[batch.tolist() for batch in split] for _ in range(2)]
    whole = fabric.setup_dataloaders(DataLoader(range(5)), use_distributed_sampler=False)
    stream, unmoved = fabric.setup_dataloaders(DataLoader(Stream()), DataLoader(range(2)), move_to_device=False)
    scheduled = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(scheduled.parameters(), lr=1)
    with_scheduler = fabric.setup(
        scheduled, optimizer, scheduler=(scheduler := torch.optim.lr_scheduler.StepLR(optimizer, 1))
    )
    return {
        "weights": (model.state_dict(), separate.state_dict()),
        "samples": samples,
        "not split": [batch.tolist() for batch in whole],
        "stream": ([batch.tolist() for batch in stream], len(list(unmoved)), str(stream.device)),
        "scheduler": (len(with_scheduler), with_scheduler[2] is scheduler),
        "not moved": str(fabric.setup(nn.Linear(1, 1, device="meta"), move_to_device=False).weight.device)
        if num_processes() == 1
        else None,
        "twice": [
            outcome(lambda: fabric.setup(model), ValueError),
            outcome(lambda: fabric.setup(nn.Linear(1, 1), first), ValueError),
            outcome(lambda: fabric.setup_module(model), ValueError),
            outcome(lambda: fabric.setup_optimizers(first), ValueError),
            outcome(lambda: fabric.setup_dataloaders(train), ValueError),
        ],
        "none": [outcome(fabric.setup_optimizers, ValueError), outcome(fabric.setup_dataloaders, ValueError)],
        "no loader": outcome(lambda: fabric.setup_dataloaders(range(3)), TypeError),
    }


@row
def backward_clipping_autocast_and_accumulation(framework, folder):
    def train(precision: str | None = None, **clip: Any) -> Any:
        fabric = make(framework, precision=precision)
        net = Net()
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=2, shuffle=True))
        torch.manual_seed(fabric.global_rank)
        seen = []
        for index, (x, y) in enumerate(loader):
            is_accumulating = index % 2 == 0
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                output = model(x)
                loss = nn.functional.mse_loss(output, y.to(output.dtype))
                fabric.backward(loss)
            seen.append((loss, net.layers[0].weight.grad.sum()))
            if not is_accumulating:
                seen.append(fabric.clip_gradients(model, optimizer, **clip) if clip else None)
                optimizer.step()
                optimizer.zero_grad()
        return seen, model.state_dict()

    fabric = make(framework)
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(model(torch.full((1, 4), math.nan)).sum())
    mixed = make(framework, precision="bf16-mixed")
    mixed_model = mixed.setup(Net())
    with mixed.autocast():
        product = nn.Linear(2, 2)(torch.ones(1, 2))
    return {
        "precisions": {name: train(name) for name in ("32-true", "64-true", "bf16-true", "bf16-mixed")},
        "value": train(clip_val=0.001),
        "norm": train(max_norm=0.01),
        "1-norm": train(max_norm=0.01, norm_type=1.0),
        "largest": train(max_norm=0.01, norm_type=math.inf),
        "mixed norm": train("bf16-mixed", max_norm=0.01),
        "nan is an error": outcome(lambda: fabric.clip_gradients(model, optimizer, max_norm=1.0), RuntimeError),
        "nan is taken": fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False),
        "nan is taken of the 1-norm": fabric.clip_gradients(
            model, optimizer, max_norm=1.0, norm_type=1, error_if_nonfinite=False
        ),
        "both": outcome(lambda: fabric.clip_gradients(model, optimizer, clip_val=1.0, max_norm=1.0), ValueError),
        "neither": outcome(lambda: fabric.clip_gradients(model, optimizer), ValueError),
        "autocast": (str(product.dtype), str(mixed_model(torch.ones(1, 4)).dtype)),
        "past fabric": outcome(lambda: mixed_model(torch.ones(1, 4)).sum().backward(), RuntimeError),
        "not set up": outcome(lambda: fabric.no_backward_sync(net), TypeError),
        "kept": outcome(lambda: backward_twice(fabric, model)),
    }


def backward_twice(fabric: Any, model: nn.Module) -> Any:
    model.zero_grad()
    model.eval()
    loss = model(torch.ones(1, 4)).sum()
    with fabric.no_backward_sync(model):
        fabric.backward(loss, retain_graph=True)
        fabric.backward(loss)
    return model.module.layers[3].bias.grad


@row
def init_and_to_device(framework, folder):
    found = {}
    for precision in ("bf16-true", "64-true", "bf16-mixed"):
        fabric = make(framework, precision=precision)
        with fabric.init_tensor():
            tensor = torch.arange(2.0)
        with fabric.init_module():
            torch.manual_seed(1)
            module = nn.Linear(2, 2)
        with fabric.init_module(empty_init=True):
            empty = nn.Linear(2, 2)
        with fabric.sharded_model():
            old = nn.Linear(2, 2)
        found[precision] = tensor, module.weight, str(empty.weight.dtype), str(old.weight.dtype), str(tensor.device)
    moved = fabric.to_device({"a": torch.ones(1), "b": [torch.zeros(1), "word"]})
    return found, str(torch.get_default_dtype()), moved, fabric.to_device(module) is module


@row
def collectives_and_rank_zero_first(framework, folder):
    fabric = make(framework)
    rank = fabric.global_rank
    gathered = torch.ones(2, requires_grad=True)
    parts = fabric.all_gather(gathered * (rank + 1), sync_grads=True)
    parts.sum().backward()
    order = {}
    for local in (False, True):
        marks = folder.parent / f"order-{framework.__module__}-{local}"
        with fabric.rank_zero_first(local=local):
            time.sleep(0.2 if rank == 0 else 0.0)
            with marks.open("a") as file:
                file.write(f"{rank} ")
        fabric.barrier("all wrote")
        order[str(local)] = marks.read_text()
    fabric.print("printed once" if rank == 0 else "never printed", file=sys.stderr)
    return {
        "gather": fabric.all_gather({"a": torch.ones(2) * rank, "b": [1.0, torch.tensor(rank)]}),
        # Whole numbers have torch's own type here, half of its width there.
        "gather numbers": fabric.all_gather([rank, True])[0].tolist(),
        "gather a scalar": fabric.all_gather(torch.tensor(rank)),
        "gather with gradients": (parts, gathered.grad),
        **{
            f"reduce {op}": fabric.all_reduce({"a": torch.ones(2) * rank, "b": float(rank)}, reduce_op=op)
            for op in ("mean", "sum")
        },
        "reduce integers": fabric.all_reduce(torch.tensor(rank + 1), reduce_op="sum"),
        "reduce by default": fabric.all_reduce(torch.tensor(rank + 2.0)),
        "broadcast": fabric.broadcast({"rank": rank, "x": torch.ones(1) * rank}, src=num_processes() - 1),
        "broadcast of 0": fabric.broadcast(rank),
        "order": order,
    }


FILTERS: dict[str, Any] = {
    "none": None,
    "empty": {},
    "biases": {"model": lambda name, value: "bias" in name},
    "groups": {"optimizer": lambda name, value: name == "param_groups"},
    "plain value": {"step": lambda name, value: False},
    "unknown": {"nope": lambda name, value: True},
    "number": {"model": 3},
    "no dict": 3,
}
REFUSED_FILTERS = {"unknown": ValueError, "number": TypeError, "no dict": TypeError}
# A file that lacks so much of an object cannot be loaded strictly, or not at all.
TOO_LITTLE = {("biases", True): RuntimeError, ("groups", True): KeyError, ("groups", False): KeyError}


@row
def save_load_and_filters(framework, folder):
    fabric = make(framework)
    found: dict[str, Any] = {}
    for name, filter in FILTERS.items():
        path = folder / f"{name}.ckpt"
        found[name] = outcome(
            lambda path=path, filter=filter: fabric.save(path, objects(fabric), filter=filter),
            REFUSED_FILTERS.get(name),
        )
        if name in REFUSED_FILTERS:
            continue
        found[name] = {"file": torch.load(path, weights_only=True)}
        for strict in (True, False):
            state = {**objects(fabric, value=0), **({} if strict else {"more": 1})}
            rest = outcome(
                lambda path=path, state=state, strict=strict: fabric.load(path, state, strict=strict),
                TOO_LITTLE.get((name, strict)),
            )
            found[name][f"strict {strict}"] = rest, [
                state[key].state_dict() for key in ("model", "optimizer", "scheduler", "counter")
            ], state["step"]  # fmt: skip
        found[name]["all"] = fabric.load(path)
    path = folder / "none.ckpt"
    # Of Lightning's, which was here before.
    (first,) = folder.parent.glob("lightning*/none.ckpt")
    state = objects(fabric, value=0)
    found["of Lightning"] = fabric.load(first, state), state["model"].state_dict(), state["step"]
    found["unknown name"] = outcome(lambda: fabric.load(path, {"nope": 1}), KeyError)
    found["unknown name is left"] = list(fabric.load(path, {"nope": 1}, strict=False))
    found["some"] = sorted(fabric.load(path, {"step": 0}))
    found["no file"] = outcome(lambda: fabric.load(folder / "absent.ckpt"), FileNotFoundError)
    net = Net()
    if fabric.global_rank == 0:
        torch.save(net.state_dict(), folder / "net.pt")
        torch.save(torch.optim.SGD(net.parameters(), lr=0.7).state_dict(), folder / "optimizer.pt")
        torch.save({"layers.0.bias": torch.zeros(8)}, folder / "part.pt")
    fabric.barrier()
    for name, strict in (("net", True), ("optimizer", True), ("part", True), ("part", False)):
        fresh = Net()
        nn.init.zeros_(fresh.layers[0].weight)
        model, optimizer = fabric.setup(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1))
        obj = optimizer if name == "optimizer" else model
        loaded = outcome(
            lambda name=name, strict=strict, obj=obj: fabric.load_raw(folder / f"{name}.pt", obj, strict),
            RuntimeError if (name, strict) == ("part", True) else None,
        )
        found[f"raw {name} {strict}"] = loaded, model.state_dict(), optimizer.param_groups[0]["lr"]
    return found


@row
def callbacks(framework, folder):
    one, other = Recorder(), Recorder()
    fabric = make(framework, callbacks=[one, other])
    net = nn.Linear(1, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1))
    fabric.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    optimizer.step(lambda: 3.0)
    fabric.call("on_one", a=1, b=2, c=3)
    fabric.call("on_one", 5)
    fabric.call("on_all", a=1, c=3)
    fabric.call("attribute")
    fabric.call("nothing")
    return one.seen, other.seen, outcome(lambda: fabric.call("on_one"), TypeError)


@row
def loggers(framework, folder):
    one, other = Recorder(), Recorder()
    fabric = make(framework, loggers=[one, other])
    fabric.log("a", torch.tensor(2.0))
    fabric.log_dict({"b": 1, "c": torch.tensor(3)}, step=4)
    alone = make(framework)
    alone.log("a", 1.0)
    return {
        "seen": (one.seen, other.seen),
        "properties": (fabric.logger is one, fabric.loggers == [one, other]),
        "two values": outcome(lambda: fabric.log("a", torch.ones(2)), ValueError),
        "none": outcome(lambda: alone.logger, IndexError),
    }


@row
def wrappers(framework, folder):
    if framework.__module__.startswith("levin"):
        from levin.fabric import is_wrapped
    else:
        from lightning.fabric import is_wrapped
    fabric = make(framework)
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(range(4), batch_size=2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    model.extra = 3
    model.eval()
    x = torch.ones(1, 4)
    return {
        "is_wrapped": [is_wrapped(obj) for obj in (model, optimizer, loader, net, optimizer.optimizer, 3)],
        "attributes": (net.extra, model.extra, model.layers is net.layers, model.module is net, net.training),
        "missing": outcome(lambda: model.nope, AttributeError),
        "names": [name for name, _ in model.named_parameters()],
        "state": list(model.state_dict()),
        "optimizer": (isinstance(optimizer, torch.optim.SGD), optimizer.param_groups[0]["lr"], optimizer.state_dict()),
        "loader": (len(loader), loader.batch_size, str(loader.device)),
        "past the strategy": outcome(lambda: model.generate(x), RuntimeError if num_processes() > 1 else None),
        "harmless": outcome(lambda: model.name()),
        "step": outcome(lambda: model.training_step(x)),
        "marked": outcome(lambda: (model.mark_forward_method("generate"), model.generate(x))[1]),
        "marked by itself": outcome(lambda: (model.mark_forward_method(net.generate), model.generate(x))[1]),
        "cannot be marked": [
            outcome(lambda word=word: model.mark_forward_method(word), kind)
            for word, kind in (
                ("nope", AttributeError),
                ("forward", ValueError),
                (3, TypeError),
                ("layers", AttributeError),
            )  # fmt: skip
        ],
    }


@row
def torch_compile(framework, folder):
    found = []
    for again in (True, False):
        fabric = make(framework)
        net = Net().eval()
        compiled = torch.compile(net, backend="eager", dynamic=True)
        model = fabric.setup(compiled, _reapply_compile=again)
        output = model(torch.ones(1, 4))
        fabric.backward(output.sum())
        found.append(
            (type(model._forward_module).__name__, output, net.layers[0].weight.grad, list(model.state_dict()))
        )
        torch._dynamo.reset()
    return found


@row
def lightning_module(framework, folder):
    if framework.__module__.startswith("levin"):
        from levin import LightningModule
    else:
        from lightning.pytorch import LightningModule

    class Module(LightningModule):
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

        def on_own(self, a):
            self.seen.append(a)

    logger = Recorder()
    fabric = make(framework, loggers=logger)
    module = Module()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    loss = model.training_step(torch.ones(2, 2) * (1 + fabric.global_rank), 0)
    module.manual_backward(loss)
    module.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
    gradient = module.layer.weight.grad.clone()
    optimizer.step()
    fabric.call("on_own", a=4, b=5)
    return {
        "values": (loss, gradient, module.state_dict()),
        "surroundings": (module.fabric is fabric, module.optimizers() is optimizer, module.trainer.global_rank),
        "place": (str(module.device), module.current_epoch, module.global_step),
        "gather": module.all_gather(torch.ones(2) * fabric.global_rank),
        "logged": logger.seen,
        "called": module.seen,
        "unknown": outcome(lambda: module.trainer.foo, AttributeError),
        "schedulers": outcome(lambda: module.lr_schedulers(), AttributeError),
    }


def cut(module: nn.Module, mesh: Any) -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


@row
def strategies(framework, folder):
    size = num_processes()
    found: dict[str, Any] = {}
    for name in ("ddp", "ddp_find_unused_parameters_true"):
        fabric = make(framework, strategy=name)
        net = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
        torch.manual_seed(2)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        model = Branches(net)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for number in range(2):
            fabric.backward(
                model(torch.ones(1, 2) * (1 + fabric.global_rank), number % 2 if "unused" in name else None)
            )
            optimizer.step()
            optimizer.zero_grad()
        found[name] = type(fabric.strategy).__name__, net.state_dict()
    found["dp"] = type(framework(accelerator="cpu", devices=size, strategy="dp").strategy).__name__
    if size == 1:
        return found
    if framework.__module__.startswith("levin"):
        from levin.compat._fabric_strategies import ModelParallelStrategy
    else:
        from lightning.fabric.strategies import ModelParallelStrategy
    fabric = make(framework, strategy=ModelParallelStrategy(parallelize_fn=cut))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    model, optimizer = fabric.setup(net), None
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        fabric.backward(model(torch.ones(2, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    found["model parallel"] = [
        (name, tuple(p.to_local().shape), p.full_tensor())
        for name, p in net.named_parameters()
        if hasattr(p, "to_local")
    ]
    return found


class Branches(nn.Module):
    """Runs one of its layers, or both."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x, number):
        chosen = self.layers if number is None else [self.layers[number]]
        return sum(layer(x).sum() for layer in chosen)


@row
def torch_collective(framework, folder):
    if framework.__module__.startswith("levin"):
        from levin.strategies import SingleDeviceCollective, TorchCollective
    else:
        from lightning.fabric.plugins.collectives import SingleDeviceCollective, TorchCollective
    size = num_processes()
    rank = dist.get_rank() if size > 1 else 0
    one = torch.ones(2) * (rank + 1)
    alone = SingleDeviceCollective()
    found: dict[str, Any] = {
        "alone": {
            "place": (alone.rank, alone.world_size),
            "reduce": alone.all_reduce(one.clone(), op="sum"),
            "gather": alone.all_gather([torch.zeros(2)], one),
            "broadcast": alone.broadcast(one, src=0),
            "scatter": alone.scatter(torch.zeros(2), [one]),
            "reduce_scatter": alone.reduce_scatter(torch.zeros(2), [one]),
            "group": outcome(lambda: alone.group, RuntimeError),
        },
        "available": TorchCollective.is_available(),
        "without a group": outcome(lambda: TorchCollective().all_reduce(one.clone()) if size > 1 else None),
    }
    if size == 1:
        return found
    collective = TorchCollective()
    collective.setup()
    collective.create_group()
    zeros = [torch.zeros(2) for _ in range(size)]
    first = rank == 0
    found.update(
        {
            "place": (collective.rank, collective.world_size),
            "all_reduce": [collective.all_reduce(one.clone(), op=op) for op in ("sum", "max", "min", "product")],
            "reduce": collective.reduce(one.clone(), dst=0) if first else bool(collective.reduce(one.clone(), 0).sum()),
            "all_gather": collective.all_gather([part.clone() for part in zeros], one),
            "gather": collective.gather(one, [part.clone() for part in zeros] if first else [], dst=0),
            "scatter": collective.scatter(torch.zeros(2), [one, one * 2] if first else [], src=0),
            "broadcast": collective.broadcast(one.clone(), src=1),
            "objects": collective.all_gather_object([None] * size, {"rank": rank}),
            "object list": collective.broadcast_object_list([rank, "word"], src=1),
            "gathered objects": collective.gather_object(rank, [None] * size if first else None),
            "scattered objects": collective.scatter_object_list([None], ["a", "b"] if first else None, src=0),
            "barrier": collective.barrier(),
        }
    )
    if first:
        collective.send(one, dst=1)
    else:
        found["received"] = collective.recv(torch.zeros(2), src=0)
    found["unknown operation"] = outcome(lambda: collective.all_reduce(one, op="foo"), ValueError)
    found["a second group"] = outcome(lambda: collective.create_group(), RuntimeError)
    collective.teardown()
    found["after"] = outcome(lambda: collective.group)
    return found
