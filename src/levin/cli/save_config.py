"""The configuration of a run, written beside its logs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from levin.cli.parser import LightningArgumentParser
from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.filesystem import get_filesystem
from levin.utilities.overrides import is_overridden

if TYPE_CHECKING:
    from jsonargparse import Namespace


class SaveConfigCallback(Callback):
    """Writes the configuration into the folder of the logs when a run starts.

    Args:
        parser: The parser that the configuration was read by.
        config: The configuration.
        config_filename: Name of the file.
        overwrite: Whether to write over a file that is there already.
        multifile: Whether parts that came from files of their own are written as such.
        save_to_log_dir: Whether to write the file; otherwise only :meth:`save_config` is called.

    Raises:
        RuntimeError: The file is there already, and ``overwrite`` is False.

    Example:
        Send the configuration to a logger instead::

            class LogConfig(SaveConfigCallback):
                def save_config(self, trainer, pl_module, stage):
                    trainer.logger.log_hyperparams({"config": self.parser.dump(self.config, skip_unset=False)})

            LightningCLI(save_config_callback=LogConfig, save_config_kwargs={"save_to_log_dir": False})
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        self.parser: LightningArgumentParser = parser
        self.config: Namespace = config
        self.config_filename: str = config_filename
        self.overwrite: bool = overwrite
        self.multifile: bool = multifile
        self.save_to_log_dir: bool = save_to_log_dir
        self.already_saved: bool = False
        if not save_to_log_dir and not is_overridden("save_config", self, SaveConfigCallback):
            raise ValueError(
                "save_to_log_dir=False saves nothing unless `save_config` is overridden, received a class without it. "
                "Override it, or pass save_config_callback=None to LightningCLI."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, once; the first rank does, and all of them learn when it could not."""
        if self.already_saved:
            return
        if self.save_to_log_dir:
            self._write(trainer)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)
            self.already_saved = True
        self.already_saved = trainer.strategy.broadcast(self.already_saved)

    def save_config(self, trainer: object, pl_module: object, stage: str) -> None:
        """Save the configuration in a further way. Called on the first rank only; does nothing by default."""

    def _write(self, trainer: Trainer) -> None:
        log_dir = trainer.log_dir  # the same on all ranks, and asked for on all of them
        if log_dir is None:
            raise ValueError(
                "log_dir must be a folder to save the configuration in, received None. "
                "Pass save_config_kwargs={'save_to_log_dir': False}, or a logger with a folder."
            )
        path = os.path.join(log_dir, self.config_filename)
        filesystem = get_filesystem(log_dir)
        exists = trainer.is_global_zero and not self.overwrite and filesystem.exists(path)
        if trainer.strategy.broadcast(exists):
            raise RuntimeError(
                f"{type(self).__name__} expected {path} not to exist. A configuration file is there already, perhaps "
                "of an earlier run that logged into the same folder. To write over it, pass "
                "save_config_kwargs={'overwrite': True} to LightningCLI; to save none, save_config_callback=None."
            )
        if trainer.is_global_zero:
            filesystem.makedirs(log_dir, exist_ok=True)
            self.parser.save(self.config, path, skip_unset=False, overwrite=self.overwrite, multifile=self.multifile)
