from levin.tuner.batch_size import scale_batch_size as scale_batch_size
from levin.tuner.finders import BatchSizeFinder as BatchSizeFinder
from levin.tuner.finders import LearningRateFinder as LearningRateFinder
from levin.tuner.learning_rate import LRFinder as LRFinder
from levin.tuner.learning_rate import lr_find as lr_find
from levin.tuner.tuner import Tuner as Tuner
