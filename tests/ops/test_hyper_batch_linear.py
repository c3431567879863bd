"""hyper_batch_linear: every layout and backend against the definition, and its contract."""

import itertools
import sys
from collections.abc import Iterator

import pytest
import torch
from ops.problem import assert_held, gradients, keyword

from landscape_fast import _extension
from landscape_fast.ops import hyper_batch_linear, hyper_batch_linear_reference
from landscape_fast.testing import check_hessian, check_op, check_transforms

CPP = pytest.param("cpp", marks=pytest.mark.skipif(
    torch.cuda.is_available() or _extension.C is None, reason="needs CPU tensors and the extension"
))  # fmt: skip
HALF_BACKENDS = ["torch", "triton"]
BACKENDS = [*HALF_BACKENDS, CPP]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # not to be trusted when interpreted
NAMES = ("x", "weight", "delta", "e", "r", "s", "u", "v", "bias", "delta_bias", "e_bias")
# (M, B, I, O): ones, primes, more than one tile, few examples, many
SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (5, 1, 33, 17), (1, 65, 3, 70), (3, 20, 40, 24)]
LAYOUTS = ["member_major", "batch_major", "folded", "shared", "shared batch_major"]
TIED = (6, 7)  # u and v


def inputs(M, B, I, O, layout="member_major", device="cpu", dtype=torch.float32):
    """All arguments for a layout; "shared" before it where the members share x."""
    rows = {"member_major": (M, B), "batch_major": (B, M), "folded": (M * B,)}[keyword(layout)]
    own = (B,) if layout.startswith("shared") else rows
    shapes = ((*own, I), (O, I), (O, I), (*rows, O), (M, I), (M, O), (M, I), (M, O))
    shapes += ((M, O), (M, O), (*rows, O))
    return [torch.randn(*shape, dtype=dtype).to(device) for shape in shapes]


def without(arguments, absent):
    return [None if i in absent else t for i, t in enumerate(arguments)]


def check(arguments, layout="member_major", **options):
    options["layout"] = keyword(layout)
    check_op(hyper_batch_linear, hyper_batch_linear_reference, arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_agrees_with_the_definition(sizes, layout, backend, device):
    absent = TIED if sizes[0] % 2 else ()  # both kinds of factors for every layout
    check(without(inputs(*sizes, layout, device), absent), layout, backend=backend)


@pytest.mark.parametrize("backend", HALF_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["member_major", "shared batch_major"])
def test_agrees_in_half_precision(layout, dtype, backend, device):
    arguments = inputs(3, 20, 40, 24, layout, device)
    absent = TIED if layout == "member_major" else ()
    check(without(arguments, absent), layout, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_factor_may_be_missing(backend, device):
    arguments = inputs(2, 6, 5, 4, device=device)
    for absent in itertools.product((False, True), repeat=4):
        gone = [i for i, missing in zip((4, 5, 6, 7), absent, strict=True) if missing]
        check(without(arguments, gone), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bias_may_be_missing_or_shared(backend, device):
    arguments = inputs(2, 6, 5, 4, "shared", device)
    for gone in ((8,), (9, 10), (8, 9, 10), (4, 5, 6, 7, 8, 9, 10)):
        check(without(arguments, gone), "shared", backend=backend)
    one_for_all = [t[0] if i in (8, 9) else t for i, t in enumerate(arguments)]
    check(one_for_all, "shared", backend=backend)


def test_each_example_has_a_weight_of_its_own():
    """In float64, against the kernel `W s r + delta v u e` of every member and example."""
    M, B, I, O = 3, 6, 4, 5
    x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias = inputs(
        M, B, I, O, dtype=torch.float64
    )
    for tie in (False, True):
        u_, v_ = (r, s) if tie else (u, v)
        y = hyper_batch_linear(
            x, weight, delta, e, r, s, *((None, None) if tie else (u, v)), bias, delta_bias, e_bias
        )
        for m, b in itertools.product(range(M), range(B)):
            kernel = weight * torch.outer(s[m], r[m])
            kernel = kernel + delta * torch.outer(v_[m], u_[m]) * e[m, b][:, None]
            expected = kernel @ x[m, b] + bias[m] + delta_bias[m] * e_bias[m, b]
            torch.testing.assert_close(y[m, b], expected)


def test_one_member_without_factors_is_a_self_tuning_network():
    """x W + b + e (x V) + e' c, the layer of MacKay et al. 2019, and its gradients."""
    x, weight, delta, e, *_, bias, delta_bias, e_bias = (
        t.requires_grad_() for t in inputs(1, 6, 4, 5, "folded", dtype=torch.float64)
    )
    bias, delta_bias = (t.detach()[0].requires_grad_() for t in (bias, delta_bias))
    given = {"bias": bias, "delta_bias": delta_bias, "e_bias": e_bias}
    y = hyper_batch_linear(x, weight, delta, e, **given, layout="folded")
    expected = x @ weight.T + bias + e * (x @ delta.T) + e_bias * delta_bias
    torch.testing.assert_close(y, expected)
    leaves = (x, weight, delta, e, bias, delta_bias, e_bias)
    dy = torch.randn_like(y)
    for a, b in zip(gradients(y, leaves, dy), gradients(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_response_it_is_a_batch_ensemble(backend, device):
    from landscape_fast.ops import batch_ensemble_linear

    x, weight, delta, e, r, s, u, v, bias, delta_bias, e_bias = inputs(3, 6, 5, 4, device=device)
    zeros = torch.zeros_like(e)
    y = hyper_batch_linear(
        x, weight, delta, zeros, r, s, u, v, bias, delta_bias, zeros, backend=backend
    )
    torch.testing.assert_close(y, batch_ensemble_linear(x, weight, r, s, bias))


def strided() -> Iterator[tuple[str, list]]:
    """Inputs of M = 3, B = 6, I = 5, O = 4 whose memory is not laid out as their shape."""
    x, weight, delta, e, *rest, e_bias = inputs(3, 6, 5, 4)
    yield "x transposed", [x.mT.contiguous().mT, weight, delta, e, *rest, e_bias]
    yield "examples of x expanded", [x[:, :1].expand(3, 6, 5), weight, delta, e, *rest, e_bias]
    yield "weights transposed", [x, weight.T.contiguous().T, delta.T.contiguous().T, e, *rest,
                                 e_bias]  # fmt: skip
    both = torch.randn(3, 6, 8)  # as an embedding gives them
    yield "halves of one response", [x, weight, delta, both[..., :4], *rest, both[..., 4:]]
    mean = e[:, :1].expand(3, 6, 4)  # one hyperparameter for all examples
    yield "one response", [x, weight, delta, mean, *rest, e_bias.mT.contiguous().mT]
    yield "factors strided", [x, weight, delta, e, *[t.T.contiguous().T for t in rest], e_bias]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(strided()), ids=lambda case: case[0])
def test_any_strides(case, backend, device):
    check([t.to(device) for t in case[1]], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_incoming_gradient(backend, device):
    """y.sum() hands back one number, expanded."""
    arguments = [t.requires_grad_() for t in inputs(2, 5, 4, 3, device=device)]
    found = torch.autograd.grad(hyper_batch_linear(*arguments, backend=backend).sum(), arguments)
    truth = torch.autograd.grad(hyper_batch_linear_reference(*arguments).sum(), arguments)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tie", [False, True])
def test_only_wanted_gradients(tie, backend, device):
    arguments = without(inputs(2, 5, 4, 3, device=device), TIED if tie else ())
    dy = torch.randn(2, 5, 3, device=device)
    given = [t for t in arguments if t is not None]
    every = [t.clone().requires_grad_() for t in given]
    filled = iter(every)
    y = hyper_batch_linear_reference(*[None if t is None else next(filled) for t in arguments])
    truth = gradients(y, every, dy)
    wanted = [[i == j for i in range(len(given))] for j in range(len(given))]
    wanted += [[i % 2 == j for i in range(len(given))] for j in range(2)]
    for flags in wanted:
        some = [t.clone().requires_grad_(w) for t, w in zip(given, flags, strict=True)]
        filled = iter(some)
        again = [None if t is None else next(filled) for t in arguments]
        hyper_batch_linear(*again, backend=backend).backward(dy)
        for t, w, g in zip(some, flags, truth, strict=True):
            assert (t.grad is not None) == w
            if w:
                torch.testing.assert_close(t.grad, g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", range(4), ids=list("MBIO"))
def test_empty(empty, backend, device):
    sizes = [2, 5, 4, 3]
    sizes[empty] = 0
    arguments = [t.requires_grad_() for t in inputs(*sizes, device=device)]
    y = hyper_batch_linear(*arguments, backend=backend)
    bias, delta_bias, e_bias = arguments[8:]
    torch.testing.assert_close(y, bias[:, None] + delta_bias[:, None] * e_bias)
    for g, t in zip(gradients(y, arguments)[:8], arguments, strict=False):
        assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.parametrize("backend", HALF_BACKENDS)
@pytest.mark.parametrize("low", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("tie", [False, True])
def test_float32_parameters_beside_16_bits(tie, low, backend, device):
    """Their gradients are those of the rounded values, with the exactness of float32."""
    arguments = without(inputs(3, 20, 40, 24, device=device), TIED if tie else ())
    activations = ("x", "e", "e_bias")
    arguments = [t if t is None else t.to(low) if name in activations else t
                 for name, t in zip(NAMES, arguments, strict=True)]  # fmt: skip
    leaves = [t if t is None else t.clone().requires_grad_() for t in arguments]
    y = hyper_batch_linear(*leaves, backend=backend)
    dy = torch.randn(y.shape, device=device).to(low)
    exact = [t if t is None else t.to(low).double().requires_grad_() for t in arguments]
    truth = hyper_batch_linear_reference(*exact)
    assert y.dtype == low
    found = gradients(y, [t for t in leaves if t is not None], dy)
    expected = gradients(truth, [t for t in exact if t is not None], dy.double())
    names = [name for name, t in zip(NAMES, arguments, strict=True) if t is not None]
    for name, a, b in zip(names, found, expected, strict=True):
        if name in activations:
            assert a.dtype == low, name
            # dx is a sum of two products, each rounded, as y is
            limit = 8 * torch.finfo(low).eps
        else:
            assert a.dtype == torch.float32, name
            limit = 1e-6  # what is promised; rounding to 16 bits makes 1e-3
        assert_held(a, b, limit)


@pytest.mark.parametrize("backend", HALF_BACKENDS)
def test_autocast(backend, device):
    """x takes the low type; parameters keep theirs, and so do their gradients."""
    arguments = [t.requires_grad_() for t in inputs(2, 3, 4, 3, device=device)]
    with torch.autocast(device, dtype=torch.float16):
        y = hyper_batch_linear(*arguments, backend=backend)
        double = hyper_batch_linear(*[t.detach().double() for t in arguments])
    assert y.dtype == torch.float16 and double.dtype == torch.float64
    mixed = [t.detach().half() if i == 0 else t.detach() for i, t in enumerate(arguments)]
    mixed = [t.requires_grad_() for t in mixed]
    plain = hyper_batch_linear(*mixed, backend=backend)
    assert torch.equal(y, plain)
    dy = torch.randn(2, 3, 3, device=device).half()
    for a, b in zip(gradients(y, arguments, dy), gradients(plain, mixed, dy), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_inside_autocast_keeps_its_precision(create_graph, backend, device):
    arguments = [t.requires_grad_() for t in inputs(2, 3, 4, 3, device=device)]
    y, dy = hyper_batch_linear(*arguments, backend=backend), torch.randn(2, 3, 3, device=device)
    with torch.autocast(device, dtype=torch.float16):
        found = torch.autograd.grad(y, arguments, dy, create_graph=create_graph)
    expected = gradients(hyper_batch_linear_reference(*arguments), arguments, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["member_major", "shared batch_major"])
def test_gradgradcheck(layout):
    arguments = [t.requires_grad_() for t in inputs(2, 2, 3, 2, layout, dtype=torch.float64)]

    def function(*tensors):
        return hyper_batch_linear(*tensors, layout=keyword(layout))

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(), TIED, (4, 5), (4, 5, 6, 7), (8, 9, 10)], ids=str)
def test_hessians(absent, backend, device):
    arguments = without(inputs(2, 3, 4, 3, device=device), absent)
    options = {"backend": backend}
    check_hessian(hyper_batch_linear, hyper_batch_linear_reference, arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True])
def test_transforms_and_compile(shared, backend, device):
    """torch.func.grad, jvp, vmap, forward-mode AD, torch.compile."""
    arguments = inputs(2, 3, 4, 3, "shared" if shared else "member_major", device)
    options = {"backend": backend}
    check_transforms(hyper_batch_linear, hyper_batch_linear_reference, arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs_e", [False, True])
def test_keeps_x_and_one_product(needs_e, backend, device):
    """Of what is not an argument only (x * u) delta^T is kept, and only where de or dv asks."""
    arguments = [t.requires_grad_() for t in inputs(2, 5, 4, 3, device=device)]
    if not needs_e:
        for i in (3, 7):
            arguments[i] = arguments[i].detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hyper_batch_linear(*arguments, backend=backend)
    known = {t.data_ptr() for t in arguments}
    more = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in more] == ([(2, 5, 3)] if needs_e else [])
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend, device):
    arguments = inputs(2, 5, 4, 3, device=device)
    arguments[0][1, 2, 0] = float("nan")
    arguments[3][0, 1, 2] = float("nan")  # of e: one output of one example
    y = hyper_batch_linear(*arguments, backend=backend)
    assert y[1, 2].isnan().all() and y[0, 1, 2].isnan() and y.isnan().sum() == 4


def test_meta_device():
    arguments = [t.to("meta").requires_grad_() for t in inputs(2, 3, 4, 5)]
    y = hyper_batch_linear(*arguments)
    assert y.shape == (2, 3, 5) and y.is_contiguous()
    assert [g.shape for g in gradients(y, arguments)] == [t.shape for t in arguments]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": None}, r"x must be a Tensor; got NoneType"),
        ({"e": None}, r"e must be a Tensor; got NoneType"),
        ({"u": 2.0}, r"u must be a Tensor; got float"),
        ({"layout": "major"}, r"layout must be one of \('member_major', .*; got 'major'"),
        ({"x": torch.zeros(4)}, r"x must be \[M, B, I\] or \[B, I\]; got \[4\]"),
        ({"layout": "folded"}, r"x must be \[M\*B, I\]; got \[2, 3, 4\]"),
        (
            {"x": torch.zeros(2, 3, 4).long()},
            r"x must be one of float32, bfloat16, float16, float64; got torch.int64",
        ),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[O, I\] with I = 4; got \[5, 3\]"),
        ({"delta": torch.zeros(4, 4)}, r"delta must be \[O, I\] with O = 5, I = 4; got \[4, 4\]"),
        (
            {"e": torch.zeros(2, 4, 5)},
            r"e must be \[M, B, O\] with M = 2, B = 3, O = 5; got \[2, 4, 5\]",
        ),
        ({"x": torch.zeros(3, 4), "e": torch.zeros(3, 5)}, r"e must be \[M, B, O\] with B = 3, "),
        (
            {"e_bias": torch.zeros(2, 3, 10)},
            r"e_bias must be \[M, B, O\] with M = 2, B = 3, O = 5; got \[2, 3, 10\]",
        ),
        ({"r": torch.zeros(3, 4)}, r"r must be \[M, I\] with M = 2, I = 4; got \[3, 4\]"),
        ({"s": torch.zeros(2, 4)}, r"s must be \[M, O\] with M = 2, O = 5; got \[2, 4\]"),
        ({"u": torch.zeros(2, 5)}, r"u must be \[M, I\] with M = 2, I = 4; got \[2, 5\]"),
        ({"v": torch.zeros(5)}, r"v must be \[M, O\] with M = 2, O = 5; got \[5\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[O\] with O = 5; got \[4\]"),
        (
            {"delta_bias": torch.zeros(3, 5)},
            r"delta_bias must be \[M, O\] with M = 2, O = 5; got \[3, 5\]",
        ),
        ({"delta_bias": None}, r"delta_bias must be given where e_bias is; got None"),
        ({"e_bias": None}, r"e_bias must be given where delta_bias is; got None"),
        ({"s": torch.zeros(2, 5).double()}, r"s must be of the dtype of x, float32; got float64"),
        ({"delta": torch.zeros(5, 4, device="meta")}, r"delta must be on the device of x, cpu"),
        ({"backend": "numpy"}, r"backend must be one of .*; got 'numpy'"),
    ],
    ids=str,
)
def test_refuses(changes, message):
    arguments = dict(zip(NAMES, inputs(2, 3, 4, 5), strict=True))
    expected = TypeError if "Tensor; got" in message else ValueError
    with pytest.raises(expected, match=rf"^hyper_batch_linear: {message}"):
        hyper_batch_linear(**{**arguments, **changes})


def test_the_kernels_of_a_cpu_can_be_forced(monkeypatch):
    """A shared x without r goes to the library, unless somebody wants otherwise."""
    page, arguments = sys.modules[hyper_batch_linear.__module__], inputs(2, 3, 4, 5, "shared")[:4]
    monkeypatch.setattr(page, "pick", lambda op, backend, tensor: "cpp")
    monkeypatch.setattr(page, "two_layers", lambda *arguments: "kernels")
    assert hyper_batch_linear(*arguments, backend="cpp") == "kernels"
    monkeypatch.setattr(page._dispatch, "FORCED", "auto")
    assert torch.is_tensor(hyper_batch_linear(*arguments))
    monkeypatch.setattr(page._dispatch, "FORCED", "cpp")
    assert hyper_batch_linear(*arguments) == "kernels"


def test_refuses_rows_that_do_not_divide():
    x, weight, delta, e, r, *_ = inputs(2, 3, 4, 5, "folded")
    with pytest.raises(
        ValueError, match=r"x must be \[M\*B, I\] with rows divisible by M = 2; got"
    ):
        hyper_batch_linear(x[:5], weight, delta, e[:5], r, layout="folded")
