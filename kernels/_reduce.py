"""Fixed-order sums of float32 parts: how split kernels stay deterministic without atomics."""

import torch
import triton
import triton.language as tl

from ._launch import cdiv, on_device

BLOCK = 4096  # elements one program reads at a time
JOBS = 5  # sums per launch

Jobs = list[tuple[torch.Tensor, torch.Tensor]]  # (parts, their sum), for `sum_parts`


@triton.jit
def _sum_block(part_ptr, out_ptr, block, count, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # out[i] = sum_k part[k, i] for one block of BLOCK // ROWS columns, ROWS rows at a time
    offs_k = tl.arange(0, ROWS)
    offs_n = block.to(tl.int64) * (BLOCK // ROWS) + tl.arange(0, BLOCK // ROWS)
    in_n = offs_n < n
    acc = tl.zeros((ROWS, BLOCK // ROWS), tl.float32)
    for k in range(0, count, ROWS):
        p = part_ptr + (k + offs_k).to(tl.int64)[:, None] * n + offs_n[None, :]
        acc += tl.load(p, mask=(k + offs_k < count)[:, None] & in_n[None, :], other=0.0)
    tl.store(out_ptr + offs_n, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=in_n)


@triton.jit
def sum_parts_kernel(
    part0, out0, count0, n0, part1, out1, count1, n1, part2, out2, count2, n2,
    part3, out3, count3, n3, part4, out4, count4, n4,
    ROWS0: tl.constexpr, ROWS1: tl.constexpr, ROWS2: tl.constexpr, ROWS3: tl.constexpr,
    ROWS4: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program computes one block of one of up to five sums; blocks are numbered in sequence.
    block = tl.program_id(0)
    if part0 is not None:
        if block < tl.cdiv(n0, BLOCK // ROWS0):
            _sum_block(part0, out0, block, count0, n0, ROWS0, BLOCK)
        block -= tl.cdiv(n0, BLOCK // ROWS0)
    if part1 is not None:
        if (block >= 0) & (block < tl.cdiv(n1, BLOCK // ROWS1)):
            _sum_block(part1, out1, block, count1, n1, ROWS1, BLOCK)
        block -= tl.cdiv(n1, BLOCK // ROWS1)
    if part2 is not None:
        if (block >= 0) & (block < tl.cdiv(n2, BLOCK // ROWS2)):
            _sum_block(part2, out2, block, count2, n2, ROWS2, BLOCK)
        block -= tl.cdiv(n2, BLOCK // ROWS2)
    if part3 is not None:
        if (block >= 0) & (block < tl.cdiv(n3, BLOCK // ROWS3)):
            _sum_block(part3, out3, block, count3, n3, ROWS3, BLOCK)
        block -= tl.cdiv(n3, BLOCK // ROWS3)
    if part4 is not None:
        if (block >= 0) & (block < tl.cdiv(n4, BLOCK // ROWS4)):
            _sum_block(part4, out4, block, count4, n4, ROWS4, BLOCK)


def parts(jobs: Jobs, result: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """Float32 [*shape] for a kernel to fill with parts of `result`; adds their sum to `jobs`."""
    if result is None:
        return None
    part = result.new_empty(shape, dtype=torch.float32)
    jobs.append((part.view(-1, *result.shape), result))
    return part


def sum_parts(jobs: Jobs) -> None:
    """out = part.sum(0) for up to five pairs (part [count, *shape], out [*shape]), in one launch.

    Both are contiguous, `part` float32, `out` of any floating dtype. The order in which a sum is
    formed depends on `count` alone.
    """
    arguments, rows, blocks = [], {}, 0
    for j in range(JOBS):
        part, out = jobs[j] if j < len(jobs) else (None, None)
        count, n = (part.shape[0], out.numel()) if part is not None else (0, 0)
        arguments += [part, out, count, n]
        rows[f"ROWS{j}"] = min(64, 1 << (count - 1).bit_length() if count else 1)
        blocks += cdiv(n, BLOCK // rows[f"ROWS{j}"])
    if blocks:
        with on_device(jobs[0][1]):
            sum_parts_kernel[(blocks,)](*arguments, **rows, BLOCK=BLOCK, num_warps=4)
