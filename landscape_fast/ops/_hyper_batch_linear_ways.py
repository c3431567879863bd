"""The ways to compute hyper_batch_linear: library calls, and the kernels of GPUs and of CPUs.

`x` is [M, B, I], [B, M, I] (`batch_major`) or shared, [B, I]; e, e_bias and outputs have the rows
of y. u and v are None where they are r and s.
"""

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_linear_plan import examples, tf32_allowed
from landscape_fast.ops._batch_ensemble_linear_ways import composed_backward as layer_backward
from landscape_fast.ops._batch_ensemble_linear_ways import (
    member_major,
    members_dim,
    per_row,
    scaled,
)
from landscape_fast.ops._dispatch import rounded
from landscape_fast.ops._hyper_batch import Inputs, held_in_float32, in_dtypes, tied
from landscape_fast.ops._library import define
from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear


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
    found = dict.fromkeys(Inputs._fields) | elementwise(dy, t, z2, needs, batch_major, at)
    r, s, u, v = tied(t)
    first = (needs.x, needs.weight, needs.r, needs.s)
    need_u, need_v = needs.r if t.u is None else needs.u, needs.s if t.v is None else needs.v
    second = (needs.x, needs.delta, need_u, need_v)
    how = (False, None, batch_major)  # without a bias
    dx, found["weight"], found["r"], found["s"], _ = layer_backward(
        dy, t.x, t.weight, r, s, None, (*first, False), *how
    )
    if any(second):
        z2 = z2 if at == low else None  # it was rounded
        dx2, found["delta"], du, dv, _ = layer_backward(
            dy * t.e, t.x, t.delta, u, v, z2, (*second, False), *how
        )
        found["x"] = None if dx is None else dx + dx2
        for tie, name, own, gradient in ((t.u, "r", "u", du), (t.v, "s", "v", dv)):
            if tie is not None:
                found[own] = gradient
            elif gradient is not None:
                found[name] = found[name] + gradient
    return in_dtypes(list(found.values()), inputs)


def elementwise(
    dy: Tensor, t: Inputs, z2: Tensor | None, needs: Inputs, batch_major: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gradients that need no product: of e, e_bias and, summed in `dtype`, of the biases."""
    found = {}
    examples = 0 if batch_major else 1
    if needs.e:
        v = tied(t)[3]
        d = dy if v is None else dy * per_row(v, batch_major)
        found["e"] = d * _of_members(z2, batch_major)
    if needs.e_bias:
        found["e_bias"] = dy * per_row(t.delta_bias, batch_major)
    if needs.bias:
        found["bias"] = dy.sum((0, 1) if t.bias.ndim == 1 else examples, dtype=dtype)
    if needs.delta_bias:
        rows = (0, 1) if t.delta_bias.ndim == 1 else examples
        found["delta_bias"] = (dy.to(dtype) * t.e_bias.to(dtype)).sum(rows)
    return found


def _of_members(t: Tensor, batch_major: bool) -> Tensor:
    """Shared rows [B, F] as those of every member."""
    return t if t.ndim == 3 else t.unsqueeze(members_dim(batch_major))


def two_layers(t: Inputs, members: int, batch_major: bool, backend: str) -> Tensor:
    """y from two batch_ensemble_linear, with their CPU kernels and their gradients."""
    layout = "batch_major" if batch_major else "member_major"
    r, s, u, v = tied(t)
    own = t.x if t.x.ndim == 3 else t.x.unsqueeze(members_dim(batch_major))
    own = own.expand(-1, members, -1) if batch_major else own.expand(members, -1, -1)

    def layer(weight, r, s, bias=None):
        x = own if r is None else t.x
        return batch_ensemble_linear(x, weight, r, s, bias, layout=layout, backend=backend)

    y = torch.addcmul(layer(t.weight, r, s, t.bias), layer(t.delta, u, v), t.e)
    if t.delta_bias is None:
        return y
    return torch.addcmul(y, per_row(t.delta_bias, batch_major), t.e_bias)


def fused(t: Inputs, members: int, batch_major: bool, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(y, z2) by the kernel; z2 None unless it is kept."""
    y, z2 = forward_op(*t, members, batch_major, keep)
    return y, z2 if keep else None


def fused_backward(
    dy: Tensor, t: Inputs, z2: Tensor | None, needs: Inputs, batch_major: bool
) -> list[Tensor | None]:
    """Gradients by the kernels; those of e and the responding biases by library calls."""
    by_kernel = needs._replace(e=False, delta_bias=False, e_bias=False)
    others = needs._replace(bias=False)
    s, v, delta_bias = rounded(t.x.dtype, t.s, t.v, t.delta_bias)
    low = t._replace(s=s, v=v, delta_bias=delta_bias)
    at = torch.float32 if held_in_float32(t, needs) else t.x.dtype
    found = dict.fromkeys(Inputs._fields) | elementwise(dy, low, z2, others, batch_major, at)
    if any(by_kernel):
        gradients = backward_op(dy, *t[:9], list(by_kernel), batch_major)
        for name, gradient in zip(BY_KERNEL, gradients, strict=True):
            found[name] = gradient if getattr(by_kernel, name) else None
    return in_dtypes(list(found.values()), t)


BY_KERNEL = ("x", "weight", "delta", "r", "s", "u", "v", "bias")


def _forward_fake(
    x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias, members, batch_major, keep
):
    B = examples(x, batch_major)
    rows = (B, members) if batch_major else (members, B)
    y = x.new_empty(*rows, weight.shape[0])
    return y, x.new_empty(y.shape if keep else (0,))


def _forward_impl(
    x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias, members, batch_major, keep
):
    from landscape_fast.kernels.hyper_batch_linear import hyper_batch_linear_fwd

    t = Inputs(x, *rounded(x.dtype, weight, delta), e, r, s, u, v, bias, delta_bias, e_bias)
    y, z = _forward_fake(*t, members, batch_major, keep)
    rows = {name: member_major(getattr(t, name), batch_major) for name in ("x", "e", "e_bias")}
    outputs = [member_major(y, batch_major), member_major(z, batch_major) if keep else None]
    hyper_batch_linear_fwd(*t._replace(**rows), *outputs, tf32_allowed())
    return y, z


def _backward_fake(dy, x, weight, delta, e, r, s, u, v, bias, needs, batch_major):
    held = (x, weight, delta, r, s, u, v, bias)
    wanted = Inputs(*needs)
    return tuple(
        x.new_empty(t.shape, dtype=t.dtype) if getattr(wanted, name) else x.new_empty(0)
        for name, t in zip(BY_KERNEL, held, strict=True)
    )


def _backward_impl(dy, x, weight, delta, e, r, s, u, v, bias, needs, batch_major):
    from landscape_fast.kernels.hyper_batch_linear_backward import hyper_batch_linear_bwd

    t, needs = Inputs(x, weight, delta, e, r, s, u, v, bias), Inputs(*needs)
    found = _backward_fake(dy, *t[:9], needs, batch_major)
    wanted = [g if getattr(needs, n) else None for n, g in zip(BY_KERNEL, found, strict=True)]
    if needs.x:
        wanted[0] = member_major(found[0], batch_major)
    dy, x, e = (member_major(a, batch_major) for a in (dy, x, e))
    weights = rounded(x.dtype, weight, delta)
    exact = held_in_float32(t, needs)
    hyper_batch_linear_bwd(dy, x, *weights, e, r, s, u, v, *wanted, tf32_allowed(), exact=exact)
    return found


forward_op = define(
    "hyper_batch_linear(Tensor x, Tensor weight, Tensor delta, Tensor e, Tensor? r, Tensor? s,"
    " Tensor? u, Tensor? v, Tensor? bias, Tensor? delta_bias, Tensor? e_bias, SymInt members,"
    " bool batch_major, bool keep) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
backward_op = define(
    "hyper_batch_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor delta, Tensor e,"
    " Tensor? r, Tensor? s, Tensor? u, Tensor? v, Tensor? bias, bool[] needs, bool batch_major)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
