"""Which way batch_ensemble_linear goes on a GPU: fused kernels, or a composition of library calls.

A model of the time of each way, in microseconds, from floating-point operations, bytes and kernel
launches. Every number is an estimate until measured: the rates are those of the vendors' libraries
(H200: 790 TFLOP/s and 4.3 TB/s are measured figures, the others data sheets), and `EFFICIENCY`
says how close our products come to them. A Triton main loop without warp specialisation was seen
at 74 to 92 % of cuBLAS on Hopper; the weight gradient keeps two accumulators, hence smaller tiles.
The choice is the smaller estimate, so a fused kernel never runs where the library is expected to
be quicker. Forcing a backend overrides it.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

RATE = {  # arch -> kind -> TFLOP/s of a library GEMM
    80: {"half": 270.0, "tf32": 135.0, "ieee": 18.0},
    90: {"half": 790.0, "tf32": 395.0, "ieee": 55.0},
    100: {"half": 1700.0, "tf32": 850.0, "ieee": 70.0},
}
BANDWIDTH = {80: 1.7, 90: 4.3, 100: 7.0}  # TB/s of a copy
EFFICIENCY = {  # arch -> kind -> share of that rate in y, dx and dweight
    80: {"half": (0.80, 0.78, 0.55), "tf32": (0.80, 0.75, 0.45), "ieee": (0.6, 0.6, 0.4)},
    90: {"half": (0.80, 0.78, 0.65), "tf32": (0.80, 0.70, 0.55), "ieee": (0.6, 0.6, 0.4)},
    100: {"half": (0.65, 0.60, 0.45), "tf32": (0.60, 0.50, 0.35), "ieee": (0.6, 0.6, 0.4)},
}
GEMM_LAUNCH = 4.0  # us: launch, ramp and tail of a product
PASS_LAUNCH = 2.0  # us: of an elementwise pass or a reduction
SUM_LAUNCH = 3.0  # us: of the kernel that adds up the parts of a split sum
UNALIGNED = {"half": 0.1, "tf32": 0.5, "ieee": 0.8}  # share left where 16-byte loads are impossible
ROWS = 64  # examples of a member that one tile holds
TILE_BYTES = 1.5  # traffic of the weight gradient's epilogue, per member and weight
WITH_DR = 0.85  # share of its rate left where that epilogue makes dr too, in smaller tiles
OUTER_PASSES = 6  # times that a composition from G moves it, a float32 [M, O, I]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool = False
    weight: bool = False
    r: bool = False
    s: bool = False
    bias: bool = False


class Plan(NamedTuple):
    """How to run the forward and the backward.

    `forward` is "fused", "composed" or "cpp" (compiled for a CPU). `backward` is "H" (fused, dr
    beside dx), "G" (fused, dr beside dweight), "composed", "outer" (composed from
    G_m = dy_m^T x_m), "wide" (composed in float32, for few examples), "cpp", or "none". All
    but "composed" keep x alone of the activations; "composed" also keeps (x * r) weight^T for ds,
    and then implies a composed forward. "G", "outer" and "wide" round nothing to 16 bits before the
    gradients of weight, r and s, which is what those held in float32 are promised.
    """

    forward: str
    backward: str


COMPOSED = Plan("composed", "composed")
OUTER = Plan("composed", "outer")
FUSED = Plan("fused", "H")
# Examples of a member below which "wide" is quicker than "outer" on a CPU: 1.2 to 1.7 times at 32,
# 0.9 to 1.1 times at 64, for 512 and 1024 features (bfloat16, one thread of an AMD EPYC).
WIDE_EXAMPLES = 48


class Problem(NamedTuple):
    """Sizes, and what decides the cost: arguments that are there, and how products are formed."""

    M: int
    B: int
    I: int
    O: int
    arch: int = 90  # 80, 90 or 100
    kind: str = "half"  # "half", "tf32", "ieee"
    shared_x: bool = False
    has_r: bool = True
    has_s: bool = True
    aligned: bool = True  # rows of x, weight and y allow 16-byte loads
    exact: bool = False  # gradients of weight, r or s are wanted that 16 bits never rounded
    wide: bool = False  # and products of float32 factors are not rounded to tf32


@cache
def architecture(index: int) -> int:
    """Which column of the tables a CUDA device belongs to."""
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(index)[0], 80)


architecture._dynamo_marked_constant = True  # torch.compile may take its answer for granted


def examples(x: Tensor, batch_major: bool) -> int:
    """B"""
    return x.shape[0] if x.ndim == 2 or batch_major else x.shape[1]


def plan_for(x: Tensor, weight: Tensor, factors: tuple, sizes: tuple, needs, exact: bool) -> Plan:
    """The plan for tensors on a CUDA device; factors: (r, s), sizes: (M, batch_major)."""
    (O, I), (members, batch_major) = weight.shape, sizes
    B = examples(x, batch_major)
    arch, kind = architecture(x.device.index), kind_of(x.dtype)
    unit = 16 if arch == 80 else 16 // x.element_size()  # what vector loads, or descriptors, need
    strides = (O, *x.stride()[:-1], *weight.stride()[:-1])
    aligned = x.stride(-1) == 1 and weight.stride(-1) == 1 and all(n % unit == 0 for n in strides)
    there = [t is not None for t in factors]
    wide = exact and not tf32_allowed()
    problem = Problem(members, B, I, O, arch, kind, x.ndim == 2, *there, aligned, exact, wide)
    return choose(problem, needs) if torch.compiler.is_compiling() else chosen(problem, needs)


def composed_plan(x: Tensor, B: int, I: int, needs: Needs, exact: bool) -> Plan:
    """The plan where only library calls can run.

    On a CPU, ds from G rather than from a product that the forward would have to keep costs nothing
    from B = I / 2 on: 0.94 to 1.00 of the time at (M, B, I, O) = (32, 256, 512, 512),
    (16, 512, 128, 128) and (8, 1024, 256, 256), but 1.17 at (32, 64, 512, 512) and 1.2 at
    (4, 128, 1024, 1024) (float32, one thread of an AMD EPYC with AVX-512).
    """
    if exact:
        few = B < WIDE_EXAMPLES and not (x.is_cuda and tf32_allowed())
        return Plan("composed", "wide" if few else "outer")
    full = x.dtype in (torch.float32, torch.float64)
    return OUTER if needs.s and full and not x.is_cuda and 2 * B >= I else COMPOSED


def choose(p: Problem, needs: Needs) -> Plan:
    """The plan with the smallest estimate; a tie goes to the fused kernels, which keep less."""
    if not any(needs):
        forward = "fused" if forward_fused(p) <= forward_composed(p) else "composed"
        return Plan(forward, "none")
    fused_way = "H" if needs.x and not p.exact else "G"
    plans = [Plan("fused", fused_way), Plan("composed", fused_way)]
    if p.exact:
        ways = ("outer", "wide") if p.wide else ("outer",)
        plans += [Plan(forward, way) for way in ways for forward in ("fused", "composed")]
    else:
        plans.append(COMPOSED)
        if not needs.s:
            plans.append(Plan("fused", "composed"))
    best, least = plans[0], estimate(p, needs, plans[0])
    for plan in plans[1:]:  # a loop, since torch.compile traces this where sizes are dynamic
        us = estimate(p, needs, plan)
        if us < least:
            best, least = plan, us
    return best


chosen = lru_cache(4096)(choose)  # a layer asks the same at every step


def estimate(p: Problem, needs: Needs, plan: Plan) -> float:
    """Microseconds of a forward and its backward."""
    us = forward_fused(p) if plan.forward == "fused" else forward_composed(p)
    if plan.backward == "composed":
        us += backward_composed(p, needs)
    elif plan.backward == "outer":
        us += backward_outer(p, needs)
    elif plan.backward == "wide":
        us += backward_wide(p, needs)
    elif plan.backward != "none":
        us += backward_fused(p, needs, plan.backward)
    return us


def forward_fused(p: Problem) -> float:
    """One kernel; with few examples per member, its tiles span members at half the rate."""
    share = _efficiency(p)[0]
    return _product(p, p.M * p.B, share if p.B >= ROWS else share / 2)


def forward_composed(p: Problem) -> float:
    """x * r, the product, and its epilogue."""
    rows = p.B if p.shared_x and not p.has_r else p.M * p.B
    us = _product(p, rows, 1.0)
    if p.has_r:
        us += _pass(p, (p.B if p.shared_x else p.M * p.B) * p.I + p.M * p.B * p.I)
    return us + _pass(p, rows * p.O + p.M * p.B * p.O)


def backward_fused(p: Problem, needs: Needs, way: str) -> float:
    """dx (in "H" with dr), dweight with ds and db (and dr otherwise), and their sum."""
    _, dx, dweight = _efficiency(p)
    rows = p.M * -(-p.B // ROWS) * ROWS
    us = 0.0
    if needs.x:
        us += _product(p, rows, dx)
    dr_here = needs.r and not (needs.x and way == "H")
    if needs.weight or needs.s or dr_here:
        us += _product(p, rows, dweight * WITH_DR if dr_here and needs.x else dweight)
        us += TILE_BYTES * p.M * p.O * p.I / BANDWIDTH[p.arch] * 1e-6
    elif needs.bias:
        us += _pass(p, p.M * p.B * p.O)
    return us + SUM_LAUNCH


def backward_outer(p: Problem, needs: Needs) -> float:
    """The product and passes for dx, the product for G, and its elementwise passes."""
    us = backward_composed(p, Needs(x=needs.x, bias=needs.bias))
    if needs.weight or needs.r or needs.s:
        moved = 4e-6 * OUTER_PASSES * p.M * p.O * p.I / BANDWIDTH[p.arch]
        us += _product(p, p.M * p.B, 1.0) + moved + 2 * OUTER_PASSES * PASS_LAUNCH
    return us


def backward_wide(p: Problem, needs: Needs) -> float:
    """The composition with all tensors widened to float32, and the product for ds made again."""
    q = p._replace(kind="ieee")
    us = backward_composed(q, needs) + _pass(q, p.O * p.I * 3 / 2) + 2 * PASS_LAUNCH
    if needs.s:
        us += _product(q, p.M * p.B, 1.0) + _pass(q, 2 * p.M * p.B * p.I)
    return us


def backward_composed(p: Problem, needs: Needs) -> float:
    """Library products, with an elementwise pass for each factor and a reduction for each sum."""
    alone = p.shared_x and not p.has_r  # one product serves all members
    rows = p.B if alone else p.M * p.B
    x, y = rows * p.I, p.M * p.B * p.O
    us = 0.0
    if needs.bias:
        us += _pass(p, y)
    if needs.s:
        us += _pass(p, 3 * y) + _pass(p, y)
    if p.has_s and (needs.x or needs.weight or needs.r):
        us += _pass(p, 2 * y)
    if alone and (needs.x or needs.weight):
        us += _pass(p, y)
    if needs.x or needs.r:
        us += _product(p, rows, 1.0)
    if needs.r:
        us += _pass(p, 3 * x) + _pass(p, x)
    if needs.x and p.has_r:
        us += _pass(p, 2 * x) + (_pass(p, x) if p.shared_x else 0.0)
    if needs.weight:
        us += _product(p, rows, 1.0) + (_pass(p, 2 * x) if p.has_r else 0.0)
    return us


def _efficiency(p: Problem) -> tuple[float, float, float]:
    """Shares of the library's rate in y, dx and dweight."""
    y, dx, dweight = EFFICIENCY[p.arch][p.kind]
    left = 1.0 if p.aligned else UNALIGNED[p.kind]
    return y * left, dx * left, dweight * left


def _product(p: Problem, rows: int, share: float) -> float:
    """A GEMM of rows x I x O at a share of the library's rate, or at that of the memory."""
    flops = 2e-6 * rows * p.I * p.O / RATE[p.arch][p.kind]
    moved = _size(p) * 1e-6 * (rows * (p.I + p.O) + p.I * p.O) / BANDWIDTH[p.arch]
    return GEMM_LAUNCH + max(flops / share, moved)


def _pass(p: Problem, elements: int) -> float:
    """One elementwise or reducing kernel that moves `elements`."""
    return PASS_LAUNCH + _size(p) * 1e-6 * elements / BANDWIDTH[p.arch]


def _size(p: Problem) -> int:
    return 2 if p.kind == "half" else 4


def kind_of(dtype: torch.dtype) -> str:
    """How products of this dtype are formed now: float32 follows torch's switch for matmul."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32_allowed() else "ieee"


def tf32_allowed() -> bool:
    """Whether torch may round float32 factors of a product to tf32 on CUDA."""
    matmul = torch.backends.cuda.matmul
    try:  # torch 2.9 and later; reading the old switch there fails once the new one was set
        return matmul.fp32_precision == "tf32"
    except AttributeError:
        return matmul.allow_tf32


tf32_allowed._dynamo_marked_constant = True  # torch.compile cannot trace the switch
