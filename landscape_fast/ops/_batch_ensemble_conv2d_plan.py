"""Which way a BatchEnsemble convolution goes: fused kernels, or one of two library compositions.

On a GPU, a model of the time of each way, in microseconds, from products, bytes and launches. Every
number is an estimate until measured: rates and bandwidths are those of the linear op's plan, the
shares that convolutions reach of them are taken from published figures for Hopper (implicit GEMMs
of cuDNN 0.7 to 0.8 of a library GEMM, of Triton with pointer loads about 0.5). Either loads a pixel
once per tap through L2, which bounds it where channels are few; what is left to win there is the
passes for the factors. The choice is the smallest estimate; forcing a backend overrides it.
"""

from typing import NamedTuple

from landscape_fast.ops._batch_ensemble_linear_plan import (
    BANDWIDTH,
    GEMM_LAUNCH,
    PASS_LAUNCH,
    RATE,
    SUM_LAUNCH,
    Needs,
    _pass,
    _size,
)

# From where a convolution for each member is quicker on a CPU than one for all and its passes over
# the activations: two cores of an AMD EPYC (Zen 4), float32. The forward by the elements of one
# member's x and y, which these passes move; the backward, which would convolve again for ds, by
# the multiply-adds of one member's forward.
MERGED_FORWARD_FROM = 6e5
MERGED_BACKWARD_FROM = 24e6

L2 = {80: 3.5, 90: 5.5, 100: 9.0}  # TB/s that all multiprocessors read from it
LIBRARY = {"half": 0.75, "tf32": 0.75, "ieee": 0.8}  # share of a library GEMM's rate
FUSED = {  # the same of our kernels: y, dx, dweight
    "half": (0.50, 0.50, 0.40),
    "tf32": (0.45, 0.45, 0.35),
    "ieee": (0.40, 0.40, 0.30),
}
BLACKWELL = 0.75  # of those shares: loads through pointers feed its tensor cores less well
NARROW = 64  # of fewer columns, a tile leaves a part of the tensor core idle
FEW = 8  # channels that take a whole vector load
SHARE_OF_FEW = 0.25  # left where there are fewer


class Plan(NamedTuple):
    """How to run the forward and the backward: "once", "merged" or "fused"; all keep x alone."""

    forward: str
    backward: str


class Problem(NamedTuple):
    """Sizes, and what decides the cost."""

    M: int
    B: int
    I: int
    O: int
    taps: int  # of the kernel
    inputs: int  # pixels of an image of x
    outputs: int  # pixels of an image of y
    arch: int = 90  # 80, 90 or 100
    kind: str = "half"  # "half", "tf32", "ieee"
    shared_x: bool = False
    has_r: bool = True
    has_s: bool = True
    channels_last: bool = True


def composed_plan(members: int, elements: int, products: int, alone: bool) -> Plan:
    """The quicker library path on a CPU.

    Args:
        members: M.
        elements: of one member's x and y.
        products: multiply-adds of one member's forward.
        alone: whether one convolution serves all members (x shared, no r).
    """
    if alone and members > 1:
        return Plan("once", "once")
    forward = members == 1 or elements >= MERGED_FORWARD_FROM
    backward = members == 1 or products >= MERGED_BACKWARD_FROM
    return Plan("merged" if forward else "once", "merged" if backward else "once")


def choose(p: Problem, needs: Needs, fusable: bool = True) -> Plan:
    """The quickest ways on a GPU; a tie goes to the fused kernels.

    Those load channels in vectors: where channels are not last, they do not come into question.
    """
    ways = ("fused", "once", "merged") if fusable and p.channels_last else ("once", "merged")
    forward, backward = ways[0], ways[0]
    for way in ways[1:]:  # loops, since torch.compile traces this where sizes are dynamic
        if forward_time(p, way) < forward_time(p, forward):
            forward = way
        if backward_time(p, needs, way) < backward_time(p, needs, backward):
            backward = way
    return Plan(forward, backward)


def forward_time(p: Problem, way: str) -> float:
    """Microseconds of the forward."""
    x, y = _images(p) * p.inputs * p.I, p.M * p.B * p.outputs * p.O
    if way == "fused":
        return _fused(p, 0)
    if way == "merged":
        return _library(p, p.M, p.M * p.B, 0) + _pass(p, 2 * y)
    rows = p.B if p.shared_x and not p.has_r else p.M * p.B
    us = _library(p, 1, rows, 0)
    if p.has_r:
        us += _pass(p, x + p.M * p.B * p.inputs * p.I)
    return us + _pass(p, rows * p.outputs * p.O + y)


def backward_time(p: Problem, needs: Needs, way: str) -> float:
    """Microseconds of the backward."""
    x, y = p.M * p.B * p.inputs * p.I, p.M * p.B * p.outputs * p.O
    rest = needs.weight or needs.r or needs.s
    if way == "fused":
        us = _fused(p, 1) if needs.x else 0.0
        us += _fused(p, 2) + SUM_LAUNCH if rest else 0.0
        return us + (_pass(p, y) if needs.bias and not rest else 0.0)
    us = _pass(p, y) if needs.bias else 0.0
    if way == "merged":
        for which, wanted in ((1, needs.x), (2, rest)):
            us += _library(p, p.M, p.M * p.B, which) if wanted else 0.0
        us += p.M * 4 * PASS_LAUNCH if rest else 0.0
        return us + (_pass(p, 2 * x) if needs.x else 0.0)
    rows = p.B if p.shared_x and not p.has_r else p.M * p.B
    if needs.s:
        us += _library(p, 1, rows, 0) + 2 * _pass(p, 2 * y)
    if p.has_r and (needs.s or needs.weight):
        us += _pass(p, 2 * x)
    if p.has_s and (needs.x or needs.weight or needs.r):
        us += _pass(p, 2 * y)
    if needs.x or needs.r:
        us += _library(p, 1, rows, 1)
    if needs.weight:
        us += _library(p, 1, rows, 2)
    if needs.r:
        us += 2 * _pass(p, 2 * x)
    return us + (_pass(p, 2 * x) if needs.x and p.has_r else 0.0)


def _fused(p: Problem, which: int) -> float:
    """One of our kernels: y, dx, dweight."""
    # a row of dx gathers every tap, those that a stride passes over too
    rows = p.inputs if which == 1 else p.outputs
    moved = _images(p) * p.inputs * p.I + p.M * p.B * p.outputs * p.O
    share = FUSED[p.kind][which] * (BLACKWELL if p.arch == 100 else 1.0)
    return GEMM_LAUNCH + _product(p, p.M * p.B, rows, moved, which, 128, share)


def _library(p: Problem, launches: int, images: int, which: int) -> float:
    """Convolutions of that many images in all, or of their gradients."""
    moved = images * (p.inputs * p.I + p.outputs * p.O)
    products = _product(p, images, p.outputs, moved, which, 256, LIBRARY[p.kind])
    return launches * GEMM_LAUNCH + products


def _product(
    p: Problem, images: int, rows: int, moved: int, which: int, widest: int, share: float
) -> float:
    """Implicit GEMM: the longest of products, bytes, and taps through L2 for `widest` columns."""
    summed, columns = (p.O, p.I) if which == 1 else (p.I, p.O)
    share *= 1.0 if columns >= NARROW else max(columns, 16) / NARROW
    share *= 1.0 if summed >= FEW else SHARE_OF_FEW
    flops = 2e-6 * images * rows * p.I * p.O * p.taps / RATE[p.arch][p.kind]
    gathered = images * rows * p.taps * summed * -(-columns // widest)
    memory = _size(p) * 1e-6 * max(moved / BANDWIDTH[p.arch], gathered / L2[p.arch])
    return max(flops / share, memory)


def _images(p: Problem) -> int:
    return p.B if p.shared_x else p.M * p.B
