"""gram: inner products of K models, part by part, in float64.

A product of two float32 numbers is exact in float64, so nothing is lost where two models are close
and their distance is a small difference of large sums. Each tile of parameters has partial sums of
its own, which a second kernel adds up in the order of the tiles.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._launch import ARCHS, Config, arch, cdiv, grid, on_device
from ._table import COLUMNS, NARROW, NO_ROW, full_unit, row_of_tile, single, table
from .combine import seen

OP = "gram"
# (arch, BLOCK_K) -> Config: BLOCK_K anchors meet BLOCK_K others, BLOCK parameters at a time, of the
# BLOCK_P of a tile; more than 4 anchors go through pairs of blocks of 4 while a tile is in the
# caches. Origin: registers of the compiled code; none of it is timed on a GPU yet.
_SHIPPED = [(1, 4096, 1024), (2, 4096, 512), (4, 2048, 256)]
SHIPPED = {
    (a, k): Config({"BLOCK_K": k, "BLOCK_P": p, "BLOCK": block}, num_warps=4, num_stages=2)
    for a in ARCHS
    for k, p, block in _SHIPPED
}
SUM_BLOCK = 256  # partial sums of a pair that gram_sum_kernel adds up at a time


@triton.jit
def _load_rows(anchors_ptr, k, K, anchors_stride_k, p, limit):
    """[rows of k, BLOCK] in float64, zero outside."""
    return tl.load(
        anchors_ptr + (k.to(tl.int64) * anchors_stride_k)[:, None] + p[None, :],
        mask=(k < K)[:, None] & (p < limit)[None, :], other=0.0,
    ).to(tl.float64)  # fmt: skip


@triton.jit
def _gram_tile(
    anchors_ptr, partials_ptr, K, limit, anchors_stride_k,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials [K, K] of up to BLOCK_P parameters: entries (i, j) with i <= j."""
    offs_p = tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK_K)
    one = tl.arange(0, 1)
    last = tl.minimum(limit, BLOCK_P)
    for i in range(0, K, BLOCK_K):
        for j in range(i, K, BLOCK_K):
            acc0 = tl.zeros((BLOCK_K, BLOCK), tl.float64)
            acc1 = tl.zeros((BLOCK_K, BLOCK), tl.float64)
            acc2 = tl.zeros((BLOCK_K, BLOCK), tl.float64)
            acc3 = tl.zeros((BLOCK_K, BLOCK), tl.float64)
            for start in range(0, last, BLOCK):
                p = start + offs_p
                right = _load_rows(anchors_ptr, j + offs_k, K, anchors_stride_k, p, limit)
                acc0 += _load_rows(anchors_ptr, i + one, K, anchors_stride_k, p, limit) * right
                if BLOCK_K > 1:
                    left = _load_rows(anchors_ptr, i + 1 + one, K, anchors_stride_k, p, limit)
                    acc1 += left * right
                if BLOCK_K > 2:
                    left = _load_rows(anchors_ptr, i + 2 + one, K, anchors_stride_k, p, limit)
                    acc2 += left * right
                    left = _load_rows(anchors_ptr, i + 3 + one, K, anchors_stride_k, p, limit)
                    acc3 += left * right
            to = partials_ptr + i * K + j + offs_k
            in_k = j + offs_k < K
            tl.store(to, tl.sum(acc0, 1), mask=in_k)
            if BLOCK_K > 1:
                tl.store(to + K, tl.sum(acc1, 1), mask=in_k & (i + 1 < K))
            if BLOCK_K > 2:
                tl.store(to + 2 * K, tl.sum(acc2, 1), mask=in_k & (i + 2 < K))
                tl.store(to + 3 * K, tl.sum(acc3, 1), mask=in_k & (i + 3 < K))


@triton.jit
def _gram_row(
    anchors_ptr, partials_ptr, row, K, place, UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = place * BLOCK_P
    _gram_tile(anchors_ptr + seen(tl.load(row + 1), UNIT) + start, partials_ptr, K,
               seen(tl.load(row), UNIT) - start, seen(tl.load(row + 2), UNIT),
               BLOCK_K, BLOCK_P, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["K", "P", "R", "steps"])
def gram_kernel(
    anchors_ptr, table_ptr, partials_ptr,
    K, P, R, steps, anchors_stride_k,
    UNIT: tl.constexpr, FULL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program sums the products of one tile of parameters: partials [tiles, K, K].
    tile = tl.program_id(0).to(tl.int64)
    partials_ptr += tile * K * K
    if table_ptr is None:
        start = tile * BLOCK_P
        _gram_tile(anchors_ptr + start, partials_ptr, K, seen(P, UNIT) - start,
                   seen(anchors_stride_k, UNIT), BLOCK_K, BLOCK_P, BLOCK)  # fmt: skip
    else:
        row, place = row_of_tile(table_ptr, tile, R, steps)
        if tl.load(row + 8) == FULL:
            _gram_row(anchors_ptr, partials_ptr, row, K, place, FULL, BLOCK_K, BLOCK_P, BLOCK)
        else:
            _gram_row(anchors_ptr, partials_ptr, row, K, place, UNIT, BLOCK_K, BLOCK_P // NARROW,
                      BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["K", "R", "tiles"])
def gram_sum_kernel(
    partials_ptr, table_ptr, out_ptr,
    K, R, tiles,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    # One program makes one entry of out [L, K, K]; (i, j) and (j, i) add up the same numbers.
    program = tl.program_id(0).to(tl.int64)
    i = program // K % K
    j = program % K
    pair = tl.minimum(i, j) * K + tl.maximum(i, j)
    part = program // K // K
    first = part * 0
    last = first + tiles
    if table_ptr is not None:
        entry = table_ptr + R + 1 + R * COLUMNS + 3 * part
        part = tl.load(entry)
        first = tl.load(entry + 1)
        last = tl.load(entry + 2)
    acc = tl.zeros((BLOCK_T,), tl.float64)
    for begin in range(first, last, BLOCK_T):
        tile = begin + tl.arange(0, BLOCK_T)
        acc += tl.load(partials_ptr + tile * K * K + pair, mask=tile < last, other=0.0)
    tl.store(out_ptr + (part * K + i) * K + j, tl.sum(acc, 0))


def gram(
    anchors: torch.Tensor,
    out: torch.Tensor,
    rows: Sequence[Sequence[int]],
    config: Config | None = None,
) -> None:
    """Fills out [L, K, K] in float64, contiguous, at the parts that have a row.

    `rows` are `_table.Row`s that say where the anchors lie from the first element of `anchors`, and
    which of the L each belongs to. K >= 1, and at least one row.
    """
    K, full = out.shape[-1], full_unit(anchors)
    with on_device(anchors):
        config = config or SHIPPED[arch(anchors), min(triton.next_power_of_2(K), 4)]
        block = config.tiles["BLOCK_P"]
        only = NO_ROW if len(rows) > 1 else single(rows[0], full)
        if only is NO_ROW:
            where = table(rows, block, anchors)
            data, tiles, parts, unit = where.data, where.tiles, where.parts, where.unit
            searched = (where.rows, where.steps)
        else:
            data, tiles, parts, unit, searched = None, cdiv(only.P, block), 1, only.unit, (1, 0)
            out = out[only.part]
        partials = anchors.new_empty((tiles, K, K), dtype=torch.float64)
        gram_kernel[grid(OP, tiles)](
            anchors, data, partials, K, only.P, *searched, only.anchors_stride_k,
            UNIT=unit, FULL=full, **config.options(),
        )  # fmt: skip
        gram_sum_kernel[grid(OP, parts * K * K)](
            partials, data, out, K, searched[0], tiles, BLOCK_T=SUM_BLOCK, num_warps=4
        )
