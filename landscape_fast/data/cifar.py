"""CIFAR-10 in its official binary layout."""

from pathlib import Path

import numpy as np
import torch

from landscape_fast.data._files import find_file, find_folder, wrong
from landscape_fast.data.dataset import Dataset, check_scale, scaled

_FOLDER = "cifar-10-batches-bin"
_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEST, _META = "test_batch.bin", "batches.meta.txt"
_RECORD = 1 + 3 * 32 * 32  # a label and the planes R, G, B
_CLASSES = 10
_REMEDY = (
    "unpack cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html again "
    f"(it makes the folder {_FOLDER})"
)


def cifar10(root: str | Path, *, scale: str = "unit", records: int | None = 10_000) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 images to train and 10,000 to test, 3 x 32 x 32.

    Reads data_batch_1..5.bin, test_batch.bin and batches.meta.txt: records of one label byte and
    3,072 pixels, channel by channel. Images stay in file order.

    Args:
        root: the folder cifar-10-batches-bin, or the one it is in.
        scale: "unit" for float32 in [0, 1], "raw" for float32 in [0, 255] (what MediumCNN was
            published with), "uint8" for the bytes as stored. The float forms take 737 MB.
        records: per file; the official 10,000, another number, or None for any whole number.

    Returns:
        A `Dataset`; `Dataset.standardized` normalises per channel.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if a file has the wrong size or a label is out of range.
    """
    check_scale("cifar10", scale)
    folder = _folder(Path(root))
    classes = _names(find_file("cifar10", root, folder, (_META,), _REMEDY))
    paths = [find_file("cifar10", root, folder, (name,), _REMEDY) for name in (*_TRAIN, _TEST)]
    train = [_records(path, records) for path in paths[:-1]]
    parts = []
    for batches in (train, [_records(paths[-1], records)]):
        pixels = np.concatenate([batch[:, 1:] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[:, 0] for batch in batches]).astype(np.int64)
        parts += [scaled(torch.from_numpy(pixels), scale, 255), torch.from_numpy(labels)]
    return Dataset(*parts, classes, "CIFAR-10")


def _folder(root: Path) -> Path:
    try:
        return find_folder("cifar10", root, (_FOLDER,), (*_TRAIN, _TEST, _META))
    except FileNotFoundError as error:
        remedy = _REMEDY
        if (root / "cifar-10-batches-py").is_dir():
            remedy = "that is the pickled version, which is not read; " + _REMEDY
        raise FileNotFoundError(f"{error}; {remedy}") from None


def _names(path: Path) -> tuple[str, ...]:
    names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    if len(names) != _CLASSES:
        rule = f"name {_CLASSES} classes"
        raise wrong("cifar10", path, rule, f"{len(names)} names", _REMEDY)
    return names


def _records(path: Path, count: int | None) -> np.ndarray:
    """[records, 3073] bytes of one file."""
    size = path.stat().st_size
    whole = size > 0 and size % _RECORD == 0 if count is None else size == count * _RECORD
    if not whole:
        number = "one or more" if count is None else f"{count:,}"
        rule = f"hold {number} records of {_RECORD:,} bytes"
        rule += "" if count is None else f" = {count * _RECORD:,} bytes"
        raise wrong("cifar10", path, rule, f"{size:,} bytes", _REMEDY)
    batch = np.fromfile(path, np.uint8).reshape(-1, _RECORD)
    bad = np.flatnonzero(batch[:, 0] >= _CLASSES)
    if len(bad):
        rule = f"hold labels from 0 to {_CLASSES - 1}"
        got = f"label {batch[bad[0], 0]} in record {bad[0]:,}"
        raise wrong("cifar10", path, rule, got, _REMEDY)
    return batch
