"""What differs on purpose, row by row of docs/migrating.md: what Lightning does, and what levin does."""

from __future__ import annotations

import importlib
import re
import warnings
from typing import Any

import pytest
import torch
import torchmetrics
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from tests.parity import both

pytestmark = pytest.mark.filterwarnings("ignore:.*val_dataloader", "ignore:.*validation loader")


def pair() -> list[Any]:
    return [both.lightning(), both.levin()]


class TooLong:
    def __len__(self):
        return 5

    def __iter__(self):
        return iter([torch.full((2, 4), float(index)) for index in range(3)])


def make(framework: Any, schedule: Any = None, thaws: bool = False) -> Any:
    class Model(framework.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
            self.num_validated = 0

        def training_step(self, batch, batch_idx):
            return self.head(self.backbone(batch)).pow(2).mean()

        def validation_step(self, batch, batch_idx):
            self.num_validated += 1

        def on_train_epoch_start(self):
            if thaws and self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": self.backbone.parameters(), "lr": 0.01})

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)
            if schedule is None:
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
            return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    return Model()


def data() -> DataLoader:
    return DataLoader(torch.ones(6, 4), batch_size=2)


class Unsized(IterableDataset):
    def __iter__(self):
        return iter(TooLong())


@pytest.mark.filterwarnings("ignore:.*has a length of 5 and ended")
@pytest.mark.parametrize("train", [TooLong(), DataLoader(Unsized(), batch_size=None)], ids=["length", "limit"])
def test_an_epoch_of_fewer_batches_than_were_counted_on(tmp_path, train):
    seen = []
    for framework in pair():
        module = make(framework)
        trainer = both.quiet(framework, tmp_path, max_epochs=2, num_sanity_val_steps=0, limit_train_batches=5)
        trainer.fit(module, train, data())
        seen.append((trainer.global_step, module.num_validated, trainer.optimizers[0].param_groups[0]["lr"]))
    assert seen == [(6, 0, 0.1), (6, 6, pytest.approx(0.001))]


@pytest.mark.parametrize("kind", ["OneCycleLR", "LambdaLR", "CyclicLR"])
@pytest.mark.lightning_raises("KeyError", "ValueError")
def test_a_new_group_under_a_scheduler(tmp_path, kind):
    schedulers = torch.optim.lr_scheduler
    schedule = {
        "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
        "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9),
        "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1),
    }[kind]
    theirs, ours = pair()
    with pytest.raises((KeyError, ValueError)) as error:
        both.quiet(theirs, tmp_path, max_epochs=3).fit(make(theirs, schedule, thaws=True), data())
    both.caught(error.value)
    trainer = both.quiet(ours, tmp_path, max_epochs=3)
    trainer.fit(make(ours, schedule, thaws=True), data())
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 2]


@pytest.mark.lightning_raises("ValueError")
def test_a_resume_after_a_new_group(tmp_path):
    schedule = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # noqa: E731
    ends = []
    for framework in pair():
        path = tmp_path / f"{framework.name}.ckpt"
        first = both.quiet(framework, tmp_path, max_epochs=2)
        first.fit(make(framework, schedule, thaws=True), data())
        first.save_checkpoint(path)
        second = both.quiet(framework, tmp_path, max_epochs=3)
        try:
            second.fit(make(framework, schedule, thaws=True), data(), ckpt_path=path)
        except ValueError as error:
            both.caught(error)
            ends.append(type(error))
        else:
            ends.append(len(second.optimizers[0].param_groups))
    assert ends == [ValueError, 2]


def test_the_longest_of_an_empty_iterable():
    lengths = []
    for name in ("lightning.pytorch.utilities", "levin.data"):
        loader = importlib.import_module(name).CombinedLoader([DataLoader([]), [1, 2, 3]], "max_size_cycle")
        iter(loader)
        lengths.append((len(loader), len(list(loader))))
    assert lengths == [(3, 0), (0, 0)]


def test_a_wrong_setting_is_a_value_error():
    errors = [importlib.import_module(f"{name}.utilities.exceptions") for name in ("lightning.fabric", "levin")]
    assert [issubclass(each.MisconfigurationException, ValueError) for each in errors] == [False, True]


def test_a_step_of_manual_optimization_that_ends_the_epoch(tmp_path):
    seen = []
    for framework in pair():
        module = make(framework)
        module.automatic_optimization = False
        batches = []

        def step(batch, batch_idx, batches=batches):
            batches.append(batch_idx)
            raise StopIteration

        module.training_step = step
        both.quiet(framework, tmp_path, max_epochs=2).fit(module, data())
        seen.append(batches)
    assert seen == [[0, 1, 2, 0, 1, 2], [0, 0]]


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_start", "on_validation_epoch_end"])
def test_the_modes_after_an_error_in_validation(tmp_path, hook):
    seen = []
    for framework in pair():
        module = make(framework)
        module.backbone.eval()

        def fail(*_):
            raise OSError("meant")

        callback = type("Failing", (framework.Callback,), {hook: fail})()
        trainer = both.quiet(framework, tmp_path, max_epochs=1, num_sanity_val_steps=0, callbacks=[callback])
        with pytest.raises(OSError, match="meant"):
            trainer.fit(module, data(), data())
        seen.append([part.training for part in (module, module.backbone, module.head)])
    assert seen == [[False, False, False], [True, False, True]]


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_train_epoch_start"])
def test_the_random_numbers_of_a_fit_after_one_that_failed(tmp_path, hook):
    states = []
    for framework in pair():
        calls, seen = [], []

        def fail(*_, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise OSError("meant")

        def note(*_, seen=seen):
            seen.append(torch.get_rng_state())

        callback = type("Failing", (framework.Callback,), {hook: fail, "on_train_batch_start": note})()
        torch.manual_seed(1)
        module = make(framework)
        trainer = both.quiet(framework, tmp_path, max_epochs=2, callbacks=[callback], accumulate_grad_batches=3)
        with pytest.raises(OSError, match="meant"):
            trainer.fit(module, data(), data())
        num_before = len(seen)
        trainer.fit(module, data())
        assert len(seen) == num_before + 3
        states.append(torch.Generator().set_state(seen[num_before]))
    # A DataLoader draws one number when it is begun: here Lightning begins one more.
    torch.empty((), dtype=torch.int64).random_(generator=states[1])
    assert torch.equal(states[0].get_state(), states[1].get_state())


def test_a_mean_of_many_values(tmp_path):
    value = torch.tensor(0.1)
    means = []
    for framework in pair():
        module = make(framework)
        module.validation_step = lambda batch, batch_idx, module=module: module.log("value", value, batch_size=1)
        both.quiet(framework, tmp_path).validate(module, DataLoader(torch.ones(300, 4)), verbose=False)
        means.append(module.trainer.callback_metrics["value"].item())
    assert means[0] != value.item() == means[1]


def test_when_an_epoch_begins_to_iterate(tmp_path):
    seen = []
    for framework in pair():
        events = []

        class Noted:
            def __len__(self):
                return 1

            def __iter__(self, events=events):
                events.append("iter")
                return iter([torch.ones(2, 4)])

        class Noting(framework.Callback):
            def on_train_start(self, *_, events=events):
                events.append("start")

            def on_train_epoch_start(self, *_, events=events):
                events.append("epoch")

        both.quiet(framework, tmp_path, max_epochs=2, callbacks=[Noting()]).fit(make(framework), Noted())
        seen.append(events)
    assert seen == [["iter", "iter", "start", "epoch", "epoch", "iter"], ["start", "epoch", "iter", "epoch", "iter"]]


def test_the_random_numbers_of_epochs_whose_loaders_are_made_anew(tmp_path):
    states = []
    for framework in pair():
        seen = []

        class Noting(framework.Callback):
            def on_train_batch_start(self, *_, seen=seen):
                seen.append(torch.Generator().set_state(torch.get_rng_state()))

        module = make(framework)
        module.train_dataloader = lambda: DataLoader(torch.ones(2, 4), batch_size=2)
        torch.manual_seed(1)
        both.quiet(
            framework,
            tmp_path,
            max_epochs=3,
            callbacks=[Noting()],
            reload_dataloaders_every_n_epochs=1,
            limit_val_batches=0,
        ).fit(module)
        states.append(seen)
    for epoch, (theirs, ours) in enumerate(zip(*states, strict=True)):
        # A DataLoader draws one number when it is begun: Lightning begins each one but the first twice.
        for _ in range(epoch):
            torch.empty((), dtype=torch.int64).random_(generator=ours)
        assert torch.equal(theirs.get_state(), ours.get_state())


@pytest.mark.parametrize("stops", [False, True])
def test_the_random_numbers_of_a_later_fit(tmp_path, stops):
    states = []
    for framework in pair():
        seen = []

        class Noting(framework.Callback):
            def on_train_batch_start(self, trainer, *_, seen=seen):
                trainer.should_stop = stops
                seen.append(torch.Generator().set_state(torch.get_rng_state()))

        torch.manual_seed(1)
        module = make(framework)
        trainer = both.quiet(framework, tmp_path, max_epochs=2 if stops else 1, callbacks=[Noting()])
        trainer.fit(module, DataLoader(torch.ones(2, 4), batch_size=2))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, DataLoader(torch.ones(2, 4), batch_size=2))
        states.append(seen)
    (first, theirs), (first_too, ours) = states
    assert torch.equal(first.get_state(), first_too.get_state())
    assert not torch.equal(theirs.get_state(), ours.get_state())
    # A DataLoader draws one number when it is begun: Lightning begins that of a later fit twice.
    torch.empty((), dtype=torch.int64).random_(generator=ours)
    assert torch.equal(theirs.get_state(), ours.get_state())


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resume_in_the_middle_of_an_epoch(tmp_path):
    seen = []
    for framework in pair():
        batches = []
        module = make(framework)
        step = module.training_step

        def training_step(batch, batch_idx, step=step, batches=batches):
            batches.append(batch[0, 0].item())
            return step(batch, batch_idx)

        module.training_step = training_step
        loader = DataLoader(torch.arange(4.0).reshape(4, 1).expand(4, 4))
        path = tmp_path / f"{framework.name}.ckpt"

        class Saving(framework.Callback):
            def on_train_batch_end(self, trainer, *_, path=path):
                if trainer.global_step == 2:
                    trainer.save_checkpoint(path)

        both.quiet(framework, tmp_path, max_epochs=1, callbacks=[Saving()]).fit(module, loader)
        batches.clear()
        both.quiet(framework, tmp_path, max_epochs=1).fit(module, loader, ckpt_path=path)
        seen.append(batches)
    assert seen == [[0.0, 1.0], [2.0, 3.0]]


def test_what_a_resume_goes_on_with(tmp_path):
    seen = []
    for framework in pair():
        path = tmp_path / f"{framework.name}.ckpt"
        noted = []

        class Saving(framework.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                pl_module.log("epochs", float(trainer.current_epoch))

            def on_train_epoch_end(self, trainer, pl_module, path=path, noted=noted):
                trainer.save_checkpoint(path)
                noted.append(torch.get_rng_state())

        class Noting(framework.Callback):
            def on_sanity_check_start(self, trainer, *_, noted=noted):
                noted.append(trainer.current_epoch)

            def on_train_start(self, trainer, *_, noted=noted):
                noted.extend([trainer.current_epoch, dict(trainer.callback_metrics), torch.get_rng_state()])

        both.quiet(framework, tmp_path, max_epochs=1, callbacks=[Saving()]).fit(make(framework), data(), data())
        torch.manual_seed(99)
        trainer = both.quiet(framework, tmp_path, max_epochs=2, num_sanity_val_steps=1, callbacks=[Noting()])
        trainer.fit(make(framework), data(), data(), ckpt_path=path)
        saved, *noted, state = noted
        seen.append([*noted, torch.equal(state, saved)])
    assert seen == [[0, 1, {}, False], [1, 1, {"epochs": 0.0}, True]]


def test_batch_samplers_without_a_sampler_are_told_the_epoch(tmp_path):
    seen = []
    for framework in pair():
        epochs = []

        class Buckets(list):
            def set_epoch(self, epoch, epochs=epochs):
                epochs.append(epoch)

        loader = DataLoader(torch.ones(6, 4), batch_sampler=Buckets([[0, 1], [2, 3]]))
        both.quiet(framework, tmp_path, max_epochs=2).fit(make(framework), loader)
        seen.append(epochs)
    assert seen == [[], [0, 1]]


def test_a_length_that_changes_from_epoch_to_epoch(tmp_path):
    seen = []
    for framework in pair():
        kept = list(torch.ones(4, 4))

        class Growing(framework.Callback):
            def on_train_epoch_end(self, *_, kept=kept):
                kept.extend(torch.ones(2, 4))

        trainer = both.quiet(framework, tmp_path, max_epochs=3, callbacks=[Growing()])
        trainer.fit(make(framework), DataLoader(kept, batch_size=2))
        seen.append(trainer.global_step)
    assert seen == [2 + 2 + 2, 2 + 3 + 4]


def test_the_precision_of_a_method_that_is_marked():
    seen = []
    for name in ("lightning.fabric", "levin"):
        fabric = importlib.import_module(name).Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")

        class Net(torch.nn.Linear):
            def generate(self, value):
                return torch.is_autocast_enabled("cpu")

        model = fabric.setup(Net(4, 4))
        model.mark_forward_method("generate")
        seen.append(model.generate(torch.ones(1, 4)))
    assert seen == [False, True]


def test_a_progress_bar_in_a_log_file(tmp_path, capsys):
    lines = []
    for framework, room in zip(pair(), ("lightning.pytorch.callbacks", "levin.callbacks")):
        bar = importlib.import_module(room).TQDMProgressBar(refresh_rate=1)
        trainer = both.quiet(framework, tmp_path, max_epochs=2, enable_progress_bar=True, callbacks=[bar])
        capsys.readouterr()
        trainer.fit(make(framework), data())
        shown = re.split(r"[\r\n]+", capsys.readouterr().out)
        lines.append(sum("Epoch 0" in line and "/3" in line for line in shown))
    assert lines[0] > lines[1] == 1


def test_the_text_of_a_state():
    homes = ("lightning.pytorch.trainer.states", "levin.utilities.states")
    theirs, ours = (
        [rooms.TrainerFn.FITTING, rooms.RunningStage.TESTING] for rooms in map(importlib.import_module, homes)
    )
    assert theirs == ours == ["fit", "test"] and list(map(repr, theirs)) == list(map(repr, ours))
    assert list(map(str, theirs)) == ["TrainerFn.FITTING", "RunningStage.TESTING"]
    assert list(map(str, ours)) == ["fit", "test"]


def test_flops_that_were_not_measured():
    rooms = ("lightning.pytorch.utilities.model_summary", "levin.utilities.model_summary")
    theirs, ours = (str(importlib.import_module(room).ModelSummary(make(f))) for f, room in zip(pair(), rooms))
    assert "FLOPs" in theirs and "FLOPs" not in ours


@pytest.mark.slow
def test_where_a_fit_in_forked_processes_has_come_to(tmp_path):
    seen = []
    for framework, room in zip(pair(), ("lightning.pytorch.callbacks", "levin.callbacks")):
        best = importlib.import_module(room).ModelCheckpoint(tmp_path / framework.name, monitor="lr")

        class Logging(framework.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                pl_module.log("lr", 0.5)

        flags = dict(
            devices=2, strategy="ddp_fork", max_epochs=2, callbacks=[Logging(), best], enable_checkpointing=True
        )
        trainer = both.quiet(framework, tmp_path, **flags)
        trainer.fit(make(framework), data())
        score = best.best_model_score
        seen.append((trainer.global_step, trainer.current_epoch, bool(best.best_model_path), score and float(score)))
    assert seen == [(0, 0, True, None), (4, 2, True, 0.5)]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_complex_numbers_in_another_precision(tmp_path, precision):
    seen = []
    for framework in pair():
        module = make(framework)
        module.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        batches = []
        module.validation_step = lambda batch, batch_idx, batches=batches: batches.append(batch["phase"].dtype)
        data = DataLoader([{"phase": torch.ones(2, dtype=torch.complex64)}])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both.quiet(framework, tmp_path, precision=precision).validate(module, data, verbose=False)
        seen.append((module.phase.dtype, batches[0]))
    single, double = torch.complex64, torch.complex128
    if precision == "64-true":
        assert seen == [(single, single), (double, double)]
    else:
        assert seen == [(torch.bfloat16, single), (single, single)]


def test_private_parts(tmp_path):
    names = ("_logger_connector", "_data_connector")
    theirs, ours = (both.quiet(framework, tmp_path) for framework in pair())
    assert [hasattr(theirs, name) for name in names] == [True, True]
    assert [hasattr(ours, name) for name in names] == [False, False]


def test_weights_that_begin_anew_after_each_pruning(tmp_path):
    """Lightning resets by the lottery ticket after the first pruning alone."""
    means = []
    for framework in pair():

        class Noting(framework.Callback):
            def __init__(self):
                self.seen = []

            def on_train_epoch_start(self, trainer, module):
                self.seen.append(module.head.weight_orig.clone() if hasattr(module.head, "weight_orig") else None)

        torch.manual_seed(3)
        module = make(framework)
        first = module.head.weight.detach().clone()
        pruning = framework.module.callbacks.ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(module.head, "weight")],
            amount=0.25,
            use_lottery_ticket_hypothesis=True,
        )
        noting = Noting()
        both.quiet(framework, tmp_path, max_epochs=4, callbacks=[pruning, noting]).fit(module, data())
        means.append([weight is not None and torch.equal(weight, first) for weight in noting.seen])
    assert means == [[False, True, False, False], [False, True, True, True]]


@pytest.mark.parametrize("inside", [list, lambda item: dict(enumerate(item))], ids=["list", "dict"])
def test_a_module_inside_of_a_collection_of_a_state(tmp_path, inside):
    for framework, name in zip(pair(), ("lightning.fabric", "levin")):
        fabric = importlib.import_module(name).Fabric(accelerator="cpu", devices=1)
        state = {"all": inside([fabric.setup(torch.nn.Linear(1, 1))])}
        path = tmp_path / f"{framework.name}.ckpt"
        if framework.name == "lightning":
            fabric.save(path, state)
            assert path.exists()
        else:
            with pytest.raises((TypeError, ValueError)):
                fabric.save(path, state)
            assert not path.exists()


def test_a_ranked_file_of_the_same_name_after_an_error(tmp_path):
    numbers = []
    for framework in pair():
        folder = tmp_path / framework.name
        checkpoint = framework.module.callbacks.ModelCheckpoint(
            dirpath=folder, filename="one", monitor="epoch", save_top_k=1, save_on_exception=True, every_n_train_steps=2
        )

        class Failing(framework.Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                module.log("epoch", 1.0)
                if trainer.global_step == 3:
                    raise OSError("meant")

        trainer = both.quiet(
            framework, tmp_path, max_epochs=2, callbacks=[checkpoint, Failing()], enable_checkpointing=True
        )
        with pytest.raises(OSError, match="meant"):
            trainer.fit(make(framework), data())
        numbers.append(len(list(folder.glob("*.ckpt"))))
    assert numbers == [1, 2]


def test_a_search_for_a_rate_that_takes_more_than_the_epochs(tmp_path):
    numbers = []
    for framework in pair():
        module = make(framework)
        module.lr = 0.1
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=module.lr)
        trainer = both.quiet(framework, tmp_path, max_epochs=2)
        tuner = importlib.import_module(
            "lightning.pytorch.tuner" if framework.name == "lightning" else "levin.tuner"
        ).Tuner
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tuner(trainer).lr_find(
                module, data(), num_training=30, early_stop_threshold=None, update_attr=False
            )
        numbers.append(len(found.results["lr"]))
    assert numbers[0] < 30 <= numbers[1]


def test_what_lies_beside_the_logs(tmp_path):
    reports = []
    for framework in pair():

        class Bar(framework.module.callbacks.ProgressBar):
            is_enabled = True

            def disable(self):
                pass

            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                module.log("loss", outputs["loss"])

        logger = framework.module.loggers.CSVLogger(tmp_path / framework.name)
        settings = {"max_epochs": 1, "log_every_n_steps": 1, "enable_progress_bar": True}
        both.quiet(framework, tmp_path, logger=logger, callbacks=[Bar()], **settings).fit(make(framework), data())
        reports.append(len(list((tmp_path / framework.name).rglob("report.html"))))
    assert reports == [0, 1]


@pytest.mark.parametrize(
    ("log_dir", "save_dir", "theirs", "ours"), [("a", "b", "b", "a"), (None, "b", "b", "b"), ("a", None, None, "a")]
)
def test_the_folder_of_a_logger_of_ones_own(tmp_path, log_dir, save_dir, theirs, ours):
    found = []
    for framework in pair():
        folders = {"log_dir": log_dir, "save_dir": save_dir}
        logger = type("Own", (framework.Logger,), {
            "name": "own", "version": 1, "log_metrics": lambda *_, **__: None, "log_hyperparams": lambda *_, **__: None,
            **folders,
        })()  # fmt: skip
        trainer = framework.Trainer(
            accelerator="cpu", logger=logger, enable_checkpointing=False, default_root_dir=tmp_path
        )
        found.append(trainer.log_dir)
    assert found == [theirs, ours]


def test_gathered_numbers_keep_their_types():
    types = []
    for name in ("lightning.fabric", "levin"):
        fabric = importlib.import_module(name).Fabric(accelerator="cpu", devices=1)
        types.append([fabric.all_gather(value).dtype for value in (1, True)])
    assert types == [[torch.int32, torch.uint8], [torch.int64, torch.bool]]


def test_logging_in_a_module_inside_of_the_model(tmp_path):
    for framework in pair():
        module = make(framework)
        step = module.training_step

        class Inner(framework.LightningModule):
            def forward(self, batch):
                self.log("inner", batch.mean())
                return batch

        module.inner = Inner()
        module.training_step = lambda batch, batch_idx, module=module, step=step: step(module.inner(batch), batch_idx)
        trainer = both.quiet(framework, tmp_path, max_epochs=1)
        if framework.name == "lightning":
            with pytest.raises(Exception, match=r"self\.log"):
                trainer.fit(module, data())
        else:
            trainer.fit(module, data())
            assert trainer.callback_metrics["inner"] == 1


def test_the_loss_that_callbacks_get_under_accumulation(tmp_path):
    losses = []
    for framework in pair():
        seen = []

        class Noting(framework.Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, seen=seen):
                seen.append(outputs["loss"].item())

        module = make(framework)
        module.training_step = lambda batch, batch_idx, module=module: module.head(batch).sum() * 0 + 1
        both.quiet(framework, tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[Noting()]).fit(
            module, data()
        )
        losses.append(seen)
    assert losses == [[0.5] * 3, [1.0] * 3]


def test_hyperparameters_of_a_module_that_another_one_makes():
    saved = []
    for framework in pair():

        class Inner(framework.LightningModule):
            def __init__(self, inner=1):
                super().__init__()
                self.save_hyperparameters()

        class Outer(framework.LightningModule):
            def __init__(self, outer=2, made=Inner):
                super().__init__()
                self.made = made()

        hparams = Outer().made.hparams
        saved.append(sorted(hparams))
    assert saved == [["inner", "made", "outer"], ["inner"]]


def test_the_largest_batch_size(tmp_path):
    sizes = []
    for framework in pair():
        module = make(framework)
        module.batch_size = 2
        module.train_dataloader = lambda module=module: DataLoader(torch.ones(64, 4), batch_size=module.batch_size)
        module.val_dataloader = lambda: data()
        tuner = importlib.import_module(f"{'lightning.pytorch' if framework.name == 'lightning' else 'levin'}.tuner")
        trainer = both.quiet(framework, tmp_path, max_epochs=1)
        sizes.append(tuner.Tuner(trainer).scale_batch_size(module, init_val=2, max_trials=4, max_val=10))
    assert sizes[0] > 10 == sizes[1]


@pytest.mark.parametrize("how", ["reduction", "metric"])
@pytest.mark.lightning_raises("MisconfigurationException")
def test_a_name_that_is_logged_in_another_way_in_a_later_epoch(tmp_path, how):
    outcomes = []
    for framework in pair():
        module = make(framework)

        def validation_step(batch, batch_idx, module=module):
            epoch = module.current_epoch
            if how == "reduction":
                module.log("v", float(batch_idx), reduce_fx="max" if epoch else "min")
            else:
                if batch_idx == 0:
                    module.mean = torchmetrics.MeanMetric()
                module.mean.update(float(batch_idx + 10 * epoch))
                module.log("v", module.mean)

        module.validation_step = validation_step
        trainer = both.quiet(framework, tmp_path, max_epochs=2, num_sanity_val_steps=0)
        try:
            trainer.fit(module, data(), data())
        except Exception as error:
            outcomes.append(type(error).__name__)
        else:
            outcomes.append(float(trainer.callback_metrics["v"]))
    assert outcomes == ["MisconfigurationException", 2.0 if how == "reduction" else 11.0]


def test_weights_after_an_average_with_statistics(tmp_path):
    ends = {}
    for framework in pair():
        weights: list[float] = []

        class Model(framework.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(1)
                self.norm, self.layer = torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1)

            def training_step(self, batch, batch_idx, weights=weights):
                weights.append(self.layer.weight.item())
                return self.layer(self.norm(batch)).pow(2).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        callback = framework.module.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
        trainer = framework.Trainer(
            max_epochs=4, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
        )  # fmt: skip
        module = Model()
        trainer.fit(module, DataLoader(torch.arange(16.0).unsqueeze(1), batch_size=2))
        ends[framework.name] = weights[-1], module.layer.weight.item()
    assert ends["levin"][0] == ends["lightning"][0] == ends["levin"][1]
    assert ends["lightning"][1] != ends["lightning"][0]


AVERAGES = {
    "mean": lambda callbacks: callbacks.WeightAveraging(),
    "ema": lambda callbacks: callbacks.EMAWeightAveraging(decay=0.7, update_starting_at_epoch=1),
    "swa": lambda callbacks: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_that_is_in_a_second_fit(tmp_path, name):
    ends: dict[str, list[float]] = {}
    for framework in pair():

        class Model(framework.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1, 1, bias=False)
                torch.nn.init.ones_(self.layer.weight)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).pow(2).mean()

            def validation_step(self, batch, batch_idx):
                pass

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.001)

        callback = AVERAGES[name](framework.module.callbacks)
        for _ in range(2):
            trainer = framework.Trainer(
                max_epochs=4, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
            )  # fmt: skip
            module = Model()
            data = DataLoader(torch.arange(16.0).unsqueeze(1), batch_size=2)
            trainer.fit(module, data, data)
            ends.setdefault(framework.name, []).append(module.layer.weight.item())
    assert ends["levin"][0] == ends["lightning"][0] == ends["levin"][1] < 1
    assert ends["lightning"][1] == 1


@pytest.mark.parametrize(
    ("fails", "theirs", "ours"),
    [("training_step", 5.0, 6.0), ("validation_step", 2.5, 6.5), ("on_train_epoch_end", 2.5, 6.5)],
)
def test_the_metrics_after_an_error(tmp_path, fails, theirs, ours):
    found = []
    for framework in pair():

        class Model(framework.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer, self.num_steps = torch.nn.Linear(4, 1), 0

            def fail(self, hook, num_steps):
                if (hook, num_steps) == (fails, self.num_steps):
                    raise RuntimeError("broken")

            def training_step(self, batch, batch_idx):
                self.num_steps += 1
                self.log("step", float(self.num_steps), on_step=True)
                self.log("epoch", float(self.num_steps), on_step=False, on_epoch=True)
                self.fail("training_step", 6)
                return self.layer(batch).sum()

            def validation_step(self, batch, batch_idx):
                self.fail("validation_step", 8)

            def on_train_epoch_end(self):
                self.fail("on_train_epoch_end", 8)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        trainer = both.quiet(framework, tmp_path, max_epochs=3)
        loader = DataLoader(torch.ones(8, 4), batch_size=2)
        with pytest.raises(RuntimeError, match="broken"):
            trainer.fit(Model(), loader, loader)
        found.append(float(trainer.callback_metrics["step" if fails == "training_step" else "epoch"]))
    assert found == [theirs, ours]


def test_the_path_of_a_checkpoint_in_setup(tmp_path):
    seen = {}
    for framework in pair():

        class Look(framework.Callback):
            name = framework.name

            def setup(self, trainer, pl_module, stage):
                seen[self.name] = trainer.ckpt_path

        path = tmp_path / f"{framework.name}.ckpt"
        trainer = both.quiet(framework, tmp_path, max_epochs=1)
        trainer.fit(make(framework), data())
        trainer.save_checkpoint(path)
        trainer = both.quiet(framework, tmp_path, max_epochs=2, callbacks=[Look()])
        trainer.fit(make(framework), data(), ckpt_path=str(path))
    assert list(seen.values()) == [None, str(path)]


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_predictions_with_a_batch_sampler_are_those_of_its_sampler(tmp_path):
    seen = []
    for framework in pair():
        module = make(framework)
        module.forward = lambda batch: batch[:, 0].tolist()
        loader = DataLoader(torch.arange(6.0)[:, None], batch_sampler=BatchSampler([4, 1, 3], 2, drop_last=False))
        seen.append(both.quiet(framework, tmp_path).predict(module, loader))
    assert seen == [[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], [[4.0, 1.0], [3.0]]]


def _phase_two(module: Any) -> None:
    module.training_step = lambda batch, batch_idx: module.taken.append("second")


def _one_callback_more(module: Any) -> None:
    noting = {"on_train_batch_end": lambda self, *_: module.taken.append("second")}
    module.trainer.callbacks.append(type("Later", (module.callback_class,), noting)())


@pytest.mark.filterwarnings("ignore:.*returned `None`", "ignore:`training_step` returned None")
@pytest.mark.parametrize(("change", "named"), [(_phase_two, "training_step"), (_one_callback_more, "Later")])
def test_what_comes_in_the_middle_of_a_fit(tmp_path, change, named):
    taken = []
    for framework in pair():
        module = make(framework)
        module.taken, module.callback_class = [], framework.Callback
        starting = {
            "on_train_epoch_start": lambda self, trainer, model: change(model) if trainer.current_epoch == 1 else None
        }
        trainer = both.quiet(
            framework, tmp_path, max_epochs=3, callbacks=[type("Starting", (framework.Callback,), starting)()]
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, DataLoader(torch.ones(4, 4), batch_size=2))
        told = [str(each.message) for each in caught if "came, went or was replaced" in str(each.message)]
        assert [text.split(" ")[0] for text in told] == ([named] if framework.name == "levin" else [])
        taken.append(len(module.taken))
    assert taken == [4, 0]


@pytest.mark.parametrize("way", ["trainer", "strategy", "set up anew"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"])
def test_optimizers_that_are_exchanged_in_the_middle_of_a_fit_step_from_then_on(tmp_path, way, manual, hook):
    found = []
    for framework in pair():

        class Model(framework.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(1)
                self.layer, self.rates, self.calls = torch.nn.Linear(4, 1), [], 0
                self.automatic_optimization = not manual

            def training_step(self, batch, batch_idx):
                loss = self.layer(batch).mean()
                if manual:
                    optimizer = self.optimizers()
                    optimizer.zero_grad()
                    self.manual_backward(loss)
                    optimizer.step()
                self.rates.append(self.optimizers().param_groups[0]["lr"])
                return loss

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1 if self.calls < 2 else 0.001)

        def exchange(self, trainer, module, *_):
            module.calls += 1
            if module.calls == 2 or "start" in hook and "train" not in hook or hook == "on_train_start":
                module.calls = 2
                if way == "trainer":
                    trainer.optimizers = [module.configure_optimizers()]
                elif way == "strategy":
                    trainer.strategy.optimizers = [module.configure_optimizers()]
                else:
                    trainer.strategy.setup_optimizers(trainer)

        callback = type("Exchanging", (framework.Callback,), {hook: exchange})()
        trainer = both.quiet(framework, tmp_path, max_epochs=3, callbacks=[callback])
        module = Model()
        trainer.fit(module, DataLoader(torch.ones(4, 4), batch_size=2))
        found.append((module.rates, [value.tolist() for value in module.state_dict().values()], trainer.global_step))
    assert found[1] == found[0]
    assert 0.001 in found[1][0]
