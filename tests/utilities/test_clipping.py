"""Gradients that are clipped, beside torch's own functions; on meshes in the tests of strategies."""

from __future__ import annotations

import math

import pytest
import torch

from levin.utilities.clipping import clip_by_norm, clip_by_value


def parameters(scale=1.0):
    made = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    made[0].grad, made[2].grad = torch.tensor([3.0, 0.0, -1.0]) * scale, torch.tensor([0.5, 4.0, 1.0]) * scale
    return made


def grads(given):
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in given]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_the_norm_is_clipped_as_torch_does(norm_type, max_norm):
    ours, theirs = parameters(), parameters()
    norm = clip_by_norm(iter(ours), max_norm, norm_type)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type) and grads(ours) == grads(theirs)
    ours, theirs = parameters(), parameters()
    assert clip_by_norm(ours, max_norm) == torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert grads(ours) == grads(theirs)


def test_a_norm_that_is_not_finite_is_an_error_where_that_is_asked_for():
    given = parameters(math.nan)
    with pytest.raises(RuntimeError) as caught:
        clip_by_norm(given, 1.0, error_if_nonfinite=True)
    assert str(caught.value) == (
        "The norm of the gradients is nan, so they cannot be clipped. Look for what made them so "
        "(detect_anomaly=True), or pass error_if_nonfinite=False to clip them all the same."
    )
    given = parameters(math.inf)
    given[0].grad[1] = 5.0
    with pytest.raises(RuntimeError, match="is inf"):
        clip_by_norm(given, 1.0, math.inf, error_if_nonfinite=True)
    assert given[0].grad[1] == 5.0
    assert math.isnan(clip_by_norm(parameters(math.nan), 1.0))


def test_without_a_gradient_the_norm_is_zero():
    assert clip_by_norm([torch.nn.Parameter(torch.zeros(2))], 1.0, error_if_nonfinite=True) == 0.0
    with pytest.raises(RuntimeError, match="No parameter has a gradient that could be clipped. Run backward first."):
        clip_by_value([torch.nn.Parameter(torch.zeros(2))], 1.0)


def test_the_norms_of_other_processes_and_only_what_counts_here_are_joined():
    given, seen = parameters(), []

    def join(norm):
        seen.append(norm.item())
        return torch.tensor([norm.item(), 12.0])

    norm = clip_by_norm(given, 1.0, join=join, counts=lambda parameter: parameter is given[0])
    assert seen == [pytest.approx(10**0.5)] and norm.item() == pytest.approx((10 + 144) ** 0.5)
    assert given[2].grad.tolist() == pytest.approx([value / norm.item() for value in (0.5, 4.0, 1.0)], rel=1e-4)
    assert clip_by_norm(given, 1.0, join=join, counts=lambda parameter: False).item() == 12.0 and seen[1] == 0


def test_values_are_clipped_on_both_sides():
    given = parameters()
    clip_by_value(iter(given), 1.5)
    assert grads(given) == [[1.5, 0.0, -1.0], None, [0.5, 1.5, 1.0]]
