"""LightningCLI: from a command line to a run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from jsonargparse import Namespace
from torch.optim import Optimizer

from levin import __version__
from levin.checkpoint.reading import load
from levin.cli.callables import ArgsType, LRSchedulerTypeUnion, ReduceLROnPlateau
from levin.cli.instantiate import class_config, instantiate_class, saving_instantiator
from levin.cli.links import add_links_argument, link_as_configured
from levin.cli.parser import ActionConfigFile, Configured, LightningArgumentParser, class_from_function
from levin.cli.save_config import SaveConfigCallback
from levin.datamodule import LightningDataModule
from levin.hooks import Callback
from levin.module import LightningModule
from levin.trainer import Trainer
from levin.utilities.collections import as_list
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.overrides import is_overridden
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.seed import seed_everything
from levin.utilities.types import Kwargs

ModuleClass = Union[type[LightningModule], Callable[..., LightningModule]]
DataModuleClass = Union[type[LightningDataModule], Callable[..., LightningDataModule]]


class LightningCLI:
    """A command line for a module and a data module: every argument of theirs and of the Trainer, files included.

    Args:
        model_class: Class of the module, or a function that returns one; None to choose it by ``--model``.
        datamodule_class: Class of the data module, or a function; None to choose it by ``--data``, or to have none.
        save_config_callback: Callback that writes the configuration beside the logs; None for none.
        save_config_kwargs: Arguments of that callback.
        trainer_class: Class of the Trainer, or a function that returns one.
        trainer_defaults: Defaults of the Trainer's arguments. ``callbacks`` are added to those that are configured.
        seed_everything_default: Seed: an int, True for one of the environment (or 0), False for none.
        parser_kwargs: Arguments of the parser, or of the parser of each subcommand by its name.
        parser_class: Class of the parser.
        subclass_mode_model: Whether ``--model`` chooses a subclass of ``model_class``.
        subclass_mode_data: Whether ``--data`` chooses a subclass of ``datamodule_class``.
        args: Command line: words, or a configuration as a dict or Namespace; by default that of the process.
        run: Whether to have subcommands and to run the chosen one; otherwise only the objects are made.
        auto_configure_optimizers: Whether ``--optimizer`` and ``--lr_scheduler`` are there without being added.
        load_from_checkpoint_support: Whether hyper-parameters are saved so that ``load_from_checkpoint`` builds nested
            objects.

    Raises:
        MisconfigurationException: A class of the wrong kind, or several optimizers that configure the module.
        SystemExit: The command line is wrong, or asks for help.

    Example::

        if __name__ == "__main__":
            LightningCLI(Model, Data)   # python train.py fit --trainer.max_epochs=3 --model.lr=0.1
    """

    def __init__(
        self,
        model_class: Optional[ModuleClass] = None,
        datamodule_class: Optional[DataModuleClass] = None,
        save_config_callback: Optional[type[SaveConfigCallback]] = SaveConfigCallback,
        save_config_kwargs: Optional[Kwargs] = None,
        trainer_class: Union[type[Trainer], Callable[..., Trainer]] = Trainer,
        trainer_defaults: Optional[Kwargs] = None,
        seed_everything_default: Union[bool, int] = True,
        parser_kwargs: Optional[Kwargs] = None,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: ArgsType = None,
        run: bool = True,
        auto_configure_optimizers: bool = True,
        load_from_checkpoint_support: bool = True,
    ) -> None:
        self.save_config_callback = save_config_callback
        self.save_config_kwargs: Kwargs = save_config_kwargs or {}
        self.trainer_class = trainer_class
        self.trainer_defaults: Kwargs = trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs: Kwargs = parser_kwargs or {}
        self.parser_class = parser_class
        self.auto_configure_optimizers: bool = auto_configure_optimizers
        self.load_from_checkpoint_support: bool = load_from_checkpoint_support

        self.model_class = model_class
        self._model_class: type = _as_class(model_class or LightningModule)
        self.subclass_mode_model: bool = model_class is None or subclass_mode_model
        self.datamodule_class = datamodule_class
        self._datamodule_class: type = _as_class(datamodule_class or LightningDataModule)
        self.subclass_mode_data: bool = datamodule_class is None or subclass_mode_data

        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        self._subcommand_arguments: dict[str, list[str]] = {}
        of_subcommands = {name: value for name, value in self.parser_kwargs.items() if name in self.subcommands()}
        of_main = {name: value for name, value in self.parser_kwargs.items() if name not in of_subcommands}
        self.setup_parser(run, of_main, of_subcommands)
        link_as_configured(self.parser, self._subcommand_parsers, args)
        self.parse_arguments(self.parser, args)
        self.subcommand: Optional[str] = self.config["subcommand"] if run else None
        self._parse_ckpt_path()
        self._set_seed()
        self.config_dump: Kwargs = self._dump_config()

        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand is not None:
            self._run_subcommand(self.subcommand)

    # ------------------------------------------------------------------ the parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, object], subparser_kwargs: dict[str, object]
    ) -> None:
        """Make the parser, with subcommands or flat."""
        self.parser: LightningArgumentParser = self.init_parser(**main_kwargs)
        if add_subcommands:
            self._add_subcommands(self.parser, **subparser_kwargs)
        else:
            self._add_arguments(self.parser)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser with ``--config``."""
        kwargs.setdefault("dump_header", [f"levin=={__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
        )
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--seed_everything`` and ``--links``."""
        parser.add_argument(
            "--seed_everything",
            type=Union[bool, int],
            default=self.seed_everything_default,
            help="Seed of all random numbers: an int, true for that of PL_GLOBAL_SEED or else 0, false for none.",
        )
        add_links_argument(parser)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of Trainer, module and data module."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {f"trainer.{name}": value for name, value in self.trainer_defaults.items() if name != "callbacks"}
        parser.set_defaults(defaults)
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(
            self._datamodule_class,
            "data",
            subclass_mode=self.subclass_mode_data,
            required=self.datamodule_class is not None,
        )

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser._optimizers:
                parser.add_optimizer_args()
            if not parser._lr_schedulers:
                parser.add_lr_scheduler_args()
        self.link_optimizers_and_lr_schedulers(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Override to add arguments, links and defaults. Does nothing by default."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands: methods of the Trainer, and the arguments that are not for the command line."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "predict": {"model", "dataloaders", "datamodule"},
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        actions = parser.add_subcommands()
        trainer_class = _as_class(self.trainer_class)
        for subcommand in self.subcommands():
            subparser = self._prepare_subcommand_parser(trainer_class, subcommand, **kwargs.get(subcommand, {}))
            summary = (inspect.getdoc(getattr(trainer_class, subcommand)) or "").split("\n\n")[0]
            subparser.description = summary
            actions.add_subcommand(subcommand, subparser, help=summary)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: object) -> LightningArgumentParser:
        parser = self.init_parser(**kwargs)
        self._add_arguments(parser)
        skip: set[Union[str, int]] = {*self.subcommands()[subcommand], "self"}
        self._subcommand_arguments[subcommand] = parser.add_method_arguments(klass, subcommand, skip=skip)
        self._subcommand_parsers[subcommand] = parser
        return parser

    @staticmethod
    def link_optimizers_and_lr_schedulers(parser: LightningArgumentParser) -> None:
        """Give optimizers and schedulers to the arguments that they were added for."""
        for key, (kinds, link_to) in (parser._optimizers | parser._lr_schedulers).items():
            if link_to == "AUTOMATIC":
                continue
            if isinstance(kinds, tuple):
                parser.link_arguments(key, link_to)
            else:
                parser.link_arguments(key, link_to, compute_fn=partial(_with_class_path, kinds))

    # ------------------------------------------------------------------ parsing

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, or what was given in its place, into ``self.config``."""
        if args is not None and len(sys.argv) > 1:
            rank_zero_warn(
                "LightningCLI's args parameter is intended to run from within Python like if it were from the command "
                f"line. To prevent mistakes, it is not recommended to provide both args and command line arguments, "
                f"got: sys.argv[1:]={sys.argv[1:]}, args={args}."
            )
        if isinstance(args, (dict, Namespace)):
            self.config: Namespace = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Take the hyper-parameters of the checkpoint that the subcommand starts from into the configuration."""
        path = self._get(self.config, "ckpt_path") if self.subcommand is not None else None
        if not path or not Path(path).is_file():
            return
        hparams = load(path, map_location="cpu", weights_only=True).get("hyper_parameters") or {}
        arguments = {name: value for name, value in hparams.items() if name not in ("_instantiator", "_class_path")}
        if not hparams or (self.subclass_mode_model and "_class_path" not in hparams):
            return
        model = class_config(hparams["_class_path"], arguments) if self.subclass_mode_model else arguments
        try:
            self.config = self.parser.parse_object({self.subcommand: {"model": model}}, self.config)
        except SystemExit:
            sys.stderr.write(f"Parsing of ckpt_path hyperparameters failed: {path} holds {hparams}\n")
            raise

    def _dump_config(self) -> Kwargs:
        text = self.parser.dump(self.config, format="yaml", skip_link_targets=False, skip_unset=False)
        dumped: Kwargs = yaml.safe_load(text) or {}
        return dumped if self.subcommand is None else dumped.get(self.subcommand, {})

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if seed is None or seed is False:
            return
        value = seed_everything(workers=True) if seed is True else seed_everything(seed, workers=True)
        self.config["seed_everything" if self.subcommand is None else f"{self.subcommand}.seed_everything"] = value

    # ------------------------------------------------------------------ the objects

    def before_instantiate_classes(self) -> None:
        """Override to do something before the objects are made. Does nothing by default."""

    def instantiate_classes(self) -> None:
        """Make data module, module and Trainer."""
        instantiators = []
        if self.load_from_checkpoint_support:
            for key, given, kind, is_subclass in (
                ("model", self.model_class, self._model_class, self.subclass_mode_model),
                ("data", self.datamodule_class, self._datamodule_class, self.subclass_mode_data),
            ):
                if given is None or inspect.isclass(given):  # arguments of a function do not build the class again
                    config = self.config_dump.get(key) or {}
                    instantiators.append(saving_instantiator(kind, config, key, is_subclass))
        self.config_init: Namespace = self.parser.instantiate(self.config, instantiators=instantiators)
        self.datamodule: Optional[LightningDataModule] = self._get(self.config_init, "data")
        self.model: LightningModule = self._get(self.config_init, "model")
        self._add_configure_optimizers_method_to_model(self.subcommand)
        self.trainer: Trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """Override to do something once the objects are there. Does nothing by default."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a Trainer with the configured arguments, and ``kwargs`` in place of some."""
        parser = self._parser(self.subcommand)
        callbacks = [self._get(self.config_init, key) for key in parser.callback_keys]
        config = {**self._get(self.config_init, "trainer", Namespace()).as_dict(), **kwargs}
        return self._instantiate_trainer(config, callbacks)

    def _instantiate_trainer(self, config: Kwargs, callbacks: list[Callback]) -> Trainer:
        callbacks = [
            *as_list(config.get("callbacks")), *callbacks, *as_list(self.trainer_defaults.get("callbacks")),
        ]  # fmt: skip
        if self.save_config_callback is not None and not config.get("fast_dev_run"):
            own = self.config if self.subcommand is None else self.config[self.subcommand]
            parser = self._parser(self.subcommand)
            callbacks.append(self.save_config_callback(parser, own, **self.save_config_kwargs))
        return self.trainer_class(**{**config, "callbacks": callbacks})

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: Optional[LRSchedulerTypeUnion] = None
    ) -> Any:
        """Return what the module's ``configure_optimizers`` returns, for an optimizer of the command line.

        Args:
            lightning_module: The module.
            optimizer: The optimizer.
            lr_scheduler: The scheduler, if any.
        """
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor},
            }
        return [optimizer], [lr_scheduler]

    def _add_configure_optimizers_method_to_model(self, subcommand: Optional[str]) -> None:
        parser = self._parser(subcommand)
        optimizer = self._automatic(parser._optimizers, "optimizer")
        scheduler = self._automatic(parser._lr_schedulers, "lr_scheduler")
        if optimizer is None:
            return
        if is_overridden("configure_optimizers", self.model, LightningModule):
            rank_zero_warn(
                f"`{type(self.model).__name__}.configure_optimizers` will be overridden by "
                f"`{type(self).__name__}.configure_optimizers`."
            )
        # Not a bound method: in another process that would be looked up on the class by its name.
        configure = partial(_configure, self.configure_optimizers, optimizer, scheduler, self.model)
        vars(self.model)["configure_optimizers"] = update_wrapper(configure, self.configure_optimizers)

    def _automatic(self, added: Configured, name: str) -> Optional[Kwargs]:
        """Return class path and arguments of the one optimizer or scheduler that levin configures the module with."""
        keys = [key for key, (_, link_to) in added.items() if link_to == "AUTOMATIC"]
        if len(keys) > 1:
            raise MisconfigurationException(
                f"At most one {name} can be linked to the module automatically, received {keys}. "
                "Pass `link_to=` for them and build them in your `configure_optimizers`."
            )
        value = self._get(self.config_init, keys[0]) if keys else None
        if value is None:
            return None
        kinds, _ = added[keys[0]]
        if isinstance(kinds, tuple):
            return {"class_path": value["class_path"], "init_args": _plain(value.get("init_args"))}
        return _with_class_path(kinds, value)

    # ------------------------------------------------------------------ the run

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand, with ``before_<subcommand>`` and ``after_<subcommand>`` of this object around it."""
        for name in (f"before_{subcommand}", subcommand, f"after_{subcommand}"):
            if name == subcommand:
                function = getattr(self, subcommand, None) or getattr(self.trainer, subcommand)
                function(**self._prepare_subcommand_kwargs(subcommand))
            elif callable(getattr(self, name, None)):
                getattr(self, name)()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> Kwargs:
        names = self._subcommand_arguments[subcommand]
        kwargs = {name: value for name, value in self.config_init[subcommand].items() if name in names}
        kwargs["model"] = self.model
        if self.datamodule is not None:
            kwargs["datamodule"] = self.datamodule
        return kwargs

    def _parser(self, subcommand: Optional[str]) -> LightningArgumentParser:
        return self.parser if subcommand is None else self._subcommand_parsers[subcommand]

    def _get(self, config: Namespace, key: str, default: Optional[object] = None) -> Any:
        """Return the value at ``key`` of the chosen subcommand, or of the whole where there is none."""
        if self.subcommand is None:
            return config.get(key, default)
        return config.get(self.subcommand, Namespace()).get(key, default)


def _as_class(kind: Any) -> type:
    return kind if inspect.isclass(kind) else class_from_function(kind)


def _configure(
    function: Callable[..., object],
    optimizer: dict[str, object],
    scheduler: Optional[dict[str, object]],
    module: LightningModule,
) -> Any:
    # Made when asked for, so that parameters of `configure_model` are there and each fit starts with a new optimizer.
    made = instantiate_class(module.parameters(), optimizer)
    if scheduler is None:
        return function(module, optimizer=made, lr_scheduler=None)
    return function(module, optimizer=made, lr_scheduler=instantiate_class(made, scheduler))


def _with_class_path(kind: type, arguments: object) -> Kwargs:
    return {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": _plain(arguments)}


def _plain(arguments: Any) -> Kwargs:
    return arguments.as_dict() if isinstance(arguments, Namespace) else dict(arguments or {})
