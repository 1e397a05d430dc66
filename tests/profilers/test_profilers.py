from __future__ import annotations

import logging
import os
import pickle
import pstats
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from levin import profilers
from levin.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
    XLAProfiler,
)
from levin.profilers.choose import resolve_profiler
from levin.profilers.profiler import is_profiling, timer
from levin.utilities.exceptions import MisconfigurationException


class Recorder(Profiler):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def start(self, action_name: str) -> None:
        self.calls.append(("start", action_name))

    def stop(self, action_name: str) -> None:
        self.calls.append(("stop", action_name))


def test_the_package_names_what_it_has():
    assert dir(profilers) == sorted(profilers.__all__)
    with pytest.raises(AttributeError, match="NoProfiler"):
        profilers.NoProfiler


def test_profile_stops_even_when_the_body_fails():
    profiler = Recorder()
    with pytest.raises(RuntimeError, match="meant"), profiler.profile("a") as name:
        assert name == "a"
        raise RuntimeError("meant")
    assert profiler.calls == [("start", "a"), ("stop", "a")]
    assert profiler.local_rank == 0
    profiler.setup("fit", local_rank=3)
    assert profiler.local_rank == 3
    assert profiler.summary() == ""
    with pytest.raises(TypeError):
        Profiler()


def test_pass_through_does_nothing(caplog):
    profiler = PassThroughProfiler()
    with profiler.profile("a"):
        pass
    with caplog.at_level(logging.INFO, logger="levin"):
        profiler.describe()
    assert not caplog.records


@pytest.mark.parametrize("profiler", [SimpleProfiler(), AdvancedProfiler()])
def test_unbalanced_starts_and_stops_are_errors(profiler):
    with pytest.raises(ValueError, match="never started"):
        profiler.stop("a")
    profiler.start("a")
    with pytest.raises(ValueError, match="already started"):
        profiler.start("a")
    profiler.stop("a")
    profiler.start("b")
    profiler.teardown("fit")
    profiler.start("b")
    profiler.stop("b")


def test_simple_profiler_counts_calls_and_seconds():
    profiler = SimpleProfiler()
    for _ in range(3):
        with profiler.profile("sleep"):
            time.sleep(0.01)
    with profiler.profile("quick"):
        pass
    assert len(profiler.recorded_durations["sleep"]) == 3
    assert all(0.01 <= duration < 0.1 for duration in profiler.recorded_durations["sleep"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in profiler.summary().splitlines() if "|" in line]
    assert rows[0] == ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"]
    assert rows[1][0] == "Total" and rows[1][2] == "4" and rows[1][4] == "100 %"
    assert [row[0] for row in rows[2:]] == ["sleep", "quick"]
    assert rows[2][2] == "3"
    assert 0 < float(rows[2][4]) <= 100
    assert len({len(line) for line in profiler.summary().splitlines()[2:]}) == 1


def test_simple_profiler_says_means_and_shares(monkeypatch):
    now_s = [5.0]
    monkeypatch.setattr("levin.profilers.simple.time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    profiler = SimpleProfiler()
    for action, duration_s in (("quick", 1), ("slow", 1), ("slow", 2), ("slow", 3)):
        with profiler.profile(action):
            now_s[0] += duration_s
    now_s[0] += 1
    assert (
        profiler.summary()
        == """Profiler Report

------------------------------------------------------------------------------------
|  Action  |  Mean duration (s)  |  Num calls  |  Total time (s)  |  Percentage %  |
------------------------------------------------------------------------------------
|  Total   |  -                  |  4          |  8.0             |  100 %         |
|  slow    |  2.0                |  3          |  6.0             |  75.0          |
|  quick   |  1.0                |  1          |  1.0             |  12.5          |
------------------------------------------------------------------------------------
"""
    )
    profiler.setup("fit")
    profiler.extended = False
    assert (
        profiler.summary()
        == """FIT Profiler Report

-----------------------------------------------------
|  Action  |  Mean duration (s)  |  Total time (s)  |
-----------------------------------------------------
|  slow    |  2.0                |  6.0             |
|  quick   |  1.0                |  1.0             |
-----------------------------------------------------
"""
    )


def test_reports_without_any_action():
    assert SimpleProfiler().extended
    assert SimpleProfiler().summary() and SimpleProfiler(extended=False).summary()
    assert AdvancedProfiler().summary() == "Profiler Report"


def test_the_report_goes_to_a_file_named_after_stage_and_rank(tmp_path):
    profiler = SimpleProfiler(filename="a/b")
    profiler.setup("fit", local_rank=None, log_dir=str(tmp_path / "logs"))
    with profiler.profile("x"):
        pass
    profiler.describe()
    profiler.setup("test", local_rank=1, log_dir=str(tmp_path / "logs"))
    profiler.describe()
    assert sorted(os.listdir(tmp_path / "logs")) == ["fit-a_b.txt", "test-a_b-1.txt"]
    assert (tmp_path / "logs" / "fit-a_b.txt").read_text().startswith("FIT Profiler Report")
    profiler.describe()  # a file of this machine gets one report after the other
    assert (tmp_path / "logs" / "test-a_b-1.txt").read_text().count("TEST Profiler Report") == 2
    own = SimpleProfiler(dirpath=tmp_path / "own", filename="p")
    own.setup("fit", log_dir=str(tmp_path / "logs"))
    own.describe()
    assert os.listdir(tmp_path / "own") == ["fit-p.txt"]


def test_the_report_goes_to_a_remote_file():
    import fsspec

    profiler = SimpleProfiler(dirpath="memory://reports", filename="p")
    profiler.setup("fit")
    for _ in range(2):
        profiler.describe()
    written = fsspec.filesystem("memory").cat_file("/reports/fit-p.txt").decode()
    assert written.count("FIT Profiler Report") == 1


@pytest.mark.parametrize("arguments", [{}, {"filename": "p"}, {"dirpath": "d"}])
def test_without_a_filename_or_a_directory_the_report_is_printed(arguments, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, logger="levin"):
        SimpleProfiler(**arguments).describe()
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("Profiler Report\n\n---")
    assert list(tmp_path.iterdir()) == []


def busy() -> list[int]:
    return sorted(range(1000))


def test_advanced_profiler_lists_functions_under_their_own_action():
    profiler = AdvancedProfiler()
    with profiler.profile("outer"):
        with profiler.profile("inner"):
            busy()
        sum(range(10))
    outer = profiler.summary().split("Profile stats for: inner")[0]
    inner = profiler.summary().split("Profile stats for: inner")[1]
    assert "(busy)" in inner and "(busy)" not in outer
    assert "built-in method builtins.sum" in outer and "built-in method builtins.sum" not in inner
    assert sys.getprofile() is None
    profiler.start("outer")
    profiler.teardown("fit")
    assert sys.getprofile() is None and profiler.summary() == "Profiler Report"


def test_advanced_profiler_sorts_by_the_time_with_all_that_is_called():
    profiler = AdvancedProfiler()
    profiler.setup("fit", local_rank=2)
    with profiler.profile("work"):
        busy()
    text = profiler.summary()
    assert text.startswith("FIT Profiler Report\nProfile stats for: work rank: 2\n")
    assert "Ordered by: cumulative time" in text and os.path.dirname(__file__) not in text
    assert "restriction" not in text


def test_advanced_profiler_shortens_lists_and_dumps_stats(tmp_path):
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="p", line_count_restriction=1, dump_stats=True)
    profiler.setup("fit", local_rank=0)
    with profiler.profile("[M]a/b"):
        busy()
    profiler.describe()
    assert sorted(os.listdir(tmp_path)) == ["fit-p-0-[M]a_b.prof", "fit-p-0.txt"]
    text = (tmp_path / "fit-p-0.txt").read_text()
    assert "Profile stats for: [M]a/b rank: 0" in text and "due to restriction <1>" in text
    assert any(name == "busy" for _, _, name in pstats.Stats(str(tmp_path / "fit-p-0-[M]a_b.prof")).stats)
    profiler = AdvancedProfiler(dump_stats=True)
    with profiler.profile("a"):
        pass
    with pytest.raises(ValueError, match="dirpath"):
        profiler.describe()


# ---- PyTorchProfiler ----


def step(profiler: PyTorchProfiler, name: str, model: torch.nn.Module) -> None:
    with profiler.profile(f"[Strategy]S.{name}"):
        model(torch.zeros(1, 2)).sum()


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())


def test_pytorch_profiler_records_three_steps_of_each_function(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="p")
    profiler.setup("fit")
    model = make_model()
    profiler.attach(model)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    for _ in range(8):
        with profiler.profile("run_training_batch"):
            step(profiler, "training_step", model)
    for _ in range(5):
        step(profiler, "validation_step", model)
    step(profiler, "training_step", model)
    profiler.describe()
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    traces = sorted(path for path in os.listdir(tmp_path) if path.endswith(".pt.trace.json"))
    assert [path.split(".")[1] for path in traces] == ["training_step", "validation_step"]
    text = (tmp_path / "fit-p.txt").read_text()
    assert "Profile stats for: [Strategy]S.training_step" in text
    assert "Profile stats for: [Strategy]S.validation_step" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("aten::addmm")]
    assert [row[-1] for row in rows] == ["3", "3"]
    assert "Linear" in (tmp_path / traces[0]).read_text()
    profiler.teardown("fit")
    assert profiler.summary() == ""
    step(profiler, "training_step", model)  # nothing is recorded between runs
    assert profiler._num_steps == {}
    profiler.setup("fit")
    for _ in range(6):
        step(profiler, "training_step", model)
    rows = [line.split() for line in profiler.summary().splitlines() if line.strip().startswith("aten::addmm")]
    assert [row[-1] for row in rows] == ["3"]


def test_pytorch_profiler_keeps_what_another_function_interrupts():
    profiler = PyTorchProfiler(export_to_chrome=False, record_module_names=False)
    model = make_model()
    for _ in range(4):
        step(profiler, "training_step", model)
    for _ in range(2):
        step(profiler, "validation_step", model)
    text = profiler.summary()
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("aten::addmm")]
    assert [row[-1] for row in rows] == ["2"]


def test_pytorch_profiler_without_schedule_records_everything():
    ready = []
    profiler = PyTorchProfiler(schedule=None, on_trace_ready=ready.append, group_by_input_shapes=True, row_limit=5)
    for size in (1, 1_000_000):
        with profiler.profile("work"):
            torch.zeros(size).sum()
    text = profiler.summary()
    assert len(ready) == 1
    assert "Input Shapes" in text and "[levin]work" in text and "[[1000000]" in text  # among the five that took longest
    names = [line.split()[0] for line in text.splitlines() if line.strip().startswith(("aten::", "[levin]"))]
    assert len(names) == 5 and names[0] == "[levin]work"  # the longest first


def test_pytorch_profiler_sorts_by_the_column_that_is_wished(tmp_path, caplog):
    profiler = PyTorchProfiler(
        dirpath=tmp_path, schedule=None, export_to_chrome=False, sort_by_key="count", row_limit=-1,
        table_kwargs={"max_name_column_width": 12},
    )  # fmt: skip
    with profiler.profile("work"):
        for _ in range(7):
            torch.zeros(2).sum()
        torch.ones(2)
    table = [line.split() for line in profiler.summary().splitlines() if line.split() and line.split()[-1].isdigit()]
    calls = [int(row[-1]) for row in table]
    assert calls == sorted(calls, reverse=True) and calls[0] >= 7
    assert max(len(row[0]) for row in table) <= 12
    assert list(tmp_path.iterdir()) == []
    profiler = PyTorchProfiler(schedule=None)
    with profiler.profile("work"):
        torch.zeros(2).sum()
    with caplog.at_level(logging.INFO, logger="levin"):
        profiler.summary()
    assert caplog.messages == ["PyTorchProfiler writes no trace, since it has no directory. Give it a dirpath."]


def test_pytorch_profiler_names_layers_after_one_of_them_has_failed():
    class Failing(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("meant")

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Failing())
    profiler = PyTorchProfiler(schedule=None, export_to_chrome=False)
    with profiler.profile("work"):
        profiler.attach(model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="meant"):
                model(torch.zeros(1, 2))
        model[0](torch.zeros(1, 2))
    text = profiler.summary()
    named = {
        line.split()[-1]
        for line in text.splitlines()
        if "module]torch.nn.modules.linear.Linear" in line or "[levin][module]torch" in line
    }
    assert named == {"3"} and text.count("[levin][module]") == 2
    layers = [event for event in profiler.function_events if event.name.startswith("[levin][module]")]
    assert [event.cpu_parent.name for event in layers] == ["[levin]work"] * 5  # each ends before the next one begins


def test_pytorch_profiler_names_the_layers_of_a_module_that_comes_while_it_records():
    profiler, model = PyTorchProfiler(schedule=None, export_to_chrome=False), make_model()
    with profiler.profile("setup"):
        profiler.attach(model)
        assert model[0]._forward_pre_hooks
        model(torch.zeros(1, model[0].in_features))
    assert "Linear" in profiler.summary() and not model[0]._forward_pre_hooks


def test_pytorch_profiler_says_when_the_run_was_too_short(caplog):
    profiler = PyTorchProfiler()
    step(profiler, "training_step", make_model())
    with caplog.at_level(logging.INFO, logger="levin"):
        assert profiler.summary() == ""
    told = (
        "PyTorchProfiler recorded nothing: {}, and its schedule starts later. Use schedule=None to record everything."
    )
    assert caplog.messages == [told.format("[Strategy]S.training_step ran 1 times")]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="levin"):
        assert PyTorchProfiler().summary() == ""
    assert caplog.messages == [told.format("no step ran")]


def test_pytorch_profiler_survives_a_failing_step(tmp_path):
    profiler = PyTorchProfiler(schedule=None, export_to_chrome=False)
    with pytest.raises(RuntimeError), profiler.profile("work"):
        torch.zeros(2) @ torch.zeros(3)
    profiler.teardown("fit")
    assert profiler._profile is None and not torch.autograd._profiler_enabled()
    other = PyTorchProfiler(schedule=None, export_to_chrome=False)
    with other.profile("work"):
        torch.zeros(2).sum()
    assert "aten::sum" in other.summary()


def test_pytorch_profiler_can_be_pickled_while_it_runs():
    profiler = PyTorchProfiler(schedule=None, export_to_chrome=False)
    profiler.start("work")
    profiler.attach(make_model())
    copy = pickle.loads(pickle.dumps(profiler))
    assert (copy._profile, copy._owner, copy._running, copy._module, copy._module_names) == (None, None, {}, None, None)
    profiler.stop("work")
    profiler.teardown("fit")
    assert copy.summary() == ""


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sort_by_key": "x"}, MisconfigurationException, "sort_by_key"),
        ({"schedule": 3}, MisconfigurationException, "schedule"),
        ({"schedule": lambda step: 3}, MisconfigurationException, "ProfilerAction"),
        ({"table_kwargs": {"row_limit": 3}}, KeyError, "row_limit"),
        ({"table_kwargs": {"nonsense": 3}}, KeyError, "nonsense"),
        ({"nonsense": 3}, TypeError, "nonsense"),
    ],
)
def test_pytorch_profiler_refuses_wrong_settings(kwargs, error, match):
    with pytest.raises(error, match=match):
        PyTorchProfiler(**kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without CUDA")
def test_nvtx_ranges_need_cuda():
    with pytest.raises(MisconfigurationException, match="CUDA"):
        PyTorchProfiler(emit_nvtx=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pytorch_profiler_records_kernels():
    profiler = PyTorchProfiler(schedule=None, export_to_chrome=False)
    with profiler.profile("work"):
        torch.zeros(1000, device="cuda").sum().item()
    assert "CUDA total" in profiler.summary()
    profiler = PyTorchProfiler(emit_nvtx=True)
    with profiler.profile("work"):
        torch.zeros(1000, device="cuda").sum().item()
    assert profiler.summary() == ""


# ---- XLAProfiler ----


def test_xla_profiler_needs_torch_xla():
    if "torch_xla" in sys.modules:
        pytest.skip("torch_xla is installed")
    with pytest.raises(ModuleNotFoundError, match="pip install torch_xla"):
        XLAProfiler()


def test_xla_profiler_marks_steps_and_backward(monkeypatch):
    """There is no XLA device here, so its profiler is replaced by one that notes what is asked of it."""
    calls: list[tuple] = []

    class Trace:
        def __init__(self, *args, **kwargs):
            calls.append((type(self).__name__, *args, *kwargs.values()))

        def __enter__(self):
            calls.append(("enter",))

        def __exit__(self, *args):
            calls.append(("exit",))

    class StepTrace(Trace):
        pass

    module = ModuleType("torch_xla.debug.profiler")
    module.set_tracer_marked_step = lambda value: calls.append(("marked", value))
    module.Trace, module.StepTrace = Trace, StepTrace
    module.start_server = lambda port: calls.append(("server", port)) or object()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name in ("torch_xla", "torch_xla.debug"):
        parent = ModuleType(name)
        parent.__path__ = []
        monkeypatch.setitem(sys.modules, name, parent)
    monkeypatch.setitem(sys.modules, "torch_xla.debug.profiler", module)
    sys.modules["torch_xla.debug"].profiler = module
    profiler = XLAProfiler(port=1)
    for action in ("M.setup", "S.training_step", "S.backward", "S.training_step"):
        with profiler.profile(action):
            pass
    end = [("enter",), ("exit",), ("marked", False)]
    assert calls == [
        ("server", 1), ("StepTrace", "S.training_step", 0), *end, ("Trace", "S.backward"), *end,
        ("StepTrace", "S.training_step", 1), *end,
    ]  # fmt: skip
    assert XLAProfiler().port == 9012


def test_a_function_that_is_timed_returns_what_it_returned():
    profiler = Recorder()
    assert timer(profiler)("a", lambda *args, **kwargs: (args, kwargs))(1, b=2) == ((1,), {"b": 2})
    assert profiler.calls == [("start", "a"), ("stop", "a")]
    assert is_profiling(profiler) is True and is_profiling(PassThroughProfiler()) is False


def test_profilers_by_their_names():
    for name, kind in (("Simple", SimpleProfiler), ("advanced", AdvancedProfiler), ("pytorch", PyTorchProfiler)):
        assert type(resolve_profiler(name)) is kind
    own = Recorder()
    assert resolve_profiler(own) is own and type(resolve_profiler(None)) is PassThroughProfiler
    with pytest.raises(ValueError, match="must be one of simple, advanced, pytorch, xla, a Profiler or None.*simple"):
        resolve_profiler("simpel")
    with pytest.raises(ValueError, match="must be a name, a Profiler or None"):
        resolve_profiler(3)
