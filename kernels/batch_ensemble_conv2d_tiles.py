"""Which tiles the batch_ensemble_conv2d kernels use: data, and the rules that choose among them.

Every configuration compiles without spills for its architecture (tests/test_aot.py). None has been
timed: tile sizes follow register and shared-memory budgets.
"""

from functools import lru_cache

from . import batch_ensemble_linear_tiles as linear
from ._launch import Config, cdiv

STAGES = ("fwd", "x", "weight")
WIDTHS = (16, 32, 64, 128)  # channels that one tile holds
THIN = 8  # fewer channels than this, as of a picture

kind_of = linear.kind_of
processors = linear.processors
Split = linear.Split


def _fwd(p, c, k, warps, stages, columns="BLOCK_O"):
    return Config({"BLOCK_P": p, columns: c, "BLOCK_K": k}, warps, stages)


def _x(*sizes):
    return _fwd(*sizes, columns="BLOCK_I")


def _weight(k, o, p, warps, stages):
    return Config({"BLOCK_K": k, "BLOCK_O": o, "BLOCK_P": p}, warps, stages)


_TABLE = {
    "fwd half thin": _fwd(128, 32, 32, 8, 2),
    "fwd half 16": _fwd(128, 16, 64, 4, 3),
    "fwd half 32": _fwd(128, 32, 64, 4, 3),
    "fwd half 64": _fwd(128, 64, 64, 8, 3),
    "fwd half 128": _fwd(128, 128, 64, 8, 3),
    "fwd tf32 thin": _fwd(128, 32, 32, 8, 2),
    "fwd tf32 16": _fwd(128, 16, 32, 4, 3),
    "fwd tf32 32": _fwd(128, 32, 32, 4, 3),
    "fwd tf32 64": _fwd(128, 64, 32, 8, 3),
    "fwd ieee thin": _fwd(64, 32, 16, 8, 2),
    "fwd ieee 16": _fwd(64, 16, 32, 4, 2),
    "fwd ieee 32": _fwd(64, 32, 32, 4, 2),
    "x half thin": _x(128, 32, 32, 8, 2),
    "x half 16": _x(128, 16, 64, 4, 3),
    "x half 32": _x(128, 32, 64, 8, 3),
    "x half 64": _x(128, 64, 64, 8, 3),
    "x half 128": _x(128, 128, 64, 8, 3),
    "x tf32 thin": _x(128, 32, 32, 8, 2),
    "x tf32 16": _x(128, 16, 32, 4, 3),
    "x tf32 32": _x(128, 32, 32, 8, 3),
    "x tf32 64": _x(128, 64, 32, 8, 3),
    "x ieee thin": _x(64, 32, 16, 8, 2),
    "x ieee 16": _x(64, 16, 32, 4, 2),
    "x ieee 32": _x(64, 32, 32, 4, 2),
    "weight half thin": _weight(64, 32, 32, 8, 2),
    "weight half 16": _weight(128, 16, 64, 8, 3),
    "weight half 32": _weight(128, 32, 64, 8, 3),
    "weight half 64": _weight(64, 64, 64, 8, 3),
    "weight half 128": _weight(64, 128, 64, 8, 3),
    "weight tf32 thin": _weight(64, 32, 32, 8, 2),
    "weight tf32 16": _weight(64, 16, 32, 8, 3),
    "weight tf32 32": _weight(64, 32, 32, 8, 3),
    "weight tf32 64": _weight(64, 64, 32, 8, 3),
    "weight ieee thin": _weight(32, 16, 16, 4, 2),
    "weight ieee 16": _weight(32, 16, 32, 4, 2),
    "weight ieee 32": _weight(64, 32, 32, 8, 2),
}
_INSTEAD = {  # where the ones above spill
    80: {
        "x half 16": _x(128, 16, 32, 4, 3),
        "weight half 128": _weight(64, 128, 32, 8, 3),
        "weight tf32 32": _weight(64, 32, 16, 8, 3),
        "weight tf32 64": _weight(64, 64, 16, 8, 3),
    },
    90: {},
    100: {
        "x half 16": _x(128, 16, 32, 4, 3),
        "fwd tf32 32": _fwd(128, 32, 32, 8, 3),
        "weight half 32": _weight(64, 32, 64, 8, 3),
    },
}
SHIPPED: dict[tuple[int, str], Config] = {
    (a, bucket): config
    for a, instead in _INSTEAD.items()
    for bucket, config in (_TABLE | instead).items()
}


def candidates(arch: int, stage: str, kind: str) -> list[Config]:
    """The shipped configurations of a stage, the narrowest first."""
    found = [SHIPPED.get((arch, f"{stage} {kind} {width}")) for width in WIDTHS]
    return [config for config in found if config is not None]


@lru_cache(1024)
def config(arch: int, stage: str, kind: str, columns: int, summed: int) -> Config:
    """The narrowest tile that holds all channels among the columns, or the widest.

    `summed` channels are on the other side: THIN ones cannot be loaded in wide vectors.
    """
    if summed < THIN:
        return SHIPPED[arch, f"{stage} {kind} thin"]
    column = "BLOCK_I" if stage == "x" else "BLOCK_O"
    found = candidates(arch, stage, kind)
    return next((c for c in found if c.tiles[column] >= columns), found[-1])


def depth(config: Config, taps: int, channels: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_C): k columns of a step, and how many channels of a tap are among them.

    Steps hold whole taps of few channels, or a part of the channels of one tap.
    """
    block_c = min(config.tiles["BLOCK_K"], _power_of_two(channels))
    return min(config.tiles["BLOCK_K"], max(16, _power_of_two(taps * block_c))), block_c


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@lru_cache(4096)
def weight_split(
    block_k: int, block_o: int, block_p: int, count: int, sms: int, M: int, pixels: int
) -> Split:
    """How the weight gradient's sum is shared out: over members, and over pixels of a member."""
    steps = cdiv(pixels, block_p)
    return linear._split(M, steps, block_p, count, block_k * block_o, sms)[1]
