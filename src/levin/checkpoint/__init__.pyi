from levin.checkpoint.background import AsyncCheckpointIO as AsyncCheckpointIO
from levin.checkpoint.folder import consolidate as consolidate
from levin.checkpoint.io import CheckpointIO as CheckpointIO
from levin.checkpoint.io import TorchCheckpointIO as TorchCheckpointIO
from levin.checkpoint.io import atomic_save as atomic_save
from levin.checkpoint.reading import load as load
from levin.checkpoint.upgrade_file import upgrade as upgrade
from levin.checkpoint.verify import find_newest_intact as find_newest_intact
