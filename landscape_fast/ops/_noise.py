"""Counter-based noise in plain PyTorch: the definition that the kernels follow.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by the seed.
The counter holds element // 4 (low and high word), the member and the stream; a call gives the
words of four neighbouring elements. There is no state, so that no order of evaluation, number of
members or device changes a value.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NORMALS, UNIFORMS = 0, 1  # streams: Gaussian numbers, masks
WORDS = 4  # elements per call
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words of output from four of counter and two of key, all int64."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        left, left_high = _product(a, 0xD2511F53)
        right, right_high = _product(c, 0xCD9E8D57)
        a, b, c, d = right_high ^ b ^ k0, right, left_high ^ d ^ k1, left
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [a, b, c, d]


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Low and high word of x * factor, for a factor of 2^31 or more: x * (factor - 2^32) fits."""
    product = x * (factor - 2**32)
    return product & _LOW, ((product >> 32) + x) & _LOW


def words(seed: Tensor, first_member: int, members: int, P: int, stream: int) -> Tensor:
    """[members, P] int64 in [0, 2^32): one word per element. `seed` is 0-dim int64."""
    device = seed.device
    quads = torch.arange(-(-P // WORDS), device=device)
    member = torch.arange(members, device=device)[:, None] + first_member
    counter = (quads & _LOW, quads >> 32, member, torch.full_like(member, stream))
    drawn = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    return torch.stack(drawn, -1).flatten(1)[:, :P]


def normals(seed: Tensor, first_member: int, members: int, P: int, dtype: torch.dtype) -> Tensor:
    """[members, P] standard normal numbers, computed in `dtype` (Box and Muller 1958).

    Elements 2 i and 2 i + 1 share the radius sqrt(-2 ln((x + 1/2) / 2^32)), x the word of the
    first, and the angle 2 pi x / 2^32, x the word of the second.
    """
    drawn = words(seed, first_member, members, P + P % 2, NORMALS)
    x, turn = drawn[:, ::2], drawn[:, 1::2]
    near_0, near_1 = ((n.to(dtype) + 0.5) * 2.0**-32 for n in (x, _LOW - x))
    radius = torch.where(x < 2**31, near_0.log(), (-near_1).log1p()).mul(-2).sqrt()
    angle = torch.where(turn < 2**31, turn, turn - 2**32).to(dtype) * (math.pi * 2.0**-31)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return pairs.flatten(1)[:, :P]


def kept(seed: Tensor, first_member: int, dropout: Tensor, P: int) -> Tensor:
    """[members, P] bool: whether element p of member m stays, dropped with chance dropout[m].

    The chance is rounded to float32; the first 24 bits of a word then decide, exactly.
    """
    drawn = words(seed, first_member, dropout.shape[0], P, UNIFORMS)
    return (drawn >> 8).double() >= dropout.float().double()[:, None] * 2.0**24
