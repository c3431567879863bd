"""The compiled CPU kernels of batch_ensemble_linear: right at every edge, on every instruction set,
with the same bits on any number of threads."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops.problem import inputs, keyword
from torch.utils._python_dispatch import TorchDispatchMode

from landscape_fast import _extension
from landscape_fast.nn.memory import saved_bytes
from landscape_fast.ops import _batch_ensemble_linear_cpu as cpu
from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)
from landscape_fast.testing import check_hessian, check_op, check_registered, check_transforms

pytestmark = pytest.mark.skipif(_extension.C is None, reason="needs the compiled module")
ISAS = ["baseline", "avx2", "avx512"]
LAYOUTS = ["member_major", "batch_major", "folded", "shared", "shared batch_major"]
# (M, B, I, O): ones, primes, one more than a strip, a panel, a task, a block of examples or of I
SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (5, 1, 33, 17), (3, 15, 7, 57), (17, 2, 65, 31)]
LONG = [(2, 257, 33, 29), (1, 113, 513, 258)]


def check(arguments, layout="member_major", **options):
    options |= {"layout": keyword(layout), "backend": "cpp"}
    check_op(batch_ensemble_linear, batch_ensemble_linear_reference, arguments, **options)


@pytest.fixture(params=["rows turned", "weight turned"])
def way(request, monkeypatch):
    """Both forwards at every size: which one runs depends on the number of rows."""
    monkeypatch.setattr(cpu, "FEW", 10**9 if request.param == "rows turned" else 0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SHAPES + LONG, ids=str)
def test_agrees_with_the_definition(sizes, layout, way):
    check(inputs(*sizes, layout), layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", SHAPES[1:] + LONG, ids=str)
def test_every_instruction_set_agrees(sizes, isa, way, monkeypatch):
    monkeypatch.delenv("LANDSCAPE_FAST_ISA", raising=False)
    if ISAS.index(isa) > ISAS.index(_extension.C.cpu_isa()):
        pytest.skip(f"this CPU, or this build, has no {isa}")
    monkeypatch.setenv("LANDSCAPE_FAST_ISA", isa)
    arguments = inputs(*sizes, "batch_major")
    arguments[4] = arguments[4] + 100 * arguments[4].sign()  # no rounding moves y across zero
    check(arguments, "batch_major", activation="relu")


@pytest.mark.parametrize("rows", range(1, 16))
def test_every_height_of_a_strip(rows, way):
    check(inputs(1, rows, 9, 15 - rows or 33))


def test_long_sums(way):
    """Blocks of features are added up apart: no more error than a library's product."""
    check(inputs(1, 3, 5000, 2))
    check(inputs(2, 3000, 3, 2))


@pytest.mark.parametrize("relu", [None, "relu"])
def test_every_factor_may_be_missing(relu, way):
    x, weight, r, s, bias = inputs(3, 6, 35, 4)
    for factors in itertools.product((r, None), (s, None), (bias, bias[0], None)):
        check([x, weight, *factors], activation=relu)


def strided():
    x, weight, r, s, bias = inputs(3, 6, 35, 37)
    yield "members of x expanded", (x[:1].expand(3, 6, 35), weight, r, s, bias)
    yield "examples of x expanded", (x[:, :1].expand(3, 6, 35), weight, r, s, bias)
    yield "x transposed", (x.permute(2, 1, 0).contiguous().permute(2, 1, 0), weight, r, s, bias)
    yield "every other feature of x", (torch.randn(3, 6, 70)[..., ::2], weight, r, s, bias)
    yield "x of odd rows", (torch.randn(3, 6, 37)[..., 1:36], weight, r, s, bias)
    yield "weight transposed", (x, weight.T.contiguous().T, r, s, bias)
    yield "weight in wide rows", (x, torch.randn(37, 77)[:, 3:73:2], r, s, bias)
    yield "weight expanded", (x, weight[:1].expand(37, 35), r, s, bias)
    yield "factors strided", (x, weight, r.T.contiguous().T, s[:1].expand(3, 37), bias)


@pytest.mark.parametrize("case", list(strided()), ids=lambda case: case[0])
def test_any_strides(case, way):
    check(case[1])


@pytest.mark.parametrize("expanded", [True, False])
def test_any_strides_of_the_incoming_gradient(expanded):
    dy = torch.ones(()).expand(3, 20, 40) if expanded else torch.randn(40, 20, 3).permute(2, 1, 0)
    arguments = [t.requires_grad_() for t in inputs(3, 20, 33, 40)]
    y = batch_ensemble_linear(*arguments, backend="cpp", activation="relu")
    truth = batch_ensemble_linear_reference(*arguments, activation="relu")
    found = torch.autograd.grad(y, arguments, dy)
    for a, b in zip(found, torch.autograd.grad(truth, arguments, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["batch_major", "shared"])
def test_only_wanted_gradients(layout):
    arguments = inputs(2, 5, 34, 3, layout)
    every = [t.clone().requires_grad_() for t in arguments]
    truth = batch_ensemble_linear_reference(*every, layout=keyword(layout))
    dy = torch.randn_like(truth)
    truth = torch.autograd.grad(truth, every, dy)
    for wanted in itertools.product((False, True), repeat=5):
        if any(wanted):
            some = [t.clone().requires_grad_(w) for t, w in zip(arguments, wanted, strict=True)]
            y = batch_ensemble_linear(*some, layout=keyword(layout), backend="cpp")
            y.backward(dy)
            for t, w, g in zip(some, wanted, truth, strict=True):
                assert (t.grad is not None) == w
                if w:
                    torch.testing.assert_close(t.grad, g)


def test_a_relu_lets_not_a_number_pass_and_is_shut_at_zero():
    weight, bias = torch.eye(2), torch.zeros(1, 2)
    x = torch.tensor([[[float("nan"), 1.0], [0.0, -2.0]]]).requires_grad_()
    y = batch_ensemble_linear(x, weight, bias=bias, activation="relu", backend="cpp")
    assert y[0, 0].isnan().all() and torch.equal(y[0, 1], torch.zeros(2))
    (dx,) = torch.autograd.grad(y[0, 1].sum(), x)
    assert torch.equal(dx[0, 1], torch.zeros(2))


@pytest.mark.parametrize("layout", ["batch_major", "shared"])
@pytest.mark.parametrize("sizes", [(32, 40, 70, 65), (4, 600, 70, 300)], ids=str)
def test_same_bits_for_any_number_of_threads(sizes, layout, way, threads):
    """Gradients of what every block, chunk and range contributes are added in one order."""
    arguments = [t.requires_grad_() for t in inputs(*sizes, layout)]
    shape = keyword(layout)

    def run():
        y = batch_ensemble_linear(*arguments, layout=shape, activation="relu", backend="cpp")
        return [y, *torch.autograd.grad(y, arguments, torch.ones_like(y))]

    threads(1)
    truth = run()
    for count in (2, 3, 7, 100):
        threads(count)
        for _ in range(3):
            assert all(map(torch.equal, run(), truth)), f"{count} threads"


def test_may_be_called_from_several_threads_at_once():
    arguments = inputs(8, 40, 70, 65)
    truth = batch_ensemble_linear(*arguments, backend="cpp")
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: batch_ensemble_linear(*arguments, backend="cpp"), range(8)):
            assert torch.equal(y, truth)


def test_offsets_beyond_32_bits(tmp_path):
    far = 2**31 + 8
    big = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 200)  # pages on demand
    x = big.as_strided((2, 7, 5), (far, 5, 1))
    x.copy_(torch.randn(2, 7, 5))
    _, *others = inputs(2, 7, 5, 3)
    others = [t.requires_grad_() for t in others]
    y, near = (batch_ensemble_linear(t, *others, backend="cpp") for t in (x, x.contiguous()))
    assert torch.equal(y, near)
    found, expected = (torch.autograd.grad(t.sum(), others) for t in (y, near))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("absent", [(), (2,), (3,), (4,), (2, 3, 4)], ids=str)
def test_hessians(absent):
    arguments = [None if i in absent else t for i, t in enumerate(inputs(2, 3, 4, 3))]
    check_hessian(batch_ensemble_linear, batch_ensemble_linear_reference, arguments, backend="cpp")


@pytest.mark.parametrize("layout", ["member_major", "shared"])
def test_transforms_and_compile(layout):
    """torch.func.grad, jvp, vmap, forward-mode AD, torch.compile."""
    arguments = inputs(2, 3, 4, 3, layout)
    check_transforms(
        batch_ensemble_linear, batch_ensemble_linear_reference, arguments, backend="cpp"
    )


@pytest.mark.parametrize("layout", ["batch_major", "shared"])
def test_registered(layout):
    x, weight, r, s, bias = inputs(3, 5, 7, 4, layout)
    batch_major = layout == "batch_major"
    sizes = (3, batch_major)
    check_registered(cpu.cpu_forward_op, (x, weight, r, s, bias, *sizes, True))
    check_registered(cpu.cpu_forward_op, (x, weight, None, None, None, *sizes, False))
    dy = torch.randn(5, 3, 4) if batch_major else torch.randn(3, 5, 4)
    for needs in ([True] * 5, [False, True, False, False, True]):
        arguments = (dy, dy, x, weight, r, s, needs, True, batch_major)
        check_registered(cpu.cpu_backward_op, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_x_alone(layout):
    """tabm keeps x, x * r and its product; a ReLU here keeps y, which the next layer keeps too."""
    x, *others = inputs(4, 16, 32, 32, layout)
    others = [torch.nn.Parameter(t) for t in others]

    def layer(x):
        return batch_ensemble_linear(x, *others, layout=keyword(layout), backend="cpp")

    assert saved_bytes(layer, x.requires_grad_()) == x.nbytes


ALL = cpu.Needs(True, True, True, True, True)


def plan(M, B, I, O, needs, r=True, shared=False):
    x = torch.empty((B, I) if shared else (M, B, I), device="meta")
    weight = torch.empty(O, I, device="meta")
    return cpu.cpu_plan(x, weight, weight[:M] if r else None, (M, False), needs)


@pytest.mark.parametrize("sizes", cpu.MEASURED, ids=str)
def test_kernels_run_where_they_were_measured_quicker(sizes):
    forward, both = cpu.MEASURED[sizes]
    assert plan(*sizes, cpu.Needs()).forward == "composed" or forward >= 1
    assert plan(*sizes, ALL).backward != "cpp" or both >= 1
    if min(forward, both) >= 1.1:
        assert plan(*sizes, cpu.Needs()).forward == "cpp" and plan(*sizes, ALL) == cpu.CPP


def test_one_product_where_all_members_have_the_same_rows():
    """Without r, a shared x has one product for all members: the library's does it once."""
    sizes = (4, 256, 512, 512)
    assert plan(*sizes, ALL, r=False, shared=True).forward == "composed"
    assert plan(*sizes, ALL, r=False) == plan(*sizes, ALL, shared=True) == cpu.CPP


class Seen(TorchDispatchMode):
    """Records what the dispatcher runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_forced_backend_is_not_overruled():
    """A kernel asked for runs at every size, not only where it is the quicker one; and the direct
    call that saves the dispatcher's time stands back where somebody watches."""
    arguments = inputs(2, 3, 4, 5)
    for backend, expected in (("cpp", True), ("auto", False)):
        with Seen() as seen:
            y = batch_ensemble_linear(*arguments, backend=backend)
        assert ("landscape_fast::batch_ensemble_linear_cpu" in seen.names) == expected
        assert not expected or torch.equal(y, batch_ensemble_linear(*arguments, backend=backend))
