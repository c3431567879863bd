"""batch_ensemble_linear where an index names the member of each row: rows in any order.

x is [N, I], index [N]. A row whose index is no member becomes NaN, as do the gradients it enters.
Gradients held in float32 beside an x of 16 bits are products of float32 factors, which CUDA rounds
to tf32 where torch's switch for matmul allows it.
"""

import torch
from torch import Tensor

from landscape_fast.ops._dispatch import (
    as_rounded,
    held,
    reference_backward,
    rounded,
    wants_grad,
    wants_graph,
    without_autocast,
)


def indexed_reference(x, weight, r, s, bias, index, relu=False) -> Tensor:
    """The definition, in plain PyTorch."""
    dtype = x.dtype
    x, weight, r, s, bias = as_rounded(x, weight, r, s, bias)
    return _forward(x, weight, r, s, bias, index, relu).to(dtype)


def indexed(x, weight, r, s, bias, index, relu=False) -> Tensor:
    """As `indexed_reference`; for the backward only x is kept (and y, with relu)."""
    tensors = (x, weight, r, s, bias)
    if wants_grad(*tensors):
        return _Indexed.apply(*tensors, index, relu)
    return _forward(x, *rounded(x.dtype, weight, r, s, bias), index, relu)


def _forward(x, weight, r, s, bias, index, relu) -> Tensor:
    """All in one dtype."""
    z = (x if r is None else x * per_row(r, index)) @ weight.T
    s, bias = (per_row(t, index) if t is not None and t.ndim == 2 else t for t in (s, bias))
    if s is not None and bias is not None:
        z = torch.addcmul(bias, z, s)
    elif s is not None:
        z = z * s
    elif bias is not None:
        z = z + bias
    return z.relu() if relu else z


def per_row(t: Tensor, index: Tensor) -> Tensor:
    """[M, F] -> [N, F], NaN where an index is out of range."""
    M = t.shape[0]
    rows = torch.where((index < 0) | (index >= M), M, index)
    return torch.cat([t, t.new_full((1, t.shape[1]), float("nan"))])[rows]


def per_member(rows: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Sums of rows [N, F] by member, [M, F], in float32 or wider and in a fixed order."""
    M = like.shape[0]
    place = torch.where((index < 0) | (index >= M), M, index)
    wide = rows.double() if rows.dtype == torch.float64 else rows.float()
    sums = wide.new_zeros(M + 1, rows.shape[1])
    if rows.device.type == "cuda":  # sorts by index; index_add_ would take atomics
        sums = sums.index_put((place,), wide, accumulate=True)
    else:
        sums = sums.index_add(0, place, wide)
    return sums[:M].to(like.dtype)


class _Indexed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, r, s, bias, index, relu):
        y = _forward(x, *rounded(x.dtype, weight, r, s, bias), index, relu)
        ctx.save_for_backward(x, weight, r, s, bias, index, y if relu else None)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx, dy):
        with without_autocast(dy.device.type):
            return *_Indexed.gradients(ctx, dy), None, None

    @staticmethod
    def gradients(ctx, dy):
        x, weight, r, s, bias, index, y = ctx.saved_tensors
        tensors, needs = (x, weight, r, s, bias), ctx.needs_input_grad[:5]
        if wants_graph():

            def definition(*tensors):
                return indexed_reference(*tensors, index, ctx.relu)

            return reference_backward(definition, tensors, needs, dy)
        need_x, need_weight, need_r, need_s, need_bias = needs
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        dbias = None
        if need_bias:
            dbias = per_member(dy, index, bias) if bias.ndim == 2 else dy.sum(0, dtype=bias.dtype)
        # gradients held in float32 beside an x of 16 bits: all below in float32, and dx rounded
        dtype = torch.float32 if held(x, (weight, r, s), needs[1:4]) else x.dtype
        v, w, low_r, low_s = rounded(dtype, *rounded(x.dtype, x, weight, r, s))
        d = dy.to(dtype)
        r_rows = None if r is None else per_row(low_r, index)
        xr = v if r is None else v * r_rows
        dx = dweight = dr = ds = None
        if need_s:
            ds = per_member(d * (xr @ w.T), index, s)
        d = d if s is None else d * per_row(low_s, index)
        if need_x or need_r:
            t = d @ w
            if need_r:
                dr = per_member(t * v, index, r)
            if need_x:
                dx = (t if r is None else t * r_rows).to(x.dtype)
        if need_weight:
            dweight = (d.T @ xr).to(weight.dtype)
        return dx, dweight, dr, ds, dbias
