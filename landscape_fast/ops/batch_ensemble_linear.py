"""A linear layer of M members that share one weight up to rank-one factors (BatchEnsemble)."""

from functools import cache, lru_cache

import torch
from torch import Tensor

from landscape_fast.ops import _dispatch
from landscape_fast.ops._batch_ensemble_linear_plan import (
    Needs,
    Plan,
    Problem,
    choose,
    kind_of,
)
from landscape_fast.ops._batch_ensemble_linear_ways import (
    backward_op,
    composed,
    composed_backward,
    forward_op,
    members_dim,
    outer_backward,
    per_row,
    scaled,
)
from landscape_fast.ops._checks import FLOATS, check_tensor, message, names, require
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

OP = "batch_ensemble_linear"
LAYOUTS = ("member_major", "batch_major", "folded")
COMPOSED = Plan("composed", "composed")
FUSED = Plan("fused", "H")
EXACT = {"H": "G", "composed": "outer"}  # the backward that spares float32 gradients 16 bits

declare(OP, triton=KERNEL_DTYPES)


def batch_ensemble_linear(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "member_major",
    backend: str = "auto",
) -> Tensor:
    r"""M linear layers with weights `weight[o, i] * s[m, o] * r[m, i]`, in one pass.

    .. math:: y_{mbo} = s_{mo} \sum_i w_{oi}\, r_{mi}\, x_{mbi} + b_{mo}

    Args:
        x: [M, B, I], any strides; or [B, I], read by all members without a copy. In layout
            "batch_major" [B, M, I] or [B, I]; in "folded" [M*B, I], the rows of a member together.
        weight: [O, I], shared by the members. Like all that follows of the dtype of `x`, or float32
            where `x` has 16 bits: then rounded to that for the products, with a float32 gradient.
        r: [M, I], scales the input features of each member; None for ones.
        s: [M, O], scales its output features; None for ones.
        bias: [M, O], one per member, or [O], one for all; None for zero.
        layout: "member_major", "batch_major" (as in TabM) or "folded".
        backend: "auto", "torch" or "triton"; see `landscape_fast.show_config`. On CUDA tensors
            "auto" takes, for each shape, what is expected to be quicker: the Triton kernels, or the
            composition of library calls that "torch" names.

    Returns:
        [M, B, O], [B, M, O] or [M*B, O] as the layout says, contiguous, in the dtype of `x`.
        Products are added up in float32 (float64 for float64); float32 factors are rounded to tf32
        where `torch.backends.cuda.matmul` allows it. Autocast casts `x`. The gradients of float32
        parameters beside a 16-bit `x` are as exact as float32 sums of exact products: nothing is
        rounded to 16 bits before them.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or the layout disagree; if `x` is shared and nothing
            says how many members there are; if the backend cannot run here.

    Cost: 2 * M * B * I * O flops, and twice as many for the gradients; x, weight and y moved once.
        The kernels keep `x` for the backward, and no other activation; "torch" also keeps
        (x * r) weight^T, if ds is wanted in the dtype of `x`. Gradients are deterministic, and
        differentiable again.

    Source: Wen et al. 2020 (arXiv:2002.06715); as used by TabM (arXiv:2410.24210).

    Example:
        >>> import torch
        >>> from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear
        >>> x = torch.tensor([[1.0, 2.0]])  # one example, read by two members
        >>> weight = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 2.0]])
        >>> r = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> batch_ensemble_linear(x, weight, r)
        tensor([[[ 3., -1.,  4.]],
        <BLANKLINE>
                [[-1.,  3., -4.]]])
    """
    _check_types(x, weight, r, s, bias, layout)
    x, weight, r, s, bias = autocast_input(x, weight, r, s, bias)
    members = _check(x, weight, r, s, bias, layout)
    name = pick(OP, backend, x)
    if transforming() or x.numel() == 0 or weight.numel() == 0:
        with without_autocast(x.device.type):
            return batch_ensemble_linear_reference(x, weight, r, s, bias, layout=layout)
    if layout == "folded":
        x = x.unflatten(0, (members, x.shape[0] // members))
    tensors = (x, weight, r, s, bias)
    sizes = (members, layout == "batch_major")
    needs = Needs(*[wants_grad(t) for t in tensors]) if torch.is_grad_enabled() else Needs()
    if name == "torch":
        plan = COMPOSED
    elif backend == "triton" or _dispatch.FORCED == "triton":
        plan = FUSED
    else:
        plan = _plan(*tensors, *sizes, needs)
    if any(needs):
        backward = EXACT.get(plan.backward, plan.backward) if _exact(*tensors, needs) else plan[1]
        y = _BatchEnsembleLinear.apply(*tensors, *sizes, plan.forward, backward)
    else:
        y = _forward(*tensors, *sizes, plan.forward)[0]
    return y.flatten(0, 1) if layout == "folded" else y


def batch_ensemble_linear_reference(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "member_major",
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    if layout == "folded":
        M = _members(x, r, s, bias, layout)
        x = x.unflatten(0, (M, x.shape[0] // M if M else 0))
        return batch_ensemble_linear_reference(x, weight, r, s, bias).flatten(0, 1)
    dtype, batch_major = x.dtype, layout == "batch_major"
    x, weight, r, s, bias = as_rounded(x, weight, r, s, bias)
    y = scaled(x, r, batch_major) @ weight.T
    y = y if y.ndim == 3 else y.unsqueeze(members_dim(batch_major))
    y = y if s is None else y * per_row(s, batch_major)
    y = y if bias is None else y + per_row(bias, batch_major)
    return y.to(dtype)


def _check_types(x, weight, r, s, bias, layout) -> None:
    required = {"x": x, "weight": weight}
    for name, t in {**required, "r": r, "s": s, "bias": bias}.items():
        if not isinstance(t, Tensor) and (t is not None or name in required):
            raise TypeError(message(OP, name, "a Tensor", type(t).__name__))
    require(layout in LAYOUTS, OP, "layout", f"one of {LAYOUTS}", repr(layout))


def _check(x, weight, r, s, bias, layout) -> int:
    """Holds all arguments against each other; returns M."""
    shapes = {"member_major": "[M, B, I] or [B, I]", "batch_major": "[B, M, I] or [B, I]"}
    fits = x.ndim == 2 or (x.ndim == 3 and layout != "folded")
    require(fits, OP, "x", shapes.get(layout, "[M*B, I]"), list(x.shape))
    require(x.dtype in FLOATS, OP, "x", f"one of {names(FLOATS)}", x.dtype)
    like = {"like": x, "like_name": "x", "or_float32": True}
    check_tensor(OP, "weight", weight, "O, I", (None, x.shape[-1]), **like)
    (O, I), M = weight.shape, _members(x, r, s, bias, layout)
    rule = "[M, B, I]" if layout == "member_major" else "[B, M, I]"
    rule += " where neither r, s nor a bias [M, O] gives the number of members"
    require(M is not None, OP, "x", rule, list(x.shape))
    if r is not None:
        check_tensor(OP, "r", r, "M, I", (M, I), **like)
    if s is not None:
        check_tensor(OP, "s", s, "M, O", (M, O), **like)
    if bias is not None and bias.ndim == 1:
        check_tensor(OP, "bias", bias, "O", (O,), **like)
    elif bias is not None:
        check_tensor(OP, "bias", bias, "M, O", (M, O), **like)
    if layout == "folded":
        fits = x.shape[0] % M == 0 if M else x.shape[0] == 0
        require(fits, OP, "x", f"[M*B, I] with rows divisible by M = {M}", list(x.shape))
    return M


def _members(x, r, s, bias, layout) -> int | None:
    """M, from x or else from the first factor that has it; folded rows without factors are one."""
    if x.ndim == 3:
        return x.shape[members_dim(layout == "batch_major")]
    for t in (r, s, bias):
        if t is not None and t.ndim == 2:
            return t.shape[0]
    return 1 if layout == "folded" else None


@cache
def _architecture(index: int) -> int:
    """Which column of the plan's tables a CUDA device belongs to."""
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(index)[0], 80)


_architecture._dynamo_marked_constant = True  # torch.compile may take its answer for granted


def _plan(x, weight, r, s, bias, members, batch_major, needs) -> Plan:
    O, I = weight.shape
    B = x.shape[0] if x.ndim == 2 or batch_major else x.shape[1]
    arch, kind = _architecture(x.device.index), kind_of(x.dtype)
    unit = 16 if arch == 80 else 16 // x.element_size()  # what vector loads, or descriptors, need
    strides = (O, *x.stride()[:-1], *weight.stride()[:-1])
    aligned = x.stride(-1) == 1 and weight.stride(-1) == 1 and all(n % unit == 0 for n in strides)
    factors = (r is not None, s is not None)
    exact = _exact(x, weight, r, s, bias, needs)
    problem = Problem(members, B, I, O, arch, kind, x.ndim == 2, *factors, aligned, exact)
    return choose(problem, needs) if torch.compiler.is_compiling() else _chosen(problem, needs)


_chosen = lru_cache(4096)(choose)  # a layer asks the same at every step


def _exact(x, weight, r, s, bias, needs) -> bool:
    """Whether a gradient of weight, r or s is wanted in float32 beside an x of 16 bits."""
    held = zip((weight, r, s), needs[1:4], strict=True)
    return any(need and t.dtype != x.dtype for t, need in held)


def _forward(x, weight, r, s, bias, members, batch_major, way) -> tuple[Tensor, Tensor | None]:
    """(y, z or None)"""
    if way == "fused":
        return forward_op(x, weight, r, s, bias, members, batch_major), None
    return composed(x, *rounded(x.dtype, weight, r, s, bias), members, batch_major)


class _BatchEnsembleLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, r, s, bias, members, batch_major, forward, backward):
        y, z = _forward(x, weight, r, s, bias, members, batch_major, forward)
        keep_z = backward == "composed" and ctx.needs_input_grad[3]
        ctx.save_for_backward(x, weight, r, s, z if keep_z else None)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        ctx.batch_major, ctx.plan = batch_major, backward
        return y

    @staticmethod
    def backward(ctx, dy):
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            return *_BatchEnsembleLinear.gradients(ctx, dy), None, None, None, None

    @staticmethod
    def gradients(ctx, dy):
        x, weight, r, s, z = ctx.saved_tensors
        needs, batch_major = ctx.needs_input_grad[:5], ctx.batch_major
        if wants_graph():
            layout = "batch_major" if batch_major else "member_major"
            bias = None
            if ctx.bias_shape is not None:
                bias = dy.new_zeros(ctx.bias_shape, dtype=ctx.bias_dtype).requires_grad_()

            def definition(*tensors):
                return batch_ensemble_linear_reference(*tensors, layout=layout)

            return reference_backward(definition, (x, weight, r, s, bias), needs, dy)
        bias_shared = ctx.bias_shape is not None and len(ctx.bias_shape) == 1
        how = (needs, bias_shared, ctx.bias_dtype, batch_major)
        if ctx.plan == "composed":
            return composed_backward(dy, x, *rounded(x.dtype, weight, r, s), z, *how)
        if ctx.plan == "outer":
            return outer_backward(dy, x, weight, r, s, *how)
        found = backward_op(dy, x, weight, r, s, *how, ctx.plan == "H")
        return [g if need else None for g, need in zip(found, needs, strict=True)]
