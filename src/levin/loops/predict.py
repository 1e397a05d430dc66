"""Predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch

from levin.loops.evaluate import kept_modes
from levin.utilities.exceptions import SIGTERMException
from levin.utilities.move import move_data_to_device
from levin.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from levin.data.feed import Feed
    from levin.loops.progress import EvaluationLoop
    from levin.loops.run import Run

_CPU = torch.device("cpu")


def predict(
    run: Run,
    feed: Feed,
    step: Callable[[Any, int, int], Any],
    loop: EvaluationLoop,
    return_predictions: bool,
    batch_indices: Callable[[int, int], Optional[list[int]]],
) -> Optional[list[Any]]:
    """Predict over all batches once.

    Args:
        return_predictions: Whether to keep the outputs, on the CPU.
        batch_indices: Returns the dataset indices of a batch, ``(dataloader_idx, batch_idx)``; None when unknown.

    Returns:
        One list of outputs, or a list of lists with several loaders; None when they are not kept.
    """
    trainer, module = run.trainer, run.module
    progress = loop.batch_progress
    progress.reset()
    is_multiple = len(feed.sources) > 1
    outputs: list[list[Any]] = [[] for _ in feed.sources]
    indices: list[list[Any]] = [[] for _ in feed.sources]
    loop.epoch_batch_indices = indices
    warned = False
    with kept_modes(module):
        run.call_own("on_predict_model_eval", module.on_predict_model_eval)
        run.call("on_predict_start")
        run.call("on_predict_epoch_start")
        for batch, batch_idx, dataloader_idx in feed:
            if feed.is_filler:
                step(batch, batch_idx, dataloader_idx)
                continue
            progress.is_last_batch = feed.is_last
            progress.increment_ready()
            loop.current_batch_indices = batch_indices(dataloader_idx, batch_idx) or []
            index = (dataloader_idx,) if is_multiple else ()
            run.call("on_predict_batch_start", batch, batch_idx, *index)
            progress.increment_started()
            output = step(batch, batch_idx, dataloader_idx)
            if output is None and not warned:
                warned = True
                rank_zero_warn("`predict_step` returned None. Return the prediction if this was not meant.")
            progress.increment_processed()
            run.call("on_predict_batch_end", output, batch, batch_idx, *index)
            progress.increment_completed()
            if loop.current_batch_indices:
                indices[dataloader_idx].append(loop.current_batch_indices)
            if return_predictions:
                outputs[dataloader_idx].append(move_data_to_device(output, _CPU))
            if run.agreement is not None and feed.is_shared:
                run.agreement.maybe_sync()
            if run.flags.received_sigterm and (run.agreement is not None or not feed.is_last):
                raise SIGTERMException
        trainer._predictions = outputs
        run.call("on_predict_epoch_end")
        run.call("on_predict_end")
    if not return_predictions:
        return None
    return outputs if is_multiple else (outputs[0] if outputs else [])
