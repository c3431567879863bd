"""The entries of catalogue.py for layers whose weights are combinations of anchors."""

from functools import partial

import torch

from landscape_fast.ops.subspace_conv2d import subspace_conv2d, subspace_conv2d_reference
from landscape_fast.ops.subspace_linear import subspace_linear, subspace_linear_reference


def _linear(own, shared=False, M=3, K=2, I=70, O=45):
    """x, anchors, coefficients unless every member has its own weight, bias."""

    def make(scale):
        B, i, o = 37 * scale, I * scale, O * scale
        x = torch.randn(*(() if shared else (M,)), B, i)
        anchors, bias = torch.randn(M if own else K, o, i) / i**0.5, torch.randn(M if own else K, o)
        return [x, anchors, bias] if own else [x, anchors, torch.randn(M, K), bias]

    return make


def _conv(own, shared=False, kernel=3, M=3, K=2, I=18, O=20):
    """The same for images with channels last."""

    def make(scale):
        rows = (() if shared else (M,)) + (5 * scale,)
        x = torch.randn(*rows, 9, 11, I).movedim(-1, -3)
        count = M if own else K
        anchors = torch.randn(count, O, I, kernel, kernel) / (I * kernel**2) ** 0.5
        rest = [] if own else [torch.randn(M, K)]
        return [x, anchors, *rest, torch.randn(count, O)]

    return make


def _own_weights(function, x, weight, bias, **options):
    return function(x, weight, None, bias, **options)


def entries(entry):
    """Those of both layers; `entry` is catalogue.Entry."""
    op, functions = "subspace_linear", (subspace_linear, subspace_linear_reference)
    own = [partial(_own_weights, function) for function in functions]
    yield entry("subspace linear, mixed", op, *functions, _linear(False))
    yield entry("subspace linear, own weights", op, *own, _linear(True))
    yield entry("subspace linear, shared", op, *own, _linear(True, True))
    op, functions = "subspace_conv2d", (subspace_conv2d, subspace_conv2d_reference)
    ways = {  # options, inputs, whether members have weights of their own, which kernels
        "3x3": ({"padding": 1}, _conv(False), False, ("triton",)),
        "strided": (
            {"stride": 2, "padding": 1, "dilation": (1, 2)},
            _conv(True),
            True,
            ("triton",),
        ),
        "stem, shared": ({"padding": "same"}, _conv(True, True, I=3), True, ("triton",)),
        "boxes": ({"padding": 1}, _conv(True, I=40, O=72), True, ("triton",)),
        "boxes, 1x1": ({}, _conv(True, kernel=1, I=64, O=136), True, ("triton",)),
        "narrow": ({"padding": 1}, _conv(True, I=16, O=32), True, ()),
        "narrow, mixed, shared": ({"padding": 1}, _conv(False, True, I=32, O=16), False, ()),
    }
    for name, (options, make, alone, only) in ways.items():
        calls = [partial(_own_weights, f) if alone else f for f in functions]
        calls = [partial(call, **options) for call in calls]
        yield entry(f"subspace conv {name}", op, *calls, make, only=only)
