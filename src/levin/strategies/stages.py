"""A module cut into the stages of a pipeline: which layers run one after another, and where one process ends and the next begins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Sequential
from torch.nn.modules.batchnorm import _BatchNorm

from levin.strategies.sharding import outermost_repeated
from levin.utilities.exceptions import MisconfigurationException

# How many stages each process has under which schedule.
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
_IS_CUT = "_is_cut_into_stages"


@dataclass(frozen=True)
class PipelinePlan:
    """How a module is cut into stages, and how batches go through them.

    Args:
        size: Number of processes that share the layers; 1 for no pipeline.
        split: Names of the layers that later stages begin with; None for stages with as many layers each.
        schedule: ``"gpipe"``, ``"1f1b"`` or ``"interleaved"``.
        num_microbatches: Parts of a batch that are on the way at once; None for twice the number of processes.

    Raises:
        MisconfigurationException: One of them cannot be, or they do not fit each other.

    Example:
        >>> PipelinePlan(size=2, schedule="interleaved").num_stages
        4
    """

    size: int = 1
    split: Sequence[str] | None = None
    schedule: str = "1f1b"
    num_microbatches: int | None = None

    def __post_init__(self) -> None:
        parts = 1 if self.num_microbatches is None else self.num_microbatches
        for name, count in (("pipeline_parallel_size", self.size), ("num_microbatches", parts)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise MisconfigurationException(f"{name} must be an int >= 1, received {count!r}. Use 2.")
        if self.schedule not in SCHEDULES:
            raise MisconfigurationException(
                f"pipeline_schedule must be one of {', '.join(map(repr, SCHEDULES))}, received {self.schedule!r}. Use '1f1b'."
            )
        if isinstance(self.split, str) or (self.split is not None and len(self.split) % self.size != self.size - 1):
            raise MisconfigurationException(
                f"pipeline_split must name the layer that each stage but the first begins with, which are {SCHEDULES[self.schedule] * self.size - 1} "
                f"layers for {self.size} processes, received {self.split!r}. Leave it out to have the layers shared evenly."
            )
        if self.schedule != "interleaved" and self.num_stages != self.size:
            raise MisconfigurationException(
                f"pipeline_split={self.split!r} makes {self.num_stages} stages for {self.size} processes, and "
                f"pipeline_schedule={self.schedule!r} gives each process one. Use pipeline_schedule='interleaved'."
            )
        if self.schedule != "gpipe" and self.parts % self.size:
            raise MisconfigurationException(
                f"num_microbatches must be a multiple of pipeline_parallel_size={self.size} under pipeline_schedule="
                f"{self.schedule!r}, received {self.parts}. Use {2 * self.size}, or pipeline_schedule='gpipe'."
            )

    @property
    def num_stages(self) -> int:
        """Number of stages over all processes."""
        return self.size * SCHEDULES[self.schedule] if self.split is None else len(self.split) + 1

    @property
    def parts(self) -> int:
        """Number of microbatches of a batch that can be cut into so many."""
        return self.num_microbatches or 2 * self.size


def layers_of(module: Module, name: str = "") -> dict[str, Module]:
    """Return the layers that stages are made of, by their full names, in the order in which the module holds them.

    Lists, and what holds repeated blocks, are taken apart; a block of several is one layer.

    Example:
        >>> net = Module()
        >>> net.embed, net.blocks, net.head = Module(), ModuleList([Module(), Module()]), Module()
        >>> list(layers_of(net))
        ['embed', 'blocks.0', 'blocks.1', 'head']
    """
    blocks = set(outermost_repeated(module))
    found: dict[str, Module] = {}
    for key, child in module.named_children():
        full = f"{name}.{key}".lstrip(".")
        is_list = isinstance(child, (ModuleList, ModuleDict)) or is_chain(child)
        is_apart = is_list or (child not in blocks and any(True for _ in outermost_repeated(child)))
        found |= layers_of(child, full) if is_apart else {full: child}
    return found


def stages_in(module: Module, plan: PipelinePlan) -> tuple[dict[str, Module], list[list[str]]]:
    """Return the layers of a module, and the names of those of each stage.

    Args:
        module: The whole module.
        plan: How it is cut.

    Raises:
        MisconfigurationException: As for :func:`cut`; or stages of one process would share a parameter, or it was cut before.
    """
    if _IS_CUT in vars(module):
        raise MisconfigurationException(
            f"{type(module).__name__} was cut into stages before, by another Trainer. Make the module anew, and load its "
            "checkpoint."
        )
    layers = layers_of(module)
    stages = cut(layers, plan)
    _check_shared(module, stages, plan.size)
    return layers, stages


def is_chain(part: Module) -> bool:
    """Return whether a module does nothing but to run its children one after another."""
    return isinstance(part, Sequential) and type(part).forward is Sequential.forward


def cut(layers: Mapping[str, Module], plan: PipelinePlan) -> list[list[str]]:
    """Return the names of the layers of each stage.

    Raises:
        MisconfigurationException: There are too few layers, names that are unknown or out of order, or a layer whose result
            depends on the whole batch.

    Example:
        >>> net = Sequential(*(Module() for _ in range(3)))
        >>> cut(layers_of(net, "net"), PipelinePlan(2, split=["net.1"]))
        [['net.0'], ['net.1', 'net.2']]
    """
    names = list(layers)
    starts = [0, *_given_starts(names, plan.split)] if plan.split is not None else _even_starts(layers, plan)
    if sorted(set(starts)) != starts:
        raise MisconfigurationException(
            f"pipeline_split must name layers in the order in which they run, and not the first, received {plan.split!r}. "
            f"They run so: {_listed(names)}."
        )
    stages = [names[start:end] for start, end in zip(starts, [*starts[1:], len(names)])]
    norms = [name for name, layer in layers.items() if any(isinstance(part, _BatchNorm) for part in layer.modules())]
    if norms:
        raise MisconfigurationException(
            f"{norms[0]} normalizes over the batch, of which a pipeline sees a part at a time: its results would be others. Use "
            "LayerNorm or GroupNorm."
        )
    return stages


def stages_of(names: Iterable[str], stages: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return the stage of each parameter and buffer: that of its layer, or that of the one before it.

    Args:
        names: Of the parameters and buffers, in the order in which the module holds them.
        stages: The names of the layers of each stage.

    Example:
        >>> stages_of(["scale", "net.0.weight", "net.1.weight", "bias"], [["net.0"], ["net.1"]])
        {'scale': 0, 'net.0.weight': 0, 'net.1.weight': 1, 'bias': 1}
    """
    of_layer = {layer: stage for stage, layers in enumerate(stages) for layer in layers}
    found: dict[str, int] = {}
    stage = 0
    for name in names:
        path = name.split(".")
        outer = (".".join(path[:length]) for length in range(1, len(path)))
        stage = next((of_layer[part] for part in outer if part in of_layer), stage)
        found[name] = stage
    return found


def users_of(module: Module, stages: Sequence[Sequence[str]]) -> dict[str, set[int]]:
    """Return the stages that have each parameter, by all of its names: several where layers of theirs share it.

    Args:
        module: The whole module.
        stages: The names of the layers of each stage.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    found: dict[int, set[int]] = {}
    for name, stage in stages_of(named, stages).items():
        found.setdefault(id(named[name]), set()).add(stage)
    return {name: found[id(parameter)] for name, parameter in named.items()}


def _check_shared(module: Module, stages: Sequence[Sequence[str]], size: int) -> None:
    for name, users in users_of(module, stages).items():
        if len({stage % size for stage in users}) < len(users):
            raise MisconfigurationException(
                f"{name} is a parameter of stages {sorted(users)} of the pipeline, of which one process has several: there it would be "
                "gathered twice. Use pipeline_schedule='1f1b', or a pipeline_split with both in one stage or in other processes."
            )


def _given_starts(names: list[str], split: Sequence[str]) -> list[int]:
    starts = []
    for name in split:
        fitting = [place for place, known in enumerate(names) if known == name or known.startswith(f"{name}.")]
        if not fitting:
            raise MisconfigurationException(
                f"pipeline_split names {name!r}, which is no layer of the pipeline. They are {_listed(names)}."
            )
        starts.append(fitting[0])
    return starts


def _listed(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 20 else [*names[:20], "..."])


def _even_starts(layers: Mapping[str, Module], plan: PipelinePlan) -> list[int]:
    weighty = [place for place, layer in enumerate(layers.values()) if any(True for _ in layer.parameters())]
    if len(weighty) < plan.num_stages:
        raise MisconfigurationException(
            f"{plan.num_stages} stages need as many layers with parameters, received {len(weighty)} in {_listed(list(layers))}. Use "
            "fewer processes, or more and smaller layers."
        )
    return [0, *(weighty[len(weighty) * stage // plan.num_stages] for stage in range(1, plan.num_stages))]


def body_of(stages: Sequence[Sequence[str]]) -> str:
    """Return the name of the smallest submodule that holds all layers; "" for the module itself.

    Example:
        >>> body_of([["net.embed", "net.blocks.0"], ["net.blocks.1"]]), body_of([["embed"], ["head"]])
        ('net', '')
    """
    paths = [name.split(".")[:-1] for layers in stages for name in layers]
    shared = itertools.takewhile(lambda keys: len(set(keys)) == 1, zip(*paths))
    return ".".join(keys[0] for keys in shared)


def parts_of(module: Module, names: Collection[str]) -> list[Module]:
    """Return the largest submodules whose parameters are all among some, which together hold these.

    Args:
        module: After what belongs to other processes was left out of it.
        names: Of parameters of the module.

    Raises:
        MisconfigurationException: One lies in a module that holds others, too.
    """
    present = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if all(name in names for name in present):
        return [module] if present else []
    for key in module._parameters:
        if key in names:
            raise MisconfigurationException(
                f"{type(module).__name__}.{key} is a parameter beside layers of several stages of the same process. Put it into a "
                "module of its own, or use pipeline_schedule='1f1b'."
            )
    return [
        part
        for key, child in module.named_children()
        for part in parts_of(child, {name.removeprefix(f"{key}.") for name in names if name.startswith(f"{key}.")})
    ]


def leave_out(module: Module, names: Iterable[str], without_values: Callable[[Tensor], Tensor]) -> None:
    """Take parameters out of a module, in place.

    Args:
        module: The whole module.
        names: Of its parameters.
        without_values: Returns what is there instead of one, under its name.
    """
    vars(module)[_IS_CUT] = True
    for name in names:
        owner_name, _, key = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        parameter = owner._parameters.pop(key)
        assert parameter is not None
        vars(owner)[key] = without_values(parameter)
