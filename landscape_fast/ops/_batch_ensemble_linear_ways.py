"""The two ways to compute batch_ensemble_linear: library calls, and the registered fused kernels.

`x` is [M, B, I], [B, M, I] (`batch_major`) or shared, [B, I]; outputs are contiguous. Parameters
may be float32 where x has 16 bits (`_dispatch`): the library calls take them rounded, except
`outer_backward`; the registered ops take them as they are held.
"""

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_linear_plan import examples, tf32_allowed
from landscape_fast.ops._dispatch import rounded
from landscape_fast.ops._library import define

# Multiplying 16-bit tensors into a float32 result: torch 2.8 and later, on CUDA.
WIDE_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads()
# Elements of G that outer_backward holds at a time, unless one member has more: what a cache keeps,
# enough for a launch, few enough steps for a graph.
OUTER_ELEMENTS = {"cpu": 2**16, "cuda": 2**22, "compiled": 2**24}


def per_row(t: Tensor, batch_major: bool) -> Tensor:
    """A factor [M, F] as it meets rows [M, B, F] or [B, M, F]; [F] stays."""
    return t if t.ndim == 1 or batch_major else t.unsqueeze(1)


def members_dim(batch_major: bool) -> int:
    return 1 if batch_major else 0


def scaled(x: Tensor, r: Tensor | None, batch_major: bool) -> Tensor:
    """x * r for every member; a shared x without r stays [B, I]."""
    if r is None:
        return x
    x = x if x.ndim == 3 else x.unsqueeze(members_dim(batch_major))
    return x * per_row(r, batch_major)


def composed(x, weight, r, s, bias, batch_major, relu) -> tuple[Tensor, Tensor | None]:
    """(y, z) by library calls, with z = (x * r) weight^T, [B, O] where no member differs.

    z is there where ds may need it: where there is an s.
    """
    z = scaled(x, r, batch_major) @ weight.T
    y = z if z.ndim == 3 else z.unsqueeze(members_dim(batch_major))
    if s is not None and bias is not None:
        y = torch.addcmul(per_row(bias, batch_major), y, per_row(s, batch_major))
    elif s is not None:
        y = y * per_row(s, batch_major)
    elif bias is not None:
        y = y + per_row(bias, batch_major)
    return y.relu_() if relu else y, None if s is None else z


def composed_backward(dy, x, weight, r, s, z, needs, bias_shared, bias_dtype, batch_major):
    """Gradients by library calls; x * r is made again rather than kept, and so is z without one."""
    need_x, need_weight, need_r, need_s, need_bias = needs
    members = members_dim(batch_major)
    examples = 1 - members
    dx = dweight = dr = ds = dbias = None
    rows = scaled(x, r, batch_major) if need_s and z is None else None
    if need_s:
        z = rows @ weight.T if z is None else z
        ds = (dy * (z if z.ndim == 3 else z.unsqueeze(members))).sum(examples)
    if need_bias:
        dbias = dy.sum((0, 1) if bias_shared else examples, dtype=bias_dtype)
    if need_x or need_weight or need_r:
        d = dy if s is None else dy * per_row(s, batch_major)
        d = d.sum(members) if x.ndim == 2 and r is None else d  # one product serves all members
        if need_x or need_r:
            t = d @ weight
            if need_r:
                dr = (t * (x if x.ndim == 3 else x.unsqueeze(members))).sum(examples)
            if need_x:
                dx = t if r is None else t * per_row(r, batch_major)
                dx = dx.sum(members) if dx.ndim > x.ndim else dx
        if need_weight:
            rows = scaled(x, r, batch_major) if rows is None else rows
            dweight = d.flatten(0, -2).T @ rows.flatten(0, -2)
    return dx, dweight, dr, ds, dbias


def outer_backward(dy, x, weight, r, s, needs, bias_shared, bias_dtype, batch_major):
    """Gradients by library calls from x alone: those of weight, r, s through G_m = dy_m^T x_m.

    G, and all that is made of it, is float32 (float64 for float64), so a 16-bit dtype rounds
    nothing between its inputs and these gradients.
    """
    need_x, need_weight, need_r, need_s, need_bias = needs
    w, low_r, low_s = rounded(x.dtype, weight, r, s)
    how = (bias_shared, bias_dtype, batch_major)
    some = (need_x, False, False, False, need_bias)
    dx, *_, dbias = composed_backward(dy, x, w, low_r, low_s, None, some, *how)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    w, low_r, low_s = rounded(wide, w, low_r, low_s)
    d, rows = member_major(dy, batch_major), member_major(x, batch_major)
    if r is None and s is None:  # no member differs
        d = d.sum(0, dtype=wide) if x.ndim == 2 else d.flatten(0, 1)
        d, rows = d.unsqueeze(0), x if x.ndim == 2 else rows.flatten(0, 1).unsqueeze(0)
    rows = rows if rows.ndim == 3 else rows.expand(d.shape[0], *rows.shape)
    kind = "cuda" if d.device.type == "cuda" else "cpu"
    kind = "compiled" if torch.compiler.is_compiling() else kind
    M, step = d.shape[0], max(1, OUTER_ELEMENTS[kind] // weight.numel())
    dweight = w.new_zeros(weight.shape) if need_weight else None
    dr, ds = [], []
    for first in range(0, M, step):
        some = slice(first, first + step)
        g = wide_product(d[some].transpose(1, 2), rows[some], wide)  # [step, O, I]
        r_row = None if r is None else low_r[some].unsqueeze(1)
        s_column = None if s is None else low_s[some].unsqueeze(2)
        if need_r or need_s:
            h = g * w
            if need_r:
                dr.append(_weighted_sum(h, s_column, 1, x.dtype != wide))
            if need_s:
                ds.append(_weighted_sum(h, r_row, 2, x.dtype != wide))
        if need_weight:
            g = g if r is None else g * r_row
            if s is not None and g.shape[0] == 1:
                dweight = torch.addcmul(dweight, g[0], s_column[0])
            else:
                dweight = dweight + (g if s is None else g * s_column).sum(0)
    dweight = dweight.to(weight.dtype) if need_weight else None
    dr = torch.cat(dr).to(r.dtype) if need_r else None
    ds = torch.cat(ds).to(s.dtype) if need_s else None
    return dx, dweight, dr, ds, dbias


def wide_backward(dy, x, weight, r, s, needs, bias_shared, bias_dtype, batch_major):
    """Gradients by library calls from x alone, all of them in float32: for few examples."""
    low = rounded(torch.float32, *rounded(x.dtype, x, weight, r, s))
    how = (needs, bias_shared, bias_dtype, batch_major)
    *found, dbias = composed_backward(dy.float(), *low, None, *how)
    pairs = zip(found, (x, weight, r, s), strict=True)
    return *[None if g is None else g.to(t.dtype) for g, t in pairs], dbias


def _weighted_sum(h: Tensor, by: Tensor | None, dim: int, exact: bool) -> Tensor:
    """(h * by).sum(dim) for h [M, O, I]; by is [M, O, 1] for dim 1 and [M, 1, I] for dim 2."""
    if by is None:
        return h.sum(dim)
    if exact or h.device.type == "cuda":  # a product might round to tf32, or add too many in a row
        return (h * by).sum(dim)
    found = by.transpose(1, 2) @ h if dim == 1 else h @ by.transpose(1, 2)
    return found.squeeze(dim)


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for a batch, formed from the exact values and returned in `dtype`.

    16-bit values are exact in tf32 too, so torch's switch for that changes nothing.
    """
    if a.device.type == "cuda" and WIDE_PRODUCTS and a.dtype == b.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


def forward_fake(x, weight, r, s, bias, members, batch_major, relu):
    B = examples(x, batch_major)
    rows = (B, members) if batch_major else (members, B)
    return x.new_empty(*rows, weight.shape[0])


def _forward_impl(x, weight, r, s, bias, members, batch_major, relu):
    from landscape_fast.kernels.batch_ensemble_linear import batch_ensemble_linear_fwd

    (weight,) = rounded(x.dtype, weight)
    y = forward_fake(x, weight, r, s, bias, members, batch_major, relu)
    rows = [member_major(t, batch_major) for t in (x, y)]
    batch_ensemble_linear_fwd(rows[0], weight, r, s, bias, rows[1], tf32_allowed(), relu)
    return y


def _backward_fake(dy, x, weight, r, s, needs, bias_shared, bias_dtype, batch_major, dr_with_dx):
    M, O = dy.shape[members_dim(batch_major)], weight.shape[0]
    bias = (O,) if bias_shared else (M, O)
    shapes = (x.shape, weight.shape, (M, x.shape[-1]), (M, O), bias)
    held = [x if t is None else t for t in (x, weight, r, s)]
    dtypes = [*[t.dtype for t in held], bias_dtype]
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _backward_impl(dy, x, weight, r, s, needs, bias_shared, bias_dtype, batch_major, dr_with_dx):
    from landscape_fast.kernels.batch_ensemble_linear_backward import batch_ensemble_linear_bwd

    arguments = (dy, x, weight, r, s, needs, bias_shared, bias_dtype, batch_major, dr_with_dx)
    found = _backward_fake(*arguments)
    wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
    if needs[0]:
        wanted[0] = member_major(found[0], batch_major)
    rows = [member_major(t, batch_major) for t in (dy, x)]
    (weight,) = rounded(x.dtype, weight)
    batch_ensemble_linear_bwd(*rows, weight, r, s, *wanted, tf32_allowed(), dr_with_dx=dr_with_dx)
    return found


def member_major(t: Tensor | None, batch_major: bool) -> Tensor | None:
    """Rows as [M, B, F]; shared ones [B, F] stay."""
    return t.transpose(0, 1) if t is not None and batch_major and t.ndim == 3 else t


forward_op = define(
    "batch_ensemble_linear(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias,"
    " SymInt members, bool batch_major, bool relu) -> Tensor",
    _forward_impl,
    forward_fake,
)
backward_op = define(
    "batch_ensemble_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? r, Tensor? s,"
    " bool[] needs, bool bias_shared, ScalarType bias_dtype, bool batch_major, bool dr_with_dx)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
