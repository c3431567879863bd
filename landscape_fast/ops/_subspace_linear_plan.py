"""Which way a member product goes: y, dx and dweight each have one.

Of the library (`_subspace_linear_ways`): "bmm", "few", "outer", "wide", and "plain" for one member
that is a plain layer. Of the Triton kernels, which run all members in one launch: "fused", and for
y and dx "mixed", which forms the weights of its tiles from the anchors.

On a GPU a model of the time of each, in microseconds, decides: every number in it is an estimate,
until `python bench/run.py subspace_linear` has measured it. A tie goes to the library.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch

from landscape_fast.ops._batch_ensemble_linear_plan import (
    BANDWIDTH,
    EFFICIENCY,
    GEMM_LAUNCH,
    PASS_LAUNCH,
    RATE,
    UNALIGNED,
    architecture,
    kind_of,
)

MOST_ANCHORS = 4  # that the kernels mix
MIX_RATE = {80: 9.0, 90: 30.0, 100: 35.0}  # TFLOP/s of float32 arithmetic beside a product
CACHE = {80: 4.0, 90: 8.0, 100: 12.0}  # TB/s out of the L2 cache
TALL = 128  # examples of a member that one tile of a mixing kernel holds at most

# Outputs below which the transposed product is quicker on a CPU: for (M, B, I, O) =
# (10, 128, 64, 10) it takes 41 us for 78, at (3, 1024, 64, 10) 96 for 182, but at
# (10, 32, 128, 16) 28 for 22 and at (4, 64, 64, 32) 22 for 16 (one thread of an AMD EPYC with
# AVX-512, torch 2.13, MKL).
FEW_OUTPUTS = 16


class Plan(NamedTuple):
    """The ways of y, dx and dweight."""

    y: str
    dx: str
    dweight: str


BMM = Plan("bmm", "bmm", "bmm")
FEW = Plan("few", "bmm", "bmm")
ONE = Plan("few", "bmm", "outer")
WIDE = Plan("wide", "wide", "wide")
PLAIN = Plan("plain", "bmm", "bmm")
FUSED = Plan("fused", "fused", "fused")
MIXED = Plan("mixed", "mixed", "fused")


def composed_plan(device: str, shared: bool, B: int, O: int) -> Plan:
    """The quickest ways of the library.

    On a CPU "wide" was quicker than "bmm" in 12 of 14 shapes, by up to 3.3 times with few outputs,
    and never slower by more than 1.1 times. With one example per member the transposed product
    takes 463 us for 683 at (M, I, O) = (16, 512, 512), and a batched product for dweight is 6 times
    slower than one for each member.
    """
    if shared:
        return WIDE
    if device != "cpu":
        return BMM
    if B == 1:
        return ONE
    return FEW if O < FEW_OUTPUTS else BMM


def forced_plan(shared: bool, coeffs) -> Plan:
    """The kernels, wherever there is one; dx of a shared x is one product, the library's."""
    mixes = coeffs is not None and coeffs.shape[1] <= MOST_ANCHORS
    plan = MIXED if mixes and not shared else FUSED
    return plan._replace(dx="wide") if shared else plan


class Problem(NamedTuple):
    """Sizes, and what decides the cost; K is 0 where members have weights of their own."""

    M: int
    B: int
    I: int
    O: int
    K: int = 0
    arch: int = 90  # 80, 90 or 100
    kind: str = "half"  # "half", "tf32", "ieee"
    aligned: bool = True  # rows allow 16-byte loads
    need_x: bool = False
    need_weight: bool = False
    bias: bool = True


def plan_for(x, anchors, coeffs, bias, need_x: bool, need_weight: bool) -> Plan:
    """The plan for tensors on a CUDA device."""
    if x.ndim == 2:  # plain products of the library, of full size
        return WIDE
    K, O, I = anchors.shape
    M, K = (K, 0) if coeffs is None else coeffs.shape
    arch, kind = architecture(x.device.index), kind_of(x.dtype)
    unit = 16 if arch == 80 else 16 // x.element_size()  # what vector loads, or descriptors, need
    strides = (O, *x.stride()[:-1], *anchors.stride()[:-1])
    dense = x.stride(-1) == 1 and anchors.stride(-1) == 1
    aligned = dense and all(n % unit == 0 for n in strides)
    needs = (need_x, need_weight, bias is not None)
    problem = Problem(M, x.shape[1], I, O, K, arch, kind, aligned, *needs)
    return choose(problem) if torch.compiler.is_compiling() else chosen(problem)


def choose(p: Problem) -> Plan:
    """The plan with the smallest estimate."""
    plans = [BMM, FUSED]
    if 0 < p.K <= MOST_ANCHORS:
        plans.append(MIXED)
    best, least = plans[0], estimate(p, plans[0])
    for plan in plans[1:]:  # a loop, since torch.compile traces this where sizes are dynamic
        us = estimate(p, plan)
        if us < least:
            best, least = plan, us
    return best


chosen = lru_cache(4096)(choose)  # a layer asks the same at every step


def estimate(p: Problem, plan: Plan) -> float:
    """Microseconds of mixing, of the forward, and of the gradients that are wanted."""
    us, size = 0.0, 2 if p.kind == "half" else 4
    if p.K and plan.y != "mixed":
        us += PASS_LAUNCH + size * 1e-6 * (p.K + p.M) * p.O * p.I / BANDWIDTH[p.arch]
    us += _product(p, plan.y, 0)
    if p.need_x:
        us += _product(p, plan.dx, 1)
    if p.need_weight:
        us += _product(p, plan.dweight, 2)
        if p.bias and plan.dweight == "bmm":  # the bias, by itself
            us += PASS_LAUNCH + size * 1e-6 * p.M * p.B * p.O / BANDWIDTH[p.arch]
    return us


def _product(p: Problem, way: str, which: int) -> float:
    """One batched product: y (0), dx (1) or dweight (2)."""
    size, share = 2 if p.kind == "half" else 4, 1.0
    weights, rows, extra = p.M * p.O * p.I, p.M * p.B * (p.I + p.O), 0.0
    if way != "bmm":
        share = EFFICIENCY[p.arch][p.kind][which] * (1.0 if p.aligned else UNALIGNED[p.kind])
    if way == "mixed":
        formed = weights * ceil(p.B / TALL) * p.K  # each tile of examples forms its weights
        extra = 1e-6 * max(2 * formed / MIX_RATE[p.arch], size * formed / CACHE[p.arch])
        weights = p.K * p.O * p.I
    moved = size * 1e-6 * (weights + rows) / BANDWIDTH[p.arch]
    flops = 2e-6 * p.M * p.B * p.I * p.O / RATE[p.arch][p.kind]
    return GEMM_LAUNCH + max(flops / share + extra, moved)
