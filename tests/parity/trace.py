"""What user code sees of a framework, written down so that two frameworks can be compared value by value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.parity import both

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
CONFIGURE = ("configure_callbacks", "configure_optimizers", "configure_model")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
# What a framework calls on its own behalf and keeps for itself: no part of what is compared.
_OWN_KEYS = ("levin", "pytorch-lightning_version", "levin_version")


class Near(float):
    """A mean: both sum it up in another way, so that the last bits may differ, and with them how it is rounded."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, float):
            return False
        return math.isclose(self, other, rel_tol=1e-4) or (math.isnan(self) and math.isnan(other))

    __hash__ = None  # type: ignore[assignment]


def plain(value: Any) -> Any:
    """Return ``value`` as something that compares bit for bit and prints well."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return ("tensor", str(value.dtype), [float.hex(float(v)) for v in value.flatten().tolist()])
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value)
    if isinstance(value, torch.optim.Optimizer):
        return ("optimizer", type(value).__name__)
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, Mapping):
        if "state_dict" in value and "loops" in value:
            return sorted(key for key in value if key not in _OWN_KEYS)  # a checkpoint
        return {str(key): plain(item) for key, item in value.items() if key not in _OWN_KEYS}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(plain, value)]
    if isinstance(value, DataLoader):
        return ("DataLoader", type(value.sampler).__name__)
    return "callable" if callable(value) else type(value).__name__


class Trace:
    """The events of one run, in order.

    Args:
        framework: Lightning or levin, from :mod:`tests.parity.both`.
        folder: Where the run may write.
    """

    def __init__(self, framework: SimpleNamespace, folder: Path) -> None:
        self.framework = framework
        self.folder = folder
        self.events: list[Any] = []
        self.warnings: list[warnings.WarningMessage] = []

    @property
    def is_levin(self) -> bool:
        return self.framework.name == "levin"

    def note(self, *event: Any) -> None:
        self.events.append(tuple(map(plain, event)))

    def trainer(self, **settings: Any) -> Any:
        return both.quiet(self.framework, self.folder, **settings)

    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` and note what it returned or raised."""
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            both.caught(error)
            self.note("raised", type(error).__name__)
            return None
        self.note("returned", result)
        return result

    def watch(self, owner: type, names: Iterable[str], who: str, skip: int = 0) -> type:
        """Let each method ``names`` of ``owner`` note its arguments, but for the first ``skip``."""
        for name in names:
            original = getattr(owner, name, None)
            if original is not None:
                setattr(owner, name, self._noting(original, name, who, skip))
        return owner

    def _noting(self, original: Any, name: str, who: str, skip: int) -> Any:
        def hook(owner: Any, *args: Any, **kwargs: Any) -> Any:
            self.note(who, name, *args[skip:], *(item for key in sorted(kwargs) for item in (key, kwargs[key])))
            return original(owner, *args, **kwargs)

        if name in (*STEPS, "__init__"):
            # Frameworks look at the signature of a step.
            hook.__wrapped__ = original  # type: ignore[attr-defined]
        return hook

    def module(self, kind: type, names: Iterable[str] | None = None) -> type:
        """Let the hooks of a LightningModule class note their arguments; by default all of them."""
        return self.watch(kind, both.HOOKS_OF_MODULE if names is None else names, "M")

    def callback(self, names: Iterable[str] | None = None) -> Any:
        """Return a callback whose hooks note their arguments; by default all of them."""
        kind = type("Noting", (self.framework.Callback,), {})
        return self.watch(kind, both.HOOKS_OF_CALLBACK if names is None else names, "C", 2)()


def run(code: Callable[[Trace], Any], framework: SimpleNamespace, folder: Path) -> Trace:
    """Run ``code`` on one framework, with the same seeds for each."""
    trace = Trace(framework, folder)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code(trace)
    trace.warnings = list(caught)
    return trace


def on_both(code: Callable[[Trace], Any], folder: Path) -> tuple[Trace, Trace]:
    """Run ``code`` on Lightning, then on levin."""
    return run(code, both.lightning(), folder), run(code, both.levin(), folder)


def same(code: Callable[[Trace], Any], folder: Path) -> Trace:
    """Run ``code`` on both and check that it saw the same. Returns levin's trace."""
    theirs, ours = on_both(code, folder)
    for index, (a, b) in enumerate(zip(theirs.events, ours.events)):
        before = [event[:3] for event in ours.events[max(0, index - 3) : index]]
        assert b == a, f"event {index}: levin saw {b}\nLightning saw {a}\nafter {before}"
    assert len(ours.events) == len(theirs.events), (ours.events[-3:], theirs.events[-3:])
    assert theirs.events, "the code noted nothing"
    return ours


def warned(trace: Trace, *words: str) -> bool:
    """Whether one warning of the run has all of ``words`` in its text."""
    return any(all(word.lower() in str(w.message).lower() for word in words) for w in trace.warnings)


def batches(num_batches: int = 4, seed: int = 3, size: int = 2, **kwargs: Any) -> DataLoader[Any]:
    """Return a loader of ``(size, 4)`` tensors, in order."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(torch.randn(num_batches * size, 4, generator=generator), batch_size=size, **kwargs)
