"""batch_ensemble_linear with an activation, and with an index that names the member of each row."""

import pytest
import torch
from ops.problem import assert_held, inputs, keyword

from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)
from landscape_fast.testing import check_hessian, check_op, check_transforms

BACKENDS = ["torch", "triton"]
LAYOUTS = ["member_major", "batch_major", "folded", "shared"]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # not to be trusted when interpreted


def far_from_zero(bias):
    """With it, no rounding of y changes which elements a relu lets through."""
    return bias + 8 * bias.sign()


# -- activation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_agrees_with_the_definition(layout, dtype, backend, device):
    arguments = inputs(3, 20, 40, 24, layout, device)
    arguments[1] /= 8
    arguments[4] = far_from_zero(arguments[4])
    check_op(
        batch_ensemble_linear,
        batch_ensemble_linear_reference,
        arguments,
        dtype=dtype,
        backend=backend,
        layout=keyword(layout),
        activation="relu",
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(2,), (3,), (4,), (2, 3, 4)], ids=str)
def test_relu_without_some_factors(absent, backend, device):
    arguments = inputs(2, 6, 5, 4, device=device)
    arguments = [None if i in absent else t for i, t in enumerate(arguments)]
    check_op(
        batch_ensemble_linear,
        batch_ensemble_linear_reference,
        arguments,
        backend=backend,
        activation="relu",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_is_the_relu_of_torch(backend, device):
    """The same bits as a separate one, NaN included, and no gradient where y is zero."""
    arguments = [t.requires_grad_() for t in inputs(2, 6, 5, 4, device=device)]
    with torch.no_grad():
        arguments[0][0, 0, 0] = float("nan")
        arguments[0][1, 3] = 0.0
        arguments[4][1] = 0.0  # so that a row of y is exactly zero
    y = batch_ensemble_linear(*arguments, activation="relu", backend=backend)
    plain = batch_ensemble_linear(*arguments, backend=backend).relu()
    torch.testing.assert_close(y, plain, rtol=0, atol=0, equal_nan=True)
    assert y[0, 0].isnan().all() and (y == 0).any()
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, arguments, dy)
    expected = torch.autograd.grad(plain, arguments, dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_keeps_x_and_y(backend, device):
    """No mask, and no sum before it: the next layer keeps y as its input anyway."""
    x, weight, r, s, bias = (t.requires_grad_() for t in inputs(2, 6, 5, 4, device=device))
    s = s.detach()  # its gradient may keep a product on the composed path
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = batch_ensemble_linear(x, weight, r, s, bias, activation="relu", backend=backend)
    kept = {t.data_ptr() for t in saved}
    assert kept == {t.data_ptr() for t in (x, weight, r, s, y)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_hessians_and_transforms(backend, device):
    options = {"backend": backend, "activation": "relu"}
    arguments = inputs(2, 3, 4, 3, device=device)

    def reference(*tensors):
        return batch_ensemble_linear_reference(*tensors, activation="relu")

    check_hessian(batch_ensemble_linear, reference, arguments, **options)
    check_transforms(batch_ensemble_linear, reference, arguments, **options)


def test_relu_gradgradcheck():
    arguments = [t.requires_grad_() for t in inputs(2, 3, 3, 2, dtype=torch.float64)]

    def function(*tensors):
        return batch_ensemble_linear(*tensors, activation="relu")

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


# -- index ---------------------------------------------------------------------------------------


def indexed(N, M, I, O, device="cpu", dtype=torch.float32):
    """x [N, I] and the rest; an index in no order that leaves out a member, if there are two."""
    _, *rest = inputs(M, 1, I, O, device=device, dtype=dtype)
    index = torch.randint(max(M - 1, 1), (N,), device=device)
    return [torch.randn(N, I, dtype=dtype).to(device), *rest], index


def loop(x, weight, r, s, bias, index):
    """The definition, one row after the other."""
    rows = []
    for n, m in enumerate(index.tolist()):
        row = x[n] if r is None else x[n] * r[m]
        row = weight @ row
        row = row if s is None else row * s[m]
        rows.append(row if bias is None else row + (bias[m] if bias.ndim == 2 else bias))
    return torch.stack(rows)


@pytest.mark.parametrize("sizes", [(11, 3, 5, 4), (1, 4, 3, 2), (40, 1, 3, 7)], ids=str)
def test_index_is_the_loop_over_rows(sizes, device):
    arguments, index = indexed(*sizes, device, torch.float64)
    arguments = [t.requires_grad_() for t in arguments]
    y = batch_ensemble_linear(*arguments, layout="folded", index=index)
    truth = loop(*arguments, index)
    torch.testing.assert_close(y, truth)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, arguments, dy)
    for a, b in zip(found, torch.autograd.grad(truth, arguments, dy), strict=True):
        torch.testing.assert_close(a, b)
    if sizes[1] > 1:  # a member without rows
        assert all((g[-1] == 0).all() for g in found[2:])


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_index_agrees_with_the_definition(dtype, activation, device):
    arguments, index = indexed(50, 4, 17, 9, device)
    arguments[1] /= 4
    x, weight, r, s, bias = arguments
    bias = far_from_zero(bias) if activation else bias
    without = [] if activation else [(None, s, None), (r, s, None)]
    for factors in ((r, s, bias), (r, None, bias[0]), (None, None, bias), *without):
        check_op(
            lambda *a, index, **options: batch_ensemble_linear(*a, index=index, **options),
            batch_ensemble_linear_reference,
            [x, weight, *factors],
            dtype=dtype,
            layout="folded",
            index=index,
            activation=activation,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_index_gradients_held_in_float32(dtype, device):
    (x, *rest), index = indexed(60, 4, 17, 9, device)
    leaves = [t.requires_grad_() for t in (x.to(dtype), *rest)]
    y = batch_ensemble_linear(*leaves, layout="folded", index=index)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(loop(*exact, index), exact, dy.double())
    assert found[0].dtype == dtype
    for a, b in zip(found[1:], truth[1:], strict=True):
        assert a.dtype == torch.float32
        assert_held(a, b)


def test_sorted_index_is_the_folded_layout(device):
    arguments = inputs(3, 4, 5, 6, "folded", device)
    index = torch.arange(3, device=device).repeat_interleave(4)
    y = batch_ensemble_linear(*arguments, layout="folded", index=index)
    torch.testing.assert_close(y, batch_ensemble_linear(*arguments, layout="folded"))


def test_index_keeps_x_alone_and_the_same_bits(device):
    arguments, index = indexed(30, 4, 5, 6, device)
    arguments = [t.requires_grad_() for t in arguments]

    def run():
        y = batch_ensemble_linear(*arguments, layout="folded", index=index)
        return [y, *torch.autograd.grad(y, arguments, torch.ones_like(y))]

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch_ensemble_linear(*arguments, layout="folded", index=index)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (*arguments, index)}
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_index_hessians_and_transforms(activation, device):
    arguments, index = indexed(7, 3, 4, 3, device)

    def ours(*tensors, **options):
        return batch_ensemble_linear(
            *tensors, layout="folded", index=index, activation=activation, **options
        )

    def reference(*tensors):
        return batch_ensemble_linear_reference(*tensors, index=index, activation=activation)

    check_hessian(ours, reference, arguments)
    check_transforms(ours, reference, arguments)


def test_no_rows(device):
    arguments, index = indexed(0, 3, 4, 5, device)
    arguments = [t.requires_grad_() for t in arguments]
    y = batch_ensemble_linear(*arguments, layout="folded", index=index)
    assert y.shape == (0, 5)
    grads = torch.autograd.grad(y.sum(), arguments)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, arguments, strict=True))


def test_index_out_of_range(monkeypatch, device):
    arguments, index = indexed(6, 3, 4, 5, device)
    for value in (3, 7, -1, -2):
        index[4] = value
        monkeypatch.setenv("LANDSCAPE_FAST_DEBUG", "1")
        text = rf"^batch_ensemble_linear: index must be members in \[0, M\) with M = 3; got {value}"
        with pytest.raises(IndexError, match=text + " for row 4"):
            batch_ensemble_linear(*arguments, layout="folded", index=index)
        monkeypatch.delenv("LANDSCAPE_FAST_DEBUG")
        y = batch_ensemble_linear_reference(*arguments, index=index)  # what CUDA gives
        assert y[4].isnan().all() and y.isnan().sum() == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "gelu"}, r"activation must be one of \(None, 'relu'\); got 'gelu'"),
        ({"layout": "member_major"}, r"layout must be 'folded' with an index; got 'member_major'"),
        ({"index": [0, 1]}, r"index must be a Tensor; got list"),
        ({"index": torch.zeros(4).long()}, r"index must be \[N\] with N = 6; got \[4\]"),
        ({"index": torch.zeros(6)}, r"index must be one of int64; got torch.float32"),
        ({"x": torch.zeros(2, 3, 4)}, r"x must be \[N, I\]; got \[2, 3, 4\]"),
        ({"backend": "triton"}, r"backend must be 'auto' or 'torch' with an index; got 'triton'"),
        (
            {"index": torch.zeros(6, device="meta").long()},
            r"index must be on the device of x, cpu; got meta",
        ),
    ],
    ids=str,
)
def test_refuses(changes, message):
    tensors, index = indexed(6, 3, 4, 5)
    arguments = dict(zip(("x", "weight", "r", "s", "bias"), tensors, strict=True))
    arguments |= {"layout": "folded", "index": index}
    expected = TypeError if "Tensor; got" in message else ValueError
    with pytest.raises(expected, match=rf"^batch_ensemble_linear: {message}"):
        batch_ensemble_linear(**{**arguments, **changes})
