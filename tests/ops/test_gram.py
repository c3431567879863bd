"""gram: every form on every backend against the definition; what the mathematics promises."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from landscape_fast.ops.gram import gram, gram_op, gram_reference
from landscape_fast.testing import (
    assert_as_exact,
    check_hessian,
    check_op,
    check_registered,
    check_transforms,
    fenced,
)

PAGE = sys.modules[gram.__module__]  # `landscape_fast.ops.gram` is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPP = pytest.param(
    "cpp", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="inputs are on the GPU")
)
BACKENDS = [CPP, "triton"]
# (K, P): ones, primes, one block of anchors and several, a tile and a bit
SHAPES = [(1, 1), (2, 7), (3, 4113), (4, 2048), (5, 530), (9, 1100), (13, 40)]
LIST = [(0, 2), (3, 5), (), (64, 32), (1031,), (16,)]  # shapes of a small network's parameters


def network(K, device, draw=torch.randn):
    return [draw(K, *shape, device=device) for shape in LIST]


def whole(*shape, device):
    """Small integers: their products and sums are exact in whatever order they are formed."""
    return torch.randint(-4, 5, shape, device=device).float()


def listed(*anchors, backend="auto"):
    return gram(list(anchors), backend=backend)


def listed_reference(*anchors):
    return gram_reference(list(anchors))


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("K, P", SHAPES)
def test_exact_where_sums_are(K, P, backend, device):
    anchors = whole(K, P, device=device)
    truth = anchors.double() @ anchors.double().T
    assert torch.equal(gram(fenced(anchors), backend=backend), truth)
    if backend != "cpp":
        assert torch.equal(gram(fenced(anchors.half()), backend=backend), truth)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("sizes", [(1030,), (7, 0, 1023), (16, 1000, 14), (512, 512, 3, 3)])
def test_exact_in_every_part(sizes, backend, device):
    anchors = whole(3, sum(sizes), device=device)
    found = gram(fenced(anchors), sizes=sizes, backend=backend)
    assert torch.equal(found, gram_reference(anchors, sizes=sizes))
    assert torch.equal(found.sum(0), gram(anchors, backend=backend))
    for G, part in zip(found, anchors.double().split(sizes, 1), strict=True):
        assert torch.equal(G, torch.einsum("kp,jp->kj", part, part))


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_symmetric_to_the_last_bit(backend, device):
    rows = torch.randn((6, 500) if backend == "triton" else (30, 5011), device=device)
    for found in (gram(rows, backend=backend), gram([rows, rows[:, 0]], backend=backend)):
        assert torch.equal(found, found.mT)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_exact_for_a_list(backend, device):
    anchors = network(2, device, whole)
    found = gram([fenced(a) for a in anchors], backend=backend)
    assert torch.equal(found, gram_reference(anchors))
    flat = torch.cat([a.reshape(2, -1) for a in anchors], 1)
    sizes = [math.prod(shape) for shape in LIST]
    assert torch.equal(found, gram(flat, sizes=sizes, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_anchors_may_be_rows_of_something_wider(backend, device):
    anchors = whole(3, 900, device=device)
    part = anchors[:, 13:700]
    assert torch.equal(gram(part, backend=backend), gram_reference(part))
    same = anchors[:1].expand(3, 900)
    assert torch.equal(gram(same, backend=backend), gram_reference(same))
    assert torch.equal(gram([part, same], backend=backend), gram_reference([part, same]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_run_in_float64(backend, device):
    """Against sums without any rounding; sums of float32 would be off by 1e-8 of them."""
    anchors = torch.randn(3, 30_011, device=device)
    rows = anchors.double().tolist()
    exact = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    truth = torch.tensor(exact, dtype=torch.float64, device=device)
    plain = torch.einsum("kp,jp->kj", anchors.double(), anchors.double())
    assert_as_exact("gram", gram(anchors, backend=backend), plain, truth)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_close_models_keep_the_digits_of_their_distance(backend, device):
    center = torch.randn(1, 20_000, device=device)
    pair = center + 1e-4 * torch.randn(2, 20_000, device=device)
    G = gram(pair, backend=backend)
    distance = (G[0, 0] + G[1, 1] - 2 * G[0, 1]).sqrt()
    exact = (pair[0].double() - pair[1].double()).norm()
    # sums of 2e4 with an error of some 2e-16 of them, against a square of 4e-4
    torch.testing.assert_close(distance, exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_gradients_agree_with_the_definition(backend, device):
    dtypes = [torch.float32] if backend == "cpp" else [torch.float32, torch.float16]
    for dtype in dtypes:
        anchors = whole(3, 600, device=device)  # the values agree in every bit
        check_op(gram, gram_reference, [anchors], dtype=dtype, backend=backend)
        sizes = (16, 0, 500, 84)
        check_op(gram, gram_reference, [anchors], dtype=dtype, backend=backend, sizes=sizes)
    inputs = network(3, device, whole)
    check_op(listed, listed_reference, inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_where_none_is_wanted(backend, device):
    anchors = network(2, device)
    anchors[3].requires_grad_()
    found = listed(*anchors, backend=backend)
    (grad,) = torch.autograd.grad(found[3, 0, 1], anchors[3])
    torch.testing.assert_close(grad, anchors[3].detach().flip(0))
    assert not gram([a.detach() for a in anchors], backend=backend).requires_grad


class Called(TorchDispatchMode):
    """Notes every operator of torch that runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("listed_", [True, False])
def test_a_backward_brings_no_index_from_the_host(listed_, device):
    """It would wait for the device, and could not be part of a CUDA graph."""
    anchors = network(2, device)
    anchors[3].requires_grad_(), anchors[0].requires_grad_()
    total = gram(anchors if listed_ else anchors[3].flatten(1)).sum()
    with Called() as called:
        total.backward()
    assert called.names & {"combine", "mm", "bmm"} and not called.names & {"index", "lift_fresh"}


def test_only_the_anchors_are_kept(device):
    anchors = torch.randn(2, 50, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gram(anchors)
    assert [t.data_ptr() for t in saved] == [anchors.data_ptr()]


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_hessians_and_transforms(backend, device):
    anchors = torch.randn(2, 9, device=device)
    check_hessian(gram, gram_reference, [anchors], backend=backend)
    parts = [anchors, torch.randn(2, 3, 2, device=device)]
    check_hessian(listed, listed_reference, parts, backend=backend)
    check_transforms(gram, gram_reference, [anchors], backend=backend)


def test_gradgradcheck():
    anchors = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: gram(a, sizes=(3, 1)), anchors)
    assert torch.autograd.gradgradcheck(lambda a: gram(a, sizes=(3, 1)), anchors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registered_op(backend, device):
    flat = torch.randn(3, 70, device=device)
    check_registered(gram_op, ([flat], (30, 40), backend))
    check_registered(gram_op, ([flat, flat[:, :8].reshape(3, 2, 4)], None, backend))


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    K=st.integers(0, 6),
    sizes=st.lists(st.sampled_from([0, 1, 5, 16, 48, 130, 513]), min_size=1, max_size=4),
    backend=st.sampled_from(["triton"] if DEVICE == "cuda" else ["triton", "cpp"]),
)
def test_any_sizes(K, sizes, backend):
    anchors = whole(K, sum(sizes), device=DEVICE)
    found = gram(fenced(anchors), sizes=sizes, backend=backend)
    assert torch.equal(found, gram_reference(anchors, sizes=sizes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows(backend, device):
    anchors = torch.ones(3, 40, device=device)
    anchors[1, 37] = math.inf
    anchors[2, 3] = math.nan
    found = gram(anchors, backend=backend)
    assert torch.equal(found.isnan(), gram_reference(anchors).isnan())
    assert torch.equal(found.isinf(), gram_reference(anchors).isinf())
    assert found[0, 0] == 40 and found[1, 1] == math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU kernel")
def test_same_bits_for_any_number_of_threads():
    anchors, parts = torch.randn(5, 70_001), network(2, "cpu")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append([gram(anchors, backend="cpp"), gram(parts, backend="cpp")])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU kernel")
@pytest.mark.usefixtures("isa")
def test_every_instruction_set():
    for K, P in ((1, 3), (2, 1025), (4, 77), (7, 9001), (70, 600)):
        anchors = whole(K, P, device="cpu")
        assert torch.equal(gram(fenced(anchors), backend="cpp"), gram_reference(anchors))


def test_autocast_does_not_round_parameters(device):
    anchors = torch.full((1, 3), 1.001, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = gram(anchors, backend="torch")
    assert torch.equal(found, gram_reference(anchors))


def test_the_composition_widens_piece_by_piece(monkeypatch, device):
    """No copy of all anchors in float64, and the same sums."""
    monkeypatch.setitem(PAGE.WIDENED, device, 16)
    widths, products = [], PAGE._products
    monkeypatch.setattr(PAGE, "_products", lambda t: widths.append(t.shape[1]) or products(t))
    anchors = whole(2, 50, device=device)
    assert torch.equal(gram(anchors, backend="torch"), gram_reference(anchors))
    assert widths[:4] == [16, 16, 16, 2]


def test_nothing_at_all(device):
    assert gram([]).shape == (0, 0, 0)
    assert torch.equal(
        gram(torch.zeros(2, 0, device=device)), torch.zeros(2, 2).double().to(device)
    )
    assert gram(torch.zeros(0, 3, device=device)).shape == (0, 0)


A = torch.zeros(2, 6)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: gram(A[0]), ValueError, r"gram: anchors must be \[K, P\]; got \[6\]"),
        (lambda: gram(A.long()), ValueError, "gram: anchors must be one of float32, .*; got torch"),
        (lambda: gram(A, sizes=(2, 3)), ValueError,
         r"gram: sizes must be sizes of parts with sum P = 6; got \(2, 3\)"),
        (lambda: gram(A, sizes=()), ValueError, "gram: sizes must be sizes of parts"),
        (lambda: gram(A.T.contiguous().T), ValueError,
         r"gram: anchors must be of unit stride along P; got strides \(1, 2\); call .contiguous"),
        (lambda: gram("A"), TypeError, r"gram: anchors must be a Tensor \[K, P\] or a list"),
        (lambda: gram([A, "A"]), TypeError, r"gram: anchors\[1\] must be a Tensor .*; got str"),
        (lambda: gram([A], sizes=(6,)), ValueError, "gram: sizes must be None for a list"),
        (lambda: gram([A, A[:1]]), ValueError, r"gram: anchors\[1\] must be \[K, ...\] with K = 2"),
        (lambda: gram([A, A.double()]), ValueError,
         r"gram: anchors\[1\] must be of the dtype of anchors\[0\], float32; got float64; make"),
        (lambda: gram([A.int()]), ValueError, r"gram: anchors\[0\] must be one of float32"),
        (lambda: gram([A, A.to("meta")]), ValueError,
         r"gram: anchors\[1\] must be on the device of anchors\[0\], cpu; got meta"),
        (lambda: gram([A.T.contiguous().T]), ValueError,
         r"gram: anchors\[0\] must be contiguous within each anchor; got strides"),
        (lambda: gram(A, backend="cuda"), ValueError, "gram: backend must be one of .*'cuda'"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
