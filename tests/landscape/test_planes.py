"""Planes: every node of a grid against its definition, seen by a network that shows its weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from landscape.probe import CLASSES, ROWS, parameters, probes, seen
from torch import nn

from landscape_fast.landscape import (
    filter_normalised_map,
    grid_around,
    map_plane,
    project,
    radial_map,
    trajectory_map,
    triangle_map,
)
from landscape_fast.models import MLP, ResNet
from landscape_fast.nn import FlatLayout, recalibrate_
from landscape_fast.nn.geometry import Plane, plane, radial_plane
from landscape_fast.ops import gram, pairwise_divergence

QUIET = {"progress": False}
UNEVEN = [0.5, -2.0, 7.25, 0.0, 3.0]  # coordinates in any order


def gram_schmidt(a, b):
    u = a / a.norm()
    v = b - (b @ u) * u
    return u, v / v.norm()


def nodes_of(grid, origin, u, v):
    """[H, W, P], point by point."""
    return torch.stack([torch.stack([origin + x * u + y * v for x in grid[0]]) for y in grid[1]])


@pytest.mark.parametrize("per_pass", [1, 4])
@pytest.mark.parametrize("kind", ["three", "radial"])
def test_every_node_of_a_grid_is_where_it_says(kind, per_pass):
    model, anchors = probes(3)
    given, before = anchors.clone(), copy.deepcopy(model.state_dict())
    if kind == "three":
        origin, axes = anchors[0], plane(gram(anchors))
        u, v = gram_schmidt(anchors[1] - anchors[0], anchors[2] - anchors[0])
    else:
        origin, axes = torch.zeros_like(anchors[0]), radial_plane(gram(anchors))
        u, v = gram_schmidt(*anchors[:2])
    grid = UNEVEN, [1.0, -4.0, 2.5]
    options = {"per_pass": per_pass, "keep_logits": True} | QUIET
    found = map_plane(model.train(), anchors, axes, *grid, ROWS, CLASSES, **options)
    truth = nodes_of(grid, origin, u, v)
    assert found.loss.shape == (3, 5) and found.x.tolist() == UNEVEN
    torch.testing.assert_close(seen(found.logits), parameters(truth))
    torch.testing.assert_close(found.coeffs @ anchors, truth)
    loss = F.cross_entropy(parameters(truth).flatten(0, 1)[:, None].expand(15, 4, 6).mT,
                           CLASSES.expand(15, 4), reduction="none").mean(1)  # fmt: skip
    torch.testing.assert_close(found.loss.flatten(), loss)
    assert model.training and torch.equal(anchors, given)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_maps_begin_and_end_at_the_edges_of_their_grid():
    model, anchors = probes(3)
    kept = {"keep_logits": True, "points": (4, 3)} | QUIET
    found = triangle_map(model, anchors, ROWS, CLASSES, margin=0.5, **kept)
    u, v = gram_schmidt(anchors[1] - anchors[0], anchors[2] - anchors[0])
    at = found.anchors_at
    torch.testing.assert_close(at[0], torch.zeros(2).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(anchors[0] + at[:, :1] * u + at[:, 1:] * v, anchors)
    low, high = at.min(0).values, at.max(0).values
    for axis, values in enumerate((found.x, found.y)):
        width = high[axis] - low[axis]
        ends = torch.stack([low[axis] - width / 2, high[axis] + width / 2])
        torch.testing.assert_close(values[[0, -1]], ends)
        torch.testing.assert_close(values.diff(), values.diff().mean().expand(len(values) - 1))
    truth = nodes_of((found.x, found.y), anchors[0], u, v)
    torch.testing.assert_close(seen(found.logits), parameters(truth))


def test_a_radial_map_covers_the_origin_the_optima_and_what_else_is_shown():
    model, anchors = probes(2)
    around = torch.tensor([[9.0, -5.0], [2.0, 1.0]])
    kept = {"keep_logits": True, "points": 6} | QUIET
    found = radial_map(model, anchors, ROWS, CLASSES, margin=0.0, around=around, **kept)
    assert found.x[-1] == 9 and found.y[0] == -5 and found.x[0] <= 0 <= found.y[-1]
    torch.testing.assert_close(found.anchors_at.norm(dim=1), anchors.norm(dim=1))
    assert abs(found.anchors_at[0, 1]) < 1e-12 < found.anchors_at[1, 1]
    truth = nodes_of((found.x, found.y), torch.zeros_like(anchors[0]), *gram_schmidt(*anchors))
    torch.testing.assert_close(seen(found.logits), parameters(truth))
    plain = radial_map(model, anchors, ROWS, CLASSES, margin=0.0, points=2, agree_with=(), **QUIET)
    assert plain.agreement.shape == (0, 2, 2)
    assert plain.x[0] == 0 or plain.x[0] == found.anchors_at[1, 0]


def test_a_trajectory_map_shows_a_run_along_its_principal_directions():
    model, anchors = probes(5)
    kept = {"keep_logits": True, "points": (4, 3)} | QUIET
    found = trajectory_map(model, anchors, ROWS, CLASSES, margin=0.25, **kept)
    directions = torch.linalg.svd(anchors - anchors[-1], full_matrices=False).Vh[:2]
    u, v = directions * (directions @ (anchors[0] - anchors[-1])).sign()[:, None]
    at = (anchors - anchors[-1]) @ torch.stack([u, v], 1)
    torch.testing.assert_close(found.anchors_at, at)
    torch.testing.assert_close(project(anchors, anchors, found.plane).at, at)
    width = at[:, 0].max() - at[:, 0].min()
    torch.testing.assert_close(found.x[0], at[:, 0].min() - width / 4)
    truth = nodes_of((found.x, found.y), anchors[-1], u, v)
    torch.testing.assert_close(seen(found.logits), parameters(truth))
    assert found.agreement.shape == (1, 3, 4)


def networks(build):
    return [build().eval() for _ in range(3)]


def problem():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 1, 6, 6, generator=generator)
    return x, torch.arange(40) % 4


def test_at_an_anchor_the_map_is_that_network():
    """To the bit: the anchor's coefficients are 0 and 1, and so its agreement with itself."""
    nets, (x, y) = networks(lambda: MLP((1, 6, 6), (5,), classes=4)), problem()
    layout = FlatLayout(nets[0])
    anchors = layout.flatten_many(nets)
    axes = plane(gram(anchors))
    at = axes.coordinates(torch.eye(3).double(), gram(anchors))
    found = map_plane(nets[0], nets, axes, [0.0, float(at[1, 0])], [0.0], x, y,
                      agree_with=(0, 1, 2), keep_logits=True, **QUIET)  # fmt: skip
    for j in range(2):
        with torch.no_grad():
            assert torch.equal(found.logits[0, j], nets[j](x))
        assert found.agreement[j, 0, j] == 1
        assert found.accuracy[0, j] == (nets[j](x).argmax(1) == y).double().mean()
    logits = torch.stack([*found.logits[0], nets[2](x).detach()])
    apart = pairwise_divergence(logits, "disagreement").double()
    torch.testing.assert_close(found.agreement[:, 0], 1 - apart[:, :2])
    wrong = 1 - found.accuracy
    torch.testing.assert_close(found.normalised_disagreement, apart[:, None, :2] / wrong)


@pytest.mark.parametrize("statistics", ["recalibrate", "shared"])
def test_statistics_of_batch_norms(statistics):
    nets, (x, y) = networks(lambda: ResNet((1, 6, 6), classes=4, blocks=1)), problem()
    calibration = torch.randn(17, 1, 6, 6)
    options = {"statistics": statistics, "calibration": calibration, "points": (3, 2)} | QUIET
    found = triangle_map(nets[0], nets, x, y, **options)
    layout, anchors = FlatLayout(nets[0]), FlatLayout(nets[0]).flatten_many(nets)
    network = copy.deepcopy(nets[0])
    weights = layout.views(found.coeffs[1, 2].float() @ anchors)
    for name, parameter in network.named_parameters():
        parameter.data = weights[name].clone()
    if statistics == "recalibrate":
        recalibrate_(network, calibration)
    loss = F.cross_entropy(network(x), y).double()
    torch.testing.assert_close(found.loss[1, 2], loss, rtol=1e-5, atol=0)


def test_resumes_and_refuses_another_plane(tmp_path):
    model, anchors = probes(3)
    file = tmp_path / "plane.pt"
    options = {"points": 4, "checkpoint": file} | QUIET
    first = triangle_map(model, anchors, ROWS, CLASSES, **options)
    again = triangle_map(model, anchors, ROWS, CLASSES, resume=True, **options)
    for name in ("loss", "accuracy", "agreement"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    with pytest.raises(ValueError, match="checkpoint must be of this configuration"):
        triangle_map(model, anchors.flip(0), ROWS, CLASSES, resume=True, **options)


def test_filter_normalised_map_is_the_model_and_its_neighbourhood():
    model, weights = probes(1)
    kept = {"keep_logits": True, "points": (5, 3)} | QUIET
    found = filter_normalised_map(model, ROWS, CLASSES, span=0.5, **kept)
    assert found.x.tolist() == [-0.5, -0.25, 0, 0.25, 0.5] and found.y.tolist() == [-0.5, 0, 0.5]
    logits, centre = seen(found.logits), parameters(weights[0])
    assert torch.equal(logits[1, 2], centre) and found.agreement.shape == (1, 3, 5)
    assert torch.equal(logits[..., 4:], centre[4:].expand(3, 5, 2))  # a bias stays where it is
    d1, d2 = (logits[1, 4] - centre) * 2, (logits[2, 2] - centre) * 2
    torch.testing.assert_close(logits, nodes_of((found.x, found.y), centre, d1, d2))
    for d in (d1, d2):  # every filter as long as the model's
        long = d[:4].view(2, 2).norm(dim=1)
        torch.testing.assert_close(long, model.first.detach().norm(dim=1))
    again = filter_normalised_map(model, ROWS, CLASSES, span=0.5, **kept)
    other = filter_normalised_map(model, ROWS, CLASSES, span=0.5, seed=1, **kept)
    assert torch.equal(again.logits, found.logits) and not torch.equal(again.loss, other.loss)
    around, elsewhere = weights[0] + 1, {"weights": weights[0] + 1}
    moved = filter_normalised_map(model, ROWS, CLASSES, **elsewhere, **kept)
    torch.testing.assert_close(seen(moved.logits)[1, 2], parameters(around))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_project_is_least_squares(dtype):
    """Of more models than are taken at a time, on axes that are not orthonormal."""
    anchors, weights = torch.randn(4, 30, dtype=dtype), torch.randn(37, 30, dtype=dtype)
    coefficients = torch.randn(3, 4, dtype=torch.float64)
    origin, *axes = coefficients @ anchors.double()
    found = project(weights, anchors, Plane(*coefficients))
    wide, basis = weights.double() - origin, torch.stack(axes, 1)
    at = torch.linalg.lstsq(basis, wide.T).solution.T
    torch.testing.assert_close(found.at, at)
    torch.testing.assert_close(found.away, (wide - at @ basis.T).norm(dim=1))
    torch.testing.assert_close(found.norm, weights.double().norm(dim=1))
    assert project(weights[:0], anchors, Plane(*coefficients)).at.shape == (0, 2)


def test_what_is_in_the_plane_is_projected_to_itself():
    anchors = torch.randn(2, 50)
    axes = radial_plane(gram(anchors))
    shares = torch.tensor([[0.3, -2.0], [0.0, 0.0], [1.0, 0.0]])
    found = project(shares @ anchors, anchors, axes)
    want = axes.coordinates(shares, gram(anchors))
    torch.testing.assert_close(found.at, want, rtol=1e-6, atol=1e-6)  # weights are rounded
    assert float(found.away.max()) < 1e-6 * float(anchors.norm(dim=1).max())
    torch.testing.assert_close(found.at[2], torch.tensor([1.0, 0.0]) * anchors[0].norm(),
                               check_dtype=False, rtol=1e-6, atol=1e-6)  # fmt: skip


def line():
    first, last = torch.randn(2, 16)
    return torch.stack([first, last, (first + last) / 2])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, a: triangle_map(m, line(), ROWS, CLASSES), "plane must be spanned by anchors"),
        (lambda m, a: radial_map(m, a[[0, 0]], ROWS, CLASSES), "models on one line"),
        (lambda m, a: radial_map(m, a, ROWS, CLASSES), "optima must be two of them; got 3"),
        (lambda m, a: triangle_map(m, a[:2], ROWS, CLASSES), "models must be three of them"),
        (lambda m, a: triangle_map(m, a[:, :5], ROWS, CLASSES), r"models must be \[K, P\] with"),
        (
            lambda m, a: trajectory_map(m, a[:2], ROWS, CLASSES),
            "snapshots must be three of them or more; got 2",
        ),
        (lambda m, a: trajectory_map(m, line(), ROWS, CLASSES), "models on one line"),
        *(
            (lambda m, a, v=v: project(a, a, Plane(a[0, :3], torch.eye(3)[0], v)), "span none")
            for v in (torch.eye(3)[0], torch.tensor([-2.0, 1e-9, 0]))
        ),
        (
            lambda m, a: triangle_map(m, a, ROWS, CLASSES, agree_with=(3,)),
            "agree_with must be integers from 0 to K - 1 = 2",
        ),
        (
            lambda m, a: map_plane(m, a, Plane(*torch.eye(3)[:, :2]), [0.0], [0.0], ROWS, CLASSES),
            r"plane.origin must be \[K\] with K = 3",
        ),
        (
            lambda m, a: map_plane(m, a, Plane(*torch.eye(3)), [], [0.0], ROWS, CLASSES),
            r"x_values must be finite numbers \[W\]",
        ),
        (
            lambda m, a: map_plane(
                m, a, Plane(*torch.eye(3)), [0.0], [float("nan")], ROWS, CLASSES
            ),
            r"y_values must be finite numbers \[H\]",
        ),
        (lambda m, a: grid_around(a[:, :2], 1), "points must be an integer of at least 2"),
        (lambda m, a: grid_around(a[:, :2], margin=-1), "margin must be at least 0"),
        (lambda m, a: grid_around(a), r"at must be \[T, 2\]"),
        (lambda m, a: grid_around(torch.eye(2)[:1]), "points that differ along both axes"),
        *(
            (
                lambda m, a, span=span: filter_normalised_map(m, ROWS, CLASSES, span=span),
                f"span must be a finite number above 0; got {span}",
            )
            for span in (0, float("inf"))
        ),
        *(
            (
                lambda m, a, at=at: radial_map(m, a[:2], ROWS, CLASSES, around=at),
                r"radial_map: around must be finite numbers \[T, 2\]",
            )
            for at in (torch.zeros(3), torch.zeros(1, 3), torch.full((1, 2), float("nan")))
        ),
        (lambda m, a: project(a[:, :3], a, Plane(*torch.eye(3))), r"weights must be \[T, P\]"),
        (lambda m, a: project(a, a[0], Plane(*torch.eye(3))), r"anchors must be \[K, P\]"),
    ],
)
def test_refuses(call, match):
    model, anchors = probes(3)
    with pytest.raises(ValueError, match=match):
        call(model, anchors)
    assert isinstance(model, nn.Module)
