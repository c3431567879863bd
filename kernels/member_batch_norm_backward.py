"""Gradients of the batch normalisation of M members: two sums per channel, then dx.

With r = 1 / deviation: dbias = sum dy, dweight = r sum dy (x - mean), and, where mean and deviation
are those of the batch, dx = weight r (dy - dbias / n - (x - mean) r dweight / n).
"""

import torch
import triton
import triton.language as tl

from ._launch import Config, on_device
from .member_batch_norm import (
    NEVER_CONSTANT,
    Norm,
    channels_of,
    cut,
    launch,
    place_of,
    strides,
    tile_of,
)


@triton.jit
def _through(dy, x, scale, bias, RELU: tl.constexpr):
    # dy behind the ReLU, which let through what is positive; x is less its mean
    if RELU:
        dy = tl.where(x * scale + bias > 0, dy, 0.0)
    return dy


@triton.jit(do_not_specialize=NEVER_CONSTANT)
def member_batch_norm_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, part_ptr,
    M, F, S, R, rows, splits, eps,
    dy_stride_m, dy_stride_b, dy_stride_f, dy_stride_s,
    x_stride_m, x_stride_b, x_stride_f, x_stride_s,
    FLAT: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One program adds up dy and dy (x - mean) over one split of BLOCK_F channels.
    m, f, split = place_of(F, splits, BLOCK_F)
    mean, bias, scale, _ = channels_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, m, f, F, eps)
    first = split * rows
    last = tl.minimum(first + rows, R)
    plain = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    scaled = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for begin in range(first, last, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        inside = (r < last)[:, None] & (f < F)[None, :]
        p = tile_of(x_ptr, m, r, f, S, x_stride_m, x_stride_b, x_stride_f, x_stride_s, FLAT)
        x = tl.load(p, mask=inside, other=0.0).to(tl.float32) - mean
        p = tile_of(dy_ptr, m, r, f, S, dy_stride_m, dy_stride_b, dy_stride_f, dy_stride_s, FLAT)
        dy = tl.load(p, mask=inside, other=0.0).to(tl.float32)
        dy = _through(dy, x, scale, bias, RELU)
        plain += dy
        scaled += dy * x
    part_ptr += (split.to(tl.int64) * 2 * M + m) * F + f
    plain = tl.sum(plain.to(tl.float64), 0).to(tl.float32)
    scaled = tl.sum(scaled.to(tl.float64), 0).to(tl.float32)
    tl.store(part_ptr, plain, mask=f < F)
    tl.store(part_ptr + M.to(tl.int64) * F, scaled, mask=f < F)


@triton.jit(do_not_specialize=NEVER_CONSTANT)
def member_batch_norm_dx_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, part_ptr, dx_ptr, dweight_ptr,
    dbias_ptr, M, F, S, R, rows, splits, eps,
    dy_stride_m, dy_stride_b, dy_stride_f, dy_stride_s,
    x_stride_m, x_stride_b, x_stride_f, x_stride_s,
    dx_stride_m, dx_stride_b, dx_stride_f, dx_stride_s,
    TRAINING: tl.constexpr, SPLITS: tl.constexpr,
    FLAT: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One program adds up the parts of BLOCK_F channels, all in the same order, and writes one split
    # of dx; that of the first split also writes dweight and dbias. Each output may be None.
    m, f, split = place_of(F, splits, BLOCK_F)
    mean, bias, scale, rstd = channels_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, m, f, F, eps)
    in_f = f < F
    channel = m.to(tl.int64) * F + f
    plain = tl.zeros((BLOCK_F,), tl.float64)
    scaled = tl.zeros((BLOCK_F,), tl.float64)
    if part_ptr is not None:
        k = tl.arange(0, SPLITS)
        there = (k < splits)[:, None] & in_f[None, :]
        parts = part_ptr + (k.to(tl.int64) * 2 * M * F)[:, None] + channel[None, :]
        plain = tl.sum(tl.load(parts, mask=there, other=0.0).to(tl.float64), 0)
        parts += M.to(tl.int64) * F
        scaled = tl.sum(tl.load(parts, mask=there, other=0.0).to(tl.float64), 0) * rstd
    is_first = in_f & (split == 0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channel, scaled.to(dweight_ptr.dtype.element_ty), mask=is_first)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, plain.to(dbias_ptr.dtype.element_ty), mask=is_first)
    if dx_ptr is not None:
        n = R.to(tl.float64)
        plain = (plain / n).to(tl.float32)[None, :]
        slope = (scaled * rstd / n).to(tl.float32)[None, :]
        first = split * rows
        last = tl.minimum(first + rows, R)
        for begin in range(first, last, BLOCK_R):
            r = begin + tl.arange(0, BLOCK_R)
            inside = (r < last)[:, None] & in_f[None, :]
            p = tile_of(
                dy_ptr, m, r, f, S, dy_stride_m, dy_stride_b, dy_stride_f, dy_stride_s, FLAT
            )
            dx = tl.load(p, mask=inside, other=0.0).to(tl.float32)
            if TRAINING or RELU:
                p = tile_of(x_ptr, m, r, f, S, x_stride_m, x_stride_b, x_stride_f, x_stride_s, FLAT)
                x = tl.load(p, mask=inside, other=0.0).to(tl.float32) - mean
                dx = _through(dx, x, scale, bias, RELU)
                if TRAINING:
                    dx = dx - plain - x * slope
            p = tile_of(
                dx_ptr, m, r, f, S, dx_stride_m, dx_stride_b, dx_stride_f, dx_stride_s, FLAT
            )
            tl.store(p, (dx * scale).to(dx_ptr.dtype.element_ty), mask=inside)


def member_batch_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    training: bool,
    relu: bool,
    dx: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    config: Config | None = None,
) -> None:
    """Writes the gradients that are not None: dx [M, B, F, S], dweight and dbias [M, F].

    dy, x and dx have any strides; all else is contiguous. `training`: mean and variance are those
    of x.
    """
    with on_device(x):
        plan, config = cut((x, dy) if dx is None else (x, dy, dx), config)
        part = None
        if training or dweight is not None or dbias is not None:
            shape = (plan.splits, 2, plan.M, plan.F)
            part = x.new_empty(shape, dtype=torch.float32)
            launch(
                member_batch_norm_sums_kernel, "member_batch_norm", plan, config, dy, x, *norm[:4],
                part, *plan[:6], norm.eps, *strides(dy), *strides(x), RELU=relu,
            )  # fmt: skip
        launch(
            member_batch_norm_dx_kernel, "member_batch_norm", plan, config, dy, x, *norm[:4], part,
            dx, dweight, dbias, *plan[:6], norm.eps, *strides(dy), *strides(x),
            *strides(x if dx is None else dx), RELU=relu, TRAINING=training,
            SPLITS=triton.next_power_of_2(plan.splits),
        )  # fmt: skip
