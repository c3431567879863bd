"""Which way hyper_batch_linear goes on a GPU: fused kernels, or a composition of library calls.

The model of time of batch_ensemble_linear, with its rates and launches, which are estimates; what
is counted here are the products and passes of two weights. The kernels read x and write y once,
which is what matters where memory sets the time (few rows, or small layers); for large layers the
library multiplies quicker and its passes are hidden, so it is chosen there.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from landscape_fast.ops._batch_ensemble_linear_plan import (
    BANDWIDTH,
    GEMM_LAUNCH,
    RATE,
    SUM_LAUNCH,
    UNALIGNED,
    _pass,
    _size,
    architecture,
    examples,
    kind_of,
)
from landscape_fast.ops._dispatch import free
from landscape_fast.ops._hyper_batch import Inputs, held_in_float32

EFFICIENCY = {  # kind -> share of the library's rate in y, dx and the weight gradients
    "half": (0.70, 0.65, 0.55),
    "tf32": (0.50, 0.50, 0.45),
    "ieee": (0.50, 0.50, 0.40),
}
FEW_ROWS = 0.6  # share of that left in y where tiles span members: then L2 sets the time
ROWS = 64  # examples of a member that one tile holds


class Plan(NamedTuple):
    """How to run the forward and the backward: "fused" or "composed"."""

    forward: str
    backward: str


class Problem(NamedTuple):
    """Sizes, and what decides the cost."""

    M: int
    B: int
    I: int
    O: int
    arch: int = 90  # 80, 90 or 100
    kind: str = "half"  # "half", "tf32", "ieee"
    tied: bool = True  # u is r
    factors: bool = True  # there are r and s
    bias: bool = False
    aligned: bool = True  # rows of x, the weights and y allow 16-byte loads
    exact: bool = False  # float32 gradients of 16-bit inputs: one product more in the kernels


def choose(p: Problem) -> Plan:
    """The smaller estimate for each direction; a tie goes to the fused kernels."""
    forward = forward_fused(p) <= forward_composed(p)
    backward = backward_fused(p) <= backward_composed(p)
    return Plan("fused" if forward else "composed", "fused" if backward else "composed")


def forward_fused(p: Problem) -> float:
    """One kernel."""
    R = p.M * p.B
    share = EFFICIENCY[p.kind][0] * (1.0 if p.B >= ROWS else FEW_ROWS)
    return _product(p, R, 2, share, R * p.O)


def forward_composed(p: Problem) -> float:
    """x * r (and x * u), two products, and passes over their results."""
    x, y = p.M * p.B * p.I, p.M * p.B * p.O
    us = 2 * _product(p, p.M * p.B, 1, 1.0)
    if p.factors:
        us += (1 if p.tied else 2) * _pass(p, 2 * x) + _pass(p, 2 * y)
    return us + 2 * _pass(p, 3 * y) + (2 * _pass(p, 3 * y) if p.bias else 0.0)


def backward_fused(p: Problem) -> float:
    """dx, dy * e and de, a product for each weight, and sums."""
    y = p.M * p.B * p.O
    rows = p.M * -(-p.B // ROWS) * ROWS
    _, dx, dweight = EFFICIENCY[p.kind]
    us = _product(p, rows, 2, dx, y) + (3 if p.exact else 2) * _product(p, rows, 1, dweight)
    return us + _pass(p, 3 * y) + 2 * _pass(p, 3 * y) + 3 * SUM_LAUNCH


def backward_composed(p: Problem) -> float:
    """Five products (one of them made again, for ds) and a pass for each factor and each sum."""
    x, y = p.M * p.B * p.I, p.M * p.B * p.O
    wide = 2 if p.exact else 1  # all in float32
    us = (4 + p.factors) * _product(p, p.M * p.B, 1, 1.0) * (12.0 if p.exact else 1.0)
    us += wide * (2 * _pass(p, 3 * y) + _pass(p, 3 * x) + _pass(p, 3 * y))
    if p.factors:
        us += wide * (5 * _pass(p, 3 * y) + 5 * _pass(p, 3 * x))
    return us


def _product(p: Problem, rows: int, weights: int, share: float, more: int = 0) -> float:
    """GEMMs of rows x I x O for `weights` weights at a share of the library's rate."""
    share *= 1.0 if p.aligned or share == 1.0 else UNALIGNED[p.kind]
    flops = 2e-6 * weights * rows * p.I * p.O / RATE[p.arch][p.kind]
    elements = rows * (p.I + p.O) + weights * p.I * p.O + more
    return GEMM_LAUNCH + max(flops / share, _size(p) * 1e-6 * elements / BANDWIDTH[p.arch])


_chosen = lru_cache(4096)(choose)  # a layer asks the same at every step


def plan_for(t: Inputs, needs: Inputs, members: int, batch_major: bool) -> Plan:
    """The plan for tensors on a CUDA device."""
    O, I = t.weight.shape
    x, B = t.x, examples(t.x, batch_major)
    if free(members, B):
        return Plan("composed", "composed")
    arch = architecture(x.device.index)
    unit = 16 if arch == 80 else 16 // x.element_size()  # what vector loads, or descriptors, need
    strides = (O, *x.stride()[:-1], *t.weight.stride()[:-1], *t.delta.stride()[:-1])
    unit_last = all(w.stride(-1) == 1 for w in (x, t.weight, t.delta))
    aligned = unit_last and all(n % unit == 0 for n in strides)
    problem = Problem(
        members,
        B,
        I,
        O,
        arch,
        kind_of(x.dtype),
        t.u is None,
        t.r is not None or t.s is not None,
        t.bias is not None,
        aligned,
        held_in_float32(t, needs),
    )
    return choose(problem) if torch.compiler.is_compiling() else _chosen(problem)
