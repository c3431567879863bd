"""hyper_batch_conv2d by library calls: two convolutions for each member, with merged weights.

Member m convolves with `weight * s[m] * r[m]` and `delta * v[m] * u[m]`, so that no factor costs a
pass over activations. The gradients G1_m and G2_m of these, for dy and dy * e, give all others:
dweight = sum_m s_m G1_m r_m, ds_m = sum_i weight G1_m r_m, dr_m = sum_o weight G1_m s_m, and alike
for delta, v and u. `x` is [M, B, I, H, W] or shared, [1, B, I, H, W]; e and e_bias are [M, B, O].
"""

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_conv_checks import Conv
from landscape_fast.ops._batch_ensemble_conv_ways import (
    convolve,
    convolve_backward,
    factor_gradients,
    padded,
    pair_scale,
    spread,
    summing_dtype,
    unpadded,
)
from landscape_fast.ops._dispatch import as_rounded, rounded
from landscape_fast.ops._hyper_batch import Inputs, held_in_float32, in_dtypes, tied

PIXELS = (-2, -1)


def definition(t: Inputs, conv: Conv) -> Tensor:
    """The op in plain PyTorch: what every way is tested against, in float64."""
    dtype = t.x.dtype
    t = Inputs(*as_rounded(*t))
    r, s, u, v = tied(t)

    def half(weight, r, s):
        x = t.x if r is None else t.x * spread(r, 2)
        y = convolve(padded(x.flatten(0, 1), conv), weight, None, conv).unflatten(0, x.shape[:2])
        return y if s is None else y * spread(s, 2)

    y = half(t.weight, r, s) + half(t.delta, u, v) * t.e[..., None, None]
    y = y if t.bias is None else y + spread(t.bias, 2)
    if t.delta_bias is not None:
        y = y + spread(t.delta_bias, 2) * t.e_bias[..., None, None]
    return y.to(dtype)


def composed(t: Inputs, conv: Conv, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(y, z2) with z2 [M, B, O, H', W'] the convolutions with merged deltas, if they are kept."""
    x, low = t.x, t.x.dtype
    t = _small_in(summing_dtype(low), t)
    bias = t.bias if t.delta_bias is None else None  # the convolutions add it for nothing
    shift = None if t.delta_bias is None else offsets(t)
    e, bias, shift = rounded(low, t.e, bias, shift)
    r, s, u, v = tied(t)
    ys, zs = [], []
    for m in range(e.shape[0]):
        images = padded(x[m if x.shape[0] > 1 else 0], conv)
        own_bias = bias if bias is None or bias.ndim == 1 else bias[m]
        y = convolve(images, _merged(t.weight, r, s, conv, m).to(low), own_bias, conv)
        z2 = convolve(images, _merged(t.delta, u, v, conv, m).to(low), None, conv)
        y = torch.addcmul(y, z2, e[m, ..., None, None])
        ys.append(y if shift is None else y.add_(shift[m, ..., None, None]))
        if keep:
            zs.append(z2)
    return _stacked(ys), _stacked(zs) if keep else None


def composed_backward(
    dy: Tensor, inputs: Inputs, z2: Tensor | None, needs: Inputs, conv: Conv
) -> list[Tensor | None]:
    """Gradients by library calls.

    Where those of float32 parameters are wanted beside a 16-bit x, their products are of float32
    factors: every value in them has 16 bits, dy * e as a sum of two, which no tf32 rounds.
    """
    x, low = inputs.x, inputs.x.dtype
    t = _small_in(summing_dtype(low), inputs)
    exact = held_in_float32(inputs, needs)
    found = dict.fromkeys(Inputs._fields) | sums(dy, t, z2, needs)
    r, s, u, v = tied(t)
    need_u, need_v = needs.r if t.u is None else needs.u, needs.s if t.v is None else needs.v
    halves = (
        _Half(t.weight, r, s, needs.weight, needs.r, needs.s, conv),
        _Half(t.delta, u, v, needs.delta, need_u, need_v, conv),
    )
    dxs = []
    for m in range(dy.shape[0]) if needs.x or any(h.wanted() for h in halves) else ():
        images = padded(x[m if x.shape[0] > 1 else 0], conv)
        d2 = dy[m].to(t.e.dtype if exact else low) * t.e[m, ..., None, None].to(dy.dtype)
        dx = None
        for half, d in zip(halves, (dy[m], d2), strict=True):
            g = half.backward(d, images, m, needs.x, exact)
            dx = g if dx is None or g is None else dx + g
        if needs.x:
            dxs.append(unpadded(dx, conv))
    if needs.x:
        shared = x.shape[0] == 1 and len(dxs) > 1
        found["x"] = sum(d.to(t.e.dtype) for d in dxs).unsqueeze(0) if shared else _stacked(dxs)
    (found["weight"], found["r"], found["s"]) = halves[0].gradients()
    (found["delta"], du, dv) = halves[1].gradients()
    for tie, name, own, gradient in ((t.u, "r", "u", du), (t.v, "s", "v", dv)):
        if tie is not None:
            found[own] = gradient
        elif gradient is not None:
            found[name] = found[name] + gradient
    return in_dtypes(list(found.values()), inputs)


class _Half:
    """One of the two convolutions in the backward: its weight, factors, and their gradients."""

    def __init__(self, weight, r, s, need_weight, need_r, need_s, conv):
        self.weight, self.r, self.s, self.conv = weight, r, s, conv
        self.need_weight, self.need_r, self.need_s = need_weight, need_r, need_s
        self.dweight = torch.zeros_like(weight) if need_weight else None
        self.drs, self.dss = [], []

    def wanted(self) -> bool:
        return self.need_weight or self.need_r or self.need_s

    def backward(self, d, images, m: int, need_x: bool, exact: bool) -> Tensor | None:
        """Adds what member m contributes; returns the gradient of its padded images, if needed."""
        low, weight, conv = images.dtype, self.weight, self.conv
        scale = pair_scale(self.r, self.s, weight, conv, m)
        own = (weight if scale is None else weight * scale).to(low)
        now = self.wanted() and not exact
        dx, g = None, None
        if need_x or now:
            dx, g = convolve_backward(d.to(low), images, own, conv, need_x, now)
        if self.wanted() and exact:
            parts = [d.to(low).to(weight.dtype)]
            if d.dtype != low:
                parts.append(d - parts[0])
            wide = images.to(weight.dtype)
            g = sum(convolve_backward(p, wide, weight, conv, False, True)[1] for p in parts)
        if self.wanted():
            g = g.to(weight.dtype)
            if self.need_weight:
                self.dweight += g if scale is None else g * scale
            if self.need_r or self.need_s:
                p = (g * weight).sum(PIXELS)
                factor_gradients(p, self.r, self.s, conv, m, self.drs, self.dss)
        return dx

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dr = torch.stack(self.drs) if self.need_r else None
        return self.dweight, dr, torch.stack(self.dss) if self.need_s else None


def sums(dy: Tensor, t: Inputs, z2: Tensor | None, needs: Inputs) -> dict[str, Tensor]:
    """Gradients that need no convolution: of e, e_bias and the biases."""
    found, dtype = {}, t.e.dtype
    if needs.e:
        found["e"] = (dy * z2).sum(PIXELS, dtype=dtype)
    if needs.bias or needs.delta_bias or needs.e_bias:
        d = dy.sum(PIXELS, dtype=dtype)  # [M, B, O]
        if needs.bias:
            found["bias"] = d.sum((0, 1) if t.bias.ndim == 1 else 1)
        if needs.delta_bias:
            found["delta_bias"] = (d * t.e_bias).sum((0, 1) if t.delta_bias.ndim == 1 else 1)
        if needs.e_bias:
            found["e_bias"] = d * _rows(t.delta_bias)
    return found


def _small_in(dtype: torch.dtype, t: Inputs) -> Inputs:
    """All but x as x rounds it, and then in `dtype`."""
    x, *others = t
    return Inputs(x, *rounded(dtype, *rounded(x.dtype, *others)))


def offsets(t: Inputs) -> Tensor | None:
    """What the biases add: [M, B, O], or with 1 for M or B where nothing differs by them."""
    shift = None if t.bias is None else _rows(t.bias)
    shift = shift.unsqueeze(0) if shift is not None and shift.ndim == 2 else shift
    if t.delta_bias is None:
        return shift
    response = _rows(t.delta_bias) * t.e_bias
    return response if shift is None else shift + response


def _rows(t: Tensor) -> Tensor:
    """[M, O] or [O] as it meets [M, B, O]."""
    return t.unsqueeze(-2)


def _merged(weight: Tensor, r, s, conv: Conv, m: int) -> Tensor:
    scale = pair_scale(r, s, weight, conv, m)
    return weight if scale is None else weight * scale


def _stacked(ts: list[Tensor]) -> Tensor:
    """[M, B, ...] of the members' [B, ...], in their memory format."""
    return ts[0].unsqueeze(0) if len(ts) == 1 else torch.cat(ts).unflatten(0, (len(ts), -1))
