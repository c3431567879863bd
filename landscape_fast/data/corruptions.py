"""The corruptions of CIFAR-10-C, made anew from any images."""

import torch
from torch import Tensor

from landscape_fast.data import _blurs, _digital, _noise, _weather
from landscape_fast.data._checks import check_images, check_severity, need, positions
from landscape_fast.data._draws import Draws
from landscape_fast.data._pixels import chunks

# name: (function, parameters of severities 1 to 5), those of the authors' code for 32 x 32 images.
_TABLE = {
    "gaussian_noise": (_noise.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_noise.shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_noise.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (_noise.speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_blurs.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (
        _blurs.defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": (_blurs.glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (_blurs.motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom_blur": (_blurs.zoom_blur, (7, 12, 16, 21, 26)),
    "snow": (
        _weather.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (_weather.frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (_weather.fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_digital.brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_digital.contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        _digital.elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_digital.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_digital.jpeg_compression, (80, 65, 58, 50, 40)),
    "spatter": (
        _weather.spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
    "saturate": (_digital.saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
CORRUPTIONS = tuple(_TABLE)
_COLOUR = ("saturate",)


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    levels: bool = False,
) -> Tensor:
    """Images with one of the corruptions of CIFAR-10-C.

    Args:
        images: [N, C, H, W] float32 in [0, 1], of 1 or 3 channels and at least 8 x 8 pixels.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the random numbers. An image has the same ones at every severity.
        index: [N] int64, the position of each image in its data set; 0, 1, ... by default. The
            random numbers of an image depend on `seed`, `name` and this alone, so that a part of a
            data set, with its positions, gives the same bits as the whole.
        levels: cut off values to multiples of 1/255, as the published arrays of bytes are.

    Returns:
        [N, C, H, W] float32 in [0, 1], on the device of `images`.

    Raises:
        ValueError: if an argument is not as said, or "saturate" meets images without colour.

    Cost: from 7 elementwise operations per value (brightness) to 270 (zoom_blur at severity 5), in
    chunks of 2^18 values; no loop over images.

    Source: Hendrycks & Dietterich 2019 (arXiv:1903.12261), section 3 and appendices A and B; the
    parameters are those of the authors' make_cifar_c.py for 32 x 32 pixels. Lengths stay so many
    pixels in images of another size, except for the zoom, the elastic field and the pixelation,
    which are shares of the side. What their code takes from other libraries is written anew: JPEG
    gives the pixels of libjpeg, motion blur follows the rule of ImageMagick, a texture replaces the
    photographs of frost, and outlines of water drops are found without OpenCV. Distances from the
    clean image rise with severity, except where the parameters trade one change for another:
    elastic_transform, frost, glass_blur, motion_blur (3 and 4 are all but the same), saturate (1
    and 2 take colour away, 3 to 5 add some) and spatter (water to 3, then mud).

    Example:
        >>> x = torch.full((2, 3, 32, 32), 0.5)
        >>> noisy = corrupt(x, "gaussian_noise", 5)
        >>> round(float((noisy - x).std()), 2)
        0.1
        >>> second = corrupt(x[1:], "gaussian_noise", 5, index=torch.tensor([1]))
        >>> torch.equal(second, noisy[1:])
        True
    """
    _check(images, name, severity)
    index = positions("corrupt", images, index)
    change, parameters = _TABLE[name]
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for x, at, place in chunks(images, index, out):
        changed = change(x.contiguous(), parameters[severity - 1], Draws(seed, name, at))
        place.copy_(changed.clamp_(0, 1))
        if levels:
            # k / 255 * 255 may fall short of k by a rounding of float32; 2^-10 makes up for it.
            place.mul_(255).add_(2.0**-10).floor_().div_(255)
    return out


def _check(images: Tensor, name: str, severity: int) -> None:
    need(name in _TABLE, "corrupt", "name", f"one of {', '.join(CORRUPTIONS)}", repr(name))
    check_severity("corrupt", severity)
    check_images("corrupt", images)
    colour = name not in _COLOUR or images.shape[1] == 3
    need(colour, "corrupt", "images", f"in colour for {name}", list(images.shape))
