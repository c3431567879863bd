"""Real data sets in their official file formats, and one that needs no file.

Nothing is ever downloaded: a loader reads the files of the folder it is given, or says which file
is missing and where to get it.
"""

from landscape_fast.data.cifar import cifar10
from landscape_fast.data.corruptions import CORRUPTIONS, corrupt
from landscape_fast.data.dataset import Dataset
from landscape_fast.data.digits import digits
from landscape_fast.data.idx import mnist, read_idx
from landscape_fast.data.label_noise import noisy_labels, with_label_noise

__all__ = [
    "CORRUPTIONS",
    "Dataset",
    "cifar10",
    "corrupt",
    "digits",
    "mnist",
    "noisy_labels",
    "read_idx",
    "with_label_noise",
]
