"""Throughput: batches, samples and floating-point operations per second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from levin.utilities.rank_zero import rank_zero_warn

# Dense tensor-core (where there are any) operations per second from the makers' data sheets.
_FLOPS: dict[str, dict[torch.dtype | str, float]] = {
    "b200": {torch.float32: 8e13, "tf32": 1.2e15, torch.bfloat16: 2.25e15, torch.float16: 2.25e15},
    "h200": {torch.float32: 6.7e13, "tf32": 4.95e14, torch.bfloat16: 9.89e14, torch.float16: 9.89e14},
    "h100 pcie": {torch.float32: 5.1e13, "tf32": 3.78e14, torch.bfloat16: 7.56e14, torch.float16: 7.56e14},
    "h100": {torch.float32: 6.7e13, "tf32": 4.95e14, torch.bfloat16: 9.89e14, torch.float16: 9.89e14},
    "l40s": {torch.float32: 9.16e13, "tf32": 1.83e14, torch.bfloat16: 3.62e14, torch.float16: 3.62e14},
    "l4": {torch.float32: 3.03e13, "tf32": 6e13, torch.bfloat16: 1.21e14, torch.float16: 1.21e14},
    "a100": {torch.float32: 1.95e13, "tf32": 1.56e14, torch.bfloat16: 3.12e14, torch.float16: 3.12e14},
    "a10g": {torch.float32: 3.12e13, "tf32": 3.5e13, torch.bfloat16: 7e13, torch.float16: 7e13},
    "v100": {torch.float32: 1.57e13, torch.float16: 1.25e14},
    "t4": {torch.float32: 8.1e12, torch.float16: 6.5e13},
}


class _Totals(NamedTuple):
    """One update: totals since the start, but for the operations, which are those of its batch."""

    time: float
    batches: int
    samples: int
    lengths: int | None
    flops: float | None


class Throughput:
    """Turns running totals into rates over a sliding window.

    Args:
        available_flops: What one device can do at most, in operations per second; for the share of it that is used.
        world_size: Number of devices; with more than one, rates of all of them are computed too.
        window_size: Number of updates over which rates are computed.
        separator: Stands between ``device`` and the name of a rate.

    Raises:
        ValueError: A window of fewer than 2 updates.

    Example:
        >>> throughput = Throughput(window_size=2)
        >>> throughput.update(time=1.0, batches=1, samples=8)
        >>> throughput.update(time=3.0, batches=2, samples=16)
        >>> throughput.compute()["device/samples_per_sec"]
        4.0
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        if window_size < 2:
            raise ValueError(f"window_size must be >= 2, received {window_size}. A rate needs two updates.")
        self.available_flops: float | None = available_flops
        self.world_size: int = world_size
        self.window_size: int = window_size
        self.separator: str = separator
        self._updates: deque[_Totals] = deque(maxlen=window_size)

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: float | None = None
    ) -> None:
        """Take new totals.

        Args:
            time: Seconds since the start.
            batches: Batches since the start.
            samples: Samples since the start.
            lengths: Items (tokens) since the start.
            flops: Floating-point operations of one device since the last update.

        Raises:
            ValueError: A total that did not grow, more batches than samples or more samples than items.
            RuntimeError: ``lengths`` or ``flops`` is given at some updates and not at others.
        """
        new = _Totals(time, batches, samples, lengths, flops)
        last = self._updates[-1] if self._updates else None
        if last is not None:
            for name, before, now in (("time", last.time, time), ("batches", last.batches, batches)):
                if now <= before:
                    raise ValueError(f"{name} must grow, received {now} after {before}. Give totals since the start.")
        if samples < batches or (last is not None and samples < last.samples):
            raise ValueError(f"samples must grow and be >= batches, received {samples} with {batches} batches.")
        if lengths is not None and lengths < samples:
            raise ValueError(f"Expected lengths ({lengths}) to be greater or equal than samples ({samples}).")
        for name in ("lengths", "flops") if last is not None else ():
            if (getattr(new, name) is None) != (getattr(last, name) is None):
                raise RuntimeError(f"{name} must be given at every update or at none. Call reset() before a change.")
        self._updates.append(new)

    def compute(self) -> dict[str, float]:
        """Return the latest totals and, once the window is full, the rates."""
        first, last = self._updates[0], self._updates[-1]
        metrics: dict[str, float] = {"time": last.time, "batches": last.batches, "samples": last.samples}
        if last.lengths is not None:
            metrics["lengths"] = last.lengths
        if len(self._updates) < self.window_size:
            return metrics
        elapsed = last.time - first.time
        rates: dict[str, float] = {
            "batches_per_sec": (last.batches - first.batches) / elapsed,
            "samples_per_sec": (last.samples - first.samples) / elapsed,
        }
        if last.lengths is not None and first.lengths is not None:
            rates["items_per_sec"] = (last.lengths - first.lengths) / elapsed
        flops = [update.flops for update in self._updates if update.flops is not None]
        if flops:
            rates["flops_per_sec"] = (sum(flops) - flops[0]) / elapsed
        for name, rate in rates.items():
            metrics[f"device{self.separator}{name}"] = rate
            if self.world_size > 1:
                metrics[name] = rate * self.world_size
        if flops and self.available_flops:
            metrics[f"device{self.separator}mfu"] = rates["flops_per_sec"] / self.available_flops
        return metrics

    def reset(self) -> None:
        """Forget all updates."""
        self._updates.clear()


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor] | None = None
) -> int:
    """Return the floating-point operations of a forward pass, or of forward and backward.

    Args:
        model: The model; on the meta device nothing is really computed.
        forward_fn: Runs the forward pass.
        loss_fn: Output -> loss; when given, the backward pass counts too.

    Example:
        >>> with torch.device("meta"):
        ...     model, x = nn.Linear(4, 3), torch.randn(2, 4)
        >>> measure_flops(model, lambda: model(x))
        48
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()
    return int(counter.get_total_flops())


def get_available_flops(device: torch.device, dtype: torch.dtype | str) -> float | None:
    """Return how many operations per second a device can do at most, None when that is unknown.

    Args:
        device: The device; only CUDA devices are known.
        dtype: In which the operations are done.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    known = next((flops for key, flops in _FLOPS.items() if all(part in name for part in key.split())), None)
    if known is None:
        rank_zero_warn(f"The FLOPs of {name!r} are not known. Give `available_flops` to compute their share.")
        return None
    uses_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and "tf32" in known
    return known.get("tf32" if uses_tf32 else dtype)
