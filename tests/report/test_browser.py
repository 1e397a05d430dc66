"""The page in a real browser: drawn, clicked, by keyboard, narrow, dark, and at its worst."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from levin.report.page import make_page
from levin.report.read import LoggedRun, Series

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]

WATCH = "<script>window.failures = []; addEventListener('error', (event) => failures.push(event.message));</script>"


def look(tmp_path, runs, script="", width=1200, dark=False):
    """Open the page of `runs`, run `script` in it, and return what that returns."""
    wait = (
        "const wait = (ms) => new Promise((done) => setTimeout(done, ms)); const $ = (q) => document.querySelector(q);"
    )
    # A window of headless Chromium is 500 pixels wide at least; a frame may be narrower.
    run = f"<script>onload = async () => {{ {wait} await wait(300); let found; try {{ found = await (async () => {{ {script} }})(); }} catch (error) {{ failures.push(String(error)); }} parent.postMessage(JSON.stringify({{ found, failures }}), '*'); }};</script>"
    page = make_page(runs, "runs").replace("<style>", WATCH + "<style>", 1).replace("</body>", run + "</body>")
    (tmp_path / "page.html").write_text(page)
    frame = f"<iframe src='page.html' style='width:{width}px;height:1000px;border:0'></iframe><pre></pre><script>addEventListener('message', (event) => {{ document.querySelector('pre').textContent = event.data; }});</script>"
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{frame}")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
        "--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,1100",
    ]  # fmt: skip
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*command, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120)
    said = (
        re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1]
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
    )
    answer = json.loads(said)
    assert answer["failures"] == []
    return answer["found"]


def run_of(name="a", lr=0.1, metrics=("train/loss", "val/loss"), num=50, records=()):
    series = {
        metric: Series(list(range(num)), [math.exp(-step / 20) * (1 + lr) for step in range(num)]) for metric in metrics
    }
    series["epoch"] = Series(list(range(num)), [step // 10 for step in range(num)])
    return LoggedRun(Path(f"/logs/{name}"), series, {"lr": lr, "name": name, "same": 1}, list(records))


def record(**more):
    return {
        "what": {"module": "Net", "git": "abc", "precision": "32"}, "settings": {}, "versions": {"levin": "1"}, "started": 1e9, "ended": 1e9 + 100,
        "steps": [0, 50], "epochs": [0, 5], "resumed_from": None, "ended_by": "", "is_signal": False, "bad_steps": [], "best": [["a.ckpt", "loss", 0.5]],
        "shares": {"data": 0.4}, "points": [[1e9 + 2 * step, step, step // 10, 0.2, None] for step in range(0, 50, 5)],
    } | more  # fmt: skip


IS_DRAWN = "const inked = (c) => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; };"


def test_one_run_is_drawn_and_told(tmp_path):
    found = look(tmp_path, [run_of(records=[record(resumed_from="x.ckpt", ended_by="SIGTERM", is_signal=True, bad_steps=[7])])], IS_DRAWN + """
        return { ink: [...document.querySelectorAll('canvas')].map(inked), labels: [...document.querySelectorAll('figure')].map((f) => f.ariaLabel),
                 what: $('#what').textContent, shown: $('#shown').textContent };""")  # fmt: skip
    assert len(found["ink"]) == 4 and min(found["ink"]) > 500
    assert found["labels"][0].startswith("val/loss. 50 values, 0.09") and found["shown"] == "4 of 4 shown"
    assert (
        "went on from x.ckpt" in found["what"]
        and "1 bad step left out" in found["what"]
        and "40 % of the time" in found["what"]
    )


def test_controls_and_keys(tmp_path):
    found = look(tmp_path, [run_of(records=[record()])], """
        const set = async (id, value) => { const e = $('#' + id); if (e.type === 'checkbox') e.click(); else { e.value = value; e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input', { bubbles: true })); } await wait(150); };
        const figure = $('figure'); figure.focus();
        const press = async (key) => { figure.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true })); await wait(100); return figure.querySelector('output').textContent; };
        const first = await press('Home'), second = await press('ArrowRight'), last = await press('End');
        await set('axis', 'epoch'); const epoch = await press('End');
        await set('axis', 'time'); const time = await press('End');
        await set('smooth', 0.9); await set('log'); const smooth = await press('End');
        await set('filter', 'val'); const shown = [...document.querySelectorAll('figure')].filter((f) => !f.hidden).length;
        return { first, second, last, epoch, time, smooth, shown, active: document.activeElement.tagName };""")  # fmt: skip
    assert (
        found["first"].startswith("step 0 1.1")
        and found["second"].startswith("step 1 ")
        and found["last"].startswith("step 49 ")
    )
    assert found["epoch"].startswith("epoch 4.9") and found["time"].startswith("time 1 min 38 s")
    assert found["smooth"] != found["time"] and found["shown"] == 1


def test_runs_are_compared(tmp_path):
    runs = [run_of(f"run{number}", lr) for number, lr in enumerate((0.3, 0.1, 0.2))]
    found = look(tmp_path, runs, """
        const names = () => [...document.querySelectorAll('tbody th')].map((e) => e.textContent.trim());
        const heads = [...document.querySelectorAll('thead th')].map((e) => e.textContent);
        [...document.querySelectorAll('thead button')].find((e) => e.textContent === 'lr').click();
        const sorted = names(); const sort = $('thead [aria-sort]').ariaSort;
        $('tbody input').click(); await wait(200);
        return { heads, sorted, sort, label: $('figure').ariaLabel };""")  # fmt: skip
    assert found["heads"] == ["run", "lr", "name", "val/loss", "train/loss"]
    assert found["sorted"] == ["run1", "run2", "run0"] and found["sort"] == "ascending"
    assert "run1" not in found["label"] and "run0" in found["label"]


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_and_dark(tmp_path, dark):
    found = look(tmp_path, [run_of("a" * 80, records=[record()]), run_of("b", 0.2)], """
        return { wide: document.documentElement.scrollWidth, ground: getComputedStyle(document.body).backgroundColor, figure: $('figure').clientWidth, canvas: $('canvas').clientWidth };""", width=400, dark=dark)  # fmt: skip
    assert found["wide"] <= 400 and found["canvas"] <= found["figure"]
    assert (found["ground"] != "rgb(255, 255, 255)") == dark


def test_long_names_and_many_settings_leave_the_curves_in_reach(tmp_path):
    run = run_of("a" * 200, records=[record()])
    run.hparams.update({f"h{n}": n for n in range(100)}, long="w" * 400)
    found = look(tmp_path, [run], """
        const boxes = [...document.querySelectorAll('.facts > div')];
        return { wide: document.documentElement.scrollWidth, high: Math.max(...boxes.map((e) => e.offsetHeight)), all: Math.max(...boxes.map((e) => e.scrollHeight)) };""", width=400)  # fmt: skip
    assert found["wide"] <= 400 and found["high"] <= 320 < found["all"]


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("nothing", [LoggedRun(Path("/logs/a"))]),
        ("no run has anything", [LoggedRun(Path("/logs/a")), LoggedRun(Path("/logs/b"))]),
        ("one point", [run_of(num=1)]),
        ("no number", [LoggedRun(Path("/logs/a"), {"loss": Series([0, 1], [math.nan, math.inf])})]),
        ("other scripts", [run_of("実験 <b>&amp;", metrics=("損失/学習", "مقياس", "</script>"))]),
        ("200 metrics", [run_of(metrics=[f"m/{n}" for n in range(200)])]),
        ("100 runs", [run_of(f"r{n}", n / 100) for n in range(100)]),
    ],
)
def test_the_worst(tmp_path, name, runs):
    found = look(
        tmp_path,
        runs,
        "return { figures: document.querySelectorAll('figure').length, canvases: document.querySelectorAll('canvas').length, text: document.body.innerText };",
    )
    num = len({metric for run in runs for metric in run.series} - {"epoch"})
    assert found["figures"] == num and found["canvases"] <= num
    assert num > 0 or "no curves" in found["text"]
    assert name != "other scripts" or all(word in found["text"] for word in ("実験 <b>&amp;", "損失/学習", "</script>"))
    assert name != "200 metrics" or found["canvases"] < 60  # those in sight alone
