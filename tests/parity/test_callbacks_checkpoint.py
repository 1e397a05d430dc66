"""ModelCheckpoint with settings drawn at random, on Lightning and on levin: files, attributes, to_yaml, warnings."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.parity import both
from tests.parity.test_callbacks import callbacks_of, fit_both, listing, loader, model, relative

QUICK = {
    "phases": [Phase.generate],
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def kept(
    framework: Any, folder: Any, callbacks: list[Any], values: tuple[float, ...], fail_at: Any = None, **flags: Any
) -> Any:
    """Files and attributes after a fit, or how it failed."""
    error = None
    trainer = both.quiet(
        framework,
        folder,
        callbacks=callbacks,
        **{"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": True, **flags},
    )
    try:
        trainer.fit(model(framework, values, fail_at), loader(), loader(1))
    except Exception as caught:
        both.caught(caught)
        error = type(caught).__name__
    found = []

    def short(value: Any) -> Any:
        return relative(relative(value, folder), framework.name)

    for callback in callbacks:
        callback.to_yaml(folder / "scores.yaml")
        names = "best_model_path last_model_path kth_best_model_path kth_value best_model_score current_score best_k_models".split()
        found.append(
            (
                {name: short(getattr(callback, name)) for name in names},
                short(yaml.safe_load((folder / "scores.yaml").read_text())),
                short(callback.state_dict()),
                callback.state_key,
            )
        )
        (folder / "scores.yaml").unlink()
    return error, [path.replace(f"{framework.name}/", "") for path in listing(folder) if path.endswith("ckpt")], found


TRIGGERS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"every_n_train_steps": st.integers(0, 5)}),
    st.fixed_dictionaries({"every_n_epochs": st.integers(0, 3)}),
)
FILENAMES = [
    None,
    "{epoch}",
    "{step}",
    "{epoch}-{val:.2f}",
    "{val}",
    "fixed",
    "{a/b:.2f}",
    "{missing}-{step:03d}",
    "sub/{epoch}",
]


@pytest.mark.lightning_raises("MisconfigurationException")
@settings(max_examples=45, **QUICK)
@given(
    arguments=st.fixed_dictionaries(
        {
            "monitor": st.sampled_from([None, "val", "a/b"]), "save_top_k": st.integers(-1, 3), "mode": st.sampled_from(["min", "max"]),
            "save_last": st.sampled_from([None, True, False, "link"]), "filename": st.sampled_from(FILENAMES),
        },
        optional={
            "auto_insert_metric_name": st.just(False), "save_weights_only": st.just(True), "enable_version_counter": st.just(False),
            "save_on_train_epoch_end": st.booleans(),
        },
    ),
    trigger=TRIGGERS,
    flags=st.fixed_dictionaries(
        {},
        optional={
            "val_check_interval": st.sampled_from([2, 0.5]), "check_val_every_n_epoch": st.just(2), "accumulate_grad_batches": st.just(2),
            "max_steps": st.integers(3, 9), "limit_val_batches": st.just(0),
        },
    ),
    values=st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, math.nan, math.inf]), min_size=3, max_size=3),
    fail_at=st.sampled_from([None, None, None, (1, 2)]),
)  # fmt: skip
def test_any_settings_keep_the_same_files(tmp_path_factory, arguments, trigger, flags, values, fail_at):
    def run(framework, folder):
        try:
            callback = callbacks_of(framework).ModelCheckpoint(folder / "files", **arguments, **trigger)
        except Exception as error:
            both.caught(error)
            return type(error).__name__
        return kept(framework, folder, [callback], tuple(values), fail_at, **flags)

    if flags.get("limit_val_batches") == 0:
        flags.pop("check_val_every_n_epoch", None)  # Lightning would wait for a validation that never comes
    if trigger.get("every_n_train_steps") and arguments["monitor"] == "val" and not flags.get("limit_val_batches") == 0:
        # A save that was due before the first validation is made right after it; Lightning may forget it (see below).
        arguments["monitor"] = None
        arguments["save_top_k"] = min(arguments["save_top_k"], 1)
    theirs, ours = fit_both(tmp_path_factory.mktemp("any"), run)
    assert ours == theirs


def test_a_save_that_waits_for_the_first_validation_is_made_then(tmp_path):
    """Differs on purpose: Lightning forgets it unless save_on_train_epoch_end=False."""

    def run(framework, folder, **arguments):
        callback = callbacks_of(framework).ModelCheckpoint(
            folder, monitor="val", save_top_k=-1, every_n_train_steps=3, **arguments
        )
        return kept(framework, folder, [callback], (3.0, 1.0, 2.0), max_epochs=1)[1]

    assert fit_both(tmp_path / "a", run) == [[], ["epoch=0-step=4.ckpt"]]
    theirs, ours = fit_both(tmp_path / "b", lambda f, folder: run(f, folder, save_on_train_epoch_end=False))
    assert ours == theirs == ["epoch=0-step=4.ckpt"]


def test_a_file_of_the_ranking_survives_an_exception(tmp_path):
    """Differs on purpose: Lightning writes over a ranked file of the same name."""

    def run(framework, folder):
        callback = callbacks_of(framework).ModelCheckpoint(
            folder, monitor="a/b", save_top_k=3, filename="{val}", save_on_exception=True
        )
        return kept(framework, folder, [callback], (1.0, 0.0, 0.0), (1, 2))[1]

    theirs, ours = fit_both(tmp_path, run)
    assert theirs == ["val=1.0.ckpt"]
    assert ours == ["val=1.0-v1.ckpt", "val=1.0.ckpt"]


@settings(max_examples=10, **QUICK)
@given(
    first=st.fixed_dictionaries({"monitor": st.sampled_from([None, "val"]), "save_last": st.sampled_from([None, True]), "save_top_k": st.sampled_from([1, -1])}),
    second=TRIGGERS,
    default_folder=st.booleans(),
)  # fmt: skip
def test_several_at_once(tmp_path_factory, first, second, default_folder):
    def run(framework, folder):
        kind = callbacks_of(framework).ModelCheckpoint
        where = [None, None] if default_folder else [folder / "a", folder / "b"]
        callbacks = [
            kind(where[0], **first),
            kind(where[1], monitor="a/b", filename="two-{epoch}-{step}", save_top_k=2, **second),
        ]
        if callbacks[0].state_key == callbacks[1].state_key:
            return None
        return kept(framework, folder, callbacks, (3.0, 1.0, 2.0))

    theirs, ours = fit_both(tmp_path_factory.mktemp("any"), run)
    assert ours == theirs


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize(
    "arguments",
    [
        {"every_n_train_steps": 1, "every_n_epochs": 1}, {"every_n_train_steps": -1}, {"every_n_epochs": -1}, {"save_top_k": -2},
        {"save_top_k": 2}, {"mode": "best"}, {"monitor": "val", "save_top_k": -2}, {"save_last": "copy"}, {"save_top_k": 2, "monitor": None},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_refused(tmp_path, arguments):
    def run(framework, folder):
        try:
            callbacks_of(framework).ModelCheckpoint(folder, **arguments)
        except Exception as error:
            both.caught(error)
            return type(error).__name__
        return None

    theirs, ours = fit_both(tmp_path, run)
    assert ours == theirs or (theirs is None and ours is not None)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("when", ["epoch", "step"])
@pytest.mark.parametrize("flags", [{}, {"limit_val_batches": 0}], ids=str)
def test_a_value_that_is_never_logged(tmp_path, when, flags):
    def run(framework, folder):
        arguments = {"every_n_train_steps": 2} if when == "step" else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback = callbacks_of(framework).ModelCheckpoint(folder, monitor="typo", **arguments)
            result = kept(framework, folder, [callback], (1.0,), **flags)
        return result, sum("typo" in str(warning.message) for warning in caught) > 0

    theirs, ours = fit_both(tmp_path, run)
    if when == "step" and flags:
        assert ours[1]  # Lightning waits without a word
        theirs, ours = theirs[0], ours[0]
    assert ours == theirs
