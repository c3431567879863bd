"""Real data sets in their official file formats, one that needs no file, and shifted images.

Nothing is ever downloaded: a loader reads the files of the folder it is given, or says which file
is missing and where to get it. `corrupt` makes the corruptions of CIFAR-10-C from any images.
"""

from landscape_fast.data.cifar import cifar10, cifar100
from landscape_fast.data.corruptions import CORRUPTIONS, corrupt
from landscape_fast.data.dataset import Dataset
from landscape_fast.data.digits import digits
from landscape_fast.data.folders import image_folder
from landscape_fast.data.idx import mnist, read_idx
from landscape_fast.data.label_noise import noisy_labels, with_label_noise
from landscape_fast.data.ood import as_ood, inverted, noise_like, patch_shuffled
from landscape_fast.data.shifted import c_names, cifar10_1, cifar_c, save_c
from landscape_fast.data.svhn import svhn

__all__ = [
    "CORRUPTIONS",
    "Dataset",
    "as_ood",
    "c_names",
    "cifar10",
    "cifar100",
    "cifar10_1",
    "cifar_c",
    "corrupt",
    "digits",
    "image_folder",
    "inverted",
    "mnist",
    "noise_like",
    "noisy_labels",
    "patch_shuffled",
    "read_idx",
    "save_c",
    "svhn",
    "with_label_noise",
]
