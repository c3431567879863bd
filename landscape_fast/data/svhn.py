"""SVHN, cropped digits, from the official .mat files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape_fast.data._files import find_file, find_folder, wrong
from landscape_fast.data.dataset import Dataset, check_scale, scaled

_TRAIN, _TEST = "train_32x32.mat", "test_32x32.mat"
_REMEDY = f"copy {_TRAIN} and {_TEST} of http://ufldl.stanford.edu/housenumbers there again"


def svhn(root: str | Path, *, scale: str = "unit", train: bool = True) -> Dataset:
    """SVHN (Netzer et al. 2011): 73,257 cropped digits to train and 26,032 to test, 3 x 32 x 32.

    Reads train_32x32.mat and test_32x32.mat (format 2, MATLAB 5). Images stay in file order; the
    label 10, which stands for the digit 0 in the files, becomes 0.

    Args:
        root: the folder of the files, or one with them in SVHN or svhn.
        scale: "unit" for float32 in [0, 1], "raw" for float32 in [0, 255], "uint8" for bytes. The
            float forms take 1.2 GB.
        train: False for a data set without training images, which needs the test file alone: enough
            to see what a network trained on other images makes of these.

    Returns:
        A `Dataset` with the classes 0 to 9.

    Raises:
        ImportError: without scipy.
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if a file is damaged or holds something else.
    """
    check_scale("svhn", scale)
    names = (_TRAIN, _TEST) if train else (_TEST,)
    folder = find_folder("svhn", root, ("SVHN", "svhn"), names, _REMEDY)
    paths = [find_file("svhn", root, folder, (name,), _REMEDY) for name in names]
    parts = [_read(path) for path in paths]
    if not train:
        x, y = parts[0]
        parts.insert(0, (x[:0], y[:0]))
    flat = [part for x, y in parts for part in (scaled(x, scale, 255), y)]
    return Dataset(*flat, tuple("0123456789"), "SVHN")


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 3, 32, 32] and labels [N]."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"svhn: scipy must be installed to read .mat files; got {error}; "
            "pip install 'landscape-fast[io]'"
        ) from error
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # scipy raises a different one for each kind of damage
        raise wrong("svhn", path, "be a MATLAB 5 file", f"{error}", _REMEDY) from error
    for name in ("X", "y"):
        if name not in content:
            there = ", ".join(k for k in content if not k.startswith("__")) or "neither"
            raise wrong("svhn", path, "hold X and y", there, _REMEDY)
    x, y = content["X"], content["y"].reshape(-1)
    if x.ndim != 4 or x.shape[:3] != (32, 32, 3) or x.dtype != np.uint8:
        rule, got = "hold X of [32, 32, 3, N] bytes", f"{x.dtype} {list(x.shape)}"
        raise wrong("svhn", path, rule, got, _REMEDY)
    if len(y) != x.shape[3]:
        raise wrong("svhn", path, f"hold {x.shape[3]:,} labels, one each", f"{len(y):,}", _REMEDY)
    bad = np.flatnonzero((y < 1) | (y > 10))
    if len(bad):
        got = f"label {y[bad[0]]} at {bad[0]:,}"
        raise wrong("svhn", path, "hold labels from 1 to 10", got, _REMEDY)
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1)))
    return images, torch.from_numpy(y.astype(np.int64) % 10)
