"""Which checkpoints are the k best."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from levin.utilities.filesystem import get_filesystem

Mode = Literal["min", "max"]


def worst_score(mode: Mode) -> Tensor:
    """Return the score that any other one improves on."""
    return torch.tensor(float("inf") if mode == "min" else float("-inf"))


def comparable(score: Tensor, mode: Mode) -> Tensor:
    """Return ``score`` as a scalar on the CPU that can be ranked: NaN counts as the worst score."""
    score = torch.as_tensor(score).detach().cpu().squeeze()
    return worst_score(mode).to(score.dtype) if torch.isnan(score) else score


def improves(score: Tensor, on: Tensor, mode: Mode) -> bool:
    """Return whether ``score`` is strictly better than ``on``; NaN never is."""
    score, on = torch.as_tensor(score).cpu(), torch.as_tensor(on).cpu()
    return bool(score < on) if mode == "min" else bool(score > on)


@dataclass(frozen=True)
class Ranking:
    """The checkpoints that are kept, and the best and the worst of them.

    Args:
        scores: Score of each kept checkpoint by its path.
        best: Path of the best one, "" if there is none.
        worst: Path of the one that must go next, "" while there is room for more.
    """

    scores: dict[str, Tensor]
    best: str
    worst: str


def ranked(scores: Mapping[str, Tensor], path: str, score: Tensor, k: int, mode: Mode) -> Ranking:
    """Return the ranking after ``path`` came in, which may have pushed out the worst one.

    Args:
        scores: The kept checkpoints so far.
        path: The new one. A path that is there already gets the new score.
        score: Its score, from :func:`comparable`.
        k: How many are kept; -1 keeps all.
        mode: Whether the best is the smallest or the largest score.

    Example:
        >>> kept = ranked({"a": torch.tensor(3.0)}, "b", torch.tensor(1.0), k=2, mode="min")
        >>> kept.best, kept.worst
        ('b', 'a')
    """
    kept = dict(scores)
    if k > 0 and len(kept) >= k:
        kept.pop(_worst(kept, mode))
    kept[path] = score
    is_full = k == -1 or len(kept) >= k
    best = min(kept, key=kept.__getitem__) if mode == "min" else max(kept, key=kept.__getitem__)
    return Ranking(kept, best, _worst(kept, mode) if is_full else "")


def _worst(scores: Mapping[str, Tensor], mode: Mode) -> str:
    return max(scores, key=scores.__getitem__) if mode == "min" else min(scores, key=scores.__getitem__)


def write_scores(path: str | os.PathLike[str], scores: Mapping[str, Tensor]) -> None:
    """Write the paths of the kept checkpoints and their scores as YAML."""
    import yaml

    with get_filesystem(path).open(str(path), "w") as file:
        yaml.dump({name: score.item() for name, score in scores.items()}, file)
