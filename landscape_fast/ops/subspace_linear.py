"""A linear layer of M members whose weights are mixed from K anchors, or are their own."""

import torch.nn.functional as F
from torch import Tensor

from landscape_fast.ops import _dispatch
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    autocast_input,
    declare,
    free,
    pick,
    transforming,
    wants_grad,
    without_autocast,
)
from landscape_fast.ops._subspace_linear_autograd import apply, definition
from landscape_fast.ops._subspace_linear_checks import OP, alone, check, check_types
from landscape_fast.ops._subspace_linear_plan import (
    PLAIN,
    Plan,
    composed_plan,
    forced_plan,
    plan_for,
)
from landscape_fast.ops.combine import combine, combine_reference

declare(OP, triton=KERNEL_DTYPES)


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
        backend: "auto", "torch" or "triton"; see `landscape_fast.show_config`. "auto" takes, for
            each shape, what is expected to be quicker: a kernel that mixes the weights of its
            tiles, `combine` before kernels for own weights, or before the library calls that
            "torch" names.

    Returns:
        [M, B, O], [B, M, O] or [M*B, O] in the dtype of `x`. The order of its elements in memory
        is not fixed. Autocast casts `x`. Weights are mixed in float32 (float64 for float64 anchors)
        and rounded once to the dtype of `anchors`.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices, strides or the layout disagree, or the backend
            cannot run here. Anchors are never copied to be mixed.

    Cost: 2 * M * B * I * O flops, and twice as many for the gradients, beside those of `combine`.
        One member with a weight of its own is `F.linear` itself, also under autocast, whose
        gradients are rounded as it rounds them. The backward keeps `x` and the weights, the mixed
        ones where no kernel mixes. Gradients are deterministic, and differentiable to any order.

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
    if backend in ("auto", "torch") and _dispatch.FORCED in ("auto", "torch"):
        rows = alone(x, anchors, coeffs, bias, layout)
        if rows is not None:
            return _plain(rows, anchors, bias, layout)
    check_types(x, anchors, coeffs, bias, layout)
    x, anchors, coeffs, bias = autocast_input(x, anchors, coeffs, bias)
    members = check(x, anchors, coeffs, bias, layout)
    name = pick(OP, backend, x)
    if transforming() or x.numel() == 0 or anchors.numel() == 0 or not members:
        with without_autocast(x.device.type):
            return subspace_linear_reference(x, anchors, coeffs, bias, layout=layout)
    if layout == "folded":
        rows = x.unflatten(0, (members, x.shape[0] // members))
    else:
        rows = x.transpose(0, 1) if layout == "batch_major" and x.ndim == 3 else x
    batch_major = layout == "batch_major"
    plan = _plan(name, backend, rows, anchors, coeffs, bias)
    if coeffs is not None and plan.y != "mixed":
        anchors, bias = _mixed(coeffs, anchors, bias)
        coeffs = None
    if plan.y == "plain":
        rows = x if x.ndim == 2 else x.squeeze(1 if batch_major else 0)
        return _plain(rows, anchors, bias, layout)
    y = apply(rows, anchors, coeffs, bias, batch_major, plan)
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
    if layout == "folded":
        M = anchors.shape[0] if coeffs is None else coeffs.shape[0]
        rows = x.unflatten(0, (M, x.shape[0] // M if M else 0))
        return definition(rows, anchors, coeffs, bias).flatten(0, 1)
    if layout == "member_major":
        return definition(x, anchors, coeffs, bias)
    rows = x.transpose(0, 1) if x.ndim == 3 else x
    return definition(rows, anchors, coeffs, bias).transpose(0, 1)


def _mixed(coeffs, anchors, bias):
    """Weights and biases of the members, in one launch."""
    if pick("combine", "auto", anchors) == "torch":  # a microsecond each, without further checks
        with without_autocast(anchors.device.type):
            shift = None if bias is None else combine_reference(coeffs, bias)
            return combine_reference(coeffs, anchors), shift
    if bias is None:
        return combine(coeffs, [anchors])[0], None
    return combine(coeffs, [anchors, bias])


def _plain(rows, weight, bias, layout):
    """What a plain layer does, for the one member that there is."""
    y = F.linear(rows, weight[0], None if bias is None else bias[0])
    return y if layout == "folded" else y.unsqueeze(1 if layout == "batch_major" else 0)


def _plan(name, backend, x, anchors, coeffs, bias) -> Plan:
    """How to run: as forced, or else as the tables say."""
    members = anchors.shape[0] if coeffs is None else coeffs.shape[0]
    shared = x.ndim == 2
    if name == "triton" and name in (backend, _dispatch.FORCED):
        return forced_plan(shared, coeffs)
    B, O = x.shape[-2], anchors.shape[1]
    if members == 1 and x.dtype == anchors.dtype:
        return PLAIN
    if name == "torch" or free(B, members):
        return composed_plan(x.device.type, shared, B, O)
    needs = (wants_grad(x), wants_grad(anchors, coeffs, bias))
    return plan_for(x, anchors, coeffs, bias, *needs)
