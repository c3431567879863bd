"""Batch normalisation of M members, each with statistics, scale and shift of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape_fast.ops._checks import LOW, check_tensor, message, require, whole
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    declare,
    pick,
    reference_backward,
    transforming,
    wants_grad,
    wants_graph,
)
from landscape_fast.ops._member_batch_norm_ways import (
    apply_op,
    as_members,
    backward_op,
    from_members,
    rows_of,
    stats_op,
    widened,
)

OP = "member_batch_norm"
LAYOUTS = ("member_major", "batch_major", "folded")

declare(OP, triton=KERNEL_DTYPES)


def member_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    layout: str = "member_major",
    members: int | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""`F.batch_norm` of every member, in one set of launches.

    .. math:: y_{mbfs} = \frac{x_{mbfs} - \mu_{mf}}{\sqrt{v_{mf} + \epsilon}} w_{mf} + c_{mf}

    Args:
        x: [M, B, F, ...] with any number of pixel dimensions; "batch_major": [B, M, F, ...];
            "folded": [M*B, F, ...], the rows of a member together. float32, float16, bfloat16 or
            float64.
        weight: [M, F], of the dtype of `x` or float32; None for ones.
        bias: likewise; None for zeros.
        running_mean: [M, F], contiguous; `training` moves it to the mean of the batch (not where it
            is None), evaluation reads it.
        running_var: likewise, with the unbiased variance.
        training: whether mean and (biased) variance are those of the batch.
        momentum: how far the running statistics move, in [0, 1].
        eps: added to the variance, above 0.
        layout: "member_major", "batch_major" or "folded".
        members: M, where nothing else tells it (layout "folded" and no tensors [M, F]).
        activation: None, or "relu" on the result.
        backend: "auto", "torch" or "triton"; see `landscape_fast.show_config`.

    Returns:
        The shape and dtype of `x`, dense, in its order of memory (channels-last stays); by the
        library, without pixels, members beside features.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or options disagree, if training has one number per
            channel, if evaluation has no running statistics, or the backend cannot run here.

    Cost: two reads and one write of `x` in training, one of each in evaluation; the backward reads
        `x` and dy twice and writes dx. It keeps `x`. Sums run in float32 (float64 for float64) and
        in a fixed order. Differentiable to any order. On CPUs the library's batch norm runs, for
        each member into one result, or for all at once where there are no pixels or the layout is
        "batch_major" (but for channels-last images).

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167); statistics as in Chan, Golub and LeVeque
        1983.

    Example:
        >>> import torch
        >>> from landscape_fast.ops.member_batch_norm import member_batch_norm
        >>> x = torch.tensor([[[0.0], [2.0]], [[10.0], [30.0]]])  # two members, two rows
        >>> mean, var = torch.zeros(2, 1), torch.ones(2, 1)
        >>> member_batch_norm(x, None, None, mean, var, training=True, eps=1e-9).flatten()
        tensor([-1.,  1., -1.,  1.])
        >>> mean.flatten(), var.flatten()  # a tenth of the way to 1 and 20, 2 and 200
        (tensor([0.1000, 2.0000]), tensor([ 1.1000, 20.9000]))
    """
    tensors = (weight, bias, running_mean, running_var)
    M = _check(x, tensors, training, momentum, eps, layout, members, activation)
    name = pick(OP, backend, x)
    relu = activation == "relu"
    if transforming():
        options = {"momentum": momentum, "eps": eps, "layout": layout, "members": M}
        options |= {"training": training, "activation": activation}
        return member_batch_norm_reference(x, *tensors, **options)
    rows = as_members(x, M, layout)
    if not x.numel():
        return rows.new_empty(x.shape) + _nothing(x, weight, bias)
    if name == "torch" and _as_one(rows, tensors, layout):
        y = _in_one(rows, tensors, (training, momentum, eps), relu)
        return from_members(y, layout)
    if training:
        mean, var = stats_op(rows.detach(), running_mean, running_var, momentum, name)
    else:
        mean, var = running_mean, running_var
    if wants_grad(x, weight, bias):
        y = _MemberBatchNorm.apply(rows, weight, bias, mean, var, layout, eps, training, relu, name)
    else:
        y = apply_op(rows, weight, bias, mean, var, layout, eps, relu, name)
    return from_members(y, layout)


def member_batch_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    layout: str = "member_major",
    members: int | None = None,
    activation: str | None = None,
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    told = [t.shape[0] for t in (weight, bias, running_mean, running_var) if t is not None]
    M = told[0] if told else members or x.shape[1 if layout == "batch_major" else 0]
    tensors = (running_mean, running_var, weight, bias)
    how = (training, momentum, eps)
    y = _each(as_members(x, M, layout), tensors, how, activation == "relu")
    return from_members(y, layout)


def _each(x: Tensor, tensors: tuple[Tensor | None, ...], how: tuple, relu: bool) -> Tensor:
    """`F.batch_norm` of every member of [M, B, F, ...], with its rows of the tensors [M, F]."""
    wide = widened(tensors, x)
    rows = zip(x.unbind(0), *rows_of(wide, len(x)), strict=True)
    y = torch.stack([F.batch_norm(*one, *how) for one in rows])
    if how[0]:
        for own, moved in zip(tensors[:2], wide, strict=False):
            if own is not None and own is not moved:
                own.copy_(moved)
    return y.relu() if relu else y


def _as_one(x: Tensor, tensors: tuple, layout: str) -> bool:
    """Whether members and features may be one: they lie side by side, or there are no pixels.

    At M = 10, B = 32, F = 64 a step then takes 0.16 ms for 0.34 of one after another; images would
    be copied, and take 287 for 214 at B = 128, F = 16, 32 x 32 (a thread of an EPYC, torch 2.13).
    """
    kinds = {t.dtype for t in tensors if t is not None}
    if len(kinds) > 1 or (x.dtype in LOW and kinds != {torch.float32}):
        return False  # the library takes no mixture, and would keep 16-bit statistics in 16 bits
    return x[0, 0, 0].numel() == 1 or (layout == "batch_major" and x.stride(2) != 1)


def _in_one(x: Tensor, tensors: tuple, how: tuple, relu: bool) -> Tensor:
    """`F.batch_norm` of M * F features, on [M, B, F, ...]."""
    weight, bias, *running = (None if t is None else t.flatten() for t in tensors)
    rows = x.transpose(0, 1)
    y = F.batch_norm(rows.flatten(1, 2), *running, weight, bias, *how)
    return (y.relu() if relu else y).unflatten(1, rows.shape[1:3]).transpose(0, 1)


class _MemberBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, layout, eps, training, relu, backend):
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.options = layout, eps, training, relu
        ctx.backend = backend
        return apply_op(x, weight, bias, mean, var, layout, eps, relu, backend)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, var = ctx.saved_tensors
        layout, eps, training, relu = ctx.options
        need_x, *need_p = ctx.needs_input_grad[:3]
        if wants_graph():
            given = (None, None) if training else (mean, var)

            def reference(x, weight, bias):
                return _each(x, (*given, weight, bias), (training, 0.0, eps), relu)

            tensors = (x, weight, bias)
            found = reference_backward(reference, tensors, (need_x, *need_p), dy)
            return (*found, *[None] * 7)
        found = backward_op(
            dy, x, weight, bias, mean, var, *ctx.options, need_x, any(need_p), ctx.backend
        )
        needs = (need_x, *need_p)
        return *[g if need else None for g, need in zip(found, needs, strict=True)], *[None] * 7


def _nothing(x: Tensor, *parameters: Tensor | None) -> Tensor:
    """A zero that depends on all of them, for results without elements."""
    return sum((t.sum() * 0 for t in parameters if t is not None), x.sum()).to(x.dtype)


def _check(x, tensors, training, momentum, eps, layout, members, activation) -> int:
    """M, once all is checked."""
    require(layout in LAYOUTS, OP, "layout", f"one of {LAYOUTS}", repr(layout))
    require(activation in (None, "relu"), OP, "activation", "None or 'relu'", repr(activation))
    least = 2 if layout == "folded" else 3
    letters = {"member_major": "M, B, F", "batch_major": "B, M, F", "folded": "M*B, F"}[layout]
    if not isinstance(x, Tensor):
        raise TypeError(message(OP, "x", f"a Tensor [{letters}, ...]", type(x).__name__))
    check_tensor(OP, "x", x, ", ".join("x" * x.ndim), (None,) * x.ndim)  # its dtype
    require(x.ndim >= least, OP, "x", f"[{letters}, ...]", list(x.shape))
    told = [t.shape[0] for t in tensors if isinstance(t, Tensor) and t.ndim == 2]
    if layout != "folded":
        M = x.shape[1 if layout == "batch_major" else 0]
    else:
        M = told[0] if told else members
        rule, remedy = "given where no tensor [M, F] tells M", "pass members="
        require(M is not None, OP, "members", rule, None, remedy)
        require(whole(M, 1), OP, "members", "an integer of at least 1", M)
        rule = f"[M*B, F, ...] with M = {M}"
        require(x.shape[0] % M == 0, OP, "x", rule, list(x.shape))
    require(members in (None, M), OP, "members", f"M = {M}", members)
    n = x.shape[least - 1]
    names = ("weight", "bias", "running_mean", "running_var")
    for name, t in zip(names, tensors, strict=True):
        if t is not None:
            check_tensor(OP, name, t, "M, F", (M, n), like=x, like_name="x", or_float32=True)
    both = (tensors[2] is None) == (tensors[3] is None)
    require(both, OP, "running_var", "given exactly where running_mean is", _kind(tensors[3]))
    for name, t in zip(names[2:], tensors[2:], strict=True):
        if t is not None:
            require(t.is_contiguous(), OP, name, "contiguous", f"strides {t.stride()}")
    require(training or tensors[2] is not None, OP, "running_mean", "given in evaluation", None)
    numbers = x.numel() // max(1, M * n)
    require(
        not training or numbers != 1, OP, "x", "of more than one number per channel in training",
        list(x.shape),
    )  # fmt: skip
    require(0 <= momentum <= 1, OP, "momentum", "a number in [0, 1]", momentum)
    require(eps > 0, OP, "eps", "a number above 0", eps)
    return M


def _kind(t) -> str:
    return "None" if t is None else "a tensor"
