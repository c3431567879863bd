"""What subspace_conv2d keeps, which way it goes by itself, and what it refuses."""

import random
import sys

import pytest
import torch
import torch.nn.functional as F

from landscape_fast.ops import _subspace_conv2d_plan as plan
from landscape_fast.ops import _subspace_conv2d_ways as ways
from landscape_fast.ops._subspace_conv2d_plan import Plan, Problem
from landscape_fast.ops.subspace_conv2d import subspace_conv2d, subspace_conv2d_reference

PAGE = sys.modules[subspace_conv2d.__module__]
LOOP = Plan("loop", "loop", "loop")
M, K, B, I, O = 3, 2, 8, 8, 8


def inputs(device="cpu", grad=True, H=8, members=M, anchors=K):
    x = torch.randn(members, B, H, H, I).movedim(-1, -3)
    shapes = ((anchors, O, I, 3, 3), (members, anchors), (anchors, O))
    found = [x, *[torch.randn(shape) for shape in shapes]]
    return [t.to(device).requires_grad_(grad) for t in found]


@pytest.mark.parametrize("name", ["loop", "grouped", "triton"])
def test_keeps_x_and_the_weights(name, monkeypatch, device):
    """Of the activations x alone: no copy with the members side by side, nothing of y."""
    if name == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(PAGE, "plan_for", lambda *arguments: Plan(name, name, name))
    x, anchors, coeffs, bias = inputs(device, H=4)
    saved = {}

    def note(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        subspace_conv2d(x, anchors, coeffs, bias, padding=1, backend="torch")
    size, parameters = x.untyped_storage().nbytes(), 4 * (anchors.numel() * (1 + M) + 100)
    assert x.untyped_storage().data_ptr() in saved
    assert size < sum(saved.values()) <= size + parameters


@pytest.mark.parametrize("layout", ["member_major", "folded", "shared"])
def test_one_member_is_the_plain_convolution(layout, monkeypatch):
    """No check, no function of ours on its way: the graph is that of F.conv2d."""
    monkeypatch.setattr(PAGE, "prepare", None)
    monkeypatch.setattr(PAGE, "apply", None)
    x, weight, _, bias = inputs(members=1, anchors=1)
    given = x if layout == "member_major" else x[0]
    how = {"layout": "folded" if layout == "folded" else "member_major"}
    y = subspace_conv2d(given, weight, None, bias, stride=2, padding=1, **how)
    assert y.shape == ((B, O, 4, 4) if layout == "folded" else (1, B, O, 4, 4))
    plain = F.conv2d(x[0], weight[0], bias[0], stride=2, padding=1)
    assert torch.equal(y.reshape(plain.shape), plain)
    node = y.grad_fn if layout == "folded" else y.grad_fn.next_functions[0][0]
    assert node.name() == plain.grad_fn.name()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert subspace_conv2d(given, weight, None, bias, **how).dtype == torch.bfloat16


def test_one_member_of_several_anchors(monkeypatch):
    """A point of a subspace: mixed, and then a plain convolution."""
    monkeypatch.setattr(PAGE, "apply", None)
    x, anchors, coeffs, bias = inputs(members=1)
    y = subspace_conv2d(x, anchors, coeffs, bias, padding=1)
    torch.testing.assert_close(y, subspace_conv2d_reference(x, anchors, coeffs, bias, padding=1))


def test_the_plan_of_a_cpu(monkeypatch):
    """One convolution for all members while it costs little; then one each."""
    chosen = []

    def note(x, weight, bias, conv, way):
        chosen.append(way)
        return forward(x, weight, bias, conv, way)

    forward = ways.forward
    monkeypatch.setattr(ways, "forward", note)
    x, anchors, coeffs, bias = inputs(grad=False)
    wide = torch.randn(M, 16, I, 40, 40)
    for images, weight, options in (
        (x, anchors, {}), (x[0], anchors, {}), (wide, anchors, {}), (wide[0], anchors, {}),
        (x[0], anchors[:, :, :4], {"groups": 2}), (x[:1], anchors, {}),
    ):  # fmt: skip
        own = coeffs[: len(images)] if images.ndim == 5 else coeffs
        subspace_conv2d(images, weight, own, bias, padding=1, **options)
    assert chosen == ["grouped", "wide", "loop", "loop", "grouped", "loop"]
    assert 64 * B * O * I * 9 < plan.GROUPED_TO < 16 * 1600 * O * I * 9


def random_problem(generator):
    r = generator.choice
    M, K = r((1, 2, 4, 16)), r((0, 0, 2, 3, 8))
    channels, pixels = r(((16, 32), (64, 8), (3, 32), (320, 16))), r((1, 3))
    return Problem(
        M, r((1, 64, 128)), channels[0], r((16, 64, channels[0])), pixels**2, channels[1] ** 2,
        channels[1] ** 2, r((80, 90, 100)), r(("half", "tf32", "ieee")), r((True, False)),
        r((True, False)), 1, K,
    )  # fmt: skip


def test_the_plan_of_a_gpu_is_the_smallest_estimate():
    """Over all ways that can run; what cannot run, or what needs channels last, is never taken."""
    generator = random.Random(0)
    for _ in range(300):
        p = random_problem(generator)
        kernels = generator.choice(((), ("triton",), ("triton", "cuda")))
        found = plan.choose(p, kernels)
        usable = (*(kernels if p.channels_last else ()), "loop", "grouped")
        usable += ("wide",) if p.shared_x else ()
        assert set(found[:3]) <= set(usable)
        if found.mix:
            assert found[:2] == ("triton", "triton") and 0 < p.K <= plan.MOST_MIXED
        for which in (2,) if found.mix else (0, 1, 2):
            best = min(plan.time(p, way, which) for way in usable)
            assert plan.time(p, found[which], which) == best


def test_what_the_estimates_say():
    """Many small members go to one launch; large ones, and channels that are few, do not."""
    small = Problem(16, 128, 64, 64, 9, 64, 64)
    assert plan.choose(small, ("triton",)) == Plan("triton", "triton", "triton")
    huge = Problem(4, 512, 640, 640, 9, 64, 64)
    assert plan.choose(huge, ("triton",)).y == "loop"
    thin = Problem(16, 128, 16, 16, 9, 1024, 1024)
    assert plan.choose(thin, ("triton", "cuda")).y == "cuda"
    assert plan.choose(thin._replace(channels_last=False), ("triton", "cuda")).y == "loop"
    # float32 takes three products of tf32, which then take longer than the bytes do
    wide = thin._replace(I=32, O=32, kind="tf32")
    for which in (0, 1, 2):
        exact = plan.time(wide._replace(kind="ieee"), "cuda", which)
        assert 2.5 < exact / plan.time(wide, "cuda", which) <= 3.01
    # of an x that members share, halo kernels and loops add up a dx of each
    for way in ("cuda", "loop"):
        once = plan.time(thin, way, 1)
        assert plan.time(thin._replace(shared_x=True), way, 1) > once
    tiny = Problem(2, 1, 16, 16, 9, 64, 64, K=2)  # every launch counts
    assert plan.choose(tiny, ("triton",)).mix
    assert not plan.choose(huge._replace(K=2), ("triton",)).mix


def test_the_problem_is_read_off_the_arguments(monkeypatch):
    asked = []

    def note(*arguments):
        asked.append(arguments)
        return LOOP

    class Cuda:  # what the plan asks of a tensor on a GPU
        def __init__(self, t):
            self.t = t
            self.device = torch.device("cuda", 0)

        def __getattr__(self, name):
            return getattr(self.t, name)

    monkeypatch.setattr(PAGE, "choose", note)
    monkeypatch.setattr(PAGE, "architecture", lambda index: 90)
    monkeypatch.setattr(PAGE, "usable", lambda *arguments: ("triton",))
    monkeypatch.setattr(PAGE, "channels_last", lambda x: x.stride(-3) == 1)
    x, anchors, coeffs, bias = inputs(grad=False)
    conv = PAGE.prepare("test", (x, anchors, coeffs, bias), (2, 1, 1, 1), "member_major")[2]
    PAGE.plan_for((Cuda(x), anchors, coeffs, bias), M, conv, "triton")
    kind = PAGE.kind_of(torch.float32)
    common = Problem(M, B, I, O, 9, 64, 16, 90, kind, False, True, 1, K)
    assert asked == [(common, ("triton",), False)]
    PAGE.plan_for((Cuda(x[:1].contiguous().half()), anchors, None, bias), M, conv, "torch")
    shared = common._replace(kind="half", shared_x=True, channels_last=False, K=0)
    assert asked[1] == (shared, (), False)


def test_forced_kernels_leave_groups_to_the_library(monkeypatch, device):
    pytest.importorskip("triton")
    monkeypatch.setattr(PAGE._dispatch, "FORCED", "triton")
    x, anchors, coeffs, bias = inputs(device, grad=False)
    arguments, options = (x, anchors[:, :, :4], coeffs, bias), {"groups": 2, "padding": 1}
    truth = subspace_conv2d_reference(*arguments, **options)
    torch.testing.assert_close(subspace_conv2d(*arguments, **options), truth)


def test_compiles_by_itself():
    """Whole graphs, of one member and of the plan that the op makes."""
    torch._dynamo.reset()
    compiled = torch.compile(subspace_conv2d, fullgraph=True, backend="aot_eager")
    x, anchors, coeffs, bias = inputs()
    for arguments in ((x, anchors, coeffs, bias), (x[:1], anchors[:1], None, bias[:1])):
        wanted = [t for t in arguments if t is not None]
        y, z = compiled(*arguments, padding=1), subspace_conv2d(*arguments, padding=1)
        torch.testing.assert_close(y, z)
        dy = torch.randn_like(z)
        found, expected = (torch.autograd.grad(of, wanted, dy) for of in (y, z))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_float64_under_autocast_stays_so():
    arguments = [t.detach().double() for t in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = subspace_conv2d(*arguments)
    assert torch.equal(y, subspace_conv2d(*arguments)) and y.dtype == torch.float64


def new(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


OWN = r"\[K, O, I / groups, kh, kw\]"
REFUSED = [
    ({"x": 1}, "x must be a Tensor; got int"),
    ({"anchors": None}, "anchors must be a Tensor; got NoneType"),
    ({"coeffs": [1.0]}, "coeffs must be a Tensor; got list"),
    ({"bias": 2.0}, "bias must be a Tensor; got float"),
    ({"anchors": new(6, 4, 3, 3)}, rf"anchors must be {OWN}; got \[6, 4, 3, 3\]"),
    ({"anchors": new(2, 0, 4, 3, 3)}, rf"anchors must be {OWN} with no empty dimension; got"),
    ({"anchors": new(2, 6, 4, 3, 3, dtype=torch.int32)}, "anchors must be one of float32, .*int32"),
    ({"coeffs": new(3, 4)}, r"coeffs must be \[M, K\] with K = 2; got \[3, 4\]"),
    ({"coeffs": new(0, 2)}, r"coeffs must be \[M, K\] of at least one member; got \[0, 2\]"),
    ({"coeffs": new(3, 2, dtype=torch.float64)}, "coeffs must be one of float32; got"),
    (
        {"coeffs": new(3, 2, device="meta")},
        "coeffs must be on the device of anchors, cpu",
    ),
    ({"bias": new(3, 6)}, r"bias must be \[K, O\] with K = 2, O = 6; got \[3, 6\]"),
    (
        {"bias": new(2, 6, dtype=torch.float16)},
        "bias must be of the dtype of anchors, float32",
    ),
    ({"x": new(4, 2, 4, 5, 5)}, r"x must be \[M, B, I, H, W\] with M = 3, I = 4; got"),
    ({"x": new(2, 3, 5, 5)}, r"x must be \[B, I, H, W\] with I = 4; got"),
    ({"x": new(3, 2, 4, 5, 5, dtype=torch.float64)}, "x must be of the dtype of anchors, float32"),
    ({"x": new(3, 2, 4, 5, 5, device="meta")}, "x must be on the device of anchors, cpu; got meta"),
    ({"x": new(7, 4, 5, 5), "layout": "folded"}, r"x must be \[M\*B, I, H, W\] with a multiple of"),
    ({"x": new(3, 2, 4, 2, 5)}, r"x must be of at least one output pixel for a kernel \[3, 3\]"),
    ({"layout": "batch_major"}, "layout must be 'member_major' or 'folded'; got 'batch_major'"),
    ({"stride": 0}, "stride must be an integer or two, at least 1; got 0"),
    ({"stride": True}, "stride must be an integer or two, at least 1; got True"),
    ({"dilation": (1, 1, 1)}, "dilation must be an integer or two, at least 1; got"),
    ({"padding": "full"}, "padding must be 'same', 'valid' or numbers; got 'full'"),
    ({"padding": [1, -1]}, "padding must be an integer or two, at least 0; got"),
    ({"padding": "same", "stride": 2}, "stride must be 1 with padding 'same'; got"),
    ({"groups": 0}, "groups must be an integer of at least 1; got 0"),
    ({"anchors": new(2, 6, 1, 3, 3), "groups": 4}, "groups must be a divisor of O = 6; got 4"),
    ({"backend": "cpp"}, "backend must be one of"),
    ({"backend": "fast"}, "backend must be one of"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=lambda v: v if type(v) is str else "")
def test_refuses(changes, message):
    tensors = (new(3, 2, 4, 5, 5), new(2, 6, 4, 3, 3), new(3, 2), new(2, 6))
    arguments = dict(zip(("x", "anchors", "coeffs", "bias"), tensors, strict=True))
    expected = TypeError if "a Tensor; got" in message else ValueError
    with pytest.raises(expected, match=rf"^subspace_conv2d: {message}"):
        subspace_conv2d(**{**arguments, **changes})


def test_refuses_what_equals_an_answer_it_remembers():
    tensors = (new(3, 2, 4, 5, 5), new(2, 6, 4, 3, 3), new(3, 2))
    subspace_conv2d(*tensors, stride=1, padding=0)
    subspace_conv2d(*tensors, stride=(1, 1))
    for name, value in (("stride", 1.0), ("stride", (True, 1)), ("padding", 0.0), ("groups", 1.0)):
        with pytest.raises(ValueError, match=f"^subspace_conv2d: {name} must be"):
            subspace_conv2d(*tensors, **{name: value})


ONE = {"x": (1, 2, 4, 5, 5), "anchors": (1, 6, 4, 3, 3)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stride": 0}, "stride must be an integer or two, at least 1; got 0"),
        ({"x": new(1, 2, 4, 2, 5)}, "x must be of at least one output pixel"),
        ({"padding": 1.5}, "padding must be an integer or two, at least 0; got 1.5"),
        (
            {name: new(*shape, dtype=torch.complex64) for name, shape in ONE.items()},
            "anchors must be one of float32, .*; got torch.complex64",
        ),
    ],
)
def test_one_member_refuses_the_same(changes, message):
    arguments = {name: new(*shape) for name, shape in ONE.items()}
    with pytest.raises(ValueError, match=rf"^subspace_conv2d: {message}"):
        subspace_conv2d(**{**arguments, **changes})


def test_refuses_groups_for_a_kernel_without(device):
    pytest.importorskip("triton")
    x, anchors, coeffs, _ = inputs(device, grad=False)
    message = "groups must be 1 with backend 'triton'; got 2"
    with pytest.raises(ValueError, match=f"^subspace_conv2d: {message}"):
        subspace_conv2d(x, anchors[:, :, :4], coeffs, groups=2, backend="triton")


@pytest.mark.parametrize(
    "channels, options, message",
    [
        (
            20,
            {"padding": 1},
            r"channels must be one of \(16, 32\) with .*; got \[16, 20\]",
        ),
        (16, {"stride": 2}, r"kernel must be 3 by 3 .* got \[3, 3\], \(2, 2\), \(0, 0\), \(1, 1\)"),
    ],
)
def test_says_what_a_kernel_for_few_shapes_was_given(channels, options, message, monkeypatch):
    monkeypatch.setattr(PAGE, "pick", lambda *arguments: "cuda")
    with pytest.raises(ValueError, match=f"^subspace_conv2d: {message}"):
        subspace_conv2d(new(2, 2, channels, 5, 5), new(2, 16, channels, 3, 3), backend="cuda",
                        **options)  # fmt: skip
