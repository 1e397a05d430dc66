"""Names that the terminal cannot encode are shown with question marks; they do not end the run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys, warnings
import torch
from torch.utils.data import DataLoader
from levin import LightningModule, Trainer
from levin.callbacks import RichProgressBar, TQDMProgressBar

warnings.simplefilter("ignore")

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.log("verlust_\\u00e4_\\u635f", 1.0, prog_bar=True)
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("g\\u00fcte", 2.0, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

bar = {"tqdm": TQDMProgressBar, "rich": RichProgressBar}[sys.argv[1]]()
data = DataLoader(torch.ones(4, 1))
trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, callbacks=[bar])
trainer.fit(Model(), data, data)
trainer.validate(Model(), data)
trainer.test(Model(), data)
assert (sys.stdout.errors, sys.stdout.encoding) == tuple(sys.argv[2:])
print("through")
"""


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
@pytest.mark.parametrize(
    ("is_terminal", "errors", "asked"),
    [
        (False, "strict", {"PYTHONIOENCODING": "ascii"}),
        (True, "strict", {"PYTHONIOENCODING": "ascii"}),
        (False, "surrogateescape", {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}),
    ],
)
def test_a_name_that_the_terminal_cannot_encode_ends_no_run(tmp_path, bar, is_terminal, errors, asked):
    path = tmp_path / "script.py"
    path.write_text(CODE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name == "PYTHONPATH"}
    environment = {**kept, **asked, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(path), bar, errors, "ascii"]
    if not is_terminal:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        output = done.stdout + done.stderr
    else:
        import pty

        chunks: list[bytes] = []

        def read(descriptor: int) -> bytes:
            chunks.append(os.read(descriptor, 65536))
            return chunks[-1]

        before = dict(os.environ)
        os.environ.update(environment)
        try:
            pty.spawn(command, read, lambda descriptor: b"")
        finally:
            os.environ.clear()
            os.environ.update(before)
        output = b"".join(chunks).decode()
    assert "through" in output, output
    assert "g?te" in output
