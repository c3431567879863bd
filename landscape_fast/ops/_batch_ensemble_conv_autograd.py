"""Forward and backward of the BatchEnsemble convolutions: `x` is all they keep of the activations.

(And the output, which the next layer keeps anyway, where there is a ReLU.)
"""

import torch
from torch import Tensor

from landscape_fast.ops import _batch_ensemble_conv_ways as ways
from landscape_fast.ops._batch_ensemble_conv2d_plan import Plan
from landscape_fast.ops._batch_ensemble_conv_checks import LOW, Conv
from landscape_fast.ops._dispatch import (
    reference_backward,
    rounded,
    wants_graph,
    without_autocast,
)


def run(x, weight, r, s, bias, members: int, conv: Conv, activation, way: str) -> Tensor:
    """The forward: [M, B, O, *pixels] from x [M, B, I, *pixels] or [1, B, I, *pixels]."""
    weight, r, s, bias = rounded(x.dtype, weight, r, s, bias)
    arguments = (x, weight, r, s, bias, members, conv)
    y = ways.forward_merged(*arguments) if way == "merged" else ways.forward_once(*arguments)
    return y.relu_() if activation == "relu" else y


class BatchEnsembleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, r, s, bias, members, conv, activation, forward, backward):
        y = run(x, weight, r, s, bias, members, conv, activation, forward)
        ctx.save_for_backward(x, weight, r, s, y if activation == "relu" else None)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.conv, ctx.members, ctx.way = conv, members, backward
        return y

    @staticmethod
    def backward(ctx, dy):
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            found = _graph(ctx, dy) if wants_graph() else _gradients(ctx, dy)
        return *found, None, None, None, None, None


def _graph(ctx, dy):
    """Gradients that carry a graph."""
    x, weight, r, s, y = ctx.saved_tensors
    dy = dy if y is None else dy * (y > 0)
    bias = None
    if ctx.bias is not None:
        bias = dy.new_zeros(ctx.bias[0], dtype=ctx.bias[1]).requires_grad_()

    def plain(*tensors):
        return ways.definition(*tensors, ctx.members, ctx.conv, None)

    return reference_backward(plain, (x, weight, r, s, bias), ctx.needs_input_grad[:5], dy)


def _gradients(ctx, dy):
    x, weight, r, s, y = ctx.saved_tensors
    *needs, need_bias = ctx.needs_input_grad[:5]
    dy = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    found, dbias = [None] * 4, None
    if need_bias:
        pixels = tuple(range(3, dy.ndim))
        sums = (0, 1, *pixels) if len(ctx.bias[0]) == 1 else (1, *pixels)
        dbias = dy.sum(sums, dtype=ways.summing_dtype(dy.dtype))
    if any(needs):
        arguments = (dy, x, *rounded(x.dtype, weight, r, s), needs, ctx.conv)
        exact = x.dtype in LOW and any(
            t is not None and t.dtype == torch.float32 for t in (weight, r, s)
        )
        if ctx.way == "merged" or exact:
            found = ways.backward_merged(*arguments, exact)
        else:
            found = ways.backward_once(*arguments)
    dtypes = [None if t is None else t.dtype for t in (x, weight, r, s)]
    dtypes.append(None if ctx.bias is None else ctx.bias[1])
    return [
        None if g is None else g.to(dtype) for g, dtype in zip((*found, dbias), dtypes, strict=True)
    ]


def composed(x, weight, r, s, bias, members: int, conv: Conv, activation, plan: Plan) -> Tensor:
    """The op by library calls; `x` as in `run`."""
    tensors = (x, weight, r, s, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return BatchEnsembleConv.apply(*tensors, members, conv, activation, *plan)
    return run(*tensors, members, conv, activation, plan.forward)
