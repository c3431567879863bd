"""A convolution of M members whose weights are combinations of K anchors."""

from math import prod

import torch.nn.functional as F
from torch import Tensor

from landscape_fast.ops import _dispatch
from landscape_fast.ops import _subspace_conv2d_ways as ways
from landscape_fast.ops._batch_ensemble_conv2d_fused import channels_last, kind_of
from landscape_fast.ops._batch_ensemble_conv_checks import Conv, output_size
from landscape_fast.ops._batch_ensemble_linear_plan import architecture
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
from landscape_fast.ops._subspace_conv2d_autograd import apply, definition, mixed
from landscape_fast.ops._subspace_conv2d_checks import alone, prepare
from landscape_fast.ops._subspace_conv2d_kernels import OP, obstacle, usable
from landscape_fast.ops._subspace_conv2d_plan import Plan, Problem, choose, composed_plan

declare(OP, triton=KERNEL_DTYPES, cuda=KERNEL_DTYPES)


def subspace_conv2d(
    x: Tensor,
    anchors: Tensor,
    coeffs: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    layout: str = "member_major",
    backend: str = "auto",
) -> Tensor:
    r"""M convolutions, each with its own weight: a combination of K anchors, or one of them each.

    .. math:: y_m = \mathrm{conv}\Big(x_m, \sum_k c_{mk} A_k\Big) + \sum_k c_{mk} b_k

    Args:
        x: [M, B, I, H, W], or [B, I, H, W] shared by all members; [M*B, I, H, W] with members in
            consecutive rows for the folded layout.
        anchors: [K, O, I / groups, kh, kw]. Of the dtype of `x`, or float32 where `x` has 16 bits:
            then weights are rounded for the products, and their gradients are not.
        coeffs: [M, K], any real numbers, float32 or the dtype of `anchors`; None where member m has
            the weight `anchors[m]`, and M is K: a deep ensemble.
        bias: [K, O] of the dtype of `anchors`, mixed as they are, or None.
        stride: as in `torch.nn.functional.conv2d`; dilation and groups: likewise.
        padding: numbers, "same" (stride 1 only) or "valid".
        layout: "member_major" or "folded".
        backend: "auto", "torch", "triton" or "cuda"; see `landscape_fast.show_config`. On CUDA
            tensors "auto" takes, for each shape and each of y, dx and dweight, what is expected to
            be quickest: kernels that run all members in one launch, where channels are last and
            groups is 1, or calls of the library. "cuda" is for 3 by 3 weights of 16 or 32 channels.

    Returns:
        [M, B, O, H', W'], or [M*B, O, H', W'] for the folded layout, in the dtype of `x` (of
        autocast where it is on). The members of a result in five dimensions may lie side by side
        in memory, as channels do.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes, devices or options disagree, or the backend cannot run here.

    Cost: M convolutions of B images, and `combine` of the anchors, again in the backward. Of the
        activations x alone is kept for it, and no mixed weight. With one member this is
        `torch.nn.functional.conv2d` itself, also under autocast, whose gradients are rounded as it
        rounds them. Differentiable to any order.

    Source: lines and simplexes of Wortsman et al. 2021 (arXiv:2102.10472), curves of Garipov et al.
        2018 (arXiv:1802.10026).

    Example:
        >>> import torch
        >>> x = torch.ones(1, 1, 2, 2)  # one image, shared by all members
        >>> ends = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
        >>> coeffs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        >>> subspace_conv2d(x, ends, coeffs)[..., 0, 0].flatten()
        tensor([1., 2., 3.])
    """
    tensors, given = (x, anchors, coeffs, bias), (stride, padding, dilation, groups)
    if backend in ("auto", "torch") and _dispatch.FORCED in ("auto", "torch"):
        images = alone(tensors, layout, groups)
        if images is not None:
            y = _alone(images, tensors, given, layout)
            return y if layout == "folded" else y.unsqueeze(0)
    tensors, members, conv = prepare(OP, tensors, given, layout)
    y = _run(tensors, members, conv, backend)
    return y.flatten(0, 1) if layout == "folded" else y


def subspace_conv2d_reference(
    x: Tensor,
    anchors: Tensor,
    coeffs: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    layout: str = "member_major",
) -> Tensor:
    """The definition: every backend is tested against this, run in float64."""
    given = (stride, padding, dilation, groups)
    tensors, _, conv = prepare(OP, (x, anchors, coeffs, bias), given, layout)
    y = definition(*tensors, conv)
    return y.flatten(0, 1) if layout == "folded" else y


def _alone(images: Tensor, tensors: tuple, given: tuple, layout: str) -> Tensor:
    """The convolution of the one member that there is."""
    _, anchors, _, bias = tensors
    try:
        return F.conv2d(images, anchors[0], None if bias is None else bias[0], *given)
    except (TypeError, ValueError, RuntimeError):
        prepare(OP, tensors, given, layout)  # raises, and says why
        raise


def _run(tensors: tuple, members: int, conv: Conv, backend: str) -> Tensor:
    """[M, B, O, H', W'] of prepared tensors, x as [M or 1, B, I, H, W]."""
    x, anchors, coeffs, bias = tensors
    name = pick(OP, backend, x)
    forced = name != "torch" and name in (backend, _dispatch.FORCED)
    if forced:
        why = obstacle(name, anchors, conv)
        if why and backend == name:
            argument, _, rule = why.partition(" must be ")
            how = f"{list(anchors.shape[3:])}, {conv.stride}, {conv.padding}, {conv.dilation}"
            got = {"groups": conv.groups, "channels": list(anchors.shape[1:3])}.get(argument, how)
            raise ValueError(message(OP, argument, f"{rule} with backend {name!r}", got))
        forced = not why
    if transforming() or x.numel() == 0:
        with without_autocast(x.device.type):
            return definition(*tensors, conv)
    if forced:
        plan = Plan(name, name, name)
    else:
        plan = plan_for(tensors, members, conv, name)
    if members == 1 and plan.y == "loop" and anchors.dtype == x.dtype:
        weight, own = (anchors, bias) if coeffs is None else mixed(anchors, coeffs, bias)
        return ways.forward(x, weight, own, conv, "loop")  # autograd needs no help with one
    return apply(*tensors, conv, plan)


def plan_for(tensors: tuple, members: int, conv: Conv, name: str) -> Plan:
    """The quickest ways, of the library alone where `name` is "torch"."""
    x, anchors, coeffs, _ = tensors
    (K, O, per_group, *kernel), (B, I, *size) = anchors.shape, x.shape[1:]
    if free(members, *x.shape[1:]):
        return Plan("loop", "loop", "loop")
    pixels = prod(output_size(tuple(size), tuple(kernel), conv))
    if x.device.type != "cuda":
        products = B * pixels * O * per_group * prod(kernel)
        return composed_plan(members, products, conv.groups, x.shape[0] == 1)
    problem = Problem(
        members, B, I, O, prod(kernel), prod(size), pixels, architecture(x.device.index),
        kind_of(x.dtype), x.shape[0] == 1, channels_last(x), conv.groups,
        0 if coeffs is None else K,
    )  # fmt: skip
    kernels = () if name == "torch" else usable(x, anchors, conv)
    return choose(problem, kernels, wants_grad(x))
