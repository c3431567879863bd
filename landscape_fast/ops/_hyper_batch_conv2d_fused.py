"""The registered fused kernels of hyper_batch_conv2d, and when they are expected to be quicker.

`x` is [M, B, I, H, W], or [1, B, I, H, W] where the members share it; `pads` are zeros above, left,
below and right. A channels-last x or weight makes a channels-last output.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops import _batch_ensemble_conv2d_plan as single
from landscape_fast.ops._batch_ensemble_conv2d_fused import (
    _images,
    _packed,
    channels_last,
    kind_of,
    pads_of,
    tf32_allowed,
)
from landscape_fast.ops._batch_ensemble_conv_checks import Conv, output_size
from landscape_fast.ops._batch_ensemble_linear_plan import architecture
from landscape_fast.ops._dispatch import free, rounded
from landscape_fast.ops._hyper_batch import Inputs, held_in_float32, in_dtypes
from landscape_fast.ops._hyper_batch_conv_ways import offsets, sums
from landscape_fast.ops._library import define

BY_KERNEL = ("x", "weight", "delta", "r", "s", "u", "v")
ADDED = ("e", "bias", "delta_bias", "e_bias")


class Plan(NamedTuple):
    """How to run the forward and the backward: "fused" or "composed"."""

    forward: str
    backward: str


def choose(p: single.Problem) -> Plan:
    """The smaller estimate for each direction; a tie goes to the fused kernels.

    Estimates are twice those of batch_ensemble_conv2d, and the passes that come on top; as there,
    the kernels do not come into question where channels are not last.
    """
    if not p.channels_last:
        return Plan("composed", "composed")
    needs = single.Needs(x=True, weight=True, r=p.has_r, s=p.has_s)
    y = p.M * p.B * p.outputs * p.O

    def passes(tensors):
        return single._pass(p, tensors * y)

    forward = 2 * single.forward_time(p, "fused") - single.GEMM_LAUNCH + passes(1)
    library = 2 * single.forward_time(p, "merged") + passes(3)
    backward = 2 * single.backward_time(p, needs, "fused") + 2 * passes(3)
    by_library = 2 * single.backward_time(p, needs, "merged") + 2 * passes(3)
    return Plan(
        "fused" if forward <= library else "composed",
        "fused" if backward <= by_library else "composed",
    )


def plan_for(t: Inputs, conv: Conv) -> Plan:
    """The plan for tensors on a CUDA device."""
    x, (O, _, *kernel) = t.x, t.weight.shape
    (B, I, *size), M = x.shape[1:], t.e.shape[0]
    if free(M, *x.shape[1:]):
        return Plan("composed", "composed")
    pixels = prod(output_size(tuple(size), tuple(kernel), conv))
    how = (architecture(x.device.index), kind_of(x.dtype), x.shape[0] == 1 and M > 1)
    factors = (t.r is not None or t.u is not None, t.s is not None or t.v is not None)
    sizes = (M, B, I, O, prod(kernel), prod(size), pixels)
    return choose(single.Problem(*sizes, *how, *factors, channels_last(x)))


def fused(t: Inputs, conv: Conv, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(y, z2) by the kernel; z2 None unless it is kept."""
    options = (list(conv.stride), pads_of(conv), list(conv.dilation))
    y, z2 = forward_op(*t[:8], offsets(_in_float32(t)), *options, keep)
    return y, z2 if keep else None


def fused_backward(
    dy: Tensor, t: Inputs, z2: Tensor | None, needs: Inputs, conv: Conv
) -> list[Tensor | None]:
    """Gradients by the kernels; those of e and the biases by library calls."""
    found = dict.fromkeys(Inputs._fields) | sums(dy, _in_float32(t), z2, needs)
    wanted = needs._replace(e=False, bias=False, delta_bias=False, e_bias=False)
    if any(wanted):
        options = (list(conv.stride), pads_of(conv), list(conv.dilation))
        gradients = backward_op(dy, *t[:8], list(wanted), *options)
        for name, gradient in zip(BY_KERNEL, gradients, strict=True):
            found[name] = gradient if getattr(wanted, name) else None
        for name in ("weight", "delta"):
            if found[name] is not None:
                found[name] = found[name].permute(0, 3, 1, 2)
    return in_dtypes(list(found.values()), t)


def _in_float32(t: Inputs) -> Inputs:
    """What is added to images as x rounds it, and then in float32."""
    added = rounded(torch.float32, *rounded(t.x.dtype, *[getattr(t, name) for name in ADDED]))
    return t._replace(**dict(zip(ADDED, added, strict=True)))


def _forward_fake(x, weight, delta, e, r, s, u, v, shift, step, pads, dilation, keep):
    kernel, size = weight.shape[2:], x.shape[3:]
    out = [
        (size[d] + pads[d] + pads[d + 2] - dilation[d] * (kernel[d] - 1) - 1) // step[d] + 1
        for d in (0, 1)
    ]
    last = channels_last(x) or channels_last(weight)
    shape = (e.shape[0], x.shape[1], weight.shape[0], *out)
    return _images(x, last, *shape), _images(x, last, *shape) if keep else x.new_empty(0)


def _forward_impl(x, weight, delta, e, r, s, u, v, shift, step, pads, dilation, keep):
    from landscape_fast.kernels.hyper_batch_conv2d import hyper_batch_conv2d_fwd

    arguments = (x, weight, delta, e, r, s, u, v, shift, step, pads, dilation, keep)
    y, z = _forward_fake(*arguments)
    tensors = (x, _packed(weight, x), _packed(delta, x), e, r, s, u, v, shift, y)
    options = (step, pads[:2], dilation, tf32_allowed())
    hyper_batch_conv2d_fwd(*tensors, z if keep else None, *options)
    return y, z


def _backward_fake(dy, x, weight, delta, e, r, s, u, v, needs, step, pads, dilation):
    (O, I, kh, kw), wanted, found = weight.shape, Inputs(*needs), []
    for name, t in zip(BY_KERNEL, (x, weight, delta, r, s, u, v), strict=True):
        if not getattr(wanted, name):
            found.append(x.new_empty(0))
        elif name == "x":
            found.append(_images(x, channels_last(x), *x.shape))
        else:
            shape = (O, kh, kw, I) if name in ("weight", "delta") else t.shape
            found.append(t.new_empty(shape))
    return tuple(found)


def _backward_impl(dy, x, weight, delta, e, r, s, u, v, needs, step, pads, dilation):
    from landscape_fast.kernels.hyper_batch_conv2d import hyper_batch_conv2d_bwd

    found = _backward_fake(dy, x, weight, delta, e, r, s, u, v, needs, step, pads, dilation)
    wanted = Inputs(*needs)
    exact = held_in_float32(Inputs(x, weight, delta, e, r, s, u, v), wanted)
    outputs = [g if getattr(wanted, n) else None for n, g in zip(BY_KERNEL, found, strict=True)]
    tensors = (dy, x, _packed(weight, x), _packed(delta, x), e, r, s, u, v, *outputs)
    options = (step, pads[:2], dilation, tf32_allowed())
    hyper_batch_conv2d_bwd(*tensors, *options, exact=exact)
    return found


forward_op = define(
    "hyper_batch_conv2d(Tensor x, Tensor weight, Tensor delta, Tensor e, Tensor? r, Tensor? s,"
    " Tensor? u, Tensor? v, Tensor? shift, int[] step, int[] pads, int[] dilation, bool keep)"
    " -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
backward_op = define(  # the gradients of weight and delta are [O, kh, kw, I]
    "hyper_batch_conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor delta, Tensor e,"
    " Tensor? r, Tensor? s, Tensor? u, Tensor? v, bool[] needs, int[] step, int[] pads,"
    " int[] dilation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
