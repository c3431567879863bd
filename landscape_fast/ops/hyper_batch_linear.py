"""A linear layer of M members whose weights are functions of hyperparameters (hyper-batch)."""

import torch
from torch import Tensor

from landscape_fast.ops import _dispatch
from landscape_fast.ops import _hyper_batch as shared
from landscape_fast.ops._batch_ensemble_linear_ways import members_dim, per_row, scaled
from landscape_fast.ops._checks import FLOATS, check_tensor, check_types, names, require
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    as_rounded,
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
from landscape_fast.ops._hyper_batch import Inputs
from landscape_fast.ops._hyper_batch_linear_plan import Plan, plan_for
from landscape_fast.ops._hyper_batch_linear_ways import (
    composed,
    composed_backward,
    fused,
    fused_backward,
    two_layers,
)

OP = "hyper_batch_linear"
LAYOUTS = ("member_major", "batch_major", "folded")

COMPOSED = Plan("composed", "composed")
FUSED = Plan("fused", "fused")

declare(OP, cpp=(torch.float32,), triton=KERNEL_DTYPES)


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
        backend: "auto", "torch", "cpp" or "triton"; see `landscape_fast.show_config`. On CUDA
            tensors "auto" takes, for each shape, what is expected to be quicker: the Triton
            kernels, or the composition of library calls that "torch" names.

    Returns:
        [M, B, O], [B, M, O] or [M*B, O] as the layout says, contiguous, in the dtype of `x`.
        Under autocast x is cast to its dtype. What is multiplied is rounded to the dtype of x;
        gradients of float32 parameters are formed and returned in float32.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or the layout disagree; if only one of delta_bias and
            e_bias is given; if the backend cannot run here.

    Cost: 4 * M * B * I * O flops, and twice as many for the gradients; on the "torch" path half as
        many again where ds is wanted. Of the activations x and e are kept for the backward, and one
        product with delta where the gradient of e is wanted (or on the "torch" path that of v, or
        of s in its place). Float32 on a CPU ("cpp") runs on the kernels of `batch_ensemble_linear`,
        and keeps what they do. Gradients are deterministic, and differentiable again.

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
    t = Inputs(x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias)
    check_types(OP, t._asdict(), shared.REQUIRED)
    require(layout in LAYOUTS, OP, "layout", f"one of {LAYOUTS}", repr(layout))
    t = Inputs(*autocast_input(*t))
    members = _check(t, layout)
    name = pick(OP, backend, t.x)
    if transforming() or 0 in (*t.x.shape, *weight.shape):
        with without_autocast(t.x.device.type):
            return hyper_batch_linear_reference(*t, layout=layout)
    t = shared.unfolded(t, members) if layout == "folded" else t
    e, e_bias = rounded(t.x.dtype, t.e, t.e_bias)  # activations, like x
    t = t._replace(e=e, e_bias=e_bias)
    batch_major = layout == "batch_major"
    once = t.x.ndim == 2 and t.r is None  # one library product serves all members
    if name == "cpp" and not (once and "cpp" not in (backend, _dispatch.FORCED)):
        y = two_layers(t, members, batch_major, backend)
        return y.flatten(0, 1) if layout == "folded" else y
    needs = Inputs(*[wants_grad(value) for value in t])
    if name in ("torch", "cpp"):
        plan = COMPOSED
    elif backend == "triton" or _dispatch.FORCED == "triton":
        plan = FUSED
    else:
        plan = plan_for(t, needs, members, batch_major)
    if any(needs):
        y = _HyperBatchLinear.apply(members, batch_major, plan, *t)
    else:
        y = _forward(t, members, batch_major, plan.forward, False)[0]
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
    t = Inputs(x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias)
    if layout == "folded":
        t = shared.unfolded(t, shared.folded_members(t))
        return hyper_batch_linear_reference(*t).flatten(0, 1)
    t = Inputs(*as_rounded(*t))
    r, s, u, v = shared.tied(t)
    batch_major = layout == "batch_major"

    def half(weight, r, s):
        y = scaled(t.x, r, batch_major) @ weight.T
        y = y if y.ndim == 3 else y.unsqueeze(members_dim(batch_major))
        return y if s is None else y * per_row(s, batch_major)

    y = half(t.weight, r, s) + half(t.delta, u, v) * t.e
    y = y if t.bias is None else y + per_row(t.bias, batch_major)
    y = y if t.delta_bias is None else y + per_row(t.delta_bias, batch_major) * t.e_bias
    return y.to(x.dtype)


def _check(t: Inputs, layout: str) -> int:
    """Holds all arguments against each other; returns M."""
    x, e = t.x, t.e
    shapes = {"member_major": "[M, B, I] or [B, I]", "batch_major": "[B, M, I] or [B, I]"}
    folded, members = layout == "folded", members_dim(layout == "batch_major")
    fits = x.ndim == 2 or (x.ndim == 3 and not folded)
    require(fits, OP, "x", shapes.get(layout, "[M*B, I]"), list(x.shape))
    require(x.dtype in FLOATS, OP, "x", f"one of {names(FLOATS)}", x.dtype)
    like = {"like": x, "like_name": "x", "or_float32": True}
    check_tensor(OP, "weight", t.weight, "O, I", (None, x.shape[-1]), **like)
    O, I = t.weight.shape
    check_tensor(OP, "delta", t.delta, "O, I", (O, I), **like)
    letters = {"member_major": "M, B, O", "batch_major": "B, M, O", "folded": "M*B, O"}[layout]
    rows = tuple(x.shape[:-1])
    if x.ndim == 2 and not folded:  # only e says how many members there are
        M = e.shape[members] if e.ndim == 3 else None
        rows = (rows[0], M) if members else (M, rows[0])
    check_tensor(OP, "e", e, letters, (*rows, O), **like)
    if t.e_bias is not None:
        check_tensor(OP, "e_bias", t.e_bias, letters, (*rows, O), **like)
    M = shared.folded_members(t) if folded else rows[members]
    shared.check_factors(OP, t, M, I, O)
    if folded:
        fits = x.shape[0] % M == 0 if M else x.shape[0] == 0
        require(fits, OP, "x", f"[M*B, I] with rows divisible by M = {M}", list(x.shape))
    return M


def _forward(t: Inputs, members: int, batch_major: bool, way: str, keep: bool):
    """(y, the product with delta if it is kept)"""
    if way == "fused":
        return fused(t, members, batch_major, keep)
    y, z2 = composed(t, batch_major)
    return y, z2 if keep else None


class _HyperBatchLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, members, batch_major, plan, *tensors):
        t, needs = Inputs(*tensors), Inputs(*ctx.needs_input_grad[3:])
        keep = needs.e or (plan.backward == "composed" and shared.needs_z2(t, needs))
        y, z2 = _forward(t, members, batch_major, plan.forward, keep)
        ctx.save_for_backward(*t, z2)
        ctx.batch_major, ctx.way = batch_major, plan.backward
        return y

    @staticmethod
    def backward(ctx, dy):
        *tensors, z2 = ctx.saved_tensors
        t, needs = Inputs(*tensors), Inputs(*ctx.needs_input_grad[3:])
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            if wants_graph():
                layout = "batch_major" if ctx.batch_major else "member_major"

                def definition(*tensors):
                    return hyper_batch_linear_reference(*tensors, layout=layout)

                return None, None, None, *reference_backward(definition, t, needs, dy)
            backward = fused_backward if ctx.way == "fused" else composed_backward
            return None, None, None, *backward(dy, t, z2, needs, ctx.batch_major)
