"""hyper_batch_l2 against the loop over members and examples that it stands for."""

import itertools

import pytest
import torch

from landscape_fast.ops import hyper_batch_l2, hyper_batch_l2_reference

M, B, I, O = 3, 6, 4, 6
NAMES = ("weight", "delta", "e", "h", "r", "s", "u", "v", "bias", "delta_bias", "e_bias", "h_bias")
KERNELS = [((), 1), ((3, 2), 1), ((3, 2), 2)]  # (kh, kw) and groups


def inputs(kernel=(), groups=1, dtype=torch.float64):
    shapes = [(O, I // groups, *kernel)] * 2 + [(M, B, O), (M, B)]
    shapes += [(M, I), (M, O), (M, I), (M, O), (M, O), (M, O), (M, B, O), (M, B)]
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    values[3], values[11] = values[3].exp(), values[11].exp()
    return values


def loop(weight, delta, e, h, r, s, u, v, bias, delta_bias, e_bias, h_bias, groups):
    """Every weight of every member and example, one number at a time."""
    total = 0.0
    for m, b in itertools.product(range(M), range(B)):
        for o, j in itertools.product(range(O), range(I // groups)):
            i = o // (O // groups) * (I // groups) + j
            own = weight[o, j] * s[m, o] * r[m, i] + delta[o, j] * v[m, o] * u[m, i] * e[m, b, o]
            total += h[m, b] * own.square().sum()
        own = bias[m] + delta_bias[m] * e_bias[m, b]
        total += h_bias[m, b] * own.square().sum()
    return total / (M * B)


@pytest.mark.parametrize("kernel, groups", KERNELS)
def test_is_the_mean_over_weights_that_examples_see(kernel, groups):
    given = inputs(kernel, groups)
    torch.testing.assert_close(hyper_batch_l2(*given), loop(*given, groups))
    torch.testing.assert_close(hyper_batch_l2_reference(*given), loop(*given, groups))
    r, s = given[4:6]
    tied = [*given[:6], None, None, *given[8:]]
    expected = loop(*given[:6], r, s, *given[8:], groups)
    torch.testing.assert_close(hyper_batch_l2(*tied), expected)


@pytest.mark.parametrize("kernel, groups", KERNELS)
@pytest.mark.parametrize(
    "absent", [(), (4, 5, 6, 7), (4,), (5,), (6, 7), (8, 9, 10), (9, 10), (8,), (11,)], ids=str
)
def test_gradients_with_anything_missing(absent, kernel, groups):
    given = [
        None if i in absent else t.requires_grad_() for i, t in enumerate(inputs(kernel, groups))
    ]
    leaves = [t for t in given if t is not None]
    y, truth = hyper_batch_l2(*given), hyper_batch_l2_reference(*given)
    torch.testing.assert_close(y, truth)
    found = torch.autograd.grad(y, leaves, allow_unused=True)
    expected = torch.autograd.grad(truth, leaves, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_biases_for_all_members():
    given = inputs()
    given[8], given[9] = given[8][0], given[9][0]
    torch.testing.assert_close(hyper_batch_l2(*given), hyper_batch_l2_reference(*given))


def test_gradgradcheck():
    given = [t.requires_grad_() for t in inputs((2, 1), 2)]
    assert torch.autograd.gradgradcheck(hyper_batch_l2, given)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_adds_up_in_float32(low):
    """16-bit layers, and layers under autocast: a sum of squares needs the digits."""
    given = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = hyper_batch_l2(*given)
    assert under.dtype == torch.float32 and torch.equal(under, hyper_batch_l2(*given))
    halves = [t.to(low) for t in given]
    found, truth = hyper_batch_l2(*halves), hyper_batch_l2_reference(*[t.double() for t in halves])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)


def test_meta_device():
    given = [t.to("meta") for t in inputs(dtype=torch.float32)]
    found = hyper_batch_l2(*given)
    assert found.shape == () and found.device.type == "meta"


def test_makes_no_weight_per_member():
    """Nothing that autograd keeps is larger than a weight, or than the responses."""
    given = [t.requires_grad_() for t in inputs((3, 3))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hyper_batch_l2(*given)
    assert max(t.numel() for t in saved) <= max(given[0].numel(), M * B * O)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight": None}, "weight must be a Tensor; got NoneType"),
        (
            {"weight": torch.zeros(6, 4).long()},
            "weight must be one of float32, bfloat16, float16, float64; got torch.int64",
        ),
        ({"weight": torch.zeros(6)}, r"weight must be \[O, I\] or .*; got \[6\]"),
        ({"delta": torch.zeros(6, 3)}, r"delta must be \[O, I\] with O = 6, I = 4; got \[6, 3\]"),
        ({"e": torch.zeros(3, 6, 12)}, r"e must be \[M, B, O\] with O = 6; got \[3, 6, 12\]"),
        ({"h": torch.zeros(3, 5)}, r"h must be \[M, B\] with M = 3, B = 6; got \[3, 5\]"),
        ({"r": torch.zeros(3, 5)}, r"r must be \[M, I\] with I = 4 per group; got \[3, 5\]"),
        ({"r": torch.zeros(3, 8)}, r"r must be \[M, I\] with I = 4 per group; got \[3, 8\]"),
        ({"v": torch.zeros(2, 6)}, r"v must be \[M, O\] with M = 3, O = 6; got \[2, 6\]"),
        ({"bias": torch.zeros(5)}, r"bias must be \[O\] with O = 6; got \[5\]"),
        ({"e_bias": None}, "e_bias must be given where delta_bias is; got None"),
        ({"delta_bias": None}, "delta_bias must be given where e_bias is; got None"),
        (
            {"s": torch.zeros(3, 6, device="meta")},
            "s must be on the device of weight, cpu; got meta",
        ),
    ],
    ids=str,
)
def test_refuses(changes, message):
    given = dict(zip(NAMES, inputs(dtype=torch.float32), strict=True))
    expected = TypeError if "Tensor; got" in message else ValueError
    with pytest.raises(expected, match=f"^hyper_batch_l2: {message}"):
        hyper_batch_l2(**{**given, **changes})
