"""The member convolution by library calls: y_m = conv(x_m, W_m) + b_m.

`x` is [M, B, I, H, W], or [1, B, I, H, W] where the members share it; `weight` is
[M, O, I / groups, kh, kw]. Three ways, of which each makes y, dx and dweight:

loop: a convolution for each member.
grouped: one convolution with the members side by side, as groups of channels.
wide: of a shared x without groups, one convolution with the channels of all members.
"""

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_conv_checks import Conv
from landscape_fast.ops._batch_ensemble_conv_ways import (
    convolve,
    convolve_backward,
    padded,
    summing_dtype,
    unpadded,
)
from landscape_fast.ops._dispatch import as_rounded


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    """The member convolution in plain PyTorch: what every way is tested against, in float64."""
    dtype = x.dtype
    x, weight, bias = as_rounded(x, weight, bias)
    images, ys = padded(x.flatten(0, 1), conv).unflatten(0, x.shape[:2]), []
    for m, own in enumerate(weight):
        own_bias = None if bias is None else bias[m]
        ys.append(convolve(images[m if x.shape[0] > 1 else 0], own, own_bias, conv))
    return torch.stack(ys).to(dtype)


def beside(t: Tensor) -> Tensor:
    """[M, B, C, H, W] with the members' channels side by side: [B, M*C, H, W]."""
    return t.transpose(0, 1).flatten(1, 2)


def apart(t: Tensor, members: int) -> Tensor:
    """The reverse of `beside`: a view."""
    return t.unflatten(1, (members, -1)).transpose(0, 1)


def forward(x, weight, bias, conv: Conv, way: str) -> Tensor:
    """y [M, B, O, H', W'] by a way of the library."""
    members = weight.shape[0]
    if way == "loop":
        return _loop(x, weight, bias, conv)
    if way == "grouped":
        conv = _of_all(members, conv)
    images = beside(x) if x.shape[0] == members else x[0]
    if way == "grouped" and x.shape[0] < members:
        images = images.repeat(1, members, 1, 1)
    bias = None if bias is None else bias.flatten()
    return apart(convolve(padded(images, conv), weight.flatten(0, 1), bias, conv), members)


def _of_all(members: int, conv: Conv) -> Conv:
    """The options of one convolution of all members."""
    stride, padding, dilation, groups, *rest = conv  # torch 2.6 cannot compile `_replace`
    return Conv(stride, padding, dilation, members * groups, *rest)


def _loop(x, weight, bias, conv: Conv) -> Tensor:
    ys = []
    for m, own in enumerate(weight):
        images = padded(x[m if x.shape[0] > 1 else 0], conv)
        ys.append(convolve(images, own, None if bias is None else bias[m], conv))
    return joined(ys)


def joined(members: list[Tensor]) -> Tensor:
    """[M, B, C, H, W] of the members' [B, C, H, W], whose memory format it keeps."""
    if len(members) == 1:
        return members[0].unsqueeze(0)
    return torch.cat(members).unflatten(0, (len(members), -1))


def input_gradient(dy, x, weight, conv: Conv, way: str) -> Tensor:
    """dx, shaped as x."""
    members, shared = weight.shape[0], x.shape[0] == 1
    if way == "loop":
        dxs = []
        for m, own in enumerate(weight):
            images = padded(x[0 if shared else m], conv)
            t = unpadded(convolve_backward(dy[m], images, own, conv, True, False)[0], conv)
            if not shared:
                dxs.append(t)
            else:
                dxs = [t.to(summing_dtype(t.dtype)) if m == 0 else dxs[0] + t]
        return joined(dxs).to(x.dtype)
    images, conv = _together(x, members, conv, way)
    own = convolve_backward(beside(dy), images, weight.flatten(0, 1), conv, True, False)[0]
    own = unpadded(own, conv)
    if way == "wide":
        return own.unsqueeze(0)
    dx = apart(own, members)
    return dx.sum(0, keepdim=True) if shared and members > 1 else dx


def weight_gradient(dy, x, weight, conv: Conv, way: str) -> Tensor:
    """dweight, shaped as weight, whose values do not count, in the dtype of x."""
    if way == "loop":
        found = []
        for m in range(weight.shape[0]):
            images = padded(x[m if x.shape[0] > 1 else 0], conv)
            found.append(convolve_backward(dy[m], images, weight[m], conv, False, True)[1])
        return torch.stack(found)
    images, conv = _together(x, weight.shape[0], conv, way)
    flat = convolve_backward(beside(dy), images, weight.flatten(0, 1), conv, False, True)[1]
    return flat.view(weight.shape)


def _together(x, members: int, conv: Conv, way: str) -> tuple[Tensor, Conv]:
    """The images of the one convolution that serves all members, padded, and its options."""
    if way == "wide":
        return padded(x[0], conv), conv
    images = beside(x) if x.shape[0] == members else x[0].repeat(1, members, 1, 1)
    conv = _of_all(members, conv)
    return padded(images, conv), conv
