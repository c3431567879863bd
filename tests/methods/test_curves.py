"""Curves against autograd on the curve point, written out by hand."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from methods.problem import ROWS, plain, rows
from methods.test_cyclic import CONFIG, deterministic, normed
from methods.test_resume import interrupt_after, numbers
from torch import nn
from torch.func import functional_call

from landscape_fast.methods import TrainConfig, TrainingInterrupted, fit, train_curve
from landscape_fast.methods.curves import KINDS, new_curve, straight_line
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.seeds import epoch_order
from landscape_fast.nn.coefficients import Bezier, PolyChain
from landscape_fast.nn.statistics import recalibrate_

SGD = dataclasses.replace(CONFIG, epochs=4, momentum=0.9, weight_decay=0.02, schedule="hold_linear")


def two(build=deterministic):
    networks = [build_member(build, CONFIG, stream, "cpu") for stream in range(2)]
    for stream, network in enumerate(networks):
        fit(network, *rows(), CONFIG, stream=stream, progress=False)
    return networks


def bernstein(t, bends):
    if bends == 1:
        return [(1 - t) ** 2, 2 * t * (1 - t), t**2]
    return [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]


def hats(t, bends):
    return [max(0.0, 1 - abs(t * (bends + 1) - k)) for k in range(bends + 2)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("kind", "bends"), [("bezier", 1), ("bezier", 2), ("polychain", 2)])
def test_training_is_autograd_on_the_curve_point(kind, bends, optimizer, monkeypatch):
    """functional_call on the combined tensors, the penalty on them, torch.optim on the bends."""
    config = dataclasses.replace(SGD, optimizer=optimizer, lr=0.05)
    start, end = (network.double() for network in two())
    x, y = rows()[0].double(), rows()[1]
    names = [name for name, _ in start.named_parameters()]
    first, last = (dict(network.named_parameters()) for network in (start, end))
    points = [
        [nn.Parameter(torch.lerp(first[n].data, last[n].data, j / (bends + 1))) for n in names]
        for j in range(1, bends + 1)
    ]
    ts = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def draw(self, count, **like):
        assert count == 1
        assert like["dtype"] == torch.float64
        return self.at(ts[done[-1] : done[-1] + 1])

    done = [0]  # steps, after each
    monkeypatch.setattr(KINDS[kind], "draw", draw)
    options = {"kind": kind, "bends": bends, "progress": False}
    trained = train_curve(start, end, x, y, config, **options, on_step=done.append)
    bent = [p for point in points for p in point]
    if optimizer == "sgd":
        other = torch.optim.SGD(bent, lr=0.05, momentum=0.9, nesterov=True)
    else:
        other = torch.optim.Adam(bent, lr=0.05)
    step = 0
    for epoch in range(4):
        for batch in epoch_order(ROWS, config.seed, 0, epoch).split(16):
            for group in other.param_groups:
                group["lr"] = 0.05 * config.lr_factor(step, 4)
            t = float(ts[step])
            cs = bernstein(t, bends) if kind == "bezier" else hats(t, bends)
            tensors = {
                n: cs[0] * first[n].detach()
                + sum(c * point[i] for c, point in zip(cs[1:-1], points, strict=True))
                + cs[-1] * last[n].detach()
                for i, n in enumerate(names)
            }
            loss = F.cross_entropy(functional_call(start, tensors, (x[batch],)), y[batch])
            loss = loss + 0.5 * 0.02 * sum(w.square().sum() for w in tensors.values())
            other.zero_grad()
            loss.backward()
            other.step()
            step += 1
    curve = trained.subspace
    for row, point in zip(curve.anchors, points, strict=True):
        for got, want in zip(curve.layout.views(row).values(), point, strict=True):
            torch.testing.assert_close(got.detach(), want.detach())


def test_the_ends_do_not_move_and_the_bends_begin_on_the_chord():
    start, end = two()
    before = [copy.deepcopy(network.state_dict()) for network in (start, end)]
    curve = new_curve(start, end, kind="polychain", bends=3)
    assert isinstance(curve.coefficients, PolyChain) and curve.coefficients.anchors == 5
    ends = curve.layout.flatten_many([start, end])
    for j, row in enumerate(curve.anchors, 1):
        torch.testing.assert_close(row.detach(), torch.lerp(ends[0], ends[1], j / 4))
    trained = train_curve(start, end, *rows(), SGD, progress=False).subspace
    assert isinstance(trained.coefficients, Bezier)
    assert torch.equal(trained.fixed, ends)
    chord = (ends[0] + ends[1]) / 2
    assert float((trained.anchors[0].detach() - chord).norm()) > 0.1
    x = rows()[0]
    for t, network in ((0.0, start), (1.0, end)):
        reached = trained.network(trained.coefficients.at(torch.tensor(t)))
        torch.testing.assert_close(reached(x), network(x), rtol=0, atol=0)
    for network, state in zip((start, end), before, strict=True):
        torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [3, 8])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, steps):
    """With dropout: draws and masks come from the one generator that the checkpoint holds."""
    start, end = two(plain)

    def train(**options):
        torch.manual_seed(steps)
        return train_curve(start, end, *rows(), SGD, progress=False, **options)

    expected = train()
    with pytest.raises(TrainingInterrupted):
        train(directory=tmp_path, on_step=interrupt_after(steps))
    done = []
    resumed = train(directory=tmp_path, resume=True, on_step=done.append)
    assert len(done) == 16 - steps
    assert torch.equal(resumed.subspace.anchors, expected.subspace.anchors)
    assert numbers(resumed.histories) == numbers(expected.histories)
    assert resumed.seconds[0] > 0
    turned = copy.deepcopy(start)
    with torch.no_grad():
        next(turned.parameters()).neg_()  # another network of the same norm
    for ends in ((end, start), (turned, end)):
        with pytest.raises(ValueError, match="checkpoint must be of this configuration; got ends"):
            train_curve(*ends, *rows(), SGD, directory=tmp_path, resume=True, progress=False)


@pytest.mark.gpu
def test_on_a_gpu_too(tmp_path):
    start, end = (network.cuda() for network in two(normed))
    expected = train_curve(start, end, *rows(), SGD, progress=False)
    assert expected.subspace.anchors.is_cuda
    options = {"directory": tmp_path, "progress": False}
    with pytest.raises(TrainingInterrupted):
        train_curve(start, end, *rows(), SGD, **options, on_step=interrupt_after(6))
    resumed = train_curve(start, end, *rows(), SGD, **options, resume=True)
    assert torch.equal(resumed.subspace.anchors, expected.subspace.anchors)


def test_a_norm_on_the_curve_needs_its_statistics():
    start, end = two(normed)
    x = rows()[0]
    curve = train_curve(start, end, *rows(), SGD, progress=False).subspace
    network = curve.network(curve.coefficients.at(torch.tensor(0.5)))
    with pytest.raises(RuntimeError, match="running statistics must be of the weights"):
        network.eval()(x)
    recalibrate_(network, x)
    hidden = network[0](x).detach()
    torch.testing.assert_close(network[1].running_mean, hidden.mean(0), rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_refused():
    start, end = two()
    cases = [
        ({"kind": "arc"}, SGD, "new_curve: kind must be one of .*; got 'arc'"),
        ({"bends": 0}, SGD, "new_curve: bends must be an integer of at least 1; got 0"),
        ({}, TrainConfig(optimizer="adamw"), "train_curve: config.optimizer must be 'sgd' or 'ad"),
        ({}, TrainConfig(member_batches="own"), "train_curve: config.member_batches must be 'sha"),
    ]
    for options, config, message in cases:
        with pytest.raises(ValueError, match=message):
            train_curve(start, end, *rows(), config, progress=False, **options)
    with pytest.raises(ValueError, match="straight_line: end must be a network like start"):
        straight_line(start, nn.Linear(2, 3))
