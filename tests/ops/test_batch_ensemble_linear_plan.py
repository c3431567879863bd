"""Which way batch_ensemble_linear goes by itself: the table, the rules, and that they are kept."""

import random
import sys

import pytest
import torch

from landscape_fast.ops import _batch_ensemble_linear_plan as plan
from landscape_fast.ops._batch_ensemble_linear_plan import Needs, Plan, Problem
from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)

PAGE = sys.modules[batch_ensemble_linear.__module__]
ALL = Needs(True, True, True, True, True)
FUSED, COMPOSED = Plan("fused", "H"), Plan("composed", "composed")


@pytest.mark.parametrize(
    "sizes, inference, training, first_layer",
    [  # M, B, I, O on an H200 in bfloat16; a first layer needs no dx
        ((32, 256, 512, 512), "fused", FUSED, Plan("fused", "G")),  # TabM
        ((4, 128, 1024, 1024), "fused", FUSED, Plan("fused", "G")),
        ((16, 512, 1024, 1024), "fused", FUSED, Plan("fused", "G")),
        ((8, 512, 2048, 2048), "fused", FUSED, Plan("fused", "G")),
        ((8, 128, 4096, 4096), "fused", COMPOSED, Plan("fused", "G")),  # B below 0.15 I
        ((8, 512, 4096, 4096), "composed", COMPOSED, Plan("composed", "G")),  # large products
        ((4, 4096, 4096, 4096), "composed", COMPOSED, Plan("composed", "G")),
        ((16, 1, 8192, 8192), "fused", COMPOSED, COMPOSED),  # a weight gradient per member
    ],
    ids=str,
)
def test_table(sizes, inference, training, first_layer):
    problem = Problem(*sizes)
    assert plan.choose(problem, Needs()) == Plan(inference, "none")
    assert plan.choose(problem, ALL) == training
    assert plan.choose(problem, ALL._replace(x=False)) == first_layer


@pytest.mark.parametrize(
    "sizes, training",
    [  # the same with parameters in float32: their gradients take no product of rounded factors
        ((32, 256, 512, 512), Plan("fused", "G")),
        ((8, 512, 2048, 2048), Plan("fused", "G")),
        ((8, 512, 4096, 4096), Plan("composed", "G")),
        ((4, 4096, 4096, 4096), Plan("composed", "outer")),
        ((16, 1, 8192, 8192), Plan("fused", "wide")),  # memory's time: rows are few
    ],
    ids=str,
)
def test_table_of_exact_gradients(sizes, training):
    assert plan.choose(Problem(*sizes, exact=True, wide=True), ALL) == training


def problems(count):
    """Random problems, sizes spread evenly over magnitudes, and random needs."""
    draw = random.Random(0)
    for _ in range(count):
        M, B, I, O = (int(2 ** draw.uniform(0, top)) for top in (7, 13, 13, 13))
        flags = [draw.random() < 0.7 for _ in range(4)]
        kind, arch = draw.choice(["half", "tf32", "ieee"]), draw.choice([80, 90, 100])
        needs = Needs(*[draw.random() < 0.6 for _ in range(5)])
        has_r, has_s = flags[0], flags[1]
        needs = needs._replace(r=needs.r and has_r, s=needs.s and has_s)
        exact = kind == "half" and any(needs[1:4]) and draw.random() < 0.5
        exact = (exact, exact and draw.random() < 0.5)
        yield Problem(M, B, I, O, arch, kind, flags[2], has_r, has_s, flags[3], *exact), needs


def test_never_slower_than_the_composition_by_its_own_estimate():
    for problem, needs in problems(500):
        chosen = plan.choose(problem, needs)
        composed = Plan(
            "composed", "outer" if problem.exact else "composed" if any(needs) else "none"
        )
        assert plan.estimate(problem, needs, chosen) <= plan.estimate(problem, needs, composed)
        if chosen.backward == "composed" and needs.s:
            assert chosen.forward == "composed"  # who else would keep z
        assert (chosen.backward == "none") == (not any(needs))
        assert chosen.backward != "H" or needs.x
        exact = ("G", "outer", "wide") if problem.wide else ("G", "outer")
        assert not problem.exact or chosen.backward in exact


def test_estimates_grow_with_the_problem():
    """With each size, and for the composition with each further gradient.

    Not so for the kernels: with dx wanted, dr moves to the quicker of the two.
    """
    for problem, needs in problems(200):
        if problem.B < plan.ROWS:
            continue  # tiles of few examples run at another rate
        for way in (
            FUSED,
            Plan("fused", "G"),
            COMPOSED,
            *[Plan("composed", w) for w in ("outer", "wide")],
        ):
            us = plan.estimate(problem, needs, way)
            for letter in "MBIO":
                larger = problem._replace(**{letter: 2 * getattr(problem, letter)})
                assert plan.estimate(larger, needs, way) >= us
        us = plan.estimate(problem, needs, COMPOSED)
        for name in Needs._fields:
            more = needs._replace(**{name: True})
            assert plan.estimate(problem, more, COMPOSED) >= us


def test_estimate_of_a_bare_product():
    """One number by hand: 2 * 8192 * 512 * 512 flops at 0.8 of 790 TFLOP/s, after 4 us."""
    us = plan.forward_fused(Problem(32, 256, 512, 512))
    assert us == pytest.approx(4 + 4.295e9 / (0.8 * 790e12) * 1e6, rel=1e-3)
    memory = plan.forward_fused(Problem(16, 64, 8192, 8192, has_r=False))
    flops = 4 + 1.374e11 / (0.8 * 790e12) * 1e6
    assert memory == pytest.approx(flops, rel=1e-3)
    single = plan.forward_fused(Problem(16, 1, 8192, 8192))  # the weight alone, at 4.3 TB/s
    assert single == pytest.approx(4 + (2 * 8192 * 8192 + 2 * 16 * 16384) / 4.3e12 * 1e6, rel=1e-3)


def test_rows_that_cannot_be_loaded_in_16_bytes_go_to_the_library():
    sizes = Problem(32, 256, 500, 500)
    assert plan.choose(sizes, ALL) == FUSED
    assert plan.choose(sizes._replace(aligned=False), ALL) == COMPOSED


def test_tf32_follows_torch():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, kind in ((True, "tf32"), (False, "ieee")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert plan.tf32_allowed() is allowed and plan.kind_of(torch.float32) == kind
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert plan.kind_of(torch.bfloat16) == plan.kind_of(torch.float16) == "half"


def inputs(device, M=2, B=5, I=16, O=16):
    shapes = ((M, B, I), (O, I), (M, I), (M, O), (M, O))
    return [torch.randn(shape).to(device).requires_grad_() for shape in shapes]


@pytest.fixture
def automatic(monkeypatch):
    """backend="auto" as on an H200, with the kernels interpreted."""

    def architecture(index):
        return 90

    architecture._dynamo_marked_constant = True
    monkeypatch.setattr(PAGE, "pick", lambda op, backend, tensor: "triton")
    monkeypatch.setattr(plan, "architecture", architecture)


@pytest.mark.parametrize(
    "way",
    [
        FUSED,
        Plan("fused", "G"),
        Plan("composed", "H"),
        COMPOSED,
        Plan("composed", "outer"),
        Plan("fused", "outer"),
        Plan("composed", "wide"),
    ],
    ids=str,
)
def test_every_plan_computes_the_same(way, automatic, monkeypatch, device):
    monkeypatch.setattr(plan, "chosen", lambda problem, needs: way)
    arguments = inputs(device)
    dy = torch.randn(2, 5, 16, device=device)
    y = batch_ensemble_linear(*arguments)
    truth = batch_ensemble_linear_reference(*arguments)
    torch.testing.assert_close(y, truth)
    found = torch.autograd.grad(y, arguments, dy)
    for a, b in zip(found, torch.autograd.grad(truth, arguments, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_fused_forward_before_a_composed_backward(automatic, monkeypatch, device):
    """Possible where ds is not wanted, and z therefore not missed."""
    monkeypatch.setattr(plan, "chosen", lambda problem, needs: Plan("fused", "composed"))
    x, weight, r, s, bias = inputs(device)
    tensors = (x, weight, r, bias)
    dy = torch.randn(2, 5, 16, device=device)
    found = torch.autograd.grad(batch_ensemble_linear(x, weight, r, s.detach(), bias), tensors, dy)
    truth = batch_ensemble_linear_reference(x, weight, r, s, bias)
    for a, b in zip(found, torch.autograd.grad(truth, tensors, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_the_plan_is_asked_only_when_nothing_is_forced(automatic, monkeypatch, device):
    asked = []
    monkeypatch.setattr(plan, "chosen", lambda problem, needs: asked.append(needs) or FUSED)
    arguments = inputs(device)
    batch_ensemble_linear(*arguments, backend="triton")
    monkeypatch.setattr(PAGE._dispatch, "FORCED", "triton")
    batch_ensemble_linear(*arguments)
    assert not asked
    monkeypatch.setattr(PAGE._dispatch, "FORCED", "auto")
    batch_ensemble_linear(*arguments)
    batch_ensemble_linear(*[t.detach() for t in arguments])
    assert asked == [ALL, Needs()]


def test_kernels_forced_for_all_calls_leave_the_others_to_the_library(monkeypatch, device):
    """A call that asks for "torch", and dtypes that have no kernel."""
    pytest.importorskip("triton")
    monkeypatch.setattr(PAGE._dispatch, "FORCED", "triton")
    arguments = [t.detach() for t in inputs(device)]
    plans = []
    original = PAGE._plan
    monkeypatch.setattr(PAGE, "_plan", lambda *a: plans.append(original(*a)) or plans[-1])
    batch_ensemble_linear(*arguments)
    batch_ensemble_linear(*arguments, backend="torch")
    batch_ensemble_linear(*[t.double() for t in arguments])
    assert [p.forward for p in plans] == ["fused", "composed", "composed"]


def test_problem_is_read_off_the_arguments(automatic, monkeypatch, device):
    problems = []
    monkeypatch.setattr(
        plan, "chosen", lambda problem, needs: problems.append(problem) or Plan("fused", "H")
    )
    x, weight, r, s, bias = (t.detach() for t in inputs(device, 3, 7, 16, 32))
    batch_ensemble_linear(x, weight, r, s, bias)
    batch_ensemble_linear(x.transpose(0, 1), weight, None, s, layout="batch_major")
    batch_ensemble_linear(x.flatten(0, 1), weight, r, layout="folded")
    batch_ensemble_linear(x[0].half(), weight.half(), r.half())
    batch_ensemble_linear(x[..., 1:], weight[:, 1:])
    batch_ensemble_linear(x.half(), weight, r.requires_grad_())
    common = Problem(3, 7, 16, 32, 90, "ieee")
    assert problems == [
        common,
        common._replace(has_r=False),
        common._replace(has_s=False),
        common._replace(kind="half", shared_x=True, has_s=False),
        common._replace(I=15, has_r=False, has_s=False),
        common._replace(kind="half", has_s=False, exact=True, wide=True),
    ]
    problems.clear()
    batch_ensemble_linear(x[..., :15].contiguous(), weight[:, :15])
    batch_ensemble_linear(x, weight[:30])
    batch_ensemble_linear(x, weight.T.contiguous().T)
    assert not any(problem.aligned for problem in problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, I", [(8, 16), (7, 16), (1, 2), (1, 3)])
def test_the_composition_keeps_a_product_only_where_that_is_quicker(B, I, dtype):
    arguments = [t.detach().to(dtype).requires_grad_() for t in inputs("cpu", 2, B, I, 3)]
    places = {t.data_ptr() for t in arguments}
    more = []

    def note(t):
        if t.data_ptr() not in places:
            more.append(t.shape)
        return t

    for wants_ds in (True, False):
        arguments[3].requires_grad_(wants_ds)
        more.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            batch_ensemble_linear(*arguments, backend="torch")
        keeps = wants_ds and (2 * B < I or dtype == torch.bfloat16)
        assert more == ([(2, B, 3)] if keeps else [])


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_changing_batch(dynamic, automatic, device):
    """The plan is traced too: new sizes neither break the graph nor compile without end."""
    torch._dynamo.reset()
    x, weight, r, s, bias = inputs(device)
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(batch_ensemble_linear, backend=count, dynamic=dynamic, fullgraph=True)
    for B in (5, 6, 7, 40, 41):
        x = torch.randn(2, B, 16, device=device, requires_grad=True)
        y = compiled(x, weight, r, s, bias)
        torch.testing.assert_close(y, batch_ensemble_linear_reference(x, weight, r, s, bias))
        y.sum().backward()
    assert len(graphs) <= 3
    torch._dynamo.reset()
