"""member_batch_norm on every backend: the definition in float64, and F.batch_norm per member."""

import pytest
import torch
import torch.nn.functional as F
from ops.norm_problem import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    ORDERS,
    inputs,
    members_of,
    op,
    reference,
    statistics,
)

from landscape_fast.ops import _member_batch_norm_ways as ways
from landscape_fast.ops import member_batch_norm, member_batch_norm_reference
from landscape_fast.testing import assert_as_exact, check_op, fenced

# (M, B, F, *pixels): features or pixels next to one another, many or few; the last three in two
# splits. Many channels: with few, whose rounding errors are the largest is a matter of chance.
SHAPES = [(3, 5, 14), (2, 3, 40, 1, 1), (2, 90, 11, 3, 2), (1, 29, 3, 19, 17), (1, 301, 33)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(shape, dtype, backend, device):
    if dtype != torch.float32 and device == "cpu" and shape in SHAPES[3:]:
        pytest.skip("slow, and the same instructions as in float32")
    given = inputs(shape, device=device)
    cases = [(True, "relu"), (False, "relu"), (True, None), (False, None)]
    for training, activation in cases[: 4 if shape in SHAPES[:1] else 2]:
        options = {"training": training, "activation": activation}
        check_op(op, reference, given, dtype=dtype, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_every_layout_and_order_of_memory(training, layout, order, backend, device):
    # without pixels the two orders are one
    for shape in [(2, 4, 11, 3, 2), (2, 3, 40)][: 2 if order == "contiguous" else 1]:
        given = inputs(shape, layout, order, device)
        options = {"layout": layout, "training": training, "backend": backend}
        check_op(op, reference, given, **options)
        y = op(*given, **options)
        if backend == "triton" or len(shape) > 3:
            assert y.stride() == given[0].stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 14), (2, 9, 8, 3, 2)], ids=str)
def test_three_steps_are_those_of_batch_norm_for_each_member(shape, layout, backend, device):
    """Outputs, gradients and running statistics of two training steps and an evaluation."""
    M, _, features = shape[:3]
    dtype = torch.float64 if backend == "torch" else torch.float32
    weight, bias = inputs(shape, dtype=dtype, device=device)[1:]
    running = statistics(weight)
    mine = [s.clone() for s in running]
    exact = [s.double() for s in running]
    plain = [s.clone() for s in running]
    for step in range(3):
        options = {"training": step < 2, "momentum": 0.3, "eps": 1e-3}
        x = inputs(shape, layout, dtype=dtype, device=device)[0].requires_grad_()
        y = member_batch_norm(x, weight, bias, *mine, layout=layout, backend=backend, **options)
        incoming = torch.randn_like(y)

        def each(x, *tensors, options=options):
            rows = zip(members_of(x, M, layout), *tensors, strict=True)
            return torch.stack([F.batch_norm(*row, **options) for row in rows])

        results = []
        for kind, stats in ((dtype, plain), (torch.float64, exact)):
            x2 = x.detach().to(kind).requires_grad_()
            want = each(x2, *stats, weight.to(kind), bias.to(kind))
            dy = members_of(incoming, M, layout).to(kind)
            results.append((want, torch.autograd.grad(want, x2, dy)[0]))
        got = members_of(y, M, layout), torch.autograd.grad(y, x, incoming)[0]
        for name, *three in zip(("y", "dx"), got, *results, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(three[0], three[1])
            else:
                assert_as_exact(name, *three)
        for name, *three in zip(("mean", "var"), mine, plain, exact, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(three[0], three[1])
            else:
                assert_as_exact(name, *three)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_far_from_zero_keep_their_digits(backend, device):
    """A sum of squares in float32 would leave none of the variance: it is 1e-8 of the square.

    The library loses four digits more than our kernel, which takes deviations from a number of the
    channel, so that they are exact.
    """
    x = 1e4 + torch.randn(2, 700, 3, device=device)
    mean, var = torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device)
    member_batch_norm(x, None, None, mean, var, training=True, momentum=1.0, backend=backend)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=0)
    rtol = 1e-6 if backend == "triton" else 1e-4
    torch.testing.assert_close(var.double(), x.double().var(1), rtol=rtol, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_none(backend, device):
    x, weight, bias = inputs((2, 5, 14, 2, 2), device=device)
    for given in ((x, None, None), (x, weight, None), (x, None, bias)):

        def call(function):
            return lambda *tensors, **options: function(*tensors, training=True, **options)

        check_op(call(member_batch_norm), call(member_batch_norm_reference), given, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_parameters_beside_16_bit_rows(dtype, backend, device):
    """As under autocast: statistics and gradients of parameters stay in float32."""
    x, weight, bias = inputs((3, 50, 4), device=device)
    x = x.to(dtype)
    running = statistics(weight)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = member_batch_norm(*leaves, *running, training=True, backend=backend)
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    assert y.dtype == dtype and [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = [s.double() for s in statistics(weight)]
    want = member_batch_norm_reference(*exact, *truth, training=True)
    true_grads = torch.autograd.grad(want.square().sum(), exact)
    for got, right in zip((*running, *grads[1:]), (*truth, *true_grads[1:]), strict=True):
        bound = 1e-6 if got is running[0] else 2**-8
        assert (got.double() - right).norm() <= bound * right.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_offsets_and_shared_rows(backend, device):
    x, weight, bias = inputs((2, 6, 9, 4, 3), device=device)
    wide = fenced(torch.randn(2, 6, 11, 4, 5, device=device))[:, :, 1:10, :, 1:4]
    for given in (x[:, ::2], x.transpose(3, 4), x[:1].expand(2, -1, -1, -1, -1), wide):
        check_op(op, reference, (given, weight, bias), backend=backend, fence=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_with_strides(backend, device):
    x, weight, bias = inputs((2, 6, 9, 4, 3), device=device)
    turned = [t.T.contiguous().T for t in (weight, bias)]
    assert not turned[0].is_contiguous()
    check_op(op, reference, (x, *turned), backend=backend, fence=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_autograd_hands_over_with_strange_strides(backend, device):
    tensors = [t.requires_grad_() for t in inputs((2, 5, 9, 3, 2), device=device)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    for loss in (
        lambda y: y.sum() + y[:, 1:3].square().sum(),
        lambda y: (y.transpose(2, 4) * torch.arange(9.0, device=device)).sum() + y.pow(3).mean(),
    ):
        got = torch.autograd.grad(loss(op(*tensors, backend=backend)), tensors)
        plain = torch.autograd.grad(loss(reference(*tensors)), tensors)
        truth = torch.autograd.grad(loss(reference(*exact)), exact)
        for three in zip(got, plain, truth, strict=True):
            assert_as_exact("gradient", *three)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend, device):
    for wanted in ((0,), (1,), (2,), (0, 2)):
        tensors = inputs((2, 5, 4, 3, 2), device=device)
        leaves = [tensors[i].requires_grad_() for i in wanted]
        for training in (True, False):
            got = torch.autograd.grad(
                op(*tensors, backend=backend, training=training).sin().sum(), leaves
            )
            want = torch.autograd.grad(reference(*tensors, training=training).sin().sum(), leaves)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend, device):
    tensors = [t.requires_grad_() for t in inputs((1, 260, 3, 2, 2), device=device)]

    def run():
        y = op(*tensors, backend=backend)
        return [y, *torch.autograd.grad(y.sin().sum(), tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_pass_for_all_members_where_there_are_no_pixels(monkeypatch):
    """On CPUs, and in the batch-major layout; images are read where they are, member by member."""
    calls, seen = [], []
    batch_norm, update = F.batch_norm, ways._update
    monkeypatch.setattr(F, "batch_norm", lambda x, *a: calls.append(x) or batch_norm(x, *a))
    monkeypatch.setattr(ways, "_update", lambda x, *a: seen.append(x) or update(x, *a))
    for shape, layout in (((3, 5, 4), "batch_major"), ((3, 5, 4, 2, 2), "batch_major")):
        x, *_ = tensors = inputs(shape, layout)
        op(*tensors, layout=layout)
        (rows,) = calls
        assert rows.shape[:2] == (5, 12) and rows.data_ptr() == x.data_ptr()
        calls.clear()
    op(*inputs((3, 5, 4, 1, 1)))
    assert [list(t.shape) for t in calls] == [[5, 12, 1, 1]] and not seen
    calls.clear()
    x, *_ = tensors = inputs((3, 5, 4, 2, 2), "folded")
    op(*tensors, layout="folded")
    assert len(seen) == 3 and not calls
    assert all(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_channel(backend, device):
    x, weight, bias = inputs((2, 5, 3), device=device)
    x[1, 2, 0] = float("nan")
    y = op(x, weight, bias, backend=backend, activation="relu")
    assert y[1, :, 0].isnan().all() and y.isnan().sum() == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend, device):
    weight = torch.ones(2, 3, device=device, requires_grad=True)
    running = statistics(weight.detach())
    for shape in ((2, 0, 3), (2, 4, 3, 0)):
        x = torch.empty(shape, device=device, requires_grad=True)
        y = member_batch_norm(x, weight, None, *running, training=True, backend=backend)
        assert y.shape == x.shape
        grads = torch.autograd.grad(y.sum(), (x, weight))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    assert torch.equal(running[0], statistics(weight)[0])
