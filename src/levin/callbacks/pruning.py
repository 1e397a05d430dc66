"""Prunes weights while the model trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from typing_extensions import override

from levin.callbacks.weight_averaging import require_whole_weights
from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException, require_choice, value_error
from levin.utilities.rank_zero import rank_zero_info
from levin.utilities.types import Kwargs, StateDict

Parameters = Sequence[tuple[nn.Module, str]]

_Method = Any  # a subclass of BasePruningMethod; torch annotates only part of it

_METHODS: dict[str, _Method] = {
    "ln_structured": prune.LnStructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "random_unstructured": prune.RandomUnstructured,
}


class ModelPruning(Callback):
    """Sets a part of the weights to zero at the end of epochs, by the methods of ``torch.nn.utils.prune``.

    While training goes on, a pruned ``weight`` is ``weight_orig`` times ``weight_mask``; checkpoints hold a plain
    ``weight``, so they load without the callback.

    Args:
        pruning_fn: ``"l1_unstructured"``, ``"random_unstructured"``, ``"ln_structured"``, ``"random_structured"``, or a
            subclass of ``torch.nn.utils.prune.BasePruningMethod``.
        parameters_to_prune: Pairs of a module and the name of its parameter; by default all ``parameter_names``.
        parameter_names: Which parameters are pruned where none are given: ``"weight"``, ``"bias"``; by default both.
        use_global_unstructured: Whether the weights of all parameters compete with each other, for unstructured methods.
        amount: Which part (float) or how many (int) of the weights that are left go each time; or ``amount(epoch)``.
        apply_pruning: Whether to prune; or ``apply_pruning(epoch)``.
        make_pruning_permanent: Whether the parameters are plain in checkpoints, and again when training ends.
        use_lottery_ticket_hypothesis: Whether the weights that are left begin anew from their first values after each
            pruning; or ``use_lottery_ticket_hypothesis(epoch)``.
        resample_parameters: Whether they begin from new random values instead.
        pruning_dim: Dimension along which structured methods prune.
        pruning_norm: The n of the norm of ``"ln_structured"``.
        verbose: 1 logs what was pruned in all, 2 for each parameter as well.
        prune_on_train_epoch_end: Whether to prune when the training epoch ends; False: when the validation ends.

    Raises:
        MisconfigurationException: A value that cannot be meant.

    Example:
        >>> pruning = ModelPruning("l1_unstructured", amount=lambda epoch: 0.5 if epoch == 3 else 0)
    """

    is_on_all_ranks = True

    PARAMETER_NAMES = ("weight", "bias")

    def __init__(
        self,
        pruning_fn: Callable[..., Any] | str,
        parameters_to_prune: Parameters = (),
        parameter_names: list[str] | None = None,
        use_global_unstructured: bool = True,
        amount: float | Callable[[int], float] = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True,
        resample_parameters: bool = False,
        pruning_dim: int | None = None,
        pruning_norm: int | None = None,
        verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:
        self._parameter_names: Sequence[str] = parameter_names or self.PARAMETER_NAMES
        for name in self._parameter_names:
            if name not in self.PARAMETER_NAMES:
                raise value_error("parameter_names", name, f"must be among {self.PARAMETER_NAMES}")
        if not isinstance(amount, (int, float)) and not callable(amount):
            raise value_error("amount", amount, "must be a float, an int, or a function of the epoch")
        require_choice("verbose", verbose, (0, 1, 2))
        self._parameters_to_prune: Parameters = parameters_to_prune
        self._use_global_unstructured = use_global_unstructured
        self.amount = amount
        self._apply_pruning = apply_pruning
        self._make_pruning_permanent = make_pruning_permanent
        self._use_lottery_ticket_hypothesis = use_lottery_ticket_hypothesis
        self._resample_parameters = resample_parameters
        self._prune_on_train_epoch_end = prune_on_train_epoch_end
        self._verbose = verbose
        self._method, self._kwargs = _choose_method(pruning_fn, pruning_dim, pruning_norm)
        self.pruning_fn: Any = pruning_fn
        if use_global_unstructured and self._method.PRUNING_TYPE != "unstructured":
            raise MisconfigurationException(
                f"use_global_unstructured=True needs an unstructured method, received {pruning_fn!r}, which is "
                f"{self._method.PRUNING_TYPE}. Pass the name of a structured one with use_global_unstructured=False."
            )
        if not use_global_unstructured and not isinstance(pruning_fn, str):
            raise MisconfigurationException(
                f"A pruning method of one's own needs use_global_unstructured=True, received False with {pruning_fn!r}."
            )
        # Module -> a copy from before training, for weights that begin anew.
        self._first: list[tuple[nn.Module, str, nn.Module]] = []

    # ---- what users override

    def filter_parameters_to_prune(self, parameters_to_prune: Parameters = ()) -> Parameters:
        """Return the parameters that are pruned; override it to leave some out."""
        return parameters_to_prune

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: LightningModule, parameters_to_prune: Parameters = (), parameter_names: Sequence[str] = ()
    ) -> Parameters:
        """Return the parameters to prune, all those of the module by default.

        Raises:
            MisconfigurationException: One that is not in the module.
        """
        if not parameters_to_prune:
            inner = [child for child in pl_module.modules() if child is not pl_module]
            return [
                (child, name) for name in parameter_names for child in inner if getattr(child, name, None) is not None
                and (isinstance(getattr(child, name), nn.Parameter) or hasattr(child, f"{name}_orig"))
            ]  # fmt: skip
        children = set(pl_module.modules())
        for pair in parameters_to_prune:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise value_error(
                    "parameters_to_prune", pair, "must hold pairs of a module and the name of its parameter"
                )
        foreign = [child for child, _ in parameters_to_prune if child not in children]
        absent = [name for child, name in parameters_to_prune if getattr(child, name, None) is None]
        if foreign or absent:
            raise MisconfigurationException(
                "Some provided `parameters_to_prune` don't exist in the model. "
                f"Found missing modules: {foreign} and missing parameters: {absent}."
            )
        return parameters_to_prune

    def apply_lottery_ticket_hypothesis(self) -> None:
        """Let the weights that are left begin anew, from their first values or from new ones."""
        for module, name, first in self._first:
            resets = getattr(first, "reset_parameters", None)
            if self._resample_parameters and resets is not None:
                resets()
            with torch.no_grad():
                target = getattr(module, f"{name}_orig", None)
                target = getattr(module, name) if target is None else target
                target.copy_(getattr(first, name).to(target.device))

    def apply_pruning(self, amount: float) -> None:
        """Prune ``amount`` of what is left."""
        before = [self._counts(module, name) for module, name in self._parameters_to_prune]
        if self._use_global_unstructured:
            prune.global_unstructured(
                self._parameters_to_prune, pruning_method=self._method, amount=amount, **self._kwargs
            )
        else:
            for module, name in self._parameters_to_prune:
                self._method.apply(module, name, amount=amount, **self._kwargs)
        if self._verbose:
            self._say(amount, before)

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Make plain parameters of the pruned ones of ``module`` and its children."""
        for child in module.modules():
            hooks = list(child._forward_pre_hooks.values())
            for name in [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]:
                prune.remove(child, name)

    # ---- hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_whole_weights(self, trainer)
        chosen = self.sanitize_parameters_to_prune(pl_module, self._parameters_to_prune, self._parameter_names)
        self._parameters_to_prune = self.filter_parameters_to_prune(chosen)
        if self._use_lottery_ticket_hypothesis and not self._first:
            copies: dict[int, nn.Module] = {}
            for module, name in self._parameters_to_prune:
                if not prune.is_pruned(module):
                    first = copies.setdefault(id(module), copy.deepcopy(module))
                    self._first.append((module, name, first))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._prune_on_train_epoch_end:
            self._run(trainer.current_epoch)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and not self._prune_on_train_epoch_end:
            self._run(trainer.current_epoch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._make_pruning_permanent:
            self.make_pruning_permanent(pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        if self._make_pruning_permanent:
            checkpoint["state_dict"] = plain_state(checkpoint["state_dict"])

    # ---- parts

    def _run(self, epoch: int) -> None:
        is_due = self._apply_pruning(epoch) if callable(self._apply_pruning) else self._apply_pruning
        amount = self.amount(epoch) if callable(self.amount) else self.amount
        if not is_due or not amount:
            return
        self.apply_pruning(amount)
        again = self._use_lottery_ticket_hypothesis
        if again(epoch) if callable(again) else again:
            self.apply_lottery_ticket_hypothesis()

    @staticmethod
    def _counts(module: nn.Module, name: str) -> tuple[int, int]:
        """Return how many weights are pruned, and how many there are."""
        mask = getattr(module, f"{name}_mask", None)
        total = getattr(module, name).numel()
        return (0 if mask is None else int((mask == 0).sum()), total)

    def _say(self, amount: float, before: Sequence[tuple[int, int]]) -> None:
        after = [self._counts(module, name) for module, name in self._parameters_to_prune]
        total, method = sum(size for _, size in before), self._method.__name__
        old, new = sum(count for count, _ in before), sum(count for count, _ in after)
        rank_zero_info(
            f"Applied `{method}`. Pruned: {old}/{total} ({old / total:.2%}) -> {new}/{total} ({new / total:.2%})"
        )
        if self._verbose == 2:
            for (module, name), (old, size), (new, _) in zip(self._parameters_to_prune, before, after):
                rank_zero_info(
                    f"Applied `{method}` to `{module!r}.{name}` with amount={amount}. "
                    f"Pruned: {old} ({old / size:.2%}) -> {new} ({new / size:.2%})"
                )


def plain_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict in which ``weight_orig`` and ``weight_mask`` are one ``weight``.

    Example:
        >>> plain_state({"weight_orig": torch.ones(2), "weight_mask": torch.tensor([0.0, 1.0])})
        {'weight': tensor([0., 1.])}
    """
    plain = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition("_")
        if kind == "orig" and f"{stem}_mask" in state:
            plain[stem] = value * state[f"{stem}_mask"].to(value.dtype)
        elif not (kind == "mask" and f"{stem}_orig" in state):
            plain[key] = value
    return plain


def _choose_method(pruning_fn: object, pruning_dim: int | None, pruning_norm: int | None) -> tuple[_Method, Kwargs]:
    """Return the method of torch's, and the arguments it needs beside the amount."""
    if isinstance(pruning_fn, type) and issubclass(pruning_fn, prune.BasePruningMethod):
        return pruning_fn, {}
    name = pruning_fn.lower() if isinstance(pruning_fn, str) else ""
    if name not in _METHODS:
        expected = f"must be one of {list(_METHODS)}, or a subclass of BasePruningMethod"
        raise value_error("pruning_fn", pruning_fn, expected)
    kwargs: Kwargs = {}
    if name.endswith("_structured"):
        kwargs["dim"] = pruning_dim
        if pruning_dim is None:
            raise value_error("pruning_dim", None, f"must be given with {name!r}", "Use the dimension to prune along.")
    if name == "ln_structured":
        kwargs["n"] = pruning_norm
        if pruning_norm is None:
            raise value_error("pruning_norm", None, f"must be given with {name!r}", "Use 1 or 2.")
    return _METHODS[name], kwargs
