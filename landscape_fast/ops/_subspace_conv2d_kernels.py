"""The registered kernels of the member convolution: all members in one launch.

`x` is [M, B, I, H, W], or [1, B, I, H, W] where the members share it; `weight` is
[M, O, I, kh, kw], or with `coeffs` [M, K] the anchors [K, O, I, kh, kw], from which the kernel
forms weights itself. A channels-last x or weight makes a channels-last y.

A way is the name of a module that has, with `options` as (stride, pads, dilation), where pads are
zeros above, left, below and right, and weights and their gradient as a contiguous
[., O, kh, kw, I]:

obstacle(weight, options) -> str: why it cannot, for a shape as in the op; empty where it can.
forward(x, weight, coeffs, bias, y, options): fills y.
input_gradient(dy, weight, coeffs, dx, options): fills dx, the sum over members where it is shared.
weight_gradient(dy, x, dweight, options): fills dweight, float32.
"""

from functools import cache

import torch
from torch import Tensor

from landscape_fast.ops import _dispatch, _subspace_conv2d_cuda, _subspace_conv2d_triton
from landscape_fast.ops._batch_ensemble_conv2d_fused import _images, channels_last, pads_of
from landscape_fast.ops._batch_ensemble_conv_checks import Conv
from landscape_fast.ops._library import define

OP = "subspace_conv2d"
MODULES = {"triton": _subspace_conv2d_triton, "cuda": _subspace_conv2d_cuda}


@cache
def _runs(way: str, device: str, dtype: torch.dtype) -> bool:
    try:
        _dispatch.explain(OP, device, dtype, way)
    except ValueError:
        return False
    return True


_runs._dynamo_marked_constant = True  # torch.compile may take its answer for granted


def obstacle(way: str, weight: Tensor, conv: Conv) -> str:
    """Why a backend cannot do this convolution; empty where it can."""
    if conv.groups != 1:
        return "groups must be 1"
    return MODULES[way].obstacle(tuple(weight.shape), _options(conv))


def usable(x: Tensor, weight: Tensor, conv: Conv) -> tuple[str, ...]:
    """The backends that can do it here."""
    here = [way for way in MODULES if _runs(way, x.device.type, x.dtype)]
    return tuple([way for way in here if not obstacle(way, weight, conv)])


def _options(conv: Conv) -> tuple[tuple[int, ...], ...]:
    """(stride, pads, dilation)"""
    return tuple(conv.stride), tuple(pads_of(conv)), tuple(conv.dilation)


def _packed(weight: Tensor, coeffs: Tensor | None, like: Tensor) -> Tensor:
    """[., O, kh, kw, I]: a view where it lies so already. Own weights take the dtype of `like`."""
    weight = weight.permute(0, 1, 3, 4, 2)
    return (weight.to(like.dtype) if coeffs is None else weight).contiguous()


def _forward_fake(x, weight, coeffs, bias, stride, pads, dilation, way):
    kernel, size = weight.shape[3:], x.shape[3:]
    out = [
        (size[d] + pads[d] + pads[d + 2] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    ]
    members = weight.shape[0] if coeffs is None else coeffs.shape[0]
    last = channels_last(x) or channels_last(weight)
    return _images(x, last, members, x.shape[1], weight.shape[1], *out)


def _forward_impl(x, weight, coeffs, bias, stride, pads, dilation, way):
    y = _forward_fake(x, weight, coeffs, bias, stride, pads, dilation, way)
    weight = _packed(weight, coeffs, x)
    MODULES[way].forward(x, weight, coeffs, bias, y, (stride, pads, dilation))
    return y


def _input_gradient_fake(dy, x, weight, coeffs, stride, pads, dilation, way):
    return _images(x, channels_last(x), *x.shape)


def _input_gradient_impl(dy, x, weight, coeffs, stride, pads, dilation, way):
    dx = _input_gradient_fake(dy, x, weight, coeffs, stride, pads, dilation, way)
    weight = _packed(weight, coeffs, dy)
    MODULES[way].input_gradient(dy, weight, coeffs, dx, (stride, pads, dilation))
    return dx


def _weight_gradient_fake(dy, x, kernel, stride, pads, dilation, way):
    M, O, I = dy.shape[0], dy.shape[2], x.shape[2]
    return x.new_empty((M, O, *kernel, I), dtype=torch.float32)


def _weight_gradient_impl(dy, x, kernel, stride, pads, dilation, way):
    dweight = _weight_gradient_fake(dy, x, kernel, stride, pads, dilation, way)
    MODULES[way].weight_gradient(dy, x, dweight, (stride, pads, dilation))
    return dweight


_HOW = "int[] stride, int[] pads, int[] dilation, str way) -> Tensor"
forward_op = define(
    f"subspace_conv2d(Tensor x, Tensor weight, Tensor? coeffs, Tensor? bias, {_HOW}",
    _forward_impl,
    _forward_fake,
)
input_gradient_op = define(
    f"subspace_conv2d_dx(Tensor dy, Tensor x, Tensor weight, Tensor? coeffs, {_HOW}",
    _input_gradient_impl,
    _input_gradient_fake,
)
weight_gradient_op = define(  # dweight is [M, O, kh, kw, I]
    f"subspace_conv2d_dweight(Tensor dy, Tensor x, int[] kernel, {_HOW}",
    _weight_gradient_impl,
    _weight_gradient_fake,
)


def forward(x, weight, coeffs, bias, conv: Conv, way: str) -> Tensor:
    """y [M, B, O, H', W']; with `coeffs`, weight and bias are anchors."""
    return forward_op(x, weight, coeffs, bias, *map(list, _options(conv)), way)


def input_gradient(dy, x, weight, coeffs, conv: Conv, way: str) -> Tensor:
    """dx, shaped as x."""
    return input_gradient_op(dy, x, weight, coeffs, *map(list, _options(conv)), way)


def weight_gradient(dy, x, kernel: tuple[int, ...], conv: Conv, way: str) -> Tensor:
    """dweight [M, O, I, kh, kw], float32."""
    dweight = weight_gradient_op(dy, x, list(kernel), *map(list, _options(conv)), way)
    return dweight.permute(0, 1, 4, 2, 3)
