"""LitGPT's loops over Fabric: pretraining, going on, low-rank adaption, merging; on data and a model that are made here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.load import _lazy_load
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.lora import GPT as LoRAGPT
from litgpt.lora import mark_only_lora_as_trainable, merge_lora_weights
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader

CONFIG = {
    "name": "tiny", "n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 96, "block_size": 16,
    "intermediate_size": 64,
}  # fmt: skip
ON_LIGHTNING = """
import sys
from pathlib import Path
import torch
folder, sys.argv, torch.compile = Path(sys.argv[1]), ["pretrain.py", "tiny"], lambda model, *args, **kwargs: model
from test_litgpt import train
train(folder)
assert "levin" not in sys.modules
"""


@dataclass
class Numbers(DataModule):
    """Random tokens, the same in each process and run."""

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size, self.length = batch_size, max_seq_length

    def loader(self, seed: int, number: int) -> DataLoader:
        tokens = torch.randint(0, 90, (number, self.length + 1), generator=torch.Generator().manual_seed(seed))
        return DataLoader(tokens, batch_size=self.batch_size, shuffle=seed == 0)

    def train_dataloader(self):
        return self.loader(0, 24)

    def val_dataloader(self):
        return self.loader(1, 8)


@pytest.fixture(autouse=True)
def words(monkeypatch):
    # The package reads its hyper-parameters from the command line, and compiles its model.
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "tiny"])
    monkeypatch.setattr(torch, "compile", lambda model, *args, **kwargs: model)


def train(folder: Path, **settings) -> dict:
    pretrain.setup(
        "tiny", model_config=Config(**CONFIG), out_dir=folder, precision="32-true", data=Numbers(), devices=1,
        logger_name="csv", eval=EvalArgs(interval=3, max_iters=2, final_validation=True), optimizer="AdamW",
        train=TrainArgs(
            save_interval=4, log_interval=1, global_batch_size=8, micro_batch_size=4, max_tokens=1280, max_norm=1.0,
            min_lr=1e-4, lr_warmup_steps=2, tie_embeddings=False,
        ),
        **settings,
    )  # fmt: skip
    return torch.load(folder / "final" / "lit_model.pth", weights_only=False)


def test_pretraining_gives_the_weights_of_lightning(tmp_path):
    state = train(tmp_path / "out")
    assert (state["iter_num"], state["step_count"]) == (20, 10)
    # The last digits are another processor's. With -E Python does not see what puts levin in the place of Lightning.
    subprocess.run([sys.executable, "-E", "-c", ON_LIGHTNING, str(tmp_path / "lightning")], check=True)
    reference = torch.load(tmp_path / "lightning" / "final" / "lit_model.pth", weights_only=False)
    torch.testing.assert_close(state["model"], reference["model"], rtol=0, atol=0)
    assert len((tmp_path / "out/logs/csv/version_0/metrics.csv").read_text().splitlines()) == 15
    assert sorted(path.name for path in (tmp_path / "out").glob("step-*")) == ["step-00000004", "step-00000008"]


def test_pretraining_goes_on_from_the_weights_of_another_run(tmp_path):
    first = train(tmp_path / "first")
    (tmp_path / "weights").mkdir()
    torch.save(first["model"], tmp_path / "weights" / "lit_model.pth")
    state = train(tmp_path / "second", initial_checkpoint_dir=tmp_path / "weights")
    assert state["step_count"] == 10
    assert not torch.equal(state["model"]["lm_head.weight"], first["model"]["lm_head.weight"])


def test_only_adapters_learn_and_are_merged(tmp_path):
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    fabric.seed_everything(1)
    fabric.launch()
    with fabric.init_module(empty_init=False):
        model = LoRAGPT(_lora_config())
    mark_only_lora_as_trainable(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = fabric.setup(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(learning, lr=0.01))
    tokens = torch.randint(0, 90, (4, 17))
    for step in range(4):
        with fabric.no_backward_sync(model, enabled=step % 2 == 0):
            fabric.backward(chunked_cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]))
        if step % 2:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
    fabric.save(tmp_path / "lora.pth", {"model": model}, filter={"model": lambda name, value: "lora_" in name})
    saved = _lazy_load(tmp_path / "lora.pth")["model"]
    assert saved and all("lora_" in name and value.dtype == torch.bfloat16 for name, value in saved.items())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert changed <= saved.keys()
    expected = model(tokens[:, :-1])
    merge_lora_weights(model)
    assert torch.allclose(model(tokens[:, :-1]), expected, atol=0.1)


def _lora_config():
    from litgpt.lora import Config as LoRAConfig

    return LoRAConfig(**CONFIG, lora_r=4, lora_alpha=8, lora_query=True, lora_value=True)


def test_tokens_are_generated():
    from litgpt.generate.base import generate

    torch.manual_seed(2)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    with fabric.init_tensor(), fabric.init_module(empty_init=False):
        model = GPT(Config(**CONFIG))
        model.set_kv_cache(batch_size=1)
    model = fabric.setup_module(model)
    tokens = generate(model, torch.tensor([1, 2, 3]), max_returned_tokens=8, top_k=1)
    assert len(tokens) == 8 and tokens[:3].tolist() == [1, 2, 3]
