"""subspace_conv2d, y and dx: an implicit GEMM over pixels with a weight for each member.

All members in one launch. A row is a pixel of the result, a column one of its channels; the
products run over k = (tap of the kernel, channel of the source). dx is the same sum over dy, whose
taps count backwards. Weights are read, or mixed from a few anchors on the way.
"""

import torch
import triton
import triton.language as tl

from . import subspace_conv2d_boxes as boxes
from . import subspace_conv2d_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from .batch_ensemble_conv2d import (
    checked_pixels,
    member_strides,
    pixel_tile,
    pixels,
    spans_long,
    taps_and_channels,
)
from .batch_ensemble_linear import offset, precision
from .subspace_conv2d_boxes import OP


@triton.jit
def weight_tile(p, coeffs_ptr, m, stride, inside, dtype, K: tl.constexpr):
    """A tile of the weight of member m, `p` being that of member 0, or of the first of K anchors.

    `stride` is from one to the next; K = 0 where each member has a weight of its own.
    """
    if K == 0:
        tile = tl.load(p + m * stride, mask=inside, other=0.0)
    else:
        mixed = tl.zeros(p.shape, tl.float32)
        for k in tl.static_range(K):
            c = tl.load(coeffs_ptr + m * K + k).to(tl.float32)
            mixed += c * tl.load(p + k * stride, mask=inside, other=0.0).to(tl.float32)
        tile = mixed.to(dtype)
    return tile


@triton.jit(do_not_specialize=["M", "B"])
def subspace_conv2d_kernel(
    source_ptr, weight_ptr, coeffs_ptr, bias_ptr, result_ptr,
    M, B, C, N, H, W, H_OUT, W_OUT,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    source_stride_m, source_stride_b, source_stride_c, source_stride_h, source_stride_w,
    result_stride_m, result_stride_b, result_stride_n, result_stride_h, result_stride_w,
    KH: tl.constexpr, KW: tl.constexpr, K: tl.constexpr, BACK: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_P pixels [H_OUT, W_OUT] and BLOCK_N channels of the result, for one
    # member or (SUM) of the sum over all. The source has C channels, and pixels [H, W]. A weight is
    # [O, taps, I], contiguous: I is C in the forward, N in the gradient of the input (BACK).
    TAPS: tl.constexpr = KH * KW
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_p = tl.cdiv(B * H_OUT * W_OUT, BLOCK_P)
    row = tl.program_id(0) // tiles_n
    offs_p = row % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_p = offs_p < B * H_OUT * W_OUT
    in_n = offs_n < N
    b, h, w = pixels(offs_p, H_OUT, W_OUT)
    if BACK:
        at_h = h + pad_h
        at_w = w + pad_w
    else:
        at_h = h * step_h - pad_h
        at_w = w * step_w - pad_w
    m = (row // tiles_p).to(tl.int64)
    image = source_ptr + m * source_stride_m + b * source_stride_b
    weight_stride = tl.full((), TAPS, tl.int64) * C * N
    dtype = source_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    steps = tl.cdiv(TAPS, BLOCK_K // BLOCK_C) * tl.cdiv(C, BLOCK_C)
    total = steps
    if SUM:
        total = steps * M
    for at in tl.range(0, total):
        step = at
        if SUM:
            step = at % steps
            m = (at // steps).to(tl.int64)
            image = source_ptr + m * source_stride_m + b * source_stride_b
        tap, c = taps_and_channels(step, C, BLOCK_K, BLOCK_C)
        a = pixel_tile(image, at_h, at_w, in_p, tap, c, H, W, C,
                       source_stride_h, source_stride_w, source_stride_c, step_h, step_w,
                       dilation_h, dilation_w, KW, TAPS, BACK, LONG)  # fmt: skip
        if BACK:
            p_w = weight_ptr + offset(c * TAPS + tap, N, LONG)[:, None] + offs_n[None, :]
        else:
            p_w = weight_ptr + offset(offs_n, TAPS * C, LONG)[None, :] + (tap * C + c)[:, None]
        inside = ((tap < TAPS) & (c < C))[:, None] & in_n[None, :]
        v = weight_tile(p_w, coeffs_ptr, m, weight_stride, inside, dtype, K)
        acc = tl.dot(a, v, acc, input_precision=PRECISION)

    if bias_ptr is not None:  # parameters may be float32: they count as rounded to dtype
        bias = weight_tile(bias_ptr + offs_n, coeffs_ptr, m, N, in_n, dtype, K)
        acc += bias.to(dtype).to(tl.float32)[None, :]
    p = result_ptr + b * result_stride_b
    if not SUM:
        p += m * result_stride_m
    p = p + offset(h, result_stride_h, LONG) + offset(w, result_stride_w, LONG)
    p = p[:, None] + offset(offs_n, result_stride_n, LONG)[None, :]
    tl.store(p, acc.to(result_ptr.dtype.element_ty), mask=in_p[:, None] & in_n[None, :])


def subspace_conv2d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    coeffs: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    step: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    tf32: bool,
    *,
    config: Config | None = None,
) -> None:
    """x [M or 1, B, I, H, W], any strides; weight [M, O, kh, kw, I], contiguous, as x; fills y.

    With coeffs [M, K], weight and bias are anchors [K, ...] of any floating dtype. bias [M, O];
    y [M, B, O, H', W'], any strides. `pad` is above and to the left: what lies below and to the
    right follows from the size of y. Nothing is empty.
    """
    bias = None if bias is None else bias.contiguous()
    _launch(False, x, weight, coeffs, bias, y, (*step, *pad, *dilation), tf32, config)


def subspace_conv2d_bwd_x(
    dy: torch.Tensor,
    weight: torch.Tensor,
    coeffs: torch.Tensor | None,
    dx: torch.Tensor,
    step: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    tf32: bool,
    *,
    config: Config | None = None,
) -> None:
    """Fills dx [M or 1, B, I, H, W], any strides; all else as in the forward, dy as y."""
    _launch(True, dy, weight, coeffs, None, dx, (*step, *pad, *dilation), tf32, config)


def _launch(back, source, weight, coeffs, bias, result, options, tf32, config) -> None:
    M = weight.shape[0] if coeffs is None else coeffs.shape[0]
    (_, B, N, *size), (C, H, W) = result.shape, source.shape[2:]
    kh, kw = weight.shape[2:4]
    coeffs = None if coeffs is None else coeffs.contiguous()
    K, kind = 0 if coeffs is None else weight.shape[0], tiles.kind_of(source.dtype, tf32)
    summed = back and result.shape[0] < M
    count = checked_pixels(OP, B, *size)
    long = spans_long(weight[0], options[4:], source, result)

    def launch(c: Config) -> None:
        if c.tma:
            boxes.launch(back, source, weight, bias, result, options, kind, c)
            return
        block_k, block_c = tiles.depth(c, kh * kw, C)
        rows = (1 if summed else M) * cdiv(count, c.tiles["BLOCK_P"])
        subspace_conv2d_kernel[grid(OP, rows * cdiv(N, c.tiles["BLOCK_N"]))](
            source, weight, coeffs, bias, result, M, B, C, N, H, W, *size, *options,
            *member_strides(source), *result.stride(), KH=kh, KW=kw, K=K, BACK=back, SUM=summed,
            PRECISION=precision(kind), LONG=long,
            **(c.options() | {"BLOCK_K": block_k, "BLOCK_C": block_c}),
        )  # fmt: skip

    with on_device(source):
        if config is None:
            tma = K == 0 and not summed and boxes.fit(source, result, options, kind, weight)
            where = (arch(source), "x" if back else "fwd", f"{kind} mixed" if K else kind)
            config = tiles.config(*where, N, C, tma)
            if AUTOTUNE:
                sizes = (M, B, N, *size, C, H, W, kh, kw, *options, K, summed)
                key = ("subspace_conv2d", source.device, source.dtype, *where, *sizes)
                config = fastest(key, config, tiles.candidates(*where, tma), launch)
        launch(config)
