"""combine: every form on every backend against the definition; what the mathematics promises."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landscape_fast.ops.combine import combine, combine_reference
from landscape_fast.testing import (
    assert_as_exact,
    check_hessian,
    check_op,
    check_transforms,
    fenced,
)

PAGE = sys.modules[combine.__module__]  # `landscape_fast.ops.combine` is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # not to be trusted when interpreted
]
# (M, K, P): ones, primes, a block and a bit, more than one tile, each way to hold the anchors
SHAPES = [(1, 1, 1), (3, 2, 7), (4, 3, 2064), (2, 5, 1027), (3, 17, 530), (9, 33, 40)]
LIST = [(0, 2), (3, 5), (), (64, 32), (1031,), (16,)]  # shapes of a small network's parameters


def listed(coeffs, *anchors, backend="auto"):
    return combine(coeffs, list(anchors), backend=backend)


def listed_reference(coeffs, *anchors):
    return combine_reference(coeffs, list(anchors))


def network(K, device, **options):
    return [torch.randn(K, *shape, device=device, **options) for shape in LIST]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K, P", SHAPES)
def test_flat_agrees_with_the_definition(M, K, P, dtype, backend, device):
    inputs = torch.randn(M, K, device=device), torch.randn(K, P, device=device)
    check_op(combine, combine_reference, inputs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1030,), (7, 0, 1023), (16, 1000, 14), (512, 512, 3, 3)])
def test_parts_of_a_flat_vector_agree_with_the_definition(sizes, dtype, backend, device):
    M, K, L = 3, 3, len(sizes)
    inputs = torch.randn(M, L, K, device=device), torch.randn(K, sum(sizes), device=device)
    check_op(combine, combine_reference, inputs, dtype=dtype, backend=backend, sizes=sizes)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [None, (7, 0, 1023)])
def test_a_given_output_is_filled(sizes, dtype, backend, device):
    """All of it, and nothing beside it; the coefficients may be of another dtype."""
    coeffs = torch.randn((3, 3, 2) if sizes else (3, 2), device=device)
    anchors = torch.randn(2, 1030, device=device).to(dtype)
    for c in (coeffs, coeffs.to(dtype)):
        out = fenced(torch.full((3, 1030), float("nan"), device=device, dtype=dtype))
        before = out._version
        assert combine(c, anchors, sizes=sizes, out=out, backend=backend) is out
        plain = combine_reference(c, anchors, sizes=sizes)
        truth = combine_reference(c.double(), anchors.double(), sizes=sizes)
        assert_as_exact("out", out, plain, truth)
        assert out._version > before  # autograd sees that it changed
        buffer = out.new_empty(0).set_(out.untyped_storage())
        assert buffer.isfinite().sum() == out.numel()  # the rest is the fence
        assert combine(c, anchors, sizes=sizes, out=out, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
def test_lists_agree_with_the_definition(layerwise, dtype, backend, device):
    coeffs = torch.randn((4, len(LIST), 3) if layerwise else (4, 3), device=device)
    inputs = coeffs, *network(3, device)
    check_op(listed, listed_reference, inputs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_anchors_than_registers_and_more_members_than_a_block(backend, device):
    inputs = [torch.randn(*s, device=device) for s in ((9, 2, 33), (33, 5), (33, 16))]
    check_op(listed, listed_reference, inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_coefficients_of_low_precision_anchors_are_not_rounded(backend, device):
    third = torch.full((1, 1), 1 / 3, device=device, requires_grad=True)
    ones = torch.full((1, 40), 3.0, device=device, dtype=torch.float16)
    weights = combine(third, ones, backend=backend)
    assert weights.dtype == torch.float16
    assert torch.equal(weights, torch.ones_like(weights))  # 1/3 in float16 would give 0.99951
    (grad,) = torch.autograd.grad(weights.sum(), third)
    assert grad.dtype == torch.float32 and grad.item() == 120.0


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    M=st.integers(0, 5),
    K=st.integers(0, 9),
    sizes=st.lists(st.sampled_from([0, 1, 5, 16, 48, 130, 513, 1024]), min_size=1, max_size=4),
    layerwise=st.booleans(),
    coeffs_dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_sizes(M, K, sizes, layerwise, coeffs_dtype):
    coeffs = torch.randn((M, len(sizes), K) if layerwise else (M, K)).to(DEVICE, coeffs_dtype)
    anchors = torch.randn(K, sum(sizes)).to(DEVICE, torch.float16)
    check_op(
        lambda a, **o: combine(coeffs, a, **o),
        lambda a, **o: combine_reference(coeffs, a, **o),
        (anchors,),
        dtype=torch.float16,
        backend="triton",
        sizes=sizes,
    )


# -- what the mathematics promises -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_facts_of_lines_simplexes_and_curves(backend, device):
    line = torch.randn(2, 1000, device=device)
    t = torch.linspace(0, 1, 5, device=device)
    points = combine(torch.stack([1 - t, t], 1), line, backend=backend)
    lerp = torch.lerp(line[:1].double(), line[1:].double(), t.double()[:, None])
    torch.testing.assert_close(points, lerp.float())
    assert torch.equal(points[0], line[0]) and torch.equal(points[-1], line[1])

    vertices = torch.randn(3, 1000, device=device)
    rows = torch.rand(8, 3, device=device)
    inside = combine(rows / rows.sum(1, keepdim=True), vertices, backend=backend)
    slack = 4 * torch.finfo(torch.float32).eps * vertices.abs().max()  # weights sum to 1 +- eps
    assert (inside <= vertices.amax(0) + slack).all() and (inside >= vertices.amin(0) - slack).all()

    bezier = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], 1)
    curve = combine(bezier, vertices, backend=backend)
    assert torch.equal(curve[0], vertices[0]) and torch.equal(curve[-1], vertices[2])

    one = combine(torch.ones(1, 1, device=device), line[:1], backend=backend)
    assert torch.equal(one, line[:1])


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_list_equals_flat_equals_einsum(backend, device):
    K, dtype = 3, torch.float64 if backend == "torch" else torch.float32
    anchors = network(K, device, dtype=dtype)
    flat = torch.cat([a.reshape(K, -1) for a in anchors], 1)
    sizes = [math.prod(shape) for shape in LIST]
    coeffs = torch.randn(4, len(LIST), K, device=device, dtype=dtype)
    parts = combine(coeffs, anchors, backend=backend)
    whole = combine(coeffs, flat, sizes=sizes, backend=backend)
    assert [p.shape for p in parts] == [(4, *shape) for shape in LIST]
    assert all(p.is_contiguous() for p in parts)
    assert all(p.data_ptr() % 64 == 0 for p in parts if p.numel())  # whole sectors for wide stores
    assert torch.equal(torch.cat([p.reshape(4, -1) for p in parts], 1), whole)
    layer = torch.repeat_interleave(torch.arange(len(LIST)), torch.tensor(sizes))
    truth = torch.einsum("mpk,kp->mp", coeffs[:, layer].double(), flat.double())
    if dtype == torch.float64:
        torch.testing.assert_close(whole, truth, rtol=1e-14, atol=1e-14)
    assert_as_exact("flat", whole, combine_reference(coeffs, flat, sizes=sizes), truth)
    for i, part in enumerate(parts):  # layer by layer, the same numbers
        alone = combine(coeffs[:, i].contiguous(), anchors[i].reshape(K, -1), backend=backend)
        assert torch.equal(part.reshape(4, -1), alone)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_nan_and_infinity_go_where_a_matmul_takes_them(backend, device):
    anchors = torch.randn(2, 40, device=device)
    anchors[0, 3], anchors[1, 7] = float("nan"), float("inf")
    coeffs = torch.tensor([[0.0, 1.0], [1.0, float("nan")], [2.0, -1.0]], device=device)
    found = combine(coeffs, anchors, backend=backend)
    truth = combine_reference(coeffs.double(), anchors.double())
    torch.testing.assert_close(found, truth.float(), equal_nan=True)


# -- what the kernels are given --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_offsets(backend, device):
    base = torch.randn(3, device=device)
    expanded = base.expand(4, 3)
    transposed = torch.randn(3, 4, device=device).t()
    anchors = fenced(torch.randn(3, 2, 300, device=device))[:, 1, 3:260]  # strided in K, odd offset
    for coeffs in (expanded, transposed, torch.randn(8, 3, device=device)[::2]):
        check_op(combine, combine_reference, (coeffs, anchors), backend=backend, fence=False)
    repeated = fenced(torch.randn(1, 257, device=device)).expand(3, 257)
    check_op(combine, combine_reference, (transposed, repeated), backend=backend, fence=False)
    layers = torch.randn(4, 1, 3, device=device).expand(4, 2, 3)  # one coefficient for all layers
    options = {"backend": backend, "sizes": (100, 157), "fence": False}
    check_op(combine, combine_reference, (layers, anchors), **options)
    tensors = [torch.randn(5, 3, 4, device=device)[::2], torch.randn(3, 9, device=device)[:, 2:]]
    check_op(listed, listed_reference, (transposed, *tensors), backend=backend, fence=False)
    behind_nothing = transposed, torch.randn(3, 0, device=device), torch.randn(3, 40, device=device)
    check_op(listed, listed_reference, behind_nothing, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_autograd_hands_over_with_strange_strides(backend, device):
    coeffs = torch.randn(4, 3, device=device, requires_grad=True)
    anchors = torch.randn(3, 6, 50, device=device, requires_grad=True)

    def losses(w):
        yield w.sum()  # an expanded gradient
        yield (w.transpose(1, 2) * ramp).sum()  # a transposed one
        yield (w[1:3] * 2).sum() + w[0].square().sum()

    ramp = torch.arange(50.0, device=device)[None, :, None].expand(4, 50, 6)
    ours = losses(combine(coeffs, [anchors], backend=backend)[0])
    plain = losses(combine_reference(coeffs, [anchors])[0])
    exact = losses(combine_reference(coeffs.double(), [anchors.double()])[0])
    for three in zip(ours, plain, exact, strict=True):
        grads = [torch.autograd.grad(y, (coeffs, anchors), retain_graph=True) for y in three]
        for name, *each in zip(("dcoeffs", "danchors"), *grads, strict=True):
            assert_as_exact(name, each[0], each[1], each[2].double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M, K, P", [(0, 2, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_do(M, K, P, backend, device):
    coeffs = torch.randn(M, K, device=device, requires_grad=True)
    anchors = torch.randn(K, P, device=device, requires_grad=True)
    for forms in ((anchors,), ([anchors, anchors[:, :0]],)):
        weights = combine(coeffs, *forms, backend=backend)
        weights = weights[0] if isinstance(weights, list) else weights
        assert torch.equal(weights, torch.zeros(M, P, device=device))
        grads = torch.autograd.grad(weights.sum(), (coeffs, anchors))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    assert combine(coeffs, [], backend=backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_is_computed(backend, device, monkeypatch):
    written = []
    op = PAGE.combine_backward_op

    def spy(coeffs, anchors, dweights, sizes, parts, need_coeffs, need_anchors, name):
        written.append((need_coeffs, dict(zip(parts, need_anchors, strict=True))))
        return op(coeffs, anchors, dweights, sizes, parts, need_coeffs, need_anchors, name)

    monkeypatch.setattr(PAGE, "combine_backward_op", spy)
    coeffs = torch.randn(2, 4, 3, device=device)
    anchors = [torch.randn(3, n, device=device) for n in (5, 70, 16, 1030)]
    whole = [coeffs, *anchors]
    for wanted in itertools.product((False, True), repeat=len(whole)):
        if not any(wanted):
            continue
        used = (1, 3)  # the loss sees two of the four tensors
        results = []
        for function in (lambda c, *a: combine(c, a, backend=backend), listed_reference):
            inputs = [t.detach().requires_grad_(w) for t, w in zip(whole, wanted, strict=True)]
            weights = function(*inputs)
            loss = sum((weights[i] * (i + 1)).sin().sum() for i in used)
            if loss.requires_grad:
                loss.backward()
            results.append([t.grad for t in inputs])
        for got, plain in zip(*results, strict=True):
            if plain is None:
                assert got is None or not got.any()
            else:
                torch.testing.assert_close(got, plain)
        asked = {i: wanted[1 + i] for i in used if wanted[0] or wanted[1 + i]}
        assert written == ([(wanted[0], asked)] if asked else [])
        written.clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend, device):
    coeffs = torch.randn(5, len(LIST), 3, device=device, requires_grad=True)
    anchors = [a.requires_grad_() for a in network(3, device)]

    def run():
        weights = combine(coeffs, anchors, backend=backend)
        grads = torch.autograd.grad(sum(w.sin().sum() for w in weights), [coeffs, *anchors])
        return [*weights, *grads]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# -- autograd, transforms, compilation -------------------------------------------------------------


def test_float64_gradients(device):
    def doubles(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)

    assert torch.autograd.gradcheck(combine, (doubles(3, 2), doubles(2, 5)))
    assert torch.autograd.gradgradcheck(combine, (doubles(3, 2), doubles(2, 5)))
    layers = (doubles(2, 2, 3), doubles(3, 2, 2), doubles(3))
    assert torch.autograd.gradcheck(lambda c, *a: tuple(combine(c, a)), layers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hessians(backend, device):
    flat = torch.randn(3, 2, device=device), torch.randn(2, 5, device=device)
    check_hessian(combine, combine_reference, flat, backend=backend)
    layers = torch.randn(2, 2, 3, device=device), torch.randn(3, 5, device=device)

    def parts(c, a, backend=None):
        options = {"backend": backend} if backend else {}
        function = combine if backend else combine_reference
        return function(c, a, sizes=(2, 3), **options)

    check_hessian(parts, parts, layers, backend=backend)
    several = layers[0], torch.randn(3, 2, 2, device=device), torch.randn(3, 4, device=device)
    check_hessian(listed, listed_reference, several, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_and_compile(backend, device):
    flat = torch.randn(3, 2, device=device), torch.randn(2, 5, device=device)
    check_transforms(combine, combine_reference, flat, backend=backend)
    tensors = [torch.randn(*shape, device=device) for shape in ((2, 3), (3, 4), (3,))]
    check_transforms(listed, listed_reference, tensors, backend=backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_autocast_leaves_parameters_alone(backend, device):
    coeffs = torch.randn(2, 3, device=device, requires_grad=True)
    anchors = torch.randn(3, 40, device=device, requires_grad=True)
    plain = combine(coeffs, anchors, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = combine(coeffs, anchors, backend=backend)
    assert under.dtype == torch.float32 and torch.equal(under, plain)
    grads, truth = (
        torch.autograd.grad(w.square().sum(), (coeffs, anchors)) for w in (under, plain)
    )
    assert all(torch.equal(g, t) for g, t in zip(grads, truth, strict=True))


def test_meta_tensors_have_the_shapes_and_strides_of_results():
    coeffs = torch.empty(4, 3, device="meta")
    flat = combine(coeffs, torch.empty(3, 10, device="meta"))
    assert flat.device.type == "meta" and flat.shape == (4, 10)
    for made, shape in zip(combine(coeffs, network(3, "meta")), LIST, strict=True):
        assert made.shape == (4, *shape) and made.is_contiguous()


def test_results_of_a_list_refuse_changes_in_place_while_autograd_records(device):
    anchors = [torch.randn(2, 5, device=device, requires_grad=True) for _ in range(2)]
    coeffs = torch.ones(1, 2, device=device)
    with pytest.raises(RuntimeError, match="modified inplace"):
        combine(coeffs, anchors, backend="triton")[0].add_(1)
    with torch.no_grad():
        first, second = combine(coeffs, anchors, backend="triton")
        before = second.clone()
        first.add_(1)  # no gradient, no objection; and the neighbour in the buffer is untouched
        assert torch.equal(second, before)
