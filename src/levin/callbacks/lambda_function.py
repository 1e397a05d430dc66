"""LambdaCallback: a callback out of plain functions."""

from __future__ import annotations

from levin.hooks import Callback
from levin.utilities.types import Function


class LambdaCallback(Callback):
    """Calls a function at each hook that is given one.

    Args: each hook of :class:`~levin.callbacks.Callback` by its name, as a function of the hook's own arguments.

    Example:
        >>> callback = LambdaCallback(on_train_start=lambda trainer, pl_module: print("training begins"))
    """

    def __init__(
        self,
        setup: Function | None = None,
        teardown: Function | None = None,
        on_fit_start: Function | None = None,
        on_fit_end: Function | None = None,
        on_sanity_check_start: Function | None = None,
        on_sanity_check_end: Function | None = None,
        on_train_batch_start: Function | None = None,
        on_train_batch_end: Function | None = None,
        on_train_epoch_start: Function | None = None,
        on_train_epoch_end: Function | None = None,
        on_validation_epoch_start: Function | None = None,
        on_validation_epoch_end: Function | None = None,
        on_test_epoch_start: Function | None = None,
        on_test_epoch_end: Function | None = None,
        on_validation_batch_start: Function | None = None,
        on_validation_batch_end: Function | None = None,
        on_test_batch_start: Function | None = None,
        on_test_batch_end: Function | None = None,
        on_train_start: Function | None = None,
        on_train_end: Function | None = None,
        on_validation_start: Function | None = None,
        on_validation_end: Function | None = None,
        on_test_start: Function | None = None,
        on_test_end: Function | None = None,
        on_exception: Function | None = None,
        on_save_checkpoint: Function | None = None,
        on_load_checkpoint: Function | None = None,
        on_before_backward: Function | None = None,
        on_after_backward: Function | None = None,
        on_before_optimizer_step: Function | None = None,
        on_before_zero_grad: Function | None = None,
        on_predict_start: Function | None = None,
        on_predict_end: Function | None = None,
        on_predict_batch_start: Function | None = None,
        on_predict_batch_end: Function | None = None,
        on_predict_epoch_start: Function | None = None,
        on_predict_epoch_end: Function | None = None,
    ) -> None:
        functions = {name: value for name, value in locals().items() if name.startswith("on_")}
        functions.update(setup=setup, teardown=teardown)
        for name, function in functions.items():
            if function is not None:
                setattr(self, name, function)
