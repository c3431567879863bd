"""subspace_conv2d: every way and backend against the definition, and its contract."""

import sys

import pytest
import torch
import torch.nn.functional as F
from ops.problem import assert_held, keyword

from landscape_fast.ops._subspace_conv2d_plan import Plan
from landscape_fast.ops.subspace_conv2d import subspace_conv2d, subspace_conv2d_reference
from landscape_fast.testing import check_hessian, check_op, check_transforms

PAGE = sys.modules[subspace_conv2d.__module__]
PLANS = {
    "loop": Plan("loop", "loop", "loop"),
    "grouped": Plan("grouped", "grouped", "grouped"),
    "triton": Plan("triton", "triton", "triton"),
    "mixed": Plan("triton", "triton", "triton", True),
}
LAYOUTS = ["member_major", "folded", "shared"]
M, K, B, I, O = 3, 2, 2, 4, 6


def chosen(request, monkeypatch):
    if request.param in ("triton", "mixed"):
        pytest.importorskip("triton")
    monkeypatch.setattr(PAGE, "plan_for", lambda *arguments: PLANS[request.param])
    return "triton" if request.param == "triton" else "torch"


@pytest.fixture(params=["loop", "grouped", "triton"])
def way(request, monkeypatch):
    """A backend, with the choice of ways made by the test."""
    return chosen(request, monkeypatch)


@pytest.fixture(params=["loop", "triton"])
def one_way(request, monkeypatch):
    """One of the library, and one of kernels."""
    return chosen(request, monkeypatch)


@pytest.fixture(params=PLANS)
def every_way(request, monkeypatch):
    """As `way`, and the kernels that mix anchors."""
    return chosen(request, monkeypatch)


def inputs(
    sizes=(M, K, B, I, O, 6, 5), kernel=(2, 2), layout="member_major", groups=1, device="cpu"
):
    """x (channels last), anchors, coeffs, bias; outputs are of order one."""
    members, anchors, B, I, O, H, W = sizes
    rows = {"member_major": (members, B), "folded": (members * B,), "shared": (B,)}[layout]
    x = torch.randn(*rows, H, W, I).movedim(-1, -3)
    weight = torch.randn(anchors, O, I // groups, *kernel)
    weight /= (I // groups * kernel[0] * kernel[1]) ** 0.5
    coeffs = torch.randn(members, anchors)
    return [t.to(device) for t in (x, weight, coeffs, torch.randn(anchors, O))]


def check(arguments, layout="member_major", **options):
    options["layout"] = keyword(layout)
    check_op(subspace_conv2d, subspace_conv2d_reference, arguments, **options)


def entry_by_entry(x, anchors, coeffs, bias, **options):
    """One plain convolution per member, its weight and bias summed anchor by anchor."""
    ys = []
    for m in range(coeffs.shape[0]):
        own, shift = torch.zeros_like(anchors[0]), torch.zeros_like(bias[0])
        for k in range(anchors.shape[0]):
            own = own + coeffs[m, k] * anchors[k]
            shift = shift + coeffs[m, k] * bias[k]
        ys.append(F.conv2d(x[m], own, shift, **options))
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
    arguments = inputs((M, K, B, 4, 8, 7, 6), (3, 3), groups=groups)
    tensors = [t.double().requires_grad_() for t in arguments]
    truth = entry_by_entry(*tensors, groups=groups, **options)
    dy = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, tensors, dy)
    for function in (subspace_conv2d, subspace_conv2d_reference):
        y = function(*tensors, groups=groups, **options)
        torch.testing.assert_close(y, truth)
        for a, b in zip(torch.autograd.grad(y, tensors, dy), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", SPATIAL, ids=str)
def test_agrees_with_the_definition(options, way, device):
    layout = LAYOUTS[SPATIAL.index(options) % len(LAYOUTS)]
    arguments = inputs((M, K, 1, I, O, 7, 6), (3, 3), layout, device=device)
    check(arguments, layout, backend=way, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, every_way, device):
    check(inputs(layout=layout, device=device), layout, backend=every_way, stride=2, padding=1)


SHAPES = [  # sizes, kernel: ones; primes; channels of two tiles
    ((1, 1, 1, 1, 1, 1, 1), (1, 1)),
    ((2, 3, 3, 5, 7, 5, 3), (2, 3)),
    ((2, 4, 1, 40, 33, 4, 3), (1, 1)),
]


@pytest.mark.parametrize("sizes, kernel", SHAPES, ids=str)
def test_shapes(sizes, kernel, way, device):
    check(inputs(sizes, kernel, device=device), backend=way, padding=(kernel[0] // 2, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, every_way, device):
    if dtype == torch.bfloat16 and device == "cpu" and PAGE.plan_for().y == "triton":
        pytest.skip("interpreted bfloat16 is not to be trusted")
    check(inputs(device=device), backend=every_way, dtype=dtype, padding=1)


@pytest.mark.parametrize("layout", ["folded", "shared"])
def test_members_with_weights_of_their_own(layout, way, device):
    """No coefficients: a deep ensemble, which is what the identity as coefficients makes."""
    x, weight, _, bias = inputs((M, M, B, I, O, 6, 5), layout=layout, device=device)
    check([x, weight, None, None if layout == "folded" else bias], layout, backend=way, padding=1)
    options = {"padding": 1, "layout": keyword(layout)}
    y = subspace_conv2d(x, weight, None, bias, backend=way, **options)
    one = torch.eye(M, device=device)
    torch.testing.assert_close(y, subspace_conv2d(x, weight, one, bias, backend=way, **options))


@pytest.mark.parametrize("layout", ["member_major", "shared"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_channels_of_all_members_at_once(layout, bias, monkeypatch, device):
    """The way of a shared x; and grouped convolutions of a shared x."""
    for name in ("wide", "grouped") if layout == "shared" else ("grouped",):
        monkeypatch.setattr(PAGE, "plan_for", lambda *a, name=name: Plan(name, name, name))
        arguments = inputs(layout=layout, device=device)
        arguments[3] = arguments[3] if bias else None
        check(arguments, layout, stride=2, padding=1)
        check(arguments, layout, padding="same", dilation=(1, 2), dtype=torch.float16)


@pytest.mark.parametrize("layout", ["folded", "shared"])
def test_padding_that_is_wider_on_one_side(layout, way, device):
    """Such is "same" with an even kernel."""
    arguments = inputs((M, K, B, I, O, 5, 6), (4, 3), layout, device=device)
    check(arguments, layout, backend=way, padding="same")


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["loop", "grouped"])
def test_groups(groups, layout, name, monkeypatch):
    monkeypatch.setattr(PAGE, "plan_for", lambda *arguments: PLANS[name])
    arguments = inputs((M, K, B, 4, 8, 5, 5), (3, 3), layout, groups)
    check(arguments, layout, groups=groups, stride=2)


def strided():
    x, anchors, coeffs, bias = inputs()
    yield "members expanded", (x[:1].expand(M, *x.shape[1:]), anchors, coeffs, bias)
    larger = torch.randn(M, B, I, 9, 11)[..., 1:7, ::2]
    yield "pixels of a larger image", (larger, anchors, coeffs, bias)
    yield "members inside", (torch.randn(B, M, I, 6, 5).transpose(0, 1), anchors, coeffs, bias)
    last = anchors.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    yield "anchors channels last", (x, last, coeffs, bias)
    yield "anchors transposed", (x, anchors.transpose(3, 4), coeffs, bias)
    yield "anchors of a longer vector", (x, torch.randn(K, 500)[:, 7:103].view(K, O, I, 2, 2),
                                         coeffs, torch.randn(K, 500)[:, 9 : 9 + O])  # fmt: skip
    yield "small things strided", (x, anchors, coeffs.T.contiguous().T, bias.T.contiguous().T)
    yield "own weights", (x, torch.randn(M, 500)[:, 7:103].view(M, O, I, 2, 2), None, None)


@pytest.mark.parametrize("case", list(strided()), ids=lambda case: case[0])
def test_any_strides(case, one_way, device):
    check([None if t is None else t.to(device) for t in case[1]], backend=one_way, padding=1)


def test_only_wanted_gradients(every_way, device):
    arguments = inputs(device=device)
    every = [t.clone().requires_grad_() for t in arguments]
    truth = subspace_conv2d_reference(*every)
    dy = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, every, dy)
    for places in ("0", "2", "13"):
        wanted = [str(i) in places for i in range(4)]
        some = [t.clone().requires_grad_(w) for t, w in zip(arguments, wanted, strict=True)]
        subspace_conv2d(*some, backend=every_way).backward(dy)
        for t, w, g in zip(some, wanted, expected, strict=True):
            assert (t.grad is not None) == w
            if w:
                torch.testing.assert_close(t.grad, g)


def test_expanded_incoming_gradient(way, device):
    """y.sum() hands back one number, expanded."""
    arguments = [t.requires_grad_() for t in inputs(device=device)]
    found = torch.autograd.grad(subspace_conv2d(*arguments, backend=way).sum(), arguments)
    truth = torch.autograd.grad(subspace_conv2d_reference(*arguments).sum(), arguments)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["member_major", "shared"])
def test_gradgradcheck(layout):
    sizes = (2, 2, 1, 2, 2, 3, 3)
    arguments = [t.double().requires_grad_() for t in inputs(sizes, (2, 2), layout)]
    assert torch.autograd.gradcheck(subspace_conv2d, arguments)
    assert torch.autograd.gradgradcheck(subspace_conv2d, arguments)


def test_hessians(every_way, device):
    arguments = inputs((2, 2, 1, 3, 4, 3, 3), (2, 2), device=device)
    check_hessian(subspace_conv2d, subspace_conv2d_reference, arguments, backend=every_way)
    arguments[2] = None
    check_hessian(subspace_conv2d, subspace_conv2d_reference, arguments, backend=every_way)


def test_transforms_and_compile(one_way, device):
    """torch.func.grad, jvp, vmap, forward-mode AD, torch.compile."""
    arguments = inputs((2, 3, 2, 3, 4, 4, 4), (2, 2), device=device)
    check_transforms(subspace_conv2d, subspace_conv2d_reference, arguments, backend=one_way)


@pytest.mark.parametrize("own", [False, True])
def test_autocast_holds_gradients_in_float32(own, every_way, device):
    """The rule of mixed dtypes: products in 16 bits, gradients within 1e-6 of float64."""
    x, anchors, coeffs, bias = inputs((2, 2, 4, 8, 6, 6, 6), device=device)
    arguments = [x.half(), anchors, None if own else coeffs, bias]
    given = [t.requires_grad_() for t in arguments if t is not None]
    with torch.autocast(device, dtype=torch.float16):
        y = subspace_conv2d(*arguments, padding=1, backend=every_way)
    assert y.dtype == torch.float16
    dy = torch.randn(y.shape, device=device).half()
    found = torch.autograd.grad(y, given, dy)
    wide = [t if t is None else t.detach().double().requires_grad_() for t in arguments]
    truth = subspace_conv2d_reference(*wide, padding=1)
    torch.testing.assert_close(y.double(), truth, atol=0.02, rtol=0.01)  # a few 16-bit roundings
    expected = torch.autograd.grad(truth, [t for t in wide if t is not None], dy.double())
    assert [g.dtype for g in found] == [t.dtype for t in given]
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert_held(a, b)
    torch.testing.assert_close(found[0].double(), expected[0], atol=0.02, rtol=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout, way, device):
    arguments = inputs((M, K, 0, I, O, 5, 5), layout=layout, device=device)
    arguments = [t.requires_grad_() for t in arguments]
    y = subspace_conv2d(*arguments, layout=keyword(layout), backend=way)
    assert y.shape == ((0, O, 4, 4) if layout == "folded" else (M, 0, O, 4, 4))
    for t, g in zip(arguments, torch.autograd.grad(y.sum(), arguments), strict=True):
        assert torch.equal(g, torch.zeros_like(t))


def test_meta_device():
    arguments = [t.to("meta").requires_grad_() for t in inputs()]
    y = subspace_conv2d(*arguments, stride=2)
    assert y.shape == (M, B, O, 3, 2)
    grads = torch.autograd.grad(y.sum(), arguments)
    assert [g.shape for g in grads] == [t.shape for t in arguments]


def test_a_line_is_its_ends_and_their_mean(way, device):
    """Of a convolution, which is linear in its weight."""
    x, ends, _, bias = inputs(layout="shared", device=device)
    coeffs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], device=device)
    first, last, middle = subspace_conv2d(x, ends, coeffs, bias, backend=way, padding=1)
    torch.testing.assert_close(first, F.conv2d(x, ends[0], bias[0], padding=1))
    torch.testing.assert_close(last, F.conv2d(x, ends[1], bias[1], padding=1))
    torch.testing.assert_close(middle, (first + last) / 2)


def test_a_member_that_diverged_stays_alone(one_way, device):
    """NaN in the weights, or the images, of one member reach no other."""
    x, weight, _, bias = inputs((M, M, B, I, O, 6, 5), device=device)
    arguments = [x, weight, bias]
    for which, member in ((0, 0), (1, M - 1)):
        tensors = [t.clone() for t in arguments]
        tensors[which][member] = float("nan")
        x, weight, bias = [t.requires_grad_() for t in tensors]
        y = subspace_conv2d(x, weight, None, bias, backend=one_way, padding=1)
        found = [y, *torch.autograd.grad(y.sum(), (x, weight, bias))]
        others = [m for m in range(M) if m != member]
        assert all(t[others].isfinite().all() for t in found)
        assert y[member].isnan().all()


def test_same_bits_every_time(way, device):
    arguments = [t.requires_grad_() for t in inputs((2, 2, 2, 4, 8, 7, 7), device=device)]
    dy = torch.randn(2, 2, 8, 6, 6, device=device)

    def run():
        y = subspace_conv2d(*arguments, backend=way)
        return [y, *torch.autograd.grad(y, arguments, dy)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
