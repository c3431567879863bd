"""Optimisers of subspaces: what autograd and torch.optim do, with and without penalties."""

import pytest
import torch
import torch.nn.functional as F
from methods.anchor_problem import (
    KINDS,
    RULES,
    fused,
    plain,
    problem,
    run,
    subspace,
    weights_only,
)

from landscape_fast.methods.anchor_optim import AnchorSGD
from landscape_fast.testing import assert_as_exact

# every rule on a line, and the two that differ most on everything else
CASES = [(rule, "line") for rule in RULES]
CASES += [(rule, kind) for rule in ("dampening", "adamw") for kind in list(KINDS)[1:]]


def compare(kind, rule, **penalties):
    lr = 0.005 if "adam" in rule else 0.05
    truth = plain(kind, rule, torch.float64, lr, **penalties)
    exact = fused(kind, rule, torch.float64, lr, **penalties)
    # float64 noise, grown over 50 steps
    torch.testing.assert_close(exact, truth, rtol=1e-9, atol=1e-11)
    got, peer = (f(kind, rule, torch.float32, lr, **penalties) for f in (fused, plain))
    assert_as_exact(f"{rule} on a {kind}", got, peer, truth)
    return truth


@pytest.mark.parametrize("rule, kind", CASES)
def test_equal_to_autograd_and_torch_optim(rule, kind):
    compare(kind, rule)


@pytest.mark.parametrize("rule, kind", [("decay", "line"), ("adam", "layer-wise simplex")])
def test_penalties_equal_those_of_autograd(rule, kind):
    """Large enough to matter: without them the anchors would end elsewhere."""
    penalties = {"cos2": 2.0, "curve_l2": 0.1}
    truth = compare(kind, rule, **penalties)
    lr = 0.005 if "adam" in rule else 0.05
    for name in penalties:
        less = plain(kind, rule, torch.float64, lr, **{name: penalties[name]})
        assert (less - truth).abs().max() > 1e-4


def test_penalties_with_fixed_ends():
    compare("curve with fixed ends", "momentum", cos2=2.0, curve_l2=0.1)


# -- the Gram matrix -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gram_is_that_of_the_weights_of_layers(kind):
    space = subspace(kind)
    with_penalty, without = AnchorSGD(space, 0.1, cos2=1.0), AnchorSGD(space, 0.1)

    def truth():
        every = space.anchors if space.fixed is None else torch.cat([space.anchors, space.fixed])
        rows = weights_only(space, every.detach().double())
        return rows @ rows.T

    for optimizer in (with_penalty, without):
        torch.testing.assert_close(optimizer.gram, truth(), rtol=1e-12, atol=1e-12)
        run(space, optimizer)
        torch.testing.assert_close(optimizer.gram, truth(), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            space.anchors.mul_(1.5)  # behind its back
        torch.testing.assert_close(optimizer.gram, truth(), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_a_cuda_graph_of_a_whole_step_equals_the_steps_one_by_one():
    """Draw, network, backward, gather, step: no synchronisation, and a schedule on the device."""
    x, y = (t[0] for t in problem(device="cuda"))
    results = []
    for graphed in (False, True):
        space = subspace("layer-wise simplex", device="cuda").train()
        lr = torch.tensor(0.0, device="cuda")
        optimizer = AnchorSGD(space, lr, momentum=0.9, cos2=1.0)

        def step(space=space, optimizer=optimizer):
            optimizer.zero_grad()
            space.draw_()
            F.cross_entropy(space.model(x), y).backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        torch.cuda.manual_seed(5)
        for i in range(4):
            lr.fill_(0.1 / (i + 1))
            graph.replay() if graphed else step()
        results.append(space.anchors.detach().clone())
    torch.testing.assert_close(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_as_on_the_cpu(kind):
    options = {"cos2": 1.0, "curve_l2": 0.1} if kind != "layer-wise simplex" else {"curve_l2": 0.1}
    truth = plain(kind, "decay", torch.float64, **options)
    got = fused(kind, "decay", torch.float32, device="cuda", **options).cpu()
    # cuDNN rounds otherwise than the CPU: float32 noise, grown over 50 steps
    torch.testing.assert_close(got, truth.float(), rtol=1e-3, atol=1e-4)
