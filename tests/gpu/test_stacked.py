"""Stacked networks and sweeps on a GPU: agreement, random streams, a step in a CUDA graph."""

import copy

import pytest
import torch
from nn.stacked_networks import SEEDS, B, M, networks, transformer
from torch import nn

from landscape_fast.methods import sweep
from landscape_fast.models import MLP, ResNet, SmallCNN
from landscape_fast.nn import FlatLayout, StackedEnsemble
from landscape_fast.testing import assert_as_exact

pytestmark = pytest.mark.gpu
BUILD = {
    "mlp": (lambda: MLP(64, (32,)), (64,)),
    "smallcnn": (lambda: SmallCNN(dropout=0), (3, 32, 32)),
    "resnet": (lambda: ResNet(blocks=1), (3, 32, 32)),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BUILD)
def test_agrees_with_separate_networks(name, train):
    build, shape = BUILD[name]
    found = [network.cuda() for network in networks(build, train, torch.float32)]
    x = torch.randn(16, *shape, device="cuda")
    stack = StackedEnsemble(found)
    assert stack.runs(x) == "batched"
    exact = copy.deepcopy(found)
    y = stack(x)
    truth = torch.stack([network.double()(x.double()) for network in exact])
    plain = torch.stack([network(x) for network in found])
    assert_as_exact("results", y, plain, truth)
    incoming = torch.randn_like(y)
    y.backward(incoming)
    plain.backward(incoming)
    truth.backward(incoming.double())
    names = [key for key, _ in stack.model.named_parameters()]
    own = torch.cat([p.grad.flatten() for p in stack.model.parameters()])
    others = [
        torch.cat([torch.stack([n.get_parameter(k).grad for n in s]).flatten() for k in names])
        for s in (found, exact)
    ]
    assert_as_exact("gradients", own, *others)
    for key, own in stack.model.named_buffers():
        want = torch.stack([network.get_buffer(key) for network in found])
        torch.testing.assert_close(own, want)


def test_a_transformer_runs_batched_but_for_its_attention():
    found = [network.cuda() for network in networks(transformer, False, torch.float32)]
    x = torch.randint(11, (B, 5), device="cuda")
    stack = StackedEnsemble(found)
    assert stack.runs(x) == "batched" and len(stack.looped) == 2
    torch.testing.assert_close(stack(x), torch.stack([network(x) for network in found]))


def test_streams_in_a_loop_are_those_of_separate_runs():
    layer, x = nn.Dropout(0.5), torch.ones(B, 50, device="cuda")
    stack = StackedEnsemble([layer] * M, how="loop").seed_members_(SEEDS)
    before = torch.cuda.get_rng_state()
    y = stack(x)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for m, seed in enumerate(SEEDS):
        torch.cuda.manual_seed(seed)
        assert torch.equal(y[m], layer(x))
    state = stack.streams.state()
    second = stack(x)
    stack.streams.load(state)
    assert torch.equal(stack(x), second) and not torch.equal(second, y)


def test_a_captured_step_trains_as_an_eager_one():
    found = [network.cuda() for network in networks(BUILD["resnet"][0], True, torch.float32)]
    stack = StackedEnsemble(found)
    batches = torch.randn(4, 16, 3, 32, 32, device="cuda")
    static = batches[0].clone()

    def make(one):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.01)

        def step():
            optimizer.zero_grad(set_to_none=False)
            one(static).square().mean().backward()
            optimizer.step()

        return step

    stack(static)  # tries out whether the network can be batched
    eager = copy.deepcopy(stack)
    step, other = make(stack), make(eager)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
            other()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for rows in batches[1:]:
        static.copy_(rows)
        graph.replay()
        other()
    for own, want in zip(stack.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own, want)


def test_a_sweep_takes_several_models_per_pass():
    model = ResNet(blocks=1).cuda()
    layout = FlatLayout(model)
    ends = layout.flatten_many([model, ResNet(blocks=1).cuda()])
    t = torch.linspace(0, 1, 21, device="cuda")[:, None]
    x, y = torch.randn(70, 3, 32, 32), torch.arange(70) % 10
    results = []
    for per_pass in (1, "auto"):
        results.append(
            sweep(
                model,
                lambda start, stop: torch.lerp(ends[:1], ends[1:], t[start:stop]),
                21,
                x,
                y,
                calibration=x[:50],
                per_pass=per_pass,
                keep_logits=True,
                progress=False,
            )
        )
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-3, atol=1e-3)
