"""perturb: y[m, p] = (w[m, p] + scale[m] * sigma[m, p] * normal) * mask / (1 - dropout[m]).

The random integers are those of csrc/noise.h, which explains them, and so are the formulas; they
are written out here because Triton's own generator numbers its calls by offsets of 32 bits and its
Gaussian numbers lose digits near a radius of 0. Nothing random is stored: the backward draws again.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import ARCHS, Config, arch, cdiv, on_device
from ._table import full_unit
from .combine import seen

# (arch, kernel) -> Config. Origin: registers and 16-byte accesses of the compiled code; not timed
# on a GPU yet.
SHIPPED = {
    (a, kernel): Config({"BLOCK_P": block}, num_warps=4, num_stages=1)
    for a in ARCHS
    for kernel, block in (("fwd", 1024), ("bwd", 512))
}
MOST_ROWS = 65535  # the limit of a grid's second dimension; programs go on to further members

_NEVER_CONSTANT = ["M", "P", "seed", "first_member"]


class Draw(NamedTuple):
    """What is drawn: see `landscape_fast.ops.perturb`."""

    sigma: torch.Tensor | None  # [P], [1, P] or [M, P], unit stride along P
    scales: torch.Tensor | None  # float32 [M], or None: all have `scale`, and 0 draws nothing
    dropouts: torch.Tensor | None
    seeds: torch.Tensor | None  # int64, 0-dim; or None: `seed`
    scale: float
    dropout: float
    seed: int
    first_member: int


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32."""
    for _ in tl.static_range(10):
        low0 = c0 * 0xD2511F53
        low2 = c2 * 0xCD9E8D57
        high0 = tl.umulhi(c0, 0xD2511F53)
        high2 = tl.umulhi(c2, 0xCD9E8D57)
        c0 = high2 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low2
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(seed, quads, member, STREAM: tl.constexpr):
    """Four words for each of the int64 `quads`, groups of four neighbouring elements."""
    low = quads.to(tl.uint32)
    high = (quads >> 32).to(tl.uint32)
    c2 = tl.zeros_like(low) + member.to(tl.uint32)
    c3 = tl.zeros_like(low) + STREAM
    return philox(low, high, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def _radius(x):
    u = x.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    rest = (x ^ 0xFFFFFFFF).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    i = u.to(tl.int32, bitcast=True)
    e = (i - 0x3F3504F3) >> 23
    mantissa = (i - (e << 23)).to(tl.float32, bitcast=True)
    f = tl.where(e == 0, -rest, mantissa - 1.0)
    y = 0.1258355944 * f - 0.2072682098
    y = y * f + 0.2157154338
    y = y * f - 0.2389450378
    y = y * f + 0.2879162895
    y = y * f - 0.3607036749
    y = y * f + 0.4809106416
    y = y * f - 0.7213473469
    y = y * f + 1.442695004
    return tl.sqrt_rn(-1.386294361119891 * (e.to(tl.float32) + f * y))  # 2 ln 2


@triton.jit
def _turn(x):
    quarter = (x + 0x20000000) >> 30
    t = (x - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    z = t * t
    s = -75.39356272 * z + 81.59235356
    s = s * z - 41.34166146
    s = (s * z + 6.283185287) * t
    c = 59.22924326 * z - 85.44323627
    c = c * z + 64.93932185
    c = c * z - 19.73920868
    c = c * z + 1.0
    odd = (quarter & 1) != 0
    along = tl.where(odd, s, c)
    across = tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -along, along)
    return cosine, tl.where((quarter & 2) != 0, -across, across)


@triton.jit
def _in_order(a, b, c, d, BLOCK_P: tl.constexpr):
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_P,))


@triton.jit
def normals(seed, quads, member, BLOCK_P: tl.constexpr):
    """[BLOCK_P] standard normal numbers from [BLOCK_P // 4] quads."""
    x0, x1, x2, x3 = words(seed, quads, member, 0)
    r0 = _radius(x0)
    r2 = _radius(x2)
    c0, s0 = _turn(x1)
    c2, s2 = _turn(x3)
    return _in_order(r0 * c0, r0 * s0, r2 * c2, r2 * s2, BLOCK_P)


@triton.jit
def factors(seed, quads, member, dropout, BLOCK_P: tl.constexpr):
    """[BLOCK_P]: 0 for what is dropped, 1 / (1 - dropout) for what stays."""
    x0, x1, x2, x3 = words(seed, quads, member, 1)
    threshold = dropout * 16777216.0
    first = ((x0 >> 8).to(tl.float32) >= threshold).to(tl.float32)
    second = ((x1 >> 8).to(tl.float32) >= threshold).to(tl.float32)
    third = ((x2 >> 8).to(tl.float32) >= threshold).to(tl.float32)
    fourth = ((x3 >> 8).to(tl.float32) >= threshold).to(tl.float32)
    stays = _in_order(first, second, third, fourth, BLOCK_P) != 0
    return tl.where(stays, tl.div_rn(tl.full((), 1.0, tl.float32), 1.0 - dropout), 0.0)


@triton.jit
def _seed_of(seeds_ptr, seed):
    if seeds_ptr is None:
        return seed.to(tl.int64)
    else:
        return tl.load(seeds_ptr)


@triton.jit
def _of_member(numbers_ptr, number, m):
    if numbers_ptr is None:
        return number
    else:
        return tl.load(numbers_ptr + m)


@triton.jit(do_not_specialize=_NEVER_CONSTANT)
def perturb_fwd_kernel(
    weights_ptr, sigma_ptr, scales_ptr, dropouts_ptr, seeds_ptr, y_ptr,
    M, P, seed, first_member, scale, dropout, weights_stride_m, sigma_stride_m,
    NOISE: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # One program makes one tile of one member, and of every member that is a grid's height on.
    P = seen(P, UNIT)
    start = tl.program_id(0).to(tl.int64) * BLOCK_P
    quads = start // 4 + tl.arange(0, BLOCK_P // 4)
    offs_p = start + tl.arange(0, BLOCK_P)
    in_p = offs_p < P
    seed = _seed_of(seeds_ptr, seed)
    m = tl.program_id(1).to(tl.int64)
    for _ in range(tl.program_id(1), M, tl.num_programs(1)):
        y = tl.load(weights_ptr + m * seen(weights_stride_m, UNIT) + offs_p, mask=in_p, other=0.0)
        y = y.to(tl.float32)
        if NOISE:
            noise = normals(seed, quads, first_member + m, BLOCK_P)
            if sigma_ptr is not None:
                s = tl.load(
                    sigma_ptr + m * seen(sigma_stride_m, UNIT) + offs_p, mask=in_p, other=0.0
                )
                noise *= s.to(tl.float32)
            y += _of_member(scales_ptr, scale, m) * noise
        if MASK:
            chance = _of_member(dropouts_ptr, dropout, m)
            y *= factors(seed, quads, first_member + m, chance, BLOCK_P)
        tl.store(y_ptr + m * P + offs_p, y.to(y_ptr.dtype.element_ty), mask=in_p)
        m += tl.num_programs(1)


@triton.jit(do_not_specialize=_NEVER_CONSTANT)
def perturb_bwd_kernel(
    dy_ptr, sigma_ptr, scales_ptr, dropouts_ptr, seeds_ptr, dweights_ptr, dsigma_ptr, parts_ptr,
    M, P, seed, first_member, scale, dropout, dy_stride_m, sigma_stride_m,
    NOISE: tl.constexpr, MASK: tl.constexpr, UNIT: tl.constexpr, SHARED_WEIGHTS: tl.constexpr,
    SHARED_SIGMA: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # One program takes one tile of one member, or, where a gradient is one for all members (the
    # grid is then one row high), of all in order. parts[tile, m] is the tile's share of dscales[m].
    P = seen(P, UNIT)
    start = tl.program_id(0).to(tl.int64) * BLOCK_P
    quads = start // 4 + tl.arange(0, BLOCK_P // 4)
    offs_p = start + tl.arange(0, BLOCK_P)
    in_p = offs_p < P
    seed = _seed_of(seeds_ptr, seed)
    dweights = tl.zeros((BLOCK_P,), tl.float32)
    dsigma = tl.zeros((BLOCK_P,), tl.float32)
    m = tl.program_id(1).to(tl.int64)
    for _ in range(tl.program_id(1), M, tl.num_programs(1)):
        g = tl.load(dy_ptr + m * seen(dy_stride_m, UNIT) + offs_p, mask=in_p, other=0.0)
        g = g.to(tl.float32)
        if MASK:
            chance = _of_member(dropouts_ptr, dropout, m)
            g *= factors(seed, quads, first_member + m, chance, BLOCK_P)
        if dweights_ptr is not None:
            if SHARED_WEIGHTS:
                dweights += g
            else:
                place = dweights_ptr + m * P + offs_p
                tl.store(place, g.to(dweights_ptr.dtype.element_ty), mask=in_p)
        if (dsigma_ptr is not None) | (parts_ptr is not None):
            if NOISE:
                g *= normals(seed, quads, first_member + m, BLOCK_P)
            else:
                g *= 0.0
        if dsigma_ptr is not None:
            one = _of_member(scales_ptr, scale, m) * g
            if SHARED_SIGMA:
                dsigma += one
            else:
                place = dsigma_ptr + m * P + offs_p
                tl.store(place, one.to(dsigma_ptr.dtype.element_ty), mask=in_p)
        if parts_ptr is not None:
            if sigma_ptr is not None:
                s = tl.load(
                    sigma_ptr + m * seen(sigma_stride_m, UNIT) + offs_p, mask=in_p, other=0.0
                )
                g *= s.to(tl.float32)
            tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * M + m, tl.sum(g, 0))
        m += tl.num_programs(1)
    if dweights_ptr is not None:
        if SHARED_WEIGHTS:
            to = dweights_ptr.dtype.element_ty
            tl.store(dweights_ptr + offs_p, dweights.to(to), mask=in_p)
    if dsigma_ptr is not None:
        if SHARED_SIGMA:
            tl.store(dsigma_ptr + offs_p, dsigma.to(dsigma_ptr.dtype.element_ty), mask=in_p)


def perturb_fwd(
    weights: torch.Tensor, draw: Draw, y: torch.Tensor, config: Config | None = None
) -> None:
    """y [M, P], contiguous, from weights [M, P], [1, P] or [P], unit stride along P; no size 0."""
    M, P = y.shape
    with on_device(y):
        config = config or SHIPPED[arch(y), "fwd"]
        grid = (cdiv(P, config.tiles["BLOCK_P"]), min(M, MOST_ROWS))
        perturb_fwd_kernel[grid](
            weights, *_pointers(draw), y, M, P, *_numbers(draw), _stride_m(weights, M),
            _stride_m(draw.sigma, M), *_wanted(draw), _unit(weights, draw, y), **config.options(),
        )  # fmt: skip


def perturb_bwd(
    dy: torch.Tensor,
    draw: Draw,
    dweights: torch.Tensor | None,
    dsigma: torch.Tensor | None,
    scales_too: bool,
    config: Config | None = None,
) -> torch.Tensor | None:
    """Writes the gradients that are not None, contiguous, of the shapes of weights and sigma.

    dy [M, P], unit stride along P. Returns parts [tiles, M] float32, whose sum over the tiles is
    the gradient of the scales, or None.
    """
    M, P = dy.shape
    one_each = [t is not None and t.shape[:-1] != (M,) for t in (dweights, dsigma)]
    with on_device(dy):
        config = config or SHIPPED[arch(dy), "bwd"]
        tiles = cdiv(P, config.tiles["BLOCK_P"])
        parts = dy.new_empty((tiles, M), dtype=torch.float32) if scales_too else None
        perturb_bwd_kernel[(tiles, 1 if any(one_each) else min(M, MOST_ROWS))](
            dy, *_pointers(draw), dweights, dsigma, parts, M, P, *_numbers(draw),
            _stride_m(dy, M), _stride_m(draw.sigma, M), *_wanted(draw), _unit(dy, draw, dy),
            *one_each, **config.options(),
        )  # fmt: skip
    return parts


def _pointers(draw: Draw) -> tuple:
    return draw.sigma, draw.scales, draw.dropouts, draw.seeds


def _numbers(draw: Draw) -> tuple:
    return draw.seed, draw.first_member, float(draw.scale), float(draw.dropout)


def _wanted(draw: Draw) -> tuple[bool, bool]:
    noise = draw.scales is not None or draw.scale != 0
    return noise, draw.dropouts is not None or draw.dropout != 0


def _unit(rows: torch.Tensor, draw: Draw, like: torch.Tensor) -> int:
    """The most elements, up to 16 bytes, that all rows of `like` [M, P] are multiples of."""
    M, P = like.shape
    return math.gcd(P | _stride_m(rows, M) | _stride_m(draw.sigma, M), full_unit(like))


def _stride_m(rows: torch.Tensor | None, M: int) -> int:
    """Elements from one member's row to the next; 0 where all share it."""
    return rows.stride(0) if rows is not None and rows.ndim == 2 and rows.shape[0] == M else 0
