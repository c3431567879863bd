"""hyper_batch_conv2d: every layout, option and backend against the definition, and its contract."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ops.problem import assert_held, gradients, keyword

from landscape_fast.ops import hyper_batch_conv2d, hyper_batch_conv2d_reference
from landscape_fast.ops._batch_ensemble_conv2d_plan import Problem
from landscape_fast.ops._hyper_batch_conv2d_fused import Plan, backward_op, choose, forward_op
from landscape_fast.testing import check_hessian, check_op, check_registered, check_transforms

BACKENDS = ["torch", "triton"]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # not to be trusted when interpreted
NAMES = ("x", "weight", "delta", "e", "r", "s", "u", "v", "bias", "delta_bias", "e_bias")
LAYOUTS = ["member_major", "folded", "shared"]
TIED = (6, 7)  # u and v
OPTIONS = [  # a kernel of 3 x 2
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": (2, 1), "padding_mode": "reflect"},
    {"groups": 2, "padding": 1, "stride": (1, 2)},
    {"groups": 2, "padding": "same", "padding_mode": "circular"},
]


def inputs(layout="member_major", device="cpu", dtype=torch.float32, groups=1, sizes=(2, 3, 4, 6)):
    M, B, I, O = sizes
    rows = (M * B,) if layout == "folded" else (M, B)
    own = (B,) if layout == "shared" else rows
    kernel = (O, I // groups, 3, 2)
    shapes = ((*own, I, 5, 6), kernel, kernel, (*rows, O), (M, I), (M, O), (M, I), (M, O))
    shapes += ((M, O), (M, O), (*rows, O))
    values = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    for weight in values[1:3]:  # outputs of order one
        weight /= max(1, weight[0].numel()) ** 0.5
    return [t.to(device) for t in values]


def without(arguments, absent):
    return [None if i in absent else t for i, t in enumerate(arguments)]


def check(arguments, layout="member_major", **options):
    options["layout"] = keyword(layout)
    check_op(hyper_batch_conv2d, hyper_batch_conv2d_reference, arguments, **options)


def fuses(options):
    return "groups" not in options and options.get("padding_mode", "zeros") == "zeros"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_the_definition(options, layout, backend, device):
    if backend == "triton" and not fuses(options):
        pytest.skip("refused, see below")
    arguments = inputs(layout, device, groups=options.get("groups", 1))
    absent = TIED if layout == "folded" else ()
    check(without(arguments, absent), layout, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(), TIED, (4, 5), (4, 6), (5, 7), (4, 5, 6, 7), (8,), (9, 10),
                                    (8, 9, 10)], ids=str)  # fmt: skip
def test_every_factor_may_be_missing(absent, backend, device):
    check(without(inputs(device=device), absent), backend=backend, padding=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["member_major", "shared"])
def test_agrees_in_half_precision(layout, dtype, backend, device):
    absent = TIED if layout == "shared" else ()
    arguments = without(inputs(layout, device), absent)
    check(arguments, layout, backend=backend, dtype=dtype, padding=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_channels_and_pixels_than_a_tile(backend, device):
    """And biases for all members, responses that one example shares with all, channels last."""
    arguments = inputs(device=device, sizes=(2, 5, 17, 33))
    arguments[0] = arguments[0].contiguous().movedim(2, -1).contiguous().movedim(-1, 2)
    arguments[3] = arguments[3][:, :1].expand(2, 5, 33)
    arguments[8], arguments[9] = arguments[8][0], arguments[9][0]
    check(without(arguments, TIED), backend=backend, padding=1)


@pytest.mark.parametrize("groups", [1, 2])
def test_each_example_has_a_kernel_of_its_own(groups):
    """In float64, against a convolution with `W s r + delta v u e` for every member and example."""
    M, B, I, O = 2, 4, 4, 6
    tensors = inputs(dtype=torch.float64, groups=groups, sizes=(M, B, I, O))
    x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias = tensors
    y = hyper_batch_conv2d(*tensors, padding=1, groups=groups)
    for m, b in itertools.product(range(M), range(B)):
        kernel = torch.zeros_like(weight)
        for o, j in itertools.product(range(O), range(I // groups)):
            i = o // (O // groups) * (I // groups) + j  # its input channel
            kernel[o, j] = weight[o, j] * s[m, o] * r[m, i]
            kernel[o, j] += delta[o, j] * v[m, o] * u[m, i] * e[m, b, o]
        own = bias[m] + delta_bias[m] * e_bias[m, b]
        expected = F.conv2d(x[m, b], kernel, own, padding=1, groups=groups)
        torch.testing.assert_close(y[m, b], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tie", [False, True])
def test_only_wanted_gradients(tie, backend, device):
    arguments = without(inputs(device=device, sizes=(2, 2, 3, 2)), TIED if tie else ())
    given = [t for t in arguments if t is not None]
    every = [t.clone().requires_grad_() for t in given]

    def placed(tensors):
        filled = iter(tensors)
        return [None if t is None else next(filled) for t in arguments]

    y = hyper_batch_conv2d_reference(*placed(every))
    dy = torch.randn_like(y)
    truth = gradients(y, every, dy)
    for wanted in range(len(given)):
        some = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(given)]
        hyper_batch_conv2d(*placed(some), backend=backend).backward(dy)
        assert [t.grad is not None for t in some] == [i == wanted for i in range(len(given))]
        torch.testing.assert_close(some[wanted].grad, truth[wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tie", [False, True])
def test_float32_parameters_beside_16_bits(tie, backend, device):
    """Their gradients are those of the rounded values, with the exactness of float32."""
    low, activations = torch.float16, ("x", "e", "e_bias")
    arguments = without(inputs(device=device, sizes=(2, 5, 8, 6)), TIED if tie else ())
    names = [name for name, t in zip(NAMES, arguments, strict=True) if t is not None]
    leaves = [t if t is None else t.to(low if name in activations else t.dtype).requires_grad_()
              for name, t in zip(NAMES, arguments, strict=True)]  # fmt: skip
    y = hyper_batch_conv2d(*leaves, padding=1, backend=backend)
    exact = [t if t is None else t.detach().to(low).double().requires_grad_() for t in leaves]
    truth = hyper_batch_conv2d_reference(*exact, padding=1)
    dy = torch.randn(y.shape, device=device).to(low)
    found = gradients(y, [t for t in leaves if t is not None], dy)
    expected = gradients(truth, [t for t in exact if t is not None], dy.double())
    assert y.dtype == low
    for name, a, b in zip(names, found, expected, strict=True):
        # what is promised of parameters; activations have their own rounding, of both parts
        limit = 8 * torch.finfo(low).eps if name in activations else 1e-6
        assert a.dtype == (low if name in activations else torch.float32), name
        assert_held(a, b, limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_x_and_one_convolution(backend, device):
    arguments = [t.requires_grad_() for t in inputs(device=device)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = hyper_batch_conv2d(*arguments, backend=backend)
    known = {t.data_ptr() for t in arguments}
    more = [t for t in saved if t.data_ptr() not in known]
    assert [t.shape for t in more] == [y.shape]
    assert more[0].untyped_storage().nbytes() == 4 * y.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, device):
    arguments = [t.requires_grad_() for t in inputs(device=device)]
    with torch.autocast(device, dtype=torch.float16):
        y = hyper_batch_conv2d(*arguments, backend=backend)
    mixed = [t.detach().half() if i == 0 else t.detach() for i, t in enumerate(arguments)]
    assert y.dtype == torch.float16
    assert torch.equal(y, hyper_batch_conv2d(*mixed, backend=backend))
    assert all(g.dtype == torch.float32 for g in gradients(y, arguments))


def test_gradgradcheck():
    arguments = [t.requires_grad_() for t in inputs(dtype=torch.float64, sizes=(2, 1, 2, 2))]

    def function(*tensors):
        return hyper_batch_conv2d(*tensors, stride=2)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(), TIED], ids=str)
def test_hessians(absent, backend, device):
    arguments = without(inputs(device=device, sizes=(2, 2, 2, 3)), absent)
    options = {"backend": backend}
    check_hessian(hyper_batch_conv2d, hyper_batch_conv2d_reference, arguments, **options)


def test_transforms_and_compile():
    """torch.func.grad, jvp, vmap, forward-mode AD, torch.compile; in float64 on the CPU."""
    arguments = inputs(dtype=torch.float64, sizes=(2, 2, 2, 3))
    check_transforms(hyper_batch_conv2d, hyper_batch_conv2d_reference, arguments)


def test_compiled_kernels(device):
    arguments = [t.requires_grad_() for t in inputs(device=device, sizes=(2, 2, 2, 3))]

    def function(*tensors):
        return hyper_batch_conv2d(*tensors, backend="triton")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    y, dy = function(*arguments), torch.randn(2, 2, 3, 3, 5, device=device)
    torch.testing.assert_close(compiled(*arguments), y)
    for a, b in zip(gradients(compiled(*arguments), arguments, dy),
                    gradients(y, arguments, dy), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_registered_ops(device):
    x, weight, delta, e, r, s, u, v, *_ = inputs(device=device, sizes=(2, 2, 2, 3))
    shift = torch.randn(2, 1, 3, device=device)
    options = ([1, 1], [1, 0, 1, 0], [1, 1])
    check_registered(forward_op, (x, weight, delta, e, r, s, u, v, shift, *options, True))
    check_registered(forward_op, (x, weight, delta, e, r, s, None, None, None, *options, False))
    dy = torch.randn(2, 2, 3, 5, 5, device=device)
    needs = [True] * 3 + [False] + [True] * 4 + [False] * 3
    check_registered(backward_op, (dy, x, weight, delta, e, r, s, u, v, needs, *options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    arguments = [t.requires_grad_() for t in inputs(device=device, sizes=(2, 0, 4, 6))]
    y = hyper_batch_conv2d(*arguments, backend=backend)
    assert y.shape == (2, 0, 6, 3, 5)
    assert not any(g.any() for g in gradients(y, arguments))


def test_meta_device():
    arguments = [t.to("meta").requires_grad_() for t in inputs()]
    y = hyper_batch_conv2d(*arguments, padding=1)
    assert y.shape == (2, 3, 6, 5, 7)
    assert [g.shape for g in gradients(y, arguments)] == [t.shape for t in arguments]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": None}, r"x must be a Tensor; got NoneType"),
        ({"layout": "batch_major"}, r"layout must be one of \('member_major', 'folded'\)"),
        (
            {"x": torch.zeros(3, 3, 5, 6)},
            r"x must be \[B, I, H, W\] with I = 4; got \[3, 3, 5, 6\]",
        ),
        ({"x": torch.zeros(2, 3, 4)}, r"x must be \[M, B, I, H, W\] with I = 4; got \[2, 3, 4\]"),
        ({"weight": torch.zeros(6, 4)}, r"weight must be \[O, I / groups, kh, kw\]; got \[6, 4\]"),
        ({"weight": torch.zeros(6, 0, 3, 2)}, r"weight must be .* with no empty dimension"),
        ({"delta": torch.zeros(6, 4, 3, 3)}, r"delta must be \[O, I / groups, kh, kw\] with O = 6"),
        ({"e": torch.zeros(2, 3, 12)}, r"e must be \[M, B, O\] with M = 2, B = 3, O = 6; got"),
        ({"r": torch.zeros(2, 5)}, r"r must be \[M, I\] with M = 2, I = 4; got \[2, 5\]"),
        ({"e_bias": None}, r"e_bias must be given where delta_bias is; got None"),
        ({"stride": 0}, r"stride must be an integer or two, at least 1; got 0"),
        ({"padding": "same", "stride": 2}, r"stride must be 1 with padding 'same'; got"),
        ({"groups": 4}, r"groups must be a divisor of O = 6; got 4"),
        ({"padding_mode": "mirror"}, r"padding_mode must be one of 'zeros'"),
        (
            {"padding": (1, 6), "padding_mode": "reflect"},
            r"padding must be at most \[4, 5\] with padding_mode 'reflect' on pixels \[5, 6\]",
        ),
        ({"padding": 6, "padding_mode": "circular"}, r"padding must be at most \[5, 6\] with"),
        ({"x": torch.zeros(2, 3, 4, 2, 2)}, r"x must be of at least one output pixel for a kernel"),
        ({"s": torch.zeros(2, 6).double()}, r"s must be of the dtype of x, float32; got float64"),
        (
            {"padding_mode": "reflect", "padding": 1, "backend": "triton"},
            r"padding_mode must be 'zeros' with backend 'triton'; got 'reflect'",
        ),
    ],
    ids=str,
)
def test_refuses(changes, message):
    arguments = dict(zip(NAMES, inputs(), strict=True))
    expected = TypeError if "Tensor; got" in message else ValueError
    with pytest.raises(expected, match=rf"^hyper_batch_conv2d: {message}"):
        hyper_batch_conv2d(**{**arguments, **changes})


def test_the_kernels_take_channels_last():
    """As they do without a response: elsewhere they would load channels one by one."""
    problem = Problem(4, 64, 64, 64, 9, 256, 256)
    assert choose(problem) == Plan("fused", "fused")
    assert choose(problem._replace(channels_last=False)) == Plan("composed", "composed")


def test_kernels_refuse_groups():
    arguments = inputs(groups=2)
    with pytest.raises(ValueError, match="groups must be 1 with backend 'triton'; got 2"):
        hyper_batch_conv2d(*arguments, groups=2, backend="triton")
