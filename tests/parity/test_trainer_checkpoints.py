"""Where checkpoints and logs are put, and which checkpoint each form of ``ckpt_path`` means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.parity import both
from tests.parity.trainer_runs import Watched, listening, plain, recording_data, view_all, without_own_key


def callbacks_of(framework):
    return framework.module.callbacks


def tree(folder: Path) -> list[str]:
    """Every file below, with what is random in the names of event files left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            found.append(name.split("tfevents")[0] if "tfevents" in name else name)
    return sorted(found)


def small(framework, calls=None):
    module, callback = both.recording_module(framework, [] if calls is None else calls)
    return module, callback


LAYOUTS = {
    "defaults": {"logger": True, "enable_checkpointing": True},
    "no logger": {"enable_checkpointing": True},
    "no checkpoints": {"logger": True},
    "two epochs": {"logger": True, "enable_checkpointing": True, "max_epochs": 2},
    "steps": {"enable_checkpointing": True, "max_steps": 3, "max_epochs": -1},
    "accumulated": {"enable_checkpointing": True, "accumulate_grad_batches": 2},
    "fast": {"logger": True, "enable_checkpointing": True, "fast_dev_run": True},
    "no training": {"logger": True, "enable_checkpointing": True, "limit_train_batches": 0},
    "no epochs": {"logger": True, "enable_checkpointing": True, "max_epochs": 0},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_files_in_the_same_folders(tmp_path, name):
    results = []
    for framework in (both.lightning(), both.levin()):
        with listening():
            views = []
            for _ in range(2):
                trainer = both.quiet(framework, tmp_path, **{"max_epochs": 1, **LAYOUTS[name]})
                trainer.fit(small(framework)[0], both.loader(), both.loader(2, seed=5))
                root = tmp_path / framework.name
                checkpoint = trainer.checkpoint_callback
                views.append(
                    [
                        str(trainer.log_dir).replace(str(root), ""), str(trainer.default_root_dir).replace(str(root), ""),
                        getattr(checkpoint, "best_model_path", "").replace(str(root), ""),
                        str(getattr(checkpoint, "dirpath", "")).replace(str(root), ""),
                    ]
                )  # fmt: skip
        results.append((tree(root), views))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["TensorBoardLogger", "CSVLogger", "both", "other"])
@pytest.mark.parametrize("naming", [{}, {"name": "run", "version": 3}, {"name": "", "version": "one"}])
def test_the_first_logger_decides_the_folders(tmp_path, kind, naming):
    results = []
    for framework in (both.lightning(), both.levin()):
        root = tmp_path / framework.name
        loggers = framework.module.loggers
        if kind == "other":
            made = both.recording_logger(framework, both.Lines())
        elif kind == "both":
            made = [loggers.CSVLogger(root / "logs", **naming), loggers.TensorBoardLogger(root / "logs2", **naming)]
        else:
            made = getattr(loggers, kind)(root / "logs", **naming)
        with listening():
            trainer = both.quiet(framework, tmp_path, logger=made, enable_checkpointing=True, max_epochs=1)
            before = str(trainer.log_dir).replace(str(root), "")
            trainer.fit(small(framework)[0], both.loader(2))
        results.append((tree(root), before, str(trainer.log_dir).replace(str(root), ""), len(trainer.loggers)))
        trainer.logger = None
        assert (trainer.logger, trainer.loggers, trainer.log_dir) == (None, [], str(root))
    assert results[0] == results[1]


def trained(framework, tmp_path, *, callbacks=(), calls=None, **flags):
    module, callback = small(framework, calls)
    settings = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 1, **flags}
    trainer = both.quiet(framework, tmp_path, callbacks=[*callbacks, callback], **settings)
    with listening():
        trainer.fit(module, both.loader(), both.loader(2, seed=5))
    return trainer, module


def outcome(trainer, function, root):
    """What a user sees of one call: its result or error, the checkpoint that it used, lines and warnings about it."""
    with listening() as heard:
        try:
            result = plain(function())
        except Exception as error:
            both.caught(error)
            name = type(error).__name__
            result = "ValueError" if name in ("MisconfigurationException", "ValueError") else name
    said = [line.replace(str(root), "") for line in heard["lines"] if line.startswith(("Restor", "Loaded"))]
    warned = sum("ckpt_path" in line for line in heard["warnings"])
    return result, str(trainer.ckpt_path).replace(str(root), ""), said, warned


FORMS = {
    "none, model": (None, True),
    "none, no model": (None, False),
    "best, model": ("best", True),
    "best, no model": ("best", False),
    "last, model": ("last", True),
    "hpc, model": ("hpc", True),
    "missing": ("nowhere.ckpt", True),
    "path": ("PATH", True),
    "path, no model": ("PATH", False),
    "Path": ("PATHLIB", True),
    "file URL": ("URL", True),
}
KEEPERS = {
    "default": lambda cb: [],
    "monitor": lambda cb: [cb.ModelCheckpoint(monitor="val", save_top_k=2)],
    "last": lambda cb: [cb.ModelCheckpoint(save_last=True)],
    "two": lambda cb: [cb.ModelCheckpoint(monitor="val"), cb.ModelCheckpoint(save_last=True, filename="b")],
}


@pytest.mark.lightning_raises("ValueError", "FileNotFoundError")
@pytest.mark.parametrize(
    ("keeper", "method"),
    [
        ("default", "validate"), ("monitor", "validate"), ("last", "validate"), ("two", "validate"), ("default", "fit"),
        ("monitor", "fit"), ("last", "fit"), ("two", "predict"),
    ],
)  # fmt: skip
def test_each_form_of_ckpt_path(tmp_path, keeper, method):
    results = []
    for framework in (both.lightning(), both.levin()):
        root = tmp_path / framework.name
        trainer, module = trained(framework, tmp_path, callbacks=KEEPERS[keeper](callbacks_of(framework)))
        saved = root / "mine.ckpt"
        trainer.save_checkpoint(saved)
        seen = {}
        for name, (given, has_model) in FORMS.items():
            path = {"PATH": str(saved), "PATHLIB": saved, "URL": f"file://{saved}"}.get(given, given)
            if method == "fit":
                if not has_model:
                    continue
                seen[name] = outcome(
                    trainer, lambda path=path: trainer.fit(module, both.loader(), ckpt_path=path), root
                )
                continue
            call = getattr(trainer, method)
            model = module if has_model else None
            seen[name] = outcome(
                trainer, lambda call=call, model=model, path=path: call(model, both.loader(2), ckpt_path=path), root
            )
        results.append(seen)
    theirs, ours = results
    # There the hooks up to the reading run first, here a file that is not there fails at once.
    assert theirs.pop("missing")[0] == ours.pop("missing")[0] == "FileNotFoundError"
    for name in theirs:
        assert ours[name] == theirs[name], name


def test_best_without_anything_saved(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        seen = []
        for flags in ({}, {"fast_dev_run": True}, {"enable_checkpointing": False}):
            trainer = both.quiet(framework, tmp_path, **{"enable_checkpointing": True, **flags})
            with listening(), pytest.raises(Exception, match="best") as caught:
                trainer.validate(small(framework)[0], both.loader(1), ckpt_path="best")
            seen.append((isinstance(caught.value, ValueError), "fast_dev_run" in str(caught.value)))
        results.append(seen)
    assert results[0] == results[1]


def test_last_without_any_file_warns_and_starts_afresh(tmp_path):
    for framework in (both.lightning(), both.levin()):
        trainer = both.quiet(framework, tmp_path, max_epochs=1, enable_checkpointing=True)
        with listening() as heard:
            trainer.fit(small(framework)[0], both.loader(1), ckpt_path="last")
        assert trainer.global_step == 1
        assert sum("No checkpoint will be loaded" in line for line in heard["warnings"]) == 1


def test_a_path_that_was_set_is_used_by_calls_without_one(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        root = tmp_path / framework.name
        trainer, module = trained(framework, tmp_path)
        for name in ("a.ckpt", "b.ckpt"):
            trainer.save_checkpoint(root / name)
        trainer.ckpt_path = str(root / "a.ckpt")
        seen = [
            outcome(trainer, lambda: trainer.validate(module, both.loader(2)), root),
            outcome(trainer, lambda: trainer.test(module, both.loader(2)), root),
            outcome(trainer, lambda: trainer.test(module, both.loader(2), ckpt_path=str(root / "b.ckpt")), root),
            outcome(trainer, lambda: trainer.test(module, both.loader(2)), root),
        ]
        trainer.ckpt_path = None
        seen.append(outcome(trainer, lambda: trainer.test(module, both.loader(2)), root))
        results.append([(path, said, warned) for _, path, said, warned in seen])
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_what_a_restore_calls(tmp_path, method):
    results = []
    for framework in (both.lightning(), both.levin()):
        trainer, _ = trained(framework, tmp_path)
        saved = tmp_path / framework.name / "mine.ckpt"
        trainer.save_checkpoint(saved)
        calls: list = []
        module, callback = small(framework, calls)
        fresh = both.quiet(framework, tmp_path, max_epochs=3, callbacks=[callback], enable_checkpointing=True)
        with listening():
            getattr(fresh, method)(module, datamodule=recording_data(framework, calls), ckpt_path=saved)
        results.append((without_own_key(calls), view_all(fresh), fresh.fit_loop.epoch_progress.current.completed))
    assert results[0] == results[1]


@pytest.mark.lightning_raises("KeyError")
@pytest.mark.parametrize("weights_only", [None, False, True])
def test_save_checkpoint_with_weights_alone(tmp_path, weights_only):
    results = []
    for framework in (both.lightning(), both.levin()):
        calls: list = []
        trainer, module = trained(framework, tmp_path, calls=calls)
        del calls[:]
        saved = tmp_path / framework.name / "mine.ckpt"
        trainer.save_checkpoint(saved, weights_only=weights_only)
        keys = sorted(torch.load(saved, weights_only=False))
        fresh = both.quiet(framework, tmp_path, max_epochs=3)
        with listening():
            try:
                fresh.fit(small(framework)[0], both.loader(1), ckpt_path=saved)
                error = None
            except Exception as caught:
                both.caught(caught)
                error = type(caught).__name__
        results.append((without_own_key(calls), [key for key in keys if key != "levin"], error))
    assert results[0] == results[1]


def test_save_checkpoint_needs_a_model(tmp_path):
    for framework in (both.lightning(), both.levin()):
        with listening(), pytest.raises(AttributeError, match="Saving a checkpoint is only possible"):
            both.quiet(framework, tmp_path).save_checkpoint(tmp_path / "a.ckpt")


def test_storage_options_need_an_io_that_takes_them(tmp_path):
    for framework in (both.lightning(), both.levin()):
        trainer, _ = trained(framework, tmp_path, fast_dev_run=True)
        with pytest.raises(TypeError, match="storage_options"):
            trainer.save_checkpoint(tmp_path / "a.ckpt", storage_options={"mode": "fast"})


@pytest.mark.lightning_raises("UnpicklingError")
@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_weights_only_reaches_the_reader_in_all_four_calls(tmp_path, method, weights_only):
    class Opaque:
        def __eq__(self, other):
            return isinstance(other, Opaque)

    globals()["Opaque"] = Opaque
    Opaque.__module__, Opaque.__qualname__ = __name__, "Opaque"
    results = []
    for framework in (both.lightning(), both.levin()):
        trainer, module = trained(framework, tmp_path)
        saved = tmp_path / framework.name / "mine.ckpt"
        trainer.save_checkpoint(saved)
        content = torch.load(saved, weights_only=False)
        content["mine"] = Opaque()
        torch.save(content, saved)
        trainer.fit_loop.max_epochs = 3
        with listening():
            try:
                getattr(trainer, method)(module, both.loader(1), ckpt_path=saved, weights_only=weights_only)
                results.append("read")
            except Exception as error:
                both.caught(error)
                results.append(type(error).__name__)
    assert results[0] == results[1]
    assert (results[1] == "read") is (weights_only is False)


def test_a_checkpoint_further_than_max_epochs_is_refused(tmp_path):
    for framework in (both.lightning(), both.levin()):
        trainer, module = trained(framework, tmp_path)
        saved = tmp_path / framework.name / "mine.ckpt"
        trainer.save_checkpoint(saved)
        fresh = both.quiet(framework, tmp_path, max_epochs=1)
        with listening(), pytest.raises(Exception, match=r"current_epoch=2.*max_epochs=1") as caught:
            fresh.fit(module, both.loader(), ckpt_path=saved)
        assert type(caught.value).__name__ == "MisconfigurationException"


SAVED_IN = [
    ("on_train_start", {}), ("on_train_epoch_start", {}), ("on_train_batch_start", {}), ("on_train_batch_end", {}),
    ("on_train_epoch_end", {}), ("on_validation_start", {}), ("on_validation_batch_end", {}), ("on_validation_end", {}),
    ("on_train_end", {}), ("on_validation_end", {"val_check_interval": 2}), ("on_train_batch_end", {"accumulate_grad_batches": 2}),
]  # fmt: skip
EXACT = [
    ("on_train_batch_start", 0), ("on_train_batch_end", 3), ("on_validation_batch_end", 0), ("on_validation_batch_end", 3),
    ("on_validation_start", 0),
]  # fmt: skip
"""Where Lightning goes on otherwise than an unbroken run: design, "mid-epoch resume starts the data again"."""


def loops_of(calls):
    """The hooks of the loops over epochs and batches, with the index of the batch."""
    names = ("epoch_start", "epoch_end", "batch_start", "batch_end", "validation_start", "validation_end")
    return [(call[1], call[3:]) for call in calls if call[0] == "C" and call[1].endswith(names)]


@pytest.mark.parametrize("occurrence", [0, 3])
@pytest.mark.parametrize(("hook", "flags"), SAVED_IN)
def test_a_run_that_goes_on_from_a_file_saved_in_any_hook(tmp_path, hook, flags, occurrence):
    results = []
    for framework in (both.lightning(), both.levin()):
        saved = tmp_path / framework.name / "mine.ckpt"
        holder: list = []
        count = [0]

        def save(number, call, saved=saved, holder=holder, count=count):
            if call[:2] == ("C", hook) and not saved.exists():
                if count[0] == occurrence:
                    holder[0].save_checkpoint(saved)
                count[0] += 1

        settings = {"max_epochs": 3, "num_sanity_val_steps": 0, **flags}
        unbroken = Watched(save)
        module, callback = small(framework, unbroken)
        trainer = both.quiet(framework, tmp_path, callbacks=[callback], **settings)
        holder.append(trainer)
        with listening():
            trainer.fit(module, both.loader(), both.loader(2, seed=5))
        if not saved.exists():
            assert count[0] <= occurrence
            results.append(None)
            continue
        calls: list = []
        module, callback = small(framework, calls)
        fresh = both.quiet(framework, tmp_path, callbacks=[callback], **settings)
        with listening():
            fresh.fit(module, both.loader(), both.loader(2, seed=5), ckpt_path=saved)
        hooks = [call[:3] for call in without_own_key(calls) if call[0] == "C" and "state_dict" not in call[1]]
        results.append((hooks, fresh.global_step, fresh.current_epoch))
    if (hook, occurrence) in EXACT:
        assert results[0] != results[1]
        rest = loops_of(calls)
        assert rest == loops_of(unbroken)[-len(rest) :]
        assert results[0][1:] == results[1][1:]
    else:
        assert results[0] == results[1]


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("way", ["connect", "_lightning_module"])
@pytest.mark.parametrize("before", ["nothing", "fit", "test"])
def test_a_module_that_was_never_fitted_is_saved_once_the_strategy_is_connected_to_it(
    tmp_path, way, before, weights_only
):
    found = {}
    for framework in (both.lightning(), both.levin()):
        data = DataLoader(torch.arange(8.0).reshape(8, 1), batch_size=2)

        class Model(framework.LightningModule):
            def __init__(self, weight=1.0):
                super().__init__()
                self.save_hyperparameters()
                self.layer = torch.nn.Linear(1, 1, bias=False)
                torch.nn.init.constant_(self.layer.weight, weight)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).mean()

            def test_step(self, batch, batch_idx):
                pass

            def on_save_checkpoint(self, checkpoint):
                checkpoint["saved by"] = self.hparams.weight

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.01)

        with listening():
            trainer = both.quiet(framework, tmp_path, max_epochs=1)
            if before != "nothing":
                getattr(trainer, before)(Model(5.0), data)
            model = Model(2.0)
            if way == "connect":
                trainer.strategy.connect(model)
            else:
                trainer.strategy._lightning_module = model
            path = tmp_path / f"{framework.name}.ckpt"
            trainer.save_checkpoint(path, weights_only=weights_only)
            checkpoint = torch.load(path, weights_only=False)
            again = None
            if not weights_only and before != "fit":
                again = both.quiet(framework, tmp_path, max_epochs=2)
                again.fit(Model(7.0), data, ckpt_path=path)
                again = (again.global_step, float(again.lightning_module.layer.weight))
        assert checkpoint["saved by"] == 2.0
        found[framework.name] = (
            checkpoint["state_dict"]["layer.weight"].item(),
            checkpoint["hyper_parameters"],
            checkpoint["global_step"],
            again,
        )
    assert found["levin"] == found["lightning"]
