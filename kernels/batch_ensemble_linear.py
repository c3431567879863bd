"""batch_ensemble_linear, forward: y = s * (weight @ (r * x)) + bias, or its positive part.

All members in one launch.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import batch_ensemble_linear_tiles as tiles
from ._launch import AUTOTUNE, Config, arch, fastest, grid, on_device

OP = "batch_ensemble_linear"
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def swizzled(pid, tall, wide, GROUP: tl.constexpr):
    """(row, column) of tile `pid`, GROUP rows at a time: programs in flight share tiles in L2."""
    width = GROUP * wide
    first = pid // width * GROUP
    height = min(tall - first, GROUP)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit
def offset(index, stride, LONG: tl.constexpr):
    """index * stride, in int64 where a tensor spans 2**31 elements or more."""
    if LONG:
        found = tl.cast(index, tl.int64) * stride
    else:
        found = index * stride
    return found


@triton.jit
def load_tile(
    source, m, row, col, rows, cols, stride_m, stride_r, stride_c,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr, TMA: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_C] of source[m, row:rows, col:cols], zero outside.

    `source` is a pointer, or (TMA) a descriptor [members, rows, cols]; EVEN_C where BLOCK_C divides
    cols.
    """
    if TMA:
        tile = source.load([m, row, col]).reshape(BLOCK_R, BLOCK_C)
    else:
        offs_r = row + tl.arange(0, BLOCK_R)
        offs_c = col + tl.arange(0, BLOCK_C)
        p = source + offset(m, stride_m, LONG)
        p += offset(offs_r, stride_r, LONG)[:, None] + offset(offs_c, stride_c, LONG)[None, :]
        inside = (offs_r < rows)[:, None]
        if not EVEN_C:
            inside = inside & (offs_c < cols)[None, :]
        tile = tl.load(p, mask=inside, other=0.0)
    return tile


@triton.jit(do_not_specialize=["M", "B"])
def batch_ensemble_linear_fwd_kernel(
    x, weight, r_ptr, s_ptr, bias_ptr, y_ptr,
    M, B, I, O,
    x_stride_m, x_stride_b, x_stride_i, weight_stride_o, weight_stride_i,
    bias_stride_m, y_stride_m, y_stride_b,
    SHARED_X: tl.constexpr, EVEN_I: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    LONG: tl.constexpr, DTYPE: tl.constexpr, RELU: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    # One program computes [BLOCK_B, BLOCK_O] of y. Its rows are examples of one member or, FOLDED
    # (for few examples per member), rows m * B + b of the sequence of all. Factors may be float32:
    # they are rounded to DTYPE, that of x.
    offs_i = tl.arange(0, BLOCK_I)
    if FOLDED:
        row, col = swizzled(tl.program_id(0), tl.cdiv(M * B, BLOCK_B), tl.cdiv(O, BLOCK_O), GROUP)
        folded = row * BLOCK_B + tl.arange(0, BLOCK_B)
        in_rows = folded < M * B
        m = tl.where(in_rows, folded // B, 0)
        b = tl.where(in_rows, folded % B, 0)
        p_x = x + (offset(m, x_stride_m, LONG) + offset(b, x_stride_b, LONG))[:, None]
    else:
        tiles_b = tl.cdiv(B, BLOCK_B)
        row, col = swizzled(tl.program_id(0), M * tiles_b, tl.cdiv(O, BLOCK_O), GROUP)
        m = row // tiles_b
        b = row % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
        in_rows = b < B
    offs_o = col * BLOCK_O + tl.arange(0, BLOCK_O)
    in_o = offs_o < O

    acc = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for i in tl.range(0, I, BLOCK_I):
        w = load_tile(weight, 0, col * BLOCK_O, i, O, I, 0, weight_stride_o, weight_stride_i,
                      BLOCK_O, BLOCK_I, EVEN_I, TMA, LONG)  # fmt: skip
        in_i = EVEN_I | (i + offs_i < I)
        if FOLDED:
            in_x = in_rows[:, None] & in_i[None, :]
            p = p_x + offset(i + offs_i, x_stride_i, LONG)[None, :]
            a = tl.load(p, mask=in_x, other=0.0)
            if r_ptr is not None:
                p_r = r_ptr + offset(m, I, LONG)[:, None] + (i + offs_i)[None, :]
                a = a * tl.load(p_r, mask=in_x, other=0.0).to(DTYPE)
        else:
            a = load_tile(x, 0 if SHARED_X else m, row % tiles_b * BLOCK_B, i, B, I,
                          x_stride_m, x_stride_b, x_stride_i,
                          BLOCK_B, BLOCK_I, EVEN_I, TMA, LONG)  # fmt: skip
            if r_ptr is not None:  # x * r is rounded to the input dtype, as in plain PyTorch
                p_r = r_ptr + offset(m, I, LONG) + i + offs_i
                a = a * tl.load(p_r, mask=in_i, other=0.0).to(DTYPE)[None, :]
        acc = tl.dot(a, w.T, acc, input_precision=PRECISION)

    in_y = in_rows[:, None] & in_o[None, :]
    if FOLDED:
        s_offs = offset(m, O, LONG)[:, None] + offs_o[None, :]
        bias_offs = offset(m, bias_stride_m, LONG)[:, None] + offs_o[None, :]
        in_so = in_y
    else:
        s_offs = (offset(m, O, LONG) + offs_o)[None, :]
        bias_offs = (offset(m, bias_stride_m, LONG) + offs_o)[None, :]
        in_so = in_o[None, :]
    if s_ptr is not None:
        acc *= tl.load(s_ptr + s_offs, mask=in_so, other=0.0).to(DTYPE).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + bias_offs, mask=in_so, other=0.0).to(DTYPE).to(tl.float32)
    if RELU:
        acc = tl.where(acc <= 0.0, 0.0, acc)  # NaN stays
    y_offs = m.to(tl.int64) * y_stride_m + b.to(tl.int64) * y_stride_b
    p_y = y_ptr + y_offs[:, None] + offs_o[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=in_y)


def batch_ensemble_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    r: torch.Tensor | None,
    s: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tf32: bool,
    relu: bool = False,
    *,
    config: Config | None = None,
    long: bool | None = None,
) -> None:
    """x [M, B, I] or, for all members, [B, I]; weight [O, I]; r [M, I]; s [M, O]; bias [M, O], [O].

    All in one dtype, except that r, s and bias may be float32 where it has 16 bits.
    Fills y [M, B, O], any strides but unit along O, with `relu` by max(y, 0). Nothing is empty. x
    and weight may have any strides. `config` and `long` (64-bit offsets) are chosen here unless
    given.
    """
    (M, B, O), I = y.shape, x.shape[-1]
    r, s, bias = (None if t is None else t.contiguous() for t in (r, s, bias))
    long = spans_long(x, weight, r, s) if long is None else long
    kind = tiles.kind_of(x.dtype, tf32)
    strides = (*row_strides(x), *weight.stride())
    strides += (O if bias is not None and bias.ndim == 2 else 0, *y.stride()[:2])

    def launch(c: Config) -> None:
        block_b, block_o, block_i = (c.tiles[k] for k in ("BLOCK_B", "BLOCK_O", "BLOCK_I"))
        batch_ensemble_linear_fwd_kernel[grid(OP, tiles.forward_programs(c, M, B, O))](
            descriptor(x, block_b, block_i) if c.tma else x,
            descriptor(weight, block_o, block_i) if c.tma else weight,
            r, s, bias, y, M, B, I, O, *strides,
            SHARED_X=x.ndim == 2, EVEN_I=I % block_i == 0, PRECISION=precision(kind),
            TMA=c.tma, LONG=long, DTYPE=DTYPES[x.dtype], RELU=relu, **c.options(),
        )  # fmt: skip

    with on_device(x):
        if config is None:
            tma = arch(x) >= 90 and describable(x) and describable(weight)
            where = (kind, tma, arch(x), tiles.processors(x))
            config = tiles.forward_config(*where, M, B, O)
            if AUTOTUNE:
                key = ("batch_ensemble_linear_fwd", x.device, x.dtype, *where, M, B, I, O)
                others = [c for _, c in tiles.buckets(arch(x), "fwd", kind, tma)]
                config = fastest(key, config, others, launch)
        launch(config)


def precision(kind: str) -> str:
    """`input_precision` of the products; it matters for float32 only."""
    return "tf32" if kind == "tf32" else "ieee"


def row_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of [M, B, I]; for [B, I], which all members share, the first is zero."""
    return (x.stride(0) if x.ndim == 3 else 0, x.stride(-2), x.stride(-1))


def spans_long(*tensors: torch.Tensor | None) -> bool:
    """Whether an element of one of the tensors lies 2**31 elements or more from its first."""
    for t in tensors:
        if t is None:
            continue
        if t.is_contiguous():
            last = t.numel() - 1
        else:
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        if last >= 2**31:
            return True
    return False


def describable(t: torch.Tensor) -> bool:
    """Whether a tensor descriptor can address `t`: unit stride last, 16-byte aligned rows."""
    size = t.element_size()
    if t.is_contiguous() and t.shape[-1] * size % 16 == 0:
        return t.data_ptr() % 16 == 0
    if t.data_ptr() % 16 or (t.stride(-1) != 1 and t.shape[-1] > 1):
        return False
    outer = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    return all(n == 1 or (stride > 0 and stride * size % 16 == 0) for n, stride in outer)


def descriptor(t: torch.Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Descriptor of t [members, R, C] or [R, C] (as one member), in blocks [1, rows, cols]."""
    shape = [1] * (3 - t.ndim) + list(t.shape)
    strides = [0] * (3 - t.ndim) + list(t.stride())
    aligned = 16 // t.element_size()
    for d in (1, 0):  # the stride of a dimension of size one means nothing, but must be aligned
        if shape[d] == 1:
            strides[d] = -(-shape[2] // aligned) * aligned if d else shape[1] * strides[1]
    return TensorDescriptor(t, shape, [*strides[:2], 1], [1, rows, cols])
