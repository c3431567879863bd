"""How hyper_batch_linear is computed by library calls, forward and backward.

`x` is [M, B, I], [B, M, I] (`batch_major`) or shared, [B, I]; e, e_bias and outputs have the rows
of y. u and v are None where they are r and s.
"""

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_linear_ways import members_dim, per_row, scaled
from landscape_fast.ops._dispatch import rounded
from landscape_fast.ops._hyper_batch import Inputs, held_in_float32, in_dtypes, tied


def composed(t: Inputs, batch_major: bool) -> tuple[Tensor, Tensor]:
    """(y, z2) by library calls, with z2 = (x * u) delta^T, [B, O] where no member differs."""
    t = Inputs(*rounded(t.x.dtype, *t))
    r, s, u, v = tied(t)
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


def composed_backward(
    dy: Tensor, inputs: Inputs, z2: Tensor | None, needs: Inputs, batch_major: bool
) -> list[Tensor | None]:
    """Gradients by library calls; x * r, x * u and, for ds, (x * r) weight^T are made again.

    Where those of float32 parameters are wanted beside a 16-bit x, all is computed in float32.
    """
    low = inputs.x.dtype
    at = torch.float32 if held_in_float32(inputs, needs) else low
    t = Inputs(*rounded(at, *rounded(low, *inputs)))
    dy, z2 = rounded(at, dy, z2)
    found = dict.fromkeys(Inputs._fields) | elementwise(dy, t, z2, needs, batch_major)
    r, s, u, v = tied(t)
    first = (needs.x, needs.weight, needs.r, needs.s)
    need_u, need_v = needs.r if t.u is None else needs.u, needs.s if t.v is None else needs.v
    second = (needs.x, needs.delta, need_u, need_v)
    dx, found["weight"], found["r"], found["s"] = _branch(
        dy, t.x, t.weight, r, s, None, first, batch_major
    )
    if any(second):
        z2 = z2 if at == low else None  # it was rounded
        dx2, found["delta"], du, dv = _branch(dy * t.e, t.x, t.delta, u, v, z2, second, batch_major)
        found["x"] = None if dx is None else dx + dx2
        for tie, name, own, gradient in ((t.u, "r", "u", du), (t.v, "s", "v", dv)):
            if tie is not None:
                found[own] = gradient
            elif gradient is not None:
                found[name] = found[name] + gradient
    return in_dtypes(list(found.values()), inputs)


def elementwise(
    dy: Tensor, t: Inputs, z2: Tensor | None, needs: Inputs, batch_major: bool
) -> dict[str, Tensor]:
    """Gradients that need no product: of e, e_bias and the biases."""
    found = {}
    examples = 0 if batch_major else 1
    if needs.e:
        v = tied(t)[3]
        d = dy if v is None else dy * per_row(v, batch_major)
        found["e"] = d * _of_members(z2, batch_major)
    if needs.e_bias:
        found["e_bias"] = dy * per_row(t.delta_bias, batch_major)
    if needs.bias:
        found["bias"] = dy.sum((0, 1) if t.bias.ndim == 1 else examples)
    if needs.delta_bias:
        found["delta_bias"] = (dy * t.e_bias).sum((0, 1) if t.delta_bias.ndim == 1 else examples)
    return found


def _branch(d, x, weight, r, s, z, needs, batch_major: bool):
    """Gradients of ((x * r) weight^T) * s for the incoming d: x, weight, r, s, where needed."""
    need_x, need_weight, need_r, need_s = needs
    members = members_dim(batch_major)
    examples = 1 - members
    dx = dweight = dr = ds = a = None
    need_s, need_r = need_s and s is not None, need_r and r is not None
    if need_weight or (need_s and z is None):
        a = scaled(x, r, batch_major)
    if need_s:
        z = a @ weight.T if z is None else z
        ds = (d * _of_members(z, batch_major)).sum(examples)
    if s is not None and (need_x or need_weight or need_r):
        d = d * per_row(s, batch_major)
    if x.ndim == 2 and r is None and (need_x or need_weight):
        d = d.sum(members)  # one product serves all members
    if need_weight:
        dweight = d.flatten(0, -2).T @ a.flatten(0, -2)
    if need_x or need_r:
        g = d @ weight
        if need_r:
            dr = (g * _of_members(x, batch_major)).sum(examples)
        if need_x:
            dx = g if r is None else g * per_row(r, batch_major)
            dx = dx.sum(members) if dx.ndim > x.ndim else dx
    return dx, dweight, dr, ds


def _of_members(t: Tensor, batch_major: bool) -> Tensor:
    """Shared rows [B, F] as those of every member."""
    return t if t.ndim == 3 else t.unsqueeze(members_dim(batch_major))
