"""A module cut into the stages of a pipeline: which layers run one after another, and where one process ends and the next begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.nn import Module, Sequential
from torch.nn.modules.batchnorm import _BatchNorm

from levin.utilities.exceptions import MisconfigurationException

# How many stages each process has under which schedule.
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2}


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
                f"pipeline_split must name the layer that each stage but the first begins with, which are {self.num_stages - 1} "
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


def chain_of(module: Module, plan: PipelinePlan) -> tuple[str, Sequential]:
    """Return the name and the submodule that becomes a pipeline: the outermost ``Sequential`` that holds all parameters.

    Raises:
        MisconfigurationException: There is none; or one that is cut already.
    """
    found = [(name, part) for name, part in module.named_modules() if is_chain(part)]
    chosen = max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()), default=None)
    inside = set() if chosen is None else {id(parameter) for parameter in chosen[1].parameters()}
    outside = [name for name, parameter in module.named_parameters() if id(parameter) not in inside]
    if chosen is None or outside:
        shown = f", and leaves out {', '.join(outside[:5])}" if chosen is not None else ""
        raise MisconfigurationException(
            f"A pipeline of {plan.size} processes is made of layers that run one after another, in one torch.nn.Sequential with "
            f"all parameters. {type(module).__name__} has {chosen[0] if chosen else 'none'}{shown}. Write "
            "self.net = torch.nn.Sequential(embedding, *blocks, head)."
        )
    if "forward" in vars(chosen[1]):
        raise MisconfigurationException(
            f"{type(module).__name__}.{chosen[0]} was cut into stages before, by another Trainer. Make the module anew, and "
            "load its checkpoint."
        )
    return chosen


def is_chain(part: Module) -> bool:
    """Return whether a module does nothing but to run its children one after another."""
    return isinstance(part, Sequential) and type(part).forward is Sequential.forward


def layers_of(chain: Sequential, name: str) -> dict[str, Module]:
    """Return the layers of a chain by their full names, those of chains in it included."""
    found: dict[str, Module] = {}
    for key, child in chain._modules.items():
        assert child is not None
        full = f"{name}.{key}"
        found |= layers_of(child, full) if isinstance(child, Sequential) and is_chain(child) else {full: child}
    return found


def cut(layers: Mapping[str, Module], plan: PipelinePlan) -> list[list[str]]:
    """Return the names of the layers of each stage.

    Raises:
        MisconfigurationException: There are too few layers, names that are unknown or out of order, weights that two stages
            share, or a layer whose result depends on the whole batch.

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
            f"They run so: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
        )
    stages = [names[start:end] for start, end in zip(starts, [*starts[1:], len(names)])]
    first_user: dict[int, tuple[int, str]] = {}
    for stage, name, parameter in _parameters(layers, stages):
        used_in, used_as = first_user.setdefault(id(parameter), (stage, name))
        if used_in != stage:
            raise MisconfigurationException(
                f"{used_as} and {name} are one parameter, and would be in stages {used_in} and {stage} of the pipeline, which are "
                "processes of their own. Give them weights of their own, or a pipeline_split with both in one stage."
            )
    norms = [name for name, layer in layers.items() if any(isinstance(part, _BatchNorm) for part in layer.modules())]
    if norms:
        raise MisconfigurationException(
            f"{norms[0]} normalizes over the batch, of which a pipeline sees a part at a time: its results would be others. Use "
            "LayerNorm or GroupNorm."
        )
    return stages


def _parameters(layers: Mapping[str, Module], stages: list[list[str]]) -> Iterator[tuple[int, str, object]]:
    for stage, names in enumerate(stages):
        for layer in names:
            for name, parameter in layers[layer].named_parameters():
                yield stage, f"{layer}.{name}", parameter


def _given_starts(names: list[str], split: Sequence[str]) -> list[int]:
    starts = []
    for name in split:
        fitting = [place for place, known in enumerate(names) if known == name or known.startswith(f"{name}.")]
        if not fitting:
            raise MisconfigurationException(
                f"pipeline_split names {name!r}, which is no layer of the pipeline. They are "
                f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
            )
        starts.append(fitting[0])
    return starts


def _even_starts(layers: Mapping[str, Module], plan: PipelinePlan) -> list[int]:
    weighty = [place for place, layer in enumerate(layers.values()) if any(True for _ in layer.parameters())]
    if len(weighty) < plan.num_stages:
        raise MisconfigurationException(
            f"{plan.num_stages} stages need as many layers with parameters, received {len(weighty)} in {', '.join(layers)}. Use "
            "fewer processes, or more and smaller layers."
        )
    return [0, *(weighty[len(weighty) * stage // plan.num_stages] for stage in range(1, plan.num_stages))]


def leave_out(chain: Sequential, name: str, kept: set[str]) -> None:
    """Take the layers that are not in ``kept`` out of a chain, in place; the others keep their names."""
    for key, child in list(chain._modules.items()):
        full = f"{name}.{key}"
        if isinstance(child, Sequential) and is_chain(child):
            leave_out(child, full, kept)
        elif full not in kept:
            del chain._modules[key]
