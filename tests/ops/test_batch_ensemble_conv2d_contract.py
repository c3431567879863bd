"""What batch_ensemble_conv2d keeps, which way it goes by itself, and what it refuses."""

import random
import sys

import pytest
import torch

from landscape_fast.ops import _batch_ensemble_conv2d_plan as plan
from landscape_fast.ops import _batch_ensemble_conv_ways as ways
from landscape_fast.ops._batch_ensemble_conv2d_plan import Plan, Problem
from landscape_fast.ops._batch_ensemble_linear_plan import Needs
from landscape_fast.ops.batch_ensemble_conv2d import (
    batch_ensemble_conv2d,
    batch_ensemble_conv2d_reference,
)

PAGE = sys.modules[batch_ensemble_conv2d.__module__]
ALL = Needs(True, True, True, True, True)
FUSED = Plan("fused", "fused")
M, B, I, O = 3, 8, 8, 8


def inputs(device="cpu", grad=True, H=8):
    x = torch.randn(M, B, H, H, I).movedim(-1, -3)
    shapes = ((O, I, 3, 3), (M, I), (M, O), (M, O))
    found = [x, *[torch.randn(shape) for shape in shapes]]
    return [t.to(device).requires_grad_(grad) for t in found]


def kept(function, *arguments, **options):
    """Storages that a forward saves for its backward: address -> bytes."""
    saved = {}

    def note(t):
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        function(*arguments, **options)
    return saved


@pytest.mark.parametrize("way", ["once", "merged", "triton"])
@pytest.mark.parametrize("relu", [False, True])
def test_keeps_x_alone(way, relu, monkeypatch, device):
    """No x * r, no convolution: at most half of what the formula keeps, as other packages write it.

    With a ReLU its output is kept too, which the next layer keeps as its input.
    """
    monkeypatch.setattr(PAGE, "library_plan", lambda *arguments: Plan(way, way))
    arguments = inputs(device)
    options = {"padding": 1, "activation": "relu" if relu else None}
    backend = way if way == "triton" else "torch"
    ours = kept(batch_ensemble_conv2d, *arguments, backend=backend, **options)
    formula = kept(batch_ensemble_conv2d_reference, *arguments, **options)
    size = arguments[0].untyped_storage().nbytes()
    parameters = sum(t.untyped_storage().nbytes() for t in arguments[1:])
    assert ours.keys() >= {t.untyped_storage().data_ptr() for t in arguments[:4]}
    assert size < sum(ours.values()) <= size * (2 if relu else 1) + parameters
    if not relu:
        assert sum(ours.values()) <= sum(formula.values()) / 2


@pytest.mark.parametrize(
    "layer, expected",
    [  # (I, O, taps, pixels of x, of y), channels last, bfloat16, on an H200
        ((16, 16, 9, 1024, 1024), FUSED),  # ResNet-20
        ((16, 32, 9, 1024, 256), FUSED),
        ((32, 32, 9, 256, 256), FUSED),
        ((64, 64, 9, 64, 64), FUSED),
        ((64, 256, 1, 3136, 3136), FUSED),  # ResNet-50, 1x1
        ((256, 64, 1, 3136, 3136), FUSED),
        ((512, 128, 1, 784, 784), FUSED),
        ((320, 320, 9, 256, 256), Plan("merged", "merged")),  # WRN-28-10
        ((640, 640, 9, 64, 64), Plan("merged", "merged")),
    ],
    ids=str,
)
def test_table(layer, expected):
    problem = Problem(4, 128, *layer)
    assert plan.choose(problem, ALL) == expected
    assert "fused" not in plan.choose(problem, ALL, fusable=False)
    assert "fused" not in plan.choose(problem._replace(channels_last=False), ALL)


def test_library_path_on_a_cpu():
    """One convolution each for members with enough to do, or for a single one; else one for all."""
    moved, products = plan.MERGED_FORWARD_FROM, plan.MERGED_BACKWARD_FROM
    assert plan.composed_plan(4, moved, products, False) == Plan("merged", "merged")
    assert plan.composed_plan(4, moved - 1, products, False) == Plan("once", "merged")
    assert plan.composed_plan(4, moved - 1, products - 1, False) == Plan("once", "once")
    assert plan.composed_plan(1, 1, 1, True) == Plan("merged", "merged")
    assert plan.composed_plan(4, moved, products, True) == Plan("once", "once")


def problems(count):
    draw = random.Random(0)
    for _ in range(count):
        sizes = [int(2 ** draw.uniform(0, top)) for top in (5, 9, 10, 10)]
        pixels = int(2 ** draw.uniform(0, 12))
        kind, arch = draw.choice(["half", "tf32", "ieee"]), draw.choice([80, 90, 100])
        flags = [draw.random() < 0.7 for _ in range(4)]
        needs = Needs(*[draw.random() < 0.6 for _ in range(5)])
        yield Problem(*sizes, draw.choice([1, 9]), pixels, pixels, arch, kind, *flags), needs


def test_takes_the_smallest_estimate():
    for problem, needs in problems(300):
        forward, backward = plan.choose(problem, needs)
        for way in ("fused", "once", "merged")[not problem.channels_last :]:
            assert plan.forward_time(problem, forward) <= plan.forward_time(problem, way)
            times = [plan.backward_time(problem, needs, w) for w in (backward, way)]
            assert times[0] <= times[1]


def test_estimates_grow_with_the_problem():
    for problem, needs in problems(200):
        for way in ("fused", "once", "merged"):
            for name in ("M", "B", "taps"):
                larger = problem._replace(**{name: 2 * getattr(problem, name)})
                assert plan.forward_time(larger, way) >= plan.forward_time(problem, way)
                times = [plan.backward_time(p, needs, way) for p in (problem, larger)]
                assert times[0] <= times[1]


@pytest.fixture
def automatic(monkeypatch):
    """backend="auto" as on an H200, with the kernels interpreted."""

    def architecture(index):
        return 90

    architecture._dynamo_marked_constant = True
    monkeypatch.setattr(PAGE, "pick", lambda op, backend, tensor: "triton")
    monkeypatch.setattr(PAGE, "_architecture", architecture)


@pytest.mark.parametrize("forward", ["fused", "once", "merged"])
@pytest.mark.parametrize("backward", ["fused", "once", "merged"])
def test_any_backward_fits_any_forward(forward, backward, automatic, monkeypatch, device):
    monkeypatch.setattr(PAGE, "choose", lambda *arguments: Plan(forward, backward))
    arguments = inputs(device, H=5)
    y = batch_ensemble_conv2d(*arguments)
    truth = batch_ensemble_conv2d_reference(*arguments)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, truth, atol=1e-4, rtol=1e-5)
    expected = torch.autograd.grad(truth, arguments, dy)
    for a, b in zip(torch.autograd.grad(y, arguments, dy), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-5)


def test_problem_is_read_off_the_arguments(automatic, monkeypatch, device):
    asked = []

    def note(problem, needs, fusable):
        asked.append((problem, needs, fusable))
        return Plan("once", "once")

    monkeypatch.setattr(PAGE, "choose", note)
    x, weight, r, s, bias = inputs(device, grad=False)
    batch_ensemble_conv2d(x, weight, r, s, bias, stride=2, padding=1)
    kind = PAGE.kind_of(torch.float32)
    common = Problem(M, B, I, O, 9, 64, 16, 90, kind)
    batch_ensemble_conv2d(x[0].half(), weight.half(), None, s.half(), padding="same")
    batch_ensemble_conv2d(x.contiguous(), weight, r.requires_grad_())
    batch_ensemble_conv2d(x, weight[:, :4], r, groups=2)
    batch_ensemble_conv2d(x, weight, r, padding=1, padding_mode="circular")
    assert asked[0] == (common, Needs(), True)
    shared = common._replace(outputs=64, kind="half", shared_x=True, has_r=False)
    assert asked[1] == (shared, Needs(), True)
    strided = common._replace(outputs=36, has_s=False, channels_last=False)
    assert asked[2] == (strided, Needs(r=True), True)
    assert not asked[3][2] and not asked[4][2]


def test_forced_kernels_leave_groups_to_the_library(monkeypatch, device):
    monkeypatch.setattr(PAGE._dispatch, "FORCED", "triton")
    x, weight, *factors = inputs(device, grad=False)
    for given, options in ((weight[:, :4], {"groups": 2}), (weight, {"padding_mode": "reflect"})):
        arguments, options = (x, given, *factors), {**options, "padding": 1}
        truth = batch_ensemble_conv2d_reference(*arguments, **options)
        found = batch_ensemble_conv2d(*arguments, **options)
        torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-5)


def test_frozen_parameters_need_no_exact_gradients(monkeypatch, device):
    """One convolution for all members, as without them: only x is wanted, and it has 16 bits."""
    monkeypatch.setattr(ways, "backward_merged", None)
    monkeypatch.setattr(PAGE, "library_plan", lambda *arguments: Plan("once", "once"))
    x, weight, r, s, bias = inputs(device, grad=False)
    x = x.half().requires_grad_()
    frozen = (weight, r, s, bias.requires_grad_())
    y = batch_ensemble_conv2d(x, *frozen, backend="torch")
    truth = batch_ensemble_conv2d_reference(x, *frozen)
    dy = torch.randn_like(y)
    (dx,), (expected,) = (torch.autograd.grad(of, x, dy) for of in (y, truth))
    assert (dx - expected).norm() <= 2e-3 * expected.norm()  # each is rounded to float16


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_compiled_with_changing_batch(dynamic, gpu, request, device):
    """The plan is traced too: new sizes neither break the graph nor compile without end."""
    if gpu:
        request.getfixturevalue("automatic")
    torch._dynamo.reset()
    arguments = inputs(device, H=5)
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(batch_ensemble_conv2d, backend=count, dynamic=dynamic, fullgraph=True)
    for batch in (4, 5, 6, 9):
        arguments[0] = torch.randn(M, batch, 5, 5, I, device=device).movedim(-1, -3)
        arguments[0].requires_grad_()
        y = compiled(*arguments)
        truth = batch_ensemble_conv2d_reference(*arguments)
        torch.testing.assert_close(y, truth, atol=1e-4, rtol=1e-5)
        y.sum().backward()
    assert len(graphs) <= 3
    torch._dynamo.reset()


def new(*shape, **options):
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": None}, r"x must be a Tensor; got NoneType"),
        ({"weight": 1.0}, r"weight must be a Tensor; got float"),
        ({"r": 2.0}, r"r must be a Tensor; got float"),
        (
            {"layout": "batch_major"},
            r"layout must be 'member_major' or 'folded'; got 'b",
        ),
        ({"activation": "gelu"}, r"activation must be None or 'relu'; got 'gelu'"),
        ({"weight": new(6, 4, 3)}, r"weight must be \[O, I / groups, kh, kw\]; got \[6, 4, 3\]"),
        ({"weight": new(6, 0, 3, 3)}, r"weight must be .* with no empty dimension; got \[6, 0, 3"),
        ({"weight": new(6, 4, 3, 3).long()}, r"weight must be one of float32, .*; got torch.int64"),
        ({"x": new(2, 4, 5)}, r"x must be \[M, B, I, H, W\] with M = 3, I = 4; got \[2, 4, 5\]"),
        ({"x": new(3, 2, 5, 5, 5)}, r"x must be \[M, B, I, H, W\] with M = 3, I = 4; got"),
        ({"x": new(2, 5, 5, 5)}, r"x must be \[B, I, H, W\] with I = 4; got \[2, 5, 5, 5\]"),
        (
            {"x": new(7, 4, 5, 5), "layout": "folded"},
            r"x must be \[M\*B, I, H, W\] with a multiple of M = 3 rows; got .*; drop or pad",
        ),
        (
            {"x": new(3, 2, 4, 2, 5)},
            r"x must be of at least one output pixel for a kernel \[3",
        ),
        (
            {"x": new(3, 2, 4, 5, 0)},
            r"x must be of at least one output pixel for a kernel \[3",
        ),
        (
            {"x": new(2, 4, 5, 5), "r": None, "s": None, "bias": new(6)},
            r"r, s or bias must be a tensor with a row per member where x has no member dimension",
        ),
        ({"r": new(3, 5)}, r"r must be \[M, I\] with M = 3, I = 4; got \[3, 5\]"),
        ({"s": new(2, 6)}, r"s must be \[M, O\] with M = 3, O = 6; got \[2, 6\]"),
        ({"bias": new(5)}, r"bias must be \[O\] with O = 6; got \[5\]"),
        ({"bias": new(2, 6)}, r"bias must be \[M, O\] with M = 3, O = 6; got \[2, 6\]"),
        ({"s": new(3, 6).double()}, r"s must be of the dtype of x, float32; got float64"),
        (
            {"x": new(3, 2, 4, 5, 5).half(), "s": new(3, 6).double()},
            r"s must be of the dtype of x, float16, or float32; got float64",
        ),
        (
            {"x": new(3, 2, 4, 5, 5).double()},
            r"x must be of the dtype of weight, float32; got float64",
        ),
        (
            {"x": new(3, 2, 4, 5, 5, device="meta")},
            r"x must be on the device of weight, cpu; got meta",
        ),
        ({"stride": 0}, r"stride must be an integer or two, at least 1; got 0"),
        ({"stride": (1, 1, 1)}, r"stride must be an integer or two, at least 1; got \(1, 1, 1\)"),
        ({"dilation": True}, r"dilation must be an integer or two, at least 1; got True"),
        ({"padding": -1}, r"padding must be an integer or two, at least 0; got -1"),
        ({"padding": "full"}, r"padding must be 'same', 'valid' or numbers; got 'full'"),
        ({"padding": "same", "stride": 2}, r"stride must be 1 with padding 'same'; got \(2, 2\)"),
        (
            {"padding_mode": "edge"},
            r"padding_mode must be one of 'zeros', .*; got 'edge'",
        ),
        (
            {"padding": (1, 5), "padding_mode": "reflect"},
            r"padding must be at most \[4, 4\] with padding_mode 'reflect' on pixels \[5, 5\]; "
            r"got \[1, 5\]",
        ),
        (
            {"padding": 6, "padding_mode": "circular"},
            r"padding must be at most \[5, 5\] with padding_mode 'circular'",
        ),
        ({"groups": 0}, r"groups must be an integer of at least 1; got 0"),
        ({"groups": 4}, r"groups must be a divisor of O = 6; got 4"),
        ({"backend": "numpy"}, r"backend must be one of .*; got 'numpy'"),
        (
            {"backend": "triton", "groups": 2, "weight": new(6, 2, 3, 3)},
            r"groups must be 1 with backend 'triton'; got 2",
        ),
        (
            {"backend": "triton", "padding": 1, "padding_mode": "circular"},
            r"padding_mode must be 'zeros' with backend 'triton'; got 'circular'",
        ),
    ],
    ids=str,
)
def test_refuses(changes, message):
    tensors = (new(3, 2, 4, 5, 5), new(6, 4, 3, 3), new(3, 4), new(3, 6), new(3, 6))
    arguments = dict(zip(("x", "weight", "r", "s", "bias"), tensors, strict=True))
    expected = TypeError if "Tensor; got" in message else ValueError
    with pytest.raises(expected, match=rf"^batch_ensemble_conv2d: {message}"):
        batch_ensemble_conv2d(**{**arguments, **changes})
