"""subspace_linear, backward: the weight gradient of every member, G_m = dy_m^T x_m, in one launch.

dx is a product of `subspace_linear`.
"""

import torch
import triton
import triton.language as tl

from . import subspace_linear_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from ._reduce import Jobs, parts, sum_parts
from .batch_ensemble_linear import (
    describable,
    descriptor,
    offset,
    precision,
    row_strides,
    spans_long,
    swizzled,
)
from .batch_ensemble_linear_backward import outer_tile
from .batch_ensemble_linear_tiles import kind_of, processors
from .subspace_linear import OP


@triton.jit(do_not_specialize=["M", "B", "batch_per_split"])
def subspace_linear_bwd_weight_kernel(
    dy, x, dweight_ptr, dbias_ptr,
    M, B, I, O, batch_per_split,
    dy_stride_m, dy_stride_b, dy_stride_o, x_stride_m, x_stride_b, x_stride_i,
    SHARED_X: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # One program computes [BLOCK_O, BLOCK_I] of one member's dweight over the examples of a split:
    # [splits, M, O, I]; those of the first column of tiles the sums of dy, too.
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_i = tl.cdiv(I, BLOCK_I)
    member = tl.program_id(0) // (tiles_o * tiles_i)  # of all splits
    row, col = swizzled(tl.program_id(0) % (tiles_o * tiles_i), tiles_o, tiles_i, GROUP)
    m = member % M
    b_first = member // M * batch_per_split
    b_last = min(b_first + batch_per_split, B)
    offs_o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = col * BLOCK_I + tl.arange(0, BLOCK_I)
    if dbias_ptr is None:
        g, db = outer_tile(dy, x, m, b_first, b_last, B, I, O, row, col,
                           dy_stride_m, dy_stride_b, dy_stride_o,
                           x_stride_m, x_stride_b, x_stride_i, False, SHARED_X, PRECISION,
                           TMA, LONG, BLOCK_O, BLOCK_I, BLOCK_B)  # fmt: skip
    elif col == 0:
        g, db = outer_tile(dy, x, m, b_first, b_last, B, I, O, row, col,
                           dy_stride_m, dy_stride_b, dy_stride_o,
                           x_stride_m, x_stride_b, x_stride_i, True, SHARED_X, PRECISION,
                           TMA, LONG, BLOCK_O, BLOCK_I, BLOCK_B)  # fmt: skip
        p_db = dbias_ptr + offset(member, O, LONG) + offs_o
        tl.store(p_db, db.to(dbias_ptr.dtype.element_ty), mask=offs_o < O)
    else:
        g, db = outer_tile(dy, x, m, b_first, b_last, B, I, O, row, col,
                           dy_stride_m, dy_stride_b, dy_stride_o,
                           x_stride_m, x_stride_b, x_stride_i, False, SHARED_X, PRECISION,
                           TMA, LONG, BLOCK_O, BLOCK_I, BLOCK_B)  # fmt: skip
    p_dw = dweight_ptr + member.to(tl.int64) * O * I
    p_dw = p_dw + offs_o.to(tl.int64)[:, None] * I + offs_i[None, :]
    inside = (offs_o < O)[:, None] & (offs_i < I)[None, :]
    tl.store(p_dw, g.to(dweight_ptr.dtype.element_ty), mask=inside)


def subspace_linear_bwd_weight(
    dy: torch.Tensor,
    x: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor | None,
    tf32: bool,
    *,
    config: Config | None = None,
    split: tuple[int, int] | None = None,
    long: bool | None = None,
) -> None:
    """Fills dweight [M, O, I] and, unless None, dbias [M, O], contiguous, of any floating dtypes.

    dy [M, B, O], x [M, B, I] or, of all members, [B, I]: any strides, one dtype. Nothing is empty.
    `config`, `split` (see `tiles.weight_split`) and `long` (64-bit offsets) are chosen here unless
    given.
    """
    (M, B, O), I = dy.shape, x.shape[-1]
    kind, sms = kind_of(x.dtype, tf32), processors(x)
    long = spans_long(dy, x) if long is None else long
    strides, sizes, fixed = (*dy.stride(), *row_strides(x)), tiles.Sizes(M, B, I, O), split

    def launch(c: Config) -> Jobs:
        block_o, block_i, block_b = (c.tiles[k] for k in ("BLOCK_O", "BLOCK_I", "BLOCK_B"))
        splits, examples = fixed or tiles.weight_split(c, sms, sizes)
        jobs, outputs = [], (dweight, dbias)
        if splits > 1:
            outputs = (parts(jobs, dweight, splits, M, O, I), parts(jobs, dbias, splits, M, O))
        programs = splits * M * cdiv(O, block_o) * cdiv(I, block_i)
        subspace_linear_bwd_weight_kernel[grid(OP, programs)](
            descriptor(dy, block_b, block_o) if c.tma else dy,
            descriptor(x, block_b, block_i) if c.tma else x,
            *outputs, M, B, I, O, examples, *strides,
            SHARED_X=x.ndim == 2, PRECISION=precision(kind), TMA=c.tma, LONG=long, **c.options(),
        )  # fmt: skip
        return jobs

    with on_device(x):
        if config is None:
            tma = arch(x) >= 90 and describable(dy) and describable(x)
            where = (kind, tma, arch(x), sms)
            config = tiles.weight_config(*where, sizes)
            if AUTOTUNE:
                key = ("subspace_linear_bwd_weight", x.device, x.dtype, *where, *sizes)
                candidates = [c for _, c in tiles.buckets(arch(x), "weight", kind, tma)]
                config = fastest(key, config, candidates, lambda c: sum_parts(launch(c)))
        sum_parts(launch(config))
