"""hyper_batch_conv2d: two implicit GEMMs over pixels that share every load of x, in one launch.

The gradients are those of two batch_ensemble_conv2d, for dy and for dy e, by its kernels.
"""

import torch
import triton
import triton.language as tl

from . import hyper_batch_conv2d_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from .batch_ensemble_conv2d import (
    checked_pixels,
    member_strides,
    pixel_tile,
    pixels,
    spans_long,
    taps_and_channels,
)
from .batch_ensemble_conv2d_backward import batch_ensemble_conv2d_bwd
from .batch_ensemble_linear import offset, precision
from .hyper_batch_linear_backward import both_halves

OP = "hyper_batch_conv2d"


@triton.jit(do_not_specialize=["B"])
def hyper_batch_conv2d_fwd_kernel(
    x_ptr, weight_ptr, delta_ptr, e_ptr, r_ptr, s_ptr, u_ptr, v_ptr, shift_ptr, y_ptr, z_ptr,
    B, I, O, H, W, H_OUT, W_OUT,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w,
    shift_stride_m, shift_stride_b, y_stride_m, y_stride_b, y_stride_o, y_stride_h, y_stride_w,
    KH: tl.constexpr, KW: tl.constexpr, TIED: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_P pixels of one member and BLOCK_O channels of y, and of z, the
    # part of delta before e, where it is kept. The weights are [O, taps, I], contiguous; e is
    # [M, B, O], contiguous; `shift` is what biases add, for each example. TIED: u is r.
    TAPS: tl.constexpr = KH * KW
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_p = tl.cdiv(B * H_OUT * W_OUT, BLOCK_P)
    row = tl.program_id(0) // tiles_o
    m = (row // tiles_p).to(tl.int64)
    offs_p = row % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_o = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    in_p = offs_p < B * H_OUT * W_OUT
    in_o = offs_o < O
    b, h, w = pixels(offs_p, H_OUT, W_OUT)
    image = x_ptr + m * x_stride_m + b * x_stride_b

    acc = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    z = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    steps = tl.cdiv(TAPS, BLOCK_K // BLOCK_C) * tl.cdiv(I, BLOCK_C)
    for step in tl.range(0, steps):
        tap, i = taps_and_channels(step, I, BLOCK_K, BLOCK_C)
        a = pixel_tile(image, h * step_h - pad_h, w * step_w - pad_w, in_p, tap, i, H, W, I,
                       x_stride_h, x_stride_w, x_stride_i, step_h, step_w,
                       dilation_h, dilation_w, KW, TAPS, False, LONG)  # fmt: skip
        in_k = (tap < TAPS) & (i < I)
        a1 = a
        if r_ptr is not None:  # x * r is rounded to the input dtype, as in plain PyTorch
            a1 = a * tl.load(r_ptr + m * I + i, mask=in_k, other=0.0).to(a.dtype)[None, :]
        if TIED:
            a2 = a1
        else:
            a2 = a * tl.load(u_ptr + m * I + i, mask=in_k, other=0.0).to(a.dtype)[None, :]
        offs_w = offset(offs_o, TAPS * I, LONG)[None, :] + (tap * I + i)[:, None]
        in_w = in_k[:, None] & in_o[None, :]
        weight = tl.load(weight_ptr + offs_w, mask=in_w, other=0.0)
        acc = tl.dot(a1, weight, acc, input_precision=PRECISION)
        delta = tl.load(delta_ptr + offs_w, mask=in_w, other=0.0)
        z = tl.dot(a2, delta, z, input_precision=PRECISION)

    low = x_ptr.dtype.element_ty  # parameters may be float32: they count as rounded to it
    in_y = in_p[:, None] & in_o[None, :]
    offs_y = m * y_stride_m + b * y_stride_b
    offs_y = offs_y + offset(h, y_stride_h, LONG) + offset(w, y_stride_w, LONG)
    offs_y = offs_y[:, None] + offset(offs_o, y_stride_o, LONG)[None, :]
    if v_ptr is not None:
        v = tl.load(v_ptr + m * O + offs_o, mask=in_o, other=0.0)
        z *= v.to(low).to(tl.float32)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offs_y, z.to(z_ptr.dtype.element_ty), mask=in_y)
    if s_ptr is not None:
        s = tl.load(s_ptr + m * O + offs_o, mask=in_o, other=0.0)
        acc *= s.to(low).to(tl.float32)[None, :]
    p_e = e_ptr + ((m * B + b) * O)[:, None] + offs_o[None, :]
    acc += z * tl.load(p_e, mask=in_y, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        p_shift = shift_ptr + (m * shift_stride_m + b * shift_stride_b)[:, None] + offs_o[None, :]
        acc += tl.load(p_shift, mask=in_y, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=in_y)


def hyper_batch_conv2d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    delta: torch.Tensor,
    e: torch.Tensor,
    r: torch.Tensor | None,
    s: torch.Tensor | None,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    shift: torch.Tensor | None,
    y: torch.Tensor,
    z: torch.Tensor | None,
    step: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    tf32: bool,
    *,
    config: Config | None = None,
) -> None:
    """x [M or 1, B, I, H, W], any strides; weight, delta [O, kh, kw, I], contiguous; fills y and z.

    e [M, B, O]; r, u [M, I]; s, v [M, O], with u and v None where they are r and s; shift
    [M, B or 1, O] or [1, 1, O], all that biases add; y [M, B, O, H', W'], any strides, which z
    shares: the part of delta before e, where it is given. `pad` is above and to the left: what lies
    below and to the right follows from the size of y. Nothing is empty.
    """
    (M, B, O, *size), (I, H, W) = y.shape, x.shape[2:]
    tied, v = u is None, s if v is None else v
    e, r, s, u, v, shift = (None if t is None else t.contiguous() for t in (e, r, s, u, v, shift))
    kh, kw = weight.shape[1:3]
    kind = tiles.kind_of(x.dtype, tf32)
    count, long = checked_pixels(OP, B, *size), spans_long(weight, dilation, x, y)
    shifts = (0, 0)
    if shift is not None:
        shifts = tuple(0 if shift.shape[d] == 1 else shift.stride(d) for d in (0, 1))

    def launch(c: Config) -> None:
        block_k, block_c = tiles.depth(c, kh * kw, I)
        programs = M * cdiv(count, c.tiles["BLOCK_P"]) * cdiv(O, c.tiles["BLOCK_O"])
        hyper_batch_conv2d_fwd_kernel[grid(OP, programs)](
            x, weight, delta, e, r, s, u, v, shift, y, z, B, I, O, H, W, *size,
            *step, *pad, *dilation, *member_strides(x), *shifts, *y.stride(),
            KH=kh, KW=kw, TIED=tied, PRECISION=precision(kind), LONG=long,
            **(c.options() | {"BLOCK_K": block_k, "BLOCK_C": block_c}),
        )  # fmt: skip

    with on_device(x):
        if config is None:
            where = (arch(x), kind)
            config = tiles.config(*where, O, I)
            if AUTOTUNE:
                sizes = (M, B, I, O, H, W, *size, kh, kw, *step)
                key = ("hyper_batch_conv2d_fwd", x.device, x.dtype, *where, *sizes)
                config = fastest(key, config, tiles.candidates(*where), launch)
        launch(config)


def hyper_batch_conv2d_bwd(
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
    step: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    tf32: bool,
    *,
    exact: bool = False,
) -> None:
    """Fills those of the gradients that are given; inputs as in the forward, dy as y.

    Where u is None dr has both parts, and so has ds where v is None. dweight and ddelta are
    [O, kh, kw, I]. `exact` keeps 16-bit rounding out of all but dx.
    """
    options = (step, pad, dilation, tf32)

    def half(d, w, r, s, dx, dw, dr, ds):
        if any(t is not None for t in (dx, dw, dr, ds)):
            batch_ensemble_conv2d_bwd(d, x, w, r, s, dx, dw, dr, ds, None, *options)

    parts = None if dx is None else [torch.empty_like(dx, dtype=torch.float32) for _ in range(2)]
    both_halves(
        half, dy, e[..., None, None], (weight, delta), (r, s, u, v), parts, (dweight, ddelta),
        (dr, ds, du, dv), exact,
    )  # fmt: skip
    if dx is not None:
        torch.add(*parts, out=dx)
