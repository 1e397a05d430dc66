from levin.launchers.launcher import Launcher as Launcher
from levin.launchers.multiprocess import MultiProcessingLauncher as MultiProcessingLauncher
from levin.launchers.script import SubprocessLauncher as SubprocessLauncher
