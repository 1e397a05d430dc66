"""`levin migrate`: sources and configurations by the table, shown before they are written."""

from __future__ import annotations

import ast

import pytest

from levin.__main__ import main
from levin.codemod.rewrite import rewrite_python, rewrite_yaml

CASES = {
    "an alias": ("import pytorch_lightning as pl\npl.Trainer()\n", "import levin as pl\npl.Trainer()\n"),
    "the unified package": ("import lightning as L\nL.pytorch.Trainer(L.Trainer)\n", "import levin as L\nL.Trainer(L.Trainer)\n"),
    "no alias": (
        "import lightning.pytorch\nx = lightning.pytorch.callbacks.EarlyStopping('a')\nprint(lightning)\n",
        "import levin\nx = levin.callbacks.EarlyStopping('a')\nprint(levin)\n",
    ),
    "a submodule": ("import lightning.pytorch.callbacks as cb\ncb.Timer()\n", "import levin.callbacks as cb\ncb.Timer()\n"),
    "a submodule by name": (
        "from pytorch_lightning import loggers as pl_loggers, Trainer\npl_loggers.CSVLogger('x')\n",
        "import levin.loggers as pl_loggers\nfrom levin import Trainer\npl_loggers.CSVLogger('x')\n",
    ),
    "pytorch by name": ("from lightning import pytorch as pl\npl.Callback\n", "import levin as pl\npl.Callback\n"),
    "several imports in a line": ("import os, lightning.pytorch as pl, sys\n", "import os, levin as pl, sys\n"),
    "names with aliases": (
        "from lightning.pytorch.callbacks.early_stopping import EarlyStopping as ES\n",
        "from levin.callbacks import EarlyStopping as ES\n",
    ),
    "a name that is another one here": (
        "from lightning.pytorch.core.optimizer import _MockOptimizer\n",
        "from levin.optimizer import MockOptimizer as _MockOptimizer\n",
    ),
    "names of several homes": (
        "    \nif True:\n    from lightning.pytorch.utilities import rank_zero_only, CombinedLoader\n",
        "    \nif True:\n    from levin.utilities.rank_zero import rank_zero_only\n    from levin.data.combined import CombinedLoader\n",
    ),
    "several lines with comments": (
        "from lightning.pytorch.callbacks import (\n    EarlyStopping,  # stops\n    ModelCheckpoint,\n)  # end\n",
        "from levin.callbacks import (\n    EarlyStopping,  # stops\n    ModelCheckpoint,\n)  # end\n",
    ),
    "several lines with a backslash": (
        "from lightning.pytorch import Trainer, \\\n    LightningModule\n",
        "from levin import Trainer, \\\n    LightningModule\n",
    ),
    "a statement that shares its line": (
        "import os; from lightning.pytorch.utilities import rank_zero_only, CombinedLoader; x = 1\n",
        "import os; from levin.utilities.rank_zero import rank_zero_only; from levin.data.combined import CombinedLoader; x = 1\n",
    ),
    "a dotted name whose home has to be imported": (
        "import pytorch_lightning as pl\n\n@pl.utilities.rank_zero_only\ndef f(): ...\n",
        "import levin as pl\nimport levin.utilities.rank_zero\n\n@levin.utilities.rank_zero.rank_zero_only\ndef f(): ...\n",
    ),
    "a star": ("from pytorch_lightning.callbacks import *\n", "from levin.callbacks import *\n"),
    "a dotted name over several lines": (
        "import lightning.pytorch as pl\nx = (pl\n     .callbacks.progress\n     .TQDMProgressBar())\n",
        "import levin as pl\nx = (pl.callbacks.TQDMProgressBar())\n",
    ),
    "letters of two bytes": (
        "import lightning as L\nprint('größe', L.pytorch.seed_everything(1), 'ä', L.pytorch.Trainer)\n",
        "import levin as L\nprint('größe', L.seed_everything(1), 'ä', L.Trainer)\n",
    ),
    "inside of functions and try": (
        "try:\n    import lightning.pytorch as pl\nexcept ImportError:\n    import pytorch_lightning as pl\n",
        "try:\n    import levin as pl\nexcept ImportError:\n    import levin as pl\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_sources(case):
    before, after = CASES[case]
    rewritten = rewrite_python(before)
    assert rewritten.text == after
    assert rewritten.remarks == []
    assert rewrite_python(after).text == after
    ast.parse(after)


@pytest.mark.parametrize(
    "source",
    [
        "path = 'lightning.pytorch.callbacks.EarlyStopping'  # import lightning.pytorch as pl\n",
        '"""\nimport pytorch_lightning as pl\n"""\n',
        "from .lightning import pytorch\nfrom lightning_utilities.core.imports import RequirementCache\n",
        "f().lightning.pytorch.Trainer\n",
        "import lightning_data\nlightning = 3\nlightning.bit_length()\n",
        "class pytorch_lightning: pass\npytorch_lightning.Trainer\n",
        "from litdata import lightning\nlightning.pytorch.Trainer\n",
    ],
)
def test_what_must_not_change(source):
    assert rewrite_python(source).text == source


def test_what_levin_does_not_have_stays_and_is_told():
    source = "import lightning.pytorch as pl\nfrom lightning.pytorch.loggers.neptune import NeptuneLogger\nfrom lightning.pytorch.loggers import CSVLogger, NeptuneLogger\npl.loggers.NeptuneLogger()\n"
    rewritten = rewrite_python(source)
    assert rewritten.text == (
        "import levin as pl\nfrom lightning.pytorch.loggers.neptune import NeptuneLogger\nfrom levin.loggers import CSVLogger\n"
        "from lightning.pytorch.loggers import NeptuneLogger\npl.loggers.NeptuneLogger()\n"
    )
    assert [line for line, _ in rewritten.remarks] == [2, 3, 4]
    assert "levin has nothing for `lightning.pytorch.loggers.NeptuneLogger`" in rewritten.remarks[1][1]


def test_a_name_that_is_bound_to_something_else_too_is_told():
    rewritten = rewrite_python("import pytorch_lightning as pl\n\ndef f(pl):\n    return pl.utilities.rank_zero_only\n")
    assert rewritten.text.endswith("return pl.utilities.rank_zero_only\n")
    assert rewritten.remarks[0][0] == 4


def test_what_is_rewritten_runs(tmp_path):
    source = (
        "import lightning as L, pytorch_lightning as pl\nfrom lightning.pytorch.utilities.types import STEP_OUTPUT\n"
        "from lightning.pytorch import callbacks, loggers\n"
        "assert L.pytorch.callbacks.model_checkpoint.ModelCheckpoint is callbacks.ModelCheckpoint\n"
        "assert pl.utilities.rank_zero.rank_zero_only and loggers.logger.Logger and pl.strategies.ddp.DDPStrategy\n"
    )
    rewritten = rewrite_python(source)
    assert "lightning" not in rewritten.text
    exec(compile(rewritten.text, "rewritten", "exec"), {})


def test_configurations():
    before = (
        "model: # lightning.pytorch.Trainer\n  class_path: pytorch_lightning.callbacks.early_stopping.EarlyStopping\n"
        '  name: lightning.pytorch.callbacks.Timer\ncallbacks:\n  - class_path: "lightning.pytorch.callbacks.Timer"  # clock\n'
        "  - _target_: mine.lightning.pytorch.Thing\n  - class_path: lightning.pytorch.loggers.NeptuneLogger\n"
    )
    after = (
        "model: # lightning.pytorch.Trainer\n  class_path: levin.callbacks.EarlyStopping\n"
        '  name: lightning.pytorch.callbacks.Timer\ncallbacks:\n  - class_path: "levin.callbacks.Timer"  # clock\n'
        "  - _target_: mine.lightning.pytorch.Thing\n  - class_path: lightning.pytorch.loggers.NeptuneLogger\n"
    )
    rewritten = rewrite_yaml(before)
    assert rewritten.text == after
    assert [line for line, _ in rewritten.remarks] == [7]


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_bytes(
        "# -*- coding: latin-1 -*-\r\nimport lightning as L\r\nx = 'ä'\r\n".encode("latin-1")
    )
    (tmp_path / "pkg" / "config.yaml").write_text("class_path: lightning.pytorch.callbacks.Timer\n")
    (tmp_path / "pkg" / "a.py").chmod(0o640)
    (tmp_path / "pkg" / "broken.py").write_text("import lightning as (\n")
    (tmp_path / "pkg" / "left.yml").write_text("class_path: lightning.pytorch.loggers.NeptuneLogger\n")
    (tmp_path / "pkg" / "notes.txt").write_text("import lightning\n")
    (tmp_path / "pkg" / ".venv").mkdir()
    (tmp_path / "pkg" / ".venv" / "b.py").write_text("import lightning\n")
    return tmp_path / "pkg"


def test_the_command_shows_first_and_asks(project, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    source, config = project / "a.py", project / "config.yaml"
    difference = f"""--- {source}
+++ {source}
@@ -1,3 +1,3 @@
 # -*- coding: latin-1 -*-
-import lightning as L
+import levin as L
 x = 'ä'
--- {config}
+++ {config}
@@ -1 +1 @@
-class_path: lightning.pytorch.callbacks.Timer
+class_path: levin.callbacks.Timer
"""

    def end_of_input(question):
        raise EOFError

    for answer, told in ((lambda question: "n", "Nothing written.\n"), (end_of_input, "\nNothing written.\n")):
        monkeypatch.setattr("builtins.input", answer)
        assert main(["migrate", str(project)]) == 1
        shown = capsys.readouterr()
        assert shown.out == difference + told
    broken, left = shown.err.splitlines()
    assert broken.startswith(f"{project / 'broken.py'}: left as it is: ")
    assert (
        left
        == f"{project / 'left.yml'}:1: levin has nothing for `lightning.pytorch.loggers.NeptuneLogger`; left as it is."
    )
    assert {path: path.read_bytes() for path in before} == before

    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    assert main(["migrate", str(project)]) == 0
    assert asked == ["Write 2 files? [y/N] "]
    assert capsys.readouterr().out == f"{difference}2 files written.\n"
    assert source.stat().st_mode & 0o777 == 0o640
    assert (project / "a.py").read_bytes() == "# -*- coding: latin-1 -*-\r\nimport levin as L\r\nx = 'ä'\r\n".encode(
        "latin-1"
    )
    assert (project / "config.yaml").read_text() == "class_path: levin.callbacks.Timer\n"
    assert (project / ".venv" / "b.py").read_text() == "import lightning\n"
    assert main(["migrate", str(project / "a.py"), str(project / "notes.txt")]) == 0
    assert capsys.readouterr().out == "Nothing to change.\n"


def test_yes_writes_without_asking(project, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("asked"))
    before = sorted(path.name for path in project.iterdir())
    assert main(["migrate", "--yes", str(project / "config.yaml")]) == 0
    assert capsys.readouterr().out.endswith("\n1 file written.\n")
    assert main(["migrate", "--yes", str(project)]) == 0
    assert capsys.readouterr().out.endswith("\n1 file written.\n")
    assert sorted(path.name for path in project.iterdir()) == before


def test_a_path_that_is_not_there_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["migrate", "nowhere"])
    assert "PATH must exist, received 'nowhere'" in capsys.readouterr().err
