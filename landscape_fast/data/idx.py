"""MNIST and the data sets in its format: IDX files, plain or gzip."""

from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape_fast.data._files import find_file, find_folder, read, wrong
from landscape_fast.data.dataset import Dataset, check_scale, scaled

_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
CLASSES = {
    "MNIST": tuple("0123456789"),
    "FashionMNIST": tuple(_FASHION.split(",")),
    "KMNIST": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}
_REMEDY = "copy the official file again"
_UBYTE = 8


def mnist(
    root: str | Path,
    *,
    name: str = "MNIST",
    classes: tuple[str, ...] | None = None,
    scale: str = "unit",
) -> Dataset:
    """MNIST (LeCun et al. 1998) or a data set in its format, such as Fashion-MNIST and KMNIST.

    Reads train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
    t10k-labels-idx1-ubyte, each plain or with .gz (plain first). Images stay in file order.

    Args:
        root: the folder of the files, or one with them in `name`, `name`/raw or raw.
        name: "MNIST", "FashionMNIST" or "KMNIST"; any other needs `classes`.
        classes: the names of the labels 0, 1, ...
        scale: "unit" for float32 in [0, 1], "raw" for float32 in [0, 255], "uint8" as stored.

    Returns:
        A `Dataset` with images [N, 1, H, W].

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if a file is damaged, is not of this format or has a label out of range.
    """
    check_scale("mnist", scale)
    classes = CLASSES.get(name) if classes is None else tuple(classes)
    if not classes:
        known = ", ".join(map(repr, CLASSES))
        raise ValueError(f"mnist: name must be one of {known}; got {name!r}; or pass classes=")
    first = _both("train-images-idx3-ubyte")
    places = (name, f"{name}/raw", "raw")
    folder = find_folder("mnist", root, places, first, "copy the four official files there")
    parts = []
    for part in ("train", "t10k"):
        files = []
        for kind in ("images-idx3", "labels-idx1"):
            names = _both(f"{part}-{kind}-ubyte")
            files.append(find_file("mnist", root, folder, names, "copy the official file there"))
        x, y = read_idx(files[0], 3), read_idx(files[1], 1)
        if len(x) != len(y):
            rule = f"hold as many labels as {files[0].name} holds images, {len(x):,}"
            raise wrong("mnist", files[1], rule, f"{len(y):,}", _REMEDY)
        bad = (y >= len(classes)).nonzero()
        if len(bad):
            at = int(bad[0, 0])
            rule, got = f"hold labels from 0 to {len(classes) - 1}", f"{int(y[at])} at {at:,}"
            raise wrong("mnist", files[1], rule, got, "pass classes= for other labels")
        parts += [scaled(x.unsqueeze(1), scale, 255), y.long()]
    return Dataset(*parts, classes, name)


def read_idx(path: str | Path, dimensions: int | None = None) -> Tensor:
    """The array in one IDX file of unsigned bytes, as a uint8 tensor.

    Args:
        path: the file; unpacked in memory if its name ends in .gz.
        dimensions: how many it must have; None takes any.

    Raises:
        ValueError: if the file is not IDX, holds other numbers, or its size does not fit its
            header.
    """
    path = Path(path)
    head = read("read_idx", path, 4 + 4 * 255, _REMEDY)
    known = len(head) >= 4 and head[:3] == bytes((0, 0, _UBYTE)) and head[3] > 0
    if not known or dimensions and head[3] != dimensions:
        wanted = f"{dimensions:02x}" if dimensions else "the number of dimensions"
        rule = f"begin with 00 00 08 {wanted} (IDX, unsigned bytes)"
        raise wrong("read_idx", path, rule, head[:4].hex(" ") or "an empty file", _REMEDY)
    start = 4 + 4 * head[3]
    if len(head) < start:
        rule = f"hold a header of {start} bytes"
        raise wrong("read_idx", path, rule, f"{len(head)} bytes", _REMEDY)
    shape = [int(n) for n in np.frombuffer(head[4:start], ">u4")]
    size = start + prod(shape)
    content = read("read_idx", path, size, _REMEDY)
    if len(content) != size:
        rule = f"hold {size:,} bytes, a header and {' x '.join(map(str, shape))}"
        got = f"{len(content):,} bytes" if len(content) < size else "more"
        raise wrong("read_idx", path, rule, got, _REMEDY)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _both(name: str) -> tuple[str, str]:
    return name, f"{name}.gz"
