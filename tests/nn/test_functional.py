"""batch_ensemble_conv in one to three dimensions, and transposed, against a loop over members."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ops.problem import assert_held
from torch import nn

from landscape_fast.nn import saved_bytes
from landscape_fast.nn.functional import batch_ensemble_conv
from landscape_fast.ops import _batch_ensemble_conv2d_plan as plan

M, B, I, O = 3, 2, 4, 8
PIXELS = (5, 7, 4)


@pytest.fixture(params=["once", "merged"], autouse=True)
def way(request, monkeypatch):
    """Both library paths, whatever the sizes say."""
    least = float("inf") if request.param == "once" else 0
    monkeypatch.setattr(plan, "MERGED_FORWARD_FROM", least)
    monkeypatch.setattr(plan, "MERGED_BACKWARD_FROM", least)


def inputs(dims, groups=1, transposed=False, shared=False, kernel=3):
    sizes = (I, O // groups) if transposed else (O, I // groups)
    rows = (B,) if shared else (M, B)
    shapes = ((*rows, I, *PIXELS[:dims]), (*sizes, *[kernel] * dims), (M, I), (M, O), (M, O))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def loop(x, weight, r, s, bias, groups=1, transposed=False, padding_mode="zeros", **options):
    """One plain convolution per member, with its weight written out entry by entry."""
    dims = weight.ndim - 2
    first, second = weight.shape[:2]
    name = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    ys = []
    for m in range(M):
        own = weight.clone()
        for a, c in itertools.product(range(first), range(second)):
            other = a // (first // groups) * second + c
            i, o = (a, other) if transposed else (other, a)
            own[a, c] *= s[m, o] * r[m, i]
        images = x[m] if x.ndim == dims + 3 else x
        if padding_mode != "zeros":
            amounts = [options["padding"]] * 2 * dims
            images, plain = F.pad(images, amounts, mode=padding_mode), {**options, "padding": 0}
        else:
            plain = options
        ys.append(getattr(F, name)(images, own, bias[m], groups=groups, **plain))
    return torch.stack(ys)


def check(tensors, **options):
    truth = loop(*tensors, **options)
    y = batch_ensemble_conv(*tensors, **options)
    torch.testing.assert_close(y, truth)
    dy = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, tensors, dy)
    for a, b in zip(torch.autograd.grad(y, tensors, dy), expected, strict=True):
        torch.testing.assert_close(a, b)
    if tensors[0].ndim == tensors[1].ndim + 1:
        x, *rest = tensors
        folded = batch_ensemble_conv(x.flatten(0, 1), *rest, layout="folded", **options)
        torch.testing.assert_close(folded, truth.flatten(0, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])  # 4: depthwise
@pytest.mark.parametrize("shared", [False, True])
def test_convolutions(dims, groups, shared):
    tensors = inputs(dims, groups, shared=shared)
    for options in ({}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}):
        check(tensors, groups=groups, **options)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_transposed_convolutions(dims, groups, shared):
    tensors = inputs(dims, groups, True, shared)
    for options in ({}, {"stride": 3, "padding": 1, "output_padding": 2}, {"dilation": 2}):
        check(tensors, groups=groups, transposed=True, **options)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(dims, mode):
    check(inputs(dims), padding=2, padding_mode=mode, stride=2)


@pytest.mark.parametrize("members", [1, 4])
def test_published_recipes(members):
    """Layers of Edward2 against a loop over members, as its tests make them, transcribed.

    Depthwise (one output channel per input channel), two dimensions and one, with random signs.
    """
    images, sequence = torch.randn(4 * members, 3, 10, 10), torch.randn(4 * members, 3, 10)
    for x, outputs, groups in ((images, 3, 3), (images, 5, 1), (sequence, 5, 1)):
        dims = x.ndim - 2
        weight = torch.randn(outputs, 3 // groups, *[2] * dims)
        r = torch.randn(members, 3).sign()
        s = torch.randn(members, outputs).sign()
        bias = torch.randn(members, outputs)
        y = batch_ensemble_conv(x, weight, r, s, bias, groups=groups, layout="folded")
        plain = getattr(F, f"conv{dims}d")
        tail = (..., *[None] * dims)
        for m, chunk in enumerate(x.chunk(members)):
            own = plain(chunk * r[m][tail], weight, groups=groups) * s[m][tail] + bias[m][tail]
            torch.testing.assert_close(y.chunk(members)[m], own)


@pytest.mark.parametrize("dims, transposed", [(1, False), (3, False), (1, True), (2, True)])
def test_second_derivatives(dims, transposed):
    pixels, members = (2, 3, 2)[:dims], 2
    sizes = ((members, 1, 2, *pixels), (2, 2, *[2] * dims), (members, 2), (members, 2), (2,))
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]

    def function(*tensors):
        return batch_ensemble_conv(*tensors, transposed=transposed, padding=1, activation="relu")

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dims, transposed", [(1, False), (3, False), (2, True)])
def test_keeps_x_alone(dims, transposed):
    parameters = [nn.Parameter(t.detach()) for t in inputs(dims, transposed=transposed)]
    x = parameters[0].detach().requires_grad_()
    function = partial(batch_ensemble_conv, transposed=transposed)
    assert saved_bytes(function, x, *parameters[1:]) == x.nbytes


@pytest.mark.parametrize("dims", [1, 3])
def test_mixed_dtypes(dims):
    """16-bit images, float32 parameters: their gradients within 1e-6 of float64."""
    x, *rest = [t.detach() for t in inputs(dims, kernel=2)]
    mixed = [x.half(), *[t.float() for t in rest]]
    low = [t.half().double() for t in mixed]
    for t in (*mixed, *low):
        t.requires_grad_()
    y, truth = batch_ensemble_conv(*mixed), loop(*low)
    dy = torch.randn(truth.shape).half()
    found = torch.autograd.grad(y, mixed, dy)
    expected = torch.autograd.grad(truth, low, dy.double())
    for a, b in list(zip(found, expected, strict=True))[1:]:
        assert a.dtype == torch.float32
        assert_held(a, b)


@pytest.mark.parametrize(
    "dims, options, message",
    [
        (2, {"transposed": True, "padding": "same"}, "padding must be numbers for a transposed"),
        (
            1,
            {"transposed": True, "padding_mode": "reflect"},
            "padding_mode must be 'zeros' for a transposed convolution; got 'reflect'",
        ),
        (
            3,
            {"transposed": True, "output_padding": 1},
            r"output_padding must be smaller than stride or dilation; got \(1, 1, 1\)",
        ),
        (3, {"output_padding": 1}, "output_padding must be 0; got 1"),
        (1, {"stride": (1, 1)}, r"stride must be an integer, at least 1; got \(1, 1\)"),
        (3, {"stride": (1, 1)}, r"stride must be an integer or three, at least 1; got \(1, 1\)"),
        (1, {"groups": 3}, "groups must be a divisor of O = 8; got 3"),
        (1, {"groups": 3, "transposed": True}, "groups must be a divisor of I = 8; got 3"),
        (3, {"padding": 0}, r"x must be of at least one output pixel for a kernel \[9, 9, 9\]"),
    ],
    ids=str,
)
def test_refuses(dims, options, message):
    kernel = 9 if options == {"padding": 0} else 3
    x, weight, *factors = inputs(dims, kernel=kernel)
    with pytest.raises(ValueError, match=f"^batch_ensemble_conv: {message}"):
        batch_ensemble_conv(x, weight, *factors, **options)


def test_refuses_a_weight_of_other_dimensions():
    x, weight, *factors = inputs(1)
    with pytest.raises(ValueError, match=r"weight must be of 3 to 5 dimensions; got \[8, 4\]"):
        batch_ensemble_conv(x, weight[..., 0], *factors)
