"""Forward and backward of the member convolution: y_m = conv(x_m, W_m) + b_m.

`x` is [M, B, I, H, W], or [1, B, I, H, W] where the members share it. With coeffs [M, K], weight
and bias are anchors, which the kernel of the way "mixed" combines itself. Weights may have float32
where `x` has 16 bits: they are rounded for the products, and their gradient is not.
"""

import torch
from torch import Tensor

from landscape_fast.ops import _subspace_conv2d_kernels as kernels
from landscape_fast.ops import _subspace_conv2d_ways as ways
from landscape_fast.ops._batch_ensemble_conv_checks import Conv
from landscape_fast.ops._batch_ensemble_conv_ways import summing_dtype
from landscape_fast.ops._combine_parts import combine_backward_op, views
from landscape_fast.ops._dispatch import (
    held,
    pick,
    reference_backward,
    rounded,
    wants_grad,
    wants_graph,
    without_autocast,
)
from landscape_fast.ops._subspace_conv2d_plan import LIBRARY, Plan
from landscape_fast.ops.combine import combine_reference


def definition(x, weight, coeffs, bias, conv: Conv) -> Tensor:
    """The op in plain PyTorch, of prepared tensors."""
    if coeffs is not None:
        weight = combine_reference(coeffs, weight)
        bias = None if bias is None else combine_reference(coeffs, bias)
    return ways.definition(x, weight, bias, conv)


class _MemberConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, coeffs, bias, conv, plan):
        ctx.save_for_backward(x, weight, coeffs, bias)
        ctx.conv, ctx.plan = conv, plan
        return _forward(x, weight, coeffs, bias, conv, plan.y)

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


def _forward(x, weight, coeffs, bias, conv: Conv, way: str) -> Tensor:
    if way in LIBRARY:
        return ways.forward(x, *rounded(x.dtype, weight, bias), conv, way)
    return kernels.forward(x, weight, coeffs, bias, conv, way)


def _gradients(dy, x, weight, coeffs, bias, needs, conv: Conv, plan: Plan):
    """dx, dweight, dcoeffs, dbias."""
    dx = dweight = dcoeffs = dbias = None
    if needs[0]:
        if plan.dx in LIBRARY:
            (low,) = rounded(x.dtype, weight)
            dx = ways.input_gradient(dy, x, low, conv, plan.dx)
        else:
            dx = kernels.input_gradient(dy, x, weight, coeffs, conv, plan.dx)
    if needs[1] or needs[2]:
        dweight = _weight_gradient(dy, x, weight, conv, plan.dweight).to(weight.dtype)
    if bias is not None and (needs[3] or needs[2]):
        dbias = dy.sum((1, 3, 4), dtype=summing_dtype(dy.dtype)).to(bias.dtype)
    if coeffs is not None and any(needs[1:]):
        return dx, *_of_anchors(weight, coeffs, bias, dweight, dbias, needs)
    return dx, dweight, dcoeffs, dbias


def _weight_gradient(dy, x, weight, conv: Conv, way: str) -> Tensor:
    if way not in LIBRARY:
        return kernels.weight_gradient(dy, x, tuple(weight.shape[3:]), conv, way)
    # factors in float32 where the result is held there; that changes no value, nor would tf32
    dtype = torch.float32 if held(x, (weight,), (True,)) else x.dtype
    return ways.weight_gradient(*rounded(dtype, dy, x, weight), conv, way)


def _of_anchors(anchors, coeffs, bias, dweight, dbias, needs):
    """Gradients of the anchors, coefficients and anchor biases from those of what they make."""
    parts = [(anchors, dweight, needs[1]), (bias, dbias, needs[3])]
    parts = [part for part in parts if part[1] is not None]
    given = [t.contiguous() for t, _, _ in parts]
    wanted = [need for _, _, need in parts]
    backend = pick("combine", "auto", anchors)
    dcoeffs, buffer = combine_backward_op(
        coeffs, given, [d.contiguous() for _, d, _ in parts], None, list(range(len(parts))),
        needs[2], wanted, "triton" if backend == "torch" else backend,
    )  # fmt: skip
    kept = [t for t, need in zip(given, wanted, strict=True) if need]
    found = iter(views(buffer, coeffs.shape[1], kept))
    danchors = next(found) if needs[1] else None
    return danchors, dcoeffs if needs[2] else None, next(found) if needs[3] else None


def apply(x, weight, coeffs, bias, conv: Conv, plan: Plan) -> Tensor:
    """[M, B, O, H', W'] by the ways of a plan; coeffs where those mix anchors."""
    if wants_grad(x, weight, coeffs, bias):
        return _MemberConv.apply(x, weight, coeffs, bias, conv, plan)
    return _forward(x, weight, coeffs, bias, conv, plan.y)
