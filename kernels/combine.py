"""combine: weights[m, p] = sum_k coeffs[m, part of p, k] * anchors[k, p], and its gradients.

All members come from one read of the anchors: a tile of K anchors stays in registers while m runs.
(With the loads inside the loop over m, the stores between them keep the compiler from hoisting
them: M times the traffic.) The backward reads dweights and anchors once for both gradients.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from ._launch import ARCHS, AUTOTUNE, Config, arch, fastest, on_device
from ._table import COLUMNS, NARROW, NO_ROW, Row, Table, full_unit, row_of_tile, single, table

# (arch, BLOCK_K) -> Config: tiles for up to BLOCK_K anchors in registers. More than that go 8 at a
# time backward, and forward (BLOCK_K 0) one by one with BLOCK_M members in registers. Origin:
# registers and 16-byte accesses of the compiled code; none of it is timed on a GPU yet.
_FORWARD = [
    (1, 2048, 4), (2, 2048, 4), (4, 1024, 4), (8, 1024, 4), (16, 1024, 4), (32, 512, 4), (0, 512, 2)
]  # fmt: skip
_BACKWARD = [(1, 2048, 4), (2, 2048, 4), (4, 1024, 4), (8, 512, 2)]
FORWARD_SHIPPED = {
    (a, k): Config({"BLOCK_M": 8, "BLOCK_K": k, "BLOCK_P": p}, num_warps=warps, num_stages=1)
    for a in ARCHS
    for k, p, warps in _FORWARD
}
BACKWARD_SHIPPED = {
    (a, k): Config({"BLOCK_K": k, "BLOCK_P": p}, num_warps=warps, num_stages=1)
    for a in ARCHS
    for k, p, warps in _BACKWARD
}
SUM_TILE = 8192  # partials that one program of combine_sum_kernel has in flight at most

_NEVER_CONSTANT = ["M", "K", "R", "steps", "coeffs_stride_m", "coeffs_stride_l", "coeffs_stride_k"]


@triton.jit
def seen(x, UNIT: tl.constexpr):
    """x, a multiple of UNIT, so that the compiler sees it and makes accesses that wide."""
    return x // UNIT * UNIT


@triton.jit
def _mix_tile(
    coeffs_ptr, anchors_ptr, weights_ptr, M, K, limit, m_first,
    coeffs_stride_m, coeffs_stride_k, anchors_stride_k, weights_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):
    p = tl.arange(0, BLOCK_P)
    in_p = p < limit
    if BLOCK_K > 0:  # all anchors in registers, one member after the other
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        anchors = tl.load(
            anchors_ptr + (k * anchors_stride_k)[:, None] + p[None, :],
            mask=(k < K)[:, None] & in_p[None, :], other=0.0,
        ).to(tl.float32)
        coeffs_ptr += k * coeffs_stride_k
        for _ in range(M):
            c = tl.load(coeffs_ptr, mask=k < K, other=0.0).to(tl.float32)
            acc = tl.sum(c[:, None] * anchors, 0)
            tl.store(weights_ptr + p, acc.to(weights_ptr.dtype.element_ty), mask=in_p)
            coeffs_ptr += coeffs_stride_m
            weights_ptr += weights_stride_m
    else:  # BLOCK_M members in registers, one anchor after the other
        m = m_first + tl.arange(0, BLOCK_M).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        coeffs_ptr += m * coeffs_stride_m
        for _ in tl.range(0, K, loop_unroll_factor=4):
            c = tl.load(coeffs_ptr, mask=m < M, other=0.0).to(tl.float32)
            anchor = tl.load((anchors_ptr + p)[None, :], mask=in_p[None, :], other=0.0)
            acc += c[:, None] * anchor.to(tl.float32)
            coeffs_ptr += coeffs_stride_k
            anchors_ptr += anchors_stride_k
        tl.store(
            weights_ptr + (m * weights_stride_m)[:, None] + p[None, :],
            acc.to(weights_ptr.dtype.element_ty), mask=(m < M)[:, None] & in_p[None, :],
        )


@triton.jit
def _mix_row(
    coeffs_ptr, anchors_ptr, weights_ptr, row, M, K, place, m_first,
    coeffs_stride_m, coeffs_stride_k, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):
    start = place * BLOCK_P
    _mix_tile(
        coeffs_ptr, anchors_ptr + seen(tl.load(row + 1), UNIT) + start,
        weights_ptr + seen(tl.load(row + 3), UNIT) + start,
        M, K, seen(tl.load(row), UNIT) - start, m_first, coeffs_stride_m, coeffs_stride_k,
        seen(tl.load(row + 2), UNIT), seen(tl.load(row + 4), UNIT), BLOCK_M, BLOCK_K, BLOCK_P,
    )


@triton.jit(do_not_specialize=_NEVER_CONSTANT)
def combine_fwd_kernel(
    coeffs_ptr, anchors_ptr, table_ptr, weights_ptr,
    M, K, P, R, steps,
    coeffs_stride_m, coeffs_stride_l, coeffs_stride_k, anchors_stride_k, weights_stride_m,
    UNIT: tl.constexpr, FULL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # One program makes one tile of P: of all members, or of BLOCK_M of them where BLOCK_K is 0.
    tile = tl.program_id(0).to(tl.int64)
    m = tile * 0
    if BLOCK_K == 0:
        blocks = tl.cdiv(M, BLOCK_M)
        m = tile % blocks * BLOCK_M
        tile = tile // blocks
    if table_ptr is None:
        start = tile * BLOCK_P
        _mix_tile(coeffs_ptr, anchors_ptr + start, weights_ptr + start,
                  M, K, seen(P, UNIT) - start, m, coeffs_stride_m, coeffs_stride_k,
                  seen(anchors_stride_k, UNIT), seen(weights_stride_m, UNIT),
                  BLOCK_M, BLOCK_K, BLOCK_P)
    else:
        row, place = row_of_tile(table_ptr, tile, R, steps)
        coeffs_ptr += tl.load(row + 7) * coeffs_stride_l
        if tl.load(row + 8) == FULL:
            _mix_row(coeffs_ptr, anchors_ptr, weights_ptr, row, M, K, place, m, coeffs_stride_m,
                     coeffs_stride_k, FULL, BLOCK_M, BLOCK_K, BLOCK_P)
        else:
            _mix_row(coeffs_ptr, anchors_ptr, weights_ptr, row, M, K, place, m, coeffs_stride_m,
                     coeffs_stride_k, UNIT, BLOCK_M, BLOCK_K, BLOCK_P // NARROW)


@triton.jit
def _grad_tile(
    coeffs_ptr, anchors_ptr, dweights_ptr, danchors_ptr, partials_ptr, M, K, limit, k, wanted,
    coeffs_stride_m, coeffs_stride_k, anchors_stride_k, dweights_stride_m, danchors_stride_k,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):
    p = tl.arange(0, BLOCK_P)
    in_p = p < limit
    inside = (k < K)[:, None] & in_p[None, :]
    if partials_ptr is not None:
        anchors = tl.load(anchors_ptr + (k * anchors_stride_k)[:, None] + p[None, :],
                          mask=inside, other=0.0).to(tl.float32)
        partials_ptr += k
    if danchors_ptr is not None:
        acc = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
        coeffs_ptr += k * coeffs_stride_k
    # Loads run two members ahead: the store of partials would hold them back.
    now = tl.load((dweights_ptr + p)[None, :], mask=in_p[None, :], other=0.0)
    dweights_ptr += dweights_stride_m
    soon = tl.load((dweights_ptr + p)[None, :], mask=(in_p & (M > 1))[None, :], other=0.0)
    for m in range(M):
        dweights_ptr += dweights_stride_m
        ahead = (in_p & (m + 2 < M))[None, :]
        later = tl.load((dweights_ptr + p)[None, :], mask=ahead, other=0.0)
        dweights = now.to(tl.float32)
        if partials_ptr is not None:
            tl.store(partials_ptr, tl.sum(anchors * dweights, 1), mask=k < K)
            partials_ptr += K
        if danchors_ptr is not None:
            c = tl.load(coeffs_ptr, mask=k < K, other=0.0).to(tl.float32)
            acc += c[:, None] * dweights
            coeffs_ptr += coeffs_stride_m
        now = soon
        soon = later
    if danchors_ptr is not None:
        tl.store(danchors_ptr + (k * danchors_stride_k)[:, None] + p[None, :],
                 acc.to(danchors_ptr.dtype.element_ty), mask=inside & wanted)


@triton.jit
def _grad_row(
    coeffs_ptr, anchors_ptr, dweights_ptr, danchors_ptr, partials_ptr, row, M, K, place, k,
    coeffs_stride_m, coeffs_stride_k,
    UNIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):
    start = place * BLOCK_P
    wanted = tl.load(row + 5) >= 0
    if danchors_ptr is not None:
        danchors_ptr += seen(tl.maximum(tl.load(row + 5), 0), UNIT) + start
    _grad_tile(
        coeffs_ptr, anchors_ptr + seen(tl.load(row + 1), UNIT) + start,
        dweights_ptr + seen(tl.load(row + 3), UNIT) + start, danchors_ptr, partials_ptr,
        M, K, seen(tl.load(row), UNIT) - start, k, wanted, coeffs_stride_m, coeffs_stride_k,
        seen(tl.load(row + 2), UNIT), seen(tl.load(row + 4), UNIT), seen(tl.load(row + 6), UNIT),
        BLOCK_K, BLOCK_P,
    )


@triton.jit(do_not_specialize=_NEVER_CONSTANT)
def combine_bwd_kernel(
    coeffs_ptr, anchors_ptr, dweights_ptr, table_ptr, danchors_ptr, partials_ptr,
    M, K, P, R, steps,
    coeffs_stride_m, coeffs_stride_l, coeffs_stride_k,
    anchors_stride_k, dweights_stride_m, danchors_stride_k,
    UNIT: tl.constexpr, FULL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # One program reads a tile of dweights and of BLOCK_K anchors, and makes their danchors and the
    # tile's share of dcoeffs, partials[tile, m, k]. Either output may be None.
    tile = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(K, BLOCK_K)
    k = tile % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = tile // blocks
    if partials_ptr is not None:
        partials_ptr += tile * M * K
    if table_ptr is None:
        start = tile * BLOCK_P
        if danchors_ptr is not None:
            danchors_ptr += start
        _grad_tile(coeffs_ptr, anchors_ptr + start, dweights_ptr + start, danchors_ptr,
                   partials_ptr, M, K, seen(P, UNIT) - start, k, True, coeffs_stride_m,
                   coeffs_stride_k, seen(anchors_stride_k, UNIT), seen(dweights_stride_m, UNIT),
                   seen(danchors_stride_k, UNIT), BLOCK_K, BLOCK_P)
    else:
        row, place = row_of_tile(table_ptr, tile, R, steps)
        coeffs_ptr += tl.load(row + 7) * coeffs_stride_l
        if tl.load(row + 8) == FULL:
            _grad_row(coeffs_ptr, anchors_ptr, dweights_ptr, danchors_ptr, partials_ptr, row, M, K,
                      place, k, coeffs_stride_m, coeffs_stride_k, FULL, BLOCK_K, BLOCK_P)
        else:
            _grad_row(coeffs_ptr, anchors_ptr, dweights_ptr, danchors_ptr, partials_ptr, row, M, K,
                      place, k, coeffs_stride_m, coeffs_stride_k, UNIT, BLOCK_K, BLOCK_P // NARROW)


@triton.jit(do_not_specialize=["M", "K", "R", "tiles", "dcoeffs_stride_m", "dcoeffs_stride_l"])
def combine_sum_kernel(
    partials_ptr, table_ptr, dcoeffs_ptr,
    M, K, R, tiles, dcoeffs_stride_m, dcoeffs_stride_l,
    BLOCK_T: tl.constexpr,
):
    # One program adds up one coefficient's partials, always in the same order.
    program = tl.program_id(0).to(tl.int64)
    k = program % K
    m = program // K % M
    part = program // K // M
    first = part * 0
    last = first + tiles
    if table_ptr is not None:
        entry = table_ptr + R + 1 + R * COLUMNS + 3 * part
        part = tl.load(entry)
        first = tl.load(entry + 1)
        last = tl.load(entry + 2)
    acc = tl.zeros((BLOCK_T,), tl.float32)
    for begin in range(first, last, BLOCK_T):
        tile = begin + tl.arange(0, BLOCK_T)
        acc += tl.load(partials_ptr + (tile * M + m) * K + k, mask=tile < last, other=0.0)
    dcoeffs_ptr += m * dcoeffs_stride_m + part * dcoeffs_stride_l + k
    tl.store(dcoeffs_ptr, tl.sum(acc, 0).to(dcoeffs_ptr.dtype.element_ty))


def combine_fwd(
    coeffs: torch.Tensor,
    anchors: torch.Tensor,
    weights: torch.Tensor,
    rows: Sequence[Sequence[int]],
    config: Config | None = None,
) -> None:
    """Writes weights, each part where its `_table.Row` says from the first element of each tensor.

    coeffs [M, K] (for all parts) or [M, L, K], any strides; M, K >= 1 and at least one row.
    """
    M, K = coeffs.shape[0], coeffs.shape[-1]
    coeffs, only = _only(coeffs, rows, anchors)

    def run(config):
        config, where = _tiles(config, only, rows, anchors)
        groups = 1 if config.tiles["BLOCK_K"] else triton.cdiv(M, config.tiles["BLOCK_M"])
        launch(
            combine_fwd_kernel, where.tiles * groups, config, coeffs, anchors, where.data, weights,
            M, K, only.P, where.rows, where.steps, *_strides(coeffs), only.anchors_stride_k,
            only.weights_stride_m, where.unit, full_unit(anchors),
        )

    with on_device(anchors):
        block_k = triton.next_power_of_2(K) if K <= 32 else 0
        shipped = FORWARD_SHIPPED[arch(anchors), block_k]
        run(config or _search("combine_fwd", shipped, coeffs, anchors, rows, run))


def combine_bwd(
    coeffs: torch.Tensor,
    anchors: torch.Tensor,
    dweights: torch.Tensor,
    danchors: torch.Tensor | None,
    dcoeffs: torch.Tensor | None,
    rows: Sequence[Sequence[int]],
    config: Config | None = None,
) -> None:
    """Writes the gradients that are not None, from one read of dweights and of anchors.

    As `combine_fwd`, with dweights in the place of weights. dcoeffs is contiguous, of the shape of
    coeffs, and untouched at parts without a row.
    """
    M, K = coeffs.shape[0], coeffs.shape[-1]
    shared = coeffs.ndim == 2
    coeffs, only = _only(coeffs, rows, anchors)
    if dcoeffs is not None:
        dcoeffs, _ = _only(dcoeffs, rows, anchors)

    def run(config):
        config, where = _tiles(config, only, rows, anchors)
        groups = triton.cdiv(K, config.tiles["BLOCK_K"])
        partials = None
        if dcoeffs is not None:
            partials = anchors.new_empty((where.tiles, M, K), dtype=torch.float32)
        launch(
            combine_bwd_kernel, where.tiles * groups, config, coeffs, anchors, dweights, where.data,
            danchors, partials, M, K, only.P, where.rows, where.steps, *_strides(coeffs),
            only.anchors_stride_k, only.weights_stride_m, only.danchors_stride_k, where.unit,
            full_unit(anchors),
        )
        if dcoeffs is None:
            return
        parts, most, data = where.parts, where.most, where.data
        if shared:  # the tiles of all parts add up
            parts, most, data = 1, where.tiles, None
        block_t = min(SUM_TILE, max(128, triton.next_power_of_2(most)))
        launch(
            combine_sum_kernel, parts * M * K,
            Config({"BLOCK_T": block_t}, num_warps=4 if block_t < SUM_TILE else 8, num_stages=1),
            partials, data, dcoeffs, M, K, where.rows, where.tiles, *_strides(dcoeffs)[:2],
        )

    with on_device(anchors):
        shipped = BACKWARD_SHIPPED[arch(anchors), min(triton.next_power_of_2(K), 8)]
        run(config or _search("combine_bwd", shipped, coeffs, anchors, rows, run))


def launch(kernel, programs: int, config: Config, *args) -> None:
    """Every launch of this file passes here."""
    kernel[(programs,)](*args, **config.options())


def _only(coeffs: torch.Tensor, rows, like: torch.Tensor) -> tuple[torch.Tensor, Row]:
    """A single piece needs no table: (its coefficients, it). Otherwise (coeffs, zeros)."""
    row = NO_ROW if len(rows) > 1 else single(rows[0], full_unit(like))
    if row is NO_ROW:
        return coeffs, row
    return coeffs if coeffs.ndim == 2 else coeffs.select(1, row.part), row


def _tiles(config: Config, only: Row, rows, like: torch.Tensor) -> tuple[Config, Table]:
    if only.P == 0:
        return config, table(rows, config.tiles["BLOCK_P"], like)
    block = config.tiles["BLOCK_P"]
    if only.unit < full_unit(like):
        block //= NARROW.value
        config = config._replace(tiles={**config.tiles, "BLOCK_P": block})
    tiles = triton.cdiv(only.P, block)
    return config, Table(None, 1, tiles, 0, 1, tiles, only.unit)


def _strides(coeffs: torch.Tensor) -> tuple[int, int, int]:
    return coeffs.stride() if coeffs.ndim == 3 else (coeffs.stride(0), 0, coeffs.stride(1))


def _search(op: str, shipped: Config, coeffs, anchors, rows, run: Callable[[Config], None]):
    """`shipped`, or on request the fastest of its neighbours."""
    if not AUTOTUNE:
        return shipped
    block = shipped.tiles["BLOCK_P"]
    near = [
        shipped._replace(tiles={**shipped.tiles, "BLOCK_P": p}, num_warps=warps)
        for p in (block // 2, block, 2 * block)
        for warps in (4, 8)
    ]
    key = (op, arch(anchors), coeffs.shape, anchors.dtype, sum(row[0] for row in rows))
    return fastest(key, shipped, near, run)
