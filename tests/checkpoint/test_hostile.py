"""Reading a file never runs what is in it, never crashes, and says what is wrong."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from levin.checkpoint import atomic_save, load
from levin.checkpoint.verify import verify
from tests.callbacks.small import TrainOnly, loader, trainer
from tests.checkpoint.hostile import put_together, taken_apart

ROOT = Path(__file__).parents[2]
REFUSED = (ValueError, pickle.UnpicklingError)
compares_bytes = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="torch 2.6 does not compare a tensor with the bytes that are there",
)


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


class OnState:
    """Makes a folder when its state is put back."""

    def __reduce__(self):
        return OrderedDict, (), {"a": Payload()}


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path):
    yield
    assert not (tmp_path / "ran").exists()


def checkpoint():
    return {
        "epoch": 0,
        "global_step": 4,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": OrderedDict(TrainOnly().state_dict()),
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {},
        "callbacks": {},
        "hyper_parameters": {},
    }


PLACES = {
    "the whole file": lambda tree, payload: payload,
    "a new entry": lambda tree, payload: {**tree, "new": payload},
    "a key": lambda tree, payload: {**tree, (1, payload): 0},
    "the weights": lambda tree, payload: {**tree, "state_dict": OrderedDict(tree["state_dict"], evil=payload)},
    "the version": lambda tree, payload: {**tree, "pytorch-lightning_version": payload},
    "the hyper-parameters": lambda tree, payload: {**tree, "hyper_parameters": {"deep": [{"er": (payload,)}]}},
    "a callback": lambda tree, payload: {**tree, "callbacks": {"Timer": payload}},
    "an optimizer": lambda tree, payload: {**tree, "optimizer_states": [{"state": {0: payload}}]},
    "a set": lambda tree, payload: {**tree, "new": {payload}},
    "a state": lambda tree, payload: {**tree, "new": OnState()},
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", PLACES)
def test_a_payload_is_refused_by_name_wherever_it_is(tmp_path, place, is_zip):
    path = tmp_path / "evil.ckpt"
    torch.save(PLACES[place](checkpoint(), Payload()), path, _use_new_zipfile_serialization=is_zip)
    module = f"{os.mkdir.__module__}.mkdir"
    with pytest.raises(pickle.UnpicklingError, match=rf"evil.ckpt refers to {module}, which is not loaded"):
        load(path)
    run = trainer(tmp_path, [], enable_checkpointing=False)
    with pytest.raises(pickle.UnpicklingError, match="which is not loaded"):
        run.fit(TrainOnly(), loader(), ckpt_path=str(path))
    with pytest.raises(pickle.UnpicklingError, match="which is not loaded"):
        TrainOnly.load_from_checkpoint(path)


def in_zip(path, pickled: bytes, storages=()):
    with open(path, "wb") as file:
        put_together(pickled, storages, file)


CALLS = ["os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__"]
CALLS += ["subprocess.Popen", "torch.load", "torch.hub.load", "torch.jit.load", "pickle.loads", "runpy.run_path"]
CALLS += ["builtins.open", "shutil.rmtree", "levin.checkpoint.reading.load", "numpy.load", "functools.partial"]
CALLS += ["torch.serialization.load", "builtins.print", "operator.attrgetter", "importlib.import_module"]


def _calls(module: str, name: str) -> dict[str, bytes]:
    """Pickles that call a function with one string, by each of the opcodes that can."""
    argument = b"X" + struct.pack("<I", 10) + b"mkdir ran\0"
    named = f"{module}\n{name}\n".encode()
    short = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return {
        "REDUCE": b"\x80\x02c" + named + argument + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + short + b"\x93" + argument + b"\x85R.",
        "INST": b"\x80\x02(" + argument + b"i" + named + b".",
        "OBJ": b"\x80\x02(c" + named + argument + b"o.",
        "NEWOBJ": b"\x80\x02c" + named + argument + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04c" + named + argument + b"\x85}\x92.",
        "BUILD": b"\x80\x02c" + named + b"}" + argument + argument + b"sb.",
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("opcode", _calls("os", "system"))
@pytest.mark.parametrize("function", CALLS)
def test_no_opcode_calls_a_function_that_is_not_allowed(tmp_path, function, opcode):
    path = tmp_path / "evil.ckpt"
    in_zip(path, _calls(*function.rsplit(".", 1))[opcode])
    with pytest.raises(pickle.UnpicklingError, match=r"evil.ckpt (refers to|cannot be loaded without running code)"):
        load(path)


HARMLESS = ["pathlib.PosixPath", "datetime.timedelta", "argparse.Namespace", "types.SimpleNamespace", "builtins.slice"]
HARMLESS += ["builtins.frozenset", "builtins.int", "builtins.bytearray", "collections.defaultdict", "torch.Size"]
HARMLESS += ["collections.OrderedDict", "collections.Counter", "torch._utils._rebuild_tensor_v2", "numpy.dtype"]
HARMLESS += ["torch.nn.parameter.Parameter", "torch._utils._rebuild_sparse_tensor", "numpy.ndarray", "builtins.set"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("opcode", _calls("os", "system"))
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_allowed_does_no_harm_with_odd_arguments(tmp_path, name, opcode):
    path = tmp_path / "odd.ckpt"
    in_zip(path, _calls(*name.rsplit(".", 1))[opcode])
    try:
        load(path)
    except REFUSED as error:
        assert str(path) in str(error)


def test_a_payload_beside_the_pickle_is_not_looked_at(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(checkpoint(), path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/data2.pkl", pickle.dumps(Payload()))
        archive.writestr(f"{root}/version2", pickle.dumps(Payload()))
    assert load(path)["global_step"] == 4


def test_a_program_of_torchscript_is_refused(tmp_path):
    path = tmp_path / "program.ckpt"
    torch.save(checkpoint(), path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/constants.pkl", pickle.dumps(Payload()))
    with pytest.raises(REFUSED, match="program.ckpt"):
        load(path)


@pytest.mark.parametrize("kind", ["pickle", "tar", "zip"])
def test_another_kind_of_file_is_refused(tmp_path, kind):
    import tarfile

    path, inner = tmp_path / "other.ckpt", tmp_path / "pickle"
    inner.write_bytes(pickle.dumps(Payload(), protocol=2))
    if kind == "pickle":
        path.write_bytes(inner.read_bytes())
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("storages", "tensors", "pickle"):
                archive.add(inner, name)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(inner, "pickle")
    with pytest.raises(REFUSED, match="other.ckpt"):
        load(path)


# Wrong sizes --------------------------------------------------------------------------------------------------------


def tensor_pickle(numel: int, offset: int, size: tuple, stride: tuple) -> bytes:
    """A pickle of one tensor of floats with the numbers that are given."""

    class Numbers(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if obj is token else None

        def reducer_override(self, obj):
            if isinstance(obj, Whole):
                return torch._utils._rebuild_tensor_v2, (token, offset, size, stride, False, OrderedDict())
            return NotImplemented

    buffer = io.BytesIO()
    Numbers(buffer, protocol=2).dump(Whole())
    return buffer.getvalue()


token = object()


class Whole:
    pass


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, 0, (2,), (10**9,)),
        (4, 0, (2**62,), (1,)),
        (4, 0, (2**40, 2**40), (1, 1)),
        (4, 0, (-1,), (1,)),
        (4, 0, (4,), (-1,)),
        (4, -1, (4,), (1,)),
        (4, 2**62, (1,), (1,)),
        pytest.param(5, 0, (5,), (1,), marks=compares_bytes),
        (2**61, 0, (4,), (1,)),
        (-1, 0, (4,), (1,)),
        (3, 0, (4,), (1,)),
        (4, 0, ("a",), (1,)),
    ],
)
def test_sizes_that_do_not_fit_the_bytes_are_refused(tmp_path, numel, offset, size, stride):
    path = tmp_path / "wrong.ckpt"
    in_zip(path, tensor_pickle(numel, offset, size, stride), [torch.zeros(4).untyped_storage()])
    with pytest.raises(ValueError, match="wrong.ckpt is no checkpoint, or is damaged"):
        load(path)


def test_the_right_sizes_are_loaded(tmp_path):
    in_zip(tmp_path / "right.ckpt", tensor_pickle(4, 0, (4,), (1,)), [torch.ones(4).untyped_storage()])
    assert load(tmp_path / "right.ckpt").tolist() == [1.0] * 4


@pytest.mark.parametrize("num_bytes", [0, *(pytest.param(num, marks=compares_bytes) for num in (1, 15))])
def test_too_few_bytes_of_a_tensor_are_refused(tmp_path, num_bytes):
    short = torch.zeros(num_bytes, dtype=torch.uint8).untyped_storage()
    in_zip(tmp_path / "short.ckpt", taken_apart(torch.zeros(4))[0], [short])
    with pytest.raises(ValueError, match="short.ckpt"):
        load(tmp_path / "short.ckpt")


def test_a_missing_tensor_is_refused(tmp_path):
    in_zip(tmp_path / "missing.ckpt", taken_apart(torch.zeros(4))[0])
    with pytest.raises(ValueError, match="missing.ckpt"):
        load(tmp_path / "missing.ckpt")


def test_deep_nesting_is_an_error_and_no_crash(tmp_path):
    in_zip(tmp_path / "deep.ckpt", b"\x80\x02" + b"(" * 100_000 + b"N" + b"t" * 100_000 + b".")
    with pytest.raises(REFUSED, match="deep.ckpt"):
        load(tmp_path / "deep.ckpt")


# Accidents ----------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "cut.ckpt"
    atomic_save({"weights": torch.rand(50), "name": "a"}, path)
    data = path.read_bytes()
    for length in [*range(200), *range(200, len(data), 23), *range(len(data) - 100, len(data))]:
        path.write_bytes(data[:length])
        for read in (load, verify):
            with pytest.raises(ValueError, match="cut.ckpt"):
                read(path)


def flip_bytes(num_files: int, seed: int) -> int:
    """Change bytes of intact files at random; return how many were refused."""
    chance = random.Random(seed)
    tree = {"weights": torch.rand(30), "name": "a" * 20, "more": [torch.arange(5), 3]}
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    data, num_refused = buffer.getvalue(), 0
    for _ in range(num_files):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 5))):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        try:
            loaded = load(io.BytesIO(bytes(changed)))
        except REFUSED as error:
            assert str(error).startswith("the file"), error
            num_refused += 1
        else:
            # Padding, and fields that nobody reads.
            assert torch.equal(loaded["weights"], tree["weights"]), f"seed {seed}"
            assert loaded["name"] == tree["name"]
            assert torch.equal(loaded["more"][0], tree["more"][0])
    return num_refused


def mutate_pickles(num_files: int) -> dict[str, int]:
    seed = int.from_bytes(os.urandom(4), "little")
    command = [sys.executable, "-m", "tests.checkpoint.hostile", str(num_files), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


def test_random_bytes_are_found(tmp_path):
    assert flip_bytes(400, int.from_bytes(os.urandom(4), "little")) > 100


def test_random_changes_of_a_pickle_do_no_harm(tmp_path):
    counts = mutate_pickles(300)
    assert sum(counts.values()) == 300


@pytest.mark.slow
def test_ten_thousand_random_bytes_are_found(tmp_path):
    assert flip_bytes(10_000, int.from_bytes(os.urandom(4), "little")) > 2500


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_random_changes_of_a_pickle_do_no_harm(tmp_path):
    counts = mutate_pickles(10_000)
    assert sum(counts.values()) == 10_000
