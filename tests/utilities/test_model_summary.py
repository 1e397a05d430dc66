"""The table of a model's layers, whole: as it is printed, and beside Lightning's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from levin.utilities.model_summary import (
    LayerSummary,
    ModelSummary,
    get_formatted_model_size,
    get_human_readable_count,
    parse_batch_shape,
    summarize,
)


def net(base=nn.Module, example=None):
    class Net(base):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(40, 300), nn.Sequential(nn.ReLU(), nn.Linear(300, 20)))
            self.head = nn.Linear(20, 1)
            self.head.requires_grad_(False)
            self.body[0].eval()
            self.tied = self.head
            self.scale = nn.Parameter(torch.ones(7))
            self.unused = nn.Embedding(10, 5)
            self.example_input_array = torch.zeros(5, 40) if example is None else example

        def forward(self, x, y=0):
            assert not self.training and not self.body[1].training
            return self.head(self.body(x) + y)

    return Net()


def lines(table):
    """The table without the blanks at the ends of its lines."""
    return "".join(f"\n{line.rstrip()}" for line in str(table).splitlines())


NESTED = """
  | Name         | Type       | Params | Mode  | FLOPs  | In sizes | Out sizes
------------------------------------------------------------------------------------
0 | body         | Sequential | 18.3 K | train | 180 K  | [5, 40]  | [5, 20]
1 | body.0       | Linear     | 12.3 K | eval  | 120 K  | [5, 40]  | [5, 300]
2 | body.1       | Sequential | 6.0 K  | train | 60.0 K | [5, 300] | [5, 20]
3 | head         | Linear     | 21     | train | 200    | [5, 20]  | [5, 1]
4 | unused       | Embedding  | 50     | train | 0      | ?        | ?
  | other params | n/a        | 7      | n/a   | n/a    | n/a      | n/a
------------------------------------------------------------------------------------
18.4 K    Trainable params
21        Non-trainable params
18.4 K    Total params
0.074     Total estimated model params size (MB)
6         Modules in train mode
1         Modules in eval mode
180 K     Total Flops"""


def test_a_table_with_an_example_input():
    model, state = net(), torch.get_rng_state()
    summary = summarize(model, max_depth=2)
    assert lines(summary) == NESTED and repr(summary) == str(summary)
    assert model.training and model.body[1].training and not model.body[0].training
    assert torch.equal(torch.get_rng_state(), state) and not any(m._forward_hooks for m in model.modules())
    assert summary.total_layer_params == 18_320 + 12_300 + 6_020 + 21 + 50
    assert [name for name, _ in ModelSummary(model, -1).named_modules] == [
        "body", "body.0", "body.1", "body.1.0", "body.1.1", "head", "unused",
    ]  # fmt: skip
    assert ModelSummary(model).layer_names == ["body", "head", "unused"] == summarize(model).layer_names
    assert ModelSummary(model, 0).layer_names == []


def test_a_table_without_an_example_input():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.half = nn.Linear(250, 4000).half()
            self.lazy = nn.LazyLinear(3)

    with pytest.warns(UserWarning) as warned:
        text = str(summarize(Net()))
    assert [str(each.message) for each in warned if "UninitializedParameter" in str(each.message)] == [
        "The total number of parameters detected may be inaccurate because the model contains an instance of"
        " `UninitializedParameter`. To get an accurate number, set `self.example_input_array` in your LightningModule."
    ]
    assert (
        lines(text)
        == """
  | Name  | Type       | Params | Mode
---------------------------------------------
0 | layer | Linear     | 16     | train
1 | half  | Linear     | 1.0 M  | train
2 | lazy  | LazyLinear | 0      | train
---------------------------------------------
1.0 M     Trainable params
0         Non-trainable params
1.0 M     Total params
2.008     Total estimated model params size (MB)
3         Modules in train mode
0         Modules in eval mode"""
    )


@pytest.mark.parametrize("how", ["DTensor", "ZeRO 3"])
def test_a_table_of_a_sharded_model(how):
    model = nn.Module()
    model.layer, model.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(6))
    for parameter in (model.layer.weight, model.scale):
        if how == "DTensor":
            parameter.to_local = lambda half=parameter.detach().flatten()[::2]: half
        else:
            parameter.ds_numel, parameter.ds_tensor = parameter.numel(), parameter.detach().flatten()[::2]
            parameter.data = torch.empty(0)
    model.lazy = nn.LazyLinear(2, bias=False)
    with pytest.warns(UserWarning, match="UninitializedParameter"):
        text = str(summarize(model))
    # ZeRO 3 leaves nothing in the parameter of which the size in bytes could be told.
    assert (
        lines(text)
        == """
  | Name         | Type       | Params | Params per Device | Mode
------------------------------------------------------------------------
0 | layer        | Linear     | 16     | 10                | train
1 | lazy         | LazyLinear | 0      | 0                 | train
  | other params | n/a        | 6      | 3                 | n/a
------------------------------------------------------------------------
22        Trainable params
0         Non-trainable params
22        Total params
0.000     Total estimated model params size (MB)
2         Modules in train mode
0         Modules in eval mode"""
    )


@pytest.mark.parametrize("example", [None, (torch.zeros(1, 40), torch.zeros(1, 20)), [torch.zeros(2, 40)],
                                     {"x": torch.zeros(1, 40), "y": torch.ones(20)}])  # fmt: skip
def test_a_table_is_as_lightnings(example):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.utilities.model_summary import ModelSummary as Theirs

    for max_depth in (0, 1):
        ours = str(ModelSummary(net(example=example), max_depth))
        assert ours == str(Theirs(net(lightning.LightningModule, example), max_depth))


def test_a_model_that_fails_leaves_no_hook():
    model = net(example=torch.zeros(1, 3))
    with pytest.raises(RuntimeError):
        summarize(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_sizes_of_a_layer_are_those_of_its_first_call():
    class Pairs(nn.Module):
        def forward(self, a, b=None):
            return {"a": a}

    layer = Pairs()
    summary = LayerSummary(layer)
    assert (summary.in_size, summary.out_size, summary.layer_type, summary.num_parameters) == ("?", "?", "Pairs", 0)
    layer(torch.zeros(2, 3), b=[torch.zeros(4), "text"])
    layer(torch.zeros(9, 9))
    assert (summary.in_size, summary.out_size) == ([[2, 3], [[4], "?"]], "?") and not layer._forward_hooks
    summary.detach_hook()
    assert summary.training and not LayerSummary(layer.eval()).training
    scripted = LayerSummary(torch.jit.script(nn.Linear(2, 2)))
    assert scripted.num_parameters == 6 and parse_batch_shape(()) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0  "), (999, "999  "), (1000, "1.0 K"), (9_999, "10.0 K"), (123_456, "123 K"), (99_949, "99.9 K"), (10**6, "1.0 M"),
     (99_999, "100.0 K"), (12_345_678_901, "12.3 B"), (10**12, "1.0 T"), (10**15, "1,000 T"), (123456 * 10**12, "123,456 T")],
)  # fmt: skip
def test_a_number_is_shortened(number, text):
    assert get_human_readable_count(number) == text


def test_what_is_no_number_or_depth_is_refused():
    with pytest.raises(ValueError, match="number must be >= 0, received -1."):
        get_human_readable_count(-1)
    for max_depth in (-2, "1"):
        said = f"`max_depth` can be -1, 0 or > 0, got {max_depth!r}. Use 1 for the direct children, -1 for all layers."
        with pytest.raises(ValueError, match=r"max_depth") as error:
            summarize(nn.Linear(1, 1), max_depth)
        assert str(error.value) == said
    assert get_formatted_model_size(1234.5678) == "1,234.568"
