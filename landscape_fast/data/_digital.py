"""Corruptions of colour, contrast and resolution; images [n, C, H, W] in [0, 1]."""

import torch
from torch import Tensor

from landscape_fast.data._draws import Draws
from landscape_fast.data._jpeg import jpeg
from landscape_fast.data._pixels import bilinear, box_resized, gaussian

_FIXED = 1 << 24


def brightness(x: Tensor, added: float, draws: Draws) -> Tensor:
    """Adds to the value of HSV, hue and saturation kept; black has neither and becomes grey."""
    value = x.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, x * (brighter / value), brighter)


def contrast(x: Tensor, factor: float, draws: Draws) -> Tensor:
    """Distances from the mean of each channel, times `factor`."""
    # The sum of multiples of 2^-24 is exact in int64, so its bits do not depend on its order.
    total = (x * _FIXED).round().long().sum((2, 3), keepdim=True)
    mean = (total.double() / (_FIXED * x[0, 0].numel())).float()
    return (x - mean) * factor + mean


def saturate(x: Tensor, parameters: tuple[float, float], draws: Draws) -> Tensor:
    """Saturation s of HSV becomes factor * s + added; hue and value are kept.

    Grey has no hue; it is taken as red, as in the published arrays.
    """
    factor, added = parameters
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = value - least
    old = torch.where(value > 0, spread / value, 0.0)
    new = (old * factor + added).clamp(0, 1)
    away = torch.where(
        spread > 0, (value - x) / spread, x.new_tensor([0.0, 1.0, 1.0]).view(3, 1, 1)
    )
    return value * (1 - away * new)


def pixelate(x: Tensor, share: float, draws: Draws) -> Tensor:
    """Box-filtered to a share of the height and width and back."""
    h, w = x.shape[2:]
    return box_resized(box_resized(x, int(h * share), int(w * share)), h, w)


def jpeg_compression(x: Tensor, quality: int, draws: Draws) -> Tensor:
    """Values to the nearest byte, JPEG with 4:2:0 chroma, and back."""
    return jpeg((x * 255).round().int(), quality).float().div_(255)


def elastic_transform(x: Tensor, parameters: tuple, draws: Draws) -> Tensor:
    """A random affine map, then a smooth random displacement of every pixel.

    `parameters`: size of the displacement, its smoothness, and how far each of three corners moves,
    all as shares of the smaller side.
    """
    h, w = x.shape[2:]
    far, smooth, corner = (share * min(h, w) for share in parameters)
    x = _affine(x, draws.uniform(3, 2) * (2 * corner) - corner)
    field = draws.uniform(2, h, w) * 2 - 1
    if not far:
        return x
    field = gaussian(field, smooth, "reflect", 3.0) * far
    rows = torch.arange(h, device=x.device)[:, None] + field[:, 1]
    columns = torch.arange(w, device=x.device) + field[:, 0]
    return bilinear(x, rows, columns, "reflect")


def _affine(x: Tensor, moves: Tensor) -> Tensor:
    """The affine map that moves three corners of a middle square by `moves` [n, 3, (x, y)]."""
    h, w = x.shape[2:]
    side = min(h, w) // 3
    middle = torch.tensor([w // 2, h // 2], dtype=torch.float32, device=x.device)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], device=x.device)
    goal = moves + (middle + side * signs)
    along_x = (goal[:, 1] - goal[:, 2]) / (2 * side)  # [n, 2], where a step to the right leads
    along_y = (goal[:, 0] - goal[:, 1]) / (2 * side)
    a, b, c, d = along_x[:, 0], along_y[:, 0], along_x[:, 1], along_y[:, 1]
    origin = goal[:, 2] - along_x * (middle[0] - side) - along_y * (middle[1] - side)
    determinant = a * d - b * c
    a, b, c, d, x0, y0 = (v[:, None, None] for v in (a, b, c, d, origin[:, 0], origin[:, 1]))
    determinant = determinant[:, None, None]
    dx = torch.arange(w, device=x.device) - x0
    dy = torch.arange(h, device=x.device)[:, None] - y0
    return bilinear(x, (a * dy - c * dx) / determinant, (d * dx - b * dy) / determinant, "mirror")
