"""How processes are laid out, in short: ``strategy="mesh:dp=2,tp=2"``."""

from __future__ import annotations

import math

from levin.strategies.ddp import DDPStrategy
from levin.strategies.strategy import Strategy
from levin.utilities.exceptions import MisconfigurationException

PREFIX = "mesh:"
DEGREES = {
    "ddp": "copies of the weights",
    "dp": "processes that share the weights (FSDP); also called fsdp",
    "tp": "processes that share each layer",
    "pp": "processes that have layers of their own (pipeline)",
    "cp": "processes that share each sequence (context)",
}


def is_mesh(strategy: object) -> bool:
    """Return whether a strategy is the short form of a mesh."""
    return isinstance(strategy, str) and strategy.startswith(PREFIX)


def parse_mesh(text: str) -> dict[str, int]:
    """Return the degrees that a short form names.

    Args:
        text: For example ``"mesh:dp=2,tp=2"``.

    Raises:
        MisconfigurationException: A degree is unknown, named twice, or no count.

    Example:
        >>> parse_mesh("mesh:fsdp=2,tp=2")
        {'dp': 2, 'tp': 2}
    """
    degrees: dict[str, int] = {}
    for word in text.removeprefix(PREFIX).split(","):
        name, _, number = (part.strip() for part in word.partition("="))
        name = "dp" if name == "fsdp" else name
        if name not in DEGREES or name in degrees or not number.isdecimal() or int(number) < 1:
            known = "; ".join(f"{known} ({meaning})" for known, meaning in DEGREES.items())
            raise MisconfigurationException(
                f"strategy={text!r} must name each degree once, as a count >= 1, received {word!r}. Degrees are {known}. "
                "Write strategy='mesh:dp=2,tp=4'."
            )
        degrees[name] = int(number)
    return degrees


def strategy_of_mesh(text: str) -> Strategy:
    """Return the strategy that lays processes out so.

    Args:
        text: As for :func:`parse_mesh`.

    Raises:
        MisconfigurationException: As there.

    Example:
        >>> strategy_of_mesh("mesh:dp=2,tp=2").tensor_parallel_size
        2
    """
    degrees = parse_mesh(text)
    copies, shards, tensor, stages, context = (degrees.get(name, 1) for name in DEGREES)
    if tensor > 1 or stages > 1 or context > 1:
        from levin.strategies.model_parallel import ModelParallelStrategy  # slow to import

        return ModelParallelStrategy(
            data_parallel_size=copies * shards,
            tensor_parallel_size=tensor,
            copies=copies,
            pipeline_parallel_size=stages,
            context_parallel_size=context,
        )
    if shards > 1:
        from levin.strategies.fsdp import FSDPStrategy  # slow to import

        return FSDPStrategy(device_mesh=(copies, shards) if copies > 1 else None)
    return DDPStrategy()


def check_mesh(text: str, world_size: int, num_devices: int, num_nodes: int) -> None:
    """Raise when the degrees do not multiply to the number of processes.

    Args:
        text: As for :func:`parse_mesh`.
        world_size: Number of processes.
        num_devices: On each machine.
        num_nodes: Number of machines.
    """
    size = math.prod(parse_mesh(text).values())
    if size != world_size:
        raise MisconfigurationException(
            f"strategy={text!r} is made for {size} processes, received devices={num_devices} and num_nodes={num_nodes}, "
            f"which make {world_size}. Use devices={size}, or degrees whose product is {world_size}."
        )
