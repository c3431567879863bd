"""A linear layer of M members whose weights are mixed from K anchors, or are their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape_fast.ops import _subspace_linear_ways as ways
from landscape_fast.ops._dispatch import (
    autocast_input,
    declare,
    pick,
    reference_backward,
    rounded,
    transforming,
    wants_grad,
    wants_graph,
    without_autocast,
)
from landscape_fast.ops._subspace_linear_checks import OP, check, check_types
from landscape_fast.ops._subspace_linear_plan import Plan, composed_plan
from landscape_fast.ops.combine import combine, combine_reference

declare(OP)


def subspace_linear(
    x: Tensor,
    anchors: Tensor,
    coeffs: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "member_major",
    backend: str = "auto",
) -> Tensor:
    r"""M linear layers whose weights are points of a subspace, in one pass.

    .. math::
        W_m = \sum_k c_{mk} A_k, \quad
        y_{mbo} = \sum_i W_{moi}\, x_{mbi} + \sum_k c_{mk} b_{ko}

    Args:
        x: [M, B, I], any strides; or [B, I], read by all members without a copy. In layout
            "batch_major" [B, M, I] or [B, I]; in "folded" [M*B, I], the rows of a member together.
        anchors: [K, O, I], the weights that are mixed; of the dtype of `x`, or float32 where `x`
            has 16 bits: then rounded to that for the products, with a float32 gradient.
        coeffs: [M, K], the coordinates of each member; any real numbers; float32 or the dtype of
            `anchors`. None: M = K, and each member has a weight of its own.
        bias: [K, O], mixed as the weights are, of the dtype of `anchors`; None for zero.
        layout: "member_major", "batch_major" or "folded".
        backend: "auto" or "torch"; see `landscape_fast.show_config`.

    Returns:
        [M, B, O], [B, M, O] or [M*B, O] in the dtype of `x`. The order of its elements in memory
        is not fixed. Autocast casts `x`. Weights are mixed in float32 and rounded once to the dtype
        of `anchors`.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices, strides or the layout disagree, or the backend
            cannot run here. Anchors are never copied to make up for a stride.

    Cost: 2 * M * B * I * O flops, and twice as many for the gradients, beside those of `combine`.
        One member with a weight of its own costs what `F.linear` costs. The backward keeps `x` and
        the mixed weights. Gradients are deterministic, and differentiable to any order.

    Source: the lines and simplexes of Wortsman et al. 2021 (arXiv:2102.10472), the curves of
        Garipov et al. 2018 (arXiv:1802.10026); with coeffs None, a deep ensemble.

    Example:
        >>> import torch
        >>> from landscape_fast.ops.subspace_linear import subspace_linear
        >>> ends = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two anchors, one output
        >>> line = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        >>> subspace_linear(torch.tensor([[2.0, 6.0]]), ends, line)[:, 0, 0]
        tensor([2., 4., 6.])
    """
    check_types(x, anchors, coeffs, bias, layout)
    x, anchors, coeffs, bias = autocast_input(x, anchors, coeffs, bias)
    members = check(x, anchors, coeffs, bias, layout)
    name = pick(OP, backend, x)
    if transforming() or x.numel() == 0 or anchors.numel() == 0 or not members:
        with without_autocast(x.device.type):
            return subspace_linear_reference(x, anchors, coeffs, bias, layout=layout)
    weight, shift = anchors, bias
    if coeffs is not None:
        weight, shift = _mixed(coeffs, anchors, bias, backend)
    if members == 1 and x.dtype == weight.dtype and name == "torch":
        return _alone(x, weight, shift, layout)
    if layout == "folded":
        rows = x.unflatten(0, (members, x.shape[0] // members))
    else:
        rows = x.transpose(0, 1) if layout == "batch_major" and x.ndim == 3 else x
    plan = _plan(name, rows, weight)
    batch_major = layout == "batch_major"
    if wants_grad(x, weight, shift):
        y = _MemberLinear.apply(rows, weight, shift, batch_major, plan)
    else:
        y = _forward(rows, weight, shift, batch_major, plan.y)
    return y.flatten(0, 1) if layout == "folded" else y.transpose(0, 1) if batch_major else y


def subspace_linear_reference(
    x: Tensor,
    anchors: Tensor,
    coeffs: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "member_major",
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    if coeffs is not None:
        anchors = combine_reference(coeffs, anchors)
        bias = None if bias is None else combine_reference(coeffs, bias)
    if layout == "folded":
        M = anchors.shape[0]
        y = ways.definition(x.unflatten(0, (M, x.shape[0] // M if M else 0)), anchors, bias)
        return y.flatten(0, 1)
    batch_major = layout == "batch_major"
    y = ways.definition(x.transpose(0, 1) if batch_major and x.ndim == 3 else x, anchors, bias)
    return y.transpose(0, 1) if batch_major else y


def _mixed(coeffs, anchors, bias, backend):
    """Weights and biases of the members, in one launch."""
    if bias is None:
        return combine(coeffs, [anchors])[0], None
    return combine(coeffs, [anchors, bias])


def _alone(x, weight, bias, layout):
    """What a plain layer does, for the one member that there is."""
    dim = {"member_major": 0, "batch_major": 1}.get(layout)
    rows = x if x.ndim == 2 else x.squeeze(dim)
    y = F.linear(rows, weight[0], None if bias is None else bias[0])
    return y if dim is None else y.unsqueeze(dim)


def _plan(name, x, weight) -> Plan:
    """How to run: as forced, or else as the tables say."""
    return composed_plan(x.device.type, x.ndim == 2, x.shape[-2], weight.shape[1])


def _forward(x, weight, bias, batch_major, way):
    weight, bias = rounded(x.dtype, weight, bias)
    with without_autocast(x.device.type):
        return ways.forward(x, weight, bias, batch_major, way)


class _MemberLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, batch_major, plan):
        ctx.save_for_backward(x, weight, bias)
        ctx.plan = plan
        return _forward(x, weight, bias, batch_major, plan.y)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            if wants_graph():
                found = reference_backward(ways.definition, (x, weight, bias), needs, dy)
            else:
                found = _gradients(dy, x, weight, bias, needs, ctx.plan)
        return *found, None, None


def _gradients(dy, x, weight, bias, needs, plan):
    dx = dweight = dbias = None
    if needs[0]:
        (low,) = rounded(x.dtype, weight)
        dx = ways.input_gradient(dy, low, plan.dx)
    if needs[1]:
        dweight = ways.weight_gradient(dy, x, weight.dtype, plan.dweight)
    if needs[2]:
        dbias = dy.sum(1, dtype=bias.dtype)
    return dx, dweight, dbias
