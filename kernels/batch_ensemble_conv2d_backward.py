"""batch_ensemble_conv2d, backward: dx, and one pass over x and dy for all other gradients.

With G_m[k, o] = sum over the pixels of member m of x[k] dy[o], k = (tap, input channel), a tile at
a time in registers: dweight = sum_m s_m G_m r_m, ds_m = sum_k weight G_m r_m,
dr_m = sum_o weight G_m s_m. The sum over pixels is long and the tile is small, so all of that costs
next to nothing; x * r and the convolution are not kept, and nothing is divided by s.
"""

import torch
import triton
import triton.language as tl

from . import batch_ensemble_conv2d_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from ._reduce import Jobs, parts, sum_parts
from .batch_ensemble_conv2d import (
    OP,
    checked_pixels,
    member_strides,
    pixel_tile,
    pixels,
    spans_long,
    taps_and_channels,
)
from .batch_ensemble_linear import offset, precision


@triton.jit(do_not_specialize=["M", "B"])
def batch_ensemble_conv2d_bwd_x_kernel(
    dy_ptr, weight_ptr, r_ptr, s_ptr, dx_ptr,
    M, B, I, O, H, W, H_OUT, W_OUT,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    dy_stride_m, dy_stride_b, dy_stride_o, dy_stride_h, dy_stride_w,
    dx_stride_m, dx_stride_b, dx_stride_i, dx_stride_h, dx_stride_w,
    KH: tl.constexpr, KW: tl.constexpr, SHARED_X: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_P pixels and BLOCK_I channels of dx for one member or, for a shared
    # x, of the sum over all members. The weight is [O, taps, I], contiguous.
    TAPS: tl.constexpr = KH * KW
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles_p = tl.cdiv(B * H * W, BLOCK_P)
    row = tl.program_id(0) // tiles_i
    offs_p = row % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_i = tl.program_id(0) % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_p = offs_p < B * H * W
    in_i = offs_i < I
    b, h, w = pixels(offs_p, H, W)
    if SHARED_X:
        first = 0
        last = M
        total = tl.zeros((BLOCK_P, BLOCK_I), tl.float32)
    else:
        first = row // tiles_p
        last = first + 1
    steps = tl.cdiv(TAPS, BLOCK_K // BLOCK_C) * tl.cdiv(O, BLOCK_C)
    low = dy_ptr.dtype.element_ty
    t = tl.zeros((BLOCK_P, BLOCK_I), tl.float32)
    for member in range(first, last):
        m = tl.cast(member, tl.int64)
        image = dy_ptr + m * dy_stride_m + b * dy_stride_b
        if SHARED_X:
            t = tl.zeros((BLOCK_P, BLOCK_I), tl.float32)
        for step in tl.range(0, steps):
            tap, o = taps_and_channels(step, O, BLOCK_K, BLOCK_C)
            a = pixel_tile(image, h + pad_h, w + pad_w, in_p, tap, o, H_OUT, W_OUT, O,
                           dy_stride_h, dy_stride_w, dy_stride_o, step_h, step_w,
                           dilation_h, dilation_w, KW, TAPS, True, LONG)  # fmt: skip
            in_k = (tap < TAPS) & (o < O)
            if s_ptr is not None:  # dy * s is rounded to the input dtype, as in plain PyTorch
                a = a * tl.load(s_ptr + m * O + o, mask=in_k, other=0.0).to(low)[None, :]
            p_w = weight_ptr + offset(o * TAPS + tap, I, LONG)[:, None] + offs_i[None, :]
            v = tl.load(p_w, mask=in_k[:, None] & in_i[None, :], other=0.0)
            t = tl.dot(a, v, t, input_precision=PRECISION)
        if r_ptr is not None:
            r = tl.load(r_ptr + m * I + offs_i, mask=in_i, other=0.0)
            t *= r.to(low).to(tl.float32)[None, :]
        if SHARED_X:
            total += t
    if SHARED_X:
        t = total
        p_dx = dx_ptr + b * dx_stride_b
    else:
        p_dx = dx_ptr + tl.cast(first, tl.int64) * dx_stride_m + b * dx_stride_b
    p_dx = p_dx + offset(h, dx_stride_h, LONG) + offset(w, dx_stride_w, LONG)
    p_dx = p_dx[:, None] + offset(offs_i, dx_stride_i, LONG)[None, :]
    tl.store(p_dx, t.to(dx_ptr.dtype.element_ty), mask=in_p[:, None] & in_i[None, :])


@triton.jit
def outer_tile(
    x_ptr, dy_ptr, m, first, last, tap, i, offs_o, in_o, I, H, W, H_OUT, W_OUT,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w,
    dy_stride_m, dy_stride_b, dy_stride_o, dy_stride_h, dy_stride_w,
    BIAS: tl.constexpr, LONG: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A tile of G_m over output pixels [first, last); with BIAS, the sums of dy_m."""
    g = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
    db = tl.zeros((BLOCK_O,), tl.float32)
    for start in tl.range(first, last, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        in_p = offs_p < last
        b, h, w = pixels(offs_p, H_OUT, W_OUT)
        v = pixel_tile(x_ptr + m * x_stride_m + b * x_stride_b, h * step_h - pad_h,
                       w * step_w - pad_w, in_p, tap, i, H, W, I,
                       x_stride_h, x_stride_w, x_stride_i, step_h, step_w,
                       dilation_h, dilation_w, KW, TAPS, False, LONG)  # fmt: skip
        p_d = dy_ptr + m * dy_stride_m + b * dy_stride_b
        p_d = p_d + offset(h, dy_stride_h, LONG) + offset(w, dy_stride_w, LONG)
        p_d = p_d[:, None] + offset(offs_o, dy_stride_o, LONG)[None, :]
        d = tl.load(p_d, mask=in_p[:, None] & in_o[None, :], other=0.0)
        g = tl.dot(v.T, d, g, input_precision=PRECISION)
        if BIAS:
            db += tl.sum(d.to(tl.float32), 0)
    return g, db


@triton.jit(do_not_specialize=["M", "B", "members_per_split", "pixels_per_split"])
def batch_ensemble_conv2d_bwd_weight_kernel(
    dy_ptr, x_ptr, weight_ptr, r_ptr, s_ptr, dweight_ptr, ds_part_ptr, dr_part_ptr, db_part_ptr,
    M, B, I, O, H, W, H_OUT, W_OUT, members_per_split, pixels_per_split,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w,
    dy_stride_m, dy_stride_b, dy_stride_o, dy_stride_h, dy_stride_w,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_K columns (tap, i) and BLOCK_O channels of dweight over the members
    # and pixels of one split, and its parts of ds, dr and db: [splits of pixels * tiles, ...].
    TAPS: tl.constexpr = KH * KW
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_k = tl.cdiv(TAPS, BLOCK_K // BLOCK_C) * tl.cdiv(I, BLOCK_C)
    splits_m = tl.cdiv(M, members_per_split)
    split = tl.program_id(0) // (tiles_o * tiles_k)
    tile_k = tl.program_id(0) % (tiles_o * tiles_k) // tiles_o
    tile_o = tl.program_id(0) % tiles_o
    split_p = split // splits_m
    first = split_p * pixels_per_split
    last = min(first + pixels_per_split, B * H_OUT * W_OUT)
    tap, i = taps_and_channels(tile_k, I, BLOCK_K, BLOCK_C)
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    in_k = (tap < TAPS) & (i < I)
    in_o = offs_o < O
    in_w = in_k[:, None] & in_o[None, :]
    offs_w = offset(offs_o, TAPS * I, LONG)[None, :] + (tap * I + i)[:, None]
    low = x_ptr.dtype.element_ty
    m_first = split % splits_m * members_per_split
    dw = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
    for member in range(m_first, min(m_first + members_per_split, M)):
        m = tl.cast(member, tl.int64)
        if db_part_ptr is None:
            g, db = outer_tile(x_ptr, dy_ptr, m, first, last, tap, i, offs_o, in_o,
                               I, H, W, H_OUT, W_OUT,
                               step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
                               x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w,
                               dy_stride_m, dy_stride_b, dy_stride_o, dy_stride_h, dy_stride_w,
                               False, LONG, KW, TAPS, PRECISION,
                               BLOCK_K, BLOCK_O, BLOCK_P)  # fmt: skip
        elif member % tiles_k == tile_k:  # the programs of one tile of o take turns at db
            g, db = outer_tile(x_ptr, dy_ptr, m, first, last, tap, i, offs_o, in_o,
                               I, H, W, H_OUT, W_OUT,
                               step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
                               x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w,
                               dy_stride_m, dy_stride_b, dy_stride_o, dy_stride_h, dy_stride_w,
                               True, LONG, KW, TAPS, PRECISION,
                               BLOCK_K, BLOCK_O, BLOCK_P)  # fmt: skip
            tl.store(db_part_ptr + (split_p * M + m) * O + offs_o, db, mask=in_o)
        else:
            g, db = outer_tile(x_ptr, dy_ptr, m, first, last, tap, i, offs_o, in_o,
                               I, H, W, H_OUT, W_OUT,
                               step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
                               x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w,
                               dy_stride_m, dy_stride_b, dy_stride_o, dy_stride_h, dy_stride_w,
                               False, LONG, KW, TAPS, PRECISION,
                               BLOCK_K, BLOCK_O, BLOCK_P)  # fmt: skip
        v = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
        if ds_part_ptr is not None or dr_part_ptr is not None:
            v = tl.load(weight_ptr + offs_w, mask=in_w, other=0.0).to(tl.float32)
        s = tl.full((BLOCK_O,), 1.0, tl.float32)
        if s_ptr is not None:
            s = tl.load(s_ptr + m * O + offs_o, mask=in_o, other=0.0).to(low).to(tl.float32)
        if dr_part_ptr is not None:
            p_dr = dr_part_ptr + (((split_p * tiles_o + tile_o) * TAPS + tap) * M + m) * I + i
            tl.store(p_dr, tl.sum(g * v * s[None, :], 1), mask=in_k)
        if r_ptr is not None:
            r = tl.load(r_ptr + m * I + i, mask=in_k, other=0.0)
            g *= r.to(low).to(tl.float32)[:, None]
        if ds_part_ptr is not None:
            p_ds = ds_part_ptr + ((split_p * tiles_k + tile_k) * M + m) * O + offs_o
            tl.store(p_ds, tl.sum(g * v, 0), mask=in_o)
        if dweight_ptr is not None:
            dw += g * s[None, :]
    if dweight_ptr is not None:
        p_dw = dweight_ptr + split.to(tl.int64) * offset(O * TAPS, I, LONG) + offs_w
        tl.store(p_dw, dw.to(dweight_ptr.dtype.element_ty), mask=in_w)


def batch_ensemble_conv2d_bwd(
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
    step: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    tf32: bool,
    *,
    x_config: Config | None = None,
    weight_config: Config | None = None,
    split: tiles.Split | None = None,
) -> None:
    """Fills those of dx, dweight, dr, ds, dbias that are given, of any floating dtype.

    dy [M, B, O, H', W'] and x [M or 1, B, I, H, W]: any strides, and so dx, which is as x; weight
    and dweight [O, kh, kw, I], contiguous as are the other outputs; r [M, I]; s [M, O]; dbias
    [M, O] or [O].
    """
    r, s = (None if t is None else t.contiguous() for t in (r, s))
    options = (*step, *pad, *dilation)
    jobs = []
    with on_device(x):
        if dx is not None:
            _input_gradient(dy, weight, r, s, dx, options, tf32, x_config)
        if dweight is not None or ds is not None or dr is not None:
            tensors = (dy, x, weight, r, s, dweight, dr, ds, dbias)
            jobs = _weight_gradient(*tensors, options, tf32, weight_config, split)
        elif dbias is not None:
            sums = (1, 3, 4) if dbias.ndim == 2 else (0, 1, 3, 4)
            dbias.copy_(dy.sum(sums, dtype=torch.float32))
        sum_parts(jobs)


def _input_gradient(dy, weight, r, s, dx, options, tf32, config) -> None:
    (M, B, O, *size), (I, H, W) = dy.shape, dx.shape[2:]
    kh, kw = weight.shape[1:3]
    shared, kind = dx.shape[0] == 1 and M > 1, tiles.kind_of(dy.dtype, tf32)
    count, long = checked_pixels(OP, B, H, W), spans_long(weight, options[4:], dy, dx)

    def launch(c: Config) -> None:
        block_k, block_c = tiles.depth(c, kh * kw, O)
        programs = (1 if shared else M) * cdiv(count, c.tiles["BLOCK_P"])
        batch_ensemble_conv2d_bwd_x_kernel[grid(OP, programs * cdiv(I, c.tiles["BLOCK_I"]))](
            dy, weight, r, s, dx, M, B, I, O, H, W, *size, *options, *dy.stride(), *dx.stride(),
            KH=kh, KW=kw, SHARED_X=shared, PRECISION=precision(kind), LONG=long,
            **(c.options() | {"BLOCK_K": block_k, "BLOCK_C": block_c}),
        )  # fmt: skip

    if config is None:
        where = (arch(dy), "x", kind)
        config = tiles.config(*where, I, O)
        if AUTOTUNE:
            sizes = (M, B, I, O, H, W, *size, kh, kw, *options, shared)
            key = ("batch_ensemble_conv2d_bwd_x", dy.device, dy.dtype, *where, *sizes)
            config = fastest(key, config, tiles.candidates(*where), launch)
    launch(config)


def _weight_gradient(
    dy, x, weight, r, s, dweight, dr, ds, dbias, options, tf32, config, fixed
) -> Jobs:
    """Launches the dweight kernel; returns the sums that it leaves to be added up."""
    (M, B, O, *size), (I, H, W) = dy.shape, x.shape[2:]
    kh, kw = weight.shape[1:3]
    kind, sms = tiles.kind_of(x.dtype, tf32), tiles.processors(x)
    count_p, long = checked_pixels(OP, B, *size), spans_long(weight, options[4:], x, dy)

    def launch(c: Config) -> Jobs:
        block_k, block_c = tiles.depth(c, kh * kw, I)
        block_o, block_p = c.tiles["BLOCK_O"], c.tiles["BLOCK_P"]
        tiles_o = cdiv(O, block_o)
        tiles_k = cdiv(kh * kw, block_k // block_c) * cdiv(I, block_c)
        count = tiles_o * tiles_k
        split = fixed or tiles.weight_split(block_k, block_o, block_p, count, sms, M, count_p)
        splits_p = cdiv(count_p, split.examples)
        jobs, out = [], dweight
        if split.count > 1:
            out = parts(jobs, dweight, split.count, *weight.shape)
        batch_ensemble_conv2d_bwd_weight_kernel[grid(OP, split.count * count)](
            dy, x, weight, r, s, out, parts(jobs, ds, splits_p * tiles_k, M, O),
            parts(jobs, dr, splits_p * tiles_o * kh * kw, M, I),
            parts(jobs, dbias, splits_p, M, O),
            M, B, I, O, H, W, *size, split.members, split.examples, *options,
            *member_strides(x), *dy.stride(), KH=kh, KW=kw, PRECISION=precision(kind), LONG=long,
            **(c.options() | {"BLOCK_K": block_k, "BLOCK_C": block_c}),
        )  # fmt: skip
        return jobs

    if config is None:
        where = (arch(x), "weight", kind)
        config = tiles.config(*where, O, I)
        if AUTOTUNE:
            sizes = (M, B, I, O, H, W, *size, kh, kw, *options)
            key = ("batch_ensemble_conv2d_bwd_weight", x.device, x.dtype, *where, *sizes)
            config = fastest(key, config, tiles.candidates(*where), lambda c: sum_parts(launch(c)))
    return launch(config)
