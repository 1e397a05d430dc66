"""Starting the processes of a run."""

from levin.launchers.launcher import Launcher
from levin.launchers.multiprocess import MultiProcessingLauncher
from levin.launchers.script import SubprocessLauncher

__all__ = ["Launcher", "MultiProcessingLauncher", "SubprocessLauncher"]
