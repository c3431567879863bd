"""Blurs of CIFAR-10-C; images [n, C, H, W] in [0, 1]."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from landscape_fast.data._draws import DIRECTIONS, Draws
from landscape_fast.data._pixels import filtered, gathered, gaussian, inside, zoomed


def gaussian_blur(x: Tensor, sigma: float, draws: Draws) -> Tensor:
    """Gaussian filter."""
    return gaussian(x, sigma)


def defocus_blur(x: Tensor, parameters: tuple[float, float], draws: Draws) -> Tensor:
    """The image of a disk of `radius` with soft edges."""
    return filtered(x, _disk(*parameters), "mirror")


def _disk(radius: float, softness: float) -> Tensor:
    """[5, 5]: pixels within `radius`, of sum 1, filtered by a Gaussian of 3 x 3 pixels."""
    at = torch.arange(-2, 3, dtype=torch.float64).square()
    disk = (at[:, None] + at <= radius**2).double()
    side = torch.exp(torch.tensor([-1.0, 0.0, -1.0]).double() / (2 * softness**2))
    side /= side.sum()
    kernel = torch.nn.functional.conv2d(
        disk[None, None], torch.outer(side, side)[None, None], padding=1
    )
    return kernel[0, 0] / disk.sum()


def glass_blur(x: Tensor, parameters: tuple[float, int], draws: Draws) -> Tensor:
    """Gaussian filter, each pixel replaced `times` by itself or a neighbour, and the filter again.

    The neighbours are those above and to the left, and the first two rows and columns stay: the
    authors' code sets out to exchange pixels, but NumPy's views make copies of it.
    """
    sigma, times = parameters
    h, w = x.shape[2:]
    x = gaussian(x, sigma)
    row, column = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    moves = (row > 1) & (column > 1)
    for _ in range(times):
        up, left = (draws.bits(2, h, w) >> 31).mul_(moves).unbind(1)
        x = gathered(x, row - up, column - left)
    return gaussian(x, sigma)


def motion_blur(x: Tensor, parameters: tuple[int, float], draws: Draws) -> Tensor:
    """Blurred along a line at -45 to 45 degrees to the horizontal."""
    return blurred_along(x, *parameters, (-45, 45), draws)


def blurred_along(
    x: Tensor, radius: int, sigma: float, degrees: tuple[int, int], draws: Draws
) -> Tensor:
    """Mean of 2 * `radius` + 1 pixels on one side along a random direction, half-Gaussian weights.

    The rule of ImageMagick's motion blur: nearest pixels, edges repeated.
    """
    h, w = x.shape[2:]
    steps, weights = _line(radius, sigma, degrees)
    steps = steps.to(x.device)[draws.below(DIRECTIONS)]  # [n, taps, 2]
    row, column = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    out = 0
    for t, weight in enumerate(weights):
        rows = inside(row + steps[:, t, 1:], h, "nearest")
        columns = inside(column + steps[:, t, :1], w, "nearest")
        out = gathered(x, rows[:, :, None], columns[:, None]).mul_(weight).add_(out)
    return out


@lru_cache
def _line(radius: int, sigma: float, degrees: tuple[int, int]) -> tuple[Tensor, list[float]]:
    """Steps [DIRECTIONS, taps, (x, y)] and weights; taps below the precision of float32 are cut."""
    i = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = torch.exp(i.square() / (-2 * sigma**2))
    weights /= weights.sum()
    i = i[weights > 2.0**-26]
    low, high = (math.radians(d) for d in degrees)
    angle = low + (high - low) * (torch.arange(DIRECTIONS, dtype=torch.float64) + 0.5) / DIRECTIONS
    unit = torch.stack([angle.cos(), angle.sin()], 1)  # [DIRECTIONS, 2]
    return (i[:, None] * unit[:, None] - 0.5).ceil().long(), weights[: len(i)].tolist()


def zoom_blur(x: Tensor, steps: int, draws: Draws) -> Tensor:
    """Mean of the image and of `steps` enlargements by 1.00, 1.01, 1.02, ..."""
    # pixels of all images and channels side by side are copied at a third of the cost
    x = x.permute(2, 3, 0, 1).contiguous()
    total = x + x  # the image itself, and an enlargement by 1
    for step in range(1, steps):
        total += zoomed(x, 1 + step / 100, (0, 1))
    return total.div_(steps + 1).permute(2, 3, 0, 1)
