"""The subspace_linear kernels in every way they are launched, in tiles small enough for many.

The interpreter runs the code that GPUs run, at sizes where all loops, splits and edges occur.
"""

import pytest
import torch
from ops.problem import assert_held, keyword

pytest.importorskip("triton")

from landscape_fast.kernels import subspace_linear as forward
from landscape_fast.kernels import subspace_linear_backward as backward
from landscape_fast.kernels import subspace_linear_tiles as tiles
from landscape_fast.kernels._launch import Config
from landscape_fast.ops import _dispatch
from landscape_fast.ops import _subspace_linear_plan as plans
from landscape_fast.ops._subspace_linear_kernels import product_op, weight_gradient_op
from landscape_fast.ops.subspace_linear import subspace_linear, subspace_linear_reference
from landscape_fast.testing import check_hessian, check_op, check_registered

LAYOUTS = ["member_major", "batch_major", "shared"]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # not to be trusted when interpreted


def inputs(K, layout, device, M=2, B=17, I=24, O=24, dtype=None):
    """x, anchors, coeffs, bias; for K = 0 weights of the members' own."""
    shape = {"batch_major": (B, M, I), "folded": (M * B, I), "shared": (B, I)}
    x = torch.randn(shape.get(layout, (M, B, I)), device=device, dtype=dtype)
    anchors = torch.randn(K or M, O, I, device=device) / I**0.5
    coeffs = torch.randn(M, K, device=device) if K else None
    return [x, anchors, coeffs, torch.randn(K or M, O, device=device)]


def small(tma=False):
    """The smallest tiles."""
    return Config({"BLOCK_B": 16, "BLOCK_O": 16, "BLOCK_I": 16, "GROUP": 2}, 4, 2, tma)


@pytest.fixture(params=["pointers", "descriptors"])
def mode(request, monkeypatch):
    """Makes `backend="triton"` take small tiles, in one of two ways; checks that it did."""
    tma = request.param == "descriptors"
    described = []

    def buckets(arch, stage, kind, with_descriptors):
        assert with_descriptors or not tma, "these inputs allow descriptors"
        return ((1.0, small(tma)),)

    def descriptor(*arguments, original=forward.descriptor):
        described.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(tiles, "buckets", buckets)
    for module in (forward, backward):
        monkeypatch.setattr(module, "descriptor", descriptor)
        if tma and not torch.cuda.is_available():
            monkeypatch.setattr(module, "arch", lambda tensor: 90)
    if tma:  # and the examples in two parts
        monkeypatch.setattr(tiles, "weight_split", lambda config, sms, sizes: (2, 16))
    caches = (tiles.product_config, tiles.weight_config)
    for cache in caches:
        cache.cache_clear()
    yield request.param
    for cache in caches:
        cache.cache_clear()
    assert bool(described) == tma


def check(arguments, layout="member_major", **options):
    options = {"layout": keyword(layout), "backend": "triton", **options}
    check_op(subspace_linear, subspace_linear_reference, arguments, **options)


@pytest.mark.parametrize("K", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode_agrees_with_the_definition(K, layout, mode, device):
    check(inputs(K, layout, device), layout)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("K", [0, 2])
def test_every_mode_in_half_precision(K, dtype, mode, device):
    check(inputs(K, "member_major", device), dtype=dtype)


@pytest.mark.parametrize("K", [1, 3, 4, 5])
def test_any_number_of_anchors(K, device):
    """Up to four are mixed in the kernel, more before it."""
    check(inputs(K, "folded", device, B=5, I=17, O=9), "folded")


@pytest.mark.parametrize("K", [0, 2])
def test_ragged_sizes_without_a_bias(K, device):
    check([*inputs(K, "batch_major", device, B=3, I=7, O=5)[:3], None], "batch_major")
    check([*inputs(K, "folded", device, B=1, I=33, O=1)[:3], None], "folded")


@pytest.mark.parametrize("K", [0, 2])
def test_parameters_held_in_float32(K, mode, device):
    """Beside a 16-bit x, they are rounded in the kernels, and their gradients are not."""
    x, *held = inputs(K, "member_major", device)
    there = [t.requires_grad_() for t in held if t is not None]
    y = subspace_linear(x.half(), *held, backend="triton")
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, there, dy)
    weights = [held[0], held[2]]
    if K:  # what is multiplied: mixed in float32, then rounded
        weights = [torch.tensordot(held[1], t, 1) for t in weights]
    low = [t.detach().half().double().requires_grad_() for t in weights]
    y_true = subspace_linear_reference(x.half().double(), low[0], None, low[1])
    torch.testing.assert_close(y.double(), y_true, rtol=2e-3, atol=2e-3)  # rounded to float16
    dweight, dbias = torch.autograd.grad(y_true, low, dy.double())
    truth = [dweight, dbias]
    if K:
        c, anchors, shifts = held[1].double(), held[0].double(), held[2].double()
        dcoeffs = torch.einsum("moi,koi->mk", dweight, anchors) + dbias @ shifts.T
        truth = [torch.tensordot(c.T, dweight, 1), dcoeffs, torch.tensordot(c.T, dbias, 1)]
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.float32
        assert_held(a, b)


def test_mixing_keeps_no_weights_of_members(device):
    x, anchors, coeffs, bias = inputs(2, "member_major", device)
    leaves = [t.requires_grad_() for t in (x, anchors, coeffs, bias)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        subspace_linear(*leaves, backend="triton")
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves}


@pytest.mark.parametrize("K", [0, 2])
def test_launches_only_what_is_wanted(K, monkeypatch, device):
    launched = []

    def watch(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: launched.append(name) or original(*a))

    watch(forward, "subspace_linear_product")
    watch(backward, "subspace_linear_bwd_weight")
    arguments = inputs(K, "member_major", device, B=3, I=5, O=4)
    for wanted, count in ((0, ["subspace_linear_product"]), (1, ["subspace_linear_bwd_weight"])):
        leaves = [t if t is None else t.clone() for t in arguments]
        leaves[wanted].requires_grad_()
        y = subspace_linear(*leaves, backend="triton")
        launched.clear()
        y.sum().backward()
        assert launched == count
    leaves = [*arguments[:3], arguments[3].clone().requires_grad_()]  # the bias alone: a sum
    y = subspace_linear(*leaves, backend="triton")
    launched.clear()
    y.sum().backward()
    assert launched == []


@pytest.mark.parametrize("K", [0, 2])
def test_same_bits_every_time(K, device):
    leaves = [t for t in inputs(K, "member_major", device) if t is not None]
    leaves = [t.requires_grad_() for t in leaves]
    coeffs = leaves[2] if K else None
    dy = torch.randn(2, 17, 24, device=device)

    def run():
        y = subspace_linear(leaves[0], leaves[1], coeffs, leaves[-1], backend="triton")
        return [y, *torch.autograd.grad(y, leaves, dy)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("K", [0, 2])
def test_the_same_in_64_bit_offsets(K, device):
    x, weight, coeffs, bias = inputs(K, "member_major", device)
    dy, found = torch.randn(2, 17, 24, device=device), []
    for long in (False, True):
        y, dx = torch.empty_like(dy), torch.empty_like(x)
        options = {"config": small(), "long": long}
        forward.subspace_linear_product(x, weight, coeffs, bias, y, False, **options)
        forward.subspace_linear_product(dy, weight, coeffs, None, dx, False, True, **options)
        dweight, dbias = x.new_empty(2, 24, 24), x.new_empty(2, 24)
        backward.subspace_linear_bwd_weight(dy, x, dweight, dbias, False, split=(2, 16), **options)
        found.append((y, dx, dweight, dbias))
    for a, b in zip(*found, strict=True):
        assert not a.isnan().any() and torch.equal(a, b)


def test_hessians(device):
    x, anchors, coeffs, bias = inputs(2, "member_major", device, B=4, I=3, O=2)
    given = (x, 0.3 * anchors, coeffs, bias)
    check_hessian(subspace_linear, subspace_linear_reference, given, backend="triton")


def test_registered_ops(device):
    x, anchors, coeffs, bias = inputs(2, "member_major", device, B=4, I=5, O=6)
    own, dy = torch.randn(2, 6, 5, device=device), torch.randn(2, 4, 6, device=device)
    check_registered(product_op, (x, anchors, coeffs, bias, 2, True, False))
    check_registered(product_op, (dy, own, None, None, 2, False, True))
    check_registered(product_op, (x[0], own, None, None, 2, False, False))
    for need_bias in (True, False):
        check_registered(weight_gradient_op, (dy, x, torch.float32, need_bias))
    check_registered(weight_gradient_op, (dy.half(), x[0].half(), torch.float32, True))


def test_plans_that_are_forced():
    coeffs = torch.zeros(3, 4)
    assert plans.forced_plan(False, coeffs) == plans.MIXED
    assert plans.forced_plan(False, coeffs.repeat(1, 2)) == plans.FUSED
    assert plans.forced_plan(False, None) == plans.FUSED
    assert plans.forced_plan(True, coeffs) == plans.FUSED._replace(dx="wide")
    assert plans.MOST_ANCHORS == tiles.MOST_ANCHORS


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_every_stage_has_tiles(arch, kind):
    for stage in tiles.STAGES:
        for tma in (False, True) if arch >= 90 else (False,):
            found = tiles.buckets(arch, stage, kind, tma)
            assert found and (tma or not any(config.tma for _, config in found))
    few = tiles.product_config("product", kind, arch >= 90, arch, 132, tiles.Sizes(8, 4, 512, 512))
    assert few.tiles["BLOCK_B"] == 16  # weights of few examples are memory's time
    many = tiles.Sizes(8, 4096, 1024, 1024)
    config = tiles.product_config("product", kind, arch >= 90, arch, 132, many)
    assert config.tiles["BLOCK_B"] == 128


def test_splits_of_the_weight_gradient():
    config = small()
    assert tiles.weight_split(config, 132, tiles.Sizes(8, 512, 512, 512)) == (1, 512)
    splits, examples = tiles.weight_split(config, 132, tiles.Sizes(2, 1000, 16, 16))
    assert splits * examples >= 1000 > (splits - 1) * examples and examples % 16 == 0
    assert 1 < splits <= 132 // 2
    assert tiles.weight_split(config, 132, tiles.Sizes(1, 3, 16, 16)) == (1, 16)


def test_kernels_that_are_forced_for_all_calls_leave_the_others_to_the_library(monkeypatch, device):
    """Those that ask for "torch", and dtypes without kernels; a single member is no exception."""
    launched = []
    original = forward.subspace_linear_product
    monkeypatch.setattr(
        forward, "subspace_linear_product", lambda *a: launched.append(a) or original(*a)
    )
    monkeypatch.setattr(_dispatch, "FORCED", "triton")
    x, anchors, _, bias = inputs(0, "member_major", device, B=3, I=5, O=4)
    truth = subspace_linear_reference(x, anchors, None, bias)
    torch.testing.assert_close(subspace_linear(x, anchors, None, bias, backend="torch"), truth)
    doubles = [t.double() for t in (x, anchors, bias)]
    y = subspace_linear(doubles[0], doubles[1], None, doubles[2])
    torch.testing.assert_close(y, subspace_linear_reference(*doubles[:2], None, doubles[2]))
    assert not launched
    torch.testing.assert_close(subspace_linear(x[:1], anchors[:1], None, bias[:1]), truth[:1])
    assert len(launched) == 1
