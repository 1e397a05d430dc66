"""Layers made without memory get their weights where they are cut."""

from __future__ import annotations

import torch
from torch import nn

from levin.strategies.sharding import make_weights


def test_torchs_attention_has_the_first_values_that_torch_gives_it():
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(8, 2, 16)
    for part in layer.modules():
        make_weights(part, torch.device("cpu"))
    assert not any(parameter.is_meta for parameter in layer.parameters())
    attention = layer.self_attn
    assert attention.out_proj.bias.count_nonzero() == attention.in_proj_bias.count_nonzero() == 0
    assert 0 < attention.in_proj_weight.abs().max() <= (6 / 32) ** 0.5
