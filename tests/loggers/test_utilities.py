from __future__ import annotations

import enum
import functools
import os
import threading
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from levin.loading import read_hparams_file
from levin.loggers.uploads import new_checkpoints
from levin.loggers.utilities import (
    add_prefix,
    flatten,
    join_path,
    next_version,
    sanitize,
    to_dict,
    version_name,
    write_hparams,
)
from levin.utilities.numbers import to_numbers


@dataclass
class Config:
    width: int = 1
    name: str = "x"


class Color(enum.Enum):
    RED = 1


def test_prefix():
    assert add_prefix({"a": 1}, "", "-") == {"a": 1}
    assert add_prefix({"a": 1}, "p", "-") == {"p-a": 1}


def test_tensors_become_numbers_of_their_kind():
    values = to_numbers({"f": torch.tensor([2.5]), "i": torch.tensor(3), "b": torch.tensor(True), "s": "text", "n": 1})
    assert values == {"f": 2.5, "i": 3, "b": True, "s": "text", "n": 1}
    assert [type(value) for value in values.values()] == [float, int, bool, str, int]
    with pytest.raises(ValueError, match=r"metrics\['a'\].*shape \(2,\)"):
        to_numbers({"a": torch.zeros(2)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_values_on_a_device_are_read_in_one_transfer():
    metrics = {f"m{i}": torch.tensor(float(i), device="cuda", requires_grad=True) for i in range(5)}
    with torch.profiler.profile() as profile:
        assert to_numbers(metrics) == {f"m{i}": float(i) for i in range(5)}
    assert sum("Memcpy DtoH" in event.name for event in profile.events()) == 1


def test_params_may_be_a_namespace_or_a_config():
    from omegaconf import OmegaConf

    assert to_dict(None) == {}
    assert to_dict(Namespace(a=1)) == {"a": 1}
    config = OmegaConf.create({"a": 1, "b": {"c": "${a}"}, "d": [1, 2]})
    assert to_dict(config) == {"a": 1, "b": {"c": 1}, "d": [1, 2]}
    assert to_dict({"cfg": config}) == {"cfg": {"a": 1, "b": {"c": 1}, "d": [1, 2]}}
    assert type(to_dict({"cfg": config})["cfg"]["d"]) is list


def test_flatten_opens_what_is_nested():
    nested = {"a": {"b": {"c": 1}}, "ns": Namespace(x=Namespace(y=2)), "d": Config(), "l": [{"p": 1}, {"q": 2}], 1: 2}
    assert flatten(nested) == {
        "a/b/c": 1, "ns/x/y": 2, "d/width": 1, "d/name": "x", "l/0/p": 1, "l/1/q": 2, "1": 2,
    }  # fmt: skip
    assert flatten({"l": [1, 2], "t": (), "empty": {}}) == {"l": [1, 2], "t": ()}


@given(st.dictionaries(st.text(), st.integers()))
def test_flatten_leaves_flat_dicts_alone(params):
    assert flatten(params) == params


def test_sanitize_leaves_primitives_only():
    values = sanitize(
        {"i": 1, "n": None, "p": Path("x"), "f32": np.float32(2.5), "i64": np.int64(3), "arr": np.array([1, 2]),
         "t": torch.tensor(0.5), "e": Color.RED, "m": torch.nn.ReLU()}
    )  # fmt: skip
    assert values == {
        "i": 1, "n": "None", "p": "x", "f32": 2.5, "i64": 3, "arr": "[1 2]", "t": 0.5, "e": "Color.RED", "m": "ReLU()",
    }  # fmt: skip


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("RUN", "seven")
    assert join_path("a", "") == "a/"
    assert join_path("~/a", "$RUN", None) == os.path.expanduser("~/a/seven")
    assert join_path("memory://a", "$RUN") == "memory://a/$RUN"
    assert version_name(3) == "version_3" and version_name("x") == "x"


def test_the_next_version_follows_the_highest_folder(tmp_path):
    assert next_version(str(tmp_path / "missing")) == 0
    for name in ("version_x", "version_7_a", "version_2", "version_10"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_12").touch()
    assert next_version(str(tmp_path)) == 11


def test_the_next_version_in_a_remote_directory():
    import fsspec

    filesystem = fsspec.filesystem("memory")
    assert next_version("memory://versions") == 0
    filesystem.makedirs("/versions/version_4")
    filesystem.pipe("/versions/version_9", b"a file")
    assert next_version("memory://versions") == 5


def test_hparams_are_written_as_plain_yaml(tmp_path):
    params = {
        "i": 1, "f": 1.5, "s": "x\ny", "n": None, "b": True, "l": [1, "a"], "t": (1, 2), "d": {"k": {"j": 1}},
        "p": Path("x"), "e": Color.RED, "ns": Namespace(a=1), "c": Config(), "np": np.float32(2.5),
        "arr": np.array([1, 2]), "ten": torch.tensor([1.0, 2.0]), "set": {1}, "bytes": b"x", "inf": float("inf"),
    }  # fmt: skip
    write_hparams(str(tmp_path), params)
    expected = {
        **params, "p": "x", "e": "RED", "ns": {"a": 1}, "c": {"width": 1, "name": "x"}, "np": 2.5, "arr": [1, 2],
        "ten": [1.0, 2.0],
    }  # fmt: skip
    assert read_hparams_file(tmp_path / "hparams.yaml") == expected
    assert os.listdir(tmp_path) == ["hparams.yaml"]


def test_what_yaml_cannot_hold_is_named(tmp_path):
    params = {
        "lr": 1, "act": torch.nn.ReLU, "opt": {"fn": functools.partial(print), "lr": 2}, "many": [torch.nn.ReLU()],
        "lock": threading.Lock(), "dtype": torch.float32,
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"leaves out \['act', 'dtype', 'lock', 'many', 'opt.fn'\]"):
        write_hparams(str(tmp_path), params)
    assert read_hparams_file(tmp_path / "hparams.yaml") == {"lr": 1, "opt": {"lr": 2}}
    assert "# act: torch.nn.modules.activation.ReLU\n" in (tmp_path / "hparams.yaml").read_text()


def test_hparams_in_a_remote_directory():
    import fsspec

    write_hparams("memory://run", {"a": 1})
    assert yaml.safe_load(fsspec.filesystem("memory").cat_file("/run/hparams.yaml")) == {"a": 1}


def test_new_checkpoints_are_those_not_logged_yet(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.ckpt", "b.ckpt", "last.ckpt")]
    for age, path in zip((30, 20, 10), paths):
        Path(path).touch()
        os.utime(path, (1000 - age, 1000 - age))
    callback = SimpleNamespace(
        best_model_path=paths[0], best_model_score=torch.tensor(0.5), current_score=torch.tensor(0.7),
        last_model_path=paths[2], best_k_models={paths[0]: torch.tensor(0.5), paths[1]: torch.tensor(0.6)},
    )  # fmt: skip
    found = new_checkpoints(callback, {})
    assert [(c.path, round(c.score, 3), c.tag) for c in found] == [
        (paths[0], 0.5, "best"), (paths[1], 0.6, "best_k"), (paths[2], 0.7, "latest"),
    ]  # fmt: skip
    logged = {checkpoint.path: checkpoint.time for checkpoint in found}
    assert new_checkpoints(callback, logged) == []
    os.utime(paths[1])
    assert [checkpoint.path for checkpoint in new_checkpoints(callback, logged)] == [paths[1]]
    os.remove(paths[1])
    assert new_checkpoints(callback, logged) == []
