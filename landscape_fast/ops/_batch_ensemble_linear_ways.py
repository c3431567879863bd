"""The two ways to compute batch_ensemble_linear: library calls, and the registered fused kernels.

`x` is [M, B, I], [B, M, I] (`batch_major`) or shared, [B, I]; outputs are contiguous.
"""

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_linear_plan import tf32_allowed
from landscape_fast.ops._library import define


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


def composed(x, weight, r, s, bias, members, batch_major) -> tuple[Tensor, Tensor]:
    """(y, z) by library calls, with z = (x * r) weight^T, [B, O] where no member differs."""
    z = scaled(x, r, batch_major) @ weight.T
    y = z if z.ndim == 3 else z.unsqueeze(members_dim(batch_major))
    if s is not None and bias is not None:
        y = torch.addcmul(per_row(bias, batch_major), y, per_row(s, batch_major))
    elif s is not None:
        y = y * per_row(s, batch_major)
    elif bias is not None:
        y = y + per_row(bias, batch_major)
    return y, z


def composed_backward(dy, x, weight, r, s, z, needs, bias_shared, batch_major):
    """Gradients by library calls; x * r is made again rather than kept."""
    need_x, need_weight, need_r, need_s, need_bias = needs
    members = members_dim(batch_major)
    examples = 1 - members
    dx = dweight = dr = ds = dbias = None
    if need_s:
        ds = (dy * (z if z.ndim == 3 else z.unsqueeze(members))).sum(examples)
    if need_bias:
        dbias = dy.sum((0, 1) if bias_shared else examples)
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
            dweight = d.flatten(0, -2).T @ scaled(x, r, batch_major).flatten(0, -2)
    return dx, dweight, dr, ds, dbias


def _forward_fake(x, weight, r, s, bias, members, batch_major):
    B = x.shape[0] if x.ndim == 2 or batch_major else x.shape[1]
    rows = (B, members) if batch_major else (members, B)
    return x.new_empty(*rows, weight.shape[0])


def _forward_impl(x, weight, r, s, bias, members, batch_major):
    from landscape_fast.kernels.batch_ensemble_linear import batch_ensemble_linear_fwd

    y = _forward_fake(x, weight, r, s, bias, members, batch_major)
    rows = [_member_major(t, batch_major) for t in (x, y)]
    batch_ensemble_linear_fwd(rows[0], weight, r, s, bias, rows[1], tf32_allowed())
    return y


def _backward_fake(dy, x, weight, r, s, needs, bias_shared, batch_major, dr_with_dx):
    M, O = dy.shape[members_dim(batch_major)], weight.shape[0]
    bias = (O,) if bias_shared else (M, O)
    shapes = (x.shape, weight.shape, (M, x.shape[-1]), (M, O), bias)
    return tuple(
        x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


def _backward_impl(dy, x, weight, r, s, needs, bias_shared, batch_major, dr_with_dx):
    from landscape_fast.kernels.batch_ensemble_linear_backward import batch_ensemble_linear_bwd

    found = _backward_fake(dy, x, weight, r, s, needs, bias_shared, batch_major, dr_with_dx)
    wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
    if needs[0]:
        wanted[0] = _member_major(found[0], batch_major)
    rows = [_member_major(t, batch_major) for t in (dy, x)]
    batch_ensemble_linear_bwd(*rows, weight, r, s, *wanted, tf32_allowed(), dr_with_dx=dr_with_dx)
    return found


def _member_major(t: Tensor, batch_major: bool) -> Tensor:
    return t.transpose(0, 1) if batch_major and t.ndim == 3 else t


forward_op = define(
    "batch_ensemble_linear(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias,"
    " SymInt members, bool batch_major) -> Tensor",
    _forward_impl,
    _forward_fake,
)
backward_op = define(
    "batch_ensemble_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? r, Tensor? s,"
    " bool[] needs, bool bias_shared, bool batch_major, bool dr_with_dx)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
