from __future__ import annotations

import logging
import re

import pytest
import torch

from levin import LightningModule, Trainer
from levin.callbacks import ModelSummary, RichModelSummary
from levin.utilities.model_summary import format_summary_table, summarize

# One layer is frozen on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Found 1 module")


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        self.head = torch.nn.Linear(2, 1)
        self.head.requires_grad_(False)
        self.body[0].eval()
        self.example_input_array = torch.zeros(5, 4)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return self(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.body.parameters(), lr=0.1)


def fit(callback) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, callbacks=[callback])  # fmt: skip
    trainer.fit(Net(), torch.zeros(1, 1, 4))


def test_totals_and_rows():
    summary = summarize(Net(), max_depth=2)
    assert (summary.total_parameters, summary.trainable_parameters) == (26, 23)
    assert summary.model_size == pytest.approx(26 * 4 / 1e6)
    assert summary.total_training_modes == {"train": 3, "eval": 1}
    assert summary.total_flops == 2 * 5 * (4 * 3 + 3 * 2 + 2 * 1)
    assert summary.layer_names == ["body", "body.0", "body.1", "head"]
    assert summary.param_nums == [23, 15, 8, 3]
    assert summary.in_sizes == [[5, 4], [5, 4], [5, 3], [5, 2]] and summary.out_sizes[-1] == [5, 1]


@pytest.mark.parametrize(("size_mb", "width"), [(0.5, 10), (123456789.0, 16)])
def test_the_totals_stand_in_one_column_however_large_they_are(size_mb, width):
    text = format_summary_table([("Name", ["net"])], 2_000, 2_000, size_mb, {"train": 1, "eval": 0}, 0)
    for label in ("Trainable params", "Total params"):
        assert f"\n{'2.0 K':<{width}}{label}" in text


def test_the_text_of_a_run(caplog):
    with caplog.at_level(logging.INFO):
        fit(ModelSummary(max_depth=2))
    (table,) = [record.message for record in caplog.records if "Trainable params" in record.message]
    assert "body.0" in table and "23 " in table and "Non-trainable params" in table


def test_rich_prints_the_table_and_the_totals(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    fit(RichModelSummary(max_depth=2))
    printed = capsys.readouterr().out
    cells = [
        [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]
        for line in printed.splitlines()
        if re.match("[┃│]", line)
    ]
    assert cells == [
        ["", "Name", "Type", "Params", "Mode", "FLOPs", "In sizes", "Out sizes"],
        ["0", "body", "Sequential", "23", "train", "180", "[5, 4]", "[5, 2]"],
        ["1", "body.0", "Linear", "15", "eval", "120", "[5, 4]", "[5, 3]"],
        ["2", "body.1", "Linear", "8", "train", "60", "[5, 3]", "[5, 2]"],
        ["3", "head", "Linear", "3", "train", "20", "[5, 2]", "[5, 1]"],
    ]
    right = [line for line in printed.splitlines() if "body.0" in line][0]
    assert "     15 │" in right and "│   120 │" in right
    assert printed.splitlines()[-7:] == [
        "Trainable params: 23", "Non-trainable params: 3", "Total params: 26", "Total estimated model params size (MB): 0.000",
        "Modules in train mode: 3", "Modules in eval mode: 1", "Total FLOPs: 200",
    ]  # fmt: skip


def test_brackets_in_names_of_layers_are_printed(capsys):
    RichModelSummary.summarize([("Name", ["[bold]"]), ("Type", ["[red]Net"])], 1, 1, 1.0, {"train": 1, "eval": 0}, 0)
    printed = capsys.readouterr().out
    assert "[bold]" in printed and "[red]Net" in printed and "FLOPs" not in printed


def test_no_depth_prints_nothing(capsys):
    fit(RichModelSummary(max_depth=0))
    assert "Total params" not in capsys.readouterr().out


class WithParameters(LightningModule):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 3), torch.nn.Linear(2, 2)
        self.scale = torch.nn.Parameter(torch.ones(7))
        self.example_input_array = torch.ones(5, 4)

    def forward(self, batch):
        return self.used(batch)


def test_parameters_of_the_module_itself_and_layers_that_are_not_called():
    summary = summarize(WithParameters())
    assert summary.flop_counts == {"used": 2 * 5 * 4 * 3, "unused": 0}
    columns = dict(summary._get_summary_data())
    assert [cell.strip() for cell in columns["Params"]] == ["15", "6", "7"]
    assert len(columns["Name"]) == 3 and "FLOPs" in columns
