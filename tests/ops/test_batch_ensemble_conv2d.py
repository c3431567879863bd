"""batch_ensemble_conv2d: every way and backend against the definition, and its contract."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from ops.problem import assert_held, keyword

from landscape_fast.ops._batch_ensemble_conv2d_plan import Plan
from landscape_fast.ops.batch_ensemble_conv2d import (
    batch_ensemble_conv2d,
    batch_ensemble_conv2d_reference,
)
from landscape_fast.testing import check_hessian, check_op, check_transforms

PAGE = sys.modules[batch_ensemble_conv2d.__module__]
WAYS = ["once", "merged", "triton"]
LAYOUTS = ["member_major", "folded", "shared"]
M, B, I, O = 3, 2, 4, 6


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """A backend, with the library's choice of ways made by the test."""
    if request.param == "triton":
        pytest.importorskip("triton")
        return "triton"
    plan = Plan(request.param, request.param)
    monkeypatch.setattr(PAGE, "library_plan", lambda *arguments: plan)
    return "torch"


def inputs(sizes=(M, B, I, O, 6, 5), kernel=(3, 3), layout="member_major", groups=1, device="cpu"):
    """x (channels last), weight, r, s, bias; outputs are of order one."""
    members, B, I, O, H, W = sizes
    rows = {"member_major": (members, B), "folded": (members * B,), "shared": (B,)}[layout]
    x = torch.randn(*rows, H, W, I).movedim(-1, -3)
    weight = torch.randn(O, I // groups, *kernel) / (I // groups * kernel[0] * kernel[1]) ** 0.5
    factors = (1 + 0.3 * torch.randn(members, I), 1 + 0.3 * torch.randn(members, O))
    return [t.to(device) for t in (x, weight, *factors, torch.randn(members, O))]


def check(arguments, layout="member_major", **options):
    options["layout"] = keyword(layout)
    check_op(batch_ensemble_conv2d, batch_ensemble_conv2d_reference, arguments, **options)


def merged_loop(x, weight, r, s, bias, groups=1, **options):
    """One plain convolution per member, with its weight written out entry by entry."""
    O, J = weight.shape[:2]
    ys = []
    for m in range(len(x)):
        own = weight.clone()
        for o, j in itertools.product(range(O), range(J)):
            own[o, j] *= s[m, o] * r[m, o // (O // groups) * J + j]
        ys.append(F.conv2d(x[m], own, bias[m], groups=groups, **options))
    return torch.stack(ys)


SPATIAL = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": (1, 0)},
    {"stride": (1, 3), "padding": (2, 1), "dilation": (2, 1)},
    {"dilation": 2, "padding": "same"},
    {"padding": "valid", "stride": 2},
]


@pytest.mark.parametrize("options", SPATIAL, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_definition_is_a_loop_over_members(options, groups):
    """Grouped and, with as many groups as channels, depthwise; output and gradients, float64."""
    sizes = (M, B, 4, 8, 7, 6)
    tensors = [t.double().requires_grad_() for t in inputs(sizes, groups=groups)]
    truth = merged_loop(*tensors, groups=groups, **options)
    dy = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, tensors, dy)
    for function in (batch_ensemble_conv2d, batch_ensemble_conv2d_reference):
        y = function(*tensors, groups=groups, **options)
        torch.testing.assert_close(y, truth)
        for a, b in zip(torch.autograd.grad(y, tensors, dy), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", SPATIAL, ids=str)
def test_agrees_with_the_definition(options, way, device):
    layout = LAYOUTS[SPATIAL.index(options) % len(LAYOUTS)]
    sizes = (M, B, I, O, 7, 6)
    check(inputs(sizes, layout=layout, device=device), layout, backend=way, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, way, device):
    check(inputs(layout=layout, device=device), layout, backend=way, stride=2, padding=1)


SHAPES = [  # sizes, kernel: ones; primes; more than one tile of pixels; channels of two tiles
    ((1, 1, 1, 1, 1, 1), (1, 1)),
    ((2, 3, 5, 7, 5, 3), (2, 3)),
    ((2, 2, 3, 18, 9, 8), (3, 3)),
    ((2, 1, 40, 33, 4, 3), (1, 1)),
    ((1, 2, 16, 16, 8, 9), (3, 3)),
]


@pytest.mark.parametrize("sizes, kernel", SHAPES, ids=str)
def test_shapes(sizes, kernel, way, device):
    check(inputs(sizes, kernel, device=device), backend=way, padding=(kernel[0] // 2, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, way, device):
    if dtype == torch.bfloat16 and way == "triton" and device == "cpu":
        pytest.skip("interpreted bfloat16 is not to be trusted")
    for layout in ("member_major", "shared"):
        check(inputs(layout=layout, device=device), layout, backend=way, dtype=dtype, padding=1)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel, padding", [((3, 2), (2, 1)), ((4, 3), "same")], ids=str)
def test_padding_modes(mode, kernel, padding, way):
    """Those that pad before the convolution have a gradient of their own."""
    if way == "triton" and mode != "zeros":
        pytest.skip("the kernels pad with zeros")
    for layout in ("member_major", "shared"):
        arguments = inputs((M, B, I, O, 5, 6), kernel, layout)
        check(arguments, layout, backend=way, padding=padding, padding_mode=mode)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups, way):
    if way == "triton":
        pytest.skip("the kernels have no groups")
    for absent in (None, 2, 3):
        arguments = inputs((M, B, 4, 8, 5, 5), groups=groups)
        if absent is not None:
            arguments[absent] = None
        check(arguments, backend=way, groups=groups, stride=2)


@pytest.mark.parametrize("shared", [False, True])
def test_every_factor_may_be_missing(shared, way, device):
    x, weight, r, s, bias = inputs(layout="shared" if shared else "member_major", device=device)
    for factors in itertools.product((r, None), (s, None), (bias, bias[0], None)):
        if shared and not any(t is not None and t.ndim == 2 for t in factors):
            continue  # nothing says how many members there are
        check([x, weight, *factors], backend=way, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu(layout, way, device):
    arguments = inputs(layout=layout, device=device)
    options = {"activation": "relu", "padding": 1, "layout": keyword(layout)}
    check(arguments, layout, backend=way, activation="relu", padding=1)
    y = batch_ensemble_conv2d(*arguments, backend=way, **options)
    plain = batch_ensemble_conv2d_reference(*arguments, **options | {"activation": None})
    torch.testing.assert_close(y, plain.relu())
    assert (y == 0).any() and (y > 0).any()
    arguments[0][..., 0, 0] = float("nan")
    assert batch_ensemble_conv2d(*arguments, backend=way, **options).isnan().any()


def strided():
    x, weight, r, s, bias = inputs()
    yield "contiguous", (x.contiguous(), weight, r, s, bias)
    yield "members expanded", (x[:1].expand(M, *x.shape[1:]), weight, r, s, bias)
    larger = torch.randn(M, B, I, 9, 11)[..., 1:7, ::2]
    yield "pixels of a larger image", (larger, weight, r, s, bias)
    yield "members inside", (torch.randn(B, M, I, 6, 5).transpose(0, 1), weight, r, s, bias)
    last = weight.to(memory_format=torch.channels_last)
    yield "weight channels last", (x, last, r, s, bias)
    yield "weight transposed", (x, weight.transpose(2, 3), r, s, bias)
    factors = (r.T.contiguous().T, s[:1].expand(M, O), bias.T.contiguous().T)
    yield "factors strided", (x, weight, *factors)


@pytest.mark.parametrize("case", list(strided()), ids=lambda case: case[0])
def test_any_strides(case, way, device):
    check([t.to(device) for t in case[1]], backend=way, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_the_memory_format(layout, way, device):
    x, *rest = inputs(layout=layout, device=device)
    for images, last in ((x, True), (x.contiguous(), False)):
        y = batch_ensemble_conv2d(images, *rest, layout=keyword(layout), backend=way)
        y = y if layout == "folded" else y.flatten(0, 1)
        formats = (torch.channels_last, torch.contiguous_format)
        assert y.is_contiguous(memory_format=formats[not last])


def test_only_wanted_gradients(way, device):
    arguments = inputs(device=device)
    every = [t.clone().requires_grad_() for t in arguments]
    truth = batch_ensemble_conv2d_reference(*every)
    dy = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, every, dy)
    for chosen in ("0", "1", "2", "3", "4", "34", "02", "13", "024", "1234"):
        wanted = [str(i) in chosen for i in range(5)]
        some = [t.clone().requires_grad_(w) for t, w in zip(arguments, wanted, strict=True)]
        batch_ensemble_conv2d(*some, backend=way).backward(dy)
        for t, w, g in zip(some, wanted, expected, strict=True):
            assert (t.grad is not None) == w
            if w:
                torch.testing.assert_close(t.grad, g)


def test_expanded_incoming_gradient(way, device):
    """y.sum() hands back one number, expanded."""
    arguments = [t.requires_grad_() for t in inputs(device=device)]
    found = torch.autograd.grad(batch_ensemble_conv2d(*arguments, backend=way).sum(), arguments)
    truth = torch.autograd.grad(batch_ensemble_conv2d_reference(*arguments).sum(), arguments)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["member_major", "shared"])
@pytest.mark.parametrize("relu", [False, True])
def test_gradgradcheck(layout, relu):
    sizes = (2, 1, 2, 2, 3, 3)
    arguments = [t.double().requires_grad_() for t in inputs(sizes, (2, 2), layout)]

    def function(*tensors):
        return batch_ensemble_conv2d(*tensors, activation="relu" if relu else None)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("absent", [(), (2,), (3,), (4,)], ids=str)
def test_hessians(absent, way, device):
    arguments = inputs((2, 2, 3, 4, 4, 4), device=device)
    arguments = [None if i in absent else t for i, t in enumerate(arguments)]
    check_hessian(batch_ensemble_conv2d, batch_ensemble_conv2d_reference, arguments, backend=way)


@pytest.mark.parametrize("layout", ["member_major", "shared"])
def test_transforms_and_compile(layout, way, device):
    """torch.func.grad, jvp, vmap, forward-mode AD, torch.compile."""
    arguments = inputs((2, 2, 3, 4, 4, 4), (2, 2), layout, device=device)
    check_transforms(batch_ensemble_conv2d, batch_ensemble_conv2d_reference, arguments, backend=way)


def test_autocast_holds_gradients_in_float32(way, device):
    """The rule of mixed dtypes: products in 16 bits, gradients within 1e-6 of float64."""
    x, *rest = inputs((2, 4, 8, 6, 6, 6), device=device)
    arguments = [t.requires_grad_() for t in (x.half(), *rest)]
    with torch.autocast(device, dtype=torch.float16):
        y = batch_ensemble_conv2d(*arguments, padding=1, backend=way)
        double = batch_ensemble_conv2d(*[t.detach().double() for t in arguments])
    assert y.dtype == torch.float16 and double.dtype == torch.float64
    dy = torch.randn(y.shape, device=device).half()
    found = torch.autograd.grad(y, arguments, dy)
    low = [t.detach().half().double().requires_grad_() for t in arguments]
    truth = batch_ensemble_conv2d_reference(*low, padding=1)
    torch.testing.assert_close(y.double(), truth, atol=0.01, rtol=0.01)  # a few 16-bit roundings
    expected = torch.autograd.grad(truth, low, dy.double())
    assert [g.dtype for g in found] == [t.dtype for t in arguments]
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert_held(a, b)
    torch.testing.assert_close(found[0].double(), expected[0], atol=0.01, rtol=0.01)


@pytest.mark.parametrize("absent", [2, 3])
def test_mixed_dtypes_of_a_shared_input(absent, way, device):
    arguments = [t.requires_grad_() for t in inputs(layout="shared", device=device)]
    arguments[absent] = None
    low = [None if t is None else t.detach().half().requires_grad_() for t in arguments]
    double = [None if t is None else t.detach().double().requires_grad_() for t in low]
    mixed = [low[0], *arguments[1:]]
    given = [t for t in mixed if t is not None]
    y = batch_ensemble_conv2d(*mixed, backend=way)
    dy = torch.randn(y.shape, device=device).half()
    found = torch.autograd.grad(y, given, dy)
    truth = batch_ensemble_conv2d_reference(*double)
    expected = torch.autograd.grad(truth, [t for t in double if t is not None], dy.double())
    for a, b in list(zip(found, expected, strict=True))[1:]:
        assert a.dtype == torch.float32
        assert_held(a, b)


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_inside_autocast_keeps_its_precision(create_graph, way, device):
    arguments = [t.requires_grad_() for t in inputs(device=device)]
    y = batch_ensemble_conv2d(*arguments, backend=way)
    dy = torch.randn_like(y)
    with torch.autocast(device, dtype=torch.float16):
        found = torch.autograd.grad(y, arguments, dy, create_graph=create_graph)
    truth = batch_ensemble_conv2d_reference(*arguments)
    for a, b in zip(found, torch.autograd.grad(truth, arguments, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, way, device):
    arguments = inputs((M, 0, I, O, 5, 5), layout=layout, device=device)
    arguments = [t.requires_grad_() for t in arguments]
    y = batch_ensemble_conv2d(*arguments, layout=keyword(layout), backend=way)
    assert y.shape == ((0, O, 3, 3) if layout == "folded" else (M, 0, O, 3, 3))
    for t, g in zip(arguments, torch.autograd.grad(y.sum(), arguments), strict=True):
        assert torch.equal(g, torch.zeros_like(t))


def test_meta_device():
    arguments = [t.to("meta").requires_grad_() for t in inputs()]
    y = batch_ensemble_conv2d(*arguments, stride=2)
    assert y.shape == (M, B, O, 2, 2)
    grads = torch.autograd.grad(y.sum(), arguments)
    assert [g.shape for g in grads] == [t.shape for t in arguments]


def test_members_are_independent(way, device):
    x, weight, *factors = inputs(device=device)
    y = batch_ensemble_conv2d(x, weight, *factors, backend=way)
    order = torch.tensor([2, 0, 1], device=device)
    permuted = [t[order] for t in factors]
    z = batch_ensemble_conv2d(x[order], weight, *permuted, backend=way)
    torch.testing.assert_close(z, y[order])
    alone = [t[1:2] for t in factors]
    torch.testing.assert_close(batch_ensemble_conv2d(x[1:2], weight, *alone, backend=way), y[1:2])


def test_same_bits_every_time(way, device):
    arguments = [t.requires_grad_() for t in inputs((2, 3, 8, 8, 9, 9), device=device)]
    dy = torch.randn(2, 3, 8, 7, 7, device=device)

    def run():
        y = batch_ensemble_conv2d(*arguments, backend=way)
        return [y, *torch.autograd.grad(y, arguments, dy)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
