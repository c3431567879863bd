"""anchor_step: every rule on every backend against the definition, penalties against autograd."""

import sys
from dataclasses import replace

import pytest
import torch

from landscape_fast.kernels._launch import INTERPRETED
from landscape_fast.ops.anchor_step import (
    AdamRule,
    AnchorState,
    Cos2,
    SGDRule,
    anchor_step,
    anchor_step_reference,
)
from landscape_fast.testing import check_op, check_registered

PAGE = sys.modules[anchor_step.__module__]  # `landscape_fast.ops.anchor_step` is the function
CPP = pytest.param("cpp", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU"))
BACKENDS = [CPP, "triton"]
RULES = {
    "sgd": SGDRule(0.1, weight_decay=0.01),
    "momentum": SGDRule(0.1, 0.9, dampening=0.2, weight_decay=0.01),
    "nesterov": SGDRule(0.1, 0.9, weight_decay=0.01, nesterov=True),
    "adam": AdamRule(0.01, (0.8, 0.99), weight_decay=0.01),
    "adamw": AdamRule(0.01, eps=1e-3, weight_decay=0.1, decoupled=True),
}
# (M, T, F, sizes): ones, primes, several tiles and blocks, nothing in a part, 16 anchors
SHAPES = [
    (1, 1, 0, (1,)),
    (1, 2, 0, (16, 1024, 1048)),
    (2, 3, 2, (1003, 7, 0, 600)),
    (1, 1, 2, (523, 0)),
    (3, 9, 7, (130, 40)),
]


def inputs(M, T, F, sizes, device, layerwise=True):
    """grad, coeffs, anchors, fixed, first, second."""
    P, S = sum(sizes), T + F
    rows = [torch.randn(n, P, device=device) for n in (M, T, F, T, T)]
    grad, anchors, fixed, first, second = rows
    coeffs = torch.randn((M, len(sizes), S) if layerwise else (M, S), device=device)
    return grad, coeffs, anchors, fixed if F else None, first, second.square()


def penalties(kind, S, L, device):
    """A penalty and the parts it is about, different in each part."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(S, 3 * S, generator=generator, dtype=torch.float64)
    selected = torch.arange(L, device=device) % 2 == 0
    products = (rows @ rows.T).to(device)
    if kind == "matrix":
        return {"penalty": 0.01 * products, "selected": selected}
    if kind == "matrices":
        scale = torch.arange(1, L + 1, device=device)[:, None, None]
        return {"penalty": 0.01 * scale * products, "selected": selected}
    if kind == "cos2" and S > 1:
        pair = torch.tensor(S * (S - 1) // 2, device=device)
        return {"penalty": Cos2(products, pair, 3.0), "selected": selected}
    return {}


def outside(t):
    """What lies around a fenced tensor."""
    return t._base.isnan().sum() - t.isnan().sum()


def functional(function, rule, before, **options):
    """`function` as one of its input rows, which returns what it writes; its Gram is checked."""

    def call(grad, coeffs, anchors, fixed, first, second, **backend):
        given = [anchors, *(first, second)[: rule.states]]
        if not backend:  # nothing is fenced: the caller's tensors are still needed
            given = [t.clone() for t in given]
        around = [outside(t) for t in given] if backend else []
        step = torch.full((), float(before), device=anchors.device)
        state = AnchorState(step, *given[1:])
        found = function(grad, coeffs, given[0], rule, state, fixed=fixed, **options, **backend)
        assert step == before + 1
        assert around == ([outside(t) for t in given] if backend else [])
        check_gram(found, given[0], fixed, **options)
        if found is not None and backend.get("backend") in ("cpp", "triton"):
            assert torch.equal(found, found.mT)
        return given

    return call


def check_gram(found, anchors, fixed, sizes=None, selected=None, gram="total", **_):
    every = (anchors if fixed is None else torch.cat([anchors, fixed])).double()
    if gram is None:
        assert found is None
        return
    parts = torch.stack([a @ a.T for a in every.split(sizes or every.shape[1], 1)])
    if gram == "total" and selected is not None:
        parts = parts[selected]
    truth = parts if gram == "parts" else parts.sum(0)
    assert found.dtype == torch.float64
    # float64 sums in another order: P roundings at most
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12 * float(truth.abs().max()))


def check(backend, shape, rule, device, dtype=torch.float32, before=2, layerwise=True, **options):
    rule = RULES.get(rule, rule)
    options = {"sizes": shape[3], **options}
    check_op(
        functional(anchor_step, rule, before, **options),
        functional(anchor_step_reference, rule, before, **options),
        inputs(*shape, device, layerwise),
        dtype=dtype,
        backend=backend,
        gradients=False,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition(shape, rule, backend, device):
    kind = {"sgd": "matrix", "momentum": "cos2", "adam": "matrices"}.get(rule)
    options = penalties(kind, shape[1] + shape[2], len(shape[3]), device)
    check(backend, shape, rule, device, curve_l2=0.02 * (rule != "nesterov"), **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_low_precision(dtype, rule, device):
    options = penalties("cos2", 3, 2, device)
    check("triton", (1, 2, 1, (520, 128)), rule, device, dtype, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_the_first_step_and_a_late_one(rule, backend, device):
    """Dampening spares the first direction; Adam's corrections reach 1."""
    for before in (0, 100_000):
        check(backend, (1, 2, 0, (70,)), rule, device, before=before, layerwise=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_parts_and_every_kind_of_gram(backend, device):
    shape, options = (2, 2, 1, (300,)), {"sizes": None, "layerwise": False}
    for gram in ("total", None):
        check(backend, shape, "momentum", device, gram=gram, **options)
    options = penalties("matrix", 5, 4, device)
    check(backend, SHAPES[2], "adam", device, gram="parts", **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [AdamRule(0.1, (0.0, 0.0)), SGDRule(0.0, 0.5), AdamRule(0.0)])
def test_extremes_of_a_rule(rule, backend, device):
    check(backend, (1, 2, 0, (70,)), rule, device)


def test_float64_is_the_definition():
    check("auto", SHAPES[2], "adamw", "cpu", torch.float64, **penalties("cos2", 5, 4, "cpu"))


# -- what the kernels are given --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_offsets(backend, device):
    rule = RULES["momentum"]
    base = torch.randn(4, 2, 300, device=device)
    coeffs = torch.randn(3, 2, device=device).t()  # [M, S], transposed
    results = []
    for name in (backend, "torch"):
        both = base.clone()
        anchors, fixed, grad = both[:2, 1, 3:260], both[2:3, 0, 5:262], both[1:3, 0, 7:264]
        before = both.clone()
        state = AnchorState.zeros(rule, anchors.contiguous())
        found = anchor_step(grad, coeffs, anchors, rule, state, fixed=fixed, backend=name)
        results.append((anchors.clone(), state.first, found))
        both[:2, 1, 3:260] = before[:2, 1, 3:260]
        assert torch.equal(both, before)  # nothing else was touched
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), plain.float())  # Gram matrices of float32 anchors
    expanded = torch.randn(257, device=device).expand(2, 257)  # one gradient for all members
    anchors = torch.randn(2, 257, device=device)
    same = anchors.clone()
    square = torch.randn(2, 2, device=device)
    state = AnchorState(torch.zeros((), device=device))
    anchor_step(expanded, square, anchors, RULES["sgd"], state, backend=backend)
    anchor_step(expanded.contiguous(), square, same, RULES["sgd"], state, backend=backend)
    assert torch.equal(anchors, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_choices_and_penalties(backend, device):
    chosen = torch.tensor([True, True, False, True], device=device)[::2]
    penalty = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, device=device).T
    options = {"selected": chosen, "penalty": penalty, "layerwise": False}
    check(backend, (1, 2, 0, (70, 30)), "sgd", device, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learning_rate_on_the_device_is_read_at_every_step(backend, device):
    lr = torch.tensor(0.05, device=device)
    for rule in RULES.values():
        results = []
        for changing in (True, False):
            torch.manual_seed(4)
            anchors = torch.randn(2, 50, device=device)
            state = AnchorState.zeros(rule, anchors)
            for value in (0.5, 0.125):
                lr.fill_(value)
                now = replace(rule, lr=lr if changing else value)
                grad, coeffs = torch.randn(1, 50, device=device), torch.rand(1, 2, device=device)
                anchor_step(grad, coeffs, anchors, now, state, backend=backend)
            results.append(anchors)
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_nothing_to_do(backend, device):
    rule, anchors = RULES["adam"], torch.empty(2, 0, device=device)
    state, one = AnchorState.zeros(rule, anchors), torch.ones(1, 2, device=device)
    gram = anchor_step(anchors[:1], one, anchors, rule, state, backend=backend)
    assert torch.equal(gram, torch.zeros(2, 2, device=device, dtype=torch.float64))
    assert state.step == 1


@pytest.mark.usefixtures("isa")
def test_every_instruction_set_and_any_number_of_threads():
    threads = torch.get_num_threads()
    for rule in (RULES["momentum"], RULES["adamw"]):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            grad, coeffs, anchors, fixed, *_ = inputs(1, 2, 1, (40_001, 7, 3000), "cpu")
            state = AnchorState.zeros(rule, anchors)
            options = {"fixed": fixed, "sizes": (40_001, 7, 3000), "backend": "cpp"}
            gram = anchor_step(grad, coeffs, anchors, rule, state, **options)
            results.append([anchors, gram, *state[: 1 + rule.states]])
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    check("cpp", SHAPES[2], "adam", "cpu", **penalties("matrices", 5, 4, "cpu"))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has no sparse files")
def test_offsets_beyond_32_bits(tmp_path):
    """Rows that lie 2**30 elements apart, read and written."""
    far, near = [], []
    for rows in (4, 2, 2):  # pages of the files come on demand
        name = str(tmp_path / str(len(far)))
        big = torch.from_file(name, shared=True, size=rows * 2**30, dtype=torch.float16)
        far.append(big.as_strided((rows, 24), (2**30 + 8, 1)).copy_(torch.randn(rows, 24)))
        near.append(far[-1].clone())
    coeffs, rule = torch.randn(4, 4), RULES["momentum"]
    for grad, anchors, fixed in (far, near):
        state = AnchorState.zeros(rule, near[1])
        options = {"fixed": fixed, "curve_l2": 0.1, "backend": "triton"}
        anchor_step(grad, coeffs, anchors, rule, state, **options)
    assert torch.equal(far[1], near[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend, device):
    def run():
        torch.manual_seed(2)
        grad, coeffs, anchors, *_ = inputs(1, 3, 0, (1500, 700), device)
        state = AnchorState.zeros(RULES["adam"], anchors)
        options = {"sizes": (1500, 700), "backend": backend}
        return anchors, anchor_step(grad, coeffs, anchors, RULES["adam"], state, **options)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_more_anchors_than_triton_holds(device):
    grad, coeffs, anchors, *_ = inputs(1, 17, 0, (20,), device, layerwise=False)
    rule, state = RULES["sgd"], AnchorState(torch.zeros((), device=device))
    with pytest.raises(ValueError, match="backend must be 'torch' for more than 16 anchors"):
        anchor_step(grad, coeffs, anchors, rule, state, backend="triton")
    anchor_step(grad, coeffs, anchors, rule, state)  # "auto" finds another way


# -- autograd, compilation, graphs -----------------------------------------------------------------


def test_parameters_change_in_place_and_autograd_sees_it(device):
    anchors = torch.nn.Parameter(torch.randn(2, 10, device=device))
    saved = anchors.square().sum()
    before, state = anchors._version, AnchorState.zeros(RULES["sgd"], anchors)
    one = torch.ones(1, 2, device=device)
    assert anchor_step(anchors[:1].detach() + 1, one, anchors, RULES["sgd"], state).grad_fn is None
    assert anchors._version > before and anchors.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_is_registered_as_it_behaves(backend, device):
    rule = RULES["adam"]

    def run(grad, coeffs, anchors, first, second, step):
        state = AnchorState(step, first, second)
        options = {"sizes": (30, 20), "backend": backend}
        return anchor_step(grad, coeffs, anchors, rule, state, **options)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, compiled):
        torch.manual_seed(0)
        grad, coeffs, anchors, _, first, second = inputs(1, 2, 0, (30, 20), device)
        step = torch.zeros((), device=device)
        results.append([function(grad, coeffs, anchors, first, second, step), anchors, first, step])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    pair = torch.tensor(1, device=device)
    penalty = torch.eye(2, device=device, dtype=torch.float64)
    hyper = [0.1, 0.9, 0.99, 1e-8, 0.0, 0.0, 1.0]
    arguments = grad, coeffs, anchors, None, first, second, step, None, 3, hyper, [30, 20]
    check_registered(PAGE.anchor_step_op, (*arguments, None, penalty, pair, "total", backend))


@pytest.mark.gpu
def test_a_cuda_graph_holds_steps_with_their_schedule():
    """Step count, learning rate, pair and Gram matrix all live on the device."""
    device, sizes = "cuda", (1000, 24)
    results = []
    for graphed in (True, False):
        torch.manual_seed(0)
        grad, coeffs, anchors, *_ = inputs(1, 3, 0, sizes, device)
        lr, pair = torch.tensor(0.0, device=device), torch.tensor(0, device=device)
        rule = AdamRule(lr)
        state = AnchorState.zeros(rule, anchors)
        gram = (anchors.double() @ anchors.double().T).clone()

        def step(grad=grad, coeffs=coeffs, anchors=anchors, rule=rule, state=state, gram=gram,
                 pair=pair):  # fmt: skip
            penalty = Cos2(gram, pair, 1.0)
            gram.copy_(
                anchor_step(grad, coeffs, anchors, rule, state, sizes=sizes, penalty=penalty)
            )

        step()  # warms up, with a learning rate of 0
        torch.cuda.synchronize()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        for i in range(5):
            lr.fill_(0.1 / (i + 1))
            pair.fill_(i)
            grad.mul_(-0.9)
            graph.replay() if graphed else step()
        results.append((anchors, gram, state.step))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
