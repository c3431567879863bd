"""The light on drops of water: distance from their outlines, equalised and embossed.

The steps and constants of the authors' code for `spatter`, where OpenCV works on bytes. Two differ:
outlines need no hysteresis (a weak edge is one only if it is strong), and distances are exact where
OpenCV approximates them.
"""

import torch
from torch import Tensor

from landscape_fast.data._pixels import filtered, inside

_FAR = 20  # pixels, where distances are cut off
_EDGE = 150  # the least |d/dx| + |d/dy| of the Sobel filters at an outline
_EMBOSS = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))
_MEAN = torch.full((3, 3), 1 / 9, dtype=torch.float64)


def emboss_of_drops(layer: Tensor) -> Tensor:
    """[n, 1, H, W] in [0, 1] from the thickness of the liquid; 0 where there is none."""
    layer = (layer * 255).floor().clamp_(0, 255)
    distance = _distance(_outlines(layer))
    distance = filtered(distance, _MEAN, "mirror").floor()
    embossed = filtered(_equalised(distance), torch.tensor(_EMBOSS).double(), "mirror")
    light = filtered(embossed.clamp_(0, 255), _MEAN, "mirror").round()
    light = light * layer
    most = light.amax((2, 3), keepdim=True)
    return torch.where(most > 0, light / most, 0.0)


def _outlines(layer: Tensor) -> Tensor:
    """Where the slope is steep and not less than on both sides along its direction (Canny)."""
    smooth, slope = torch.tensor([1.0, 2, 1]).double(), torch.tensor([-1.0, 0, 1]).double()
    right = filtered(layer, torch.outer(smooth, slope), "nearest")
    down = filtered(layer, torch.outer(slope, smooth), "nearest")
    steep = right.abs() + down.abs()
    h, w = layer.shape[2:]
    padded = torch.nn.functional.pad(steep, (1, 1, 1, 1))

    def at(dy: int, dx: int) -> Tensor:
        return padded[:, :, 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]

    flat = down.abs() <= right.abs() * 0.4142135  # tangents of 22.5 and 67.5 degrees
    upright = down.abs() >= right.abs() * 2.4142135
    falling = (right < 0) == (down < 0)
    top = torch.where(
        flat,
        (steep > at(0, -1)) & (steep >= at(0, 1)),
        torch.where(
            upright,
            (steep > at(-1, 0)) & (steep >= at(1, 0)),
            torch.where(
                falling,
                (steep > at(-1, -1)) & (steep > at(1, 1)),
                (steep > at(-1, 1)) & (steep > at(1, -1)),
            ),
        ),
    )
    return top & (steep > _EDGE)


def _distance(outlines: Tensor) -> Tensor:
    """Euclidean distance to the nearest outline, at most `_FAR`: along rows, then down columns."""
    square = torch.where(outlines, 0.0, float(_FAR**2))
    for dim in (3, 2):
        size = square.shape[dim]
        at = torch.arange(size, device=square.device)
        best = square
        for step in range(1, min(_FAR, size)):
            for side in (-step, step):
                # Beyond the edge it is the line at the edge again, from farther away than it is,
                # so the minimum does not change.
                line = square.index_select(dim, inside(at + side, size, "nearest"))
                best = torch.minimum(best, line + step**2)
        square = best
    return square.clamp(max=_FAR**2).sqrt()


def _equalised(distance: Tensor) -> Tensor:
    """Whole numbers from 0 to `_FAR`, mapped to 0 to 255 so that all are about equally frequent."""
    level = distance.long().flatten(1)
    counts = torch.zeros(len(level), _FAR + 1, dtype=torch.int64, device=level.device)
    counts.scatter_add_(1, level, torch.ones_like(level))
    least = (counts > 0).int().argmax(1, keepdim=True)
    first = counts.gather(1, least)
    others = level.shape[1] - first
    risen = (counts.cumsum(1) - first).clamp_(min=0)
    scaled = (risen.float() * (255 / others.clamp(min=1).float())).round()
    scaled = torch.where(others > 0, scaled, least.float())  # all alike: left as it is
    return scaled.gather(1, level).view_as(distance)
