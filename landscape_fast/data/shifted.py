"""CIFAR-10-C and other corrupted test sets as NumPy arrays, read and written; and CIFAR-10.1."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape_fast.data._checks import SEVERITIES, check_images, check_severity, need
from landscape_fast.data._files import find_file, find_folder, wrong
from landscape_fast.data.corruptions import CORRUPTIONS, corrupt
from landscape_fast.data.dataset import check_scale, scaled

_LABELS = "labels.npy"
_FOLDERS = ("CIFAR-10-C", "CIFAR-100-C")
_REMEDY = "unpack CIFAR-10-C.tar of https://zenodo.org/records/2535967 again"
_REMEDY_1 = "copy the files of https://github.com/modestyachts/CIFAR-10.1 again"


def cifar_c(
    root: str | Path, name: str, severity: int, *, scale: str = "unit"
) -> tuple[Tensor, Tensor]:
    """One corruption of CIFAR-10-C or CIFAR-100-C at one severity (Hendrycks & Dietterich 2019).

    Reads <name>.npy, bytes [5 N, H, W, C] with the N images of severity 1 first, and labels.npy,
    [5 N]. Only the images asked for are read from the file.

    Args:
        root: the folder of the arrays, or one with them in CIFAR-10-C or CIFAR-100-C.
        name: of the array; those published are `CORRUPTIONS`, `c_names` lists those there.
        severity: 1 to 5.
        scale: "unit" for float32 in [0, 1], "raw" for float32 in [0, 255], "uint8" for bytes.

    Returns:
        Images [N, C, H, W] and labels [N] int64, in file order.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if an argument is not as said or a file is damaged.
    """
    op = "cifar_c"
    check_scale(op, scale)
    check_severity(op, severity)
    folder = _folder(op, root)
    file = _find(op, root, folder, name)
    images = _images(op, file, _REMEDY)
    path = find_file(op, root, folder, (_LABELS,), _REMEDY)
    labels = _labels(op, path, len(images), _REMEDY)
    if len(images) % len(SEVERITIES):
        raise wrong(op, file, "hold 5 N images", f"{len(images):,}", _REMEDY)
    count = len(images) // len(SEVERITIES)
    part = slice((severity - 1) * count, severity * count)
    return _tensors(images[part], labels[part], scale)


def c_names(root: str | Path) -> tuple[str, ...]:
    """The corruptions whose arrays lie in a folder: those of `CORRUPTIONS` first, then others."""
    there = {path.stem for path in _folder("c_names", root).glob("*.npy")} - {"labels"}
    return (*(name for name in CORRUPTIONS if name in there), *sorted(there - set(CORRUPTIONS)))


def save_c(
    root: str | Path,
    images: Tensor,
    labels: Tensor,
    names: Sequence[str] = CORRUPTIONS,
    *,
    seed: int = 0,
) -> None:
    """Writes images with `corrupt` as the arrays that CIFAR-10-C is published in.

    Args:
        root: a folder, made if missing. An array that is there already is replaced, when the new
            one is complete.
        images: [N, C, H, W] float32 in [0, 1], clean test images.
        labels: [N] integers from 0 to 255.
        names: the corruptions to write.
        seed: of the random numbers.

    Raises:
        ValueError: if an argument is not as said.

    Cost: 5 N H W C bytes on disk per name; one severity at a time in memory.

    Example:
        >>> save_c("made", torch.rand(4, 3, 8, 8), torch.arange(4), ["contrast"])
        >>> x, y = cifar_c("made", "contrast", 5)
        >>> x.shape, y.tolist()
        (torch.Size([4, 3, 8, 8]), [0, 1, 2, 3])
    """
    check_images("save_c", images)
    fits = isinstance(labels, Tensor) and not labels.is_floating_point()
    fits = fits and labels.shape == images.shape[:1]
    need(fits, "save_c", "labels", f"[N] integers for N = {len(images)} images", _shown(labels))
    if len(labels):
        low, high = int(labels.min()), int(labels.max())
        need(0 <= low and high <= 255, "save_c", "labels", "from 0 to 255", f"{low} to {high}")
    unknown = [name for name in names if name not in CORRUPTIONS]
    need(not unknown, "save_c", "names", f"some of {', '.join(CORRUPTIONS)}", f"{unknown}")
    colour = images.shape[1] == 3 or "saturate" not in names
    need(colour, "save_c", "names", "without 'saturate' for images without colour", f"{names}")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    n, c, h, w = images.shape
    for name in names:
        part = root / f".{name}.npy.part"
        array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(SEVERITIES) * n, h, w, c))
        for severity in SEVERITIES:
            made = corrupt(images, name, severity, seed=seed, levels=True)
            pixels = made.mul_(255).round_().byte().permute(0, 2, 3, 1)
            array[(severity - 1) * n : severity * n] = pixels.cpu().numpy()
        array.flush()
        del array
        part.replace(root / f"{name}.npy")
    part = root / f".{_LABELS}.part"
    with part.open("wb") as file:
        np.save(file, np.tile(labels.cpu().numpy().astype(np.uint8), len(SEVERITIES)))
    part.replace(root / _LABELS)


def cifar10_1(
    root: str | Path, *, version: str = "v6", scale: str = "unit"
) -> tuple[Tensor, Tensor]:
    """CIFAR-10.1 (Recht et al. 2018): new test images for CIFAR-10.

    Reads cifar10.1_<version>_data.npy, bytes [N, 32, 32, 3], and cifar10.1_<version>_labels.npy.

    Args:
        root: the folder of the files, or one with them in datasets or CIFAR-10.1.
        version: "v6" with 2,000 images, balanced, or "v4" with 2,021.
        scale: as for `cifar_c`.

    Returns:
        Images [N, 3, 32, 32] and labels [N] int64, in file order.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if an argument is not as said or a file is damaged.
    """
    op = "cifar10_1"
    check_scale(op, scale)
    need(version in ("v4", "v6"), op, "version", "'v4' or 'v6'", repr(version))
    names = tuple(f"cifar10.1_{version}_{kind}.npy" for kind in ("data", "labels"))
    folder = find_folder(op, root, ("datasets", "CIFAR-10.1"), names, _REMEDY_1)
    files = [find_file(op, root, folder, (name,), _REMEDY_1) for name in names]
    images = _images(op, files[0], _REMEDY_1)
    return _tensors(images, _labels(op, files[1], len(images), _REMEDY_1), scale)


def _folder(op: str, root: str | Path) -> Path:
    remedy = f"{_REMEDY}, or make such arrays with save_c"
    return find_folder(op, root, _FOLDERS, (_LABELS,), remedy)


def _find(op: str, root: str | Path, folder: Path, name: str) -> Path:
    need(Path(name).name == name, op, "name", "the name of an array", repr(name))
    return find_file(op, root, folder, (f"{name}.npy",), f"{_REMEDY}, or make it with save_c")


def _open(op: str, path: Path, remedy: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise wrong(op, path, "be a whole .npy file", f"{error}", remedy) from error


def _images(op: str, path: Path, remedy: str) -> np.ndarray:
    array = _open(op, path, remedy)
    if array.ndim != 4 or array.dtype != np.uint8 or array.shape[3] not in (1, 3):
        rule, got = "hold bytes [N, H, W, C] with C 1 or 3", f"{array.dtype} {list(array.shape)}"
        raise wrong(op, path, rule, got, remedy)
    return array


def _labels(op: str, path: Path, count: int, remedy: str) -> np.ndarray:
    labels = _open(op, path, remedy)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        rule, got = f"hold [{count:,}] integers", f"{labels.dtype} {list(labels.shape)}"
        raise wrong(op, path, rule, got, remedy)
    return labels


def _tensors(images: np.ndarray, labels: np.ndarray, scale: str) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))  # no view of the file
    return scaled(x, scale, 255), torch.from_numpy(labels.astype(np.int64))


def _shown(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
