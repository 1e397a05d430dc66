"""Lines as text: a loop that reads like a bare one, with file and line of whatever is called."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from levin.datamodule import LightningDataModule
from levin.explain.evaluation_plan import EvaluationPlan
from levin.explain.fit_plan import FitPlan
from levin.explain.node import Node, code_of
from levin.hooks import Callback
from levin.log_store import DEFAULTS
from levin.loops.run import Run
from levin.module import LightningModule
from levin.utilities.overrides import has_own
from levin.utilities.types import Function

_HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

WIDTH = 72
"""Column at which the place of a function stands."""


class Explanation(str):
    """The loop of a run as text; a string that shows itself as it reads."""

    def __repr__(self) -> str:
        return str(self)


def plan_of(run: Run) -> FitPlan | EvaluationPlan:
    """Return the lines of a composed run, whichever method of the Trainer it is of."""
    return FitPlan(run) if run.fn == "fit" else EvaluationPlan(run)


def explain(run: Run) -> Explanation:
    """Return the loop of a composed run as text."""
    plan = plan_of(run)
    blocks = ["\n".join(_head(run)), "\n".join(line for node in plan.lines() for line in _lines(node, 0))]
    if run.fn == "fit":
        blocks.append("\n".join(["a checkpoint holds:", *(f"    {line}" for line in _checkpoint(run))]))
    blocks.append(_wrapped("not called, since nobody overrides them", plan.left_out()))
    return Explanation("\n\n".join(blocks) + "\n")


def _head(run: Run) -> Iterator[str]:
    strategy, settings = run.strategy, run.settings
    yield f"{run.fn} of {type(run.module).__name__}  {_place(type(run.module))}"
    yield (
        f"on {strategy.world_size} process{'es' if strategy.world_size > 1 else ''}, {strategy.root_device}, "
        f"{type(strategy).__name__}, precision {strategy.precision.precision}"
    )
    if run.callbacks:
        yield f"callbacks: {_names(run.callbacks)}"
    if run.loggers:
        every = f", every {settings.log_every_n_steps} steps" if run.fn == "fit" else ""
        yield f"loggers: {_names(run.loggers)}{every}"
    if run.ckpt_path is not None:
        yield f"it begins with the checkpoint {str(run.ckpt_path)!r}, which is not read here"


def _lines(node: Node, depth: int) -> Iterator[str]:
    text = f"{'    ' * depth}{node.text}"
    if node.when:
        text += f"{'  #' if '#' not in node.text else ';'} {node.when}"
    where = "" if node.function is None else _place(node.function)
    yield f"{text:<{WIDTH}}  {where}".rstrip() if where else text
    if node.function is not None:
        for note in _logged(node.function):
            yield f"{'    ' * (depth + 1)}# {note}"
    for child in node.body:
        yield from _lines(child, depth + 1)


def _place(thing: Any) -> str:
    """Return ``file:line`` of a function or class, seen from the working directory where it lies below that."""
    if isinstance(thing, type):
        try:
            name, line = inspect.getsourcefile(thing), inspect.getsourcelines(thing)[1]
        except (OSError, TypeError):
            return ""
    else:
        code = code_of(thing)
        if code is None:
            return ""
        name, line = code.co_filename, code.co_firstlineno
    if name is None:
        return ""
    if name.startswith(_HOUSE):
        name = os.path.join("levin", name.removeprefix(_HOUSE))
    elif os.path.isabs(name) and not os.path.relpath(name).startswith(".."):
        name = os.path.relpath(name)
    return f"{name}:{line}"


def _logged(function: Function) -> Iterator[str]:
    """Say what the source of a user's function logs: the calls of ``self.log`` with a literal name in it."""
    code = code_of(function)
    if code is None or code.co_filename.startswith(_HOUSE):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, TypeError):
        return
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.func.attr != "log":
            continue
        if call.args and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str):
            yield f"logs {call.args[0].value!r}{_moments(code.co_name, call)}"


def _moments(hook: str, call: ast.Call) -> str:
    """Say when a logged value goes out, where that can be read from the call."""
    given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
    defaults = DEFAULTS.get(hook)
    if defaults is None:
        return ""
    on_step, on_epoch = (
        default if given.get(name) is None else bool(given[name])
        for name, default in zip(("on_step", "on_epoch"), defaults)
    )
    moments = [word for word, is_so in (("of the step", on_step), ("over the epoch", on_epoch)) if is_so]
    places = ", on the progress bar" if given.get("prog_bar") else ""
    return f" {' and '.join(moments)}{places}"


def _checkpoint(run: Run) -> Iterator[str]:
    module, datamodule = run.module, run.datamodule
    tensors = list(module.state_dict().values())
    size = sum(t.numel() * t.element_size() for t in tensors if hasattr(t, "numel")) / 1e6
    yield f"state_dict: {len(tensors)} tensors, {size:,.2f} MB"
    yield f"optimizer_states: {_names(run.optimizers)}"
    yield f"lr_schedulers: {_names([config.scheduler for config in run.schedulers])}"
    yield f"callbacks: {', '.join(each.state_key for each in run.callbacks if each.state_dict()) or 'none has a state'}"
    precision = run.strategy.precision
    if precision.state_dict():
        yield f"{type(precision).__qualname__}: the scale of the loss"
    for prefix, owner in (("", module), ("datamodule_", datamodule)):
        if owner is not None and owner.hparams:
            yield f"{prefix}hyper_parameters: {', '.join(map(str, owner.hparams))}"
    yield "loops, epoch, global_step: the counters"
    yield "levin: random states of every rank, the place in the data, sums of self.log, an open accumulation window"
    if datamodule is not None and has_own("state_dict", datamodule, LightningDataModule):
        yield f"{type(datamodule).__qualname__}: its state_dict  {_place(datamodule.state_dict)}"
    adding: list[Any] = [each for each in run.callbacks if has_own("on_save_checkpoint", each, Callback)]
    if has_own("on_save_checkpoint", module, LightningModule):
        adding.append(module)
    for each in adding:
        yield f"what {type(each).__name__}.on_save_checkpoint adds  {_place(each.on_save_checkpoint)}"
    saving = [callback.state_key for callback in run.checkpoint_callbacks]
    yield f"written by {', '.join(saving)}" if saving else "written by nobody: no callback saves checkpoints"


def _names(things: Sequence[object]) -> str:
    return ", ".join(type(thing).__name__ for thing in things) or "none"


def _wrapped(title: str, words: Sequence[str]) -> str:
    return f"{title}:\n" + textwrap.fill(", ".join(words), 100, initial_indent="    ", subsequent_indent="    ")
