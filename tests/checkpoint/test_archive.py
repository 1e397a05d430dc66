"""Files written here are those of torch.save, byte for byte."""

import functools
import io
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch.utils.serialization import config as serialization

from levin.checkpoint.archive import pack, unpack, write_archive
from levin.checkpoint.staging import Stager


def _ours(archive):
    buffer = io.BytesIO()
    size = write_archive(archive, buffer.write)
    assert size == len(buffer.getvalue())
    return buffer.getvalue()


def _theirs(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def _without_id(data):
    """Blank the record that numbers the file, and its checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        record = archive.infolist()[-1]
        assert record.filename == "archive/.data/serialization_id"
        content = archive.read(record)
    return data.replace(content, b"i" * len(content)).replace(record.CRC.to_bytes(4, "little"), b"CRC ")


def _trained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@functools.cache
def _names():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(_trees())


def _trees():
    base = torch.arange(100.0).reshape(10, 10)
    model, optimizer = _trained()
    with_attribute = torch.ones(2)
    with_attribute.note = "kept"
    return {
        "nothing": {},
        "a number": 3,
        "long list": list(range(1000)),
        "state of a module": model.state_dict(),
        "state of an optimizer": optimizer.state_dict(),
        "module": model,
        "views of one storage": {"all": base, "rows": base[2:5], "transposed": base.T, "column": base[:, 3]},
        "empty": {"tensor": torch.empty(0), "shaped": torch.empty(0, 3), "scalar": torch.tensor(1.5)},
        "kinds of numbers": [torch.ones(3).to(t) for t in (torch.bool, torch.int8, torch.int64, torch.half, torch.cfloat)],
        "new kinds": [torch.ones(3).to(t) for t in (torch.bfloat16, torch.uint16, torch.float8_e4m3fn)],
        "lazy views": {"conj": torch.ones(2, dtype=torch.cfloat).conj(), "imag": torch.ones(2, dtype=torch.cfloat).conj().imag},
        "layouts": {"coo": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr()},
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantized": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "attribute": with_attribute,
        "needs gradient": torch.ones(2, requires_grad=True),
        "storages": {"untyped": base.untyped_storage(), "typed": torch.FloatStorage([1.0, 2.0])},
        "meta": torch.empty(3, device="meta"),
        "same twice": [base, base, {"again": base}],
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes, and TypedStorage
        yield


@pytest.mark.parametrize("name", _names())
def test_bytes_are_those_of_torch_save(name):
    tree = _trees()[name]
    assert _without_id(_ours(pack(tree))) == _without_id(_theirs(tree))


@pytest.mark.parametrize("name", _names())
def test_a_staged_copy_gives_the_same_file(name):
    tree = _trees()[name]
    expected = _theirs(tree)
    snapshot = Stager().stage(tree)
    found = _ours(snapshot.pack())
    if name in ("parameter", "attribute", "same twice", "state of a module", "storages"):
        # The objects are copied one by one, so they are not the same objects any more; their content is.
        assert repr(torch.load(io.BytesIO(found), weights_only=False)) == repr(
            torch.load(io.BytesIO(expected), weights_only=False)
        )
    else:
        assert _without_id(found) == _without_id(expected)


def test_offsets_can_be_computed_as_torch_does_it():
    from torch.utils.serialization import config

    model, optimizer = _trained()
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "large": torch.randn(300_000)}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/file.ckpt"
        with open(path, "wb") as file:
            write_archive(pack(tree), file.write)
        with config.patch("load.calculate_storage_offsets", True):
            loaded = torch.load(path, mmap=True)
        assert torch.equal(loaded["large"], tree["large"])
        for key, value in tree["model"].items():
            assert torch.equal(loaded["model"][key], value)


def test_sharing_survives_unpacking():
    base = torch.arange(6.0)
    tree = {"base": base, "view": base[2:], "same": base}
    loaded = unpack(pack(tree))
    assert loaded["same"] is loaded["base"]
    loaded["base"][3] = -1
    assert loaded["view"][1] == -1


def test_unpacking_copies_nothing():
    base = torch.zeros(3)
    unpack(pack(base)).add_(1)
    assert torch.equal(base, torch.ones(3))


def test_two_types_on_one_storage_are_an_error():
    base = torch.zeros(4)
    with pytest.raises(RuntimeError, match="different types .torch.float32 and torch.int32."):
        pack([base, base.view(torch.int32)])


def test_attributes_of_an_ordered_dict_are_kept():
    state = torch.nn.Linear(2, 2).state_dict()
    loaded = Stager().stage({"model": state}).realize()["model"]
    assert type(loaded) is OrderedDict
    assert loaded._metadata == state._metadata


class _Parts:
    """Notes the small pieces of a large file and skips the others."""

    def __init__(self):
        self.position = 0
        self.bytes = {}

    def write(self, data):
        size = memoryview(data).nbytes
        if size < 10_000:
            self.bytes.update(enumerate(bytes(data), start=self.position))
        self.position += size
        return size

    def flush(self):
        pass


def test_large_storages_begin_with_a_page_as_torch_can_be_told_to_do(tmp_path):
    tree = {"first": torch.randn(300_000), "small": torch.ones(3), "last": torch.randn(300_001)}
    data = _ours(pack(tree))
    with serialization.patch("save.storage_alignment", 4096):
        assert _without_id(data) == _without_id(_theirs(tree))
    assert _without_id(_ours(Stager().stage(tree).pack())) == _without_id(data)
    path = tmp_path / "large.ckpt"
    path.write_bytes(data)
    for calculates in (False, True):
        with serialization.patch("load.calculate_storage_offsets", calculates):
            loaded = torch.load(path, mmap=True, weights_only=True)
        assert all(torch.equal(loaded[name], value) for name, value in tree.items())


@pytest.mark.slow
def test_files_beyond_4_gib_are_those_of_torch_save():
    def untouched(num_bytes):
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage(num_bytes))

    tree = {"first": torch.arange(3), "large": untouched(2**32 + 64), "between": torch.arange(4)}
    tree |= {"limit": untouched(2**32 - 1), "last": torch.arange(5)}
    ours, theirs = _Parts(), _Parts()
    write_archive(pack(tree), ours.write)
    with serialization.patch("save.storage_alignment", 4096):
        torch.save(tree, theirs)
    assert ours.position == theirs.position
    differing = [key for key, value in theirs.bytes.items() if ours.bytes[key] != value]
    assert len(differing) <= 40 + 2 * 4  # the number of the file, and its checksum
