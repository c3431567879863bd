"""Subspaces on a GPU: views after a move there, agreement with the CPU, steps in a CUDA graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape_fast.methods import AnchorSGD
from landscape_fast.nn import Bezier, Line, PolyChain, Simplex, Subspace
from landscape_fast.nn.coefficients import line

pytestmark = pytest.mark.gpu
RECIPE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "cos2": 1.0}


def make(coefficients, **options):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 64, 5),
    )  # fmt: skip
    return Subspace(net, coefficients.anchors, coefficients, **options)


@pytest.fixture
def batches():
    torch.manual_seed(1)
    x, y = torch.randn(3, 16, 3, 8, 8), torch.randint(5, (3, 16))
    return list(zip(x.cuda(), y.cuda(), strict=True))


def step(subspace, optimizer, x, y):
    optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(subspace.model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"trained": [False, True, False]}])
def test_a_subspace_moves_to_the_gpu_and_computes_what_it_did(options, batches):
    x, y = batches[0]
    subspace = make(Simplex(3), **options).draw_()
    there = copy.deepcopy(subspace).cuda()
    torch.testing.assert_close(there.point.cpu(), subspace.point)
    views = there.layout.views(there.point)
    for name, p in there.model.named_parameters():
        assert p.is_cuda and p.data_ptr() == views[name].data_ptr(), name
    for one, rows, classes in ((subspace, x.cpu(), y.cpu()), (there, x, y)):
        F.cross_entropy(one.model(rows), classes).backward()
    torch.testing.assert_close(there.point_grad.cpu(), subspace.point_grad, rtol=1e-3, atol=1e-5)
    before = there.point.clone()
    there.draw_()
    assert not torch.equal(before, there.point)
    mixed = there.mix(there.coeffs[..., [there.order.index(k) for k in range(3)]])
    torch.testing.assert_close(there.point, mixed[0].detach())


def captured(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def test_a_captured_step_trains_as_an_eager_one(batches):
    """Point, forward, backward and the optimiser in one graph: nothing depends on the host."""
    subspace = make(Line()).cuda()
    start, optimizer = copy.deepcopy(subspace.state_dict()), AnchorSGD(subspace, **RECIPE)
    x, y = (t.clone() for t in batches[0])
    t = torch.tensor(0.5, device="cuda")

    def run():
        subspace.move_to_(line(t))
        step(subspace, optimizer, x, y)

    graph = captured(run)
    subspace.load_state_dict(start)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    eager = copy.deepcopy(subspace)
    other = AnchorSGD(eager, **RECIPE)
    for i, (rows, classes) in enumerate(batches):
        x.copy_(rows)
        y.copy_(classes)
        t.fill_(i / 2)
        graph.replay()
        eager.move_to_(line(t))
        step(eager, other, rows, classes)
    torch.cuda.synchronize()
    torch.testing.assert_close(subspace.anchors, eager.anchors, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(subspace.coeffs, eager.coeffs)


@pytest.mark.parametrize("sampler", [Simplex(3), Bezier(3), PolyChain(3)], ids=repr)
def test_a_captured_draw_is_another_at_every_replay(sampler):
    subspace = make(sampler, layerwise=True).cuda()
    graph = captured(subspace.draw_)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(subspace.coeffs.clone())
        torch.testing.assert_close(subspace.point, subspace.mix(subspace.coeffs)[0].detach())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
