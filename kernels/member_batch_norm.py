"""Batch normalisation of M members in one set of launches: statistics, application, gradients.

Tensors come as [M, B, F, S]: S pixels of F features. The B * S numbers of a channel are the rows r
of a tile [BLOCK_R, BLOCK_F], and are cut into splits, whose number depends on the shape alone: the
second stage adds their parts up in a fixed order, so the same input gives the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import ARCHS, Config, arch, cdiv, grid, on_device

# (arch, bucket) -> Config. "features": features are next to one another in memory (channels-last,
# or no pixels); "pixels": pixels are; "few pixels": they are, but fewer than fill a tile's row.
# Origin: 16-byte accesses and 8 or 16 numbers per thread; none of it is timed on a GPU yet.
_TILES = {"features": (64, 32), "pixels": (2048, 1), "few pixels": (128, 8)}
SHIPPED = {
    (a, bucket): Config({"BLOCK_R": r, "BLOCK_F": f}, num_warps=4, num_stages=2)
    for a in ARCHS
    for bucket, (r, f) in _TILES.items()
}
FEW_PIXELS = 32  # a 128-byte line of float32
PROGRAMS = 1024  # of one launch, as far as rows go: eight on each of 132 multiprocessors
MOST_SPLITS = 64
MOST_ROWS = 2**31 - 2**16  # kernels number them in 32 bits; tiles and splits reach beyond them
MERGE_BLOCK = 16  # channels of one program that merges splits

NEVER_CONSTANT = ["M", "F", "R", "rows", "splits"]


class Cut(NamedTuple):
    """How a tensor [M, B, F, S] is cut into programs: m outermost, then features, then rows."""

    M: int
    F: int
    S: int
    R: int  # rows per channel, B * S
    rows: int  # per split
    splits: int
    flat: bool  # rows are equally far apart in memory, in every tensor


@triton.jit
def place_of(F, splits, BLOCK_F: tl.constexpr):
    # (m, features of this program, split)
    program = tl.program_id(0)
    blocks = tl.cdiv(F, BLOCK_F)
    split = program % splits
    block = program // splits % blocks
    return program // splits // blocks, block * BLOCK_F + tl.arange(0, BLOCK_F), split


@triton.jit
def tile_of(ptr, m, r, f, S, stride_m, stride_b, stride_f, stride_s, FLAT: tl.constexpr):
    # Pointers to rows r and features f of member m, [BLOCK_R, BLOCK_F]
    if FLAT:
        row = r.to(tl.int64) * stride_s
    else:
        row = (r // S).to(tl.int64) * stride_b + (r % S).to(tl.int64) * stride_s
    column = f.to(tl.int64) * stride_f
    return ptr + m.to(tl.int64) * stride_m + row[:, None] + column[None, :]


@triton.jit
def merge(count, mean, m2):
    # Mean and M2 of a column from those of its parts, in float64: a few numbers per channel
    count = count.to(tl.float64)
    mean = mean.to(tl.float64)
    middle = tl.sum(count * mean, 0) / tl.sum(count, 0)
    away = mean - middle[None, :]
    return middle, tl.sum(m2.to(tl.float64) + count * away * away, 0)


@triton.jit
def _finish(
    mean, m2, n, channel, in_f, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, momentum
):
    # Stores the statistics of some channels, and moves the running ones towards them
    tl.store(mean_ptr + channel, mean.to(tl.float32), mask=in_f)
    tl.store(var_ptr + channel, (m2 / n).to(tl.float32), mask=in_f)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + channel, mask=in_f, other=0.0).to(tl.float64)
        new = (1 - momentum) * old + momentum * mean
        tl.store(running_mean_ptr + channel, new.to(running_mean_ptr.dtype.element_ty), mask=in_f)
        old = tl.load(running_var_ptr + channel, mask=in_f, other=0.0).to(tl.float64)
        new = (1 - momentum) * old + momentum * (m2 / (n - 1))
        tl.store(running_var_ptr + channel, new.to(running_var_ptr.dtype.element_ty), mask=in_f)


@triton.jit(do_not_specialize=NEVER_CONSTANT)
def member_batch_norm_stats_kernel(
    x_ptr, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, part_ptr,
    M, F, S, R, rows, splits, momentum,
    x_stride_m, x_stride_b, x_stride_f, x_stride_s,
    FLAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One program takes mean and M2 of one split of BLOCK_F channels: every place of the tile keeps
    # its own running pair (Welford), which the end merges. No sum of squares is formed.
    m, f, split = place_of(F, splits, BLOCK_F)
    in_f = f < F
    first = split * rows
    last = tl.minimum(first + rows, R)
    # Less the first number of the channel, whose size would take digits from the deviations
    start = tile_of(
        x_ptr, m, tl.arange(0, 1), f, S, x_stride_m, x_stride_b, x_stride_f, x_stride_s, FLAT
    )
    origin = tl.load(start, mask=in_f[None, :], other=0.0).to(tl.float32)
    place = tl.arange(0, BLOCK_R)
    mean = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    m2 = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    seen = 0.0
    for begin in range(first, last, BLOCK_R):
        r = begin + place
        inside = (r < last)[:, None] & in_f[None, :]
        p = tile_of(x_ptr, m, r, f, S, x_stride_m, x_stride_b, x_stride_f, x_stride_s, FLAT)
        x = tl.load(p, mask=inside, other=0.0).to(tl.float32)
        seen += 1.0
        x -= origin
        away = tl.where(inside, x - mean, 0.0)
        mean += away * (1.0 / seen)
        m2 += away * (x - mean)
    count = tl.maximum(last - first - place + BLOCK_R - 1, 0) // BLOCK_R  # [BLOCK_R]
    middle, m2 = merge(count[:, None], mean, m2)
    middle += tl.sum(origin, 0)
    n = (last - first).to(tl.float64)
    channel = m.to(tl.int64) * F + f
    if part_ptr is None:
        _finish(middle, m2, n, channel, in_f, running_mean_ptr, running_var_ptr, mean_ptr,
                var_ptr, momentum)  # fmt: skip
    else:
        part_ptr += split.to(tl.int64) * 2 * M * F + channel
        tl.store(part_ptr, middle, mask=in_f)
        tl.store(part_ptr + M.to(tl.int64) * F, m2, mask=in_f)


@triton.jit(do_not_specialize=["channels", "R", "rows", "splits"])
def member_batch_norm_merge_kernel(
    part_ptr, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr,
    channels, R, rows, splits, momentum,
    SPLITS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One program merges the splits of BLOCK_F of the M * F channels.
    channel = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_f = channel < channels
    k = tl.arange(0, SPLITS)
    inside = (k < splits)[:, None] & in_f[None, :]
    p = part_ptr + (k.to(tl.int64) * 2 * channels)[:, None] + channel[None, :]
    mean = tl.load(p, mask=inside, other=0.0)
    m2 = tl.load(p + channels, mask=inside, other=0.0)
    count = tl.minimum(tl.maximum(R - k * rows, 0), rows)
    middle, m2 = merge(count[:, None], mean, m2)
    n = R.to(tl.float64)
    _finish(middle, m2, n, channel, in_f, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr,
            momentum)  # fmt: skip


@triton.jit
def channels_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, m, f, F, eps):
    # Of some channels: y = (x - mean) * scale + bias, [1, BLOCK_F] each, scale = weight * rstd;
    # rstd [BLOCK_F] in float64, so that each product of it is rounded once.
    channel = m.to(tl.int64) * F + f
    in_f = f < F
    mean = tl.load(mean_ptr + channel, mask=in_f, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + channel, mask=in_f, other=1.0).to(tl.float64)
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=in_f, other=0.0).to(tl.float64)
    bias = tl.zeros(mean.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=in_f, other=0.0).to(tl.float32)
    return mean[None, :], bias[None, :], scale.to(tl.float32)[None, :], rstd


@triton.jit(do_not_specialize=NEVER_CONSTANT)
def member_batch_norm_apply_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, y_ptr,
    M, F, S, R, rows, splits, eps,
    x_stride_m, x_stride_b, x_stride_f, x_stride_s, y_stride_m, y_stride_b, y_stride_f, y_stride_s,
    FLAT: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One program writes one split of BLOCK_F channels.
    m, f, split = place_of(F, splits, BLOCK_F)
    mean, bias, scale, _ = channels_of(weight_ptr, bias_ptr, mean_ptr, var_ptr, m, f, F, eps)
    first = split * rows
    last = tl.minimum(first + rows, R)
    for begin in range(first, last, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        inside = (r < last)[:, None] & (f < F)[None, :]
        p = tile_of(x_ptr, m, r, f, S, x_stride_m, x_stride_b, x_stride_f, x_stride_s, FLAT)
        y = (tl.load(p, mask=inside, other=0.0).to(tl.float32) - mean) * scale + bias
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # NaN stays
        p = tile_of(y_ptr, m, r, f, S, y_stride_m, y_stride_b, y_stride_f, y_stride_s, FLAT)
        tl.store(p, y.to(y_ptr.dtype.element_ty), mask=inside)


class Norm(NamedTuple):
    """What a channel is normalised with, [M, F] each; weight and bias may be None."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor  # biased
    eps: float


def cut(tensors: tuple[torch.Tensor, ...], config: Config | None) -> tuple[Cut, Config]:
    """How tensors [M, B, F, S] of one shape are cut, after the strides of the first."""
    x = tensors[0]
    M, B, F, S = x.shape
    if config is None:
        bucket = "features" if x.stride(2) == 1 and (S == 1 or x.stride(3) != 1) else "pixels"
        bucket = "few pixels" if bucket == "pixels" and S < FEW_PIXELS else bucket
        config = SHIPPED[arch(x), bucket]
    block, R = config.tiles["BLOCK_R"], B * S
    if R > MOST_ROWS:
        rule = f"of at most {MOST_ROWS} numbers per channel with backend 'triton'"
        raise ValueError(f"member_batch_norm: x must be {rule}; got {R}")
    groups = M * cdiv(F, config.tiles["BLOCK_F"])
    splits = min(max(1, PROGRAMS // groups), MOST_SPLITS, cdiv(R, 4 * block))
    rows = cdiv(cdiv(R, splits), block) * block
    flat = all(t.shape[3] == 1 or t.stride(1) == S * t.stride(3) or B == 1 for t in tensors)
    return Cut(M, F, S, R, rows, cdiv(R, rows), flat), config


def strides(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Of [M, B, F, S]; without pixels the rows are B."""
    m, b, f, s = t.stride()
    return m, b, f, b if t.shape[3] == 1 else s


def launch(kernel, op: str, plan: Cut, config: Config, *args, **constants) -> None:
    """One program for each split of each block of features of each member."""
    programs = plan.M * cdiv(plan.F, config.tiles["BLOCK_F"]) * plan.splits
    kernel[grid(op, programs)](*args, **constants, FLAT=plan.flat, **config.options())


def member_batch_norm_stats(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    config: Config | None = None,
) -> None:
    """Writes mean and biased variance [M, F] of x [M, B, F, S]; moves the running ones by momentum.

    The latter are contiguous, or None. B * S is at least 2.
    """
    with on_device(x):
        plan, config = cut((x,), config)
        part = None
        if plan.splits > 1:
            part = mean.new_empty((plan.splits, 2, plan.M, plan.F), dtype=torch.float64)
        running = running_mean, running_var, mean, var
        launch(
            member_batch_norm_stats_kernel, "member_batch_norm", plan, config, x, *running, part,
            *plan[:6], momentum, *strides(x),
        )  # fmt: skip
        if part is None:
            return
        member_batch_norm_merge_kernel[(cdiv(mean.numel(), MERGE_BLOCK),)](
            part, *running, mean.numel(), plan.R, plan.rows, plan.splits, momentum,
            SPLITS=triton.next_power_of_2(plan.splits), BLOCK_F=MERGE_BLOCK, num_warps=4,
        )  # fmt: skip


def member_batch_norm_fwd(
    x: torch.Tensor, norm: Norm, relu: bool, y: torch.Tensor, config: Config | None = None
) -> None:
    """Writes y [M, B, F, S], any strides. Parameters and statistics are contiguous."""
    with on_device(x):
        plan, config = cut((x, y), config)
        launch(
            member_batch_norm_apply_kernel, "member_batch_norm", plan, config,
            x, *norm[:4], y, *plan[:6], norm.eps, *strides(x), *strides(y), RELU=relu,
        )  # fmt: skip
