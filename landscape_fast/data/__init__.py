"""Real data sets in their official file formats, and one that needs no file.

Nothing is ever downloaded: a loader reads the files of the folder it is given, or says which file
is missing and where to get it.
"""

from landscape_fast.data.cifar import cifar10
from landscape_fast.data.dataset import Dataset
from landscape_fast.data.digits import digits
from landscape_fast.data.idx import mnist, read_idx

__all__ = ["Dataset", "cifar10", "digits", "mnist", "read_idx"]
