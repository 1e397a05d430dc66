"""The same program with a command line on Lightning and on levin: same arguments in, same objects and files out."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.parity.cli_program import run

QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.enable_checkpointing=false"]  # fmt: skip


def both(folder: Any, build: Any) -> Any:
    theirs, ours = run("lightning", folder, build), run("levin", folder, build)
    assert ours == theirs
    return ours


def objects(
    args: list[str],
    cls: str = "LightningCLI",
    model: str | None = "OwnOptimizer",
    data: str | None = "Data",
    **kwargs: Any,
) -> Any:
    def build(own: Any) -> Any:
        args_ = [arg.replace("PROGRAM", own.__name__) for arg in args]
        return getattr(own, cls)(
            None if model is None else getattr(own, model),
            None if data is None else getattr(own, data),
            args=[*QUIET, *args_], run=False, **kwargs,
        )  # fmt: skip

    return build


NET = ["--model.net=Net", "--model.net=PROGRAM.Deep", "--model.net=Deep --model.net.depth=5", "--model.net=Free --model.net.dict_kwargs.x=3",
       '--model.net={"class_path":"PROGRAM.Deep","init_args":{"depth":4,"width":9}}', "--model.net=null"]  # fmt: skip
POOL = [
    ["--model.lr=0.25"], ["--model.lr=1e-3"], ["--model.sizes=[3,4,5]"], *([net.split()] for net in []),
    ["--data.batch_size=2"], ["--data.folder=x"],
    ["--trainer.max_epochs=3"], ["--trainer.max_steps=7"], ["--trainer.accumulate_grad_batches=2"],
    ["--trainer.limit_train_batches=0.5"], ["--trainer.limit_train_batches=3"], ["--trainer.gradient_clip_val=0.5"],
    ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val", "--trainer.callbacks.patience=5"],
    ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val"],
    ["--trainer.callbacks+=PROGRAM.Noted", "--trainer.callbacks.note=z"],
    ['--trainer.callbacks=[{"class_path":"Noted","init_args":{"count":4}}]'],
    ["--optimizer=Adam"], ["--optimizer=SGD", "--optimizer.lr=0.3", "--optimizer.momentum=0.1"],
    ["--optimizer=torch.optim.AdamW", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=2"],
    ["--optimizer=SGD", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val"],
    ["--model.optimizer=Adam", "--model.optimizer.lr=0.7"],
    ["--model.scheduler=ExponentialLR", "--model.scheduler.gamma=0.5"],
    ["--seed_everything=5"], ["--seed_everything=false"],
]  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_random_arguments_make_the_same_objects(tmp_path, seed):
    drawn = random.Random(seed)
    args = [word for words in drawn.sample(POOL, drawn.randint(1, 5)) for word in words]
    if drawn.random() < 0.6:
        args += drawn.choice(NET).split()
    both(tmp_path, objects(args))


@pytest.mark.parametrize("seed", range(8))
def test_random_arguments_of_chosen_subclasses_make_the_same_objects(tmp_path, seed):
    drawn = random.Random(100 + seed)
    args = [drawn.choice(["--model=Wide", "--model=PROGRAM.Wide", "--model=OwnOptimizer"])]
    args += drawn.choice([[], ["--data=OtherData", "--data.kind=b"], ["--data=PROGRAM.Data", "--data.batch_size=1"]])
    args += [word for words in drawn.sample(POOL, 3) for word in words if not word.startswith("--data")]
    mode = drawn.choice([dict(model=None, data=None), dict(model="Model", data=None, subclass_mode_model=True)])
    both(tmp_path, objects(args, **mode))
