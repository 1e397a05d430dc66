"""ModelPruning: what is pruned and when, beside Lightning; what checkpoints hold."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import levin
from levin.callbacks import ModelPruning
from levin.callbacks.pruning import plain_state
from levin.demos.boring_classes import BoringModel
from tests.parity import both


def small(module):
    class Net(module.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.net = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

        def training_step(self, batch, batch_idx):
            return self.net(batch).pow(2).mean()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Net()


def outcome(framework, tmp_path, options, method="l1_unstructured"):
    """Weights after a fit, the keys and weights of its checkpoint, and what was logged; or the error."""
    if callable(method) and not isinstance(method, type):
        method = method()
    try:
        model = small(framework.module)
        if "parameters_to_prune" in options:
            options = {**options, "parameters_to_prune": options["parameters_to_prune"](model)}
        callback = framework.module.callbacks.ModelPruning(method, **options)
        trainer = both.quiet(
            framework, tmp_path / framework.name, max_epochs=3, callbacks=[callback], enable_checkpointing=True,
            num_sanity_val_steps=1, logger=False,
        )  # fmt: skip
        torch.manual_seed(1)
        data = torch.randn(8, 32)
        torch.manual_seed(5)
        trainer.fit(model, DataLoader(data, batch_size=2), DataLoader(data, batch_size=4))
    except Exception as error:
        # levin's MisconfigurationException is a ValueError as well; the name is what both have.
        return type(error).__name__
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    # Before training ends the parameters are still masked ones, which a checkpoint does not show.
    return (
        {key: value.tolist() for key, value in model.state_dict().items()},
        {key: value.tolist() for key, value in saved.items()},
        sorted(name for name, _ in model.named_parameters()),
    )


OPTIONS = {
    "default": {},
    "local": {"use_global_unstructured": False, "amount": 0.3},
    "by the epoch": {"amount": lambda epoch: 0.5 if epoch == 1 else 0.0},
    "lottery": {"amount": lambda epoch: 0.5 if epoch == 1 else 0.0, "use_lottery_ticket_hypothesis": True},
    "count": {"amount": 10},
    "some epochs": {"apply_pruning": lambda epoch: epoch != 1},
    "lottery in one epoch": {"use_lottery_ticket_hypothesis": lambda epoch: epoch == 2},
    "weights": {"parameter_names": ["weight"]},
    "validation": {"prune_on_train_epoch_end": False},
    "not permanent": {"make_pruning_permanent": False, "use_lottery_ticket_hypothesis": False},
    "bad amount": {"amount": "much"},
    "bad name": {"parameter_names": ["weights"]},
    "bad verbose": {"verbose": 3},
    "never": {"apply_pruning": False},
    "chosen": {"parameters_to_prune": lambda model: [(model.net[0], "weight"), (model.net[2], "bias")], "amount": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_as_lightning_prunes(tmp_path, options):
    options = {"use_lottery_ticket_hypothesis": False} | options
    assert outcome(both.levin(), tmp_path, options) == outcome(both.lightning(), tmp_path, options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ln_structured", {"use_global_unstructured": False, "pruning_dim": 0, "pruning_norm": 2, "parameter_names": ["weight"]}),
        ("random_structured", {"use_global_unstructured": False, "pruning_dim": 1, "parameter_names": ["weight"]}),
        ("random_unstructured", {}),
        (prune.L1Unstructured, {}),
        (prune.LnStructured, {}),
        (prune.L1Unstructured, {"use_global_unstructured": False}),
        ("ln_structured", {"pruning_dim": 0}),
        ("ln_structured", {}),
        ("random_structured", {"pruning_dim": 0}),
        ("l2", {}),
        (object, {}),
    ],
)  # fmt: skip
def test_each_method_as_lightning_has_it(tmp_path, method, options):
    options = {"use_lottery_ticket_hypothesis": False} | options
    assert outcome(both.levin(), tmp_path, options, method) == outcome(both.lightning(), tmp_path, options, method)


def fit(callback, tmp_path, model=None, **options):
    model = model or BoringModel()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = levin.Trainer(
        **{"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0, "default_root_dir": tmp_path}
        | quiet
        | options,
        callbacks=callback,
    )
    trainer.fit(model)
    return model, trainer


def test_what_is_pruned_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "levin"):
        model, _ = fit([ModelPruning("l1_unstructured", verbose=2)], tmp_path)
    counts = [int((value == 0).sum()) for value in model.state_dict().values()]
    of_first = [text for text in caplog.messages if text.startswith("Applied")][:3]
    layer = "`Linear(in_features=32, out_features=2, bias=True)"
    assert of_first[0] == "Applied `L1Unstructured`. Pruned: 0/66 (0.00%) -> 33/66 (50.00%)"
    told = [re.fullmatch(r"(.*Pruned: 0 \(0.00%\) -> )(\d+) \((\d+\.\d\d)%\)", text) for text in of_first[1:]]
    names = [
        f"Applied `L1Unstructured` to {layer}.{name}` with amount=0.5. Pruned: 0 (0.00%) -> "
        for name in ("weight", "bias")
    ]
    assert [match[1] for match in told] == names
    assert sum(int(match[2]) for match in told) == 33
    assert [match[3] for match in told] == [f"{100 * int(match[2]) / size:.2f}" for match, size in zip(told, (64, 2))]
    last = [text for text in caplog.messages if text.startswith("Applied")][4:]
    assert [f" -> {count} (" in text for count, text in zip(counts, last, strict=True)] == [True, True]
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert zeros == 49 and [name for name, _ in model.named_parameters()] == ["layer.weight", "layer.bias"]


def test_a_checkpoint_loads_without_the_callback_and_training_goes_on(tmp_path):
    # Saved after the callback of the pruning, which ModelCheckpoint comes after in any order.
    model, trainer = fit([ModelPruning("l1_unstructured")], tmp_path, enable_checkpointing=True)
    path = trainer.checkpoint_callback.best_model_path
    assert set(torch.load(path, weights_only=True)["state_dict"]) == {"layer.weight", "layer.bias"}
    loaded = BoringModel.load_from_checkpoint(path)
    assert torch.equal(loaded.layer.weight == 0, model.layer.weight == 0)
    again = levin.Trainer(
        max_epochs=3, limit_train_batches=2, limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", callbacks=[ModelPruning("l1_unstructured")], enable_checkpointing=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="states of callbacks"):
        again.fit(BoringModel(), ckpt_path=path)
    assert again.current_epoch == 3


@pytest.mark.parametrize(("verbose", "num_lines"), [(0, 0), (1, 1), (2, 3)])
def test_as_much_is_said_as_was_asked_for(tmp_path, caplog, verbose, num_lines):
    with caplog.at_level(logging.INFO, "levin"):
        fit([ModelPruning("l1_unstructured", verbose=verbose)], tmp_path, max_epochs=1)
    assert caplog.text.count("Applied `L1Unstructured`") == num_lines


def test_some_are_left_out(tmp_path):
    class Weights(ModelPruning):
        def filter_parameters_to_prune(self, parameters_to_prune=()):
            return [(module, name) for module, name in parameters_to_prune if name == "weight"]

    model, _ = fit([Weights("l1_unstructured", amount=0.9)], tmp_path)
    assert (model.layer.weight == 0).any() and not (model.layer.bias == 0).any()


def test_weights_begin_anew_from_their_first_values_each_time(tmp_path):
    model = BoringModel()
    first = model.layer.weight.detach().clone()
    fit([ModelPruning("l1_unstructured", amount=0.3)], tmp_path, model, max_epochs=3)
    left = model.layer.weight != 0
    assert torch.equal(model.layer.weight[left], first[left])


def test_resampled_weights_are_new(tmp_path):
    torch.manual_seed(1)
    callback = ModelPruning("l1_unstructured", resample_parameters=True)
    model = BoringModel()
    before = model.layer.weight.detach().clone()
    fit([callback], tmp_path, model, max_epochs=1)
    left = model.layer.weight != 0
    assert not torch.equal(model.layer.weight[left], before[left])


def test_parameters_that_are_not_there(tmp_path):
    model = BoringModel()
    for given, said in (
        ([(model.layer, "nope")], "missing parameters: \\['nope'\\]"),
        ([(torch.nn.Linear(1, 1), "weight")], "missing modules"),
        ([model.layer], "pairs of a module"),
        ([(model.layer, "weight", 1)], "pairs of a module"),
    ):
        with pytest.raises(ValueError, match=said):
            fit([ModelPruning("l1_unstructured", parameters_to_prune=given)], tmp_path, model)


def test_plain_state_leaves_names_of_users():
    state = {"a_orig": torch.ones(1), "b_mask": torch.ones(1), "c": torch.ones(1)}
    assert plain_state(state) == state
