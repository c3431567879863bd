"""batch_ensemble_linear with 16-bit inputs and float32 parameters: the rule of autocast.

Parameters are rounded for the products; their gradients are float32 sums that 16 bits never touch.
"""

import itertools

import pytest
import torch
from ops import problem

from landscape_fast.ops import _batch_ensemble_linear_plan as plan
from landscape_fast.ops import _batch_ensemble_linear_ways as ways
from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)
from landscape_fast.testing import assert_as_exact, check_hessian, check_transforms

HALF, BF16 = torch.float16, torch.bfloat16
WAYS = [  # bfloat16 is not to be trusted when interpreted
    ("torch", HALF),
    ("torch", BF16),
    ("triton", HALF),
    pytest.param("triton", BF16, marks=pytest.mark.gpu),
]
NAMES = ("x", "weight", "r", "s", "bias")
HELD = 1e-6  # promised for gradients held in float32; float32 sums of these lengths make 2e-7


def inputs(M, B, I, O, layout="member_major", device="cpu", dtype=HALF):
    """x in `dtype`; weight, r, s, bias in float32, with values that `dtype` does not have."""
    x, *held = problem.inputs(M, B, I, O, layout, device)
    return [x.to(dtype), *held]


def gradients(function, tensors, dy=None, dtype=None):
    """y and the gradients of all tensors that are not None, computed in `dtype` if given."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves if dtype is None else [None if t is None else t.to(dtype) for t in leaves])
    return y, torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def check(tensors, layout="member_major", **options):
    """Ours against float64 on the rounded inputs; returns the errors of ours and of plain eager."""
    low = tensors[0].dtype
    layout = "member_major" if layout == "shared" else layout

    def ours(*a):
        return batch_ensemble_linear(*a, layout=layout, **options)

    def reference(*a):
        return batch_ensemble_linear_reference(*a, layout=layout)

    dy = torch.randn_like(reference(*tensors))
    y, found = gradients(ours, tensors, dy)
    exact = [None if t is None else t.to(low).double() for t in tensors]
    y_true, truth = gradients(reference, exact, dy)
    y_plain, plain = gradients(reference, tensors, dy, low)
    assert_as_exact("y", y, y_plain, y_true)
    assert_as_exact("dx", found[0], plain[0], truth[0])
    errors = {}
    given = [name for name, t in zip(NAMES, tensors, strict=True) if t is not None]
    for name, a, b, c in zip(given[1:], found[1:], plain[1:], truth[1:], strict=True):
        assert a.dtype == torch.float32
        errors[name] = relative(a, c), relative(b, c)
    return errors


@pytest.mark.parametrize("backend, dtype", WAYS)
@pytest.mark.parametrize("layout", ["member_major", "batch_major", "folded", "shared"])
@pytest.mark.parametrize("sizes", [(3, 20, 40, 24), (2, 65, 33, 70), (5, 1, 7, 3)], ids=str)
def test_gradients_held_in_float32(sizes, layout, backend, dtype, device):
    """Where plain eager loses three digits more: 3e-3 in bfloat16, 4e-4 in float16."""
    errors = check(inputs(*sizes, layout, device, dtype), layout, backend=backend)
    for name, (ours, eager) in errors.items():
        assert ours <= HELD, f"{name}: {ours:.1e}, eager {eager:.1e}"
        if sizes[1] > 1:  # the bias of a single example is exact in any dtype
            assert eager > (1e-3 if dtype == BF16 else 1e-4), f"{name}: eager {eager:.1e}"


@pytest.mark.parametrize("backend, dtype", WAYS)
@pytest.mark.parametrize("index", range(1, 5), ids=NAMES[1:])
def test_every_parameter_is_rounded(index, backend, dtype, device):
    """The same bits as from a parameter that has been rounded before."""
    B = plan.WIDE_EXAMPLES  # with fewer, dx is not rounded on the way either
    tensors = [t.to(dtype) for t in inputs(2, B, 24, 20, device=device, dtype=dtype)]
    held = inputs(2, B, 24, 20, device=device, dtype=dtype)[index]
    some = [*tensors[:index], held, *tensors[index + 1 :]]
    every = [*tensors[:index], held.to(dtype), *tensors[index + 1 :]]
    dy = torch.randn(2, B, 20, device=device, dtype=dtype)
    y, (dx, *_) = gradients(lambda *a: batch_ensemble_linear(*a, backend=backend), some, dy)
    z, (dz, *_) = gradients(lambda *a: batch_ensemble_linear(*a, backend=backend), every, dy)
    assert torch.equal(y, z) and torch.equal(dx, dz)


@pytest.mark.parametrize("backend, dtype", WAYS)
@pytest.mark.parametrize("shared", [False, True])
def test_every_factor_may_be_missing(shared, backend, dtype, device):
    tensors = inputs(3, 6, 5, 4, "shared" if shared else "member_major", device, dtype)
    x, weight, r, s, bias = tensors
    for factors in itertools.product((r, None), (s, None), (bias, bias[0], None)):
        if shared and not any(t is not None and t.ndim == 2 for t in factors):
            continue  # nothing says how many members there are
        errors = check([x, weight, *factors], backend=backend)
        assert all(ours <= HELD for ours, _ in errors.values()), errors


@pytest.mark.parametrize("backend, dtype", WAYS)
def test_each_parameter_may_be_held_in_either_dtype(backend, dtype, device):
    tensors = inputs(3, 6, 5, 4, device=device, dtype=dtype)
    dy = torch.randn(3, 6, 4, device=device, dtype=dtype)
    exact = [t.to(dtype).double() for t in tensors]
    _, truth = gradients(batch_ensemble_linear_reference, exact, dy)
    _, plain = gradients(batch_ensemble_linear_reference, tensors, dy, dtype)
    for held in itertools.product((False, True), repeat=4):
        mixed = [t if keep else t.to(dtype) for t, keep in zip(tensors, (True, *held), strict=True)]
        _, found = gradients(lambda *a: batch_ensemble_linear(*a, backend=backend), mixed, dy)
        for name, t, a, b, c in zip(NAMES, mixed, found, plain, truth, strict=True):
            assert a.dtype == t.dtype
            if t.dtype == dtype:
                assert_as_exact(f"gradient of {name}", a, b.to(dtype), c)
            else:
                assert relative(a, c) <= HELD, name


@pytest.mark.parametrize("backend, dtype", WAYS)
def test_only_wanted_gradients(backend, dtype, device):
    tensors = inputs(2, 5, 4, 3, device=device, dtype=dtype)
    dy = torch.randn(2, 5, 3, device=device, dtype=dtype)
    exact = [t.to(dtype).double() for t in tensors]
    _, truth = gradients(batch_ensemble_linear_reference, exact, dy)
    for wanted in itertools.product((False, True), repeat=4):
        leaves = [t.clone() for t in tensors]
        for t, want in zip(leaves, (True, *wanted), strict=True):
            t.requires_grad_(want)
        batch_ensemble_linear(*leaves, backend=backend).backward(dy)
        for name, t, want, c in zip(NAMES[1:], leaves[1:], wanted, truth[1:], strict=True):
            assert (t.grad is not None) == want
            assert not want or relative(t.grad, c) <= HELD, name


@pytest.mark.parametrize("backend, dtype", WAYS)
def test_autocast_casts_the_input_alone(backend, dtype, device):
    """Under autocast: the same bits as for an input that came in that dtype."""
    _, *parameters = inputs(2, 6, 4, 3, device=device)
    x = torch.randn(2, 6, 4, device=device)
    dy = torch.randn(2, 6, 3, device=device)
    expected = gradients(
        lambda *a: batch_ensemble_linear(*a, backend=backend), [x.to(dtype), *parameters], dy
    )
    with torch.autocast(device, dtype=dtype):
        found = gradients(
            lambda *a: batch_ensemble_linear(*a, backend=backend), [x, *parameters], dy
        )
        other = [p.to(HALF if dtype == BF16 else BF16) for p in parameters]
        assert batch_ensemble_linear(x, *other, backend=backend).dtype == dtype
        double = [t.double() for t in (x, *parameters)]
        assert batch_ensemble_linear(*double).dtype == torch.float64
    assert found[0].dtype == dtype and torch.equal(found[0], expected[0])
    assert all(g.dtype == torch.float32 for g in found[1])
    for a, b in zip(found[1], expected[1], strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("backend, dtype", WAYS)
def test_keeps_x_alone(backend, dtype, device):
    """Neither products nor the rounded parameters."""
    tensors = [t.requires_grad_() for t in inputs(2, 5, 4, 3, device=device, dtype=dtype)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch_ensemble_linear(*tensors, backend=backend)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("B", [plan.WIDE_EXAMPLES - 1, plan.WIDE_EXAMPLES])
@pytest.mark.parametrize("layout", ["member_major", "batch_major", "shared"])
def test_few_examples_and_many(layout, B):
    """By float32 products, and by the outer products of each member."""
    for dtype in (HALF, BF16):
        tensors = inputs(3, B, 9, 7, layout, dtype=dtype)
        for absent in ((), (2,), (3,)):
            some = [None if i in absent else t for i, t in enumerate(tensors)]
            assert all(ours <= HELD for ours, _ in check(some, layout).values())


def test_members_are_taken_a_few_at_a_time(monkeypatch):
    """However many fit into memory at once, the gradients are the same."""
    tensors = inputs(5, plan.WIDE_EXAMPLES, 4, 3, dtype=BF16)
    for elements in (1, 2 * 12, 5 * 12):
        monkeypatch.setattr(ways, "OUTER_ELEMENTS", {"cpu": elements})
        assert all(ours <= HELD for ours, _ in check(tensors).values())


def whole(*shape, dtype=torch.float32):
    """Small whole numbers, whose products are exact in float16: where roundings would differ."""
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_transforms_and_compile(backend, autocast, device):
    x = whole(2, 3, 4, dtype=torch.float32 if autocast else HALF)
    tensors = [x, whole(3, 4), whole(2, 4), whole(2, 3), whole(2, 3)]
    tensors = [t.to(device) for t in tensors]

    def ours(*a):
        with torch.autocast(device, dtype=HALF, enabled=autocast):
            return batch_ensemble_linear(*a, backend=backend)

    def reference(*a):
        return batch_ensemble_linear_reference(a[0].half(), *a[1:])

    check_transforms(ours, reference, tensors)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hessians(backend, device):
    def mixed(function):
        return lambda x, *rest, **options: function(x.half(), *rest, **options).to(x.dtype)

    tensors = [0.25 * whole(*t.shape).to(device) for t in inputs(2, 3, 4, 3)]
    check_hessian(
        mixed(batch_ensemble_linear),
        mixed(batch_ensemble_linear_reference),
        tensors,
        backend=backend,
    )


def test_the_reference_rounds_values_and_not_gradients():
    tensors = inputs(2, 6, 5, 4, dtype=BF16)
    dy = torch.randn(2, 6, 4)
    _, found = gradients(batch_ensemble_linear_reference, tensors, dy.bfloat16())
    exact = [t.bfloat16().double() for t in tensors]
    _, truth = gradients(batch_ensemble_linear_reference, exact, dy.bfloat16())
    for name, a, b in zip(NAMES[1:], found[1:], truth[1:], strict=True):
        assert a.dtype == torch.float32 and relative(a, b) <= HELD, name


def test_meta_device():
    tensors = [t.to("meta") for t in inputs(2, 3, 4, 5, dtype=BF16)]
    y, found = gradients(batch_ensemble_linear, tensors, torch.empty(2, 3, 5, device="meta"))
    assert y.dtype == BF16
    assert [(g.shape, g.dtype) for g in found] == [(t.shape, t.dtype) for t in tensors]


@pytest.mark.parametrize(
    "dtypes, message",
    [
        ((HALF, BF16), "weight must be of the dtype of x, float16, or float32; got bfloat16"),
        ((BF16, torch.float64), "weight must be of the dtype of x, bfloat16, or float32; got f"),
        ((torch.float32, HALF), "weight must be of the dtype of x, float32; got float16"),
        ((torch.float64, torch.float32), "weight must be of the dtype of x, float64; got float32"),
    ],
    ids=str,
)
def test_refuses_other_mixtures(dtypes, message):
    x, weight = torch.zeros(2, 3, 4, dtype=dtypes[0]), torch.zeros(5, 4, dtype=dtypes[1])
    with pytest.raises(ValueError, match=f"^batch_ensemble_linear: {message}"):
        batch_ensemble_linear(x, weight)
