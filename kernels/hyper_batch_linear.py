"""hyper_batch_linear, forward: y = s * (weight @ (r * x)) + e * v * (delta @ (u * x)) + biases.

All members in one launch; a tile of x is loaded once for both weights.
"""

import torch
import triton
import triton.language as tl

from . import hyper_batch_linear_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, cdiv, fastest, grid, on_device
from ._reduce import parts, sum_parts
from .batch_ensemble_linear import (
    DTYPES,
    describable,
    descriptor,
    load_tile,
    offset,
    precision,
    row_strides,
    spans_long,
    swizzled,
)

OP = "hyper_batch_linear"


@triton.jit(do_not_specialize=["M", "B", "steps_per_split"])
def hyper_batch_linear_fwd_kernel(
    x, weight, delta, e_ptr, r_ptr, s_ptr, u_ptr, v_ptr, bias_ptr, delta_bias_ptr, e_bias_ptr,
    y_ptr, z_ptr,
    M, B, I, O, steps_per_split,
    x_stride_m, x_stride_b, x_stride_i, weight_stride_o, weight_stride_i,
    delta_stride_o, delta_stride_i, e_stride_m, e_stride_b, e_stride_o,
    e_bias_stride_m, e_bias_stride_b, e_bias_stride_o, bias_stride_m, delta_bias_stride_m,
    y_stride_m, y_stride_b,
    SHARED_X: tl.constexpr, TIED: tl.constexpr, EVEN_I: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, LONG: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    # One program computes [BLOCK_B, BLOCK_O] of y, and of z = delta @ (u * x) where it is kept. Its
    # rows are examples of one member or, FOLDED (for few examples per member), rows m * B + b of
    # the sequence of all. Where the sum over inputs is split, y and z are parts [splits, ...] of
    # sums. TIED: u is r. Factors may be float32: they are rounded to DTYPE.
    offs_i = tl.arange(0, BLOCK_I)
    splits = tl.cdiv(tl.cdiv(I, BLOCK_I), steps_per_split)
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    i_first = split * steps_per_split * BLOCK_I
    if FOLDED:
        row, col = swizzled(tile, tl.cdiv(M * B, BLOCK_B), tl.cdiv(O, BLOCK_O), GROUP)
        folded = row * BLOCK_B + tl.arange(0, BLOCK_B)
        in_rows = folded < M * B
        m = tl.where(in_rows, folded // B, 0)
        b = tl.where(in_rows, folded % B, 0)
        p_x = x + (offset(m, x_stride_m, LONG) + offset(b, x_stride_b, LONG))[:, None]
    else:
        tiles_b = tl.cdiv(B, BLOCK_B)
        row, col = swizzled(tile, M * tiles_b, tl.cdiv(O, BLOCK_O), GROUP)
        m = row // tiles_b
        b = row % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
        in_rows = b < B
    offs_o = col * BLOCK_O + tl.arange(0, BLOCK_O)
    in_o = offs_o < O

    acc = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    z = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for i in tl.range(i_first, min(i_first + steps_per_split * BLOCK_I, I), BLOCK_I):
        w = load_tile(weight, 0, col * BLOCK_O, i, O, I, 0, weight_stride_o, weight_stride_i,
                      BLOCK_O, BLOCK_I, EVEN_I, TMA, LONG)  # fmt: skip
        d = load_tile(delta, 0, col * BLOCK_O, i, O, I, 0, delta_stride_o, delta_stride_i,
                      BLOCK_O, BLOCK_I, EVEN_I, TMA, LONG)  # fmt: skip
        in_i = EVEN_I | (i + offs_i < I)
        if FOLDED:
            in_x = in_rows[:, None] & in_i[None, :]
            p = p_x + offset(i + offs_i, x_stride_i, LONG)[None, :]
            a = tl.load(p, mask=in_x, other=0.0)
            r_offs = offset(m, I, LONG)[:, None] + (i + offs_i)[None, :]
            in_r = in_x
        else:
            a = load_tile(x, 0 if SHARED_X else m, row % tiles_b * BLOCK_B, i, B, I,
                          x_stride_m, x_stride_b, x_stride_i,
                          BLOCK_B, BLOCK_I, EVEN_I, TMA, LONG)  # fmt: skip
            r_offs = (offset(m, I, LONG) + i + offs_i)[None, :]
            in_r = in_i[None, :]
        # x * r is rounded to the input dtype, as in plain PyTorch
        a1 = a
        if r_ptr is not None:
            a1 = a * tl.load(r_ptr + r_offs, mask=in_r, other=0.0).to(DTYPE)
        if TIED:
            a2 = a1
        else:
            a2 = a * tl.load(u_ptr + r_offs, mask=in_r, other=0.0).to(DTYPE)
        acc = tl.dot(a1, w.T, acc, input_precision=PRECISION)
        z = tl.dot(a2, d.T, z, input_precision=PRECISION)

    in_y = in_rows[:, None] & in_o[None, :]
    if FOLDED:
        m_row = m[:, None]
        in_s = in_y
    else:
        m_row = m
        in_s = in_o[None, :]
    s_offs = offset(m_row, O, LONG) + offs_o[None, :]
    y_offs = m.to(tl.int64) * y_stride_m + b.to(tl.int64) * y_stride_b
    y_offs += split.to(tl.int64) * O * M * B
    if z_ptr is not None:
        p_z = z_ptr + y_offs[:, None] + offs_o[None, :]
        tl.store(p_z, z.to(z_ptr.dtype.element_ty), mask=in_y)
    if s_ptr is not None:
        acc *= tl.load(s_ptr + s_offs, mask=in_s, other=0.0).to(DTYPE).to(tl.float32)
    if v_ptr is not None:
        z *= tl.load(v_ptr + s_offs, mask=in_s, other=0.0).to(DTYPE).to(tl.float32)
    e_offs = (m.to(tl.int64) * e_stride_m + b.to(tl.int64) * e_stride_b)[:, None]
    e_offs += (offs_o.to(tl.int64) * e_stride_o)[None, :]
    acc += z * tl.load(e_ptr + e_offs, mask=in_y, other=0.0).to(tl.float32)
    in_s = in_s & (split == 0)  # biases belong to one part
    if bias_ptr is not None:
        p_bias = bias_ptr + offset(m_row, bias_stride_m, LONG) + offs_o[None, :]
        acc += tl.load(p_bias, mask=in_s, other=0.0).to(DTYPE).to(tl.float32)
    if delta_bias_ptr is not None:
        p_bias = delta_bias_ptr + offset(m_row, delta_bias_stride_m, LONG) + offs_o[None, :]
        e_offs = (m.to(tl.int64) * e_bias_stride_m + b.to(tl.int64) * e_bias_stride_b)[:, None]
        e_offs += (offs_o.to(tl.int64) * e_bias_stride_o)[None, :]
        e_bias = tl.load(e_bias_ptr + e_offs, mask=in_y, other=0.0).to(tl.float32)
        acc += tl.load(p_bias, mask=in_s, other=0.0).to(DTYPE).to(tl.float32) * e_bias
    p_y = y_ptr + y_offs[:, None] + offs_o[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=in_y)


def hyper_batch_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    delta: torch.Tensor,
    e: torch.Tensor,
    r: torch.Tensor | None,
    s: torch.Tensor | None,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    bias: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    e_bias: torch.Tensor | None,
    y: torch.Tensor,
    z: torch.Tensor | None,
    tf32: bool,
    *,
    config: Config | None = None,
    long: bool | None = None,
    per_split: int | None = None,
) -> None:
    """x [M, B, I], or [B, I] for all; weight, delta [O, I]; e [M, B, O]; r, u [M, I]; s, v [M, O].

    u and v are None where they are r and s. bias, delta_bias [M, O] or [O]; e_bias as e. All in one
    dtype, except that factors and biases may be float32 where it has 16 bits. Fills y [M, B, O]
    and, where given, z: contiguous, or transposed from [B, M, O]. Nothing is empty; x, e and the
    weights may have any strides. `config`, `long` (64-bit offsets) and how many inputs one split
    sums are chosen here unless given.
    """
    (M, B, O), I = y.shape, x.shape[-1]
    tied = u is None
    v = s if v is None else v
    r, s, u, v, bias, delta_bias = (
        None if t is None else t.contiguous() for t in (r, s, u, v, bias, delta_bias)
    )
    long = spans_long(x, weight, delta, r, s, u, v) if long is None else long
    kind = tiles.kind_of(x.dtype, tf32)
    strides = (*row_strides(x), *weight.stride(), *delta.stride(), *e.stride())
    strides += e.stride() if e_bias is None else e_bias.stride()
    strides += tuple(O if b is not None and b.ndim == 2 else 0 for b in (bias, delta_bias))

    def launch(c: Config) -> None:
        block_b, block_o, block_i = (c.tiles[k] for k in ("BLOCK_B", "BLOCK_O", "BLOCK_I"))
        inputs = per_split or tiles.inputs_per_split(c, tiles.processors(x), M, B, I, O)
        splits, outputs, jobs = cdiv(I, inputs), [y, z], []
        if splits > 1:  # parts lie as y and z do: contiguous, members or examples first
            flat = [t if t is None else t.as_strided((M * B * O,), (1,)) for t in outputs]
            outputs = [parts(jobs, t, splits, M * B * O) for t in flat]
        hyper_batch_linear_fwd_kernel[grid(OP, splits * tiles.forward_programs(c, M, B, O))](
            descriptor(x, block_b, block_i) if c.tma else x,
            descriptor(weight, block_o, block_i) if c.tma else weight,
            descriptor(delta, block_o, block_i) if c.tma else delta,
            e, r, s, u, v, bias, delta_bias, e_bias, *outputs,
            M, B, I, O, inputs // block_i, *strides, *y.stride()[:2],
            SHARED_X=x.ndim == 2, TIED=tied, EVEN_I=I % block_i == 0, PRECISION=precision(kind),
            TMA=c.tma, LONG=long, DTYPE=DTYPES[x.dtype], **c.options(),
        )  # fmt: skip
        sum_parts(jobs)

    with on_device(x):
        if config is None:
            tma = arch(x) >= 90 and all(describable(t) for t in (x, weight, delta))
            where = (kind, tma, arch(x), tiles.processors(x))
            config = tiles.forward_config(*where, M, B, I, O)
            if AUTOTUNE:
                key = ("hyper_batch_linear_fwd", x.device, x.dtype, *where, M, B, I, O)
                others = [c for _, c in tiles.buckets(arch(x), "fwd", kind, tma)]
                config = fastest(key, config, others, launch)
        launch(config)
