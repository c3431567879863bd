"""subspace_conv2d through tensor descriptors (TMA), for images with channels last and stride 1.

A row of tiles is a box of images and pixels that the hardware fetches, shifted by a tap, with zeros
for what lies outside. Descriptors have a dimension for members, so no box reaches into another.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import Config, arch, cdiv, grid
from .batch_ensemble_linear import describable, precision

OP = "subspace_conv2d"
LEAST_CHANNELS = 32  # fewer make a fetch of few bytes for each pixel


@triton.jit
def box_of(number, boxes_h, boxes_w, TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """(image, row, column) where box `number` of a member begins."""
    b = number // (boxes_h * boxes_w) * TB
    return b, number // boxes_w % boxes_h * TH, number % boxes_w * TW


@triton.jit(do_not_specialize=["B"])
def subspace_conv2d_boxes_kernel(
    source, weight, bias_ptr, result,
    B, C, N, H_OUT, W_OUT, pad_h, pad_w, dilation_h, dilation_w,
    KW: tl.constexpr, TAPS: tl.constexpr, BACK: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One program computes a box of pixels [H_OUT, W_OUT] and BLOCK_N channels of the result of one
    # member. Descriptors: source [M or (SHARED) 1, B, H, W, C], weight [M, O, taps, I], result
    # [M, B, H_OUT, W_OUT, N]. BACK: the source is dy and the result dx.
    tiles_n = tl.cdiv(N, BLOCK_N)
    boxes_w = tl.cdiv(W_OUT, TW)
    boxes_h = tl.cdiv(H_OUT, TH)
    count = tl.cdiv(B, TB) * boxes_h * boxes_w
    row = tl.program_id(0) // tiles_n
    n = tl.program_id(0) % tiles_n * BLOCK_N
    m = row // count
    b, h, w = box_of(row % count, boxes_h, boxes_w, TB, TH, TW)
    own = m
    if SHARED:
        own = 0
    BLOCK_P: tl.constexpr = TB * TH * TW
    parts = tl.cdiv(C, BLOCK_K)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for step in tl.range(0, TAPS * parts):
        tap = step // parts
        c = step % parts * BLOCK_K
        up = tap // KW * dilation_h - pad_h
        left = tap % KW * dilation_w - pad_w
        if BACK:
            a = source.load([own, b, h - up, w - left, c]).reshape(BLOCK_P, BLOCK_K)
            v = weight.load([m, c, tap, n]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(a, v, acc, input_precision=PRECISION)
        else:
            a = source.load([own, b, h + up, w + left, c]).reshape(BLOCK_P, BLOCK_K)
            v = weight.load([m, n, tap, c]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(a, v.T, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        offs_n = n + tl.arange(0, BLOCK_N)
        p_bias = bias_ptr + m.to(tl.int64) * N + offs_n
        bias = tl.load(p_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(source.dtype).to(tl.float32)[None, :]
    result.store([m, b, h, w, n], acc.to(result.dtype).reshape(1, TB, TH, TW, BLOCK_N))


@triton.jit(do_not_specialize=["M", "B", "boxes_per_split"])
def subspace_conv2d_bwd_weight_boxes_kernel(
    dy, x, part_ptr, M, B, I, O, H_OUT, W_OUT, boxes_per_split,
    pad_h, pad_w, dilation_h, dilation_w,
    KW: tl.constexpr, TAPS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_O x BLOCK_I of a tap of dweight of one member over the boxes of one
    # split: part is [splits, M, O, taps, I]. Descriptors as in the forward.
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles_o = tl.cdiv(O, BLOCK_O)
    boxes_w = tl.cdiv(W_OUT, TW)
    boxes_h = tl.cdiv(H_OUT, TH)
    count = tl.cdiv(B, TB) * boxes_h * boxes_w
    i = tl.program_id(0) % tiles_i * BLOCK_I
    tap = tl.program_id(0) // tiles_i % TAPS
    o = tl.program_id(0) // (tiles_i * TAPS) % tiles_o * BLOCK_O
    row = tl.program_id(0) // (tiles_i * TAPS * tiles_o)
    m = row % M
    first = row // M * boxes_per_split
    own = m
    if SHARED:
        own = 0
    up = tap // KW * dilation_h - pad_h
    left = tap % KW * dilation_w - pad_w
    BLOCK_P: tl.constexpr = TB * TH * TW
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for number in tl.range(first, min(first + boxes_per_split, count)):
        b, h, w = box_of(number, boxes_h, boxes_w, TB, TH, TW)
        d = dy.load([m, b, h, w, o]).reshape(BLOCK_P, BLOCK_O)
        v = x.load([own, b, h + up, w + left, i]).reshape(BLOCK_P, BLOCK_I)
        acc = tl.dot(d.T, v, acc, input_precision=PRECISION)
    offs_o = o + tl.arange(0, BLOCK_O)
    offs_i = i + tl.arange(0, BLOCK_I)
    p = part_ptr + ((row.to(tl.int64) * O + offs_o)[:, None] * TAPS + tap) * I + offs_i[None, :]
    tl.store(p, acc, mask=(offs_o < O)[:, None] & (offs_i < I)[None, :])


def fit(
    a: torch.Tensor,
    b: torch.Tensor,
    options: tuple[int, ...],
    kind: str,
    weight: torch.Tensor | None = None,
) -> bool:
    """Whether these images can be fetched, or stored, by descriptors, and it is worth it.

    `weight` [M, O, kh, kw, I] too, where it is fetched: it may lie at any place of a longer vector,
    and images may have fewer channels than their pixels are apart.
    """
    if arch(a) < 90 or kind == "ieee" or options[:2] != (1, 1):
        return False
    if min(a.shape[2], b.shape[2]) < LEAST_CHANNELS:
        return False
    if weight is not None and not describable(weight):
        return False
    return describable(_last(a)) and describable(_last(b))


def _last(images: torch.Tensor) -> torch.Tensor:
    """[M, B, C, H, W] as [M, B, H, W, C]"""
    return images.permute(0, 1, 3, 4, 2)


def _described(t: torch.Tensor, *block: int) -> TensorDescriptor:
    """The strides of dimensions of size one mean nothing, but must be aligned."""
    shape, strides = list(t.shape), list(t.stride())
    aligned = 16 // t.element_size()
    for d in range(t.ndim - 2, -1, -1):
        if shape[d] == 1:
            strides[d] = cdiv(shape[d + 1] * strides[d + 1], aligned) * aligned
    return TensorDescriptor(t, shape, strides, list(block))


@lru_cache(4096)
def box(B: int, H: int, W: int, count: int) -> tuple[int, int, int]:
    """(TB, TH, TW), powers of two of product `count`, with the least overhang; compact ones first.

    The more of its pixels lie in one image, the more of a box's fetches are shared by its taps.
    """
    best = None
    powers = [1 << e for e in range(count.bit_length())]
    for th in powers:
        for tw in powers:
            if th * tw > count:
                continue
            tb = count // (th * tw)
            covered = cdiv(B, tb) * tb * cdiv(H, th) * th * cdiv(W, tw) * tw
            key = (covered, tb, abs(th - tw), tw)
            if best is None or key < best[0]:
                best = (key, (tb, th, tw))
    return best[1]


def launch(back: bool, source, weight, bias, result, options, kind: str, config: Config) -> None:
    """y, or (`back`) dx; tensors as in subspace_conv2d.py, which `fit`."""
    source, result, flat = _last(source), _last(result), weight.flatten(2, 3)
    (M, B, *size, N), C, blocks = result.shape, source.shape[-1], config.tiles
    sides = box(B, *size, blocks["BLOCK_P"])
    block_n, block_k = blocks["BLOCK_N"], min(blocks["BLOCK_K"], 1 << (C - 1).bit_length())
    rows = M * cdiv(B, sides[0]) * cdiv(size[0], sides[1]) * cdiv(size[1], sides[2])
    tile = (1, block_k, 1, block_n) if back else (1, block_n, 1, block_k)
    subspace_conv2d_boxes_kernel[grid(OP, rows * cdiv(N, block_n))](
        _described(source, 1, *sides, block_k), _described(flat, *tile), bias,
        _described(result, 1, *sides, block_n), B, C, N, *size, *options[2:],
        KW=weight.shape[3], TAPS=flat.shape[2], BACK=back, SHARED=source.shape[0] < M,
        PRECISION=precision(kind), TB=sides[0], TH=sides[1], TW=sides[2], BLOCK_N=block_n,
        BLOCK_K=block_k, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def launch_weight(dy, x, part, boxes_per_split: int, options, kind: str, config: Config) -> None:
    """Fills part [splits, M, O, kh, kw, I]."""
    dy, x, blocks = _last(dy), _last(x), config.tiles
    M, B, *size, O = dy.shape
    splits, _, _, kh, kw, I = part.shape
    sides = box(B, *size, blocks["BLOCK_P"])
    count = cdiv(O, blocks["BLOCK_O"]) * cdiv(I, blocks["BLOCK_I"]) * kh * kw
    subspace_conv2d_bwd_weight_boxes_kernel[grid(OP, splits * M * count)](
        _described(dy, 1, *sides, blocks["BLOCK_O"]), _described(x, 1, *sides, blocks["BLOCK_I"]),
        part, M, B, I, O, *size, boxes_per_split, *options[2:],
        KW=kw, TAPS=kh * kw, SHARED=x.shape[0] < M, PRECISION=precision(kind),
        TB=sides[0], TH=sides[1], TW=sides[2], BLOCK_O=blocks["BLOCK_O"],
        BLOCK_I=blocks["BLOCK_I"], num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
