"""Programs run under the alias as they are: with and without Lightning installed, in one process and in several."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.compat.programs import MODULE, output, run, without_lightning


@pytest.fixture(params=["with Lightning", "without Lightning"])
def env(request, tmp_path):
    if request.param == "with Lightning":
        return {**os.environ, "OMP_NUM_THREADS": "1"}
    return without_lightning(tmp_path / "site")


def test_a_script_runs_as_it_is(env, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        MODULE
        + """
import sys
import levin

model = Model()
fitter = trainer(enable_checkpointing=False)
fitter.fit(model, loader())
assert type(fitter) is levin.Trainer and isinstance(model, levin.LightningModule)
print(sys.argv[1:], __name__, __file__ == sys.argv[0], fitter.global_step, sys.path[0] == sys.argv[0].rpartition("/")[0])
"""
    )
    assert output(["-m", "levin", str(script), "--lr", "1"], env).split() == ["['--lr',", "'1']", "__main__", "True", "4", "True"]  # fmt: skip


def test_the_blocker_hides_lightning(tmp_path):
    done = run(["-c", "import lightning"], without_lightning(tmp_path / "site"))
    assert done.returncode == 1 and "lightning is not installed here" in done.stderr


def test_a_module_runs_as_it_is(env, tmp_path):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import sys, pytorch_lightning as pl\nprint(pl.Trainer.__module__, sys.argv[1:])\n"
    )
    assert output(["-m", "levin", "-m", "mine", "-v"], env, cwd=tmp_path) == "levin.trainer ['-v']\n"


def test_options_of_python_and_the_exit_status_stay(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.flags.optimize, sys.flags.dev_mode)\nsys.exit(7)\n")
    done = run(["-O", "-X", "dev", "-m", "levin", str(script)])
    assert (done.returncode, done.stdout) == (7, "1 True\n")


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing.py"], "neither a command nor a script that exists. See"),
        (["lauch", "train.py"], "that exists. Did you mean launch? See"),
        (["-m"], "followed by a module"),
    ],
)
def test_what_cannot_be_run_says_why(words, message):
    done = run(["-m", "levin", *words])
    assert done.returncode == 1 and message in done.stderr


def test_an_option_that_switches_the_environment_off_is_an_error(tmp_path):
    (tmp_path / "script.py").write_text("")
    done = run(
        ["-I", "-c", f"import sys; sys.path[:0] = {sys.path!r}; from levin.__main__ import main; main(['script.py'])"],
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "-E, -I and -S" in done.stderr


CHILDREN = """
import multiprocessing, subprocess, sys
import torch
from torch.utils.data import DataLoader


def who(_=None):
    import lightning.pytorch as pl
    return pl.Trainer.__module__


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return who()


if __name__ == "__main__":
    print(subprocess.run([sys.executable, "-c", "import lightning; print(lightning.Trainer.__module__)"], capture_output=True, text=True).stdout.strip())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(who, [0])[0])
    for context in ("fork", "spawn"):
        (batch,) = DataLoader(Data(), num_workers=1, multiprocessing_context=context)
        print(batch[0])
"""


def test_children_inherit_the_alias(tmp_path):
    script = tmp_path / "children.py"
    script.write_text(CHILDREN)
    assert output(["-m", "levin", str(script)], without_lightning(tmp_path / "site")).split() == ["levin.trainer"] * 4


def test_children_of_a_program_that_calls_install_inherit_it(tmp_path):
    script = tmp_path / "children.py"
    script.write_text("from levin.compat import install\ninstall()\n" + CHILDREN)
    assert output([str(script)]).split() == ["levin.trainer"] * 4


def test_install_can_stay_in_one_process(tmp_path):
    code = "import os; from levin.compat import install; before = dict(os.environ); install(inherit=False); import lightning; print(dict(os.environ) == before)"
    assert output(["-c", code]) == "True\n"


DEMOS = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.demos import LightningLSTM, LightningTransformer, SequenceSampler, SimpleLSTM, Transformer, WikiText2
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule, BoringDataModuleNoLen, BoringModel, DemoModel, IterableBoringDataModule, ManualOptimBoringModel, Net,
    RandomDataset, RandomDictDataset, RandomIterableDataset, RandomIterableDatasetWithLen,
)
from lightning.pytorch.demos.lstm import LightningLSTM as SameLSTM
from lightning.pytorch.demos.mnist_datamodule import MNIST, MNISTDataModule
from lightning.pytorch.demos.transformer import Dictionary, PositionalEncoding, tokenize


def test_models_train(tmp_path):
    for model in (BoringModel(), ManualOptimBoringModel(), DemoModel()):
        assert isinstance(model, LightningModule)
    trainer = Trainer(default_root_dir=tmp_path, fast_dev_run=True, accelerator="cpu")
    trainer.fit(BoringModel(), datamodule=BoringDataModule())
    trainer.fit(ManualOptimBoringModel(), RandomIterableDatasetWithLen(32, 4))


def test_language_models():
    tokens = torch.zeros(2, 5, dtype=torch.long)
    assert LightningTransformer(vocab_size=100)(tokens, tokens).shape[-1] == 100
    assert SameLSTM is LightningLSTM and isinstance(LightningLSTM(vocab_size=50).model, SimpleLSTM)


def test_images_are_there_without_a_network(tmp_path):
    data = MNISTDataModule(str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    assert isinstance(data, LightningDataModule) and data.train_dataloader().dataset[0][0].shape == (1, 28, 28)
"""


def test_a_test_file_finds_all_that_the_demos_have(tmp_path):
    (tmp_path / "test_demos.py").write_text(DEMOS)
    env = {**without_lightning(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    text = output(["-m", "levin", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_demos.py"], env, cwd=tmp_path)
    assert "3 passed" in text


def test_workers_of_xdist_inherit_the_alias(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os\nimport lightning.pytorch as pl\n\n\ndef test_levin():\n"
        "    assert pl.Trainer.__module__ == 'levin.trainer' and os.environ['PYTEST_XDIST_WORKER']\n"
    )
    env = without_lightning(tmp_path / "site")
    text = output(
        ["-m", "levin", "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "test_it.py"], env, cwd=tmp_path
    )
    assert "1 passed" in text


def test_the_users_own_sitecustomize_runs_too(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import builtins\nbuiltins.mine = 3\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sitecustomize, lightning\nprint(mine, sitecustomize.__file__, lightning.Trainer.__module__)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    assert output(["-m", "levin", str(script)], env) == f"3 {folder}/sitecustomize.py levin.trainer\n"


def test_a_python_without_levin_starts_as_ever(tmp_path):
    from levin.compat import _SITE

    code = "import sys\nprint('ok', any('levin' in name for name in sys.modules))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The base interpreter of this environment has no levin.
    python = os.path.realpath(sys.executable)
    import subprocess

    done = subprocess.run(
        [python, "-c", code], env={**env, "PYTHONPATH": _SITE}, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("ok False\n", "")


def test_two_processes_by_the_script_launcher(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        MODULE
        + """
import os

class Tell(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        path = os.path.join(os.path.dirname(__file__), f"rank-{trainer.global_rank}")
        with open(path, "w") as file:
            file.write(f"{trainer.world_size} {type(trainer).__module__} {pl_module.layer.weight.sum().item()}")

pl.seed_everything(1)
trainer(devices=2, strategy="ddp", enable_checkpointing=False, callbacks=[Tell()]).fit(Model(), loader())
"""
    )
    output(["-m", "levin", str(script)], without_lightning(tmp_path / "site"))
    first, second = (Path(tmp_path, f"rank-{rank}").read_text() for rank in range(2))
    assert first == second and first.startswith("2 levin.trainer ")


def test_the_alias_imports_no_more_than_levin(tmp_path):
    code = (
        "import torch, sys\nbefore = set(sys.modules)\nimport {module}\n{module}.Trainer\n"
        "print(*sorted(set(sys.modules) - before - set({module!r}.split()), key=str))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code.format(module="pytorch_lightning"))
    assert set(output(["-m", "levin", str(script)]).split()) <= set(output(["-c", code.format(module="levin")]).split())


def test_the_start_of_a_process_loads_no_torch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nprint(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', 'email', 'inspect'}))\n"
    )
    assert output(["-m", "levin", str(script)]) == "[]\n"


def test_the_logger_of_lightning_stands_above_that_of_levin(tmp_path):
    script = tmp_path / "log.py"
    script.write_text(
        """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
rank_zero_info("heard")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
rank_zero_info("silenced")
logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
logging.getLogger("lightning.pytorch").addHandler(logging.StreamHandler(sys.stdout))
rank_zero_info("heard twice")
"""
    )
    assert output(["-m", "levin", str(script)]).splitlines() == ["heard", "heard twice", "heard twice"]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lines_are_silenced_and_filtered_by_the_logger_that_they_come_from_in_lightning(tmp_path, package):
    script = tmp_path / "log.py"
    script.write_text(
        f"""
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
from {package}.utilities import rank_zero_info
speaker = logging.getLogger("{package}.utilities.rank_zero")
speaker.addFilter(lambda record: "GPU" not in record.getMessage())
rank_zero_info("GPU available")
rank_zero_info("heard")
for logger in (speaker, logging.getLogger("{package}")):
    before = logger.level
    logger.setLevel(logging.WARNING)
    rank_zero_info("silenced")
    logger.setLevel(before)
rank_zero_info("heard again")
"""
    )
    assert output(["-m", "levin", str(script)]).splitlines() == ["heard", "heard again"]


@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
def test_the_line_of_the_seed_is_silenced_by_the_loggers_of_the_other_half(tmp_path, package):
    script = tmp_path / "log.py"
    script.write_text(
        f"""
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
from {package} import seed_everything
from lightning.pytorch.utilities import rank_zero_info
seed_everything(1)
for name in ("{package}", "{package}.utilities.seed"):
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    seed_everything(2)
    rank_zero_info("heard")
    logger.setLevel(before)
logger.addFilter(lambda record: "3" not in record.getMessage())
seed_everything(3)
seed_everything(4)
"""
    )
    lines = output(["-m", "levin", str(script)]).splitlines()
    assert lines == ["Seed set to 1", "heard", "heard", "Seed set to 4"]
