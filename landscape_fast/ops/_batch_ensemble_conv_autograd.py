"""Forward and backward of the BatchEnsemble convolutions: `x` is all they keep of the activations.

(And the output, which the next layer keeps anyway, where there is a ReLU.)
"""

import torch
from torch import Tensor

from landscape_fast.ops import _batch_ensemble_conv2d_fused as fused
from landscape_fast.ops import _batch_ensemble_conv_ways as ways
from landscape_fast.ops._batch_ensemble_conv2d_plan import Plan
from landscape_fast.ops._batch_ensemble_conv_checks import Conv
from landscape_fast.ops._dispatch import (
    held,
    reference_backward,
    rounded,
    wants_grad,
    wants_graph,
    without_autocast,
)


def run(x, weight, r, s, bias, members: int, conv: Conv, activation, way: str) -> Tensor:
    """The forward: [M, B, O, *pixels] from x [M, B, I, *pixels] or [1, B, I, *pixels]."""
    if way == "fused":
        return fused.forward_fused(x, weight, r, s, bias, members, conv, activation)
    weight, r, s, bias = rounded(x.dtype, weight, r, s, bias)
    if way == "merged":
        y = ways.forward_merged(x, weight, r, s, bias, members, conv)
    else:
        y = ways.forward_once(x, weight, r, s, bias, conv)
    return y.relu_() if activation == "relu" else y


class BatchEnsembleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, r, s, bias, members, conv, activation, forward, backward):
        y = run(x, weight, r, s, bias, members, conv, activation, forward)
        ctx.save_for_backward(x, weight, r, s, bias, y if activation == "relu" else None)
        ctx.conv, ctx.way = conv, backward
        return y

    @staticmethod
    def backward(ctx, dy):
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            found = _graph(ctx, dy) if wants_graph() else _gradients(ctx, dy)
        return *found, None, None, None, None, None


def _graph(ctx, dy):
    """Gradients that carry a graph."""
    *tensors, y = ctx.saved_tensors
    dy = dy if y is None else dy * (y > 0)

    def plain(*tensors):
        return ways.definition(*tensors, ctx.conv, None)

    return reference_backward(plain, tensors, ctx.needs_input_grad[:5], dy)


def _gradients(ctx, dy):
    x, weight, r, s, bias, y = ctx.saved_tensors
    needs, conv = ctx.needs_input_grad[:5], ctx.conv
    dy = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    if ctx.way == "fused":
        return fused.backward_fused(dy, x, weight, r, s, bias, needs, conv)
    found, dbias = [None] * 4, None
    if needs[4]:
        pixels = tuple(range(3, dy.ndim))
        sums = (0, 1, *pixels) if bias.ndim == 1 else (1, *pixels)
        dbias = dy.sum(sums, dtype=ways.summing_dtype(dy.dtype))
    if any(needs[:4]):
        arguments = (dy, x, *rounded(x.dtype, weight, r, s), needs[:4], conv)
        exact = held(x, (weight, r, s), needs[1:4])
        if ctx.way == "merged" or exact:
            found = ways.backward_merged(*arguments, exact)
        else:
            found = ways.backward_once(*arguments)
    return [
        None if g is None else g.to(t.dtype)
        for g, t in zip((*found, dbias), (x, weight, r, s, bias), strict=True)
    ]


def apply(x, weight, r, s, bias, members: int, conv: Conv, activation, plan: Plan) -> Tensor:
    """The op; `x` as in `run`."""
    tensors = (x, weight, r, s, bias)
    if wants_grad(*tensors):
        return BatchEnsembleConv.apply(*tensors, members, conv, activation, *plan)
    return run(*tensors, members, conv, activation, plan.forward)
