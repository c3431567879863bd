"""Which tiles the hyper_batch_conv2d kernel uses: data, and the rule that chooses among them.

Every configuration compiles without spills for its architecture (tests/test_aot.py). None has been
timed: there are two accumulators, so tiles are half those of batch_ensemble_conv2d, whose kernels
also make all gradients.
"""

from functools import lru_cache

from . import batch_ensemble_conv2d_tiles as conv
from ._launch import Config

kind_of, depth, _fwd = conv.kind_of, conv.depth, conv._fwd

_TABLE = {
    "half thin": _fwd(64, 32, 32, 8, 2),
    "half 16": _fwd(64, 16, 64, 4, 3),
    "half 32": _fwd(64, 32, 64, 4, 3),
    "half 64": _fwd(64, 64, 64, 8, 3),
    "tf32 thin": _fwd(64, 32, 32, 8, 2),
    "tf32 16": _fwd(64, 16, 32, 4, 3),
    "tf32 32": _fwd(64, 32, 32, 8, 3),
    "ieee thin": _fwd(32, 32, 16, 8, 2),
    "ieee 16": _fwd(32, 16, 32, 4, 2),
    "ieee 32": _fwd(32, 32, 32, 8, 2),
}
_SPILLS = {(100, "tf32 16")}  # there the next wider tile serves
SHIPPED: dict[tuple[int, str], Config] = {
    (a, bucket): config
    for a in (80, 90, 100)
    for bucket, config in _TABLE.items()
    if (a, bucket) not in _SPILLS
}


def candidates(arch: int, kind: str) -> list[Config]:
    """The shipped configurations of a kind, the narrowest first."""
    found = [SHIPPED.get((arch, f"{kind} {width}")) for width in conv.WIDTHS]
    return [config for config in found if config is not None]


@lru_cache(1024)
def config(arch: int, kind: str, O: int, I: int) -> Config:
    """The narrowest tile that holds all output channels, or the widest."""
    if I < conv.THIN:
        return SHIPPED[arch, f"{kind} thin"]
    found = candidates(arch, kind)
    return next((c for c in found if c.tiles["BLOCK_O"] >= O), found[-1])
