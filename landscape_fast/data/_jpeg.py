"""Baseline JPEG without its entropy coding, which loses nothing: what a decoder would show.

Integers as in libjpeg (colours in 16 fractional bits, the 8-point transform of Loeffler, Ligtenberg
and Moschytz, 4:2:0 chroma with triangle interpolation), so the pixels are those of PIL.

Source: ITU-T T.81 (1992), annexes A and K; Loeffler et al. 1989, figure 1; JFIF 1.02, section 7.
"""

from functools import lru_cache

import torch
from torch import Tensor

from landscape_fast.data._pixels import inside

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMA = (
    (17, 18, 24, 47),
    (18, 21, 26, 66),
    (24, 26, 56, 99),
    (47, 66, 99, 99),
)  # fmt: skip  (the rest is 99)
_BITS, _EXTRA = 13, 2  # fractional bits of the constants, and of the values between two passes


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Pixels [n, C, H, W], int32 from 0 to 255, after JPEG at a quality from 1 to 100."""
    h, w = pixels.shape[2:]
    if pixels.shape[1] == 1:
        return _coded(pixels, quality, False)
    y, chroma = _to_luma_chroma(pixels)
    wide = _repeated(_repeated(chroma, 2, 2), 3, 16)
    # Four pixels are added with 1 and 2 in turn for rounding, so that it has no direction.
    bias = torch.arange(wide.shape[3] // 2, device=pixels.device, dtype=torch.int32) % 2 + 1
    left, right = wide[..., ::2], wide[..., 1::2]
    both = left + right
    half = (both[:, :, ::2] + both[:, :, 1::2] + bias) >> 2
    half = _coded(half, quality, True)[..., : (w + 1) // 2]
    return _to_colours(_coded(y, quality, False), _doubled(half)[..., :h, :w])


def _to_luma_chroma(pixels: Tensor) -> tuple[Tensor, Tensor]:
    red, green, blue = pixels.split(1, 1)
    y = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    centre = (128 << 16) + 32767
    cb = (-11059 * red - 21709 * green + 32768 * blue + centre) >> 16
    cr = (32768 * red - 27439 * green - 5329 * blue + centre) >> 16
    return y, torch.cat([cb, cr], 1)


def _to_colours(y: Tensor, chroma: Tensor) -> Tensor:
    cb, cr = (chroma - 128).split(1, 1)
    red = y + ((91881 * cr + 32768) >> 16)
    green = y + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = y + ((116130 * cb + 32768) >> 16)
    return torch.cat([red, green, blue], 1).clamp_(0, 255)


def _repeated(x: Tensor, dim: int, multiple: int) -> Tensor:
    """The last line repeated up to a multiple."""
    size = x.shape[dim]
    full = -(-size // multiple) * multiple
    if full == size:
        return x
    return x.index_select(dim, inside(torch.arange(full, device=x.device), size, "nearest"))


def _doubled(x: Tensor) -> Tensor:
    """Twice the height and width: a new pixel is 9, 3, 3 and 1 sixteenths of the four nearest."""
    n, c, h, w = x.shape
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    out = x.new_empty(n, c, h, 2, w, 2)
    for i, step in enumerate((-1, 1)):
        lines = 3 * x + x.index_select(2, inside(rows + step, h, "nearest"))
        for j, (side, rounding) in enumerate(((-1, 8), (1, 7))):
            near = lines.index_select(3, inside(columns + side, w, "nearest"))
            out[:, :, :, i, :, j] = (3 * lines + near + rounding) >> 4
    return out.view(n, c, 2 * h, 2 * w)


def _coded(x: Tensor, quality: int, chroma: bool) -> Tensor:
    """One plane or more, transformed, quantised and back."""
    n, c, h, w = x.shape
    x = _repeated(_repeated(x, 2, 8), 3, 8) - 128
    tall, wide = x.shape[2] // 8, x.shape[3] // 8
    # [8, 8, n, c, tall, wide]: rows and columns of the blocks first, so that lines are contiguous
    x = x.view(n, c, tall, 8, wide, 8).permute(3, 5, 0, 1, 2, 4).contiguous()
    x = torch.stack(_forward(x.unbind(1), _BITS - _EXTRA, -_EXTRA), 1)
    x = torch.stack(_forward(x.unbind(0), _BITS + _EXTRA, _EXTRA))
    table = _table(quality, chroma, x.device).view(8, 8, 1, 1, 1, 1)
    divisor = 8 * table  # the transform is eight times the true one
    steps = torch.div(x.abs() + divisor // 2, divisor, rounding_mode="floor")
    x = x.sign() * steps * table
    x = torch.stack(_inverse(x.unbind(0), _BITS - _EXTRA))
    x = torch.stack(_inverse(x.unbind(1), _BITS + _EXTRA + 3), 1)
    x = (x + 128).clamp_(0, 255)
    x = x.permute(2, 3, 4, 0, 5, 1).reshape(n, c, 8 * tall, 8 * wide)
    return x[:, :, :h, :w]


@lru_cache
def _table(quality: int, chroma: bool, device: torch.device) -> Tensor:
    """[8, 8] int32: steps of annex K, scaled as libjpeg does."""
    base = torch.full((8, 8), 99, dtype=torch.int32)
    if chroma:
        base[:4, :4] = torch.tensor(_CHROMA)
    else:
        base[:] = torch.tensor(_LUMA)
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((base * percent + 50) // 100).clamp(1, 255).to(device)


def _rounded(x: Tensor, bits: int) -> Tensor:
    return (x + (1 << bits - 1)) >> bits


def _forward(x, bits: int, even_bits: int) -> list[Tensor]:
    """The 8-point DCT of eight lines; products lose `bits`, sums `even_bits` (gain if negative)."""
    add = [x[i] + x[7 - i] for i in range(4)]
    odd = [x[i] - x[7 - i] for i in range(4)]
    outer, inner = add[0] + add[3], add[1] + add[2]
    last, middle = add[0] - add[3], add[1] - add[2]
    out = [None] * 8
    for k, total in ((0, outer + inner), (4, outer - inner)):
        out[k] = total << -even_bits if even_bits < 0 else _rounded(total, even_bits)
    z = (middle + last) * 4433
    out[2], out[6] = _rounded(z + last * 6270, bits), _rounded(z - middle * 15137, bits)
    for k, value in zip((7, 5, 3, 1), _odd(*odd[::-1]), strict=True):
        out[k] = _rounded(value, bits)
    return out


def _inverse(x, bits: int) -> list[Tensor]:
    """The inverse of eight lines; everything loses `bits`."""
    z = (x[2] + x[6]) * 4433
    outer, inner = z + x[2] * 6270, z - x[6] * 15137
    total, difference = (x[0] + x[4]) << _BITS, (x[0] - x[4]) << _BITS
    even = [total + outer, difference + inner, difference - inner, total - outer]
    odd = _odd(x[7], x[5], x[3], x[1])[::-1]
    first = [_rounded(e + o, bits) for e, o in zip(even, odd, strict=True)]
    second = [_rounded(e - o, bits) for e, o in zip(even, odd, strict=True)]
    return first + second[::-1]


def _odd(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    """The odd half, the same both ways: two rotations and their mixture, 13 fractional bits."""
    z5 = (a + c + b + d) * 9633
    z1, z2 = (a + d) * -7373, (b + c) * -20995
    z3, z4 = z5 - (a + c) * 16069, z5 - (b + d) * 3196
    return [
        a * 2446 + z1 + z3,
        b * 16819 + z2 + z4,
        c * 25172 + z2 + z3,
        d * 12299 + z1 + z4,
    ]
