"""A linear layer of M members whose weights are functions of hyperparameters (hyper-batch)."""

import torch
from torch import Tensor

from landscape_fast.ops import _hyper_batch as shared
from landscape_fast.ops._batch_ensemble_linear_ways import members_dim, per_row, scaled
from landscape_fast.ops._checks import FLOATS, names, require
from landscape_fast.ops._dispatch import (
    autocast,
    declare,
    pick,
    reference_backward,
    transforming,
    wants_grad,
    wants_graph,
)
from landscape_fast.ops._hyper_batch_linear_ways import Inputs, composed, composed_backward

OP = "hyper_batch_linear"
LAYOUTS = ("member_major", "batch_major", "folded")

declare(OP)


def hyper_batch_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    e: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    u: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    delta_bias: Tensor | None = None,
    e_bias: Tensor | None = None,
    *,
    layout: str = "member_major",
    backend: str = "auto",
) -> Tensor:
    r"""M linear layers with weights `weight * s r^T + delta * v u^T * e`, e differing by example.

    .. math:: y_{mbo} = s_{mo} \sum_i w_{oi} r_{mi} x_{mbi}
        + e_{mbo} v_{mo} \sum_i d_{oi} u_{mi} x_{mbi} + b_{mo} + d^b_{mo} e^b_{mbo}

    With e a function of hyperparameters that are drawn per example, one network answers for all of
    them: a hyper-batch ensemble. One member without factors is a self-tuning network.

    Args:
        x: [M, B, I], any strides; or [B, I], read by all members without a copy. In layout
            "batch_major" [B, M, I] or [B, I]; in "folded" [M*B, I], the rows of a member together.
        weight: [O, I], shared by members and hyperparameters. Of the dtype of `x`; where that is
            bfloat16 or float16, this and all that follow may be float32.
        delta: [O, I], what responds to the hyperparameters.
        e: [M, B, O], how much it responds; rows and layout as in the result.
        r: [M, I], scales the input features of `weight` for each member; None for ones.
        s: [M, O], scales its output features; None for ones.
        u: [M, I], as r for `delta`; None for r itself, whose gradient then has both parts.
        v: [M, O], as s for `delta`; None for s itself.
        bias: [M, O], one per member, or [O], one for all; None for zero.
        delta_bias: [M, O] or [O], the bias that responds; given together with e_bias.
        e_bias: how much it responds, shaped as e.
        layout: "member_major", "batch_major" or "folded".
        backend: "auto" or "torch"; see `landscape_fast.show_config`.

    Returns:
        [M, B, O], [B, M, O] or [M*B, O] as the layout says, contiguous, in the dtype of `x`.
        Under autocast x and e are cast to its dtype. Factors of products are rounded to the dtype
        of x; gradients of float32 parameters are summed and returned in float32.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or the layout disagree; if only one of delta_bias and
            e_bias is given; if the backend cannot run here.

    Cost: 4 * M * B * I * O flops, and twice as many for the gradients, plus half as many where ds
        is wanted. Of the activations x and (x * u) delta^T are kept for the backward, besides e.
        Gradients are deterministic, and differentiable again.

    Source: Wenzel et al. 2020 (arXiv:2006.13570); self-tuning networks: MacKay et al. 2019
        (arXiv:1903.03088).

    Example:
        >>> import torch
        >>> from landscape_fast.ops import hyper_batch_linear
        >>> x = torch.tensor([[1.0, 2.0]])  # one example, read by two members
        >>> weight, delta = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
        >>> e = torch.tensor([[[10.0]], [[0.0]]])  # only the first member responds
        >>> hyper_batch_linear(x, weight, delta, e)
        tensor([[[23.]],
        <BLANKLINE>
                [[ 3.]]])
    """
    tensors = Inputs(x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias)
    shared.check_types(OP, tensors._asdict())
    require(layout in LAYOUTS, OP, "layout", f"one of {LAYOUTS}", repr(layout))
    x, e, e_bias = autocast(x, e, e_bias)
    tensors = tensors._replace(x=x, e=e, e_bias=e_bias)
    members = _check(tensors, layout)
    pick(OP, backend, x)
    if transforming() or 0 in (*x.shape, *weight.shape):
        return hyper_batch_linear_reference(*tensors, layout=layout)
    tensors = tensors._replace(e=shared.rounded(e, x), e_bias=shared.rounded(e_bias, x))
    if layout == "folded":
        tensors = _unfolded(tensors, members)
    batch_major = layout == "batch_major"
    if wants_grad(*tensors):
        y = _HyperBatchLinear.apply(batch_major, *tensors)
    else:
        y = composed(tensors, batch_major)[0]
    return y.flatten(0, 1) if layout == "folded" else y


def hyper_batch_linear_reference(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    e: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    u: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    delta_bias: Tensor | None = None,
    e_bias: Tensor | None = None,
    *,
    layout: str = "member_major",
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    tensors = Inputs(x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias)
    if layout == "folded":
        M = _folded_members(tensors._asdict())
        return hyper_batch_linear_reference(*_unfolded(tensors, M)).flatten(0, 1)
    weight, delta, e, r, s, u, v, bias, delta_bias, e_bias = (
        shared.rounded(t, x) for t in tensors[1:]
    )
    r, s, u, v = shared.tied(r, s, u, v)
    batch_major = layout == "batch_major"

    def half(weight, r, s):
        y = scaled(x, r, batch_major) @ weight.T
        y = y if y.ndim == 3 else y.unsqueeze(members_dim(batch_major))
        return y if s is None else y * per_row(s, batch_major)

    y = half(weight, r, s) + half(delta, u, v) * e
    y = y if bias is None else y + per_row(bias, batch_major)
    return y if delta_bias is None else y + per_row(delta_bias, batch_major) * e_bias


def _unfolded(tensors: Inputs, members: int) -> Inputs:
    """[M*B, ...] -> [M, B, ...] for what differs by example."""
    rows = (members, tensors.x.shape[0] // members if members else 0)
    x, e, e_bias = (
        t if t is None else t.unflatten(0, rows) for t in (tensors.x, tensors.e, tensors.e_bias)
    )
    return tensors._replace(x=x, e=e, e_bias=e_bias)


def _folded_members(given: dict[str, Tensor | None]) -> int:
    """M of folded rows, which are one member where no factor says otherwise."""
    M = shared.per_member(given)
    return 1 if M is None else M


def _check(tensors: Inputs, layout: str) -> int:
    """Holds all arguments against each other; returns M."""
    x, e, given = tensors.x, tensors.e, tensors._asdict()
    shapes = {"member_major": "[M, B, I] or [B, I]", "batch_major": "[B, M, I] or [B, I]"}
    folded = layout == "folded"
    fits = x.ndim == 2 or (x.ndim == 3 and not folded)
    require(fits, OP, "x", shapes.get(layout, "[M*B, I]"), list(x.shape))
    require(x.dtype in FLOATS, OP, "x", f"one of {names(FLOATS)}", x.dtype)
    shared.check_fits(OP, "weight", tensors.weight, "O, I", (None, x.shape[-1]), x)
    O, I = tensors.weight.shape
    shared.check_fits(OP, "delta", tensors.delta, "O, I", (O, I), x)
    letters = {"member_major": "M, B, O", "batch_major": "B, M, O", "folded": "M*B, O"}[layout]
    members = members_dim(layout == "batch_major")
    if x.ndim == 3 or folded:
        rows = tuple(x.shape[:-1])
    else:
        M = e.shape[members] if e.ndim == 3 else None
        rows = (x.shape[0], M) if members else (M, x.shape[0])
    for name in ("e", "e_bias"):
        if given[name] is not None:
            shared.check_fits(OP, name, given[name], letters, (*rows, O), x)
    M = _folded_members(given) if folded else rows[members]
    shared.check_factors(OP, given, M, I, O, x)
    if folded:
        fits = x.shape[0] % M == 0 if M else x.shape[0] == 0
        require(fits, OP, "x", f"[M*B, I] with rows divisible by M = {M}", list(x.shape))
    return M


class _HyperBatchLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batch_major, *tensors):
        tensors = Inputs(*tensors)
        y, z2 = composed(tensors, batch_major)
        needs = Inputs(*ctx.needs_input_grad[1:])
        keep_z2 = needs.e or (needs.s if tensors.v is None else needs.v)
        ctx.save_for_backward(*tensors, z2 if keep_z2 else None)
        ctx.batch_major = batch_major
        return y

    @staticmethod
    def backward(ctx, dy):
        device = dy.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # gradients stay in the dtype of the op
                return _HyperBatchLinear.backward(ctx, dy)
        *tensors, z2 = ctx.saved_tensors
        needs = Inputs(*ctx.needs_input_grad[1:])
        if wants_graph():
            layout = "batch_major" if ctx.batch_major else "member_major"

            def definition(*tensors):
                return hyper_batch_linear_reference(*tensors, layout=layout)

            return None, *reference_backward(definition, tensors, needs, dy)
        return None, *composed_backward(dy, Inputs(*tensors), z2, needs, ctx.batch_major)
