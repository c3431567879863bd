"""A convolution of M members whose weights are functions of hyperparameters (hyper-batch)."""

import torch
from torch import Tensor

from landscape_fast.ops import _dispatch
from landscape_fast.ops import _hyper_batch as shared
from landscape_fast.ops._batch_ensemble_conv2d_fused import fusable
from landscape_fast.ops._batch_ensemble_conv_checks import Conv, check_pixels, geometry
from landscape_fast.ops._checks import FLOATS, check_tensor, check_types, message, names, require
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
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
from landscape_fast.ops._hyper_batch_conv2d_fused import Plan, fused, fused_backward, plan_for
from landscape_fast.ops._hyper_batch_conv_ways import composed, composed_backward, definition

OP = "hyper_batch_conv2d"
LAYOUTS = ("member_major", "folded")

COMPOSED = Plan("composed", "composed")
FUSED = Plan("fused", "fused")

declare(OP, triton=KERNEL_DTYPES)


def hyper_batch_conv2d(
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
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "member_major",
    backend: str = "auto",
) -> Tensor:
    r"""M convolutions with weights `weight * s r^T + delta * v u^T * e`, e differing by example.

    .. math:: y_{mb} = s_m \circ \mathrm{conv}(x_{mb} \circ r_m, W)
        + e_{mb} \circ v_m \circ \mathrm{conv}(x_{mb} \circ u_m, \Delta)
        + b_m + d^b_m \circ e^b_{mb}

    All factors scale whole channels, so this equals a convolution with a weight of its own for
    every member and example.

    Args:
        x: [M, B, I, H, W], or [B, I, H, W] shared by all members; [M*B, I, H, W] with members in
            consecutive rows for the folded layout. Channels-last memory is kept.
        weight: [O, I / groups, kh, kw]. Like all that follows of the dtype of `x`, or float32
            where `x` has 16 bits: then it is rounded for the products, and its gradient is not.
        delta: shaped as `weight`, what responds to the hyperparameters.
        e: [M, B, O], or [M*B, O] in the folded layout: how much it responds.
        r: [M, I], scales the input channels of `weight` for each member; None for ones.
        s: [M, O], scales its output channels; None for ones.
        u: [M, I], as r for `delta`; None for r itself, whose gradient then has both parts.
        v: [M, O], as s for `delta`; None for s itself.
        bias: [M, O], or [O] shared by all members, or None.
        delta_bias: [M, O] or [O], the bias that responds; given together with e_bias.
        e_bias: how much it responds, shaped as e.
        stride: as in `torch.nn.functional.conv2d`; dilation and groups: likewise.
        padding: numbers, "same" (stride 1 only) or "valid".
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        layout: "member_major" or "folded".
        backend: "auto", "torch" or "triton"; see `landscape_fast.show_config`. On CUDA tensors
            "auto" takes, for each shape, what is expected to be quicker: the Triton kernels (for
            groups=1 and zero padding), or the composition of library calls that "torch" names.

    Returns:
        [M, B, O, H', W'], or [M*B, O, H', W'] for the folded layout, in the dtype of `x` (of
        autocast where it is on).

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or options disagree; if only one of delta_bias and
            e_bias is given; if the backend cannot run here.

    Cost: two convolutions of M*B images, and one pass over their outputs. Of the activations x is
        kept for the backward, and the second one's output where the gradient of e is wanted.
        Differentiable to any order.

    Source: Wenzel et al. 2020 (arXiv:2006.13570); self-tuning networks: MacKay et al. 2019
        (arXiv:1903.03088).

    Example:
        >>> import torch
        >>> x, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> e = torch.tensor([[[0.0]], [[0.5]]])  # two members read one image
        >>> hyper_batch_conv2d(x, weight, 2 * weight, e).flatten()
        tensor([4., 8.])
    """
    t = Inputs(x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias)
    t, conv = _prepare(t, (stride, padding, dilation, groups, padding_mode), layout)
    name, obstacle = pick(OP, backend, t.x), fusable(conv)
    if backend == "triton" and obstacle:
        argument, _, rule = obstacle.partition(" must be ")
        got = groups if argument == "groups" else repr(padding_mode)
        raise ValueError(message(OP, argument, f"{rule} with backend 'triton'", got))
    if transforming() or t.x.numel() == 0:
        with without_autocast(t.x.device.type):
            y = definition(t, conv)
    else:
        e, e_bias = rounded(t.x.dtype, t.e, t.e_bias)  # activations, like x
        t = t._replace(e=e, e_bias=e_bias)
        if name == "torch" or obstacle:
            plan = COMPOSED
        elif backend == "triton" or _dispatch.FORCED == "triton":
            plan = FUSED
        else:
            plan = plan_for(t, conv)
        if wants_grad(*t):
            y = _HyperBatchConv2d.apply(conv, plan, *t)
        else:
            y = _FORWARD[plan.forward](t, conv, False)[0]
    return y.flatten(0, 1) if layout == "folded" else y


def hyper_batch_conv2d_reference(
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
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "member_major",
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    t = Inputs(x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias)
    t, conv = _prepare(t, (stride, padding, dilation, groups, padding_mode), layout)
    y = definition(t, conv)
    return y.flatten(0, 1) if layout == "folded" else y


def _prepare(t: Inputs, options: tuple, layout: str) -> tuple[Inputs, Conv]:
    """Checks everything; returns the tensors with x as [M or 1, B, I, H, W], and the options."""
    check_types(OP, t._asdict(), shared.REQUIRED)
    require(layout in LAYOUTS, OP, "layout", f"one of {LAYOUTS}", repr(layout))
    check_tensor(OP, "weight", t.weight, "O, I / groups, kh, kw", (None,) * 4)
    rule = "[O, I / groups, kh, kw] with no empty dimension"
    require(all(t.weight.shape), OP, "weight", rule, list(t.weight.shape))
    conv = geometry(OP, tuple(t.weight.shape[2:]), *options, (0, 0), False)
    t = Inputs(*autocast_input(*t))
    members = _check(t, conv, layout)
    if layout == "folded":
        t = shared.unfolded(t, members)
    elif t.x.ndim == 4:
        t = t._replace(x=t.x.unsqueeze(0))
    return t, conv


def _check(t: Inputs, conv: Conv, layout: str) -> int:
    """Holds all arguments against each other; returns M."""
    x, folded = t.x, layout == "folded"
    O, I = t.weight.shape[0], t.weight.shape[1] * conv.groups
    require(O % conv.groups == 0, OP, "groups", f"a divisor of O = {O}", conv.groups)
    require(x.dtype in FLOATS, OP, "x", f"one of {names(FLOATS)}", x.dtype)
    if folded:
        check_tensor(OP, "x", x, "M*B, I, H, W", (None, I, None, None))
    elif x.ndim == 4:
        check_tensor(OP, "x", x, "B, I, H, W", (None, I, None, None))
    else:
        check_tensor(OP, "x", x, "M, B, I, H, W", (None, None, I, None, None))
    like = {"like": x, "like_name": "x", "or_float32": True}
    check_tensor(OP, "weight", t.weight, "O, I / groups, kh, kw", t.weight.shape, **like)
    check_tensor(OP, "delta", t.delta, "O, I / groups, kh, kw", t.weight.shape, **like)
    rows = tuple(x.shape[:-3])
    if x.ndim == 4 and not folded:  # only e says how many members there are
        rows = (t.e.shape[0] if t.e.ndim == 3 else None, *rows)
    letters = "M*B, O" if folded else "M, B, O"
    check_tensor(OP, "e", t.e, letters, (*rows, O), **like)
    if t.e_bias is not None:
        check_tensor(OP, "e_bias", t.e_bias, letters, (*rows, O), **like)
    M = shared.folded_members(t) if folded else rows[0]
    require(M >= 1, OP, "e", "of at least one member", list(t.e.shape))
    shared.check_factors(OP, t, M, I, O)
    if folded:
        rule = f"[M*B, I, H, W] with rows divisible by M = {M}"
        require(x.shape[0] % M == 0, OP, "x", rule, list(x.shape))
    check_pixels(OP, x, t.weight, conv)
    return M


_FORWARD = {"fused": fused, "composed": composed}
_BACKWARD = {"fused": fused_backward, "composed": composed_backward}


class _HyperBatchConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, conv, plan, *tensors):
        t, needs = Inputs(*tensors), Inputs(*ctx.needs_input_grad[2:])
        y, z2 = _FORWARD[plan.forward](t, conv, needs.e)
        ctx.save_for_backward(*t, z2)
        ctx.conv, ctx.way = conv, plan.backward
        return y

    @staticmethod
    def backward(ctx, dy):
        *tensors, z2 = ctx.saved_tensors
        t, needs = Inputs(*tensors), Inputs(*ctx.needs_input_grad[2:])
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            if wants_graph():

                def plain(*tensors):
                    return definition(Inputs(*tensors), ctx.conv)

                return None, None, *reference_backward(plain, t, needs, dy)
            return None, None, *_BACKWARD[ctx.way](dy, t, z2, needs, ctx.conv)
