"""Images in one folder per class, as ImageNet and many others come."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape_fast.data._checks import need
from landscape_fast.data._files import wrong
from landscape_fast.data.dataset import Dataset, check_scale, scaled

_ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm")
_GB = 1e9
_REMEDY = "arrange the images as <part>/<class>/<image>"


def image_folder(
    root: str | Path,
    size: int,
    *,
    train: str | None = "train",
    test: str | None = "val",
    shorter: int | None = None,
    per_class: int | None = None,
    scale: str = "unit",
    most_gb: float = 8.0,
    name: str | None = None,
) -> Dataset:
    """Images in folders train/<class>/ and val/<class>/, as of ImageNet (Deng et al. 2009).

    An image is turned to RGB, its shorter side resized to `shorter` pixels (bilinear, averaged over
    what a new pixel covers), and the middle `size` x `size` cut out. Classes are the sorted names
    of the sub-folders of both parts, images come class by class in the order of their sorted paths;
    folders within a class are searched too.

    A `Dataset` is wholly in memory, at the size asked for: 3 * `size`^2 bytes per image, four times
    as much in the float forms. ImageNet at 64 pixels takes 16 GB of bytes, at 224 pixels 193 GB.

    Args:
        root: the folder with the two parts.
        size: H and W of the images returned.
        train: sub-folder of the training images; None for no such images.
        test: sub-folder of the test images, "snow/3" for one of ImageNet-C; None for none.
        shorter: pixels of the shorter side before the middle is cut out; `size` by default. The
            usual margin for 224 is 256.
        per_class: at most so many images of each class and part, the first ones.
        scale: "unit" for float32 in [0, 1], "raw" for float32 in [0, 255], "uint8" for bytes.
        most_gb: the most memory the images may take, in 1e9 bytes.
        name: of the data set; that of `root` by default.

    Returns:
        A `Dataset` with images [N, 3, size, size].

    Raises:
        ImportError: without Pillow.
        FileNotFoundError: if a folder is missing or holds no image.
        ValueError: if an argument is not as said, the images would take more than `most_gb`, or
            one of them cannot be read.
    """
    op = "image_folder"
    check_scale(op, scale)
    for argument, value in (("size", size), ("shorter", shorter), ("per_class", per_class)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        optional = value is None and argument != "size"
        need(whole or optional, op, argument, "a positive integer", repr(value))
    shorter = size if shorter is None else shorter
    need(shorter >= size, op, "shorter", f"at least size, {size}", shorter)
    need(train is not None or test is not None, op, "train", "given, or test", "None for both")
    parts = [_listed(root, part, per_class) for part in (train, test)]
    classes = tuple(sorted({label for part in parts for label in part}))
    count = sum(len(paths) for part in parts for paths in part.values())
    gigabytes = count * 3 * size**2 * (1 if scale == "uint8" else 4) / _GB
    remedy = 'pass a smaller size or per_class, scale="uint8", or a larger most_gb'
    need(gigabytes <= most_gb, op, "images", f"within most_gb = {most_gb:g} GB of memory",
         f"{count:,} images of {gigabytes:,.1f} GB", remedy)  # fmt: skip
    tensors = []
    for part in parts:
        x, y = _read(part, classes, size, shorter)
        tensors += [scaled(x, scale, 255), y]
    return Dataset(*tensors, classes, name or Path(root).name)


def _listed(root: str | Path, part: str | None, per_class: int | None) -> dict[str, list[Path]]:
    """The paths of the images of each class, sorted."""
    if part is None:
        return {}
    folder = Path(root) / part
    if not folder.is_dir():
        there = "a file" if folder.exists() else "no such folder"
        raise FileNotFoundError(
            f"image_folder: {folder} must be a folder; got {there}; {_REMEDY}, or name the parts"
        )
    found = {}
    for label in sorted(path for path in folder.iterdir() if path.is_dir()):
        paths = (path for path in label.rglob("*") if path.suffix.lower() in _ENDINGS)
        found[label.name] = sorted(paths)[:per_class]
    found = {label: paths for label, paths in found.items() if paths}
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"image_folder: {folder} must hold a folder of images per class; got {there}; {_REMEDY}"
        )
    return found


def _read(
    part: dict[str, list[Path]], classes: Sequence[str], size: int, shorter: int
) -> tuple[Tensor, Tensor]:
    count = sum(map(len, part.values()))
    x = torch.empty(count, 3, size, size, dtype=torch.uint8)
    labels, at = [], 0
    for name, paths in part.items():
        labels += [classes.index(name)] * len(paths)
        for path in paths:
            x[at] = _pixels(path, size, shorter)
            at += 1
    return x, torch.tensor(labels, dtype=torch.int64)


def _pixels(path: Path, size: int, shorter: int) -> Tensor:
    """[3, size, size] uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"image_folder: Pillow must be installed to read images; got {error}; "
            "pip install 'landscape-fast[io]'"
        ) from error
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damage
        raise wrong("image_folder", path, "be a readable image", f"{error}", "remove it") from error
    w, h = image.size
    short = min(w, h)
    w, h = (max(size, round(side * shorter / short)) for side in (w, h))
    image = image.resize((w, h), Image.Resampling.BILINEAR) if short != shorter else image
    left, top = (w - size) // 2, (h - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
