"""A linear layer of M members that share one weight up to rank-one factors (BatchEnsemble)."""

import torch
from torch import Tensor

from landscape_fast.ops import _dispatch
from landscape_fast.ops._batch_ensemble_linear_checks import OP, check, check_types, members_of
from landscape_fast.ops._batch_ensemble_linear_cpu import (
    CPP,
    cpu_backward_op,
    cpu_forward,
    cpu_plan,
)
from landscape_fast.ops._batch_ensemble_linear_index import indexed, indexed_reference
from landscape_fast.ops._batch_ensemble_linear_plan import (
    COMPOSED,
    FUSED,
    OUTER,
    Needs,
    Plan,
    composed_plan,
    examples,
    plan_for,
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
    wide_backward,
)
from landscape_fast.ops._checks import require
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    as_rounded,
    autocast_input,
    declare,
    free,
    held,
    pick,
    reference_backward,
    rounded,
    transforming,
    wants_grad,
    wants_graph,
    without_autocast,
)

declare(OP, cpp=(torch.float32,), triton=KERNEL_DTYPES)


def batch_ensemble_linear(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "member_major",
    index: Tensor | None = None,
    activation: str | None = None,
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
        index: [N] int64 in [0, M), with the layout "folded" and x [N, I]: the member of each row,
            in any order and number. It runs in plain PyTorch.
        activation: "relu" for max(y, 0), applied before y is written; None.
        backend: "auto", "torch", "cpp" or "triton"; see `landscape_fast.show_config`. "auto" takes,
            for each shape, what is expected to be quicker: the kernels (Triton on CUDA tensors,
            compiled ones for float32 on the CPU), or the composition of library calls that "torch"
            names.

    Returns:
        [M, B, O], [B, M, O], [M*B, O] or, with an index, [N, O], contiguous, in the dtype of `x`.
        Products are added up in float32 (float64 for float64); float32 factors are rounded to tf32
        where `torch.backends.cuda.matmul` allows it. Autocast casts `x`. The gradients of float32
        parameters beside a 16-bit `x` are as exact as float32 sums of exact products: nothing is
        rounded to 16 bits before them.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or the layout disagree; if `x` is shared and nothing
            says how many members there are; if the backend cannot run here.
        IndexError: if an index is out of range and the tensors are on the CPU. On CUDA, where
            raising would wait for the device, its row of y is NaN; LANDSCAPE_FAST_DEBUG=1 makes it
            raise there too. In a compiled graph and under a functorch transform the row is NaN.

    Cost: 2 * M * B * I * O flops, and twice as many for the gradients; x, weight and y moved once.
        The backward keeps `x`, and y with an activation, but no product. Only on the "torch" path
        (x * r) weight^T is kept for ds, except in float32 and float64 on a CPU from B = I / 2 on,
        and where gradients are float32 beside a 16-bit `x`. Gradients are deterministic, and
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
    check_types(x, weight, r, s, bias, layout, index, activation)
    x, weight, r, s, bias = autocast_input(x, weight, r, s, bias)
    members = check(x, weight, r, s, bias, layout, index)
    if index is not None:
        rule = "'auto' or 'torch' with an index"
        require(backend in ("auto", "torch"), OP, "backend", rule, repr(backend))
        backend = "torch"
    name, relu = pick(OP, backend, x), activation == "relu"
    if transforming() or x.numel() == 0 or weight.numel() == 0:
        options = {"layout": layout, "index": index, "activation": activation}
        with without_autocast(x.device.type):
            return batch_ensemble_linear_reference(x, weight, r, s, bias, **options)
    if index is not None:
        with without_autocast(x.device.type):
            return indexed(x, weight, r, s, bias, index, relu)
    if layout == "folded":
        x = x.unflatten(0, (members, x.shape[0] // members))
    tensors, sizes = (x, weight, r, s, bias), (members, layout == "batch_major")
    needs = Needs(*[wants_grad(t) for t in tensors]) if torch.is_grad_enabled() else Needs()
    plan = _plan(name, backend, *tensors[:4], sizes, needs)
    if any(needs):
        y = _BatchEnsembleLinear.apply(*tensors, *sizes, relu, *plan)
    else:
        y = _forward(*tensors, *sizes, relu, plan.forward)[0]
    return y.flatten(0, 1) if layout == "folded" else y


def batch_ensemble_linear_reference(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "member_major",
    index: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    relu = activation == "relu"
    if index is not None:
        return indexed_reference(x, weight, r, s, bias, index, relu)
    if layout == "folded":
        M = members_of(x, r, s, bias, layout)
        x = x.unflatten(0, (M, x.shape[0] // M if M else 0))
        y = batch_ensemble_linear_reference(x, weight, r, s, bias, activation=activation)
        return y.flatten(0, 1)
    dtype, batch_major = x.dtype, layout == "batch_major"
    x, weight, r, s, bias = as_rounded(x, weight, r, s, bias)
    y = scaled(x, r, batch_major) @ weight.T
    y = y if y.ndim == 3 else y.unsqueeze(members_dim(batch_major))
    y = y if s is None else y * per_row(s, batch_major)
    y = y if bias is None else y + per_row(bias, batch_major)
    return (y.relu() if relu else y).to(dtype)


def _plan(name, backend, x, weight, r, s, sizes, needs) -> Plan:
    """How to run: as forced, or else as the table of the device says."""
    exact = held(x, (weight, r, s), (needs.weight, needs.r, needs.s))
    if name == "triton" and name in (backend, _dispatch.FORCED):
        return FUSED._replace(backward="G") if exact and FUSED.backward == "H" else FUSED
    if name == "cpp" and "cpp" in (backend, _dispatch.FORCED):
        return CPP
    B = examples(x, sizes[1])
    if free(B, sizes[0]):
        return OUTER if exact else COMPOSED
    if name == "torch":
        return composed_plan(x, B, x.shape[-1], needs, exact)
    if name == "cpp":
        return cpu_plan(x, weight, r, sizes, needs)
    return plan_for(x, weight, (r, s), sizes, needs, exact)


def _forward(x, weight, r, s, bias, members, batch_major, relu, way):
    """(y, z or None)"""
    if way == "cpp":
        return cpu_forward(x, weight, r, s, bias, members, batch_major, relu), None
    if way == "fused":
        return forward_op(x, weight, r, s, bias, members, batch_major, relu), None
    return composed(x, *rounded(x.dtype, weight, r, s, bias), batch_major, relu)


class _BatchEnsembleLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, r, s, bias, members, batch_major, relu, forward, backward):
        y, z = _forward(x, weight, r, s, bias, members, batch_major, relu, forward)
        keep_z = backward == "composed" and ctx.needs_input_grad[3]
        ctx.save_for_backward(x, weight, r, s, z if keep_z else None, y if relu else None)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        ctx.batch_major, ctx.plan = batch_major, backward
        return y

    @staticmethod
    def backward(ctx, dy):
        with without_autocast(dy.device.type):  # gradients stay in the dtypes of the op
            return *_BatchEnsembleLinear.gradients(ctx, dy), *[None] * 5

    @staticmethod
    def gradients(ctx, dy):
        x, weight, r, s, z, y = ctx.saved_tensors
        needs, batch_major = ctx.needs_input_grad[:5], ctx.batch_major
        compiled = ctx.plan == "cpp" and not wants_graph()
        if y is not None and not compiled:
            dy = torch.ops.aten.threshold_backward(dy, y.detach(), 0)
        if wants_graph():
            layout = "batch_major" if batch_major else "member_major"
            bias = None
            if ctx.bias_shape is not None:
                bias = dy.new_zeros(ctx.bias_shape, dtype=ctx.bias_dtype).requires_grad_()

            def definition(*tensors):  # up to the activation
                return batch_ensemble_linear_reference(*tensors, layout=layout)

            return reference_backward(definition, (x, weight, r, s, bias), needs, dy)
        bias_shared = ctx.bias_shape is not None and len(ctx.bias_shape) == 1
        if compiled:
            found = cpu_backward_op(dy, y, x, weight, r, s, needs, bias_shared, batch_major)
            return [g if need else None for g, need in zip(found, needs, strict=True)]
        how = (needs, bias_shared, ctx.bias_dtype, batch_major)
        if ctx.plan == "composed":
            return composed_backward(dy, x, *rounded(x.dtype, weight, r, s), z, *how)
        if ctx.plan == "outer":
            return outer_backward(dy, x, weight, r, s, *how)
        if ctx.plan == "wide":
            return wide_backward(dy, x, weight, r, s, *how)
        found = backward_op(dy, x, weight, r, s, *how, ctx.plan == "H")
        return [g if need else None for g, need in zip(found, needs, strict=True)]
