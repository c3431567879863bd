"""The registered fused kernels of batch_ensemble_conv2d.

`x` is [M, B, I, H, W], or [1, B, I, H, W] where the members share it; `pads` are zeros above, left,
below and right. A channels-last x or weight makes a channels-last output.
"""

import torch
from torch import Tensor

from landscape_fast.ops._batch_ensemble_conv_checks import Conv
from landscape_fast.ops._library import define


def fusable(conv: Conv) -> str:
    """Why the kernels cannot do this convolution; empty where they can."""
    if conv.groups != 1:
        return "groups must be 1"
    return "" if conv.mode == "constant" else "padding_mode must be 'zeros'"


def pads_of(conv: Conv) -> list[int]:
    """Zeros above, left, below and right."""
    if conv.before:
        left, right, top, bottom = conv.before
        return [top, left, bottom, right]
    return [*conv.padding, *conv.padding]


def tf32_allowed() -> bool:
    """Whether torch may round float32 factors of a convolution to tf32 on CUDA."""
    cudnn = torch.backends.cudnn
    try:  # torch 2.9 and later; reading the old switch there fails once the new one was set
        return cudnn.conv.fp32_precision == "tf32"
    except AttributeError:
        return cudnn.allow_tf32


tf32_allowed._dynamo_marked_constant = True  # torch.compile cannot trace the switch


def kind_of(dtype: torch.dtype) -> str:
    """How products of this dtype are formed now: float32 follows torch's switch for cuDNN."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32_allowed() else "ieee"


def _images(like: Tensor, last: bool, *shape) -> Tensor:
    """An empty [M, B, C, H, W], channels last or not."""
    if not last:
        return like.new_empty(shape)
    M, B, C, H, W = shape
    return like.new_empty(M, B, H, W, C).permute(0, 1, 4, 2, 3)


def channels_last(t: Tensor) -> bool:
    """Whether channels (dimension -3) lie side by side; one channel, or one pixel, says nothing."""
    return t.stride(-3) == 1 and t.shape[-3] > 1 and (t.shape[-2] > 1 or t.shape[-1] > 1)


def _forward_fake(x, weight, r, s, bias, members, step, pads, dilation, relu):
    kernel, size = weight.shape[2:], x.shape[3:]
    out = [
        (size[d] + pads[d] + pads[d + 2] - dilation[d] * (kernel[d] - 1) - 1) // step[d] + 1
        for d in (0, 1)
    ]
    last = channels_last(x) or channels_last(weight)
    return _images(x, last, members, x.shape[1], weight.shape[0], *out)


def _forward_impl(x, weight, r, s, bias, members, step, pads, dilation, relu):
    from landscape_fast.kernels.batch_ensemble_conv2d import batch_ensemble_conv2d_fwd

    y = _forward_fake(x, weight, r, s, bias, members, step, pads, dilation, relu)
    tensors = (x, _packed(weight, x), r, s, bias, y)
    batch_ensemble_conv2d_fwd(*tensors, step, pads[:2], dilation, relu, tf32_allowed())
    return y


def _packed(weight: Tensor, x: Tensor) -> Tensor:
    """[O, kh, kw, I], rounded to the dtype of x: a view where it is, and lies, so already."""
    return weight.permute(0, 2, 3, 1).to(x.dtype).contiguous()


def _backward_fake(dy, x, weight, r, s, bias, needs, step, pads, dilation):
    O, I, kh, kw = weight.shape
    M = dy.shape[0]
    found = []
    shapes = ((O, kh, kw, I), (M, I), (M, O), None if bias is None else bias.shape)
    for like, shape, need in zip((weight, r, s, bias), shapes, needs[1:], strict=True):
        found.append(like.new_empty(shape) if need else x.new_empty(0))
    dx = _images(x, channels_last(x), *x.shape) if needs[0] else x.new_empty(0)
    return (dx, *found)


def _backward_impl(dy, x, weight, r, s, bias, needs, step, pads, dilation):
    from landscape_fast.kernels.batch_ensemble_conv2d_backward import batch_ensemble_conv2d_bwd

    found = _backward_fake(dy, x, weight, r, s, bias, needs, step, pads, dilation)
    wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
    tensors = (dy, x, _packed(weight, x), r, s, *wanted)
    batch_ensemble_conv2d_bwd(*tensors, step, pads[:2], dilation, tf32_allowed())
    return found


forward_op = define(
    "batch_ensemble_conv2d(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias,"
    " SymInt members, int[] step, int[] pads, int[] dilation, bool relu) -> Tensor",
    _forward_impl,
    _forward_fake,
)
backward_op = define(  # dweight is [O, kh, kw, I]
    "batch_ensemble_conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? r, Tensor? s,"
    " Tensor? bias, bool[] needs, int[] step, int[] pads, int[] dilation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def forward_fused(x, weight, r, s, bias, members: int, conv: Conv, activation) -> Tensor:
    """The forward by the kernel."""
    options = (list(conv.stride), pads_of(conv), list(conv.dilation))
    return forward_op(x, weight, r, s, bias, members, *options, activation == "relu")


def backward_fused(dy, x, weight, r, s, bias, needs, conv: Conv) -> list[Tensor | None]:
    """dx, dweight, dr, ds, dbias by the kernels."""
    options = (list(conv.stride), pads_of(conv), list(conv.dilation))
    found = backward_op(dy, x, weight, r, s, bias, list(needs), *options)
    found = [g if need else None for g, need in zip(found, needs, strict=True)]
    if found[1] is not None:
        found[1] = found[1].permute(0, 3, 1, 2)
    return found
