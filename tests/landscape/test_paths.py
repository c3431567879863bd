"""Paths and wedges: points seen by a network that shows its weights, angles by trigonometry."""

import math

import pytest
import torch
import torch.nn.functional as F
from landscape.probe import CLASSES, ROWS, parameters, probes, seen

from landscape_fast.landscape import along_path, wedge_map
from landscape_fast.models import MLP, ResNet
from landscape_fast.nn import FlatLayout, recalibrate_

QUIET = {"progress": False}
STEPS = (3, 1, 4)


def polyline(weights, steps):
    """[S, P], point by point."""
    points = [
        torch.lerp(weights[i], weights[i + 1], j / n) for i, n in enumerate(steps) for j in range(n)
    ]
    return torch.stack([*points, weights[-1]])


@pytest.mark.parametrize("per_pass", [1, 4])
def test_every_point_of_a_path_is_where_it_says(per_pass):
    model, weights = probes(4)
    options = {"per_pass": per_pass, "per_segment": STEPS, "keep_logits": True} | QUIET
    found = along_path(model, weights, ROWS, CLASSES, **options)
    truth = polyline(weights, STEPS)
    torch.testing.assert_close(seen(found.logits), parameters(truth))
    for place, node in ((0, 0), (3, 1), (4, 2), (8, 3)):
        assert torch.equal(seen(found.logits)[place], parameters(weights[node]))
        torch.testing.assert_close(found.t[place], torch.tensor(node / 3).double())
    steps = truth.diff(dim=0).norm(dim=1).cumsum(0)
    torch.testing.assert_close(found.length, torch.cat([steps.new_zeros(1), steps]))
    torch.testing.assert_close(found.norm, truth.norm(dim=1))
    chord, wide = weights[-1] - weights[0], truth - weights[0]
    along = wide @ chord / (chord @ chord)
    torch.testing.assert_close(found.along, along)
    away = (wide - along[:, None] * chord).norm(dim=1)
    # the Gram matrix has half the digits of float64 for a length that is 0
    torch.testing.assert_close(found.away, away, rtol=1e-7, atol=1e-7)
    for logits, loss in zip(found.logits, found.loss, strict=True):
        torch.testing.assert_close(loss, F.cross_entropy(logits, CLASSES))


def nets(build, count):
    torch.manual_seed(3)
    return [build().eval() for _ in range(count)], torch.randn(40, 1, 6, 6), torch.arange(40) % 4


def test_agreement_with_both_ends_and_the_summary():
    networks, x, y = nets(lambda: MLP((1, 6, 6), (5,), classes=4), 3)
    found = along_path(networks[0], networks, x, y, per_segment=2, **QUIET)
    labels = torch.stack([network(x).argmax(1) for network in networks])
    for node, place in enumerate((0, 2, 4)):
        same = (labels[[0, 2]] == labels[node]).double().mean(1)
        assert torch.equal(found.agreement[:, place], same)
    assert found.agreement[0, 0] == found.agreement[1, 4] == 1
    summary = found.summary("accuracy")
    assert (summary.start, summary.end) == (float(found.accuracy[0]), float(found.accuracy[-1]))
    over = found.loss - torch.lerp(found.loss[0], found.loss[-1], found.t)
    assert found.summary().barrier == pytest.approx(float(over.max()), rel=1e-12)
    with pytest.raises(ValueError, match=r"quantity must be one of \('loss', 'accuracy'\)"):
        found.summary("error")


def test_statistics_are_those_of_every_point():
    networks, x, y = nets(lambda: ResNet((1, 6, 6), classes=4, blocks=1), 2)
    calibration = torch.randn(17, 1, 6, 6)
    found = along_path(networks[0], networks, x, y, calibration=calibration, per_segment=2, **QUIET)
    layout = FlatLayout(networks[0])
    middle = layout.views(layout.flatten_many(networks).mean(0))
    for name, parameter in networks[0].named_parameters():
        parameter.data = middle[name].clone()
    recalibrate_(networks[0], calibration)
    loss = F.cross_entropy(networks[0](x), y).double()
    torch.testing.assert_close(found.loss[1], loss, rtol=1e-5, atol=0)


def test_a_path_back_to_its_start_has_no_share_of_the_way():
    model, weights = probes(2)
    found = along_path(model, weights[[0, 1, 0]], ROWS, CLASSES, **QUIET)
    assert bool(found.along.isnan().all())
    away = (polyline(weights[[0, 1, 0]], (4, 4)) - weights[0]).norm(dim=1)
    torch.testing.assert_close(found.away, away, rtol=1e-7, atol=1e-7)


def angle(a, b):
    return math.acos(float(a @ b / (a.norm() * b.norm())))


@pytest.mark.parametrize("per_pass", [1, 4])
def test_every_point_of_a_wedge_is_where_it_says(per_pass):
    model, weights = probes(4)
    scales = torch.tensor([0.25, 1.0, 1.5], dtype=torch.float64)
    kept = {"per_segment": STEPS, "keep_logits": True, "per_pass": per_pass} | QUIET
    found = wedge_map(model, weights, ROWS, CLASSES, scales=scales, **kept)
    path = polyline(weights, STEPS)
    truth = scales[:, None, None] * path
    torch.testing.assert_close(seen(found.logits), parameters(truth))
    torch.testing.assert_close(found.radius, truth.norm(dim=2))
    torch.testing.assert_close(found.path, path.norm(dim=1))
    angles, starts, turned = [], (0, 3, 4, 8), 0.0
    for i, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        angles += [turned + angle(weights[i], path[s]) for s in range(first, last)]
        turned += angle(weights[i], weights[i + 1])
    torch.testing.assert_close(found.angle, torch.tensor([*angles, turned], dtype=torch.float64))
    torch.testing.assert_close(found.nodes[:, 1], found.path[list(starts)])
    torch.testing.assert_close(found.nodes[:, 0], found.angle[list(starts)])
    for r in range(3):
        loss = [F.cross_entropy(logits, CLASSES) for logits in found.logits[r]]
        torch.testing.assert_close(found.loss[r], torch.stack(loss))
    straight = along_path(model, weights, ROWS, CLASSES, per_segment=STEPS, **QUIET)
    for name in ("loss", "accuracy", "agreement"):  # at scale 1 it is the path itself
        flat = getattr(found, name)[..., 1, :]
        torch.testing.assert_close(flat, getattr(straight, name))


def test_the_layout_keeps_the_shape_of_every_triangle():
    model, weights = probes(3)
    found = wedge_map(model, weights, ROWS, CLASSES, per_segment=3, scales=[0.5, 1.0], **QUIET)
    flat = found.radius[..., None] * torch.stack([found.angle.cos(), found.angle.sin()], -1)
    path = polyline(weights, (3, 3))
    space = torch.stack([0.5 * path, path])
    for part in (slice(0, 4), slice(3, 7)):  # the points of one triangle
        for points in (flat, space):
            points = points[:, part].flatten(0, 1)
            distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
            if points.shape[1] == 2:
                layout = distances
        torch.testing.assert_close(layout, distances)


def test_scales_of_a_wedge_reach_beyond_the_path():
    model, weights = probes(2)
    found = wedge_map(model, weights, ROWS, CLASSES, per_segment=1, **QUIET)
    assert found.scale.tolist() == pytest.approx([0.05 * i for i in range(1, 26)])
    assert found.loss.shape == (25, 2) and found.agreement.shape == (2, 25, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, w: along_path(m, w[:1], ROWS, CLASSES), "nodes must be T of at least 2; got 1"),
        (
            lambda m, w: along_path(m, w, ROWS, CLASSES, per_segment=0),
            "per_segment must be an integer of at least 1, or T - 1 = 2 of them; got 0",
        ),
        (
            lambda m, w: along_path(m, w, ROWS, CLASSES, per_segment=(1, 2, 3)),
            "per_segment must be .* T - 1 = 2 of them",
        ),
        (
            lambda m, w: wedge_map(m, w, ROWS, CLASSES, scales=[-1.0]),
            r"scales must be \[R\] finite numbers of at least 0",
        ),
        (lambda m, w: wedge_map(m, 0 * w, ROWS, CLASSES), "nodes must be away from the origin"),
        (lambda m, w: wedge_map(m, w[:, 1:], ROWS, CLASSES), r"nodes must be \[K, P\]"),
    ],
)
def test_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call(*probes(3))
