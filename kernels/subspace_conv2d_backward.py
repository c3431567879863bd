"""subspace_conv2d, dweight: for each member the sum over pixels of x[k] dy[o], k = (tap, channel).

Gradients of the anchors and coefficients are those of `combine`, from these.
"""

import torch
import triton
import triton.language as tl

from . import subspace_conv2d_boxes as boxes
from . import subspace_conv2d_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from ._reduce import Jobs, sum_parts
from .batch_ensemble_conv2d import (
    checked_pixels,
    member_strides,
    spans_long,
    taps_and_channels,
)
from .batch_ensemble_conv2d_backward import outer_tile
from .batch_ensemble_linear import offset, precision
from .subspace_conv2d_boxes import OP


@triton.jit(do_not_specialize=["M", "B", "pixels_per_split"])
def subspace_conv2d_bwd_weight_kernel(
    dy_ptr, x_ptr, part_ptr, M, B, I, O, H, W, H_OUT, W_OUT, pixels_per_split,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w,
    dy_stride_m, dy_stride_b, dy_stride_o, dy_stride_h, dy_stride_w,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_K columns (tap, i) and BLOCK_O channels of dweight of one member
    # over the pixels of one split: part is [splits, M, O, taps, I].
    TAPS: tl.constexpr = KH * KW
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_k = tl.cdiv(TAPS, BLOCK_K // BLOCK_C) * tl.cdiv(I, BLOCK_C)
    row = tl.program_id(0) // (tiles_o * tiles_k)
    m = (row % M).to(tl.int64)
    first = row // M * pixels_per_split
    last = min(first + pixels_per_split, B * H_OUT * W_OUT)
    tap, i = taps_and_channels(tl.program_id(0) % (tiles_o * tiles_k) // tiles_o, I,
                               BLOCK_K, BLOCK_C)  # fmt: skip
    offs_o = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    in_o = offs_o < O
    g, _ = outer_tile(x_ptr, dy_ptr, m, first, last, tap, i, offs_o, in_o, I, H, W, H_OUT, W_OUT,
                      step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
                      x_stride_m, x_stride_b, x_stride_i, x_stride_h, x_stride_w,
                      dy_stride_m, dy_stride_b, dy_stride_o, dy_stride_h, dy_stride_w,
                      False, LONG, KW, TAPS, PRECISION, BLOCK_K, BLOCK_O, BLOCK_P)  # fmt: skip
    p = part_ptr + row.to(tl.int64) * offset(O * TAPS, I, LONG)
    p = p + offset(offs_o, TAPS * I, LONG)[None, :] + (tap * I + i)[:, None]
    tl.store(p, g, mask=((tap < TAPS) & (i < I))[:, None] & in_o[None, :])


def subspace_conv2d_bwd_weight(
    dy: torch.Tensor,
    x: torch.Tensor,
    dweight: torch.Tensor,
    step: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
    tf32: bool,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> None:
    """Fills dweight [M, O, kh, kw, I], contiguous, of any floating dtype.

    dy [M, B, O, H', W'] and x [M or 1, B, I, H, W], any strides. Nothing is empty.
    """
    (M, B, O, *size), I = dy.shape, x.shape[2]
    kh, kw = dweight.shape[2:4]
    options, kind = (*step, *pad, *dilation), tiles.kind_of(x.dtype, tf32)

    def launch(c: Config) -> Jobs:
        jobs: Jobs = []
        run = _boxes if c.tma else _pixels
        run(dy, x, dweight, jobs, options, kind, c, splits)
        return jobs

    with on_device(x):
        if config is None:
            tma = boxes.fit(x, dy, options, kind)
            where = (arch(x), "weight", kind)
            config = tiles.config(*where, I if tma else O, O if tma else I, tma)
            if AUTOTUNE:
                sizes = (M, B, I, O, *x.shape[3:], *size, kh, kw, *options)
                key = ("subspace_conv2d_bwd_weight", x.device, x.dtype, *where, *sizes)
                found = tiles.candidates(*where, tma)
                config = fastest(key, config, found, lambda c: sum_parts(launch(c)))
        sum_parts(launch(config))


def _pixels(dy, x, dweight, jobs: Jobs, options, kind: str, c: Config, splits) -> None:
    (M, B, O, *size), (I, H, W) = dy.shape, x.shape[2:]
    kh, kw = dweight.shape[2:4]
    block_k, block_c = tiles.depth(c, kh * kw, I)
    block_o, block_p = c.tiles["BLOCK_O"], c.tiles["BLOCK_P"]
    count = cdiv(O, block_o) * cdiv(kh * kw, block_k // block_c) * cdiv(I, block_c)
    count_p = checked_pixels(OP, B, *size)
    each = _share(count_p, block_p, (block_k, block_o), count * M, x, splits)
    part = _part(jobs, dweight, cdiv(count_p, each))
    subspace_conv2d_bwd_weight_kernel[grid(OP, part.shape[0] * M * count)](
        dy, x, part, M, B, I, O, H, W, *size, each, *options, *member_strides(x), *dy.stride(),
        KH=kh, KW=kw, PRECISION=precision(kind), LONG=spans_long(dweight[0], options[4:], x, dy),
        **(c.options() | {"BLOCK_K": block_k, "BLOCK_C": block_c}),
    )  # fmt: skip


def _boxes(dy, x, dweight, jobs: Jobs, options, kind: str, c: Config, splits) -> None:
    (M, B, O, *size), I = dy.shape, x.shape[2]
    block_o, block_i, block_p = (c.tiles[f"BLOCK_{letter}"] for letter in "OIP")
    kh, kw = dweight.shape[2:4]
    count = cdiv(O, block_o) * cdiv(I, block_i) * kh * kw
    sides = zip((B, *size), boxes.box(B, *size, block_p), strict=True)
    number = 1
    for n, side in sides:
        number *= cdiv(n, side)
    each = _share(number * block_p, block_p, (block_o, block_i), count * M, x, splits) // block_p
    part = _part(jobs, dweight, cdiv(number, each))
    boxes.launch_weight(dy, x, part, each, options, kind, c)


def _share(steps: int, depth: int, blocks: tuple[int, int], programs: int, x, splits) -> int:
    """How much of a sum of `steps` one program does, so that all multiprocessors have work."""
    if splits is not None:
        return cdiv(cdiv(steps, depth), splits) * depth
    sms = tiles.processors(x)
    return tiles.weight_split(*blocks, depth, programs, sms, 1, steps).examples


def _part(jobs: Jobs, dweight: torch.Tensor, splits: int) -> torch.Tensor:
    """[splits, *dweight.shape] for a kernel to fill: dweight itself, or parts to be added up."""
    if splits == 1 and dweight.dtype == torch.float32:
        return dweight.unsqueeze(0)
    part = dweight.new_empty((splits, *dweight.shape), dtype=torch.float32)
    jobs.append((part, dweight))
    return part
