"""A composed evaluation as lines: what ``validate``, ``test`` and ``predict`` will call, and the validation in a fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from levin.explain.node import Node
from levin.explain.parts import call, hooks, left_out, loader, set_up, tear_down, transfer
from levin.loops.dataloaders import loaders_of
from levin.loops.evaluate import no_gradients
from levin.loops.hook_table import has_hook
from levin.loops.run import Run, step_arguments
from levin.loops.stage_loaders import StageLoaders


def evaluation(
    run: Run, stage: str, loaders: StageLoaders, counts: Sequence[int | float], logs: bool = True
) -> Iterator[Node]:
    """Yield the loop of ``validation``, ``test`` or ``predict``.

    Args:
        run: Composed.
        stage: As its hooks are named.
        loaders: What is looped over.
        counts: How many batches each of them gives.
        logs: Whether the values go to the loggers.
    """
    module = run.module
    yield call(getattr(module, f"on_{stage}_model_eval"), "")
    yield from hooks(run, f"on_{stage}_start")
    yield from hooks(run, f"on_{stage}_epoch_start")
    total = sum(counts)
    size = "until the data ends" if total == math.inf else f"{int(total)} batches"
    names = ("batch", "batch_idx", "dataloader_idx")[: step_arguments(module, f"{stage}_step", len(counts))]
    index = ", dataloader_idx" if len(counts) > 1 else ""
    body = [
        *transfer(run),
        *hooks(run, f"on_{stage}_batch_start", more=index),
        Node(f"{type(module).__name__}.{stage}_step({', '.join(names)})", getattr(module, f"{stage}_step")),
        *hooks(run, f"on_{stage}_batch_end", more=index),
    ]
    times = 0 if total == math.inf else int(total)
    context = torch.no_grad if run.fn == "fit" else no_gradients(run)
    head = f"for batch in {loaders.hook}s:  # {size}, in torch.{context.__name__}()"
    yield Node(head, counts=(f"{stage} batch", lambda _: times), body=body)
    yield from hooks(run, f"on_{stage}_epoch_end")
    if logs:
        yield from (call(logger.log_metrics, f"values of the {stage}") for logger in run.loggers)
    yield from hooks(run, f"on_{stage}_end")
    if stage != "predict" and has_hook(module, f"on_{stage}_model_train"):
        yield call(getattr(module, f"on_{stage}_model_train"), "")
    else:
        yield Node("each submodule back into its own train or eval mode")


class EvaluationPlan:
    """The lines of ``validate``, ``test`` or ``predict``.

    Args:
        run: Composed, with its loaders there.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stage = "validation" if run.fn == "validate" else run.fn

    def lines(self) -> list[Node]:
        """Return all lines, outermost first."""
        run = self.run
        return [set_up(run), *self._loop(), *tear_down(run)]

    def _loop(self) -> Iterator[Node]:
        run, loaders = self.run, loaders_of(self.run, self.run.fn)
        if loaders.combined is None:
            yield Node(f"nothing: limit_{loaders.stage}_batches=0")
            return
        yield from loader(loaders)
        if sum(loaders.batches_per_loader):
            yield from evaluation(run, self.stage, loaders, loaders.num_batches, logs=run.fn != "predict")
        else:
            yield Node("nothing: the loaders hold no batches")

    def left_out(self) -> list[str]:
        """Return the hooks that a run would call and that nobody wrote."""
        return left_out(self.run, [f"_{self.stage}_"])
