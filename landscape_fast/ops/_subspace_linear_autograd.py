"""Forward and backward of the member product, by the ways of a plan.

`x` is [M, B, I] with any strides, or [B, I] where the members share it, and y is [M, B, O]. With
`coeffs`, weight and bias are those of the K anchors, and the kernels mix them. Parameters may have
float32 where x has 16 bits: they are rounded for the products, and their gradient is not.
"""

import torch
from torch import Tensor

from landscape_fast.ops import _subspace_linear_ways as ways
from landscape_fast.ops._combine_parts import combine_backward_op, views
from landscape_fast.ops._dispatch import (
    pick,
    reference_backward,
    rounded,
    wants_grad,
    wants_graph,
    without_autocast,
)
from landscape_fast.ops._subspace_linear_kernels import product, weight_gradient_op
from landscape_fast.ops._subspace_linear_plan import Plan
from landscape_fast.ops.combine import combine_reference


def apply(x, weight, coeffs, bias, batch_major: bool, plan: Plan) -> Tensor:
    """y [M, B, O]; in memory [B, M, O] where the way may choose and `batch_major` says so."""
    if wants_grad(x, weight, coeffs, bias):
        return _MemberLinear.apply(x, weight, coeffs, bias, batch_major, plan)
    return _forward(x, weight, coeffs, bias, batch_major, plan.y)


def definition(x, weight, coeffs, bias) -> Tensor:
    """The op in plain PyTorch, for every transform."""
    if coeffs is not None:
        weight = combine_reference(coeffs, weight)
        bias = None if bias is None else combine_reference(coeffs, bias)
    return ways.definition(x, weight, bias)


def _forward(x, weight, coeffs, bias, batch_major, way):
    if way == "mixed":
        return product(x, weight, coeffs, bias, coeffs.shape[0], batch_major)
    weight, bias = rounded(x.dtype, weight, bias)
    if way == "fused":
        return product(x, weight, None, bias, weight.shape[0], batch_major)
    with without_autocast(x.device.type):
        return ways.forward(x, weight, bias, batch_major, way)


class _MemberLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, coeffs, bias, batch_major, plan):
        ctx.save_for_backward(x, weight, coeffs, bias)
        ctx.batch_major, ctx.plan = batch_major, plan
        return _forward(x, weight, coeffs, bias, batch_major, plan.y)

    @staticmethod
    def backward(ctx, dy):
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:4]
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            if wants_graph():
                found = reference_backward(definition, tensors, needs, dy)
            else:
                found = _gradients(dy, *tensors, needs, ctx.batch_major, ctx.plan)
        return *found, None, None


def _gradients(dy, x, weight, coeffs, bias, needs, batch_major, plan):
    need_x, need_weight, need_coeffs, need_bias = needs
    dx = dweight = dcoeffs = dbias = None
    if need_x:
        dx = _input_gradient(dy, x, weight, coeffs, batch_major, plan.dx)
    if need_weight or need_coeffs:
        with_bias = bias is not None and (need_bias or need_coeffs)
        dweight, dbias = _weight_gradient(dy, x, weight.dtype, with_bias, plan.dweight)
    elif need_bias:
        dbias = dy.sum(1, dtype=bias.dtype)
    if coeffs is not None:
        parts = [(weight, dweight, need_weight), (bias, dbias, need_bias)]
        parts = [part for part in parts if part[1] is not None]
        if parts:
            dcoeffs, found = unmixed(coeffs, *zip(*parts, strict=True), need_coeffs)
            dbias = found.pop() if dbias is not None else None
            dweight = found.pop() if dweight is not None else None
    return dx, dweight if need_weight else None, dcoeffs, dbias if need_bias else None


def _input_gradient(dy, x, weight, coeffs, batch_major, way):
    if way == "mixed":
        return product(dy, weight, coeffs, None, dy.shape[0], batch_major, turned=True)
    (weight,) = rounded(x.dtype, weight)
    if way == "fused":
        return product(dy, weight, None, None, dy.shape[0], batch_major, turned=True)
    return ways.input_gradient(dy, weight, way)


def _weight_gradient(dy, x, dtype, need_bias, way):
    """Those of the members' weights and biases, in `dtype`."""
    if way == "fused":
        dweight, dbias = weight_gradient_op(dy, x, dtype, need_bias)
        return dweight, dbias if need_bias else None
    dweight = ways.weight_gradient(dy, x, dtype, way)
    return dweight, dy.sum(1, dtype=dtype) if need_bias else None


def unmixed(coeffs, anchors, grads, needs, need_coeffs):
    """Gradients of coefficients and anchors (None: unwanted) from those of the members' tensors."""
    name = pick("combine", "auto", anchors[0])
    if name == "torch":
        wide = torch.promote_types(anchors[0].dtype, torch.float32)
        dcoeffs = None
        if need_coeffs:
            pairs = zip(grads, anchors, strict=True)
            dcoeffs = sum(g.flatten(1).to(wide) @ a.flatten(1).to(wide).T for g, a in pairs)
            dcoeffs = dcoeffs.to(coeffs.dtype)
        turned = coeffs.T.to(wide)
        return dcoeffs, [
            torch.tensordot(turned, g.to(wide), 1).to(g.dtype) if need else None
            for g, need in zip(grads, needs, strict=True)
        ]
    parts = list(range(len(anchors)))
    given = (coeffs, list(anchors), list(grads), None, parts, need_coeffs, list(needs), name)
    dcoeffs, buffer = combine_backward_op(*given)
    wanted = [a for a, need in zip(anchors, needs, strict=True) if need]
    cut = iter(views(buffer, coeffs.shape[1], wanted))
    return dcoeffs if need_coeffs else None, [next(cut) if need else None for need in needs]
