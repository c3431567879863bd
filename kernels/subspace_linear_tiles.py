"""Which tiles the subspace_linear kernels use: data, and the rules that choose among them.

Every configuration compiles without spills for its architecture (tests/test_aot.py). None has been
timed: tile sizes follow register and shared-memory budgets; `RATES` are estimates.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

from ._launch import Config
from .batch_ensemble_linear_tiles import quickest, usable

STAGES = ("product", "mixed", "weight")  # y and dx of own weights, of mixed ones; dweight
MOST_ANCHORS = 4  # that are mixed inside a kernel

# Estimated share of the best rate that a tile of this size reaches on a full GPU.
RATES = {"large": 1.0, "medium": 0.85, "small": 0.7, "tiny": 0.5, "skinny": 0.15}


def _rows(b, o, i, warps, stages, tma=False):
    return Config({"BLOCK_B": b, "BLOCK_O": o, "BLOCK_I": i, "GROUP": 8}, warps, stages, tma)


_POINTERS = {  # any strides
    "product half medium": _rows(128, 128, 64, 8, 3),
    "product half small": _rows(64, 128, 64, 4, 3),
    "product half tiny": _rows(64, 64, 64, 4, 3),
    "product half skinny": _rows(16, 64, 128, 4, 3),
    "product tf32 medium": _rows(128, 128, 32, 8, 3),
    "product tf32 tiny": _rows(64, 64, 32, 4, 3),
    "product tf32 skinny": _rows(16, 64, 64, 4, 3),
    "product ieee medium": _rows(128, 64, 32, 8, 3),
    "product ieee tiny": _rows(64, 64, 32, 4, 3),
    "product ieee skinny": _rows(16, 64, 32, 4, 3),
    "mixed half medium": _rows(128, 64, 32, 8, 3),
    "mixed half tiny": _rows(64, 64, 32, 4, 3),
    "mixed half skinny": _rows(16, 64, 32, 4, 3),
    "mixed tf32 medium": _rows(128, 64, 32, 8, 2),
    "mixed tf32 tiny": _rows(64, 64, 32, 4, 3),
    "mixed tf32 skinny": _rows(16, 64, 32, 4, 3),
    "mixed ieee tiny": _rows(64, 64, 16, 8, 3),
    "mixed ieee skinny": _rows(16, 64, 16, 4, 3),
    "weight half medium": _rows(32, 128, 128, 8, 3),
    "weight half tiny": _rows(32, 64, 64, 4, 3),
    "weight tf32 tiny": _rows(32, 64, 64, 4, 3),
    "weight ieee tiny": _rows(16, 64, 64, 8, 3),
}
_DESCRIPTORS = {  # unit stride along features and 16-byte aligned rows; Hopper and later
    "product half medium tma": _rows(128, 128, 64, 8, 4, True),
    "product half small tma": _rows(64, 128, 64, 4, 4, True),
    "product half tiny tma": _rows(64, 64, 64, 4, 4, True),
    "product tf32 medium tma": _rows(128, 128, 32, 8, 3, True),
    "product tf32 tiny tma": _rows(64, 64, 32, 4, 3, True),
    "mixed half medium tma": _rows(128, 64, 64, 8, 2, True),
    "mixed half tiny tma": _rows(64, 64, 64, 8, 2, True),
    "weight half medium tma": _rows(64, 128, 128, 8, 4, True),
    "weight half tiny tma": _rows(64, 64, 64, 4, 4, True),
    "weight tf32 tiny tma": _rows(32, 64, 64, 4, 3, True),
}
_TABLES = {80: _POINTERS, 90: _POINTERS | _DESCRIPTORS, 100: _POINTERS | _DESCRIPTORS}
SHIPPED: dict[tuple[int, str], Config] = {
    (a, bucket): config for a, table in _TABLES.items() for bucket, config in table.items()
}


class Sizes(NamedTuple):
    """Of one product: M members, B examples, sums over I, O outputs."""

    M: int
    B: int
    I: int
    O: int


@lru_cache
def buckets(arch: int, stage: str, kind: str, tma: bool) -> tuple[tuple[float, Config], ...]:
    """(rate, configuration) of the shipped buckets of a stage."""
    found = usable(SHIPPED, RATES, arch, stage, kind, False)
    if not tma:
        return found
    described = usable(SHIPPED, RATES, arch, stage, kind, True)
    # tiles for few examples are read through pointers where the others are not
    few = [f for f in found if f[1].tiles["BLOCK_B"] == 16 and stage != "weight"]
    return (*described, *[f for f in few if f not in described])


@lru_cache(4096)
def product_config(stage: str, kind: str, tma: bool, arch: int, sms: int, sizes: Sizes) -> Config:
    """The configuration for y or dx on a GPU with `sms` multiprocessors."""
    M, B, _, O = sizes

    def work(c: Config) -> float:
        area = c.tiles["BLOCK_B"] * c.tiles["BLOCK_O"]
        return ceil(product_programs(c, M, B, O) / sms) * area

    return quickest(buckets(arch, stage, kind, tma), work)


def product_programs(config: Config, M: int, B: int, O: int) -> int:
    """Programs of the kernel for y and dx."""
    return M * ceil(B / config.tiles["BLOCK_B"]) * ceil(O / config.tiles["BLOCK_O"])


@lru_cache(4096)
def weight_config(kind: str, tma: bool, arch: int, sms: int, sizes: Sizes) -> Config:
    """The configuration for dweight."""

    def work(c: Config) -> float:
        area = c.tiles["BLOCK_O"] * c.tiles["BLOCK_I"]
        tiles = weight_tiles(c, sizes)
        splits, examples = weight_split(c, sms, sizes)
        return ceil(tiles * splits / sms) * area * examples

    return quickest(buckets(arch, "weight", kind, tma), work)


def weight_tiles(config: Config, sizes: Sizes) -> int:
    """Tiles of dweight [M, O, I]."""
    M, _, I, O = sizes
    return M * ceil(O / config.tiles["BLOCK_O"]) * ceil(I / config.tiles["BLOCK_I"])


def weight_split(config: Config, sms: int, sizes: Sizes) -> tuple[int, int]:
    """(splits of the sum over B, examples of each): only where tiles leave processors idle."""
    block_b, B = config.tiles["BLOCK_B"], sizes.B
    steps = ceil(B / block_b)
    wanted = max(1, min(sms // weight_tiles(config, sizes), steps // 4))
    examples = ceil(steps / wanted) * block_b
    return ceil(B / examples), examples
