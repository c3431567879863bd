"""Which tiles the hyper_batch_linear kernels use: data, and the rules that choose among them.

Every configuration compiles without spills for its architecture (tests/test_aot.py). None has been
timed: the forward has two accumulators and the operands of its epilogue, which spill for 128 x 128.
The weight gradients are those of batch_ensemble_linear, with its tiles.
"""

from functools import lru_cache
from math import ceil

from . import batch_ensemble_linear_tiles as linear
from ._launch import Config

kind_of, processors, forward_programs = linear.kind_of, linear.processors, linear.forward_programs
_fwd, _x = linear._fwd, linear._x

# Estimated share of the best rate that a tile of this size reaches on a full GPU.
RATES = {"medium": 1.0, "small": 0.85, "tiny": 0.6, "wide": 0.7, "folded": 0.4, "skinny": 0.12}

# In the time of a multiply-add with both weights, for 790 TFLOP/s and 5.5 TB/s from L2 (an H200).
LOAD_COST = 72  # of loading a 16-bit element
PART_COST = 200  # of writing and reading a float32 part
STEPS = 8  # steps of the main loop that a split has at least


# Stages: "fwd"; "x", dx with an accumulator for each of r and u; "x tied", with one for both.
_POINTERS = {  # any strides; "wide" and "skinny" stream the weights past all rows at once
    "fwd half medium": _fwd(128, 64, 64, 8, 3),
    "fwd half small": _fwd(64, 128, 32, 8, 3),
    "fwd half tiny": _fwd(64, 64, 64, 4, 3),
    "fwd half wide": _fwd(128, 64, 64, 8, 3, folded=True),
    "fwd half folded": _fwd(64, 32, 64, 4, 4, folded=True),
    "fwd half skinny": _fwd(16, 64, 64, 4, 4, folded=True),
    "fwd tf32 tiny": _fwd(64, 64, 32, 8, 3),
    "fwd tf32 skinny": _fwd(16, 64, 32, 4, 3, folded=True),
    "fwd ieee tiny": _fwd(64, 32, 16, 4, 3),
    "fwd ieee skinny": _fwd(16, 64, 16, 4, 3, folded=True),
    "x half small": _x(64, 128, 32, 8, 3),
    "x half tiny": _x(64, 64, 32, 4, 3),
    "x tf32 tiny": _x(64, 64, 16, 8, 3),
    "x ieee tiny": _x(64, 32, 32, 8, 3),
    "x tied half small": _x(64, 128, 32, 8, 3),
    "x tied half tiny": _x(64, 64, 32, 4, 3),
    "x tied tf32 tiny": _x(64, 64, 32, 8, 3),
    "x tied ieee tiny": _x(64, 32, 32, 8, 3),
}
_DESCRIPTORS = {  # unit stride along features and 16-byte aligned rows; Hopper and later
    "fwd half medium tma": _fwd(128, 64, 64, 8, 3, True),
    "fwd half small tma": _fwd(64, 128, 64, 8, 3, True),
    "fwd half tiny tma": _fwd(64, 64, 64, 4, 3, True),
    "fwd tf32 tiny tma": _fwd(64, 64, 32, 4, 3, True),
    "x half medium tma": _x(128, 128, 32, 8, 3, True),
    "x half tiny tma": _x(64, 64, 64, 4, 3, True),
    "x tied half medium tma": _x(128, 128, 64, 8, 2, True),
    "x tied half tiny tma": _x(64, 64, 64, 4, 3, True),
}
_AMPERE = {"fwd half wide": _fwd(128, 32, 64, 8, 2, folded=True)}  # with 64 outputs it spills there
_TABLES = {
    80: _POINTERS | _AMPERE,
    90: _POINTERS | _DESCRIPTORS,
    100: _POINTERS | _DESCRIPTORS,
}
SHIPPED: dict[tuple[int, str], Config] = {
    (a, bucket): config for a, table in _TABLES.items() for bucket, config in table.items()
}


@lru_cache
def buckets(arch: int, stage: str, kind: str, tma: bool) -> tuple[tuple[float, Config], ...]:
    """(rate, configuration) of the shipped buckets of a stage."""
    return linear.usable(SHIPPED, RATES, arch, stage, kind, tma)


@lru_cache(4096)
def forward_config(
    kind: str, tma: bool, arch: int, sms: int, M: int, B: int, I: int, O: int
) -> Config:
    """The configuration of the forward kernel for a shape, on a GPU with `sms` multiprocessors."""

    def time(candidate: tuple[float, Config]) -> float:
        rate, c = candidate
        block_b, block_o = c.tiles["BLOCK_B"], c.tiles["BLOCK_O"]
        step = max(block_b * block_o / rate, LOAD_COST * (block_b + 2 * block_o))
        programs, inputs = forward_programs(c, M, B, O), inputs_per_split(c, sms, M, B, I, O)
        splits = ceil(I / inputs)
        parts = PART_COST * M * B * O * splits / sms if splits > 1 else 0
        return ceil(programs * splits / sms) * inputs * step + parts

    return min(buckets(arch, "fwd", kind, tma), key=time)[1]


def inputs_per_split(config: Config, sms: int, M: int, B: int, I: int, O: int) -> int:
    """Inputs that one program sums over: fewer where the tiles are too few to fill the GPU."""
    programs, block_i = forward_programs(config, M, B, O), config.tiles["BLOCK_I"]
    splits = max(1, min(sms // programs, I // (STEPS * block_i)))
    return ceil(ceil(I / splits) / block_i) * block_i


@lru_cache(4096)
def input_config(
    stage: str, kind: str, tma: bool, arch: int, sms: int, M: int, B: int, I: int
) -> Config:
    """As `forward_config`, for dx."""

    def work(c: Config) -> float:
        block_b, block_i = c.tiles["BLOCK_B"], c.tiles["BLOCK_I"]
        return ceil(M * ceil(B / block_b) * ceil(I / block_i) / sms) * block_b * block_i

    return linear.quickest(buckets(arch, stage, kind, tma), work)
