"""batch_ensemble_conv2d, forward: an implicit GEMM over pixels, all members in one launch.

A row is a pixel of the output, a column an output channel, and the products run over k = (tap of
the kernel, input channel), BLOCK_C channels of a tap at a time: small channels share a step.
"""

import torch
import triton
import triton.language as tl

from . import batch_ensemble_conv2d_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from .batch_ensemble_linear import offset, precision

OP = "batch_ensemble_conv2d"
MOST_PIXELS = 2**31 - 2**16  # kernels number them in 32 bits; tiles and splits reach beyond them


@triton.jit
def pixels(offs_p, H, W):
    """(image, in 64 bits, row, column) of pixels that are numbered image by image."""
    return (offs_p // (H * W)).to(tl.int64), offs_p // W % H, offs_p % W


@triton.jit
def pixel_tile(
    image, h, w, in_rows, tap, c, H, W, C, stride_h, stride_w, stride_c,
    step_h, step_w, dilation_h, dilation_w, KW: tl.constexpr, TAPS: tl.constexpr,
    BACK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """[BLOCK_P, BLOCK_K] of images [H, W, C], zero outside.

    Row: an image (a pointer) and the place (h, w) in it that tap 0 reads. Column: a tap and a
    channel. BACK gathers for the gradient of the input: (h, w) is then a place of the padded input,
    and the tile holds the pixels of dy that it went into. LONG: offsets in an image take 64 bits.
    """
    up = tap // KW * dilation_h
    left = tap % KW * dilation_w
    inside = in_rows[:, None] & ((tap < TAPS) & (c < C))[None, :]
    if BACK:
        at_h = h[:, None] - up[None, :]
        at_w = w[:, None] - left[None, :]
        inside &= (at_h >= 0) & (at_w >= 0)
        if step_h > 1:
            inside &= at_h % step_h == 0
            at_h = at_h // step_h
        if step_w > 1:
            inside &= at_w % step_w == 0
            at_w = at_w // step_w
        inside &= (at_h < H) & (at_w < W)
        offs = offset(at_h, stride_h, LONG) + offset(at_w, stride_w, LONG)
        p = image[:, None] + (offs + offset(c, stride_c, LONG)[None, :])
    else:
        at_h = h[:, None] + up[None, :]
        at_w = w[:, None] + left[None, :]
        inside &= (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
        offs_k = offset(up, stride_h, LONG) + offset(left, stride_w, LONG)
        offs_k += offset(c, stride_c, LONG)
        p = image + offset(h, stride_h, LONG) + offset(w, stride_w, LONG)
        p = p[:, None] + offs_k[None, :]
    return tl.load(p, mask=inside, other=0.0)


@triton.jit
def taps_and_channels(step, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """(tap, channel) of each of the BLOCK_K columns of a step of the sum over both."""
    offs_k = tl.arange(0, BLOCK_K)
    parts = tl.cdiv(C, BLOCK_C)  # of the channels; 1 where a step holds several taps
    tap = step // parts * (BLOCK_K // BLOCK_C) + offs_k // BLOCK_C
    return tap, step % parts * BLOCK_C + offs_k % BLOCK_C


@triton.jit(do_not_specialize=["B"])
def batch_ensemble_conv2d_fwd_kernel(
    x_ptr, weight_ptr, r_ptr, s_ptr, bias_ptr, y_ptr,
    B, I, O, H, W, H_OUT, W_OUT,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w, bias_stride_m,
    y_stride_m, y_stride_b, y_stride_o, y_stride_h, y_stride_w,
    KH: tl.constexpr, KW: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_P pixels of one member and BLOCK_O channels of y. The weight is
    # [O, taps, I], contiguous.
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
    steps = tl.cdiv(TAPS, BLOCK_K // BLOCK_C) * tl.cdiv(I, BLOCK_C)
    for step in tl.range(0, steps):
        tap, i = taps_and_channels(step, I, BLOCK_K, BLOCK_C)
        a = pixel_tile(image, h * step_h - pad_h, w * step_w - pad_w, in_p, tap, i, H, W, I,
                       x_stride_h, x_stride_w, x_stride_i, step_h, step_w,
                       dilation_h, dilation_w, KW, TAPS, False, LONG)  # fmt: skip
        in_k = (tap < TAPS) & (i < I)
        if r_ptr is not None:  # x * r is rounded to the input dtype, as in plain PyTorch
            a = a * tl.load(r_ptr + m * I + i, mask=in_k, other=0.0).to(a.dtype)[None, :]
        p_w = weight_ptr + offset(offs_o, TAPS * I, LONG)[None, :] + (tap * I + i)[:, None]
        v = tl.load(p_w, mask=in_k[:, None] & in_o[None, :], other=0.0)
        acc = tl.dot(a, v, acc, input_precision=PRECISION)

    low = x_ptr.dtype.element_ty  # parameters may be float32: they count as rounded to it
    if s_ptr is not None:
        s = tl.load(s_ptr + m * O + offs_o, mask=in_o, other=0.0)
        acc *= s.to(low).to(tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + m * bias_stride_m + offs_o, mask=in_o, other=0.0)
        acc += bias.to(low).to(tl.float32)[None, :]
    if RELU:  # NaN passes
        acc = tl.where(acc < 0, 0.0, acc)
    p_y = y_ptr + m * y_stride_m + b * y_stride_b
    p_y = p_y + offset(h, y_stride_h, LONG) + offset(w, y_stride_w, LONG)
    p_y = p_y[:, None] + offset(offs_o, y_stride_o, LONG)[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=in_p[:, None] & in_o[None, :])


def batch_ensemble_conv2d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    r: torch.Tensor | None,
    s: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    step: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    relu: bool,
    tf32: bool,
    *,
    config: Config | None = None,
) -> None:
    """x [M or 1, B, I, H, W], any strides; weight [O, kh, kw, I], contiguous, as x; fills y.

    r [M, I]; s [M, O]; bias [M, O] or [O]; y [M, B, O, H', W'], any strides. `pad` is above and to
    the left: what lies below and to the right follows from the size of y. Nothing is empty.
    """
    (M, B, O, *size), (I, H, W) = y.shape, x.shape[2:]
    r, s, bias = (None if t is None else t.contiguous() for t in (r, s, bias))
    kh, kw = weight.shape[1:3]
    kind = tiles.kind_of(x.dtype, tf32)
    count, long = checked_pixels(OP, B, *size), spans_long(weight, dilation, x, y)
    bias_stride = O if bias is not None and bias.ndim == 2 else 0

    def launch(c: Config) -> None:
        block_k, block_c = tiles.depth(c, kh * kw, I)
        programs = M * cdiv(count, c.tiles["BLOCK_P"]) * cdiv(O, c.tiles["BLOCK_O"])
        batch_ensemble_conv2d_fwd_kernel[grid(OP, programs)](
            x, weight, r, s, bias, y, B, I, O, H, W, *size, *step, *pad, *dilation,
            *member_strides(x), bias_stride, *y.stride(),
            KH=kh, KW=kw, RELU=relu, PRECISION=precision(kind), LONG=long,
            **(c.options() | {"BLOCK_K": block_k, "BLOCK_C": block_c}),
        )  # fmt: skip

    with on_device(x):
        if config is None:
            where = (arch(x), "fwd", kind)
            config = tiles.config(*where, O, I)
            if AUTOTUNE:
                sizes = (M, B, I, O, H, W, *size, kh, kw, *step)
                key = ("batch_ensemble_conv2d_fwd", x.device, x.dtype, *where, *sizes)
                config = fastest(key, config, tiles.candidates(*where), launch)
        launch(config)


def member_strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of [M, B, C, H, W]; where the members share x, the first is zero."""
    return (x.stride(0) if x.shape[0] > 1 else 0, *x.stride()[1:])


def spans_long(weight: torch.Tensor, dilation: tuple[int, int], *images: torch.Tensor) -> bool:
    """Whether an offset in the weight, or in an image [C, H, W] and around it, takes 64 bits."""
    around = [0, *((k - 1) * d for k, d in zip(weight.shape[1:3], dilation, strict=True))]
    spans = [weight.numel()]
    for t in images:
        sizes = zip(t.shape[2:], around, t.stride()[2:], strict=True)
        spans.append(sum((n - 1 + more) * stride for n, more, stride in sizes))
    return max(spans) >= 2**31


def checked_pixels(op: str, B: int, H: int, W: int) -> int:
    """Pixels of all images of a member, which kernels number in 32 bits."""
    if B * H * W > MOST_PIXELS:
        rule = f"have at most {MOST_PIXELS} pixels per member"
        raise ValueError(f"{op}: images must {rule}; got {B * H * W}")
    return B * H * W
