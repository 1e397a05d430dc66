"""Parameters that learn though DistributedDataParallel does not average their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import ref

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class LateParameters:
    """Finds the parameters that came to learn after a wrapper was made: it averages those alone that learned then.

    Args:
        wrapper: The wrapper.
        optimizers: All that step. Parameters made during training are looked for when one of them got more to step.
    """

    def __init__(self, wrapper: DistributedDataParallel, optimizers: Iterable[ref[Optimizer]]) -> None:
        self._optimizers = optimizers
        parameters = _averageable(wrapper)
        self._known = {id(parameter): parameter for parameter in parameters}  # held, so that no other gets its id
        self._frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        self._num_stepped = 0

    def are_thawed(self) -> bool:
        """Whether one learns that was frozen."""
        return any(parameter.requires_grad for parameter in self._frozen)

    def are_there(self, wrapper: DistributedDataParallel) -> bool:
        """Whether one learns that was frozen or not there."""
        optimizers = [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]
        num_stepped = sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
        if num_stepped != self._num_stepped:
            self._num_stepped = num_stepped
            if any(parameter.requires_grad for parameter in self.made_since(wrapper)):
                return True
        return self.are_thawed()

    def made_since(self, wrapper: DistributedDataParallel) -> list[Tensor]:
        """Return the parameters that were not there."""
        return [parameter for parameter in _averageable(wrapper) if id(parameter) not in self._known]


def _averageable(wrapper: DistributedDataParallel) -> list[Tensor]:
    ignored = wrapper.parameters_to_ignore
    return [parameter for name, parameter in wrapper.module.named_parameters() if name not in ignored]
