"""batch_ensemble_linear: every layout and backend against the definition, and its contract."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from ops.problem import gradients, inputs, keyword

from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)
from landscape_fast.testing import check_hessian, check_op, check_transforms

BACKENDS = ["torch", "triton"]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # not to be trusted when interpreted
# (M, B, I, O): ones, primes, more than one tile, few examples, many
SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (5, 1, 33, 17), (1, 65, 3, 70), (3, 20, 40, 24)]
LAYOUTS = ["member_major", "batch_major", "folded", "shared", "shared batch_major"]


def check(arguments, layout="member_major", **options):
    options["layout"] = keyword(layout)
    check_op(batch_ensemble_linear, batch_ensemble_linear_reference, arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_agrees_with_the_definition(sizes, layout, backend, device):
    check(inputs(*sizes, layout, device), layout, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["member_major", "shared batch_major"])
def test_agrees_in_half_precision(layout, dtype, backend, device):
    arguments = inputs(3, 20, 40, 24, layout, device)
    check(arguments, layout, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True])
def test_every_factor_may_be_missing(shared, backend, device):
    x, weight, r, s, bias = inputs(3, 6, 5, 4, "shared" if shared else "member_major", device)
    for factors in itertools.product((r, None), (s, None), (bias, bias[0], None)):
        if shared and not any(t is not None and t.ndim == 2 for t in factors):
            continue  # nothing says how many members there are
        check([x, weight, *factors], backend=backend)


def strided() -> Iterator[tuple[str, tuple]]:
    """Inputs of M = 3, B = 6, I = 5, O = 4 whose memory is not laid out as their shape."""
    x, weight, r, s, bias = inputs(3, 6, 5, 4)
    expanded = x[:1].expand(3, 6, 5)
    yield "members of x expanded", (expanded, weight, r, s, bias)
    yield "examples of x expanded", (x[:, :1].expand(3, 6, 5), weight, r, s, bias)
    yield "x transposed", (x.permute(2, 1, 0).contiguous().permute(2, 1, 0), weight, r, s, bias)
    yield "every other feature of x", (torch.randn(3, 6, 10)[..., ::2], weight, r, s, bias)
    yield "x of odd rows", (torch.randn(3, 6, 7)[..., 1:6], weight, r, s, bias)
    yield "weight transposed", (x, weight.T.contiguous().T, r, s, bias)
    yield "weight expanded", (x, weight[:1].expand(4, 5), r, s, bias)
    factors = (r.T.contiguous().T, s[:1].expand(3, 4), bias.T.contiguous().T)
    yield "factors strided", (x, weight, *factors)
    yield "shared x transposed", (x[0].T.contiguous().T, weight, r, s, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(strided()), ids=lambda case: case[0])
def test_any_strides(case, backend, device):
    check([t.to(device) for t in case[1]], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_incoming_gradient(backend, device):
    """y.sum() hands back one number, expanded."""
    arguments = [t.requires_grad_() for t in inputs(2, 5, 4, 3, device=device)]
    for layout in ("member_major", "batch_major"):
        arguments[0] = torch.randn(2, 2, 4, device=device).requires_grad_()
        y = batch_ensemble_linear(*arguments, layout=layout, backend=backend)
        truth = batch_ensemble_linear_reference(*arguments, layout=layout)
        found = torch.autograd.grad(y.sum(), arguments)
        truth = torch.autograd.grad(truth.sum(), arguments)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend, device):
    arguments = inputs(2, 5, 4, 3, device=device)
    dy = torch.randn(2, 5, 3, device=device)
    every = [t.clone().requires_grad_() for t in arguments]
    truth = gradients(batch_ensemble_linear_reference(*every), every, dy)
    for wanted in itertools.product((False, True), repeat=5):
        if not any(wanted):
            continue
        some = [t.clone().requires_grad_(w) for t, w in zip(arguments, wanted, strict=True)]
        batch_ensemble_linear(*some, backend=backend).backward(dy)
        for t, w, g in zip(some, wanted, truth, strict=True):
            assert (t.grad is not None) == w
            if w:
                torch.testing.assert_close(t.grad, g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", range(4), ids=list("MBIO"))
def test_empty(empty, backend, device):
    sizes = [2, 5, 4, 3]
    sizes[empty] = 0
    M, B, _, O = sizes
    arguments = [t.requires_grad_() for t in inputs(*sizes, device=device)]
    y = batch_ensemble_linear(*arguments, backend=backend)
    torch.testing.assert_close(y, arguments[4][:, None].expand(M, B, O))  # with no features: bias
    *others, dbias = gradients(y, arguments, torch.ones_like(y))
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(others, arguments, strict=False))
    torch.testing.assert_close(dbias, torch.full_like(arguments[4], B))


def test_the_formula_written_out():
    """Against einsum, and the gradients against the identities the kernels are built on."""
    x, weight, r, s, bias = (t.requires_grad_() for t in inputs(3, 6, 5, 4, dtype=torch.float64))
    y = batch_ensemble_linear(x, weight, r, s, bias)
    torch.testing.assert_close(
        y, torch.einsum("mo,oi,mi,mbi->mbo", s, weight, r, x) + bias[:, None]
    )
    dy = torch.randn_like(y)
    G = torch.einsum("mbo,mbi->moi", dy, x)
    expected = (
        torch.einsum("mbo,mo,oi,mi->mbi", dy, s, weight, r),
        torch.einsum("mo,moi,mi->oi", s, G, r),
        torch.einsum("oi,mo,moi->mi", weight, s, G),
        torch.einsum("oi,moi,mi->mo", weight, G, r),
        dy.sum(1),
    )
    for a, b in zip(gradients(y, (x, weight, r, s, bias), dy), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_equals_tabm():
    """TabM's layer in its layout, [B, M, I]: output and all gradients, in float64."""
    tabm = pytest.importorskip("tabm")
    layer = tabm.LinearBatchEnsemble(5, 4, k=3, scaling_init=("random-signs", "normal")).double()
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(layer.bias)
    tensors = (x, layer.weight, layer.r, layer.s, layer.bias)
    ours, theirs = batch_ensemble_linear(*tensors, layout="batch_major"), layer(x)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for a, b in zip(gradients(ours, tensors, dy), gradients(theirs, tensors, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_members_are_independent(backend, device):
    """Permuted members give permuted outputs; one member alone gives its own."""
    x, *rest = inputs(4, 5, 6, 3, device=device)
    y = batch_ensemble_linear(x, *rest, backend=backend)
    order = torch.tensor([2, 0, 3, 1], device=device)
    weight, *factors = rest
    permuted = [t[order] for t in factors]
    z = batch_ensemble_linear(x[order], weight, *permuted, backend=backend)
    torch.testing.assert_close(z, y[order])
    alone = [t[1:2] for t in factors]
    torch.testing.assert_close(
        batch_ensemble_linear(x[1:2], weight, *alone, backend=backend), y[1:2]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend, device):
    x, *rest = inputs(2, 5, 4, 3, device=device)
    x[1, 2, 0] = float("nan")
    y = batch_ensemble_linear(x, *rest, backend=backend)
    assert y[1, 2].isnan().all() and y.isnan().sum() == 3


@pytest.mark.parametrize("layout", ["member_major", "shared batch_major"])
def test_gradgradcheck(layout):
    arguments = [t.requires_grad_() for t in inputs(2, 3, 3, 2, layout, dtype=torch.float64)]

    def function(*tensors):
        return batch_ensemble_linear(*tensors, layout=keyword(layout))

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(), (2,), (3,), (4,), (2, 3, 4)], ids=str)
def test_hessians(absent, backend, device):
    arguments = inputs(2, 3, 4, 3, device=device)
    arguments = [None if i in absent else t for i, t in enumerate(arguments)]
    check_hessian(
        batch_ensemble_linear, batch_ensemble_linear_reference, arguments, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True])
def test_transforms_and_compile(shared, backend, device):
    """torch.func.grad, jvp, vmap, forward-mode AD, torch.compile."""
    arguments = inputs(2, 3, 4, 3, "shared" if shared else "member_major", device)
    check_transforms(
        batch_ensemble_linear, batch_ensemble_linear_reference, arguments, backend=backend
    )


def test_vmap_over_weights():
    """A batch of layers, as when curvature is sampled."""
    x, weight, *factors = inputs(2, 3, 4, 3)
    weights = torch.stack([weight, -weight])
    y = torch.func.vmap(lambda w: batch_ensemble_linear(x, w, *factors))(weights)
    torch.testing.assert_close(y[1], batch_ensemble_linear(x, -weight, *factors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_inside_autocast_keeps_its_precision(create_graph, backend, device):
    arguments = [t.requires_grad_() for t in inputs(2, 3, 4, 3, device=device)]
    y, dy = batch_ensemble_linear(*arguments, backend=backend), torch.randn(2, 3, 3, device=device)
    expected = gradients(y, arguments, dy) if not create_graph else None
    y = batch_ensemble_linear(*arguments, backend=backend)
    with torch.autocast(device, dtype=torch.float16):
        found = torch.autograd.grad(y, arguments, dy, create_graph=create_graph)
    expected = expected or gradients(batch_ensemble_linear_reference(*arguments), arguments, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_meta_device():
    arguments = [t.to("meta").requires_grad_() for t in inputs(2, 3, 4, 5)]
    y = batch_ensemble_linear(*arguments, layout="member_major")
    assert y.shape == (2, 3, 5) and y.is_contiguous()
    assert [g.shape for g in gradients(y, arguments)] == [t.shape for t in arguments]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_contiguous(layout, backend, device):
    x, weight, r, s, bias = inputs(2, 3, 4, 5, layout, device)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    for factors in ((r, s, bias), (r, None, None), (None, s, None), (None, None, bias)):
        y = batch_ensemble_linear(
            strided, weight, *factors, layout=keyword(layout), backend=backend
        )
        assert y.is_contiguous()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": None}, r"x must be a Tensor; got NoneType"),
        ({"r": 2.0}, r"r must be a Tensor; got float"),
        ({"layout": "major"}, r"layout must be one of \('member_major', .*; got 'major'"),
        ({"x": torch.zeros(4)}, r"x must be \[M, B, I\] or \[B, I\]; got \[4\]"),
        (
            {"x": torch.zeros(4), "layout": "batch_major"},
            r"x must be \[B, M, I\] or \[B, I\]; got \[4\]",
        ),
        ({"layout": "folded"}, r"x must be \[M\*B, I\]; got \[2, 3, 4\]"),
        (
            {"x": torch.zeros(3, 4), "layout": "folded"},
            r"x must be \[M\*B, I\] with rows divisible by M = 2; got \[3, 4\]",
        ),
        (
            {"x": torch.zeros(2, 3, 4).long()},
            r"x must be one of float32, bfloat16, float16, float64; got torch.int64",
        ),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[O, I\] with I = 4; got \[5, 3\]"),
        (
            {"x": torch.zeros(3, 4), "r": None, "s": None, "bias": torch.zeros(5)},
            r"x must be \[M, B, I\] where neither r, s nor a bias \[M, O\] gives the number of "
            r"members; got \[3, 4\]",
        ),
        ({"r": torch.zeros(3, 4)}, r"r must be \[M, I\] with M = 2, I = 4; got \[3, 4\]"),
        ({"s": torch.zeros(2, 4)}, r"s must be \[M, O\] with M = 2, O = 5; got \[2, 4\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[O\] with O = 5; got \[4\]"),
        ({"bias": torch.zeros(3, 5)}, r"bias must be \[M, O\] with M = 2, O = 5; got \[3, 5\]"),
        ({"bias": torch.zeros(())}, r"bias must be \[M, O\] with M = 2, O = 5; got \[\]"),
        (
            {"s": torch.zeros(2, 5).double()},
            r"s must be of the dtype of x, float32; got float64",
        ),
        ({"weight": torch.zeros(5, 4, device="meta")}, r"weight must be on the device of x, cpu"),
        ({"backend": "numpy"}, r"backend must be one of .*; got 'numpy'"),
        ({"backend": "cuda"}, r"backend must be one of .*; got 'cuda'"),
    ],
    ids=str,
)
def test_refuses(changes, message):
    arguments = dict(zip(("x", "weight", "r", "s", "bias"), inputs(2, 3, 4, 5), strict=True))
    expected = TypeError if "Tensor; got" in message else ValueError
    with pytest.raises(expected, match=rf"^batch_ensemble_linear: {message}"):
        batch_ensemble_linear(**{**arguments, **changes})


def test_refuses_float64_kernels():
    with pytest.raises(ValueError, match=r"backend 'triton' .* cannot run here: it takes"):
        batch_ensemble_linear(*inputs(2, 3, 4, 5, dtype=torch.float64), backend="triton")
