"""Forward and backward of the member convolution: y_m = conv(x_m, W_m) + b_m.

`x` is [M, B, I, H, W], or [1, B, I, H, W] where the members share it. With coeffs [M, K], weight
and bias are anchors: kernels mix them as they go, or they are mixed first, and again for dx, so
that the weights of M members are not kept. Weights may have float32 where `x` has 16 bits: they are
rounded for the products, and their gradient is not.
"""

import torch
from torch import Tensor

from landscape_fast.ops import _subspace_conv2d_kernels as kernels
from landscape_fast.ops import _subspace_conv2d_ways as ways
from landscape_fast.ops._batch_ensemble_conv_checks import Conv
from landscape_fast.ops._batch_ensemble_conv_ways import summing_dtype
from landscape_fast.ops._dispatch import (
    held,
    reference_backward,
    rounded,
    wants_grad,
    wants_graph,
    without_autocast,
)
from landscape_fast.ops._subspace_conv2d_plan import LIBRARY, Plan
from landscape_fast.ops._subspace_linear_autograd import unmixed
from landscape_fast.ops.combine import combine, combine_reference


def definition(x, weight, coeffs, bias, conv: Conv) -> Tensor:
    """The op in plain PyTorch, of prepared tensors."""
    if coeffs is not None:
        weight = combine_reference(coeffs, weight)
        bias = None if bias is None else combine_reference(coeffs, bias)
    return ways.definition(x, weight, bias, conv)


def mixed(anchors: Tensor, coeffs: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The members' weights, in the memory format of the anchors, and their biases."""
    last = anchors.permute(0, 1, 3, 4, 2)
    channels_last = last.is_contiguous() and not anchors.is_contiguous()
    parts = [last if channels_last else anchors.contiguous()]
    weight, *rest = combine(coeffs, parts if bias is None else [*parts, bias.contiguous()])
    weight = weight.permute(0, 1, 4, 2, 3) if channels_last else weight
    return weight, rest[0] if rest else None


class _MemberConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, coeffs, bias, conv, plan):
        ctx.save_for_backward(x, weight, coeffs, bias)
        ctx.conv, ctx.plan = conv, plan
        return _forward(x, weight, coeffs, bias, conv, plan)

    @staticmethod
    def backward(ctx, dy):
        tensors, needs, conv = ctx.saved_tensors, ctx.needs_input_grad[:4], ctx.conv
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            if wants_graph():

                def plain(*tensors):
                    return definition(*tensors, conv)

                found = reference_backward(plain, tensors, needs, dy)
            else:
                found = _gradients(dy, *tensors, needs, conv, ctx.plan)
        return *found, None, None


def _forward(x, weight, coeffs, bias, conv: Conv, plan: Plan) -> Tensor:
    if coeffs is not None and not plan.mix:
        weight, bias = mixed(weight, coeffs, bias)
        coeffs = None
    if plan.y in LIBRARY:
        return ways.forward(x, *rounded(x.dtype, weight, bias), conv, plan.y)
    return kernels.forward(x, weight, coeffs, bias, conv, plan.y)


def _gradients(dy, x, weight, coeffs, bias, needs, conv: Conv, plan: Plan):
    """dx, dweight, dcoeffs, dbias."""
    need_x, need_weight, need_coeffs, need_bias = needs
    dx = dweight = dcoeffs = dbias = None
    if need_x:
        dx = _input_gradient(dy, x, weight, coeffs, conv, plan)
    if need_weight or need_coeffs:
        dweight = _weight_gradient(dy, x, weight, conv, plan.dweight).to(weight.dtype)
    if bias is not None and (need_bias or need_coeffs):
        dbias = dy.sum((1, 3, 4), dtype=summing_dtype(dy.dtype)).to(bias.dtype)
    if coeffs is None:
        return dx, dweight, None, dbias
    parts = [(weight, dweight, need_weight), (bias, dbias, need_bias)]
    parts = [(t.contiguous(), g.contiguous(), need) for t, g, need in parts if g is not None]
    if parts:
        dcoeffs, found = unmixed(coeffs, *zip(*parts, strict=True), need_coeffs)
        dbias = found.pop() if dbias is not None else None
        dweight = found.pop() if dweight is not None else None
    return dx, dweight, dcoeffs, dbias


def _input_gradient(dy, x, weight, coeffs, conv: Conv, plan: Plan) -> Tensor:
    if coeffs is not None and not plan.mix:
        weight, _ = mixed(weight, coeffs, None)
        coeffs = None
    if plan.dx not in LIBRARY:
        return kernels.input_gradient(dy, x, weight, coeffs, conv, plan.dx)
    return ways.input_gradient(dy, x, *rounded(x.dtype, weight), conv, plan.dx)


def _weight_gradient(dy, x, weight, conv: Conv, way: str) -> Tensor:
    """[M, O, I / groups, kh, kw]; of the weight the shape of a row and the dtype count."""
    if way not in LIBRARY:
        return kernels.weight_gradient(dy, x, tuple(weight.shape[3:]), conv, way)
    # factors in float32 where the result is held there; that changes no value, nor would tf32
    dtype = torch.float32 if held(x, (weight,), (True,)) else x.dtype
    dy, x, row = rounded(dtype, dy, x, weight[:1])
    return ways.weight_gradient(dy, x, row.expand(dy.shape[0], *row.shape[1:]), conv, way)


def apply(x, weight, coeffs, bias, conv: Conv, plan: Plan) -> Tensor:
    """[M, B, O, H', W'] by the ways of a plan."""
    if wants_grad(x, weight, coeffs, bias):
        return _MemberConv.apply(x, weight, coeffs, bias, conv, plan)
    return _forward(x, weight, coeffs, bias, conv, plan)
