"""Loads files whose pickles were changed at random, in a process of its own, for a crash would take the tests with it.

    python -m tests.checkpoint.hostile NUM_FILES SEED

The checksums of the files are right, so that nothing but the unpickler stands in the way. Prints how many files were
loaded and how many refused with which error; exits with 1 at an error that says nothing.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from datetime import timedelta
from pathlib import PurePosixPath

import numpy
import torch

from levin.checkpoint.reading import load

LIMIT_BYTES = 16 * 2**30
ALLOWED = (ValueError, pickle.UnpicklingError, MemoryError)


def taken_apart(obj):
    """Return the pickle of a file that torch.save makes of ``obj``, and its storages in the order of their keys."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with zipfile.ZipFile(buffer) as archive:
        keys = sum(name.startswith("archive/data/") for name in archive.namelist())
        records = [bytearray(archive.read(f"archive/data/{key}")) for key in range(keys)]
        storages = [torch.frombuffer(record, dtype=torch.uint8).untyped_storage() for record in records]
        return archive.read("archive/data.pkl"), storages


def put_together(pickled, storages, file):
    """Write a file in the layout of torch.save, whose checksums are right."""
    writer = torch._C.PyTorchFileWriter(file)
    writer.write_record("data.pkl", pickled, len(pickled))
    writer.write_record("byteorder", b"little", 6)
    for key, storage in enumerate(storages):
        writer.write_record(f"data/{key}", storage, storage.nbytes())
    writer.write_end_of_file()


def tree():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"lr": 0.1, "path": PurePosixPath("a/b"), "names": ("a", "b"), "kinds": {1, 2}},
        "callbacks": {"Timer": {"left": timedelta(3)}, "counts": defaultdict(int, a=1)},
        "sparse": torch.eye(3).to_sparse(),
        "array": numpy.arange(6.0).reshape(2, 3),
        "ordered": OrderedDict(a=1),
        "storage": torch.arange(3).untyped_storage(),
    }


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change, remove, repeat or swap a few pieces."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        where = chance.randrange(len(changed))
        kind = chance.randrange(5)
        if kind == 0:
            changed[where] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[where] = chance.randrange(256)
        elif kind == 2:
            del changed[where : where + chance.randrange(1, 9)]
        elif kind == 3:
            start = chance.randrange(len(changed))
            changed[where:where] = changed[start : start + chance.randrange(1, 40)]
        else:
            changed[where : where + 4] = chance.randbytes(4)
    return bytes(changed)


def main() -> int:
    num_files, seed = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chance, counts = random.Random(seed), Counter()
    pickled, storages = taken_apart(tree())
    for number in range(num_files):
        file = io.BytesIO()
        put_together(mutated(pickled, chance), storages, file)
        file.seek(0)
        try:
            load(file)
        except ALLOWED as error:
            if type(error) is not MemoryError and not str(error).startswith("the file "):
                raise ValueError(f"the message of file {number} does not say which file: {error}") from error
            counts[type(error).__name__] += 1
        else:
            counts["loaded"] += 1
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
