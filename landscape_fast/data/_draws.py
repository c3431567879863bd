"""Random numbers that belong to an image, not to a batch: a counter-based hash in plain torch.

What is drawn for an image depends on the seed, the purpose and the position of the image in its
data set alone, so a part of the images, or other batches of them, give the same bits. Normal and
Poisson numbers and directions come out of tables, whose entries do not depend on how a processor
vectorises a logarithm.
"""

import math
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

_32 = 0xFFFFFFFF
_NORMALS = 1 << 16
DIRECTIONS = 4096


class Draws:
    """Random numbers for some images of a data set; each call draws new ones.

    Args:
        seed: any integer.
        purpose: a name; another name gives other numbers.
        index: [n] int64, the positions of the images in their data set, from 0.
    """

    def __init__(self, seed: int, purpose: str, index: Tensor):
        salt = _mixed((seed & _32) ^ _mixed((seed >> 32 & _32) ^ crc32(purpose.encode())))
        low, high = index & _32, index >> 32 & _32
        self._first = _mixed(_mixed(low ^ salt) ^ high)
        self._second = _mixed(_mixed(low ^ _mixed(salt ^ 0x9E3779B9)) ^ high)
        self._used = 0
        self.count, self.device = len(index), index.device

    def bits(self, *shape: int) -> Tensor:
        """[n, *shape] int64, uniform over 32 bits."""
        count = math.prod(shape)
        counter = torch.arange(self._used, self._used + count, device=self.device)
        self._used += count
        mixed = _mixed(_mixed(counter ^ self._first[:, None]) ^ self._second[:, None])
        return mixed.view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """[n, *shape] float32 in [0, 1), multiples of 2^-24."""
        return (self.bits(*shape) >> 8).float() * 2.0**-24

    def normal(self, *shape: int) -> Tensor:
        """[n, *shape] float32: one of 65,536 equally likely quantiles, of variance 1."""
        at = self.bits(*shape) >> 16
        return _quantiles(at.device).index_select(0, at.flatten()).view_as(at)

    def poisson(self, x: Tensor, top: float) -> Tensor:
        """Poisson numbers of mean `top` * x, in float32, for x [n, ...] in multiples of 1/255.

        By inversion: the least count whose cumulative probability exceeds a uniform number of 32
        bits.
        """
        level = (x * 255).round().long()
        table = _cumulative(top, x.device)
        u = (self.bits(*x.shape[1:]).double() + 0.5) * 2.0**-32
        at = torch.searchsorted(table.flatten(), u + level, right=True)
        return (at - level * table.shape[1]).float()

    def below(self, count: int) -> Tensor:
        """[n] int64 from 0 to `count` - 1; the bias is below `count` / 2^32."""
        return self.bits() * count >> 32


def _mixed(x):
    """A bijection of 32 bits (an int or an int64 tensor) that changes half of them, on average,
    for each one changed; the multipliers are below 2^31, so no product overflows int64.

    Source: C. Wellons, "Prospecting for hash functions" (2018), its search by least bias.
    """
    x = (x ^ x >> 16) * 0x21F0AAAD & _32
    x = (x ^ x >> 15) * 0x735A2D97 & _32
    return x ^ x >> 15


@lru_cache
def _quantiles(device: torch.device) -> Tensor:
    middle = (torch.arange(_NORMALS, dtype=torch.float64) + 0.5) / _NORMALS
    z = torch.special.ndtri(middle)
    return (z / z.square().mean().sqrt()).float().to(device)


@lru_cache
def _cumulative(top: float, device: torch.device) -> Tensor:
    """[256, K] float64: level + P(Poisson(top * level / 255) <= k), rising from row to row."""
    level = torch.arange(256, dtype=torch.float64)[:, None]
    k = torch.arange(math.ceil(top + 10 * math.sqrt(top)), dtype=torch.float64)
    below = torch.special.gammaincc((k + 1).expand(256, -1), (level * top / 255).expand(-1, len(k)))
    return (level + below).to(device)
