"""subspace_linear: every layout, way and dtype against the definition; facts of subspaces."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from ops.problem import assert_held, gradients, keyword

from landscape_fast.ops import _subspace_linear_plan as plans
from landscape_fast.ops import _subspace_linear_ways as ways
from landscape_fast.ops.combine import combine
from landscape_fast.ops.subspace_linear import subspace_linear, subspace_linear_reference
from landscape_fast.testing import assert_as_exact, check_hessian, check_op, check_transforms

PAGE = sys.modules[subspace_linear.__module__]
LAYOUTS = ["member_major", "batch_major", "folded", "shared", "shared batch_major"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def inputs(M, K, B, I, O, layout, device, *, own=False):
    """x, anchors, coeffs (None if the members have their own), bias."""
    shape = {"batch_major": (B, M, I), "folded": (M * B, I), "member_major": (M, B, I)}
    x = torch.randn(shape.get(layout, (B, I)), device=device)
    K = M if own else K
    anchors, bias = torch.randn(K, O, I, device=device) / I**0.5, torch.randn(K, O, device=device)
    return [x, anchors, None if own else torch.randn(M, K, device=device), bias]


def check(arguments, layout, **options):
    op, reference = subspace_linear, subspace_linear_reference
    check_op(op, reference, arguments, layout=keyword(layout), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own", [True, False])
def test_agrees_with_the_definition(own, layout, dtype, device):
    for sizes in ((3, 2, 5, 7, 4), (2, 5, 1, 16, 33), (1, 3, 4, 1, 1)):
        check(inputs(*sizes, layout, device, own=own), layout, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_bias(layout, device):
    for own, O in itertools.product((True, False), (3, 40)):
        check([*inputs(3, 2, 5, 7, O, layout, device, own=own)[:3], None], layout)


@pytest.mark.parametrize("way", ["bmm", "few", "outer"])
def test_every_way_of_the_library(way, monkeypatch, device):
    """Also those that the table would not take for these sizes."""
    plan = plans.Plan("few" if way == "outer" else way, "bmm", "bmm" if way == "few" else way)
    monkeypatch.setattr(PAGE, "composed_plan", lambda *sizes: plan)
    B = 1 if way == "outer" else 6
    for layout in LAYOUTS[:3]:
        check(inputs(3, 2, B, 7, 20, layout, device), layout, backend="torch")
        check([*inputs(3, 2, B, 7, 20, layout, device)[:3], None], layout, backend="torch")


@pytest.mark.parametrize("layout", ["member_major", "batch_major", "shared"])
def test_any_strides(layout, device):
    x, _, coeffs, bias = inputs(3, 2, 5, 8, 4, layout, device)
    apart = torch.randn(*x.shape[:-1], 2 * x.shape[-1], device=device)[..., ::2]
    turned = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    rows = torch.randn(2, 6, 8, device=device)[:, 1:5]  # anchors with a gap between them
    own = torch.randn(3, 8, 4, device=device).transpose(1, 2), torch.randn(3, 4, device=device)
    for given in (apart, turned, x[:1].expand_as(x)):
        check([given, rows, coeffs.T.contiguous().T, bias], layout)
        check([given, own[0], None, own[1]], layout)


# -- what the mathematics promises -----------------------------------------------------------------


def test_members_are_plain_layers_at_points_of_the_subspace(device):
    x, anchors, coeffs, bias = inputs(4, 3, 6, 8, 5, "member_major", device)
    y = subspace_linear(x, anchors, coeffs, bias)
    weights, shifts = combine(coeffs, [anchors, bias])
    for m in range(4):
        torch.testing.assert_close(y[m], F.linear(x[m], weights[m], shifts[m]))
    corners = subspace_linear(x[:3], anchors, torch.eye(3, device=device), bias)
    torch.testing.assert_close(corners, subspace_linear(x[:3], anchors, None, bias))
    middle = subspace_linear(x[0], anchors[:2], torch.full((1, 2), 0.5, device=device), bias[:2])
    ends = subspace_linear(x[0], anchors[:2], None, bias[:2])
    torch.testing.assert_close(middle[0], ends.mean(0))  # a linear layer is linear in its weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_member_costs_a_plain_layer(layout, monkeypatch, device):
    """One call of the library, whose graph is its own."""
    calls = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(a) or plain(*a))
    arguments = [
        t if t is None else t.requires_grad_()
        for t in inputs(1, 1, 5, 7, 4, layout, device, own=True)
    ]
    y = subspace_linear(*arguments, layout=keyword(layout))
    assert len(calls) == 1 and "MemberLinear" not in str(y.grad_fn)
    x, anchors, _, bias = arguments
    expected = plain(x.reshape(5, 7), anchors[0], bias[0])
    assert torch.equal(y.reshape(5, 4), expected)


def test_a_shared_batch_is_not_copied_for_each_member(device):
    x, anchors, _, bias = inputs(4, 4, 6, 8, 5, "shared", device, own=True)
    leaves = [t.requires_grad_() for t in (x, anchors, bias)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        subspace_linear(leaves[0], leaves[1], None, leaves[2])
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves}


def test_gradients_only_where_they_are_wanted(device):
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        arguments = inputs(3, 2, 4, 7, 5, "member_major", device)
        every = [t.clone().requires_grad_() for t in arguments]
        some = [t.clone().requires_grad_(w) for t, w in zip(arguments, wanted, strict=True)]
        y, z = subspace_linear(*every), subspace_linear(*some)
        dy = torch.randn_like(y)
        expected = [g for g, w in zip(gradients(y, every, dy), wanted, strict=True) if w]
        found = gradients(z, [t for t in some if t.requires_grad], dy)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("layout", ["member_major", "batch_major", "shared"])
def test_parameters_held_in_float32(own, layout, device):
    """Beside a 16-bit x: rounded for the products, with gradients that are not."""
    x, *held = inputs(3, 2, 17, 24, 9, layout, device, own=own)
    leaves = [None if t is None else t.requires_grad_() for t in (x.half(), *held)]
    options = {"layout": keyword(layout)}
    y = subspace_linear(*leaves, **options)
    dy = torch.randn_like(y)
    assert y.dtype == torch.float16
    there = [t for t in leaves if t is not None]
    found = gradients(y, there, dy)
    # the weights that are multiplied, exactly: mixed in float32, then rounded
    weight, bias = combine(leaves[2], [held[0], held[2]]) if not own else (held[0], held[2])
    weight, bias = (t.detach().half().double().requires_grad_() for t in (weight, bias))
    exact = x.half().double().requires_grad_()
    y_true = subspace_linear_reference(exact, weight, None, bias, **options)
    low = [t.detach().half().requires_grad_() for t in (x, weight, bias)]
    y_plain = subspace_linear_reference(low[0], low[1], None, low[2], **options)
    assert_as_exact("y", y, y_plain, y_true)
    dx, dweight, dbias = torch.autograd.grad(y_true, (exact, weight, bias), dy.double())
    assert_as_exact("dx", found[0], torch.autograd.grad(y_plain, low, dy)[0], dx)
    truth = [dweight, dbias]
    if not own:
        c, anchors, shifts = (t.detach().double() for t in (leaves[2], held[0], held[2]))
        danchors = torch.tensordot(c.T, dweight, 1), torch.tensordot(c.T, dbias, 1)
        dcoeffs = torch.einsum("moi,koi->mk", dweight, anchors)
        truth = [danchors[0], dcoeffs + torch.einsum("mo,ko->mk", dbias, shifts), danchors[1]]
    for a, b in zip(found[1:], truth, strict=True):
        assert a.dtype == torch.float32
        assert_held(a, b)


def test_autocast_casts_the_input_alone(device):
    x, anchors, coeffs, bias = inputs(3, 2, 5, 7, 4, "member_major", device)
    for own in (True, False):
        given = [x, anchors, coeffs, bias] if not own else [x[:2], anchors, None, bias]
        leaves = [t if t is None else t.clone().requires_grad_() for t in given]
        with torch.autocast(device, dtype=torch.bfloat16):
            y = subspace_linear(*leaves)
        assert y.dtype == torch.bfloat16
        low = subspace_linear(given[0].bfloat16(), *given[1:])
        assert torch.equal(y, low)
        y.sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in leaves if t is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hessians(layout, device):
    options = {"layout": keyword(layout)}
    for own in (True, False):
        arguments = inputs(2, 3, 4, 3, 2, layout, device, own=own)
        check_hessian(
            lambda *a: subspace_linear(*a, **options),
            lambda *a: subspace_linear_reference(*a, **options),
            arguments,
        )


def test_gradgradcheck():
    arguments = [t.double().requires_grad_() for t in inputs(2, 3, 3, 2, 4, "member_major", "cpu")]
    assert torch.autograd.gradcheck(subspace_linear, arguments)
    assert torch.autograd.gradgradcheck(subspace_linear, arguments)


@pytest.mark.parametrize("own", [True, False])
def test_transforms(own, device):
    x, anchors, coeffs, bias = inputs(3, 2, 4, 5, 6, "member_major", device, own=own)
    if own:
        check_transforms(
            lambda x, a, b: subspace_linear(x, a, None, b),
            lambda x, a, b: subspace_linear_reference(x, a, None, b),
            [x, anchors, bias],
        )
    else:
        check_transforms(subspace_linear, subspace_linear_reference, [x, anchors, coeffs, bias])


def test_empty_batches_and_features(device):
    for sizes in ((3, 2, 0, 4, 5), (3, 2, 4, 0, 5), (3, 2, 4, 5, 0)):
        arguments = inputs(*sizes, "member_major", device)
        y = subspace_linear(*[t.requires_grad_() for t in arguments])
        assert y.shape == (3, sizes[2], sizes[4])
        assert y.grad_fn is not None
    empty = torch.zeros(0, 7, device=device)
    assert subspace_linear(empty, torch.zeros(2, 3, 7, device=device), layout="folded").shape == (
        0,
        3,
    )


# -- which way it goes -----------------------------------------------------------------------------


def test_the_table_of_a_cpu():
    B, few = 8, plans.FEW_OUTPUTS
    assert plans.composed_plan("cpu", False, B, few - 1) == plans.FEW
    assert plans.composed_plan("cpu", False, B, few) == plans.BMM
    assert plans.composed_plan("cpu", False, 1, few) == plans.ONE
    assert plans.composed_plan("cpu", True, B, few) == plans.WIDE
    assert plans.composed_plan("cuda", False, B, 1) == plans.BMM


def test_the_table_is_kept(monkeypatch, device):
    if device == "cuda":
        pytest.skip("the table of a CPU")
    seen = []
    forward = ways.forward
    monkeypatch.setattr(ways, "forward", lambda *a: seen.append(a[-1]) or forward(*a))
    for sizes, layout, way in (
        ((3, 2, 5, 7, 4), "member_major", "few"),
        ((3, 2, 5, 7, 40), "folded", "bmm"),
        ((3, 2, 5, 7, 40), "shared", "wide"),
        ((3, 2, 1, 7, 40), "batch_major", "few"),
    ):
        subspace_linear(*inputs(*sizes, layout, device), layout=keyword(layout))
        assert seen.pop() == way


@pytest.mark.parametrize(
    "sizes, inference, training",
    [  # M, B, I, O, K on an H200 in bfloat16; estimates
        ((8, 128, 1024, 1024, 0), plans.BMM, plans.FUSED),  # the bias comes with its weight
        ((32, 16, 1024, 1024, 2), plans.MIXED, plans.MIXED),  # the weights are most of the bytes
        ((32, 16, 1024, 1024, 8), plans.BMM, plans.FUSED),  # more than a kernel mixes
        ((8, 4096, 1024, 1024, 2), plans.BMM, plans.BMM),  # arithmetic decides
    ],
    ids=str,
)
def test_the_table_of_a_gpu(sizes, inference, training):
    problem = plans.Problem(*sizes)
    assert plans.choose(problem) == inference
    assert plans.choose(problem._replace(need_x=True, need_weight=True)) == training


def test_a_bias_that_is_not_there_decides_nothing():
    """Its sum is what the kernels save here; without it there is a tie."""
    problem = plans.Problem(8, 128, 1024, 1024, need_x=True, need_weight=True)
    assert plans.choose(problem) == plans.FUSED
    assert plans.choose(problem._replace(bias=False)) == plans.BMM


@pytest.mark.parametrize("arch, unit", [(80, 16), (90, 8)])
def test_what_the_table_of_a_gpu_is_asked(arch, unit, monkeypatch):
    """Sizes, wishes, and whether rows allow wide loads: on sm_80 from multiples of 16 elements."""
    asked = []
    monkeypatch.setattr(plans, "architecture", lambda index: arch)
    monkeypatch.setattr(plans, "chosen", lambda problem: asked.append(problem) or plans.BMM)
    for I, O in ((32, 48), (32, 40), (24, 48), (32, 44)):
        x, anchors, coeffs, bias = (t.half() for t in inputs(3, 2, 5, I, O, "member_major", "cpu"))
        plans.plan_for(x, anchors, coeffs, bias, False, True)
        aligned = I % unit == 0 and O % unit == 0
        common = plans.Problem(3, 5, I, O, 2, arch, "half", aligned, False, True, True)
        assert asked.pop() == common
        plans.plan_for(x[:2], anchors, None, None, True, False)
        own = common._replace(M=2, K=0, need_x=True, need_weight=False, bias=False)
        assert asked.pop() == own


def test_what_is_chosen_has_the_smallest_estimate():
    for M, B, n, K, arch, kind in itertools.product(
        (1, 4, 32), (1, 64, 1000), (32, 2048), (0, 1, 4, 5), (80, 90, 100), ("half", "tf32", "ieee")
    ):
        for needs in ((False, False), (True, True)):
            problem = plans.Problem(M, B, n, n, K, arch, kind, True, *needs)
            chosen, mixes = plans.choose(problem), 0 < K <= plans.MOST_ANCHORS
            assert chosen != plans.MIXED or mixes
            for other in (plans.BMM, plans.FUSED, *[plans.MIXED] * mixes):
                assert plans.estimate(problem, chosen) <= plans.estimate(problem, other)


X, A = torch.zeros(3, 4, 5), torch.zeros(2, 6, 5)
C, BIAS = torch.zeros(3, 2), torch.zeros(2, 6)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: subspace_linear(X, "A"), TypeError, "subspace_linear: anchors must be a Tensor"),
        (lambda: subspace_linear(X, A, [1.0]), TypeError, "coeffs must be a Tensor; got list"),
        (lambda: subspace_linear(X, A, C, layout="rows"), ValueError,
         r"layout must be one of \('member_major', 'batch_major', 'folded'\); got 'rows'"),
        (lambda: subspace_linear(X, A[0]), ValueError, r"anchors must be \[K, O, I\]; got \[6, 5"),
        (lambda: subspace_linear(X, A), ValueError, r"x must be \[M, B, I\] with M = 2, I = 5;"),
        (lambda: subspace_linear(X, A, C[:, :1]), ValueError, r"coeffs must be \[M, K\] with K"),
        (lambda: subspace_linear(X, A, C.double()), ValueError,
         "coeffs must be one of float32; got torch.float64"),
        (lambda: subspace_linear(X, A, C, BIAS[0]), ValueError, r"bias must be \[K, O\] with K ="),
        (lambda: subspace_linear(X, A, C, BIAS.double()), ValueError,
         "bias must be of the dtype of anchors, float32; got float64"),
        (lambda: subspace_linear(X[..., :4], A, C), ValueError, r"x must be \[M, B, I\] with M = "),
        (lambda: subspace_linear(X.double(), A, C), ValueError,
         "x must be of the dtype of anchors, float32; got float64"),
        (lambda: subspace_linear(X, A.half(), C), ValueError,
         "x must be of the dtype of anchors, float16; got float32"),
        (lambda: subspace_linear(X, A, C, layout="batch_major"), ValueError,
         r"x must be \[B, M, I\] with M = 3, I = 5; got \[3, 4, 5\]"),
        (lambda: subspace_linear(X, A, C, layout="folded"), ValueError,
         r"x must be \[M\*B, I\]; got \[3, 4, 5\]"),
        (lambda: subspace_linear(X[0], A, C, layout="folded"), ValueError,
         r"x must be \[M\*B, I\] with rows divisible by M = 3; got \[4, 5\]"),
        (lambda: subspace_linear(X, A.transpose(1, 2).contiguous().transpose(1, 2), C), ValueError,
         r"anchors must be contiguous within each anchor, to be mixed; got strides .*; call .cont"),
        (lambda: subspace_linear(X.to("meta"), A, C), ValueError,
         "x must be on the device of anchors, cpu; got meta"),
        (lambda: subspace_linear(X, A, C.to("meta")), ValueError,
         "coeffs must be on the device of anchors, cpu; got meta"),
        (lambda: subspace_linear(X, A, C, backend="cuda"), ValueError,
         r"backend must be one of \('auto', 'torch', 'triton'\); got 'cuda'"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
