"""hyper_batch_linear, backward: dx of both weights in one kernel; their gradients in one each.

dx = ((dy s) weight) r + ((dy e v) delta) u. The gradients of weight, r, s and of delta, u, v are
those that batch_ensemble_linear has for dy and for dy e; so neither x * r nor its product is kept.
"""

import torch
import triton
import triton.language as tl

from . import hyper_batch_linear_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from ._reduce import parts, sum_parts
from .batch_ensemble_linear import (
    DTYPES,
    describable,
    descriptor,
    load_tile,
    offset,
    precision,
    row_strides,
    spans_long,
    swizzled,
)
from .batch_ensemble_linear_backward import batch_ensemble_linear_bwd
from .hyper_batch_linear import OP


@triton.jit(do_not_specialize=["M", "B"])
def hyper_batch_linear_bwd_x_kernel(
    dy, weight, delta, x, e_ptr, r_ptr, s_ptr, u_ptr, v_ptr, dx_ptr, dr_part_ptr, du_part_ptr,
    M, B, I, O,
    dy_stride_m, dy_stride_b, dy_stride_o, weight_stride_o, weight_stride_i,
    delta_stride_o, delta_stride_i, x_stride_m, x_stride_b, x_stride_i,
    e_stride_m, e_stride_b, e_stride_o, dx_stride_m, dx_stride_b,
    SHARED_X: tl.constexpr, TIED: tl.constexpr, EVEN_O: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, LONG: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # One program computes [BLOCK_B, BLOCK_I] of dx for one member, and that tile's parts of dr and
    # du: [tiles of B, M, I]. TIED: u is r, so one accumulator holds both products.
    tiles_b = tl.cdiv(B, BLOCK_B)
    row, col = swizzled(tl.program_id(0), M * tiles_b, tl.cdiv(I, BLOCK_I), GROUP)
    m = row // tiles_b
    tile_b = row % tiles_b
    offs_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_i = col * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = tl.arange(0, BLOCK_O)
    in_b = offs_b < B
    in_i = offs_i < I
    p_e = e_ptr + (m.to(tl.int64) * e_stride_m + offs_b.to(tl.int64) * e_stride_b)[:, None]
    t = tl.zeros((BLOCK_B, BLOCK_I), tl.float32)
    t2 = tl.zeros((BLOCK_B, BLOCK_I), tl.float32)
    for o in tl.range(0, O, BLOCK_O):
        a = load_tile(dy, m, tile_b * BLOCK_B, o, B, O, dy_stride_m, dy_stride_b, dy_stride_o,
                      BLOCK_B, BLOCK_O, EVEN_O, TMA, LONG)  # fmt: skip
        in_o = EVEN_O | (o + offs_o < O)
        p = p_e + offset(o + offs_o, e_stride_o, LONG)[None, :]
        e = tl.load(p, mask=in_b[:, None] & in_o[None, :], other=0.0).to(tl.float32)
        a2 = a.to(tl.float32) * e
        s_offs = offset(m, O, LONG) + o + offs_o
        if v_ptr is not None:
            v = tl.load(v_ptr + s_offs, mask=in_o, other=0.0).to(DTYPE).to(tl.float32)
            a2 *= v[None, :]
        if s_ptr is not None:  # dy * s is rounded to the input dtype, as in plain PyTorch
            a = a * tl.load(s_ptr + s_offs, mask=in_o, other=0.0).to(DTYPE)[None, :]
        w = load_tile(weight, 0, o, col * BLOCK_I, O, I, 0, weight_stride_o, weight_stride_i,
                      BLOCK_O, BLOCK_I, False, TMA, LONG)  # fmt: skip
        d = load_tile(delta, 0, o, col * BLOCK_I, O, I, 0, delta_stride_o, delta_stride_i,
                      BLOCK_O, BLOCK_I, False, TMA, LONG)  # fmt: skip
        t = tl.dot(a, w, t, input_precision=PRECISION)
        if TIED:
            t = tl.dot(a2.to(DTYPE), d, t, input_precision=PRECISION)
        else:
            t2 = tl.dot(a2.to(DTYPE), d, t2, input_precision=PRECISION)

    if dr_part_ptr is not None or du_part_ptr is not None:
        inputs = load_tile(x, 0 if SHARED_X else m, tile_b * BLOCK_B, col * BLOCK_I, B, I,
                           x_stride_m, x_stride_b, x_stride_i,
                           BLOCK_B, BLOCK_I, False, TMA, LONG).to(tl.float32)  # fmt: skip
        part_offs = (tile_b * M + m).to(tl.int64) * I + offs_i
        if dr_part_ptr is not None:
            tl.store(dr_part_ptr + part_offs, tl.sum(t * inputs, 0), mask=in_i)
        if du_part_ptr is not None:
            tl.store(du_part_ptr + part_offs, tl.sum(t2 * inputs, 0), mask=in_i)
    r_offs = offset(m, I, LONG) + offs_i
    if r_ptr is not None:
        r = tl.load(r_ptr + r_offs, mask=in_i, other=0.0).to(DTYPE).to(tl.float32)
        t *= r[None, :]
    if not TIED:
        u = tl.load(u_ptr + r_offs, mask=in_i, other=0.0).to(DTYPE).to(tl.float32)
        t += t2 * u[None, :]
    p_dx = dx_ptr + m.to(tl.int64) * dx_stride_m
    p_dx = p_dx + (offs_b.to(tl.int64) * dx_stride_b)[:, None] + offs_i[None, :]
    tl.store(p_dx, t.to(dx_ptr.dtype.element_ty), mask=in_b[:, None] & in_i[None, :])


def hyper_batch_linear_bwd_x(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    delta: torch.Tensor,
    e: torch.Tensor,
    r: torch.Tensor | None,
    s: torch.Tensor | None,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    dx: torch.Tensor,
    dr: torch.Tensor | None,
    du: torch.Tensor | None,
    tf32: bool,
    *,
    config: Config | None = None,
    long: bool | None = None,
) -> None:
    """Fills dx and, where given, dr and du [M, I], contiguous; u is None where it is r, v alike.

    dy, e [M, B, O], x and dx [M, B, I] or [B, I], weight, delta [O, I]: any strides, but unit along
    I for dx; r, u [M, I]; s, v [M, O]. All in one dtype, except that factors, dr and du may be
    float32 where it has 16 bits. A shared x takes float32 parts [M, B, I] of dx.
    """
    (M, B, O), I = dy.shape, x.shape[-1]
    tied, shared = u is None, x.ndim == 2
    v = s if v is None else v
    r, s, u, v = (None if t is None else t.contiguous() for t in (r, s, u, v))
    long = spans_long(dy, x, weight, delta, e, r, s, u, v) if long is None else long
    kind, sms = tiles.kind_of(x.dtype, tf32), tiles.processors(x)
    strides = (*dy.stride(), *weight.stride(), *delta.stride(), *row_strides(x), *e.stride())

    def launch(c: Config) -> None:
        block_b, block_i, block_o = (c.tiles[k] for k in ("BLOCK_B", "BLOCK_I", "BLOCK_O"))
        tiles_b, tiles_i = cdiv(B, block_b), cdiv(I, block_i)
        jobs = []
        out = parts(jobs, dx, M, B, I) if shared else dx
        factors = [parts(jobs, t, tiles_b, M, I) for t in (dr, du)]
        hyper_batch_linear_bwd_x_kernel[grid(OP, M * tiles_b * tiles_i)](
            descriptor(dy, block_b, block_o) if c.tma else dy,
            descriptor(weight, block_o, block_i) if c.tma else weight,
            descriptor(delta, block_o, block_i) if c.tma else delta,
            descriptor(x, block_b, block_i) if c.tma else x,
            e, r, s, u, v, out, *factors, M, B, I, O, *strides, *out.stride()[:2],
            SHARED_X=shared, TIED=tied, EVEN_O=O % block_o == 0, PRECISION=precision(kind),
            TMA=c.tma, LONG=long, DTYPE=DTYPES[x.dtype], **c.options(),
        )  # fmt: skip
        sum_parts(jobs)

    with on_device(x):
        if config is None:
            tma = arch(x) >= 90 and all(describable(t) for t in (dy, x, weight, delta))
            where = ("x tied" if tied else "x", kind, tma, arch(x))
            config = tiles.input_config(*where, sms, M, B, I)
            if AUTOTUNE:
                sizes = (sms, M, B, I, O, shared)
                key = ("hyper_batch_linear_bwd_x", x.device, x.dtype, *where, *sizes)
                others = [c for _, c in tiles.buckets(arch(x), where[0], kind, tma)]
                config = fastest(key, config, others, launch)
        launch(config)


def hyper_batch_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    delta: torch.Tensor,
    e: torch.Tensor,
    r: torch.Tensor | None,
    s: torch.Tensor | None,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    ddelta: torch.Tensor | None,
    dr: torch.Tensor | None,
    ds: torch.Tensor | None,
    du: torch.Tensor | None,
    dv: torch.Tensor | None,
    dbias: torch.Tensor | None,
    tf32: bool,
    *,
    exact: bool = False,
) -> None:
    """Fills those of the gradients that are given; inputs as in `hyper_batch_linear_bwd_x`.

    Where u is None dr has both parts, and so has ds where v is None. `exact` keeps 16-bit rounding
    out of all but dx: dr is then made beside dweight, and dy e, which has twice the digits, enters
    as the sum of two 16-bit tensors.
    """
    if dx is not None:
        some = (None, None) if exact else (dr, du)
        hyper_batch_linear_bwd_x(dy, x, weight, delta, e, r, s, u, v, dx, *some, tf32)
        dr, du = (dr, du) if exact else (None, None)

    def half(d, w, r, s, dx, dw, dr, ds):
        bias = dbias if d is dy else None
        if any(t is not None for t in (dw, dr, ds, bias)):
            batch_ensemble_linear_bwd(d, x, w, r, s, None, dw, dr, ds, bias, tf32)

    factors, gradients = (r, s, u, v), (dr, ds, du, dv)
    both_halves(half, dy, e, (weight, delta), factors, None, (dweight, ddelta), gradients, exact)


def both_halves(half, dy, e, weights, factors, dxs, dweights, gradients, exact: bool) -> None:
    """`half(d, weight, r, s, dx, dweight, dr, ds)` for weight with dy, and for delta with dy e.

    factors: r, s, u, v; gradients: of these, where wanted. Sums what belongs to a factor of both;
    with `exact`, dy e enters as the sum of two tensors.
    """
    (r, s, u, v), (dr, ds, du, dv) = factors, gradients
    dx, dx2 = (None, None) if dxs is None else dxs
    first_r, second_r = _parts(dr, du, u is None)
    first_s, second_s = _parts(ds, dv, v is None)
    half(dy, weights[0], r, s, dx, dweights[0], first_r, first_s)
    second = (dweights[1], second_r, second_s)
    if dx2 is not None or any(t is not None for t in second):
        u, v = r if u is None else u, s if v is None else v
        d, *more = _products(dy, e, exact)
        half(d, weights[1], u, v, dx2, *second)
        for d in more:
            rest = [None if t is None else torch.empty_like(t) for t in second]
            half(d, weights[1], u, v, None, *rest)
            for t, part in zip(second, rest, strict=True):
                if t is not None:
                    t += part
    for total, both in ((dr, (first_r, second_r)), (ds, (first_s, second_s))):
        if total is not None and both[0] is not total:
            torch.add(*both, out=total)


def _parts(total, own, tied: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where to put the two parts of a factor's gradient: one sum where it is tied."""
    if not tied:
        return total, own
    if total is None:
        return None, None
    return tuple(torch.empty_like(total, dtype=torch.float32) for _ in range(2))


def _products(dy: torch.Tensor, e: torch.Tensor, exact: bool) -> list[torch.Tensor]:
    """dy e, rounded, or exactly, as a sum of tensors of that dtype."""
    if not exact:
        return [dy * e]
    product = dy.float() * e.float()
    high = product.to(dy.dtype)
    return [high, (product - high).to(dy.dtype)]
