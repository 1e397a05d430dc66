from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from levin.callbacks.checkpoint_files import (
    check_template,
    comparable,
    fill_template,
    first_free_name,
    improves,
    ranked,
    template_pattern,
)
from levin.utilities.filesystem import exists, is_inside, list_folder, replace_link

METRICS = {"epoch": torch.tensor(3), "step": 7, "val": torch.tensor(0.123), "a/b": 1.5, "acc@1": 2.0}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{epoch}-{step}", "epoch=3-step=7"),
        ("{epoch:03d}", "epoch=003"),
        ("{val:.2f}", "val=0.12"),
        ("x{missing}", "xmissing=0"),
        ("{missing:.1f}", "missing=0.0"),
        ("{a/b}", "a/b=1.5"),
        ("{acc@1:.0f}", "acc@1=2"),
        ("{epoch}{epoch:02d}", "epoch=3epoch=03"),
        ("dir/{epoch}", "dir/epoch=3"),
        ("fixed", "fixed"),
    ],
)
def test_fields_become_key_and_value(template, expected):
    assert fill_template(template, METRICS) == expected


def test_a_misspelt_field_is_told_with_the_nearest_metric():
    with pytest.warns(
        UserWarning, match=r"shows 'val-loss' as 0, since it is not logged \(yet\). Did you mean val_loss"
    ):
        assert fill_template("{val-loss}", {"val_loss": 0.5}) == "val-loss=0"


def test_fields_become_values_alone():
    assert fill_template("{epoch:02d}_{a/b}", METRICS, auto_insert_metric_name=False) == "03_1.5"


@pytest.mark.parametrize("template", ["{epoch", "epoch}", "{}", "{:d}", "{{epoch}}"])
def test_a_broken_template_is_refused(template):
    with pytest.raises(ValueError, match="close every brace"):
        check_template(template)


def test_a_format_that_does_not_fit_says_so():
    with pytest.raises(ValueError, match=r"\{val:d\} cannot show the value"):
        fill_template("{val:d}", {"val": 0.5})


@given(st.sets(st.integers(0, 8)))
def test_the_first_free_version_is_taken(used):
    def name(version):
        return f"last-v{version or 0}"

    taken = {name(version) for version in used}
    expected = next(version for version in range(10) if version not in used)
    assert first_free_name(name, taken.__contains__) == name(expected)


def test_the_pattern_of_last_matches_versions_and_fields():
    pattern = template_pattern("{epoch}-last", ".ckpt")
    assert pattern.fullmatch("epoch=2-last-v1.ckpt")
    assert not pattern.fullmatch("epoch=2-step=4.ckpt")


@given(st.lists(st.floats(allow_nan=True, width=32), max_size=12), st.integers(-1, 4), st.sampled_from(["min", "max"]))
def test_the_ranking_keeps_the_k_best(values, k, mode):
    """Feeding scores one by one keeps what sorting all of them would."""
    if k == 0:
        return
    scores: dict[str, torch.Tensor] = {}
    ranking = None
    for index, value in enumerate(values):
        score = comparable(torch.tensor(value), mode)
        if k == -1 or len(scores) < k or improves(score, scores[ranking.worst], mode):
            ranking = ranked(scores, str(index), score, k, mode)
            scores = ranking.scores
    expected = sorted((float(comparable(torch.tensor(v), mode)) for v in values), reverse=mode == "max")
    assert sorted(map(float, scores.values()), reverse=mode == "max") == expected[: len(values) if k == -1 else k]
    if ranking is not None:
        assert float(scores[ranking.best]) == expected[0]


def test_a_link_is_replaced_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "sub" / "last"
    link.parent.mkdir()
    for name in ("a", "b"):
        replace_link(str(tmp_path / name), str(link))
        assert link.readlink() == link.parent.joinpath("..", name).relative_to(link.parent)
        assert link.read_text() == name
    assert list_folder(str(link.parent)) == [str(link)]


def test_a_link_replaces_a_folder_and_points_to_one(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "old").write_text("")
    replace_link(str(tmp_path / "shards"), str(tmp_path / "last"))
    assert (tmp_path / "last").resolve() == (tmp_path / "shards").resolve()


def test_where_links_are_refused_the_file_is_copied(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr("os.symlink", refuse)
    (tmp_path / "a").write_text("a")
    replace_link(str(tmp_path / "a"), str(tmp_path / "last"))
    assert (tmp_path / "last").read_text() == "a"
    assert not (tmp_path / "last").is_symlink()


def test_only_what_is_below_a_folder_is_inside(tmp_path):
    assert is_inside(str(tmp_path / "x" / "a"), str(tmp_path / "x"))
    assert not is_inside(str(tmp_path / "xy" / "a"), str(tmp_path / "x"))
    assert not is_inside(str(tmp_path / "x" / ".." / "a"), str(tmp_path / "x"))


def test_remote_folders_are_listed_and_looked_into():
    import fsspec

    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/listed/a.ckpt", b"a")
    assert list_folder("memory://listed") == ["memory:///listed/a.ckpt"]
    assert exists("memory://listed/a.ckpt")
    assert not exists("memory://listed/b.ckpt")
    assert list_folder("memory://nowhere") == []
