"""Which way a member convolution goes: y, dx and dweight each have one.

Of the library (`_subspace_conv2d_ways`): "loop", "grouped" and, where x is shared, "wide". Of
kernels that run all members in one launch (`_subspace_conv2d_kernels`): "triton" and "cuda".

On a GPU, a model of the time of each way, in microseconds. Every number is an estimate until
measured: rates are those of batch_ensemble_conv2d's plan, whose Triton kernel this one is but for
the weights; cuDNN's grouped convolutions were seen at 2 to 8 times the time of as many products
without groups; halo kernels are to reach 1.75 times the time of their bytes, or the rate of our
other kernels, with three products of tf32 for one of float32. The choice is the smallest estimate;
forcing a backend overrides it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from landscape_fast.ops import _batch_ensemble_conv2d_plan as single
from landscape_fast.ops._batch_ensemble_linear_plan import (
    BANDWIDTH,
    GEMM_LAUNCH,
    PASS_LAUNCH,
    RATE,
    SUM_LAUNCH,
    _pass,
    _size,
)

LIBRARY = ("loop", "grouped", "wide")
# Multiply-adds of one member's forward up to which a CPU is quicker with one convolution of all
# members than with one for each: y, dx and dweight together 1.2 to 4 times below, at 16 channels
# 0.6 to 0.9 times above (8 members, one thread of an AMD EPYC, float32).
GROUPED_TO = 4e6
GROUPED = 3.0  # times of cuDNN's grouped convolutions over one without groups
HALO = 1.75  # times of the CUDA kernels over their bytes
MIXING = 0.4  # of the Triton kernel's time on top for every anchor, where it mixes them itself
MOST_MIXED = 4  # anchors


class Plan(NamedTuple):
    """The ways of y, dx and dweight, and whether the kernels of y and dx mix the anchors."""

    y: str
    dx: str
    dweight: str
    mix: bool = False


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
    channels_last: bool = True
    groups: int = 1
    K: int = 0  # anchors that are to be mixed, 0 for none


def composed_plan(members: int, products: int, groups: int, shared: bool) -> Plan:
    """The quickest ways of the library on a CPU.

    Args:
        members: M.
        products: multiply-adds of one member's forward.
        groups: of one member's convolution.
        shared: whether the members share x.
    """
    way = "loop"
    if members > 1 and products <= GROUPED_TO:
        way = "wide" if shared and groups == 1 else "grouped"
    return Plan(way, way, way)


def choose(p: Problem, kernels: tuple[str, ...], gradients: bool = True) -> Plan:
    """The quickest ways on a GPU, of the library's and of the `kernels` that can run.

    The kernels load channels in vectors: where channels are not last, they do not come into
    question. `gradients`: whether dx counts for the question of mixing first.
    """
    if torch.compiler.is_compiling():  # sizes may be dynamic
        return _choose(p, kernels, gradients)
    return _remembered(p, kernels, gradients)


def _choose(p: Problem, kernels: tuple[str, ...], gradients: bool) -> Plan:
    library = LIBRARY if p.shared_x and p.groups == 1 else LIBRARY[:2]
    ways = (*kernels, *library) if p.channels_last else library
    best = []
    for which in range(3):
        found = ways[0]
        for way in ways[1:]:  # loops, since torch.compile traces this where sizes are dynamic
            if time(p, way, which) < time(p, found, which):
                found = way
        best.append(found)
    if not (0 < p.K <= MOST_MIXED and p.channels_last and "triton" in kernels):
        return Plan(*best)
    products = (0, 1) if gradients else (0,)
    first = mixed = 0.0
    for which in products:  # the members' weights are not kept, but formed for each
        first += _pass(_single(p), (p.K + p.M) * _weight(p)) + GEMM_LAUNCH
        first += time(p, best[which], which)
        mixed += _mixed(p, which)
    return Plan(*best) if first <= mixed else Plan("triton", "triton", best[2], True)


_remembered = lru_cache(4096)(_choose)  # the estimates take a tenth of a millisecond


def time(p: Problem, way: str, which: int) -> float:
    """Microseconds of y (which = 0), dx (1) or dweight (2)."""
    s = _single(p)
    x, y = p.M * p.B * p.inputs * p.I, p.M * p.B * p.outputs * p.O
    if way == "loop":
        us = single._library(s, p.M, p.M * p.B, which)
        if p.M == 1 or which == 2:
            return us
        if p.shared_x and which == 1:  # every dx but the first is added
            return us + (p.M - 1) * _pass(s, 3 * (x // p.M))
        return us + _pass(s, 2 * (y, x)[which])
    if way == "grouped":
        products = single._library(s, 0, p.M * p.B, which) * GROUPED * p.groups**0.5
        copies = (x, y, x + y)[which]
        return GEMM_LAUNCH + products + _pass(s, 2 * copies)
    if way == "wide":
        wide = s._replace(M=1, O=p.M * p.O)
        return single._library(wide, 1, p.B, which) + (_pass(s, 2 * y) if which else 0.0)
    if way == "cuda":
        shared = p.shared_x and p.M > 1
        moved = y + (p.B * p.inputs * p.I if shared and which != 1 else x)
        us = HALO * _size(s) * 1e-6 * moved / BANDWIDTH[p.arch]
        kind, products = ("tf32", 3) if p.kind == "ieee" else (p.kind, 1)
        flops = products * 2e-6 * p.M * p.B * p.outputs * p.I * p.O * p.taps
        us = GEMM_LAUNCH + max(us, flops / (RATE[p.arch][kind] * single.FUSED[kind][which]))
        if shared and which == 1:  # a dx of each member, to add up
            us += _pass(s, x + x // p.M)
        return us + (SUM_LAUNCH if which == 2 else PASS_LAUNCH)
    us = single._fused(s, which)
    return us + (SUM_LAUNCH if which == 2 else PASS_LAUNCH)  # parts to add up; weights to pack


def _mixed(p: Problem, which: int) -> float:
    """The Triton kernel that forms weights of K anchors: it loads and adds K tiles for one."""
    us = single._fused(_single(p), which) - GEMM_LAUNCH
    return GEMM_LAUNCH + PASS_LAUNCH + us * (1 + MIXING * p.K)


def _single(p: Problem) -> single.Problem:
    """The problem as batch_ensemble_conv2d has it, without factors."""
    return single.Problem(*p[:10], has_r=False, has_s=False)


def _weight(p: Problem) -> int:
    """Elements of one member's weight."""
    return p.O * p.I * p.taps // p.groups
