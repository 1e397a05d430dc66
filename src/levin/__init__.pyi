from levin import accelerators as accelerators
from levin import callbacks as callbacks
from levin import checkpoint as checkpoint
from levin import cli as cli
from levin import compat as compat
from levin import data as data
from levin import demos as demos
from levin import environments as environments
from levin import fabric as fabric
from levin import launchers as launchers
from levin import loggers as loggers
from levin import precision as precision
from levin import profilers as profilers
from levin import strategies as strategies
from levin import tuner as tuner
from levin.datamodule import LightningDataModule as LightningDataModule
from levin.fabric import Fabric as Fabric
from levin.hooks import Callback as Callback
from levin.module import LightningModule as LightningModule
from levin.trainer import Trainer as Trainer
from levin.utilities.seed import seed_everything as seed_everything

__version__: str
