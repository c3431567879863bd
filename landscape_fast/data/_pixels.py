"""Filters and resampling of image batches [n, C, H, W].

Everything is a sum of products in a fixed order, one elementwise call per product: the bits of an
image do not depend on the batch around it, which a convolution or a matrix product would not
promise.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
_VALUES = 1 << 18  # of a part: temporaries of 2 MB stay in the cache
Taps = tuple[tuple[Tensor, Tensor], ...]


def chunks(*of_images: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [N, ...], the first of them images, cut alike into parts of so many values."""
    if len(of_images[0]):
        each = max(1, _VALUES // of_images[0][0].numel())
        yield from zip(*(t.split(each) for t in of_images), strict=True)


def inside(index: Tensor, size: int, edge: str) -> Tensor:
    """Pixel numbers that may lie outside [0, size), led back inside.

    Args:
        edge: "nearest" a a|a b c|c c, "reflect" b a|a b c|c b, "mirror" c b|a b c|b a.
    """
    if edge == "nearest":
        return index.clamp(0, size - 1)
    period = 2 * size if edge == "reflect" else 2 * size - 2
    index = index % period
    return torch.minimum(index, period - 1 - index if edge == "reflect" else period - index)


def filtered(x: Tensor, weights: Tensor, edge: str) -> Tensor:
    """Correlation with a small [kH, kW] float64 CPU kernel of odd sides, centred."""
    h, w = x.shape[2:]
    up, left = (side // 2 for side in weights.shape)
    rows = inside(torch.arange(-up, h + up, device=x.device), h, edge)
    columns = inside(torch.arange(-left, w + left, device=x.device), w, edge)
    padded = x.index_select(2, rows).index_select(3, columns)
    out = None
    for i, line in enumerate(weights.tolist()):
        for j, weight in enumerate(line):
            if weight:
                term = padded[..., i : i + h, j : j + w] * weight
                out = term if out is None else out.add_(term)
    return out


def gaussian(x: Tensor, sigma: float, edge: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian filter, cut off at `truncate` standard deviations: that of scipy.ndimage."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    at = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(at.square() / (-2 * sigma**2))
    weights /= weights.sum()
    return filtered(filtered(x, weights[:, None], edge), weights[None], edge)


def gathered(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixel (rows, columns) of each image; both broadcast to [n, H', W'] int64."""
    n, c, _, w = x.shape
    at = rows * w + columns
    flat = at.flatten(1)[:, None].expand(n, c, -1)
    return x.flatten(2).gather(2, flat).view(n, c, *at.shape[1:])


def bilinear(x: Tensor, rows: Tensor, columns: Tensor, edge: str) -> Tensor:
    """Values between pixels; `rows` and `columns` [n, H', W'] float, in pixels."""
    h, w = x.shape[2:]
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    r = [inside(top.long() + step, h, edge) for step in (0, 1)]
    c = [inside(left.long() + step, w, edge) for step in (0, 1)]
    lines = []
    for row in r:
        a, b = (gathered(x, row, column) for column in c)
        lines.append(a * (1 - right) + b * right)
    return lines[0] * (1 - down) + lines[1] * down


def resampled(x: Tensor, dim: int, taps: Taps) -> Tensor:
    """Weighted sums of lines of x along `dim`: pairs of [out] numbers and weights."""
    out, shape = None, [1] * x.ndim
    shape[dim] = -1
    for index, weight in taps:
        term = x.index_select(dim, index.to(x.device)) * weight.to(x.device).view(shape)
        out = term if out is None else out.add_(term)
    return out


def zoomed(x: Tensor, factor: float, dims: tuple[int, int] = (2, 3)) -> Tensor:
    """The middle of the images enlarged by `factor`, of the size of x; linear interpolation.

    Args:
        dims: those of the height and the width.
    """
    for dim in dims:
        taps = _zoom_taps(x.shape[dim], factor)
        x = resampled(x, dim, taps) if taps else x
    return x


@lru_cache(maxsize=256)
def _zoom_taps(size: int, factor: float) -> Taps:
    """Cut ceil(size / factor) lines, spread them over round(lines * factor), keep the middle."""
    lines = math.ceil(size / factor)
    many = round(lines * factor)
    if many == lines:
        return ()
    first = (size - lines) // 2
    at = torch.arange(size, dtype=torch.float64) + (many - size) // 2
    at = at * (lines - 1) / (many - 1)
    low = at.floor().clamp(max=lines - 2)
    part = (at - low).float()
    low = low.long() + first
    return (low, 1 - part), (low + 1, part)


def box_resized(x: Tensor, height: int, width: int) -> Tensor:
    """Each new pixel is the mean of the old ones it covers (nearest when enlarging)."""
    for dim, size in ((2, height), (3, width)):
        x = resampled(x, dim, _box_taps(x.shape[dim], size))
    return x


@lru_cache(maxsize=256)
def _box_taps(size: int, new: int) -> Taps:
    """The pixels whose centres lie in the box around that of the new one, equally weighted."""
    scale = size / new
    half = max(scale, 1.0) / 2
    covered = []
    for i in range(new):
        centre = (i + 0.5) * scale
        near = range(max(int(centre - half), 0), min(int(centre + half) + 1, size))
        covered.append([p for p in near if -half < p + 0.5 - centre <= half])
    most = max(map(len, covered))
    index = torch.tensor([found + found[-1:] * (most - len(found)) for found in covered])
    weight = torch.tensor([[1 / len(f)] * len(f) + [0.0] * (most - len(f)) for f in covered])
    return tuple((index[:, t], weight[:, t]) for t in range(most))


def luma(x: Tensor) -> Tensor:
    """[n, 1, H, W]: the grey of Rec. 601 for images in colour; grey ones as they are."""
    if x.shape[1] == 1:
        return x
    red, green, blue = (x[:, c : c + 1] * weight for c, weight in enumerate(_LUMA))
    return red + green + blue
