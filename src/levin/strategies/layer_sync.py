"""Layers that compute over the batches of all processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Module, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from levin.strategies import collectives


class LayerSync(ABC):
    """Replaces layers by ones that work across processes while training, and puts them back afterwards."""

    @abstractmethod
    def apply(self, model: Module) -> Module:
        """Return ``model``, which is on its device, with its layers replaced."""

    @abstractmethod
    def revert(self, model: Module) -> Module:
        """Return ``model`` with the former kind of layers and the present weights."""


class TorchSyncBatchNorm(LayerSync):
    """Batch normalization over the batches of all processes: ``torch.nn.SyncBatchNorm``, and its like on the CPU.

    Example:
        >>> layer = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> type(TorchSyncBatchNorm().apply(layer)[0]).__name__
        'CPUSyncBatchNorm'
        >>> isinstance(TorchSyncBatchNorm().revert(layer)[0], torch.nn.BatchNorm1d)
        True
    """

    def apply(self, model: Module) -> Module:
        """Return ``model`` with every batch normalization made aware of the other processes."""
        # torch's own has kernels for accelerators only.
        if not any(parameter.device.type == "cpu" for parameter in model.parameters()):
            converted: Module = SyncBatchNorm.convert_sync_batchnorm(model)
            return converted
        return replace_layers(model, (BatchNorm1d, BatchNorm2d, BatchNorm3d), CPUSyncBatchNorm)

    def revert(self, model: Module) -> Module:
        """Return ``model`` with ordinary batch normalization, its weights and statistics kept."""
        return replace_layers(model, (SyncBatchNorm, CPUSyncBatchNorm), AnyBatchNorm)


class CPUSyncBatchNorm(_BatchNorm):
    """Batch normalization over the batches of all processes, in differentiable operations that run everywhere."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"The input must have at least 2 dimensions, (batch, channels, ...), received {input.dim()}."
            )

    def forward(self, input: Tensor) -> Tensor:
        """Return the input normalized per channel, dimension 1, by the statistics of all processes."""
        self._check_input_dim(input)
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        dims = [dim for dim in range(input.dim()) if dim != 1]
        count = torch.full((1,), float(input.numel() // input.size(1)), dtype=input.dtype, device=input.device)
        local = torch.cat([input.mean(dims), input.var(dims, unbiased=False), count])
        everywhere = collectives.all_gather(local, sync_grads=True)
        channels = self.num_features
        means, variances, counts = everywhere[:, :channels], everywhere[:, channels:-1], everywhere[:, -1:]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        # The spread within each process, and that of the processes around the common mean.
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        self._update_statistics(mean.detach(), variance.detach() * total / (total - 1))
        shape = [1, channels, *[1] * (input.dim() - 2)]
        result: Tensor = (input - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result

    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


class AnyBatchNorm(BatchNorm1d, BatchNorm2d, BatchNorm3d):
    """Ordinary batch normalization for inputs of any number of dimensions.

    The replaced layer's number of dimensions is not known any more.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        return


def replace_layers(model: Module, kinds: tuple[type[Module], ...], replacement: Callable[..., _BatchNorm]) -> Module:
    """Return ``model`` with its batch normalizations of some kinds replaced by others with the same tensors.

    Args:
        model: Changed in place, unless it is itself a layer to replace.
        kinds: What to replace.
        replacement: Makes a new layer out of the arguments of ``torch.nn.BatchNorm1d``.
    """
    if isinstance(model, kinds):
        assert isinstance(model, _BatchNorm)
        return _with_tensors_of(model, replacement)
    for name, child in model.named_children():
        replaced = replace_layers(child, kinds, replacement)
        if replaced is not child:
            setattr(model, name, replaced)
    return model


def _with_tensors_of(layer: _BatchNorm, replacement: Callable[..., _BatchNorm]) -> _BatchNorm:
    result = replacement(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, device="meta"
    )
    # The tensors themselves move over, so that optimizers and hooks that hold them go on working.
    result.weight, result.bias = layer.weight, layer.bias
    result.running_mean, result.running_var = layer.running_mean, layer.running_var
    result.num_batches_tracked = layer.num_batches_tracked
    result.train(layer.training)
    return result
