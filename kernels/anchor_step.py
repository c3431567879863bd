"""anchor_step: a step of all anchors from the gradient of mixed weights, and their Gram matrix.

One program moves a tile of P, all anchors of it in registers: it reads the gradients once, forms
the direction of each anchor, writes anchors and states, and multiplies the new anchors with one
another. A second kernel adds those products up in a fixed order and counts the step.
"""

import math
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._launch import ARCHS, Config, arch, on_device
from ._table import COLUMNS, NARROW, full_unit, row_of_tile, table
from .combine import launch, seen

# (arch, BLOCK_S) -> Config, for up to BLOCK_S anchors. Origin: registers of the compiled code and
# 16-byte accesses; none of it is timed on a GPU yet.
_SHIPPED = [(1, 512, 4), (2, 512, 4), (4, 128, 4), (8, 64, 4), (16, 32, 4)]
SHIPPED = {
    (a, s): Config({"BLOCK_S": s, "BLOCK_P": p}, num_warps=warps, num_stages=1)
    for a in ARCHS
    for s, p, warps in _SHIPPED
}
MOST_TILES = 8192  # of a network, beside one for each part: their products are added in one program
SUM_TILE = 8192  # products that one program of anchor_step_sum_kernel has in flight at most,
SUM_PER_WARP = 512  # and so many of them a warp: with 1024, the addresses and masks spilled

_NEVER_CONSTANT = [
    "M", "T", "S", "P", "R", "steps", "coeffs_stride_m", "coeffs_stride_l", "coeffs_stride_s",
    "penalty_stride_l",
]  # fmt: skip


@triton.jit
def _row(rows, s, q):
    """Row q of rows [BLOCK_S, BLOCK_P]."""
    return tl.sum(tl.where((s == q)[:, None], rows, 0.0), 0)


@triton.jit
def _penalised(direction, a, s, S, penalty_ptr, pair_ptr, beta):
    """direction + Q a, with Q [S, S] float64, or that of beta * cos^2 of a pair, penalty_ptr then
    being the Gram matrix."""
    if pair_ptr is None:
        for q in range(S):
            column = tl.load(penalty_ptr + s * S + q, mask=s < S, other=0.0).to(tl.float32)
            direction += column[:, None] * _row(a, s, q)[None, :]
    else:
        pair = tl.load(pair_ptr)
        i = (pair // (S - 1)).to(tl.int32)
        j = (pair % (S - 1)).to(tl.int32)
        j += (j >= i).to(tl.int32)
        # ratios of float64 sums: float32 is enough for them, and for what they add to
        product = tl.load(penalty_ptr + i * S + j).to(tl.float32)
        on_i = product / tl.load(penalty_ptr + i * S + i).to(tl.float32)
        on_j = product / tl.load(penalty_ptr + j * S + j).to(tl.float32)
        across = 2 * beta * on_i / tl.load(penalty_ptr + j * S + j).to(tl.float32)
        on_i *= -across
        on_j *= -across
        a_i = _row(a, s, i)
        a_j = _row(a, s, j)
        direction += tl.where(s == i, on_i, tl.where(s == j, across, 0.0))[:, None] * a_i[None, :]
        direction += tl.where(s == j, on_j, tl.where(s == i, across, 0.0))[:, None] * a_j[None, :]
    return direction


@triton.jit
def _bias(step, log_high, log_low):
    """1 - beta^step, worked out in float64 from the logarithm of beta as a sum of two float32."""
    step = step.to(tl.float64)
    return (1.0 - tl.exp(step * log_high + step * log_low)).to(tl.float32)


@triton.jit(do_not_specialize=_NEVER_CONSTANT)
def anchor_step_kernel(
    grad_ptr, coeffs_ptr, anchors_ptr, fixed_ptr, first_ptr, second_ptr, step_ptr, lr_ptr,
    table_ptr, selected_ptr, penalty_ptr, pair_ptr, partials_ptr,
    M, T, S, P, R, steps,
    lr, beta1, one_beta1, beta2, one_beta2, log1_high, log1_low, log2_high, log2_low, eps, decay,
    curve_l2, beta,
    grad_stride_m, coeffs_stride_m, coeffs_stride_l, coeffs_stride_s, anchors_stride_k,
    fixed_stride_k, penalty_stride_l,
    KIND: tl.constexpr, CURVE: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
    FULL: tl.constexpr, TILE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row, place = row_of_tile(table_ptr, tile, R, steps)
    size = seen(tl.load(row), UNIT)
    part = tl.load(row + 7)
    length = tl.where(tl.load(row + 8) == FULL, TILE, TILE // NARROW)
    begin = place * length
    end = tl.minimum(begin + length, size)
    start = seen(tl.load(row + 1), UNIT)
    s = tl.arange(0, BLOCK_S)
    far = s.to(tl.int64)
    column = tl.arange(0, BLOCK_S)[None, :]
    trained = s < T
    coeffs_ptr += part * coeffs_stride_l + far * coeffs_stride_s
    chosen = part >= 0
    if selected_ptr is not None:
        chosen = tl.load(selected_ptr + part) != 0
    if penalty_ptr is not None:
        penalty_ptr += part * penalty_stride_l
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
    if KIND >= 1:
        step = tl.load(step_ptr)
    if KIND >= 3:
        scale = lr / _bias(step + 1.0, log1_high, log1_low)
        root = tl.sqrt(_bias(step + 1.0, log2_high, log2_low))
    products = tl.zeros((BLOCK_S, BLOCK_S), tl.float64)
    for block in range(begin, end, BLOCK_P):
        in_p = block + tl.arange(0, BLOCK_P) < end
        p = seen(start + block, UNIT) + tl.arange(0, BLOCK_P)
        inside = trained[:, None] & in_p[None, :]
        anchor_at = anchors_ptr + (far * seen(anchors_stride_k, UNIT))[:, None] + p[None, :]
        state_at = (far * seen(P, UNIT))[:, None] + p[None, :]
        a = tl.load(anchor_at, mask=inside, other=0.0).to(tl.float32)
        if fixed_ptr is not None:
            fixed_at = fixed_ptr + ((far - T) * seen(fixed_stride_k, UNIT))[:, None] + p[None, :]
            others = ((s >= T) & (s < S))[:, None] & in_p[None, :]
            a += tl.load(fixed_at, mask=others, other=0.0).to(tl.float32)
        d = tl.zeros((BLOCK_S, BLOCK_P), tl.float32)
        for m in range(M):
            c = tl.load(coeffs_ptr + m * coeffs_stride_m, mask=s < S, other=0.0).to(tl.float32)
            at = grad_ptr + (tile * 0 + m) * seen(grad_stride_m, UNIT) + p  # in 64 bits
            g = tl.load(at, mask=in_p, other=0.0).to(tl.float32)
            if CURVE:
                g += curve_l2 * tl.sum(c[:, None] * a, 0)
            d += c[:, None] * g[None, :]
        if penalty_ptr is not None:
            if chosen | (penalty_stride_l != 0):
                d = _penalised(d, a, s, S, penalty_ptr, pair_ptr, beta)
        if KIND != 4:
            d += decay * a
        if KIND == 0:
            moved = a - lr * d
        elif KIND <= 2:
            first = tl.load(first_ptr + state_at, mask=inside, other=0.0).to(tl.float32)
            fresh = tl.where(step == 0.0, 1.0, one_beta2)
            first = beta1 * first + fresh * d
            if KIND == 2:
                moved = a - lr * (d + beta1 * first)
            else:
                moved = a - lr * first
        else:
            first = tl.load(first_ptr + state_at, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(second_ptr + state_at, mask=inside, other=0.0).to(tl.float32)
            first += one_beta1 * (d - first)
            second = beta2 * second + one_beta2 * d * d
            kept = a
            if KIND == 4:
                kept = a * (1.0 - lr * decay)
            moved = kept - scale * (first / (tl.sqrt_rn(second) / root + eps))
            tl.store(second_ptr + state_at, second.to(second_ptr.dtype.element_ty), mask=inside)
        if KIND >= 1:
            tl.store(first_ptr + state_at, first.to(first_ptr.dtype.element_ty), mask=inside)
        stored = moved.to(anchors_ptr.dtype.element_ty)
        tl.store(anchor_at, stored, mask=inside)
        if partials_ptr is not None:
            if chosen | PARTS:
                new = tl.where(inside, stored.to(tl.float32), a)
                for q in range(S):
                    with_q = tl.sum(new.to(tl.float64) * _row(new, s, q).to(tl.float64)[None, :], 1)
                    products += tl.where(column == q, with_q[:, None], 0.0)
    if partials_ptr is not None:
        at = partials_ptr + tile * S * S + s[:, None] * S + column
        tl.store(at, products, mask=(s < S)[:, None] & (column < S))


@triton.jit(do_not_specialize=["R", "tiles", "n"])
def anchor_step_sum_kernel(
    partials_ptr, table_ptr, step_ptr, gram_ptr, R, tiles, n,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program adds up n products of all tiles, or of those of one part, always in the same
    # order; the first one counts the step.
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        tl.store(step_ptr, tl.load(step_ptr) + 1.0)
    if gram_ptr is not None:
        first = program * 0
        last = first + tiles
        if PARTS:
            entry = table_ptr + R + 1 + R * COLUMNS + 3 * program
            gram_ptr += tl.load(entry) * n
            first = tl.load(entry + 1)
            last = tl.load(entry + 2)
        offs_n = tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float64)
        for begin in range(first, last, BLOCK_T):
            tile = begin + tl.arange(0, BLOCK_T)
            acc += tl.load(
                partials_ptr + tile[:, None] * n + offs_n[None, :],
                mask=(tile < last)[:, None] & (offs_n < n)[None, :], other=0.0,
            )
        tl.store(gram_ptr + offs_n, tl.sum(acc, 0), mask=offs_n < n)


def _rows(sizes: Sequence[int], strides: int) -> tuple[tuple[int, ...], ...]:
    rows, start = [], 0
    for part, size in enumerate(sizes):
        if size:
            rows.append((size, start, strides, 0, 0, -1, 0, part))
        start += size
    return tuple(rows)


def _split(x: float) -> tuple[float, float]:
    """x as the sum of two numbers that float32 can hold."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def anchor_step(
    grad, coeffs, anchors, fixed, first, second, step, lr, kind, hyper, sizes, selected, penalty,
    pair, gram, out, config: Config | None = None,
) -> None:  # fmt: skip
    """Writes anchors, states, step and, for gram "total" or "parts", out; see ops/anchor_step.py.

    Rows of P elements with unit stride, P >= 1 and at most 16 anchors in all; `selected` and
    `penalty` contiguous.
    """
    (T, P), S, M = anchors.shape, coeffs.shape[-1], len(grad)
    lr_value, one, two, eps, decay, curve_l2, beta = hyper
    adam = kind >= 3
    logs = [_split(math.log(x) if adam and x else -1e30) for x in (one, two)]
    strides = P | anchors.stride(0) | (grad.stride(0) if M > 1 else 0)
    strides |= fixed.stride(0) if fixed is not None else 0
    with on_device(anchors):
        config = config or SHIPPED[arch(anchors), triton.next_power_of_2(S)]
        block = config.tiles["BLOCK_P"]
        tile = block * triton.next_power_of_2(triton.cdiv(P, block * MOST_TILES))
        where = table(_rows(sizes, strides), tile, anchors)
        partials = None
        if gram:
            partials = torch.empty((where.tiles, S, S), dtype=torch.float64, device=anchors.device)
        config = config._replace(
            tiles={
                "KIND": kind, "CURVE": curve_l2 != 0, "PARTS": gram == "parts", "TILE": tile,
                "UNIT": where.unit, "FULL": full_unit(anchors), **config.tiles,
            }
        )  # fmt: skip
        stride_m, *stride_l, stride_s = coeffs.stride()
        launch(
            anchor_step_kernel, where.tiles, config,
            grad, coeffs, anchors, fixed, first, second, step, lr, where.data, selected, penalty,
            pair, partials, M, T, S, P, where.rows, where.steps,
            lr_value, one, 1 - one, two, 1 - two, *logs[0], *logs[1], eps, decay, curve_l2, beta,
            grad.stride(0), stride_m, *(stride_l or [0]), stride_s, anchors.stride(0),
            0 if fixed is None else fixed.stride(0),
            S * S if penalty is not None and penalty.ndim == 3 else 0,
        )  # fmt: skip
        parts = where.parts if gram == "parts" else 1
        if gram == "parts" and where.parts < len(sizes):
            out.zero_()  # parts without elements have no tiles
        block_n = triton.next_power_of_2(S * S)
        most = triton.next_power_of_2(where.most if gram == "parts" else where.tiles)
        block_t = max(1, min(SUM_TILE // block_n, most))
        summing = Config(
            {"PARTS": gram == "parts", "BLOCK_T": block_t, "BLOCK_N": block_n},
            num_warps=max(4, block_t * block_n // SUM_PER_WARP),
            num_stages=1,
        )
        launch(
            anchor_step_sum_kernel, parts, summing, partials, where.data, step,
            out if gram else None, where.rows, where.tiles, S * S,
        )  # fmt: skip
