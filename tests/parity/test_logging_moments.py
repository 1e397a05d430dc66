"""When and where ``self.log`` may be called, and what it changes there, on Lightning and on levin.

Each test reads callback_metrics, logged_metrics and progress_bar_metrics at every hook, and compares them, what the
logger received, what raised and where, and what validate and test return.
"""

from __future__ import annotations

import pytest
import torch

from tests.parity.logged import (
    EPOCH_HOOKS,
    FORBIDDEN_HOOKS,
    OWN_TRAIN_HOOKS,
    TRAIN_HOOKS,
    Log,
    assert_same,
    run_both,
)

FIT_HOOKS = [
    "training_step", "validation_step", *TRAIN_HOOKS, *OWN_TRAIN_HOOKS, *EPOCH_HOOKS[:6],
    "on_validation_batch_start", "on_validation_batch_end",
]  # fmt: skip
MOMENTS = [(None, None), (True, None), (None, True), (False, True), (True, False), (False, None), (False, False)]


def counted(module, batch, index):
    return torch.tensor(index + 1.5)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("hook", FIT_HOOKS)
def test_any_hook_logs_the_same(tmp_path, hook, moment):
    on_step, on_epoch = moment
    arguments = {"on_step": on_step, "on_epoch": on_epoch, "prog_bar": on_step is None, "batch_size": 1}
    assert_same(*run_both(tmp_path, [Log(hook, "a", counted, arguments)]))


@pytest.mark.parametrize(
    "destination", [{"prog_bar": True, "logger": False}, {"prog_bar": True}, {"logger": True}], ids=str
)
@pytest.mark.parametrize("hook", ["training_step", "validation_step", "on_train_epoch_end", "on_train_start"])
def test_values_go_where_they_are_sent(tmp_path, hook, destination):
    script = [Log(hook, "a", 1.0, {"on_epoch": True, **destination}), Log(hook, "b", 2.0, {"prog_bar": True})]
    assert_same(*run_both(tmp_path, script))


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("by_callback", [False, True], ids=["module", "callback"])
@pytest.mark.parametrize("hook", [*FORBIDDEN_HOOKS, "predict_step", "on_sanity_check_start", "on_sanity_check_end"])
def test_a_hook_that_cannot_log_raises(tmp_path, hook, by_callback):
    if by_callback and not hook.startswith(
        ("on_sanity", "on_fit", "setup", "teardown", "on_predict", "on_train_end", "on_save")
    ):
        hook = "on_validation_end"
    if not by_callback and "sanity" in hook:
        hook = "on_validation_end"
    method = "predict" if "predict" in hook else "test" if "test_" in hook else "fit"
    theirs, ours = run_both(tmp_path, [Log(hook, "a", 1.0, {}, by_callback)], method=method)
    assert_same(theirs, ours)
    called = any(entry[1:4] == (hook, "a", "raises") for entry in ours["seen"])
    assert called == (ours["error"] is not None)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize(
    "hook", ["step", "on_{}_batch_start", "on_{}_batch_end", "on_{}_start", "on_{}_epoch_start", "on_{}_epoch_end"]
)
@pytest.mark.parametrize("moment", [(None, None), (True, None), (True, False)], ids=str)
@pytest.mark.parametrize(("method", "num_loaders"), [("validate", 1), ("validate", 2), ("test", 3)])
def test_an_evaluation_logs_the_same(tmp_path, method, num_loaders, hook, moment):
    stage = "validation" if method == "validate" else "test"
    hook = f"{stage}_step" if hook == "step" else hook.format(stage)
    script = [Log(hook, "a", counted, {"on_step": moment[0], "on_epoch": moment[1], "prog_bar": True})]
    assert_same(*run_both(tmp_path, script, method=method, num_loaders=num_loaders))


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("method", ["fit", "validate"])
@pytest.mark.parametrize("hook", ["validation_step", "on_validation_batch_end", "on_validation_epoch_end"])
@pytest.mark.parametrize("moment", [(None, None), (True, True), (True, False)], ids=str)
def test_loaders_without_their_index_in_the_name(tmp_path, hook, moment, method):
    if hook == "on_validation_epoch_end" and moment[0]:
        moment = (False, True)
    arguments = {"on_step": moment[0], "on_epoch": moment[1], "add_dataloader_idx": False}
    theirs, ours = run_both(tmp_path, [Log(hook, "a", 1.0, arguments)], method=method, num_loaders=2)
    assert_same(theirs, ours)
    if hook != "on_validation_epoch_end":
        assert ours["error"] == "MisconfigurationException"  # two loaders would be mixed under one name


@pytest.mark.parametrize("add", [True, False])
def test_loaders_with_names_of_their_own(tmp_path, add):
    def per_loader(module, batch, index):
        loader = module._seen_loader
        return {f"own_{loader}": torch.tensor(loader + index / 4)}

    def note(module, batch, index):
        # The loaders differ in their first value.
        first = round(float(batch[0].flatten()[0]), 4)
        module._firsts = getattr(module, "_firsts", [])
        if index == 0:
            module._firsts.append(first)
        module._seen_loader = (len(module._firsts) - 1) % 2
        return 0.0

    script = [
        Log("validation_step", "n", note, {"on_step": True, "on_epoch": True}),
        Log("validation_step", "<dict>", per_loader, {"add_dataloader_idx": add}),
    ]
    assert_same(*run_both(tmp_path, script, method="validate", num_loaders=2))


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("name", ["a/dataloader_idx_0", "b/dataloader_idx_12/c", "dataloader_idx_0", "a/b"])
def test_names_with_the_suffix_of_a_loader_are_refused(tmp_path, name):
    assert_same(*run_both(tmp_path, [Log("training_step", name)], {"max_epochs": 1}))


def test_reading_the_metrics_changes_nothing(tmp_path):
    script = [
        Log(hook, hook, counted, {"on_epoch": True, "prog_bar": True, "batch_size": 2})
        for hook in ("training_step", "on_train_batch_end", "validation_step", "on_validation_batch_end", "on_train_epoch_start")
    ]  # fmt: skip
    for reads in (True, False):
        theirs, ours = run_both(tmp_path, script, {"accumulate_grad_batches": 2}, reads=reads)
        assert_same(theirs, ours)
        if reads:
            lines = ours["lines"]
    assert ours["lines"] == lines


OTHERS = [
    {}, {"prog_bar": True}, {"logger": False}, {"logger": True}, {"on_step": True}, {"on_epoch": True},
    {"on_step": False, "on_epoch": True}, {"reduce_fx": "max"}, {"batch_size": 2}, {"sync_dist": True},
    {"rank_zero_only": True}, {"add_dataloader_idx": False}, {"reduce_fx": torch.mean}, {"on_step": False},
]  # fmt: skip


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("other", OTHERS, ids=" ".join)
@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_the_same_name_again_in_one_hook(tmp_path, hook, other):
    theirs, ours = run_both(tmp_path, [Log(hook, "a", 1.0), Log(hook, "a", 3.0, other)], {"max_epochs": 1})
    if ours["error"] and hook == "training_step":
        # Differs on purpose: what the failing batch logged can be read after the failure.
        assert (theirs["end"], ours["end"]) == (({}, {}, {}), ({"a": 1.0}, {"a": 1.0}, {}))
        theirs["end"] = ours["end"]
    assert_same(theirs, ours)


@pytest.mark.lightning_raises("MisconfigurationException")
def test_a_graph_is_never_kept(tmp_path):
    """Differs on purpose: values are always detached, so ``enable_graph`` is no difference between two calls."""
    script = [Log("training_step", "a", 1.0), Log("training_step", "a", 3.0, {"enable_graph": True})]
    theirs, ours = run_both(tmp_path, script, {"max_epochs": 1})
    assert (theirs["error"], ours["error"]) == ("MisconfigurationException", None)


@pytest.mark.parametrize("other", OTHERS[:9:2], ids=" ".join)
@pytest.mark.parametrize("by_callback", [False, True], ids=["module", "callback"])
def test_the_same_name_again_in_another_hook(tmp_path, by_callback, other):
    script = [
        Log("training_step", "a", 1.0), Log("on_train_batch_end", "a", 3.0, other, by_callback),
        Log("validation_step", "v", 1.0), Log("on_validation_batch_end", "v", 3.0, other, by_callback),
        Log("on_train_epoch_end", "a", 7.0),
    ]  # fmt: skip
    assert_same(*run_both(tmp_path, script))


def test_the_same_name_again_adds_to_the_epoch(tmp_path):
    script = [
        Log("training_step", "a", lambda module, batch, index: torch.tensor(index + first), {"on_epoch": True})
        for first in (0.0, 5.0)
    ]
    assert_same(*run_both(tmp_path, script))


@pytest.mark.parametrize("names", [("a", "a_step"), ("a_step", "a"), ("a", "a_epoch")])
def test_a_name_that_another_one_forks_into(tmp_path, names):
    script = [Log("training_step", name, 1.0 + i, {"on_epoch": True}) for i, name in enumerate(names)]
    assert_same(*run_both(tmp_path, script))
