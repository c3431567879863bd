"""A convolution of M members that share one weight up to rank-one factors (BatchEnsemble)."""

from math import prod

import torch
from torch import Tensor

from landscape_fast.ops import _dispatch
from landscape_fast.ops._batch_ensemble_conv2d_fused import channels_last, fusable, kind_of
from landscape_fast.ops._batch_ensemble_conv2d_plan import Plan, Problem, choose
from landscape_fast.ops._batch_ensemble_conv_autograd import apply
from landscape_fast.ops._batch_ensemble_conv_checks import Conv, output_size
from landscape_fast.ops._batch_ensemble_conv_nd import library_plan, prepare
from landscape_fast.ops._batch_ensemble_conv_ways import definition
from landscape_fast.ops._batch_ensemble_linear_plan import Needs
from landscape_fast.ops._batch_ensemble_linear_plan import architecture as _architecture
from landscape_fast.ops._checks import message
from landscape_fast.ops._dispatch import (
    KERNEL_DTYPES,
    declare,
    free,
    pick,
    transforming,
    wants_grad,
    without_autocast,
)

OP = "batch_ensemble_conv2d"
FUSED = Plan("fused", "fused")

declare(OP, triton=KERNEL_DTYPES)


def batch_ensemble_conv2d(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "member_major",
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""M convolutions that share one weight and differ by a rank-1 factor each.

    .. math:: y_m = s_m \circ \mathrm{conv}(x_m \circ r_m, W) + b_m

    Both factors scale whole channels, so this equals a convolution with the weight
    `weight * s[m, o] * r[m, i]` for every stride, padding, dilation and number of groups.

    Args:
        x: [M, B, I, H, W], or [B, I, H, W] shared by all members; [M*B, I, H, W] with members in
            consecutive rows for the folded layout. Channels-last memory is kept.
        weight: [O, I / groups, kh, kw]. Like all that follows of the dtype of `x`, or float32
            where `x` has 16 bits: then it is rounded for the products, and its gradient is not.
        r: [M, I] or None.
        s: [M, O] or None.
        bias: [M, O], or [O] shared by all members, or None.
        stride: as in `torch.nn.functional.conv2d`; dilation and groups: likewise.
        padding: numbers, "same" (stride 1 only) or "valid".
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        layout: "member_major" or "folded".
        activation: None, or "relu" on the result.
        backend: "auto", "torch" or "triton"; see `landscape_fast.show_config`. On CUDA tensors
            "auto" takes, for each shape, what is expected to be quicker: the Triton kernels, or the
            composition of library calls that "torch" names.

    Returns:
        [M, B, O, H', W'], or [M*B, O, H', W'] for the folded layout, in the dtype of `x` (of
        autocast where it is on).

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or options disagree, nothing tells M, or the backend
            cannot run here.

    Cost: one convolution of M*B images, and at most one pass over its input and output for the
        factors. A shared `x` without `r` is convolved once, for all members. Of the activations
        `x` alone is kept for the backward (and y with an activation), which convolves once more for
        ds where one call of the library serves all members: for small images on a CPU, and on a GPU
        where that is expected to be quickest. Differentiable to any order.

    Source: Wen et al. 2020 (arXiv:2002.06715).

    Example:
        >>> import torch
        >>> x = torch.ones(1, 1, 2, 2)  # one image, shared by two members
        >>> s = torch.tensor([[1.0], [-2.0]])
        >>> batch_ensemble_conv2d(x, torch.ones(1, 1, 2, 2), s=s).flatten()
        tensor([ 4., -8.])
    """
    options = (stride, padding, dilation, groups, padding_mode, (0, 0), False)
    given = (x, weight, r, s, bias)
    tensors, members, conv = prepare(OP, given, options, layout, activation, (2,))
    y = run_images(tensors, members, conv, activation, backend)
    return y.flatten(0, 1) if layout == "folded" else y


def batch_ensemble_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "member_major",
    activation: str | None = None,
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    options = (stride, padding, dilation, groups, padding_mode, (0, 0), False)
    given = (x, weight, r, s, bias)
    tensors, members, conv = prepare(OP, given, options, layout, activation, (2,))
    y = definition(*tensors, conv, activation)
    return y.flatten(0, 1) if layout == "folded" else y


def run_images(
    tensors: tuple, members: int, conv: Conv, activation: str | None, backend: str = "auto"
) -> Tensor:
    """[M, B, O, *pixels] of prepared tensors, x as [M or 1, B, I, H, W], with a choice of ways."""
    x, name = tensors[0], pick(OP, backend, tensors[0])
    obstacle = fusable(conv)
    if backend == "triton" and obstacle:
        argument, _, rule = obstacle.partition(" must be ")
        got = conv.groups if argument == "groups" else repr(conv.mode)
        raise ValueError(message(OP, argument, f"{rule} with backend 'triton'", got))
    if transforming() or x.numel() == 0:
        with without_autocast(x.device.type):
            return definition(*tensors, conv, activation)
    forced = backend == "triton" or _dispatch.FORCED == "triton"
    if name == "triton" and forced and not obstacle:
        plan = FUSED
    elif x.device.type != "cuda" and (name == "torch" or forced):
        plan = library_plan(tensors, members, conv)
    else:
        plan = _plan(tensors, members, conv, name == "triton" and not obstacle)
    return apply(*tensors, members, conv, activation, plan)


def _plan(tensors: tuple, members: int, conv: Conv, fused: bool) -> Plan:
    x, weight, r, s, _ = tensors
    if free(members, *x.shape[1:]):
        return Plan("once", "once")
    needs = Needs(*[wants_grad(t) for t in tensors]) if torch.is_grad_enabled() else Needs()
    (O, _, *kernel), (B, I, *size) = weight.shape, x.shape[1:]
    problem = Problem(
        members, B, I, O, prod(kernel), prod(size), prod(output_size(size, kernel, conv)),
        _architecture(x.device.index), kind_of(x.dtype), x.shape[0] == 1 and members > 1,
        r is not None, s is not None, channels_last(x),
    )  # fmt: skip
    return choose(problem, needs, fused)
