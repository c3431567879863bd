"""Which tiles the subspace_conv2d kernels use: data, and the rules that choose among them.

Every configuration compiles without spills for its architecture (tests/test_aot.py). None has been
timed: tile sizes follow register and shared-memory budgets. Where pointers load the tiles they are
those of batch_ensemble_conv2d, whose kernels do more beside; "boxes" load through descriptors, and
"mixed" ones form their weights from anchors.
"""

from functools import lru_cache

from . import batch_ensemble_conv2d_tiles as conv
from ._launch import ARCHS, Config

STAGES = conv.STAGES
kind_of, depth, processors = conv.kind_of, conv.depth, conv.processors
weight_split = conv.weight_split
_COLUMNS = {"fwd": "BLOCK_O", "x": "BLOCK_I"}


def _pixels(p, n, k, warps, stages, tma=False):
    return Config({"BLOCK_P": p, "BLOCK_N": n, "BLOCK_K": k}, warps, stages, tma)


def _weight(o, i, p, warps, stages):
    return Config({"BLOCK_O": o, "BLOCK_I": i, "BLOCK_P": p}, warps, stages, True)


def _renamed(stage: str, config: Config) -> Config:
    """Columns of y and dx have one name here."""
    if stage == "weight":
        return config
    t = config.tiles
    sizes = (t["BLOCK_P"], t[_COLUMNS[stage]], t["BLOCK_K"])
    return _pixels(*sizes, config.num_warps, config.num_stages)


# Of batch_ensemble_conv2d's widths those that differ in kind: between them the next wider serves.
_KEPT = {"half": ("thin", 16, 32, 64, 128), "tf32": ("thin", 32, 64), "ieee": ("thin", 32)}
_BOXES = {
    "fwd half boxes 64": _pixels(128, 64, 64, 4, 4, True),
    "fwd half boxes 128": _pixels(128, 128, 64, 8, 4, True),
    "fwd half boxes 256": _pixels(128, 256, 64, 8, 3, True),
    "fwd tf32 boxes 64": _pixels(128, 64, 32, 8, 3, True),
    "x half boxes 64": _pixels(128, 64, 64, 4, 4, True),
    "x half boxes 128": _pixels(128, 128, 64, 8, 4, True),
    "x half boxes 256": _pixels(128, 256, 64, 8, 3, True),
    "x tf32 boxes 64": _pixels(128, 64, 32, 8, 3, True),
    "weight half boxes 64": _weight(64, 64, 64, 4, 4),
    "weight half boxes 128": _weight(128, 128, 64, 8, 4),
    "weight half boxes 256": _weight(128, 256, 64, 8, 3),
    "weight tf32 boxes 64": _weight(64, 64, 32, 4, 3),
}
_MIXED = {
    "fwd half mixed 32": _pixels(128, 32, 64, 4, 2),
    "fwd tf32 mixed 32": _pixels(128, 32, 32, 4, 2),
    "fwd ieee mixed 32": _pixels(64, 32, 16, 4, 2),
    "x half mixed 32": _pixels(128, 32, 64, 4, 2),
    "x tf32 mixed 32": _pixels(128, 32, 32, 4, 2),
    "x ieee mixed 32": _pixels(64, 32, 16, 4, 2),
}
_INSTEAD = {  # where the ones above spill
    (80, "fwd tf32 32"): _pixels(128, 32, 32, 8, 3),
    (80, "weight half 64"): Config({"BLOCK_K": 64, "BLOCK_O": 64, "BLOCK_P": 32}, 8, 3),
    (90, "fwd ieee 32"): _pixels(64, 32, 32, 8, 2),
    (100, "fwd half thin"): _pixels(128, 32, 32, 4, 2),
    (100, "fwd ieee thin"): _pixels(64, 32, 16, 4, 2),
    (100, "x tf32 mixed 32"): _pixels(128, 32, 32, 8, 2),
    (100, "x ieee mixed 32"): _pixels(64, 32, 16, 8, 2),
}
_SPILLS = {(100, "weight half boxes 256")}  # there the next narrower tile serves
SHIPPED: dict[tuple[int, str], Config] = {
    (a, f"{stage} {kind} {width}"): _renamed(stage, conv.SHIPPED[a, f"{stage} {kind} {width}"])
    for a in ARCHS
    for stage in STAGES
    for kind, widths in _KEPT.items()
    for width in widths
}
SHIPPED |= {(a, bucket): config for a in ARCHS for bucket, config in _MIXED.items()}
SHIPPED |= {
    (a, bucket): config
    for a in (90, 100)
    for bucket, config in _BOXES.items()
    if (a, bucket) not in _SPILLS
}
SHIPPED |= _INSTEAD


def candidates(arch: int, stage: str, kind: str, tma: bool = False) -> list[Config]:
    """The shipped configurations of a stage, the narrowest first."""
    name = f"{stage} {kind} boxes" if tma else f"{stage} {kind}"
    found = [SHIPPED.get((arch, f"{name} {width}")) for width in (*conv.WIDTHS, 256)]
    return [config for config in found if config is not None]


@lru_cache(1024)
def config(arch: int, stage: str, kind: str, columns: int, summed: int, tma: bool) -> Config:
    """The narrowest tile that holds all channels among the columns, or the widest.

    `kind` may end in " mixed". `summed` channels are on the other side: few of them cannot be
    loaded in wide vectors.
    """
    if summed < conv.THIN and "mixed" not in kind:
        return SHIPPED[arch, f"{stage} {kind} thin"]
    column = "BLOCK_N" if stage != "weight" else "BLOCK_I" if tma else "BLOCK_O"
    found = candidates(arch, stage, kind, tma)
    return next((c for c in found if c.tiles[column] >= columns), found[-1])
