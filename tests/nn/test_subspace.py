"""A subspace against `functional_call` at C A: outputs, gradients, draws, transforms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nn.mixture import Mixture, all_anchors, in_order, make, token_rows
from torch import nn
from torch.func import functional_call

from landscape_fast.nn import Bezier, FlatLayout, Line, PolyChain, Simplex, Subspace
from landscape_fast.nn.coefficients import offset
from landscape_fast.testing import assert_as_exact


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Mixture().double()


@pytest.fixture
def rows():
    return token_rows()


CASES = [
    (Line(), {}),
    (Line(), {"layerwise": True}),
    (Simplex(3), {}),
    (Simplex(4, 0.5), {"layerwise": True, "trained": [False, True, False, True]}),
    (Bezier(3), {"trained": [False, True, False]}),
    (PolyChain(4), {"trained": [False, True, True, False]}),
]


def oracle(net, subspace, coeffs, rows, dtype):
    """At each point of coeffs [M, K] or [M, L, K]: outputs, and gradients of the mean losses to
    weights [M, P], to anchors (c_k g) and to coefficients (A g), all in `dtype`."""
    x, y = rows
    layout, anchors = subspace.layout, all_anchors(subspace).to(dtype)
    net = copy.deepcopy(net).to(dtype)
    sizes = torch.tensor(layout.sizes)
    outputs, grads, danchors, dcoeffs = [], [], 0, []
    for c in coeffs.detach().to(dtype):
        spread = c.expand(len(sizes), -1).repeat_interleave(sizes, 0).T  # [K, P]
        leaves = layout.views((spread * anchors).sum(0))
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        given = x.to(dtype) if x.is_floating_point() else x
        output = functional_call(net, leaves, (given,))
        found = torch.autograd.grad(F.cross_entropy(output, y), leaves.values())
        g = FlatLayout(net).flatten(dict(zip(leaves, found, strict=True)))
        danchors = danchors + spread * g
        per_part = torch.stack([p.sum(1) for p in (anchors * g).split(layout.sizes, 1)])
        dcoeffs.append(per_part if c.ndim == 2 else per_part.sum(0))
        outputs.append(output.detach())
        grads.append(g)
    return torch.stack(outputs), torch.stack(grads), danchors, torch.stack(dcoeffs)


def check(names, got, *arguments):
    plain, truth = (oracle(*arguments, dtype) for dtype in (torch.float32, torch.float64))
    for name, *three in zip(names, got, plain, truth, strict=True):
        if three[0] is not None:
            assert_as_exact(name, *three)


@pytest.mark.parametrize("coefficients, options", CASES)
def test_forward_and_gradients_are_those_of_the_mixed_weights(net, rows, coefficients, options):
    x, y = rows
    subspace = make(net.float(), coefficients, **options)
    K, L = coefficients.anchors, len(subspace.layout)
    coeffs = torch.randn((2, L, K) if subspace.layerwise else (2, K), requires_grad=True)
    outputs = subspace(x, coeffs)
    loss = sum(F.cross_entropy(output, y) for output in outputs)
    dcoeffs, found = torch.autograd.grad(loss, [coeffs, subspace.anchors])
    plain = oracle(net, subspace, coeffs, rows, torch.float32)[2]  # fixed ones get no gradient
    danchors = plain.clone()
    danchors[options.get("trained", [True] * K)] = found
    got = (outputs.detach(), None, danchors, dcoeffs)
    check(("outputs", "", "danchors", "dcoeffs"), got, net, subspace, coeffs, rows)


@pytest.mark.parametrize("coefficients, options", CASES)
def test_the_fused_path_has_the_gradients_of_the_graph(net, rows, coefficients, options):
    x, y = rows
    subspace = make(net.float(), coefficients, **options)
    generator = torch.Generator().manual_seed(3)
    assert subspace.draw_(generator) is subspace
    output = subspace.model(x)
    F.cross_entropy(output, y).backward()
    shape = (1, len(subspace.layout)) if subspace.layerwise else (1,)
    assert subspace.coeffs.shape == (*shape, coefficients.anchors)
    user = in_order(subspace, subspace.coeffs, -1)
    got = (output.detach()[None], subspace.point_grad[None], None, None)
    check(("output", "gradient", "", ""), got, net, subspace, user, rows)
    mixed = subspace.mix(user)[0].detach()
    assert_as_exact("mix", mixed, subspace.point, subspace.point.double())
    again = make(net, coefficients, **options).draw_(torch.Generator().manual_seed(3))
    assert torch.equal(again.point, subspace.point)


def test_training_mode_draws_and_evaluation_mode_does_not(net, rows):
    x, _ = rows
    subspace = make(net, Line())
    torch.manual_seed(5)
    first, second = subspace(x), subspace(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    t = Line().draw(1, dtype=torch.float64)
    assert torch.equal(first, subspace(x, t)[0])
    several = subspace(x, points=3)
    assert several.shape == (3, *first.shape) and not torch.equal(several[0], several[1])
    subspace.eval().recalibrate_(x)
    middle = subspace(x)
    assert torch.equal(middle, subspace(x))  # the midpoint, until something is drawn
    assert_as_exact("model", subspace.model(x), middle, middle)


@pytest.mark.parametrize("layerwise", [False, True])
def test_many_points_in_one_pass_are_many_passes(layerwise):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    subspace = make(net, Bezier(3), layerwise=layerwise, trained=[True, True, False])
    shape = (4, len(subspace.layout), 3) if layerwise else (4, 3)
    coeffs = torch.randn(shape, requires_grad=True)
    before = subspace.model[1].running_mean.clone()
    outputs = subspace(x, coeffs)
    assert subspace._stack.runs(x) == "batched"  # not the way of `functional_call`
    assert torch.equal(subspace.model[1].running_mean, before)
    loss = sum(F.cross_entropy(output, y) for output in outputs)
    dcoeffs, found = torch.autograd.grad(loss, [coeffs, subspace.anchors])
    danchors = oracle(net, subspace, coeffs, (x, y), torch.float32)[2].clone()
    danchors[:2] = found
    got = (outputs.detach(), None, danchors, dcoeffs)
    check(("outputs", "", "danchors", "dcoeffs"), got, net, subspace, coeffs, (x, y))
    assert subspace(x, points=2).shape == (2, 9, 3)
    subspace.statistics = "shared"  # which somebody will read
    assert_as_exact("one by one", subspace(x, coeffs), outputs, outputs.double())
    assert not torch.equal(subspace.model[1].running_mean, before)
    assert_as_exact("copied", copy.deepcopy(subspace)(x, coeffs), outputs, outputs.double())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return x * self.scale


def test_many_points_follow_what_is_changed_in_the_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    subspace, x = make(net, Line()), torch.randn(9, 5)
    coeffs = torch.tensor([[0.5, 0.5], [0.2, 0.8]])

    def varies():
        return not torch.equal(subspace(x, coeffs), subspace(x, coeffs))

    assert varies()
    subspace.model[1].p = 0.0
    assert not varies()
    subspace.model[1].p = 0.5
    subspace.model[1].eval()
    assert not varies()
    subspace.model[2].eval()
    for c in (coeffs, coeffs[0]):
        with pytest.raises(RuntimeError, match="statistics"):
            subspace(x, c)
    subspace = make(nn.Sequential(nn.Linear(5, 3), Scaled()), Line())
    for value in (1.0, 2.0):
        subspace.model[1].scale.fill_(value)
        subspace(x, coeffs)
        subspace._stack._slow_on_cpu = False  # as on a GPU: in one pass
        outputs = subspace(x, coeffs)
        assert subspace._stack.runs(x) == "batched"
        one = subspace(x, coeffs[1])
        assert_as_exact("second", outputs[1], one, one.double())


def test_parameters_without_gradient_have_none_either_way():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    subspace = make(net, Line())
    c = torch.tensor([0.25, 0.75])
    for coeffs in (c, c.expand(3, 2)):  # one point, and several in one pass
        subspace.anchors.grad = None
        loss = [F.cross_entropy(output, y) for output in subspace(x, coeffs).view(-1, 9, 3)]
        torch.stack(loss).mean().backward()
        subspace.move_to_(c).point_grad.zero_()
        F.cross_entropy(subspace.model(x), y).backward()
        fused = c[:, None] * subspace.point_grad
        assert not subspace.layout.views(fused)["0.weight"].any() and fused.any()
        assert_as_exact("anchors", subspace.anchors.grad, fused, fused.double())


def test_a_layerwise_draw_is_one_per_module(net):
    subspace = make(net, Line(), layerwise=True).draw_()
    t = dict(zip(subspace.layout.names, subspace.coeffs[0, :, 1].tolist(), strict=True))
    assert t["conv.weight"] == t["conv.bias"] and t["norm.weight"] == t["norm.bias"]
    modules = {name.rpartition(".")[0] for name in subspace.layout.names}
    assert len(set(t.values())) == len(modules)


def test_training_in_a_random_plane(net, rows):
    """All anchors are fixed, and the coefficients are what is trained."""
    x, y = rows
    layout = FlatLayout(net)
    directions = torch.randn(3, layout.P, dtype=torch.float64) * layout.mask
    directions /= directions.norm(dim=1, keepdim=True)
    subspace = Subspace(net, [net, *directions], Simplex(4), trained=[False] * 4)
    assert subspace.anchors.shape == (0, layout.P)
    d = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimiser = torch.optim.SGD([d], lr=0.5)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = F.cross_entropy(subspace(x, offset(d)), y)
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    assert losses[-1] < losses[0]
    leaves = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    start = F.cross_entropy(functional_call(net, leaves, (x,)), y)
    g = layout.flatten(dict(zip(leaves, torch.autograd.grad(start, leaves.values()), strict=True)))
    again = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(F.cross_entropy(subspace(x, offset(again)), y), again)[0]
    assert_as_exact("dC = A g", found, directions @ g, directions @ g)


@pytest.mark.parametrize("trained", [None, [False, True, False]])
def test_functional_transforms(rows, trained):
    x, y = rows
    torch.manual_seed(0)
    subspace = make(Mixture(batch_norm=False), Bezier(3), trained=trained)
    wide = copy.deepcopy(subspace).double()
    anchors = 2 * subspace.anchors.detach()  # other values than the subspace has
    c = torch.tensor([0.2, 0.5, 0.3])

    def loss(anchors, c):
        module = wide if anchors.dtype == torch.float64 else subspace
        output = functional_call(module, {"anchors": anchors}, (x, c))
        return F.cross_entropy(output, y)

    def exact(anchors, c):
        leaves = [t.detach().clone().requires_grad_() for t in (anchors, c)]
        return torch.autograd.grad(loss(*leaves), leaves)

    plain, truth = exact(anchors, c), exact(anchors.double(), c.double())
    both = torch.func.grad(loss, (0, 1))
    for name, *three in zip(("anchors", "coeffs"), both(anchors, c), plain, truth, strict=True):
        assert_as_exact(name, *three)
    many = torch.stack([c, c.flip(0)])
    alone = [torch.stack(each) for each in zip(*(exact(anchors, row) for row in many), strict=True)]
    wide_many = [exact(anchors.double(), row.double()) for row in many]
    truth_many = [torch.stack(each) for each in zip(*wide_many, strict=True)]
    batched = torch.func.vmap(both, (None, 0))(anchors, many)
    for three in zip(batched, alone, truth_many, strict=True):
        assert_as_exact("vmap", *three)
    _, slope = torch.func.jvp(lambda c: loss(anchors, c), (c,), (torch.eye(3)[1],))
    assert_as_exact("jvp", slope, plain[1][1], truth[1][1])


def test_compiled_in_one_graph(net, rows):
    x, y = rows
    subspace = make(net, Simplex(3), trained=[True, False, True])
    c = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    compiled = torch.compile(subspace, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (subspace, compiled):
        output = call(x, c)
        grads.append(torch.autograd.grad(F.cross_entropy(output, y), subspace.anchors)[0])
    assert_as_exact("gradient", grads[1], grads[0], grads[0])
    assert compiled(x).shape == output.shape  # a draw, inside the graph
    fused = torch.compile(subspace.model, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the second time at another point, without compiling again
        subspace.draw_()
        found, exact = fused(x).detach(), subspace.model(x).detach()
        assert_as_exact("model", found, exact, exact)


def test_starts(net):
    copies = Subspace(net, 3, Simplex(3), start="copies")
    assert torch.equal(copies.anchors, copies.layout.flatten(net).expand(3, -1))

    def seed():
        return torch.Generator().manual_seed(7)

    state = torch.get_rng_state()
    first = Subspace(net, 3, Simplex(3), generator=seed())
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers stay
    assert torch.equal(first.anchors, Subspace(net, 3, Simplex(3), generator=seed()).anchors)
    assert torch.equal(first.anchors[0], copies.anchors[0])
    for name, view in first.layout.views(first.anchors.detach()).items():
        same = [torch.equal(view[i], view[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert all(same) == any(same) == ("norm" in name or name.startswith("body.1")), name
    torch.manual_seed(3)
    assert not torch.equal(Subspace(net, 3, Simplex(3)).anchors, first.anchors)
    given = Subspace(net, [first.model, copies.anchors[0].detach(), net.state_dict()], Simplex(3))
    assert torch.equal(given.anchors[1], given.anchors[2])


def test_refusals(net, rows):
    x, _ = rows
    subspace = make(net, Line(), layerwise=True)
    L = len(subspace.layout)
    with pytest.raises(ValueError, match=r"coefficients must be of K = 3 anchors; got Line"):
        Subspace(net, 3, Line())
    with pytest.raises(ValueError, match="trained must be K = 2 booleans; got"):
        Subspace(net, 2, Line(), trained=[True])
    with pytest.raises(ValueError, match="anchors must be K of at least 1, or K networks; got 0"):
        Subspace(net, 0, Line())
    with pytest.raises(ValueError, match="start must be one of .*; got 'same'"):
        Subspace(net, 2, Line(), start="same")
    bare = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="made of modules with reset_parameters.*pass a list of K"):
        Subspace(bare, 2, Line())
    with pytest.raises(TypeError, match=r"Subspace.mix: coeffs must be a Tensor \[M, K\]"):
        subspace.mix([0.5, 0.5])
    for shape in ((3,), (2, L + 1, 2), (1, 1, 1, 2)):
        with pytest.raises(ValueError, match=r"coeffs must be \[K\], \[M, K\] or \[M, L, K\] with"):
            subspace.mix(torch.zeros(shape))
    for call in (subspace.move_to_, subspace.network):
        with pytest.raises(ValueError, match=r"coeffs must be one point: \[K\] or \[L, K\] with L"):
            call(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"must be \[K\] in a subspace that is not layer-wise"):
        make(net, Line()).move_to_(torch.zeros(L, 2))
    with pytest.raises(ValueError, match="points must be None unless points are drawn in training"):
        subspace.eval()(x, points=2)
