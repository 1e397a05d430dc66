"""One program with a command line, for either framework."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

SOURCE = '''
from typing import Any, Callable, Dict, List, Optional, Tuple, Union
import torch
{imports}


class Net(torch.nn.Module):
    def __init__(self, width: int = 3, activation: Callable = torch.relu):
        super().__init__()
        self.width, self.activation = width, activation


class Deep(Net):
    def __init__(self, depth: int = 2, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth


class Free(Net):
    def __init__(self, given: int = 1, **unknown):
        super().__init__()
        self.given, self.unknown = given, unknown


class Model(pl.LightningModule):
    """A model.

    Args:
        lr: The learning rate.
    """

    def __init__(self, lr: float = 0.1, net: Optional[Net] = None, sizes: Tuple[int, ...] = (1, 2),
                 optimizer: OptimizerCallable = torch.optim.SGD,
                 scheduler: Optional[LRSchedulerCallable] = None,
                 optimizer_init: Optional[dict] = None, scheduler_init: Optional[dict] = None, num_classes: int = 0):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.optimizer_init, self.scheduler_init, self.num_classes = optimizer_init, scheduler_init, num_classes
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch).pow(2).mean())

    def test_step(self, batch, batch_idx):
        self.log("test", self.layer(batch).pow(2).mean())

    def predict_step(self, batch, batch_idx):
        return self.layer(batch)


class OwnOptimizer(Model):
    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [] if self.scheduler is None else [self.scheduler(optimizer)]


class Wide(OwnOptimizer):
    def __init__(self, width: int = 7, names: List[str] = [], **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4, folder: str = "."):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.num_classes = batch_size, 11

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class OtherData(Data):
    def __init__(self, kind: str = "a", batch_size: int = 2):
        super().__init__(batch_size=batch_size)


def make_model(lr: float = 0.5) -> Model:
    return Model(lr=lr)


class Noted(pl.Callback):
    def __init__(self, note: str = "n", count: int = 1):
        self.note, self.count = note, count


class MyTrainer(pl.Trainer):
    def explore(self, model: pl.LightningModule, datamodule: Optional[pl.LightningDataModule] = None,
                depth: int = 1, name: Optional[str] = None) -> None:
        """Explore the model.

        Args:
            depth: How deep.
        """
        calls.append(("trainer.explore", type(model).__name__, type(datamodule).__name__, depth, name))


calls = []


class Fake(pl.Trainer):
    """Notes what it is told to do."""

    def fit(self, model, train_dataloaders=None, val_dataloaders=None, datamodule=None,
            ckpt_path: Optional[str] = None, weights_only: Optional[bool] = None):
        calls.append(("fit", type(model).__name__, type(datamodule).__name__, ckpt_path, weights_only))

    def predict(self, model=None, dataloaders=None, datamodule=None, return_predictions: Optional[bool] = None,
                ckpt_path: Optional[str] = None, weights_only: Optional[bool] = None):
        calls.append(("predict", type(model).__name__, type(datamodule).__name__, return_predictions, ckpt_path))


class Hooked(LightningCLI):
    def before_instantiate_classes(self):
        calls.append(("before_instantiate_classes", self.subcommand, hasattr(self, "model")))

    def after_instantiate_classes(self):
        calls.append(("after_instantiate_classes", hasattr(self, "model")))

    def before_fit(self):
        calls.append("before_fit")

    def after_fit(self):
        calls.append("after_fit")

    def before_predict(self):
        calls.append("before_predict")

    def predict(self, **kwargs):
        calls.append(("cli.predict", sorted(kwargs)))
'''

_PROGRAMS = {
    "lightning": "import lightning.pytorch as pl\nfrom lightning.pytorch.cli import *\nfrom lightning.pytorch.cli import "
    "LRSchedulerCallable, LightningCLI, OptimizerCallable, SaveConfigCallback",
    "levin": "import levin as pl\nfrom levin.cli import *",
}


def program(name: str) -> Any:
    """The module with the program's classes on one of the frameworks."""
    module = sys.modules.get(f"program_on_{name}")
    if module is None:
        module = types.ModuleType(f"program_on_{name}")
        sys.modules[module.__name__] = module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(SOURCE.replace("{imports}", _PROGRAMS[name]), module.__name__, "exec"), module.__dict__)
    module.calls.clear()
    return module


def same(text: str) -> str:
    """The text in words that are the same for both frameworks."""
    text = re.sub(r"program_on_(lightning|levin)", "program", text)
    text = re.sub(r"# (lightning.pytorch|levin)==.*", "# version", text)
    text = re.sub(r"lightning\.pytorch\.(cli|callbacks|loggers|profilers|strategies)\.", r"levin.\1.", text)
    return re.sub(r"\blightning\.(pytorch\.)?(Trainer|LightningModule|Callback)", r"levin.\2", text)


def plain(value: Any) -> Any:
    """What of an object is compared."""
    if isinstance(value, torch.optim.Optimizer):
        return [type(value).__name__, dict(value.defaults)]
    if isinstance(value, (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)):
        state = {k: v for k, v in value.state_dict().items() if isinstance(v, (int, float, str, list))}
        return [type(value).__name__, state, getattr(value, "monitor", None)]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, torch.nn.Module) or type(value).__module__.startswith("program_on"):
        kept = {
            k: plain(v) for k, v in vars(value).items() if isinstance(v, (int, str, float, dict, list)) and k[0] != "_"
        }
        return [type(value).__name__, kept if not hasattr(value, "training_step") else None]
    if isinstance(value, (int, float, str, type(None))):
        return same(value) if isinstance(value, str) else value
    return getattr(value, "__name__", type(value).__name__)


TRAINER = "max_epochs max_steps accumulate_grad_batches log_every_n_steps limit_train_batches gradient_clip_val".split()


def seen(cli: Any) -> dict[str, Any]:
    """What a user can see of the command line's objects."""
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    found = {
        "subcommand": cli.subcommand,
        "config": yaml.safe_load(same(cli.parser.dump(cli.config, skip_none=False) or "{}")),
        "model": [type(model).__name__, plain(dict(model.hparams)), plain(model.net), plain(getattr(model, "optimizer", None))],
        "links": [plain(model.optimizer_init), plain(model.scheduler_init), model.num_classes],
        "data": None if data is None else [type(data).__name__, plain(dict(data.hparams))],
        "trainer": {name: getattr(trainer, name) for name in TRAINER},
        "callbacks": sorted(type(callback).__name__ for callback in trainer.callbacks),
        "stop": [vars(c)["patience"] for c in trainer.callbacks if type(c).__name__ == "EarlyStopping"],
        "notes": [(c.note, c.count) for c in trainer.callbacks if type(c).__name__ == "Noted"],
        "loggers": [type(logger).__name__ for logger in trainer.loggers],
    }  # fmt: skip
    for key in ("_instantiator",):
        for hparams in (found["model"][1], (found["data"] or [0, {}])[1]):
            hparams.pop(key, None)
    return found


def optimizers(cli: Any) -> Any:
    try:
        return plain(cli.model.configure_optimizers())
    except Exception as error:
        return type(error).__name__


def run(name: str, folder: Path, build: Any, *, keep: bool = False) -> dict[str, Any]:
    """Run ``build(program)``, which makes a command line, and tell what came of it."""
    import os

    own = program(name)
    folder = Path(folder) / name
    folder.mkdir(exist_ok=True, parents=True)
    out, err = io.StringIO(), io.StringIO()
    result: dict[str, Any] = {}
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["program.py"]
    os.environ.pop("PL_GLOBAL_SEED", None)
    levels = {log: log.level for log in map(logging.getLogger, ("levin", "lightning.pytorch", "lightning.fabric"))}
    for log in levels:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            warnings.simplefilter("ignore")
            cli = build(own)
            result |= seen(cli) | {"optimizers": optimizers(cli)} if cli is not None else {}
            if keep:
                result["cli"] = cli
    except SystemExit as exit:
        result["exit"] = exit.code
        result["err"] = [line for line in same(err.getvalue()).splitlines() if line.startswith("error:")]
        result["out"] = same(out.getvalue()) if "--print_config" in sys.argv or exit.code == 0 else None
    except Exception as error:
        mro = [kind.__name__ for kind in type(error).__mro__]
        result["raised"] = mro[0] if not keep else error
    finally:
        os.chdir(before)
        sys.argv = argv
        for log, level in levels.items():
            log.setLevel(level)
    result["calls"] = list(own.calls)
    result["seed"] = os.environ.get("PL_GLOBAL_SEED")
    result["files"] = {
        str(path.relative_to(folder)): same(path.read_text()) for path in sorted(folder.rglob("*.yaml"))
        if "hparams" not in path.name
    }  # fmt: skip
    return result
