"""CIFAR-10 and CIFAR-100 in their official binary layout."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from landscape_fast.data._checks import need
from landscape_fast.data._files import find_file, find_folder, wrong
from landscape_fast.data.dataset import Dataset, check_scale, scaled

_PIXELS = 3 * 32 * 32  # the planes R, G, B


class _Layout(NamedTuple):
    """Names and sizes of one of the two data sets."""

    op: str
    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str  # the file of class names
    labels: tuple[int, ...]  # how many classes each label byte of a record counts
    label: int  # which of them is asked for
    archive: str
    pickled: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)

    @property
    def record(self) -> int:
        return len(self.labels) + _PIXELS

    @property
    def remedy(self) -> str:
        return (
            f"unpack {self.archive} of https://www.cs.toronto.edu/~kriz/cifar.html again "
            f"(it makes the folder {self.folder})"
        )


_TEN = _Layout(
    "cifar10",
    "CIFAR-10",
    "cifar-10-batches-bin",
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test_batch.bin",
    "batches.meta.txt",
    (10,),
    0,
    "cifar-10-binary.tar.gz",
    "cifar-10-batches-py",
)
_FINE = _Layout(
    "cifar100",
    "CIFAR-100",
    "cifar-100-binary",
    ("train.bin",),
    "test.bin",
    "fine_label_names.txt",
    (20, 100),
    1,
    "cifar-100-binary.tar.gz",
    "cifar-100-python",
)
_COARSE = _FINE._replace(name="CIFAR-100-coarse", meta="coarse_label_names.txt", label=0)


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
    return _load(_TEN, root, scale, {name: records for name in _TEN.files})


def cifar100(
    root: str | Path,
    labels: str = "fine",
    *,
    scale: str = "unit",
    records: tuple[int, int] | None = (50_000, 10_000),
) -> Dataset:
    """CIFAR-100 (Krizhevsky 2009): 50,000 images to train and 10,000 to test, 3 x 32 x 32.

    Reads train.bin, test.bin and fine_label_names.txt or coarse_label_names.txt: records of a
    coarse and a fine label byte and 3,072 pixels, channel by channel. Images stay in file order.

    Args:
        root: the folder cifar-100-binary, or the one it is in.
        labels: "fine" for the 100 classes, "coarse" for the 20 they are grouped in.
        scale: "unit" for float32 in [0, 1], "raw" for float32 in [0, 255], "uint8" for the bytes as
            stored. The float forms take 737 MB.
        records: of train.bin and test.bin; the official numbers, others, or None for any.

    Returns:
        A `Dataset`; `Dataset.standardized` normalises per channel.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if a file has the wrong size or a label is out of range.
    """
    layouts = {"fine": _FINE, "coarse": _COARSE}
    need(labels in layouts, "cifar100", "labels", "'fine' or 'coarse'", repr(labels))
    counts = dict(zip(_FINE.files, records or (None, None), strict=True))
    return _load(layouts[labels], root, scale, counts)


def _load(layout: _Layout, root: str | Path, scale: str, records: dict) -> Dataset:
    op, label = layout.op, layout.label
    check_scale(op, scale)
    folder = _folder(layout, Path(root))
    classes = _names(layout, find_file(op, root, folder, (layout.meta,), layout.remedy))
    paths = [find_file(op, root, folder, (name,), layout.remedy) for name in layout.files]
    batches = [_records(layout, path, records[path.name]) for path in paths]
    parts = []
    for some in (batches[:-1], batches[-1:]):
        pixels = np.concatenate([batch[:, -_PIXELS:] for batch in some]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[:, label] for batch in some]).astype(np.int64)
        parts += [scaled(torch.from_numpy(pixels), scale, 255), torch.from_numpy(labels)]
    return Dataset(*parts, classes, layout.name)


def _folder(layout: _Layout, root: Path) -> Path:
    remedy, files = layout.remedy, (*layout.files, layout.meta)
    if (root / layout.pickled).is_dir():
        remedy = "that is the pickled version, which is not read; " + remedy
    return find_folder(layout.op, root, (layout.folder,), files, remedy)


def _names(layout: _Layout, path: Path) -> tuple[str, ...]:
    names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    count = layout.labels[layout.label]
    if len(names) != count:
        rule = f"name {count} classes"
        raise wrong(layout.op, path, rule, f"{len(names)} names", layout.remedy)
    return names


def _records(layout: _Layout, path: Path, count: int | None) -> np.ndarray:
    """[records, labels + 3072] bytes of one file."""
    size, each = path.stat().st_size, layout.record
    whole = size > 0 and size % each == 0 if count is None else size == count * each
    if not whole:
        number = "one or more" if count is None else f"{count:,}"
        rule = f"hold {number} records of {each:,} bytes"
        rule += "" if count is None else f" = {count * each:,} bytes"
        raise wrong(layout.op, path, rule, f"{size:,} bytes", layout.remedy)
    batch = np.fromfile(path, np.uint8).reshape(-1, each)
    for column, classes in enumerate(layout.labels):
        bad = np.flatnonzero(batch[:, column] >= classes)
        if len(bad):
            rule = f"hold labels from 0 to {classes - 1}"
            got = f"label {batch[bad[0], column]} in record {bad[0]:,}"
            raise wrong(layout.op, path, rule, got, layout.remedy)
    return batch
