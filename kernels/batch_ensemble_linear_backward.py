"""batch_ensemble_linear, backward: two GEMM-shaped kernels over x and dy, and one fixed-order sum.

With G_m = dy_m^T x_m, a tile at a time in registers: dweight = sum_m s_m G_m r_m,
ds = rowsum(weight G r), dr = colsum(weight s G). With T_m = (dy_m s_m) weight: dx = T r,
dr = colsum(x T). So neither (x r) nor (x r) weight^T is kept, and nothing is divided by s.
"""

import torch
import triton
import triton.language as tl

from . import batch_ensemble_linear_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from ._reduce import Jobs, parts, sum_parts
from .batch_ensemble_linear import (
    DTYPES,
    OP,
    describable,
    descriptor,
    load_tile,
    offset,
    precision,
    row_strides,
    spans_long,
    swizzled,
)


@triton.jit(do_not_specialize=["M", "B", "members_per_split"])
def batch_ensemble_linear_bwd_x_kernel(
    dy, weight, x, r_ptr, s_ptr, dx_ptr, dr_part_ptr,
    M, B, I, O, members_per_split,
    dy_stride_m, dy_stride_b, dy_stride_o, weight_stride_o, weight_stride_i,
    x_stride_m, x_stride_b, x_stride_i, dx_stride_m, dx_stride_b,
    SHARED_X: tl.constexpr, EVEN_O: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    LONG: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # One program computes [BLOCK_B, BLOCK_I] of dx for one member or, for a shared x, of the sum
    # over the members of one split; and that tile's part of dr: [tiles of B, M, I].
    tiles_b = tl.cdiv(B, BLOCK_B)
    rows = (tl.cdiv(M, members_per_split) if SHARED_X else M) * tiles_b
    row, col = swizzled(tl.program_id(0), rows, tl.cdiv(I, BLOCK_I), GROUP)
    tile_b = row % tiles_b
    offs_o = tl.arange(0, BLOCK_O)
    offs_i = col * BLOCK_I + tl.arange(0, BLOCK_I)
    in_i = offs_i < I
    if SHARED_X:
        first = row // tiles_b * members_per_split
        last = min(first + members_per_split, M)
        total = tl.zeros((BLOCK_B, BLOCK_I), tl.float32)
    else:
        first = row // tiles_b
        last = first + 1
    t = tl.zeros((BLOCK_B, BLOCK_I), tl.float32)
    for m in range(first, last):
        if SHARED_X:
            t = tl.zeros((BLOCK_B, BLOCK_I), tl.float32)
        for o in tl.range(0, O, BLOCK_O):
            a = load_tile(dy, m, tile_b * BLOCK_B, o, B, O, dy_stride_m, dy_stride_b, dy_stride_o,
                          BLOCK_B, BLOCK_O, EVEN_O, TMA, LONG)  # fmt: skip
            if s_ptr is not None:  # dy * s is rounded to the input dtype, as in plain PyTorch
                p_s = s_ptr + offset(m, O, LONG) + o + offs_o
                s = tl.load(p_s, mask=EVEN_O | (o + offs_o < O), other=0.0)
                a = a * s.to(DTYPE)[None, :]
            w = load_tile(weight, 0, o, col * BLOCK_I, O, I, 0, weight_stride_o, weight_stride_i,
                          BLOCK_O, BLOCK_I, False, TMA, LONG)  # fmt: skip
            t = tl.dot(a, w, t, input_precision=PRECISION)
        if dr_part_ptr is not None:
            v = load_tile(x, 0 if SHARED_X else m, tile_b * BLOCK_B, col * BLOCK_I, B, I,
                          x_stride_m, x_stride_b, x_stride_i,
                          BLOCK_B, BLOCK_I, False, TMA, LONG)  # fmt: skip
            p_dr = dr_part_ptr + (tile_b * M + m).to(tl.int64) * I + offs_i
            tl.store(p_dr, tl.sum(t * v.to(tl.float32), 0), mask=in_i)
        if r_ptr is not None:
            p_r = r_ptr + offset(m, I, LONG) + offs_i
            t *= tl.load(p_r, mask=in_i, other=0.0).to(DTYPE).to(tl.float32)[None, :]
        if SHARED_X:
            total += t
    if SHARED_X:
        t = total
    offs_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    p_dx = dx_ptr + (row // tiles_b).to(tl.int64) * dx_stride_m
    p_dx = p_dx + (offs_b.to(tl.int64) * dx_stride_b)[:, None] + offs_i[None, :]
    tl.store(p_dx, t.to(dx_ptr.dtype.element_ty), mask=(offs_b < B)[:, None] & in_i[None, :])


@triton.jit
def outer_tile(
    dy, x, m, b_first, b_last, B, I, O, tile_o, tile_i,
    dy_stride_m, dy_stride_b, dy_stride_o, x_stride_m, x_stride_b, x_stride_i,
    BIAS: tl.constexpr, SHARED_X: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    LONG: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A tile of G_m = dy_m^T x_m over examples [b_first, b_last); with BIAS, the sums of dy_m."""
    g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    db = tl.zeros((BLOCK_O, 16), tl.float32)
    for b in tl.range(b_first, b_last, BLOCK_B):
        d = load_tile(dy, m, b, tile_o * BLOCK_O, B, O, dy_stride_m, dy_stride_b, dy_stride_o,
                      BLOCK_B, BLOCK_O, False, TMA, LONG)  # fmt: skip
        v = load_tile(x, 0 if SHARED_X else m, b, tile_i * BLOCK_I, B, I,
                      x_stride_m, x_stride_b, x_stride_i,
                      BLOCK_B, BLOCK_I, False, TMA, LONG)  # fmt: skip
        g = tl.dot(d.T, v, g, input_precision=PRECISION)
        if BIAS:
            if d.dtype == tl.float32:  # a tf32 product would round dy
                db += tl.sum(d, 0)[:, None]
            else:  # sixteen equal columns: exact, and cheaper than a reduction across warps
                db = tl.dot(d.T, tl.full((BLOCK_B, 16), 1.0, d.dtype), db)
    return g, tl.sum(db, 1) * 0.0625


@triton.jit(do_not_specialize=["M", "B", "members_per_split", "batch_per_split"])
def batch_ensemble_linear_bwd_weight_kernel(
    dy, x, weight, r_ptr, s_ptr, dweight_ptr, ds_part_ptr, dr_part_ptr, db_part_ptr,
    M, B, I, O, members_per_split, batch_per_split,
    dy_stride_m, dy_stride_b, dy_stride_o, x_stride_m, x_stride_b, x_stride_i,
    weight_stride_o, weight_stride_i,
    SHARED_X: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # One program computes [BLOCK_O, BLOCK_I] of dweight over the members and examples of one
    # split, and that tile's parts of ds, dr and db: [splits of B * tiles, M, O or I].
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_i = tl.cdiv(I, BLOCK_I)
    splits_m = tl.cdiv(M, members_per_split)
    split = tl.program_id(0) // (tiles_o * tiles_i)
    tile = tl.program_id(0) % (tiles_o * tiles_i)
    row, col = swizzled(tile, tiles_o, tiles_i, GROUP)
    split_b = split // splits_m
    b_first = split_b * batch_per_split
    b_last = min(b_first + batch_per_split, B)
    m_first = split % splits_m * members_per_split
    offs_o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = col * BLOCK_I + tl.arange(0, BLOCK_I)
    in_o = offs_o < O
    in_i = offs_i < I
    dw = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for m in range(m_first, min(m_first + members_per_split, M)):
        if db_part_ptr is None:
            g, db = outer_tile(dy, x, m, b_first, b_last, B, I, O, row, col,
                               dy_stride_m, dy_stride_b, dy_stride_o,
                               x_stride_m, x_stride_b, x_stride_i, False, SHARED_X, PRECISION,
                               TMA, LONG, BLOCK_O, BLOCK_I, BLOCK_B)  # fmt: skip
        elif m % tiles_i == col:  # the programs of one row of tiles take turns at db
            g, db = outer_tile(dy, x, m, b_first, b_last, B, I, O, row, col,
                               dy_stride_m, dy_stride_b, dy_stride_o,
                               x_stride_m, x_stride_b, x_stride_i, True, SHARED_X, PRECISION,
                               TMA, LONG, BLOCK_O, BLOCK_I, BLOCK_B)  # fmt: skip
            p_db = db_part_ptr + (split_b * M + m).to(tl.int64) * O + offs_o
            tl.store(p_db, db, mask=in_o)
        else:
            g, db = outer_tile(dy, x, m, b_first, b_last, B, I, O, row, col,
                               dy_stride_m, dy_stride_b, dy_stride_o,
                               x_stride_m, x_stride_b, x_stride_i, False, SHARED_X, PRECISION,
                               TMA, LONG, BLOCK_O, BLOCK_I, BLOCK_B)  # fmt: skip
        w = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        if ds_part_ptr is not None or dr_part_ptr is not None:
            w = load_tile(weight, 0, row * BLOCK_O, col * BLOCK_I, O, I, 0, weight_stride_o,
                          weight_stride_i, BLOCK_O, BLOCK_I, False, TMA, LONG)  # fmt: skip
            w = w.to(tl.float32)
        s = tl.full((BLOCK_O,), 1.0, tl.float32)
        if s_ptr is not None:
            p_s = s_ptr + offset(m, O, LONG) + offs_o
            s = tl.load(p_s, mask=in_o, other=0.0).to(DTYPE).to(tl.float32)
        if dr_part_ptr is not None:
            p_dr = dr_part_ptr + ((split_b * tiles_o + row) * M + m).to(tl.int64) * I + offs_i
            tl.store(p_dr, tl.sum(g * w * s[:, None], 0), mask=in_i)
        if r_ptr is not None:
            p_r = r_ptr + offset(m, I, LONG) + offs_i
            g *= tl.load(p_r, mask=in_i, other=0.0).to(DTYPE).to(tl.float32)[None, :]
        if ds_part_ptr is not None:
            p_ds = ds_part_ptr + ((split_b * tiles_i + col) * M + m).to(tl.int64) * O + offs_o
            tl.store(p_ds, tl.sum(g * w, 1), mask=in_o)
        if dweight_ptr is not None:
            dw += g * s[:, None]
    if dweight_ptr is not None:
        p_dw = dweight_ptr + split.to(tl.int64) * O * I
        p_dw = p_dw + offs_o.to(tl.int64)[:, None] * I + offs_i[None, :]
        in_w = in_o[:, None] & in_i[None, :]
        tl.store(p_dw, dw.to(dweight_ptr.dtype.element_ty), mask=in_w)


def batch_ensemble_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    r: torch.Tensor | None,
    s: torch.Tensor | None,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dr: torch.Tensor | None,
    ds: torch.Tensor | None,
    dbias: torch.Tensor | None,
    tf32: bool,
    *,
    dr_with_dx: bool = True,
    x_config: Config | None = None,
    weight_config: Config | None = None,
    split: tiles.Split | None = None,
    long: bool | None = None,
) -> None:
    """Fills those of dx, dweight, dr, ds, dbias that are given, in the shapes of their inputs.

    dy [M, B, O], x [M, B, I] or [B, I], weight [O, I]: any strides; r [M, I], s [M, O]. dx has unit
    stride along I, a shared x (and its dx) two dimensions; the other outputs are contiguous. All in
    one dtype, except that r, s and the outputs but dx may be float32 where it has 16 bits.
    `dr_with_dx` takes dr from the dx kernel, where dx is wanted; it rounds dy * s there.
    Configurations, `split` (of the weight gradient's sum) and `long` (64-bit offsets) are chosen
    here unless given.
    """
    r, s = (None if t is None else t.contiguous() for t in (r, s))
    long = spans_long(dy, x, weight, r, s) if long is None else long
    dr_x = dr if dx is not None and dr_with_dx else None
    dr_w = dr if dr_x is None else None
    inputs = (dy, x, weight, r, s)
    jobs = []
    with on_device(x):
        if dx is not None:
            jobs += _input_gradient(*inputs, dx, dr_x, tf32, long, x_config)
        if dweight is not None or ds is not None or dr_w is not None:
            outputs = (dweight, dr_w, ds, dbias)
            jobs += _weight_gradient(*inputs, *outputs, tf32, long, weight_config, split)
        elif dbias is not None:
            torch.sum(dy, 1 if dbias.ndim == 2 else (0, 1), dtype=dbias.dtype, out=dbias)
        sum_parts(jobs)


def _input_gradient(dy, x, weight, r, s, dx, dr, tf32, long, config) -> Jobs:
    """Launches the dx kernel; the sums that complete dx (of a split shared x) and dr."""
    (M, B, O), I = dy.shape, x.shape[-1]
    shared, kind = x.ndim == 2, tiles.kind_of(x.dtype, tf32)
    stage, sms = "x shared" if shared else "x", tiles.processors(x)
    strides = (*dy.stride(), *weight.stride(), *row_strides(x))

    def launch(c: Config) -> Jobs:
        block_b, block_i, block_o = (c.tiles[k] for k in ("BLOCK_B", "BLOCK_I", "BLOCK_O"))
        tiles_b, tiles_i = cdiv(B, block_b), cdiv(I, block_i)
        members = tiles.shared_members(block_b, block_i, sms, M, B, I, O) if shared else 1
        splits = cdiv(M, members)
        jobs, out = [], dx
        if shared and splits > 1:
            out = parts(jobs, dx, splits, B, I)
        batch_ensemble_linear_bwd_x_kernel[grid(OP, splits * tiles_b * tiles_i)](
            descriptor(dy, block_b, block_o) if c.tma else dy,
            descriptor(weight, block_o, block_i) if c.tma else weight,
            descriptor(x, block_b, block_i) if c.tma else x,
            r, s, out, parts(jobs, dr, tiles_b, M, I), M, B, I, O, members,
            *strides, *row_strides(out)[:2],
            SHARED_X=shared, EVEN_O=O % block_o == 0, PRECISION=precision(kind), TMA=c.tma,
            LONG=long, DTYPE=DTYPES[x.dtype], **c.options(),
        )  # fmt: skip
        return jobs

    if config is None:
        tma = arch(x) >= 90 and all(describable(t) for t in (dy, x, weight))
        key = (stage, kind, tma, arch(x), sms, M, B, I, O)
        config = tiles.input_config(*key)
        if AUTOTUNE:
            others = [c for _, c in tiles.buckets(arch(x), stage, kind, tma)]
            key = ("batch_ensemble_linear_bwd_x", x.device, x.dtype, *key)
            config = fastest(key, config, others, lambda c: sum_parts(launch(c)))
    return launch(config)


def _weight_gradient(
    dy, x, weight, r, s, dweight, dr, ds, dbias, tf32, long, config, split
) -> Jobs:
    """Launches the dweight kernel; the sums that complete dweight, dr, ds and dbias."""
    (M, B, O), I = dy.shape, x.shape[-1]
    kind, sms = tiles.kind_of(x.dtype, tf32), tiles.processors(x)
    strides = (*dy.stride(), *row_strides(x), *weight.stride())
    fixed = split

    def launch(c: Config) -> Jobs:
        block_o, block_i, block_b = (c.tiles[k] for k in ("BLOCK_O", "BLOCK_I", "BLOCK_B"))
        tiles_o, tiles_i = cdiv(O, block_o), cdiv(I, block_i)
        split = fixed or tiles.weight_split(block_o, block_i, block_b, sms, M, B, I, O)
        splits_b = cdiv(B, split.examples)
        jobs, out = [], dweight
        if split.count > 1:
            out = parts(jobs, dweight, split.count, O, I)
        batch_ensemble_linear_bwd_weight_kernel[grid(OP, split.count * tiles_o * tiles_i)](
            descriptor(dy, block_b, block_o) if c.tma else dy,
            descriptor(x, block_b, block_i) if c.tma else x,
            descriptor(weight, block_o, block_i) if c.tma else weight,
            r, s, out, parts(jobs, ds, splits_b * tiles_i, M, O),
            parts(jobs, dr, splits_b * tiles_o, M, I), parts(jobs, dbias, splits_b, M, O),
            M, B, I, O, split.members, split.examples, *strides,
            SHARED_X=x.ndim == 2, PRECISION=precision(kind), TMA=c.tma, LONG=long,
            DTYPE=DTYPES[x.dtype], **c.options(),
        )  # fmt: skip
        return jobs

    if config is None:
        tma = arch(x) >= 90 and all(describable(t) for t in (dy, x, weight))
        key = ("weight" if dr is None else "weight+r", kind, tma, arch(x), sms, M, B, I, O)
        config = tiles.weight_config(*key)
        if AUTOTUNE:
            others = [c for _, c in tiles.buckets(arch(x), key[0], kind, tma)]
            key = ("batch_ensemble_linear_bwd_weight", x.device, x.dtype, *key)
            config = fastest(key, config, others, lambda c: sum_parts(launch(c)))
    return launch(config)
