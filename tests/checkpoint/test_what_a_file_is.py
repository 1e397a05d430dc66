"""A file that cannot be gone on from is told for what it is, and caught as what people catch."""

from __future__ import annotations

import collections
import datetime
import functools
import http.server
import pathlib
import pickle
import threading
from typing import ClassVar

import numpy
import pytest
import torch

from levin import Callback, Fabric
from levin.checkpoint import atomic_save, load
from levin.checkpoint.verify import verify
from levin.utilities.attribute_dict import AttributeDict
from levin.utilities.exceptions import DamagedCheckpointError
from tests.callbacks.small import TrainOnly, loader, trainer

CAUGHT = [ValueError, EOFError, RuntimeError, pickle.UnpicklingError, OSError, TypeError, DamagedCheckpointError]
DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-100],
    "text": lambda data: b"once upon a time",
    "changed": lambda data: data[: len(data) // 2] + b"\x55" + data[len(data) // 2 + 1 :],
    "an old pickle, cut": lambda data: pickle.dumps({"a": list(range(100))})[:50],
}


@pytest.mark.parametrize("error", CAUGHT)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_every_error_that_programs_catch(tmp_path, damage, error):
    path = tmp_path / "model.ckpt"
    atomic_save({"weights": torch.full((1000,), 1.5)}, path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(error):
        load(path)
    with pytest.raises(error):
        verify(path)
    run = trainer(tmp_path, [], enable_checkpointing=False)
    with pytest.raises(error):
        run.fit(TrainOnly(), loader(), ckpt_path=str(path))
    with pytest.raises(error):
        TrainOnly.load_from_checkpoint(path)


@pytest.mark.parametrize(
    "allowed", [[], [numpy.ndarray, numpy.dtype, numpy.dtypes.Float64DType]], ids=["none", "numpy"]
)
def test_what_checkpoints_commonly_hold_is_loaded_whatever_the_program_allows(tmp_path, allowed):
    tree = {
        "hparams": AttributeDict(lr=0.1),
        "counts": collections.defaultdict(int, a=1),
        "last": collections.deque([1, 2], maxlen=3),
        "when": datetime.timedelta(seconds=3),
        "where": pathlib.Path("a/b"),
        "kind": int,
    }
    torch.save(tree, tmp_path / "model.ckpt")
    torch.save(numpy.arange(3.0), tmp_path / "array.ckpt")
    reconstruct = numpy.arange(3.0).__reduce__()[0]
    with torch.serialization.safe_globals([*allowed, reconstruct] if allowed else []):
        loaded = load(tmp_path / "model.ckpt")
        array = load(tmp_path / "array.ckpt")
    assert loaded == tree
    assert [type(value) for value in loaded.values()] == [type(value) for value in tree.values()]
    assert array.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("kind", ["b1", "i1", "u8", "f2", "f8", "c16", "S3", "U7", ">i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_plain_kinds_are_what_they_were(tmp_path, kind, order):
    array = numpy.array(numpy.arange(6).reshape(2, 3), dtype=kind, order=order)
    torch.save([array, array[1, 2]], tmp_path / "array.ckpt")
    loaded, last = load(tmp_path / "array.ckpt")
    assert (loaded.dtype, loaded.shape, loaded.tolist()) == (array.dtype, (2, 3), array.tolist())
    assert loaded.flags.f_contiguous == (order == "F") and loaded.flags.writeable
    assert (type(last), last.dtype, last) == (type(array[1, 2]), array[1, 2].dtype, array[1, 2])


def test_what_a_program_allows_of_numpy_stays_its_own(tmp_path):
    torch.save(numpy.arange(3.0), tmp_path / "array.ckpt")
    with (
        torch.serialization.safe_globals([numpy.dtype, numpy.dtypes.Float64DType]),
        pytest.raises(
            pickle.UnpicklingError, match=r"refers to numpy\.\w+\.multiarray\._reconstruct, which is not loaded"
        ),
    ):
        load(tmp_path / "array.ckpt")


def test_plain_weights_are_told_by_the_name_of_their_file(tmp_path):
    torch.save(TrainOnly().state_dict(), tmp_path / "weights.pt")
    run = trainer(tmp_path, [], enable_checkpointing=False)
    with pytest.raises(
        KeyError, match=r"weights.pt has no .*not saved by a Trainer; it holds \['layer.weight', 'layer.bias'\]"
    ):
        run.fit(TrainOnly(), loader(), ckpt_path=str(tmp_path / "weights.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt must hold a checkpoint \(a dict\), received a list"):
        run.fit(TrainOnly(), loader(), ckpt_path=str(tmp_path / "list.pt"))


def legacy(tree, path):
    torch.save(tree, path, _use_new_zipfile_serialization=False)


BY_TRUSTING = {
    "legacy, cut early": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "legacy, cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "legacy, changed": lambda path: path.write_bytes(
        path.read_bytes().replace(b"protocol_version", b"protocol_vers\xff\xff\xff")
    ),
    "another pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "an old pickle, cut": lambda path: path.write_bytes(pickle.dumps({"a": list(range(100))})[:50]),
    "safetensors": lambda path: path.write_bytes(b"\x80\x00\x00\x00\x00\x00\x00\x00{}" + b" " * 126),
    "a list": lambda path: torch.save([1], path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("damage", BY_TRUSTING)
def test_what_is_no_checkpoint_is_named_whether_or_not_it_is_trusted(tmp_path, damage, weights_only):
    path = tmp_path / "model.ckpt"
    legacy({"state_dict": TrainOnly().state_dict(), "pytorch-lightning_version": "2.0.0"}, path)
    TrainOnly.load_from_checkpoint(path, weights_only=weights_only)
    BY_TRUSTING[damage](path)
    run = trainer(tmp_path, [], enable_checkpointing=False)
    # Without trust a pickle of something else may be refused for what it would do.
    error = DamagedCheckpointError if weights_only is False else pickle.UnpicklingError
    with pytest.raises(error, match=r"model\.ckpt"):
        TrainOnly.load_from_checkpoint(path, weights_only=weights_only)
    with pytest.raises(error, match=r"model\.ckpt"):
        run.fit(TrainOnly(), loader(), ckpt_path=str(path), weights_only=weights_only)


class Failing:
    def __setstate__(self, state):
        raise NotImplementedError("meant")


def test_an_error_of_a_class_in_a_trusted_file_stays_what_it_is(tmp_path):
    failing = Failing()
    failing.state = 1
    atomic_save({"object": failing}, tmp_path / "model.ckpt")
    with pytest.raises(NotImplementedError, match="meant"):
        load(tmp_path / "model.ckpt", weights_only=False)


def test_a_file_without_weights_is_told_by_its_keys(tmp_path):
    torch.save({"epoch": 1, "pytorch-lightning_version": "2.0.0"}, tmp_path / "model.ckpt")
    with pytest.raises(KeyError, match=r"no 'state_dict', of weights; it holds \['epoch', 'pytorch"):
        trainer(tmp_path, []).fit(TrainOnly(), loader(), ckpt_path=str(tmp_path / "model.ckpt"))
    torch.save({"epoch": 1}, tmp_path / "model.ckpt")
    with pytest.raises(KeyError, match=r"model.ckpt has no 'pytorch-lightning_version'"):
        TrainOnly.load_from_checkpoint(tmp_path / "model.ckpt")
    with (
        open(tmp_path / "model.ckpt", "rb") as file,
        pytest.raises(KeyError, match=r"model.ckpt has no 'pytorch-lightning_v"),
    ):
        TrainOnly.load_from_checkpoint(file)


@pytest.mark.parametrize("content", [[1], None, 3, "text", torch.ones(2)], ids=["list", "None", "int", "str", "tensor"])
def test_what_is_no_dict_is_not_loaded_into_the_state_of_a_fabric(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(DamagedCheckpointError, match=rf"must be a dict .* received a {type(content).__name__}"):
        fabric.load(tmp_path / "model.ckpt", {"epoch": 1})


def test_the_path_of_a_best_model_that_was_never_saved_is_told(tmp_path):
    run = trainer(tmp_path, [])
    with pytest.raises(ValueError, match="ckpt_path must be a path, received ''"):
        run.fit(TrainOnly(), loader(), ckpt_path="")


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.1)


def two(module):
    return [torch.optim.SGD(module.parameters(), lr=0.1), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)]


def other_groups(module):
    return torch.optim.SGD([{"params": [parameter]} for parameter in module.parameters()], lr=0.1)


def fewer(module):
    return torch.optim.SGD([module.layer.weight], lr=0.1)


def none(module):
    return None


CHANGES = {
    adam: r"optimizer 0 in the checkpoint is of another kind: it has .*'momentum'.*, and Adam has .*'betas'",
    two: r"holds the states of 1 optimizers, and `configure_optimizers` gives 2: \['SGD', 'SGD'\]",
    other_groups: r"has groups of \[2\] parameters, and those of SGD are of \[1, 1\]",
    fewer: r"has groups of \[2\] parameters, and those of SGD are of \[1\]",
    none: r"has groups of \[2\] parameters, and those of MockOptimizer are of \[\]",
}


def resumed(tmp_path, before, after, **arguments):
    """Train an epoch with the optimizers of ``before``, go on with those of ``after``, and return module and Trainer."""

    def made(configure):
        return type("Changed", (TrainOnly,), {"configure_optimizers": configure})()

    path = tmp_path / "first.ckpt"
    first = trainer(tmp_path, [], enable_checkpointing=False, max_epochs=1)
    first.fit(made(before), loader())
    first.save_checkpoint(path)
    module, second = made(after), trainer(tmp_path, [], enable_checkpointing=False, max_epochs=2, **arguments)
    second.fit(module, loader(), ckpt_path=str(path))
    return module, second


def test_a_state_without_an_optimizer_is_told(tmp_path):
    with (
        pytest.warns(UserWarning, match="returned None"),
        pytest.raises(ValueError, match="optimizer 0 in the checkpoint is empty, since the run that saved it had no"),
    ):
        resumed(tmp_path, none, adam)


@pytest.mark.parametrize("kept", ["nothing", "lr_schedulers"])
def test_a_file_that_a_program_made_of_the_weights_is_gone_on_from(tmp_path, kept):
    """RF-DETR writes its best weights so: all keys of a whole checkpoint, with lists that are empty."""

    def fit(max_epochs, **arguments):
        run = trainer(tmp_path, [], enable_checkpointing=False, max_epochs=max_epochs)
        run.fit(type("Model", (TrainOnly,), {"configure_optimizers": STEP})(), loader(), **arguments)
        return run

    first = fit(1)
    first.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt")
    checkpoint["optimizer_states"] = []
    if kept == "nothing":
        checkpoint["lr_schedulers"] = []
    torch.save(checkpoint, tmp_path / "made.ckpt")
    with pytest.warns(UserWarning, match=r"made.ckpt holds no states of optimizers: they begin anew"):
        second = fit(2, ckpt_path=tmp_path / "made.ckpt")
    assert (second.current_epoch, second.global_step) == (2, 2 * first.global_step)
    assert second.lr_scheduler_configs[0].scheduler.last_epoch == (1 if kept == "nothing" else 2)


def test_parameters_in_another_order_keep_their_moments(tmp_path):
    def turned(module):
        return torch.optim.Adam([module.layer.bias, module.layer.weight], lr=0.1)

    same, _ = resumed(tmp_path, adam, adam)
    module, _ = resumed(tmp_path, adam, turned)
    assert torch.equal(module.layer.weight, same.layer.weight) and torch.equal(module.layer.bias, same.layer.bias)


def test_groups_in_another_order_are_refused(tmp_path):
    def turned(module):
        return torch.optim.SGD([{"params": [parameter]} for parameter in [*module.parameters()][::-1]], lr=0.1)

    with pytest.raises(ValueError, match=r"in another order: \[\['layer.weight'\], \['layer.bias'\]\]"):
        resumed(tmp_path, other_groups, turned)


def scheduled(make):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return [optimizer], [make(optimizer)]

    return configure


schedules = torch.optim.lr_scheduler
STEP = scheduled(lambda optimizer: schedules.StepLR(optimizer, 1))


@pytest.mark.parametrize(
    ("make", "needed"),
    [
        (lambda optimizer: schedules.LambdaLR(optimizer, lambda epoch: 0.5**epoch), "lr_lambdas"),
        (
            lambda optimizer: schedules.SequentialLR(
                optimizer, [schedules.ConstantLR(optimizer), schedules.ExponentialLR(optimizer, 0.5)], [1]
            ),
            "_schedulers",
        ),
        (lambda optimizer: schedules.CyclicLR(optimizer, 0.01, 0.1), "_scale_fn_custom"),
    ],
    ids=["lambda", "sequential", "cyclic"],
)
def test_a_scheduler_of_another_kind_is_refused_where_it_cannot_load_the_state(tmp_path, make, needed):
    with pytest.raises(
        ValueError,
        match=rf"scheduler 0 in the checkpoint is of another kind than \w+: it has \[.*'step_size'\].*'{needed}'",
    ):
        resumed(tmp_path, STEP, scheduled(make))


class Longer(schedules.StepLR):
    """A later version of a schedule, which has learnt to need more."""

    def __init__(self, optimizer):
        self.extra = 1
        super().__init__(optimizer, 1)

    def load_state_dict(self, state):
        super().load_state_dict({"extra": state["extra"], **state})


def test_a_scheduler_that_needs_more_than_the_checkpoint_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"of another kind than Longer: it has \[\], and Longer has \['extra'\]"):
        resumed(tmp_path, STEP, scheduled(Longer))


class Numbered(schedules.StepLR):
    """A schedule whose state is a number."""

    def state_dict(self):
        return self.last_epoch

    def load_state_dict(self, state):
        self.last_epoch = state


class Nested(torch.optim.SGD):
    """An optimizer that keeps torch's state inside of its own."""

    def state_dict(self):
        return {"inner": super().state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state["inner"])


def test_states_of_another_form_than_torch_gives_are_loaded_as_they_are(tmp_path):
    def configure(module):
        optimizer = Nested(module.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [Numbered(optimizer, 1)]

    def turned(module):
        optimizer = Nested([module.layer.bias, module.layer.weight], lr=0.1, momentum=0.9)
        return [optimizer], [Numbered(optimizer, 1)]

    module, run = resumed(tmp_path, configure, configure)
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 2
    whole = trainer(tmp_path, [], enable_checkpointing=False, max_epochs=2)
    unbroken = type("Unbroken", (TrainOnly,), {"configure_optimizers": configure})()
    whole.fit(unbroken, loader())
    assert run.optimizers[0].param_groups[0]["lr"] == whole.optimizers[0].param_groups[0]["lr"]
    with pytest.raises(RuntimeError, match="shape"):
        resumed(tmp_path, configure, turned)  # what is inside is not known, so it cannot be put in order


def test_a_scheduler_of_another_kind_that_goes_on_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"of another kind than CosineAnnealingLR: it has \['gamma', 'step_size'\]"):
        _, run = resumed(tmp_path, STEP, scheduled(lambda optimizer: schedules.CosineAnnealingLR(optimizer, 5)))
    assert run.global_step == 8


@pytest.mark.parametrize(
    "before", [STEP, lambda module: torch.optim.SGD(module.parameters(), lr=0.1)], ids=["step", "none"]
)
def test_a_one_cycle_schedule_may_begin_at_a_resume(tmp_path, before):
    cycle = scheduled(lambda optimizer: schedules.OneCycleLR(optimizer, 0.5, total_steps=20, cycle_momentum=False))
    with pytest.warns(UserWarning, match="OneCycleLR"):
        _, run = resumed(tmp_path, before, cycle)
    assert run.optimizers[0].param_groups[0]["max_lr"] == 0.5


@pytest.mark.filterwarnings("ignore:.*returned None")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_optimizers_are_told(tmp_path, change):
    first = trainer(tmp_path, [], enable_checkpointing=False, max_epochs=1)
    first.fit(TrainOnly(), loader())
    first.save_checkpoint(tmp_path / "first.ckpt")

    class Changed(TrainOnly):
        automatic_optimization = change is not two
        configure_optimizers = change

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).pow(2).mean()

    second = trainer(tmp_path, [], enable_checkpointing=False, max_epochs=2)
    with pytest.raises(ValueError, match=CHANGES[change]):
        second.fit(Changed(), loader(), ckpt_path=str(tmp_path / "first.ckpt"))


def test_another_rate_or_a_kind_of_the_same_settings_goes_on(tmp_path):
    first = trainer(tmp_path, [], enable_checkpointing=False, max_epochs=1)
    first.fit(TrainOnly(), loader())
    first.save_checkpoint(tmp_path / "first.ckpt")

    class Faster(TrainOnly):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.7, momentum=0.9)

    second = trainer(tmp_path, [], enable_checkpointing=False, max_epochs=2)
    second.fit(Faster(), loader(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert second.global_step == 8


class Manual(TrainOnly):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.layer(batch[0]).pow(2).mean())
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


class SaveAfterTwo(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_optimization_may_become_automatic_or_manual(tmp_path, accumulate):
    arguments = {"enable_checkpointing": False, "max_epochs": 1}
    automatic = {**arguments, "accumulate_grad_batches": accumulate}
    path = tmp_path / "two.ckpt"
    trainer(tmp_path, [SaveAfterTwo(path)], **automatic).fit(TrainOnly(), loader(6))
    manual = trainer(tmp_path, [], **arguments)
    manual.fit(Manual(), loader(6), ckpt_path=path)
    assert manual.global_step == (4 if accumulate == 1 else 2)
    trainer(tmp_path, [SaveAfterTwo(path)], **arguments).fit(Manual(), loader(6))
    again = trainer(tmp_path, [], **automatic)
    with pytest.warns(UserWarning, match="saved with manual optimization while gradients were accumulated"):
        again.fit(TrainOnly(), loader(6), ckpt_path=path)
    assert again.global_step == (4 if accumulate == 1 else 2)


class Quiet(http.server.SimpleHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.requests.append(self.path)
        if "/status/" in self.path:
            self.send_error(int(self.path.split("/")[2]))
        else:
            super().do_GET()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The address of what is in the folder ``site``."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    Quiet.requests.clear()
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["/status/404/a.ckpt", "/status/403/a.ckpt", "/status/500/a.ckpt", "nobody"])
def test_what_the_web_does_not_give_is_a_file_that_is_not_found(tmp_path, site, name):
    address = "http://127.0.0.1:9/a.ckpt" if name == "nobody" else site + name
    for call in (
        lambda: trainer(tmp_path, []).fit(TrainOnly(), loader(), ckpt_path=address),
        lambda: TrainOnly.load_from_checkpoint(address),
        lambda: Fabric(accelerator="cpu", devices=1).load(address),
    ):
        with pytest.raises(FileNotFoundError, match=f"Checkpoint file not found: {address}"):
            call()


def test_a_file_of_the_web_is_fetched_once(tmp_path, site):
    first = trainer(tmp_path, [], enable_checkpointing=False)
    first.fit(TrainOnly(), loader())
    first.save_checkpoint(tmp_path / "site" / "last.ckpt")
    TrainOnly.load_from_checkpoint(f"{site}/last.ckpt")
    trainer(tmp_path, [], enable_checkpointing=False).fit(TrainOnly(), loader(), ckpt_path=f"{site}/last.ckpt")
    assert Quiet.requests == ["/last.ckpt"]


def test_files_of_one_name_at_two_addresses_are_two(tmp_path, site):
    for name in ("a", "b"):
        atomic_save({"name": name}, tmp_path / "site" / name / "last.ckpt")
    found = [load(f"{site}/{name}/last.ckpt")["name"] for name in ("a", "b", "a")]
    assert found == ["a", "b", "a"]
    assert load(f"{site}/b/last.ckpt") == {"name": "b"}
    assert Quiet.requests == ["/a/last.ckpt", "/b/last.ckpt"]  # they are kept
