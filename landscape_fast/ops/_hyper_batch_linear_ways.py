"""How hyper_batch_linear is computed by library calls, forward and backward.

`x` is [M, B, I], [B, M, I] (`batch_major`) or shared, [B, I]; e, e_bias and outputs have the rows
of y. In a list of factors u and v are None where they are r and s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_linear_ways import members_dim, per_row, scaled
from landscape_fast.ops._hyper_batch import product, rounded, tied, wide


class Inputs(NamedTuple):
    """The arguments of the op, or something for each: whether it needs a gradient, or that."""

    x: Tensor
    weight: Tensor
    delta: Tensor
    e: Tensor
    r: Tensor | None = None
    s: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    delta_bias: Tensor | None = None
    e_bias: Tensor | None = None


def composed(t: Inputs, batch_major: bool) -> tuple[Tensor, Tensor]:
    """(y, z2) by library calls, with z2 = (x * u) delta^T, [B, O] where no member differs."""
    t = t._replace(**{name: rounded(getattr(t, name), t.x) for name in PARAMETERS})
    r, s, u, v = tied(t.r, t.s, t.u, t.v)
    a = scaled(t.x, r, batch_major)
    z1 = a @ t.weight.T
    z2 = (a if u is r else scaled(t.x, u, batch_major)) @ t.delta.T
    z1, full = _of_members(z1, batch_major), _of_members(z2, batch_major)
    y = full * t.e if v is None else (full * per_row(v, batch_major)).mul_(t.e)
    y = y.add_(z1) if s is None else y.addcmul_(z1, per_row(s, batch_major))
    if t.bias is not None:
        y = y.add_(per_row(t.bias, batch_major))
    if t.delta_bias is not None:
        y = y.addcmul_(per_row(t.delta_bias, batch_major), t.e_bias)
    return y, z2


PARAMETERS = ("weight", "delta", "r", "s", "u", "v", "bias", "delta_bias")


def composed_backward(
    dy: Tensor, t: Inputs, z2: Tensor | None, needs: Inputs, batch_major: bool
) -> Inputs:
    """Gradients by library calls; x * r, x * u and, for ds, (x * r) weight^T are made again.

    Those of float32 parameters beside a 16-bit x are summed in float32.
    """
    low = t.x.dtype
    dtypes = [low if p is None else p.dtype for p in t]
    widest = torch.float32 if torch.float32 in dtypes else low
    at = wide(low, widest, dy.device)
    t = Inputs(*[None if p is None else p.to(low).to(at) for p in t])
    dy, z2 = dy.to(at), None if z2 is None else z2.to(at)
    how = (batch_major, widest)
    found = dict.fromkeys(Inputs._fields) | elementwise(dy, t, z2, needs, *how)
    r, s, u, v = tied(t.r, t.s, t.u, t.v)
    need_u = needs.r if t.u is None else needs.u
    need_v = needs.s if t.v is None else needs.v
    first = (needs.x, needs.weight, needs.r, needs.s)
    second = (needs.x, needs.delta, need_u, need_v)
    dx, found["weight"], found["r"], found["s"] = _branch(
        dy, t.x, t.weight, r, s, None, first, *how
    )
    if any(second):
        dx2, found["delta"], du, dv = _branch(dy * t.e, t.x, t.delta, u, v, z2, second, *how)
        dx = dx2 if dx is None else dx + dx2
        for tie, name, own, gradient in ((t.u, "r", "u", du), (t.v, "s", "v", dv)):
            if tie is not None:
                found[own] = gradient
            elif gradient is not None:
                found[name] = found[name] + gradient
    found["x"] = dx
    gradients = zip(found.values(), dtypes, strict=True)
    return Inputs(*[g if g is None else g.to(dtype) for g, dtype in gradients])


def elementwise(dy, t: Inputs, z2, needs: Inputs, batch_major: bool, dtype) -> dict[str, Tensor]:
    """Gradients that need no product: of e, e_bias and the biases."""
    found = {}
    examples = 0 if batch_major else 1
    if needs.e:
        v = t.s if t.v is None else t.v
        d = dy if v is None else dy * per_row(v, batch_major)
        found["e"] = d * _of_members(z2, batch_major)
    if needs.e_bias:
        found["e_bias"] = dy * per_row(t.delta_bias, batch_major)
    for name, factor in (("bias", None), ("delta_bias", t.e_bias)):
        if getattr(needs, name):
            rows = (0, 1) if getattr(t, name).ndim == 1 else examples
            found[name] = (dy if factor is None else dy * factor).sum(rows, dtype=dtype)
    return found


def _branch(d, x, weight, r, s, z, needs, batch_major: bool, dtype: torch.dtype):
    """Gradients of ((x * r) weight^T) * s for the incoming d: x, weight, r, s, where needed."""
    need_x, need_weight, need_r, need_s = needs
    members = members_dim(batch_major)
    examples = 1 - members
    dx = dweight = dr = ds = a = None
    if need_weight or (need_s and s is not None and z is None):
        a = scaled(x, r, batch_major)
    if need_s and s is not None:
        z = a @ weight.T if z is None else z
        ds = (d * _of_members(z, batch_major)).sum(examples, dtype=dtype)
    if s is not None and (need_x or need_weight or need_r):
        d = d * per_row(s, batch_major)
    if x.ndim == 2 and r is None and (need_x or need_weight):
        d = d.sum(members)  # one product serves all members
    if need_weight:
        dweight = product(d.flatten(0, -2).T, a.flatten(0, -2), dtype)
    if need_x or need_r:
        g = d @ weight
        if need_r and r is not None:
            dr = (g * _of_members(x, batch_major)).sum(examples, dtype=dtype)
        if need_x:
            dx = g if r is None else g * per_row(r, batch_major)
            dx = dx.sum(members) if dx.ndim > x.ndim else dx
    return dx, dweight, dr, ds


def _of_members(t: Tensor, batch_major: bool) -> Tensor:
    """Shared rows [B, F] as those of every member."""
    return t if t.ndim == 3 else t.unsqueeze(members_dim(batch_major))
