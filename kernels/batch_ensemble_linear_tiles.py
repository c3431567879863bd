"""Which tiles the batch_ensemble_linear kernels use: data, and the rules that choose among them.

Every configuration compiles without spills for its architecture (tests/test_aot.py). None has been
timed: tile sizes follow register and shared-memory budgets; `RATES` and `PART_COST` are estimates.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch

from ._launch import Config, arch, multiprocessors

STAGES = ("fwd", "x", "x shared", "weight", "weight+r")  # dx, dx of a shared x, dweight, + dr
KINDS = ("half", "tf32", "ieee")  # 16-bit inputs; float32 multiplied as tf32; float32 exactly
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of the largest chip; real devices are asked

# Estimated share of the best rate that a tile of this size reaches on a full GPU.
RATES = {"large": 1.0, "medium": 0.85, "small": 0.7, "tiny": 0.5, "folded": 0.4, "skinny": 0.12}

# Multiply-adds in whose time a multiprocessor writes and reads one float32 part: 8 bytes through
# L2, taken at 8 TB/s, against 790 TFLOP/s of products (H200).
PART_COST = 400


def _fwd(b, o, i, warps, stages, tma=False, folded=False):
    blocks = {"BLOCK_B": b, "BLOCK_O": o, "BLOCK_I": i, "GROUP": 8, "FOLDED": folded}
    return Config(blocks, warps, stages, tma)


def _x(b, i, o, warps, stages, tma=False):
    return Config({"BLOCK_B": b, "BLOCK_I": i, "BLOCK_O": o, "GROUP": 8}, warps, stages, tma)


def _weight(o, i, b, warps, stages, tma=False):
    return Config({"BLOCK_O": o, "BLOCK_I": i, "BLOCK_B": b, "GROUP": 8}, warps, stages, tma)


_POINTERS = {  # any strides
    "fwd half medium": _fwd(128, 128, 64, 8, 3),
    "fwd half small": _fwd(64, 128, 64, 4, 3),
    "fwd half tiny": _fwd(64, 64, 64, 4, 3),
    "fwd half folded": _fwd(64, 64, 64, 4, 3, folded=True),
    "fwd half skinny": _fwd(16, 64, 128, 4, 4, folded=True),
    "fwd tf32 medium": _fwd(128, 128, 32, 8, 3),
    "fwd tf32 tiny": _fwd(64, 64, 32, 4, 3),
    "fwd tf32 skinny": _fwd(16, 64, 64, 4, 3, folded=True),
    "fwd ieee medium": _fwd(128, 64, 32, 8, 3),
    "fwd ieee tiny": _fwd(64, 64, 32, 4, 3),
    "fwd ieee skinny": _fwd(16, 64, 32, 4, 3, folded=True),
    "x half medium": _x(128, 128, 64, 8, 3),
    "x half small": _x(64, 128, 32, 4, 4),
    "x tf32 small": _x(64, 128, 32, 8, 3),
    "x ieee tiny": _x(64, 64, 32, 4, 3),
    "x shared half small": _x(64, 128, 32, 8, 4),
    "x shared tf32 tiny": _x(64, 64, 16, 8, 3),
    "x shared ieee tiny": _x(64, 32, 32, 8, 3),
    "weight half small": _weight(128, 64, 32, 8, 3),
    "weight half tiny": _weight(64, 64, 32, 8, 3),
    "weight tf32 tiny": _weight(64, 64, 16, 8, 3),
    "weight ieee tiny": _weight(64, 64, 16, 8, 3),
    "weight+r half small": _weight(128, 64, 32, 8, 3),
    "weight+r half tiny": _weight(64, 64, 32, 8, 3),
    "weight+r tf32 tiny": _weight(64, 64, 16, 8, 3),
    "weight+r ieee tiny": _weight(64, 64, 16, 8, 3),
}
_DESCRIPTORS = {  # unit stride along features and 16-byte aligned rows; Hopper and later
    "fwd half medium tma": _fwd(128, 128, 64, 8, 4, True),
    "fwd half small tma": _fwd(64, 128, 64, 4, 4, True),
    "fwd half tiny tma": _fwd(64, 64, 64, 4, 4, True),
    "fwd tf32 medium tma": _fwd(128, 128, 32, 8, 3, True),
    "fwd tf32 tiny tma": _fwd(64, 64, 32, 4, 3, True),
    "x half medium tma": _x(128, 128, 64, 8, 4, True),
    "x half small tma": _x(64, 128, 64, 4, 4, True),
    "x half tiny tma": _x(64, 64, 64, 8, 4, True),
    "x tf32 medium tma": _x(128, 128, 32, 8, 3, True),
    "x tf32 tiny tma": _x(64, 64, 32, 4, 3, True),
    "x shared half medium tma": _x(128, 128, 64, 8, 4, True),
    "x shared half tiny tma": _x(64, 64, 64, 4, 4, True),
    "weight half medium tma": _weight(128, 128, 64, 8, 4, True),
    "weight half small tma": _weight(64, 128, 64, 4, 3, True),
    "weight half tiny tma": _weight(64, 64, 64, 4, 4, True),
    "weight tf32 small tma": _weight(64, 128, 32, 8, 3, True),
    "weight+r half small tma": _weight(64, 128, 64, 8, 4, True),
    "weight+r half tiny tma": _weight(64, 64, 64, 4, 4, True),
}
_HOPPER = {  # 128 x 256 accumulators; on Blackwell these two spill
    "fwd half large tma": _fwd(128, 256, 64, 8, 3, True),
    "x half large tma": _x(128, 256, 64, 8, 3, True),
}
_TABLES = {
    80: _POINTERS,
    90: _POINTERS | _DESCRIPTORS | _HOPPER,
    100: _POINTERS | _DESCRIPTORS,
}
SHIPPED: dict[tuple[int, str], Config] = {
    (a, bucket): config for a, table in _TABLES.items() for bucket, config in table.items()
}


class Split(NamedTuple):
    """How the weight gradient's sum over members and examples is shared out among programs."""

    members: int  # members per split
    examples: int  # examples per split, a multiple of BLOCK_B
    count: int  # splits


def kind_of(dtype: torch.dtype, tf32: bool) -> str:
    """The member of `KINDS` for inputs of `dtype`."""
    return "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the device of `tensor`, or of the largest of its architecture."""
    return multiprocessors(tensor.device.index) if tensor.is_cuda else MULTIPROCESSORS[arch(tensor)]


@lru_cache
def buckets(arch: int, stage: str, kind: str, tma: bool) -> tuple[tuple[float, Config], ...]:
    """(rate, configuration) of the shipped buckets of a stage."""
    return usable(SHIPPED, RATES, arch, stage, kind, tma)


def usable(
    shipped: Mapping[tuple[int, str], Config],
    rates: Mapping[str, float],
    arch: int,
    stage: str,
    kind: str,
    tma: bool,
) -> tuple[tuple[float, Config], ...]:
    """(rate, configuration) of those of the `shipped` that fit a stage.

    Where descriptors can be used (`tma`) they replace pointers, except for tiles of folded rows,
    which only pointers can address.
    """
    found = []
    for size, rate in rates.items():
        for suffix in ("", " tma"):
            config = shipped.get((arch, f"{stage} {kind} {size}{suffix}"))
            if config is not None and (tma or not config.tma):
                found.append((rate, config))
    if any(config.tma for _, config in found):
        found = [f for f in found if f[1].tma or f[1].tiles.get("FOLDED")]
    return tuple(found)


def quickest(candidates: Iterable[tuple[float, Config]], work: Callable[[Config], float]) -> Config:
    """The configuration with the least work, over its rate, for the busiest multiprocessor."""
    return min(candidates, key=lambda candidate: work(candidate[1]) / candidate[0])[1]


def forward_programs(config: Config, M: int, B: int, O: int) -> int:
    """Programs of the forward kernel."""
    block_b, block_o = config.tiles["BLOCK_B"], config.tiles["BLOCK_O"]
    rows = ceil(M * B / block_b) if config.tiles["FOLDED"] else M * ceil(B / block_b)
    return rows * ceil(O / block_o)


@lru_cache(4096)
def forward_config(kind: str, tma: bool, arch: int, sms: int, M: int, B: int, O: int) -> Config:
    """The configuration of the forward kernel for a shape, on a GPU with `sms` multiprocessors."""

    def work(c: Config) -> float:
        area = c.tiles["BLOCK_B"] * c.tiles["BLOCK_O"]
        return ceil(forward_programs(c, M, B, O) / sms) * area

    return quickest(buckets(arch, "fwd", kind, tma), work)


@lru_cache(4096)
def input_config(
    stage: str, kind: str, tma: bool, arch: int, sms: int, M: int, B: int, I: int, O: int
) -> Config:
    """As `forward_config`, for dx."""

    def work(c: Config) -> float:
        block_b, block_i = c.tiles["BLOCK_B"], c.tiles["BLOCK_I"]
        if stage == "x shared":
            return _shared_split(block_b, block_i, sms, M, B, I, O)[0]
        return ceil(M * ceil(B / block_b) * ceil(I / block_i) / sms) * O * block_b * block_i

    return quickest(buckets(arch, stage, kind, tma), work)


def shared_members(block_b: int, block_i: int, sms: int, M: int, B: int, I: int, O: int) -> int:
    """Members that one program of the dx kernel sums over, for an x that members share."""
    return _shared_split(block_b, block_i, sms, M, B, I, O)[1].members


@lru_cache(4096)
def _shared_split(block_b, block_i, sms, M, B, I, O) -> tuple[float, Split]:
    return _split(M, 1, O, ceil(B / block_b) * ceil(I / block_i), block_b * block_i, sms)


@lru_cache(4096)
def weight_config(
    stage: str, kind: str, tma: bool, arch: int, sms: int, M: int, B: int, I: int, O: int
) -> Config:
    """As `forward_config`, for dweight."""

    def work(c: Config) -> float:
        blocks = (c.tiles[k] for k in ("BLOCK_O", "BLOCK_I", "BLOCK_B"))
        return _weight_split(*blocks, sms, M, B, I, O)[0]

    return quickest(buckets(arch, stage, kind, tma), work)


def weight_split(
    block_o: int, block_i: int, block_b: int, sms: int, M: int, B: int, I: int, O: int
) -> Split:
    """How the weight gradient is split among programs."""
    return _weight_split(block_o, block_i, block_b, sms, M, B, I, O)[1]


@lru_cache(4096)
def _weight_split(block_o, block_i, block_b, sms, M, B, I, O) -> tuple[float, Split]:
    count = ceil(O / block_o) * ceil(I / block_i)
    return _split(M, ceil(B / block_b), block_b, count, block_o * block_i, sms)


def _split(M: int, steps: int, depth: int, tiles: int, area: int, sms: int) -> tuple[float, Split]:
    """(work, split) of M members x `steps` steps of `depth` products with the least work.

    Whole members are shared out first, so that parts of ds and dr stay few; then examples, at
    least two steps to a split.
    """
    best = None
    for count in range(1, 2 + 2 * sms // tiles):
        members = ceil(M / min(count, M))
        by_member = ceil(M / members)
        examples = ceil(steps / max(1, min(count // by_member, steps // 2)))
        total = by_member * ceil(steps / examples)
        waves = ceil(tiles * total / sms)
        work = waves * members * examples * depth * area
        work += PART_COST * area * tiles * total / sms if total > 1 else 0
        if best is None or work < best[0]:
            best = (work, Split(members, examples * depth, total))
    return best
