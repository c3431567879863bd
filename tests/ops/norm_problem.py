"""Inputs of member_batch_norm, and the op as a function of x, weight and bias alone."""

import pytest
import torch

from landscape_fast.ops import member_batch_norm, member_batch_norm_reference

BACKENDS = ["torch", "triton"]
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # not to be trusted when interpreted
]
LAYOUTS = ["member_major", "batch_major", "folded"]
ORDERS = ["contiguous", "channels_last"]


def statistics(weight):
    """Running mean and variance to start from: fresh tensors with the same values every time."""
    ramp = torch.linspace(0, 1, weight.numel(), dtype=weight.dtype, device=weight.device)
    return [(2 * ramp - 1).view(weight.shape), (ramp + 0.5).view(weight.shape)]


def with_statistics(function):
    """The op as a function of x, weight and bias."""

    def call(x, weight, bias, **options):
        options.setdefault("training", True)
        return function(x, weight, bias, *statistics(weight), **options)

    return call


op, reference = with_statistics(member_batch_norm), with_statistics(member_batch_norm_reference)


def inputs(shape, layout="member_major", order="contiguous", device="cpu", **options):
    """x in a layout, far from standard in every channel, and weight and bias."""
    M, B, features, *pixels = shape
    channel = torch.arange(M * features, dtype=torch.float32).view(
        M, 1, features, *[1] * len(pixels)
    )
    # drawn first: `check_op` seeds its gradient as the tests are, and dx of dy = x is zero
    parameters = torch.randn(M, features), torch.randn(M, features)
    x = torch.randn(shape) * (1 + channel % 3) + channel % 5 - 2
    first = {"member_major": (M, B), "batch_major": (B, M), "folded": (M * B,)}[layout]
    x = x.transpose(0, 1) if layout == "batch_major" else x
    x = x.reshape(*first, features, *pixels).contiguous()
    if order == "channels_last":
        x = x.movedim(len(first), -1).contiguous().movedim(-1, len(first))
    return [t.to(device, **options) for t in (x, *parameters)]


def members_of(x, M, layout):
    if layout == "folded":
        return x.unflatten(0, (M, -1))
    return x.transpose(0, 1) if layout == "batch_major" else x
