from levin.profilers.advanced import AdvancedProfiler as AdvancedProfiler
from levin.profilers.profiler import PassThroughProfiler as PassThroughProfiler
from levin.profilers.profiler import Profiler as Profiler
from levin.profilers.pytorch import PyTorchProfiler as PyTorchProfiler
from levin.profilers.simple import SimpleProfiler as SimpleProfiler
from levin.profilers.xla import XLAProfiler as XLAProfiler
