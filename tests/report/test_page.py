"""What is read of a run from the disk, and what of it is in the page."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

import pytest

from levin.report.command import main
from levin.report.page import make_page, short_names, thinned
from levin.report.read import LoggedRun, Series, find_runs, read_records, read_run
from tests.report.test_report import in_page


def test_a_folder_is_read_whole(tmp_path):
    folder = tmp_path / "名前 <b>"
    folder.mkdir()
    (folder / "metrics.csv").write_text("loss,step,</script>損失,text\n1,0,nan,abc\nnan,1,inf,\n,2,3,\n2,3\n4,,-1,0\n")
    (folder / "hparams.yaml").write_text(
        "a: !!python/object/apply:os.system ['false']\nb: .nan\nc: !Mine {x: 1, 2: .5}\nd: {}\ne: {f: {g: w}}\nh: [1, 2]\n"
        "i: !!python/name:torch.nn.ReLU\nj: true\nk: null\nl: .inf\nm: !!python/object:a.Kind {}\nn: !!python/tuple [1]\no: !Mine word\n"
    )
    (folder / "report.html").write_text(make_page([LoggedRun(folder, records=[{"steps": [0, 1]}])], "before"))
    run = read_run(folder)
    loss, other = run.series["loss"], run.series["</script>損失"]
    assert (loss.steps, loss.values, loss.times) == ([0, 1, 3, 4], pytest.approx([1, math.nan, 2, 4], nan_ok=True), [])
    assert (other.steps, other.values[1:]) == ([0, 1, 2, 4], [math.inf, 3, -1]) and math.isnan(other.values[0])
    assert run.series.keys() == {"loss", "</script>損失", "text"}
    assert run.series["text"] == Series([4], [0])
    assert run.hparams == {
        "a": "['false']", "b": "nan", "c.x": 1, "c.2": 0.5, "d": "{}", "e.f.g": "w", "h": "[1, 2]",
        "i": "torch.nn.ReLU", "j": True, "k": "None", "l": "inf", "m": "a.Kind", "n": "[1]", "o": "word",
    }  # fmt: skip
    assert run.records == [{"steps": [0, 1]}] and run.path == folder


@pytest.mark.parametrize("text", [None, "no: [", "- a list", "\x00"])
def test_hyper_parameters_that_cannot_be_read_are_left_out(tmp_path, text):
    if text is not None:
        (tmp_path / "hparams.yaml").write_text(text)
    assert read_run(tmp_path) == LoggedRun(tmp_path)


@pytest.mark.parametrize(
    ("text", "records"),
    [(None, []), ("no page", []), ("[1", []), ("[1, {}, {\"a\": [1,\n2]}]", [{}, {"a": [1, 2]}]), ("{\"a\": 1}", [])],
)  # fmt: skip
def test_records_of_an_earlier_page_are_read_as_far_as_they_are_ones(tmp_path, text, records):
    page = tmp_path / "page.html"
    if text is not None:
        page.write_text(text if text == "no page" else f'<script type="application/json" id="records">{text}</script>')
    assert read_records(page) == records


def test_runs_are_found_below_a_folder_in_the_order_of_their_numbers(tmp_path, capsys):
    names = ["version_10", "version_9", "a/b", "a/checkpoints/c", ".hidden/d", "__pycache__/e", "version_9/inner"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.csv").write_text("step\n")
    (tmp_path / "none").mkdir()
    (tmp_path / "events").mkdir()
    (tmp_path / "events/events.out.tfevents.1").touch()
    found = ["a/b", "events", "version_9", "version_9/inner", "version_10"]
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == found
    assert find_runs(str(tmp_path / "version_9")) == [tmp_path / "version_9", tmp_path / "version_9/inner"]
    assert find_runs(tmp_path / "version_10/metrics.csv") == [tmp_path / "version_10"]
    (tmp_path / "none/best.ckpt").touch()
    for path in ("absent", "none/best.ckpt"):
        assert main([str(tmp_path / path)]) == 1
        said = f"{str(tmp_path / path)!r} is no folder of a run. Pass the folder in which a logger wrote."
        assert capsys.readouterr() == ("", f"levin report: {said}\n")
    assert main([str(tmp_path / "none")]) == 1
    said = f"{str(tmp_path / 'none')!r} holds no run: no metrics.csv and no TensorBoard event file."
    assert capsys.readouterr() == ("", f"levin report: {said}\n")


def titles(path):
    return re.findall(r"<(?:title|h1)>(.*?)</", Path(path).read_text())


def test_the_command_writes_one_page_for_runs_that_are_named_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/v", "b/v"):
        os.makedirs(name)
        Path(name, "metrics.csv").write_text("step,loss\n0,1\n")
    assert main(["a", "a/v", "b"]) == 0 and titles("report.html") == ["2 runs"] * 2
    assert [run["name"] for run in in_page(Path("report.html").read_text(), "runs")] == ["a/v", "b/v"]
    assert main(["a"]) == 0 and titles("a/v/report.html") == ["a/v"] * 2
    assert main(["a", "b", "--output", "new/folder/one.html"]) == 0 and titles("new/folder/one.html") == ["2 runs"] * 2
    assert main(["b", "-o", "new/folder/one.html"]) == 0 and titles("new/folder/one.html") == ["b/v"] * 2
    assert capsys.readouterr().out == "report.html\na/v/report.html\nnew/folder/one.html\nnew/folder/one.html\n"
    assert main(["a", "-o", "b"]) == 1 and "levin report: " in capsys.readouterr().err


def test_the_command_says_that_event_files_need_tensorboard(tmp_path, capsys, monkeypatch):
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    assert main([str(tmp_path)]) == 1
    said = f"{tmp_path / 'events.out.tfevents.1'} is read with `tensorboard`, which is not installed. Install it."
    assert capsys.readouterr().err == f"levin report: {said}\n"


def curve_of(series, **others):
    (run,) = in_page(make_page([LoggedRun(Path("/logs/a"), {"loss": series} | others)], "one"), "runs")
    return run["series"]["loss"]


def test_a_page_holds_each_run_whole():
    nan, inf = math.nan, math.inf
    one = LoggedRun(
        Path("/logs/a"),
        {
            "z": Series([2, 0, 1, 3], [0.12345678, 1, nan, 2e9 + 0.5], [12.0, 10.0, 11.0, 13.0]),
            "b": Series([0, 1], [inf, nan], [1.0]),
            "none": Series(),
            "hp_metric": Series([0], [1]),
            "epoch": Series([3, 0, 1, 2, 4, 5], [1, 0, 0, 1, nan, 3]),
        },
        {"lr": 0.1, "</script>": "\u2028é"},
        [{"what": {1: (nan, -inf, 123456.78912345, -1234567.8912345)}, "path": Path("/x")}],
    )
    expected = {
        "name": "a", "path": "/logs/a", "hparams": {"lr": 0.1, "</script>": "\u2028é"}, "epochs": [[0, 0], [1, 2]],
        "records": [{"what": {"1": [None, None, 123456.8, -1234567.8912345]}, "path": "/x"}],
        "series": {
            "b": {"x": [0, 1], "y": [None, None], "n": 2, "bad": [0, 1], "last": None, "min": None, "max": None},
            "none": {"x": [], "y": [], "n": 0, "bad": [], "last": None, "min": None, "max": None, "t": []},
            "z": {
                "x": [0, 1, 2, 3], "y": [1, None, 0.1234568, 2e9 + 0.5], "n": 4, "bad": [1], "last": 2e9 + 0.5,
                "min": 0.1234568, "max": 2e9 + 0.5, "t": [10, 11, 12, 13],
            },
        },
    }  # fmt: skip
    text = make_page([one], "<b>")
    assert in_page(text, "runs") == [expected | {"name": "logs/a"}] and in_page(text, "records") == expected["records"]
    assert list(in_page(text, "runs")[0]["series"]) == ["b", "none", "z"]
    assert re.findall(r"<(?:title|h1)>(.*?)</", text) == ["&lt;b&gt;"] * 2
    assert "\u2028" not in text and "é" in text and '</script>"' not in text and "{{" not in text
    text = make_page([one, LoggedRun(Path("/logs/b"))], "two")
    other = {"name": "b", "path": "/logs/b", "hparams": {}, "records": [], "epochs": [], "series": {}}
    assert in_page(text, "runs") == [expected, other] and in_page(text, "records") == []


def test_of_many_steps_without_a_number_the_first_hundred_are_in_the_page():
    assert curve_of(Series([*range(150)], [math.nan] * 150))["bad"] == [*range(100)]


@pytest.mark.parametrize(
    ("num_curves", "num_values", "num_kept"),
    [(1, 1000, 1000), (1, 1001, 668), (150, 1000, 1000), (200, 750, 750), (200, 751, 501), (4000, 40, 40), (4000, 41, 28)],
)  # fmt: skip
def test_more_curves_have_fewer_points_each(num_curves, num_values, num_kept):
    rising = Series([*range(num_values)], [float(value) for value in range(num_values)])
    others = dict.fromkeys(map(str, range(num_curves - 1)), Series())
    curve = curve_of(rising, **others)
    assert len(curve["x"]) == num_kept and curve["x"] == curve["y"] and curve["n"] == num_values


@pytest.mark.parametrize(
    ("num", "starts"), [(2000, [*range(2000)]), (2001, [*range(0, 2001, 2)]), (3001, [*range(0, 3001, 3)])]
)
def test_of_many_epochs_some_are_marked(num, starts):
    epochs = Series([10 * epoch for epoch in range(num)], [float(epoch) for epoch in range(num)])
    (run,) = in_page(make_page([LoggedRun(Path("/logs/a"), {"epoch": epochs})], "one"), "runs")
    assert run["epochs"] == [[epoch, 10 * epoch] for epoch in starts]


@pytest.mark.parametrize(
    ("values", "limit", "kept"),
    [
        ([2.0, 1.0], 2, [0, 1]),
        ([math.nan] * 8, 4, [0, 4, 7]),
        ([5, 1, 2, 9, 3, 4, 4, 7, 6, 0], 5, [0, 1, 3, 4, 7, 8, 9]),
        ([5, 1, math.inf, 9, math.nan, 3, 4, 4], 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([1, 3, 2, 2, 5, 4, 4], 4, [0, 1, 4, 5, 6]),
    ],
)
def test_of_many_values_the_least_and_largest_of_each_group_are_kept(values, limit, kept):
    assert thinned(values, limit) == kept


def test_a_run_is_named_by_what_others_have_not_in_common_with_it():
    def names(*paths):
        return short_names([Path(path) for path in paths])

    assert names("/a/b/v0", "/a/b/v1") == ["v0", "v1"] and names("/a/b", "/a/b/c") == ["b", "b/c"]
    assert names("/a/b/v0") == ["b/v0"] and names("/a/b/v0", "/a/c/v0") == ["b/v0", "c/v0"]
    assert names("v0", "v1") == ["v0", "v1"] and names("/v0") == ["//v0"]
