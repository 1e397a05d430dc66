"""The argument parser: jsonargparse's, with groups for classes of levin's, optimizers and schedulers."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Optional, Union

import torch
from torch.optim import Optimizer

from levin.accelerators import Accelerator
from levin.cli.callables import LRSchedulerType, LRSchedulerTypeTuple
from levin.cli.class_paths import is_alias_installed, to_levin, to_lightning
from levin.datamodule import LightningDataModule
from levin.hooks import Callback
from levin.loggers import Logger
from levin.module import LightningModule
from levin.profilers import Profiler
from levin.strategies import Strategy
from levin.trainer import Trainer
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Function

try:
    import jsonargparse
    from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, class_from_function  # type: ignore[attr-defined]  # not in its __all__
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "LightningCLI needs jsonargparse, which is not installed. Run `pip install 'levin[cli]'`."
    ) from error

jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=True)
# So that functions such as torch.relu can be written into a configuration.
jsonargparse.register_unresolvable_import_paths(torch)

__all__ = ["ActionConfigFile", "LightningArgumentParser", "class_from_function", "nearest"]

AnyClass = Union[type, Function]
# Key of a group of arguments -> (class or classes of optimizers or schedulers, key that it is linked to).
Configured = dict[str, tuple[Any, str]]
# Of the Trainer: what Lightning's lacks. They are in a configuration only where somebody gave them, so that it reads it.
OWN_ARGUMENTS = ("compile",)
# The same of classes that a configuration chooses, by the names that they share with Lightning's.
OWN_ARGUMENTS_OF: dict[str, tuple[str, ...]] = {
    "DeviceStatsMonitor": ("filter_keys",),
    "LearningRateMonitor": ("log_key_prefix",),
    "ModelCheckpoint": ("async_save",),
    "ThroughputMonitor": ("count_flops", "prog_bar"),
    "Strategy": ("precision",),
    "ParallelStrategy": ("step_timeout", "uneven"),
    "FSDPStrategy": ("ignored_states",),
    "ModelParallelStrategy": (
        "activation_checkpointing", "context_parallel_size", "copies", "num_microbatches", "pipeline_parallel_size",
        "pipeline_schedule", "pipeline_split", "plan",
    ),
}  # fmt: skip


class LightningArgumentParser(ArgumentParser):
    """A parser of command lines, configuration files and environment variables for :class:`LightningCLI`.

    Args:
        args: As for ``jsonargparse.ArgumentParser``.
        description: What ``--help`` says first.
        env_prefix: First part of the names of environment variables.
        default_env: Whether environment variables count.
        kwargs: As for ``jsonargparse.ArgumentParser``.

    Example:
        >>> parser = LightningArgumentParser()
        >>> parser.add_optimizer_args(torch.optim.SGD)
        >>> parser.parse_args(["--optimizer.lr=0.5"]).optimizer.lr
        0.5
    """

    def __init__(
        self,
        *args: Any,
        description: str = "Lightning Trainer command line tool",
        env_prefix: str = "PL",
        default_env: bool = False,
        **kwargs: Any,
    ) -> None:
        import_choices()
        kwargs.setdefault("allow_abbrev", True)
        super().__init__(*args, description=description, env_prefix=env_prefix, default_env=default_env, **kwargs)
        self.callback_keys: list[str] = []
        self._optimizers: Configured = {}
        self._lr_schedulers: Configured = {}

    def add_lightning_class_args(
        self, lightning_class: AnyClass, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        """Add the arguments of a Trainer, module, data module or callback.

        A callback that is added so is always part of the Trainer.

        Args:
            lightning_class: The class, or a function that returns an object of it.
            nested_key: Name of the group: ``"model"`` makes ``--model.width``.
            subclass_mode: Whether the user chooses among the subclasses.
            required: Whether one must be chosen then.

        Returns:
            Keys of the arguments.

        Raises:
            MisconfigurationException: Another kind of class.
        """
        if callable(lightning_class) and not inspect.isclass(lightning_class):
            lightning_class = class_from_function(lightning_class)
        bases = (Trainer, LightningModule, LightningDataModule, Callback)
        if not (inspect.isclass(lightning_class) and issubclass(lightning_class, bases)):
            raise MisconfigurationException(
                "lightning_class must be a subclass of Trainer, LightningModule, LightningDataModule or Callback, "
                f"received {lightning_class!r}. For other classes there is add_class_arguments."
            )
        if issubclass(lightning_class, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            keys = self.add_subclass_arguments(lightning_class, nested_key, fail_untyped=False, required=required)
            return list(keys or ())
        is_trainer = issubclass(lightning_class, Trainer)
        added: list[str] = self.add_class_arguments(
            lightning_class,
            nested_key,
            fail_untyped=False,
            instantiate=not is_trainer,  # the Trainer comes last, and gets callbacks from elsewhere
            sub_configs=True,
            skip={"suggest_integrations"} if is_trainer else None,
        )
        own = {f"{nested_key}.{name}" for name in OWN_ARGUMENTS if is_trainer}
        self.set_defaults(dict.fromkeys(own.intersection(added), argparse.SUPPRESS))
        return added

    def add_optimizer_args(
        self,
        optimizer_class: Union[type[Optimizer], tuple[type[Optimizer], ...]] = (Optimizer,),
        nested_key: str = "optimizer",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Add the arguments of an optimizer.

        Args:
            optimizer_class: The class, or a tuple of those to choose from, subclasses included.
            nested_key: Name of the group.
            link_to: Key of the argument that receives class path and arguments, such as ``"model.optimizer_init"``;
                by default levin configures the module with it.
        """
        self._add_configured(optimizer_class, Optimizer, nested_key, "params")
        self._optimizers[nested_key] = (optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: Union[LRSchedulerType, tuple[LRSchedulerType, ...]] = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Add the arguments of a learning rate scheduler. Arguments as in :meth:`add_optimizer_args`."""
        self._add_configured(lr_scheduler_class, LRSchedulerTypeTuple, nested_key, "optimizer")
        self._lr_schedulers[nested_key] = (lr_scheduler_class, link_to)

    def _add_configured(self, kinds: Any, bases: Any, nested_key: str, first: str) -> None:
        choices: tuple[Any, ...] = kinds if isinstance(kinds, tuple) else (kinds,)
        for kind in choices:
            if not (inspect.isclass(kind) and issubclass(kind, bases)):
                raise MisconfigurationException(f"--{nested_key} must be of {bases}, received {kind!r}.")
        if isinstance(kinds, tuple):
            self.add_subclass_arguments(
                kinds, nested_key, instantiate=False, fail_untyped=False, skip={first}, required=False
            )
        else:
            self.add_class_arguments(
                kinds, nested_key, instantiate=False, fail_untyped=False, skip={first}, sub_configs=True
            )

    # ------------------------------------------------------------------ class paths of Lightning's

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse a command line, ``sys.argv`` by default; class paths of Lightning's are levin's."""
        words = sys.argv[1:] if args is None else args
        return super().parse_args(to_levin(list(words)), *rest, **kwargs)

    def _check_value_key(self, action: Any, value: object, *args: Any, **kwargs: Any) -> Any:
        # All values of files, environment variables and objects come this way.
        return super()._check_value_key(action, to_levin(value), *args, **kwargs)

    def dump(self, cfg: Any, *args: object, **kwargs: object) -> str:
        """Return the configuration as text; a program for Lightning gets one that Lightning reads."""
        if not is_alias_installed():
            return str(super().dump(cfg, *args, **kwargs))
        return to_lightning(super().dump(_without_own(cfg), *args, **kwargs))

    # ------------------------------------------------------------------ errors

    def error(self, message: str, ex: Optional[Exception] = None) -> NoReturn:
        """End the program, or raise; what was mistyped is answered with the nearest that there is."""
        hint = "" if "Did you mean" in message else nearest(message, list(_keys(self)), class_names())
        super().error(f"{message}\n{hint}" if hint else message, ex)


def _without_own(value: Any) -> Any:
    """Return a configuration without what levin's classes take beyond Lightning's, where that is as it is by default."""
    if isinstance(value, list):
        return [_without_own(item) for item in value]
    if not isinstance(value, Namespace):
        return value
    kept = Namespace(**{key: _without_own(item) for key, item in vars(value).items()})
    given = kept.get("init_args")
    if isinstance(given, Namespace):
        for name, default in _own_defaults(kept["class_path"]):
            if given.get(name, default) == default:
                given.pop(name, None)
    return kept


def _own_defaults(class_path: str) -> Iterator[tuple[str, object]]:
    """Yield the names and defaults of the arguments that a class, or a base of it, takes beyond Lightning's."""
    module, _, name = class_path.rpartition(".")
    for kind in getattr(importlib.import_module(module), name).__mro__:
        for argument in OWN_ARGUMENTS_OF.get(kind.__name__, ()) if kind.__module__.startswith("levin.") else ():
            yield argument, inspect.signature(kind).parameters[argument].default


def nearest(message: str, keys: Sequence[str], names: Sequence[str] = ()) -> str:
    """Return what that which ``message`` calls unknown may have been meant to be; empty where nothing is near.

    Args:
        message: What the parser says.
        keys: All keys of arguments.
        names: All names of classes.

    Example:
        >>> nearest("unrecognized arguments: --trainer.max_epoch_=3", ["trainer.max_epochs", "trainer.max_steps"])
        'Did you mean trainer.max_epochs?'
    """
    unknown = re.findall(r"--([\w.]+)", message) if message.startswith("unrecognized arguments") else []
    unknown += [".".join(pair) for pair in re.findall(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)]
    unknown += re.findall(r"Option '([\w.]+)' is not accepted", message)
    unknown += re.findall(r'No action for key "([\w.]+)"', message)
    found = [_near(key, keys) for key in unknown]
    found += [_near(name, names) for name in re.findall(r"Expected a dot import path string: (\w+)", message)]
    meant = dict.fromkeys(match for match in found if match)
    return f"Did you mean {', '.join(meant)}?" if meant else ""


def _near(word: str, choices: Sequence[str]) -> Optional[str]:
    # First among those of the same group, where a short name is not drowned by a long prefix.
    group, _, last = word.rpartition(".")
    siblings = {choice.rpartition(".")[2]: choice for choice in choices if choice.rpartition(".")[0] == group}
    for match in difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return siblings[match]
    return next(iter(difflib.get_close_matches(word, choices, n=1, cutoff=0.75)), None)


def _keys(parser: ArgumentParser, prefix: str = "") -> Iterator[str]:
    for action in parser._actions:
        if parser._subcommands_action is action:
            for name, subparser in action.choices.items():
                yield from _keys(subparser, f"{prefix}{name}.")
        elif action.dest != "help" and not action.dest.endswith(".help"):
            yield prefix + action.dest


_BASES = (LightningModule, LightningDataModule, Callback, Logger, Profiler, Strategy, Accelerator, Optimizer)


def class_names() -> list[str]:
    """Return the names of all classes that a configuration may choose by their name alone."""
    classes: set[type] = set()
    added: set[type] = {*_BASES, *LRSchedulerTypeTuple}
    while added:
        classes |= added
        added = set[type]().union(*(type.__subclasses__(base) for base in added)) - classes
    return sorted({kind.__name__ for kind in classes})


def import_choices() -> None:
    """Import what levin offers to plug in, because classes are chosen by name among those that are imported."""
    for room in (
        "accelerators",
        "callbacks",
        "checkpoint",
        "environments",
        "loggers",
        "precision",
        "profilers",
        "strategies",
    ):
        module = importlib.import_module(f"levin.{room}")
        for name in module.__all__:
            getattr(module, name)
