"""The order in which a module is prepared for several processes, in the one place where it is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.nn import Module

from levin.strategies.sharding import ShardingPlan, apply_sharding


def prepare(
    module: Module,
    sharding: ShardingPlan,
    cut_layers: Callable[[Module], None] | None = None,
    cut_stages: Callable[[Module], Sequence[Module]] | None = None,
    share_sequences: Callable[[Module], None] | None = None,
) -> None:
    """Do to a module, in place, what is asked for.

    1. Layers are cut over processes (tensor parallel): plans name them as the user does, and all else is done to their parts.
    2. Stages are cut (pipeline): what belongs to other processes need not be prepared any further.
    3. Sequences are shared, inside of blocks: what is computed again in backward talks to the other processes again.
    4. Activations that are computed again are wrapped, which changes what a block computes.
    5. Weights are cut over processes (FSDP), block by block: each is gathered once for all that a block does.

    The blocks that the Trainer compiles are chosen before, as the user wrote them, and compiled when they are first called: with
    the parts of their layers, and inside of what computes them again.

    Args:
        module: Whole, or in part as ``configure_model`` cut it.
        sharding: 4 and 5.
        cut_layers: 1; None for whole layers.
        cut_stages: 2; returns the modules of the stages of this process, and None is for no stages.
        share_sequences: 3; None for whole sequences.
    """
    if cut_layers is not None:
        cut_layers(module)
    parts = [module] if cut_stages is None else cut_stages(module)
    if share_sequences is not None:
        share_sequences(module)
    for part in parts:
        apply_sharding(part, sharding)
