"""What the profilers report of a run on Lightning and on levin."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.parity.both import levin, lightning, loader, quiet

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
STAGES = ("fit", "validate", "test", "predict")


def profilers_of(framework: SimpleNamespace) -> Any:
    return importlib.import_module(
        "lightning.pytorch.profilers" if framework.name == "lightning" else "levin.profilers"
    )


def make_parts(framework: SimpleNamespace, overrides: bool = False, manual: bool = False) -> SimpleNamespace:
    """A module, a data module and a callback; with ``overrides``, also of the hooks that are timed only then."""

    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("loss", loss)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val", self.layer(batch[0]).mean())

        def test_step(self, batch, batch_idx):
            self.log("test", self.layer(batch[0]).mean())

        def predict_step(self, batch, batch_idx):
            return self.layer(batch[0])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

        if overrides:

            def prepare_data(self):
                pass

            def configure_model(self):
                pass

            def on_validation_model_train(self):
                self.train()

            def backward(self, loss, *args, **kwargs):
                loss.backward(*args, **kwargs)

            def on_before_optimizer_step(self, optimizer):
                pass

            def train_dataloader(self):
                return loader()

            val_dataloader = train_dataloader

    class Data(framework.DataModule):
        def train_dataloader(self):
            return loader()

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

        if overrides:

            def prepare_data(self):
                pass

            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch

            def state_dict(self):
                return {"a": 1}

            def load_state_dict(self, state_dict):
                pass

    class Watching(framework.Callback):
        def on_train_start(self, trainer, pl_module):
            pass

        def on_train_epoch_end(self, trainer, pl_module):
            pass

        def state_dict(self):
            return {"a": 1}

    return SimpleNamespace(module=Model(), datamodule=Data(), callback=Watching())


def counts(profiler: Any) -> dict[str, int]:
    return {name: len(durations) for name, durations in profiler.recorded_durations.items()}


def run(framework: SimpleNamespace, folder: Path, fn: str, given: dict[str, Any], parts: Any, **settings: Any) -> Any:
    profiler = profilers_of(framework).SimpleProfiler()
    trainer = quiet(framework, folder, profiler=profiler, max_epochs=2, callbacks=[parts.callback], **settings)
    getattr(trainer, fn)(parts.module, **given)
    return counts(profiler)


def loaders_for(fn: str) -> dict[str, Any]:
    if fn == "fit":
        return {"train_dataloaders": loader(), "val_dataloaders": loader()}
    return {"dataloaders": loader()}


@pytest.mark.parametrize("fn", STAGES)
def test_actions_with_loaders(fn: str, tmp_path: Path) -> None:
    expected, measured = (
        run(framework, tmp_path, fn, loaders_for(fn), make_parts(framework)) for framework in (lightning(), levin())
    )
    assert measured == expected


@pytest.mark.parametrize("fn", STAGES)
def test_actions_with_a_datamodule_and_checkpoints(fn: str, tmp_path: Path) -> None:
    def measure(framework: SimpleNamespace) -> dict[str, int]:
        parts = make_parts(framework, overrides=True)
        given = {"datamodule": parts.datamodule}
        return run(framework, tmp_path, fn, given, parts, enable_checkpointing=True, enable_model_summary=True)

    assert measure(levin()) == measure(lightning())


@pytest.mark.parametrize(
    ("manual", "settings"),
    [
        (True, {}),
        (False, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}),
        (False, {"limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}),
        (False, {"val_check_interval": 2}),
        (False, {"limit_val_batches": 0}),
    ],
    ids=["manual", "accumulation", "limits", "validation in the epoch", "no validation"],
)
def test_actions_of_other_ways_to_fit(manual: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    def measure(framework: SimpleNamespace) -> dict[str, int]:
        parts = make_parts(framework, overrides=True, manual=manual)
        return run(framework, tmp_path, "fit", {}, parts, **settings)

    assert measure(levin()) == measure(lightning())


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter([torch.ones(1, 2, 4)] * 3)


def test_actions_with_a_loader_of_unknown_length(tmp_path: Path) -> None:
    def measure(framework: SimpleNamespace) -> set[str]:
        given = {"train_dataloaders": DataLoader(Endless(), batch_size=None), "val_dataloaders": loader()}
        return set(run(framework, tmp_path, "fit", given, make_parts(framework)))

    assert measure(levin()) == measure(lightning())


def test_actions_of_a_resumed_fit(tmp_path: Path) -> None:
    def measure(framework: SimpleNamespace) -> set[str]:
        parts = make_parts(framework, overrides=True)
        trainer = quiet(framework, tmp_path, max_epochs=1, callbacks=[parts.callback])
        trainer.fit(parts.module, datamodule=parts.datamodule)
        path = tmp_path / framework.name / "half.ckpt"
        trainer.save_checkpoint(path)
        parts = make_parts(framework, overrides=True)
        return set(run(framework, tmp_path, "fit", {"datamodule": parts.datamodule, "ckpt_path": path}, parts))

    assert measure(levin()) == measure(lightning())


def test_actions_are_nested_alike(tmp_path: Path) -> None:
    """Which action runs inside of which."""

    def measure(framework: SimpleNamespace) -> set[tuple[str, ...]]:
        profiler = profilers_of(framework).SimpleProfiler()
        stack: list[str] = []
        seen: set[tuple[str, ...]] = set()
        start, stop = profiler.start, profiler.stop

        def starting(name: str) -> None:
            stack.append(name)
            seen.add(tuple(stack))
            start(name)

        def stopping(name: str) -> None:
            assert stack.pop() == name
            stop(name)

        profiler.start, profiler.stop = starting, stopping
        parts = make_parts(framework)
        trainer = quiet(framework, tmp_path, profiler=profiler, max_epochs=1, callbacks=[parts.callback])
        trainer.fit(parts.module, loader(), loader())
        return seen

    assert measure(levin()) == measure(lightning())


@pytest.mark.parametrize("kind", ["SimpleProfiler", "AdvancedProfiler"])
def test_files_of_a_single_process(kind: str, tmp_path: Path) -> None:
    def measure(framework: SimpleNamespace) -> list[str]:
        folder = tmp_path / "reports" / framework.name
        options = {"dump_stats": True} if kind == "AdvancedProfiler" else {}
        profiler = getattr(profilers_of(framework), kind)(dirpath=folder, filename="mine", **options)
        trainer = quiet(framework, tmp_path, profiler=profiler, max_epochs=1)
        parts = make_parts(framework)
        trainer.fit(parts.module, loader(), loader())
        trainer.test(parts.module, loader(), verbose=False)
        trainer.predict(parts.module, loader())
        return sorted(os.listdir(folder))

    assert measure(levin()) == measure(lightning())


def test_report_goes_to_the_log_dir_and_looks_alike(tmp_path: Path) -> None:
    def measure(framework: SimpleNamespace) -> tuple[list[str], list[str]]:
        profiler = profilers_of(framework).SimpleProfiler(filename="mine")
        trainer = quiet(framework, tmp_path, profiler=profiler, max_epochs=1)
        trainer.fit(make_parts(framework).module, loader(), loader())
        folder = Path(trainer.log_dir)
        text = (folder / "fit-mine.txt").read_text()
        actions = [line.split("|")[1].strip() for line in text.splitlines() if line.count("|") == 6]
        return [path.name for path in folder.glob("*.txt")], sorted(actions)

    assert measure(levin()) == measure(lightning())


@pytest.mark.parametrize("options", [{}, {"schedule": None}], ids=["a few steps", "everything"])
def test_pytorch_profiler_names_its_files_alike(options: dict[str, Any], tmp_path: Path) -> None:
    """But for the time stamps."""

    def measure(framework: SimpleNamespace) -> set[str]:
        folder = tmp_path / "traces" / framework.name
        kind = profilers_of(framework).PyTorchProfiler
        profiler = kind(dirpath=folder, filename="mine", record_module_names=False, **options)
        trainer = quiet(framework, tmp_path, profiler=profiler, max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(make_parts(framework).module, loader(8))
        return {re.sub(r"\d{8,}", "<time>", name) for name in os.listdir(folder)}

    assert measure(levin()) == measure(lightning())


def test_profiler_is_torn_down_after_a_run_and_after_a_failure(tmp_path: Path) -> None:
    framework = levin()

    class Failing(framework.LightningModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("meant")

        def configure_optimizers(self):
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    class Watched(profilers_of(framework).SimpleProfiler):
        def __init__(self) -> None:
            super().__init__()
            self.stages: list[str] = []

        def teardown(self, stage):
            super().teardown(stage)
            self.stages.append(str(stage))

    profiler = Watched()
    trainer = quiet(framework, tmp_path, profiler=profiler, max_epochs=1)
    with pytest.raises(RuntimeError, match="meant"):
        trainer.fit(Failing(), loader())
    assert profiler.stages == ["fit"]
    parts = make_parts(framework)
    trainer.fit(parts.module, loader())
    trainer.test(parts.module, loader(), verbose=False)
    assert profiler.stages == ["fit", "fit", "test"]


def test_pytorch_profiler_writes_the_names_of_the_layers_and_ends_with_the_run(tmp_path: Path) -> None:
    framework = levin()
    profiler = profilers_of(framework).PyTorchProfiler(dirpath=tmp_path / "traces", filename="mine", schedule=None)
    trainer = quiet(framework, tmp_path, profiler=profiler, max_epochs=1)
    module = make_parts(framework).module
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert profiler._profile is None, "what follows the run would be recorded until the end of the process"
    assert not module.layer._forward_hooks
    traces = list((tmp_path / "traces").glob("*.json"))
    names = {event.get("name", "") for trace in traces for event in json.loads(trace.read_text())["traceEvents"]}
    assert any(name.startswith("[levin][module]") and name.endswith("Linear: layer") for name in names)


def test_pytorch_profiler_keeps_the_events_of_the_last_window(tmp_path: Path) -> None:
    found = {}
    for framework in (lightning(), levin()):
        kind = profilers_of(framework).PyTorchProfiler
        recording = kind(schedule=None, export_to_chrome=False, record_module_names=False)
        assert recording.function_events is None and recording.profiler is None
        module, kinds = make_parts(framework).module, []
        module.on_train_batch_end = lambda *_, recording=recording, kinds=kinds: kinds.append(type(recording.profiler))
        quiet(framework, tmp_path, profiler=recording, max_epochs=1).fit(module, loader(8))
        assert torch.profiler.profile in kinds
        found[framework.name] = {event.name for event in recording.function_events}
    # Actions are marked with the name of the framework.
    step = "on_train_batch_start"
    assert any(name.startswith("[pl][profile]") and name.endswith(step) for name in found["lightning"])
    assert any(name.startswith("[levin]") and name.endswith("training_step") for name in found["levin"])
    assert {name for name in found["levin"] if name.startswith("aten::")} >= {"aten::addmm", "aten::mean"}
    assert found["lightning"] >= {"aten::addmm", "aten::mean"}


def test_what_pytorch_profiler_recorded_so_far_can_be_read_when_it_is_ended_early(tmp_path: Path) -> None:
    """Anemoi-training does so, by the private name."""
    for framework in (lightning(), levin()):
        recording = profilers_of(framework).PyTorchProfiler(tmp_path / framework.name, schedule=None)
        with recording.profile("training_step"):
            torch.zeros(3).sum()
        recording._delete_profilers()
        assert "aten::sum" in {event.name for event in recording.function_events}, framework.name
        assert recording.profiler is None


def test_pytorch_profiler_counts_the_steps_of_the_run_in_each_window(tmp_path: Path) -> None:
    framework, steps, names = levin(), [], []

    def ready(profile: Any) -> None:
        steps.append(profile.step_num)
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        names.append({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")})

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=3)
    profiler = profilers_of(framework).PyTorchProfiler(schedule=schedule, on_trace_ready=ready)
    trainer = quiet(framework, tmp_path, profiler=profiler, max_epochs=2, limit_val_batches=0)
    trainer.fit(make_parts(framework).module, loader(24))
    assert steps == [4, 8, 12]
    assert names == [{f"ProfilerStep#{step - 2}", f"ProfilerStep#{step - 1}"} for step in steps]


def test_a_run_without_a_profiler_composes_nothing_for_it(tmp_path: Path) -> None:
    framework = levin()
    trainer = quiet(framework, tmp_path, max_epochs=1)
    trainer.fit(make_parts(framework).module, loader(), loader())
    composed = trainer.run
    assert not composed.is_profiled
    assert composed.hooks["on_train_batch_start"] == () and composed.transfer is None
    function = object()
    assert composed.timed("a name", function) is function
