"""subspace_linear, forward and dx: products with a weight for each member, all in one launch.

The weights [M, O, I] are given, or (K > 0) each program mixes its tiles from those of K anchors
[K, O, I]: then the members' weights are nowhere in memory. dx is the same product with the weight
turned: O and I change places.
"""

import torch
import triton
import triton.language as tl

from . import subspace_linear_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, fastest, grid, on_device
from .batch_ensemble_linear import (
    DTYPES,
    describable,
    descriptor,
    load_tile,
    precision,
    row_strides,
    spans_long,
    swizzled,
)
from .batch_ensemble_linear_tiles import kind_of, processors

OP = "subspace_linear"


@triton.jit
def _load_weights(
    weight, m, row, col, rows, cols, c0, c1, c2, c3, stride_m, stride_r, stride_c,
    K: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """A tile of the weights of member m, or of c0 A_0 + ... over K anchors, rounded once."""
    if K == 0:
        w = load_tile(weight, m, row, col, rows, cols, stride_m, stride_r, stride_c,
                      BLOCK_R, BLOCK_C, EVEN_C, TMA, LONG)  # fmt: skip
    else:
        mix = c0 * load_tile(weight, 0, row, col, rows, cols, stride_m, stride_r, stride_c,
                             BLOCK_R, BLOCK_C, EVEN_C, TMA, LONG).to(tl.float32)  # fmt: skip
        if K > 1:
            mix += c1 * load_tile(weight, 1, row, col, rows, cols, stride_m, stride_r, stride_c,
                                  BLOCK_R, BLOCK_C, EVEN_C, TMA, LONG).to(tl.float32)  # fmt: skip
        if K > 2:
            mix += c2 * load_tile(weight, 2, row, col, rows, cols, stride_m, stride_r, stride_c,
                                  BLOCK_R, BLOCK_C, EVEN_C, TMA, LONG).to(tl.float32)  # fmt: skip
        if K > 3:
            mix += c3 * load_tile(weight, 3, row, col, rows, cols, stride_m, stride_r, stride_c,
                                  BLOCK_R, BLOCK_C, EVEN_C, TMA, LONG).to(tl.float32)  # fmt: skip
        w = mix.to(DTYPE)
    return w


@triton.jit(do_not_specialize=["M", "B"])
def subspace_linear_kernel(
    x, weight, coeffs_ptr, bias_ptr, y_ptr,
    M, B, I, O,
    x_stride_m, x_stride_b, x_stride_i, weight_stride_m, weight_stride_o, weight_stride_i,
    y_stride_m, y_stride_b,
    K: tl.constexpr, TURNED: tl.constexpr, SHARED_X: tl.constexpr, EVEN_I: tl.constexpr,
    EVEN_O: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, LONG: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # One program computes [BLOCK_B, BLOCK_O] of y for one member. TURNED: weight is [., I, O] in
    # memory. Programs in flight share a member's weight or, mixed, a column of the anchors.
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_o = tl.cdiv(O, BLOCK_O)
    if K == 0:
        m = tl.program_id(0) // (tiles_b * tiles_o)
        row, col = swizzled(tl.program_id(0) % (tiles_b * tiles_o), tiles_b, tiles_o, GROUP)
    else:
        row = tl.program_id(0) % tiles_b
        m = tl.program_id(0) // tiles_b % M
        col = tl.program_id(0) // tiles_b // M
    c0 = 0.0
    c1 = 0.0
    c2 = 0.0
    c3 = 0.0
    if K > 0:
        c0 = tl.load(coeffs_ptr + m * K).to(tl.float32)
    if K > 1:
        c1 = tl.load(coeffs_ptr + m * K + 1).to(tl.float32)
    if K > 2:
        c2 = tl.load(coeffs_ptr + m * K + 2).to(tl.float32)
    if K > 3:
        c3 = tl.load(coeffs_ptr + m * K + 3).to(tl.float32)

    acc = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for i in tl.range(0, I, BLOCK_I):
        a = load_tile(x, 0 if SHARED_X else m, row * BLOCK_B, i, B, I,
                      x_stride_m, x_stride_b, x_stride_i,
                      BLOCK_B, BLOCK_I, EVEN_I, TMA, LONG)  # fmt: skip
        if TURNED:
            w = _load_weights(weight, m, i, col * BLOCK_O, I, O, c0, c1, c2, c3,
                              weight_stride_m, weight_stride_i, weight_stride_o,
                              K, DTYPE, BLOCK_I, BLOCK_O, EVEN_O, TMA, LONG)  # fmt: skip
        else:
            w = _load_weights(weight, m, col * BLOCK_O, i, O, I, c0, c1, c2, c3,
                              weight_stride_m, weight_stride_o, weight_stride_i,
                              K, DTYPE, BLOCK_O, BLOCK_I, EVEN_I, TMA, LONG).T  # fmt: skip
        acc = tl.dot(a, w, acc, input_precision=PRECISION)

    offs_o = col * BLOCK_O + tl.arange(0, BLOCK_O)
    in_o = offs_o < O
    if bias_ptr is not None:
        if K == 0:
            shift = tl.load(bias_ptr + m * O + offs_o, mask=in_o, other=0.0)
        else:
            shift = c0 * tl.load(bias_ptr + offs_o, mask=in_o, other=0.0).to(tl.float32)
            if K > 1:
                shift += c1 * tl.load(bias_ptr + O + offs_o, mask=in_o, other=0.0).to(tl.float32)
            if K > 2:
                p = bias_ptr + 2 * O + offs_o
                shift += c2 * tl.load(p, mask=in_o, other=0.0).to(tl.float32)
            if K > 3:
                p = bias_ptr + 3 * O + offs_o
                shift += c3 * tl.load(p, mask=in_o, other=0.0).to(tl.float32)
        acc += shift.to(DTYPE).to(tl.float32)[None, :]
    b = row * BLOCK_B + tl.arange(0, BLOCK_B)
    y_offs = m.to(tl.int64) * y_stride_m + b.to(tl.int64) * y_stride_b
    p_y = y_ptr + y_offs[:, None] + offs_o[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=(b < B)[:, None] & in_o[None, :])


def subspace_linear_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    coeffs: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tf32: bool,
    turned: bool = False,
    *,
    config: Config | None = None,
    long: bool | None = None,
) -> None:
    """x [M, B, I] or, shared, [B, I]; weight [M, O, I], or `turned` [M, I, O]; bias [M, O].

    With coeffs [M, K], K of at most `tiles.MOST_ANCHORS`: weight and bias are of K anchors, in the
    dtype of x or float32, and are mixed. Fills y [M, B, O], any strides but unit along O. x and
    weight may have any strides. Nothing is empty. `config` and `long` (64-bit offsets) are chosen
    here unless given.
    """
    (M, B, O), I = y.shape, x.shape[-1]
    K = 0 if coeffs is None else coeffs.shape[1]
    coeffs, bias = (None if t is None else t.contiguous() for t in (coeffs, bias))
    stage, kind = "mixed" if K else "product", kind_of(x.dtype, tf32)
    long = spans_long(x, weight) if long is None else long
    stride_m, *others = weight.stride()
    strides = (*row_strides(x), stride_m, *(others[::-1] if turned else others), *y.stride()[:2])
    sizes = tiles.Sizes(M, B, I, O)

    def launch(c: Config) -> None:
        block_b, block_o, block_i = (c.tiles[k] for k in ("BLOCK_B", "BLOCK_O", "BLOCK_I"))
        box = (block_i, block_o) if turned else (block_o, block_i)
        subspace_linear_kernel[grid(OP, tiles.product_programs(c, M, B, O))](
            descriptor(x, block_b, block_i) if c.tma else x,
            descriptor(weight, *box) if c.tma else weight,
            coeffs, bias, y, M, B, I, O, *strides,
            K=K, TURNED=turned, SHARED_X=x.ndim == 2, EVEN_I=I % block_i == 0,
            EVEN_O=O % block_o == 0, PRECISION=precision(kind), TMA=c.tma, LONG=long,
            DTYPE=DTYPES[x.dtype], **c.options(),
        )  # fmt: skip

    with on_device(x):
        if config is None:
            tma = arch(x) >= 90 and describable(x) and describable(weight)
            where = (stage, kind, tma, arch(x), processors(x))
            config = tiles.product_config(*where, sizes)
            if AUTOTUNE:
                key = (OP, x.device, x.dtype, weight.dtype, turned, K, *where, *sizes)
                candidates = [c for _, c in tiles.buckets(arch(x), stage, kind, tma)]
                config = fastest(key, config, candidates, launch)
        launch(config)
