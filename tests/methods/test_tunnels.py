"""Tunnels against training by hand: each node by itself, and in coordinates of its hyperplane."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from methods.problem import ROWS, batch_ensemble, plain, rows
from methods.test_curves import SGD, two
from methods.test_cyclic import deterministic, normed
from methods.test_resume import interrupt_after, numbers
from torch import nn
from torch.func import functional_call

from landscape_fast.landscape import (
    along_path,
    curvature_along,
    project,
    radial_map,
    wedge_map,
)
from landscape_fast.methods import (
    TrainingInterrupted,
    curve_statistics,
    find_tunnel,
    fit,
    straight_line,
)
from landscape_fast.methods.seeds import epoch_order
from landscape_fast.methods.trainer import Diverged
from landscape_fast.nn import FlatLayout
from landscape_fast.nn.geometry import radial_plane
from landscape_fast.ops import gram

NODES = 3
QUIET = {"nodes": NODES, "progress": False}


def ends(build=deterministic):
    return [network.double() for network in two(build)]


def problem():
    x, y = rows()
    return x.double(), y


def start_of(networks, node):
    """A network at node 1, 2, ... of the straight line."""
    found = copy.deepcopy(networks[0])
    for name, p in found.named_parameters():
        first, last = (dict(network.named_parameters())[name].data for network in networks)
        p.data = torch.lerp(first, last, node / (NODES + 1))
    return found


@pytest.mark.parametrize("together", ["batched", "loop", "auto"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_without_a_constraint_every_node_is_trained_by_itself(optimizer, together):
    networks, config = ends(), dataclasses.replace(SGD, optimizer=optimizer, lr=0.05)
    given = [copy.deepcopy(network.state_dict()) for network in networks]
    trained = find_tunnel(*networks, *problem(), config, together=together, stream=1, **QUIET)
    layout = FlatLayout(networks[0])
    torch.testing.assert_close(trained.t, torch.linspace(0, 1, NODES + 2).double())
    assert torch.equal(trained.weights[[0, -1]], layout.flatten_many(networks))
    for node in range(1, NODES + 1):
        other = start_of(networks, node)
        history = fit(other, *problem(), config, stream=NODES + node - 1, progress=False)
        torch.testing.assert_close(trained.weights[node], layout.flatten(other))
        for got, want in zip(trained.histories[node - 1], history, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-9)
    for network, state in zip(networks, given, strict=True):
        torch.testing.assert_close(dict(network.state_dict()), dict(state), rtol=0, atol=0)


def complement(direction):
    """[P, P - 1], an orthonormal basis of the hyperplane at right angles."""
    u, s, v = torch.linalg.svd(direction[None])
    return v[1:].T


@pytest.mark.parametrize("together", ["batched", "loop"])
def test_within_a_hyperplane_it_is_descent_in_its_coordinates(together):
    """torch.optim.SGD with momentum on z, the weights w0 + B z, their decay as a penalty."""
    networks, layout = ends(), FlatLayout(ends()[0])
    trained = find_tunnel(
        *networks, *problem(), SGD, constrain="hyperplane", together=together, **QUIET
    )
    first, last = layout.flatten_many(networks)
    basis, (x, y) = complement(last - first), problem()
    for node in range(1, NODES + 1):
        origin = torch.lerp(first, last, node / (NODES + 1))
        z = nn.Parameter(origin.new_zeros(len(first) - 1))
        optimizer = torch.optim.SGD([z], lr=SGD.lr, momentum=SGD.momentum, nesterov=True)
        step = 0
        for epoch in range(SGD.epochs):
            for batch in epoch_order(ROWS, SGD.seed, node - 1, epoch).split(SGD.batch_size):
                optimizer.param_groups[0]["lr"] = SGD.lr * SGD.lr_factor(step, 4)
                weights = origin + basis @ z
                logits = functional_call(networks[0], layout.views(weights), (x[batch],))
                loss = F.cross_entropy(logits, y[batch])
                optimizer.zero_grad()
                (loss + 0.5 * SGD.weight_decay * weights.square().sum()).backward()
                optimizer.step()
                step += 1
        torch.testing.assert_close(trained.weights[node], (origin + basis @ z).detach())


@pytest.mark.parametrize("together", ["batched", "loop"])
def test_moments_of_adam_are_of_the_projected_gradient(together):
    config = dataclasses.replace(SGD, optimizer="adam", lr=0.05, weight_decay=0.0, epochs=2)
    networks, layout = ends(), FlatLayout(ends()[0])
    options = {"constrain": "hyperplane", "together": together} | QUIET
    trained = find_tunnel(*networks, *problem(), config, **options)
    first, last = layout.flatten_many(networks)
    normal, (x, y) = (last - first) / (last - first).norm(), problem()
    for node in range(1, NODES + 1):
        w = nn.Parameter(torch.lerp(first, last, node / (NODES + 1)))
        level = w.detach() @ normal
        optimizer, step = torch.optim.Adam([w], lr=config.lr), 0
        for epoch in range(config.epochs):
            for batch in epoch_order(ROWS, config.seed, node - 1, epoch).split(config.batch_size):
                optimizer.param_groups[0]["lr"] = config.lr * config.lr_factor(step, 4)
                logits = functional_call(networks[0], layout.views(w), (x[batch],))
                optimizer.zero_grad()
                F.cross_entropy(logits, y[batch]).backward()
                w.grad -= (w.grad @ normal) * normal
                optimizer.step()
                w.data += (level - w.data @ normal) * normal
                step += 1
        torch.testing.assert_close(trained.weights[node], w.detach())


@pytest.mark.parametrize("together", ["batched", "loop"])
def test_nodes_stay_in_their_hyperplanes_in_float32(together):
    networks = two()
    config = dataclasses.replace(SGD, optimizer="adam", lr=0.1, epochs=10)
    options = {"constrain": "hyperplane", "together": together} | QUIET
    trained = find_tunnel(*networks, *rows(), config, **options)
    weights = trained.weights.double()
    chord = weights[-1] - weights[0]
    share = (weights - weights[0]) @ chord / (chord @ chord)
    # after 40 steps they are off by the rounding of one
    torch.testing.assert_close(share, trained.t, rtol=0, atol=2e-7)
    moved = weights - torch.lerp(weights[0], weights[-1], trained.t[:, None])
    assert float(moved[1:-1].norm(dim=1).min()) > 0.5


def test_parameters_that_are_not_trained_stay_on_the_line():
    networks = ends()
    for network in networks:
        network[0].bias.requires_grad_(False)
    trained = find_tunnel(*networks, *problem(), SGD, constrain="hyperplane", **QUIET)
    views = FlatLayout(networks[0]).views(trained.weights)
    line = torch.lerp(*views["0.bias"][[0, -1]], trained.t[:, None])
    torch.testing.assert_close(views["0.bias"], line)
    moving = torch.cat([v.flatten(1) for n, v in views.items() if n != "0.bias"], 1)
    chord = moving[-1] - moving[0]
    share = (moving - moving[0]) @ chord / (chord @ chord)
    torch.testing.assert_close(share, trained.t)


def test_a_tunnel_is_lower_than_the_straight_line():
    networks, (x, y) = ends(), problem()
    config = dataclasses.replace(SGD, epochs=20, weight_decay=0.0, lr=0.1)
    for constrain in (None, "hyperplane"):
        tunnel = find_tunnel(*networks, x, y, config, constrain=constrain, **QUIET)
        found = along_path(networks[0], tunnel.weights, x, y, progress=False)
        line = along_path(networks[0], networks, x, y, per_segment=16, progress=False)
        assert found.summary().barrier < 0.7 * line.summary().barrier
        assert bool((found.loss[4:-1:4] < line.loss[4:-1:4]).all())  # at the nodes


def test_a_tunnel_is_a_curve():
    networks, (x, y) = ends(), problem()
    tunnel = find_tunnel(*networks, x, y, SGD, **QUIET)
    curve = curve_statistics(tunnel.curve(networks[0]), x, y, points=9, progress=False)
    found = along_path(networks[0], tunnel.weights, x, y, per_segment=2, progress=False)
    torch.testing.assert_close(curve.loss, found.loss, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(curve.length, found.length)
    assert len(tunnel.seconds) == NODES and min(tunnel.seconds) > 0


def test_networks_with_batch_norms():
    networks, (x, y) = ends(normed), problem()
    tunnel = find_tunnel(*networks, x, y, SGD, constrain="hyperplane", **QUIET)
    found = along_path(networks[0], tunnel.weights, x, y, calibration=x, progress=False)
    line = along_path(networks[0], networks, x, y, calibration=x, per_segment=16, progress=False)
    assert float(found.loss.max()) < float(line.loss.max())
    line = straight_line(*networks)  # whose networks may not be evaluated as they are
    guarded = [line.network(torch.tensor(at)) for at in ([1.0, 0.0], [0.0, 1.0])]
    for together in ("batched", "loop"):
        options = {"constrain": "hyperplane", "together": together} | QUIET
        again = find_tunnel(*guarded, x, y, SGD, **options)
        torch.testing.assert_close(again.weights, tunnel.weights)


@pytest.mark.parametrize("steps", [2, 5, 8])
@pytest.mark.parametrize("together", ["batched", "loop"])
@pytest.mark.parametrize("constrain", [None, "hyperplane"])
def test_interrupted_and_resumed_equals_uninterrupted(constrain, together, steps, tmp_path):
    networks, config = two(plain), dataclasses.replace(SGD, epochs=3)  # with dropout
    given = (*networks, *rows(), config)
    options = {"constrain": constrain, "together": together} | QUIET
    whole = find_tunnel(*given, **options)
    with pytest.raises(TrainingInterrupted, match="tunnel of 3 nodes") as caught:
        find_tunnel(*given, directory=tmp_path, on_step=interrupt_after(steps), **options)
    assert caught.value.checkpoint == tmp_path / "tunnel-000.pt"
    found = find_tunnel(*given, directory=tmp_path, resume=True, **options)
    assert torch.equal(found.weights, whole.weights)
    assert numbers(found.histories) == numbers(whole.histories)
    other = {"constrain": "hyperplane" if constrain is None else None}
    with pytest.raises(ValueError, match="checkpoint must be of this configuration"):
        find_tunnel(*given, directory=tmp_path, resume=True, **(options | other))
    with pytest.raises(ValueError, match="checkpoint must be of this configuration"):
        find_tunnel(*given[1::-1], *given[2:], directory=tmp_path, resume=True, **options)


@pytest.mark.parametrize("together", ["batched", "loop"])
def test_a_node_that_diverges_is_an_error_that_names_it(together):
    """At its third quarter of the way a logit overflows; the other nodes go on to the end."""
    networks = [nn.Linear(2, 3) for _ in range(2)]
    for network, value in zip(networks, (0.0, 2.4e38), strict=True):
        network.weight.data.copy_(torch.tensor([[value], [0.0], [0.0]]))
    x, y = torch.ones(20, 2), torch.zeros(20, dtype=torch.int64)
    done: list[int] = []
    options = {"constrain": "hyperplane", "together": together, "on_step": done.append} | QUIET
    with pytest.raises(Diverged, match="got loss nan in epoch 1 for node 3 of 3; lower the learn"):
        find_tunnel(*networks, x, y, SGD, **options)
    assert done[-1] == 2 * SGD.epochs


@pytest.mark.gpu
def test_on_a_gpu_too(tmp_path):
    """The tunnel, resumed, and all that is measured along it and around it."""
    networks, config = [network.cuda() for network in two(normed)], SGD
    options = {"constrain": "hyperplane", "together": "batched"} | QUIET
    whole = find_tunnel(*networks, *rows(), config, **options)
    with pytest.raises(TrainingInterrupted):
        interrupt = {"directory": tmp_path, "on_step": interrupt_after(6)}
        find_tunnel(*networks, *rows(), config, **interrupt, **options)
    found = find_tunnel(*networks, *rows(), config, directory=tmp_path, resume=True, **options)
    assert found.weights.is_cuda and torch.equal(found.weights, whole.weights)
    weights, here = found.weights, found.weights.cpu()
    device, host = networks[0], copy.deepcopy(networks[0]).cpu()
    (x, y), quiet = rows(), {"progress": False}
    for measure in (along_path, wedge_map, lambda net, w, *given, **o: radial_map(
        net, w[[0, -1]], *given, points=4, around=project(w, w[:2], radial_plane(gram(w[:2]))).at,
        **o)):  # fmt: skip
        got = measure(device, weights, x, y, calibration=x, **quiet)
        want = measure(host, here, x, y, calibration=x, **quiet)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-3, atol=1e-4)
    curvature = [
        curvature_along(net, lambda a, b, w=w: w[a:b], 3, x, y, samples=4, calibration=x, **quiet)
        for net, w in ((device, weights), (host, here))
    ]
    for got, want in zip(*curvature, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_refuses():
    networks, (x, y) = two(), rows()
    cases = [
        ({"nodes": 0}, "nodes must be an integer of at least 1; got 0"),
        ({"constrain": "plane"}, r"constrain must be one of \(None, 'hyperplane'\); got 'plane'"),
        ({"together": True}, r"together must be one of .*; got True"),
        ({"stream": -1}, "stream must be an integer of at least 0; got -1"),
        ({"end": nn.Linear(2, 3)}, "end must be a network like start; got Linear"),
        (
            {"end": copy.deepcopy(networks[0]), "constrain": "hyperplane"},
            "end must be another point than start for a hyperplane; got start",
        ),
        ({"y": y.float()}, "y must be int64"),
        (
            {"start": batch_ensemble(), "end": batch_ensemble()},
            r"start must be a network that maps .* to \[B, C\]; got one that makes \[3, 1, 3\]",
        ),
        (
            {"config": dataclasses.replace(SGD, member_batches="own")},
            "config.member_batches must be 'shared'; got 'own'",
        ),
    ]
    for change, match in cases:
        given = {"start": networks[0], "end": networks[1], "x": x, "y": y, "config": SGD} | change
        with pytest.raises(ValueError, match=f"find_tunnel: {match}"):
            find_tunnel(**given, progress=False)
