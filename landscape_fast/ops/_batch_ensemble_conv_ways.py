"""The BatchEnsemble convolutions by library calls, in one to three dimensions, also transposed.

`x` is [M, B, I, *pixels], or [1, B, I, *pixels] where the members share it. Two ways, both of which
keep `x` alone for the backward:

once: one convolution of all images, with passes over its input and output for the factors. The
    backward makes x * r and the convolution again.
merged: a convolution for each member with its own weight `weight * s[m] * r[m]`, without any pass
    for the factors. Its weight gradient G_m gives all others: dweight = sum_m s_m G_m r_m,
    ds_m = sum_i weight G_m r_m, dr_m = sum_o weight G_m s_m, so nothing is divided by s.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape_fast.ops._batch_ensemble_conv_checks import Conv
from landscape_fast.ops._checks import LOW
from landscape_fast.ops._dispatch import as_rounded, rounded

_conv_backward = torch.ops.aten.convolution_backward.default


def spread(t: Tensor, dims: int) -> Tensor:
    """A factor [M, F] as it meets [M, B, F, *pixels]; a shared [F] as it meets the same."""
    t = t.unsqueeze(1) if t.ndim == 2 else t
    return t[(..., *[None] * dims)]


def convolve(images: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """One plain convolution of images that are padded already."""
    dims = weight.ndim - 2
    if conv.transposed:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        more = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    else:
        function = getattr(F, f"conv{dims}d")
        more = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return function(images, weight, bias, *more)


def convolve_backward(dy, images, weight, conv: Conv, need_x: bool, need_weight: bool):
    """(gradient of the padded images, gradient of the weight), each if needed."""
    options = (conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding)
    options = [list(o) if isinstance(o, tuple) else o for o in options]
    mask = [need_x, need_weight, False]
    return _conv_backward(dy, images, weight, None, *options, conv.groups, mask)[:2]


def padded(images: Tensor, conv: Conv) -> Tensor:
    """The padding that the convolution does not do itself."""
    return F.pad(images, conv.before, mode=conv.mode) if conv.before else images


def unpadded(t: Tensor, conv: Conv) -> Tensor:
    """The gradient of images from that of `padded(images)`."""
    for at in range(0, len(conv.before), 2):
        dim = t.ndim - 1 - at // 2
        low, high = conv.before[at : at + 2]
        n = t.shape[dim] - low - high
        first, last = t.narrow(dim, 0, low), t.narrow(dim, low + n, high)
        t = t.narrow(dim, low, n)
        if conv.mode == "constant" or not low + high:
            continue
        t = t.clone()
        if conv.mode == "reflect":
            t.narrow(dim, 1, low).add_(first.flip(dim))
            t.narrow(dim, n - 1 - high, high).add_(last.flip(dim))
        elif conv.mode == "replicate":
            t.narrow(dim, 0, 1).add_(first.sum(dim, keepdim=True))
            t.narrow(dim, n - 1, 1).add_(last.sum(dim, keepdim=True))
        else:
            t.narrow(dim, n - low, low).add_(first)
            t.narrow(dim, 0, high).add_(last)
    return t


def definition(x, weight, r, s, bias, conv: Conv, activation) -> Tensor:
    """The op in plain PyTorch: what every way is tested against, in float64."""
    dims, dtype = weight.ndim - 2, x.dtype
    x, weight, r, s, bias = as_rounded(x, weight, r, s, bias)
    x = x if r is None else x * spread(r, dims)
    inner = bias if s is None and bias is not None and bias.ndim == 1 else None
    y = convolve(padded(x.flatten(0, 1), conv), weight, inner, conv).unflatten(0, x.shape[:2])
    y = y if s is None else y * spread(s, dims)
    y = y if bias is None or inner is not None else y + spread(bias, dims)
    y = F.relu(y) if activation == "relu" else y
    return y.to(dtype)


def pair_scale(r, s, weight: Tensor, conv: Conv, m: int) -> Tensor | None:
    """s[m, o] * r[m, i] as it meets a weight; None for ones."""
    first, second = (r, s) if conv.transposed else (s, r)
    scale = None if first is None else first[m][:, None]
    if second is not None:
        # channel j of group g is feature g * J + j, J = weight.shape[1]
        per_group = second[m].unflatten(0, (conv.groups, -1))
        spread_out = per_group.repeat_interleave(weight.shape[0] // conv.groups, 0)
        scale = spread_out if scale is None else scale * spread_out
    return None if scale is None else scale[(..., *[None] * (weight.ndim - 2))]


def summing_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what to multiply and add small things: float32 for the 16-bit types."""
    return torch.float32 if dtype in LOW else dtype


def forward_once(x, weight, r, s, bias, conv: Conv) -> Tensor:
    """[M, B, O, *pixels] from one convolution of all images."""
    dims = weight.ndim - 2
    x = x if r is None else x * spread(r, dims)
    inner = bias if s is None and bias is not None and bias.ndim == 1 else None
    y = convolve(padded(x.flatten(0, 1), conv), weight, inner, conv).unflatten(0, x.shape[:2])
    if s is not None and bias is not None:
        return torch.addcmul(spread(bias, dims), y, spread(s, dims))
    y = y if s is None else y * spread(s, dims)
    return y if bias is None or inner is not None else y + spread(bias, dims)


def forward_merged(x, weight, r, s, bias, members, conv: Conv) -> Tensor:
    """[M, B, O, *pixels] from a convolution for each member."""
    weight, r, s = rounded(summing_dtype(x.dtype), weight, r, s)
    ys = []
    for m in range(members):
        scale = pair_scale(r, s, weight, conv, m)
        own = (weight if scale is None else weight * scale).to(x.dtype)
        own_bias = bias if bias is None or bias.ndim == 1 else bias[m]
        ys.append(convolve(padded(x[m if x.shape[0] > 1 else 0], conv), own, own_bias, conv))
    return ys[0].unsqueeze(0) if members == 1 else torch.cat(ys).unflatten(0, (members, -1))


def backward_once(dy, x, weight, r, s, needs, conv: Conv):
    """dx, dweight, dr, ds: the plain formula, after x * r and the convolution are made again."""
    need_x, need_weight, need_r, need_s = needs
    dims = weight.ndim - 2
    sums = (1, *range(3, 3 + dims))
    dx = dweight = dr = ds = None
    h = x if r is None else x * spread(r, dims)
    rows, h = h.shape[:2], padded(h.flatten(0, 1), conv)
    if need_s:
        ds = (dy * convolve(h, weight, None, conv).unflatten(0, rows)).sum(sums)
    if not (need_x or need_weight or need_r):
        return dx, dweight, dr, ds
    d = dy if s is None else dy * spread(s, dims)
    if x.shape[0] == 1 and r is None:  # one product serves all members
        d = d.sum(0, keepdim=True)
    t, dweight = convolve_backward(d.flatten(0, 1), h, weight, conv, need_x or need_r, need_weight)
    if t is not None:
        t = unpadded(t, conv).unflatten(0, d.shape[:2])
        if need_r:
            dr = (t * x).sum(sums)
        if need_x:
            dx = t if r is None else t * spread(r, dims)
            dx = dx.sum(0, keepdim=True) if dx.shape[0] > x.shape[0] else dx
    return dx, dweight, dr, ds


def backward_merged(dy, x, weight, r, s, needs, conv: Conv, exact: bool):
    """dx, dweight, dr, ds from a convolution backward for each member.

    `exact` keeps 16-bit rounding out of the weight gradients: their factors become float32, which
    changes no value (nor would tf32).
    """
    need_x, need_weight, need_r, need_s = needs
    need_g, shared = need_weight or need_r or need_s, x.shape[0] == 1
    weight, r, s = rounded(summing_dtype(x.dtype), weight, r, s)
    kernel = tuple(range(2, weight.ndim))
    dxs, drs, dss = [], [], []
    dweight = torch.zeros_like(weight) if need_weight else None
    for m in range(dy.shape[0]):
        images, d = padded(x[0 if shared else m], conv), dy[m]
        scale = pair_scale(r, s, weight, conv, m)
        own = (weight if scale is None else weight * scale).to(x.dtype)
        t, g = convolve_backward(d, images, own, conv, need_x, need_g and not exact)
        if need_g and exact:
            d, images = d.to(weight.dtype), images.to(weight.dtype)
            g = convolve_backward(d, images, weight, conv, False, True)[1]
        if need_x:
            t = unpadded(t, conv)
            if not shared:
                dxs.append(t)
            else:
                dxs = [t.to(weight.dtype) if m == 0 else dxs[0] + t]
        if need_weight:
            dweight += g if scale is None else g * scale
        if need_r or need_s:
            factor_gradients((g * weight).sum(kernel), r, s, conv, m, drs, dss)
    dx = None
    if need_x:
        dx = (dxs[0] if len(dxs) == 1 else torch.cat(dxs)).to(x.dtype)
        dx = dx.unflatten(0, x.shape[:2])
    dr = torch.stack(drs) if need_r else None
    return dx, dweight, dr, torch.stack(dss) if need_s else None


def factor_gradients(p: Tensor, r, s, conv: Conv, m: int, drs: list, dss: list) -> None:
    """Appends dr_m and ds_m from p = weight * G_m, summed over the kernel."""
    first, second, of_first, of_second = (r, s, drs, dss) if conv.transposed else (s, r, dss, drs)
    rows = p.unflatten(0, (conv.groups, -1))  # [groups, F / groups, J]
    if first is not None:
        scaled = p if second is None else rows * second[m].view(conv.groups, 1, -1)
        of_first.append(scaled.sum(-1).flatten())
    if second is not None:
        scaled = rows if first is None else rows * first[m].view(conv.groups, -1, 1)
        of_second.append(scaled.sum(1).flatten())
