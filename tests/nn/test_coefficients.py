"""Coefficient functions against closed forms on the vectors themselves."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from landscape_fast.nn import FlatLayout
from landscape_fast.nn import coefficients as c
from landscape_fast.ops.combine import combine
from landscape_fast.testing import assert_as_exact


def rows(count, width=7):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, width, dtype=torch.float64, generator=generator)


T = torch.linspace(0, 1, 13, dtype=torch.float64)


def test_a_line_runs_from_the_first_anchor_to_the_second():
    ends = rows(2)
    exact = torch.stack([ends[0] + t * (ends[1] - ends[0]) for t in T])
    for function in (c.line, c.init_to_optimum):
        assert_as_exact("line", combine(function(T), ends), exact, exact)
    beyond = combine(c.init_to_optimum(torch.tensor([2.0], dtype=torch.float64)), ends)[0]
    assert_as_exact("beyond", beyond - ends[1], ends[1] - ends[0], ends[1] - ends[0])


def de_casteljau(points, t):
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


@pytest.mark.parametrize("anchors", range(1, 8))
def test_bezier_is_repeated_interpolation(anchors):
    points = rows(anchors)
    exact = torch.stack([de_casteljau(points, t) for t in T])
    assert_as_exact("curve", combine(c.bezier(T, anchors), points), exact, exact)
    exact = c.bezier(T.float().double(), anchors)
    assert_as_exact("float32", c.bezier(T.float(), anchors), exact.float(), exact)
    low = T[1:-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: c.bezier(t, anchors), low)
    for t, flip in ((0.0, False), (1.0, True)):  # powers of 0 have no logarithm
        at = torch.tensor(t, dtype=torch.float64)
        slope = torch.func.jacrev(lambda t: c.bezier(t, anchors))(at)
        exact = torch.zeros(anchors, dtype=torch.float64)
        exact[:2] = torch.tensor([1.0 - anchors, anchors - 1.0])[:anchors]
        exact = -exact.flip(0) if flip else exact
        assert_as_exact(f"slope at {t}", slope, exact, exact)


@pytest.mark.parametrize("anchors", range(2, 8))
def test_polychain_interpolates_between_neighbours(anchors):
    points = rows(anchors)
    found = combine(c.polychain(T, anchors), points)
    for t, got in zip(T.tolist(), found, strict=True):
        at = t * (anchors - 1)
        i = min(int(at), anchors - 2)
        exact = points[i] + (at - i) * (points[i + 1] - points[i])
        assert_as_exact(f"t={t}", got, exact, exact)
    for i in range(anchors - 1):
        t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
        whole = combine(c.polychain((i + t) / (anchors - 1), anchors), points)
        part = combine(c.segment(t, i, anchors), points)
        assert_as_exact("segment", part, whole, whole)
        r = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        wedge = combine(c.wedge(r, t, i, anchors), points)
        assert_as_exact("wedge", wedge, r[:, None] * part, r[:, None] * part)


def test_the_two_curves_of_two_anchors_are_the_line():
    for curve in (c.bezier, c.polychain):
        assert_as_exact("line", curve(T, 2), c.line(T), c.line(T))


@pytest.mark.parametrize("concentration", [0.3, 1.0, 4.0])
def test_simplex_draws_have_the_moments_of_the_dirichlet_distribution(concentration):
    K, count = 4, 20000
    sampler = c.Simplex(K, concentration)
    draws = sampler.draw(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert draws.min() >= 0
    ones = torch.ones(count, dtype=torch.float64)
    assert_as_exact("sum", draws.sum(-1), ones, ones)
    variance = (1 / K) * (1 - 1 / K) / (K * concentration + 1)
    error = math.sqrt(variance / count)  # standard error of a mean
    assert (draws.mean(0) - 1 / K).abs().max() < 5 * error
    cov = draws.T.cov()
    exact = torch.full((K, K), -1 / K**2 / (K * concentration + 1), dtype=torch.float64)
    exact.fill_diagonal_(variance)
    # a squared deviation is at most 1, so its standard error is below this
    products = (draws - 1 / K)[:, :, None] * (draws - 1 / K)[:, None, :]
    assert ((cov - exact).abs() < 5 * products.std(0) / math.sqrt(count)).all()


def test_a_very_sharp_dirichlet_draw_is_a_corner_and_never_nan():
    draws = c.dirichlet(500, 3, 1e-3, generator=torch.Generator().manual_seed(0))
    assert draws.isfinite().all()
    assert (draws.max(-1).values > 0.99).float().mean() > 0.98
    ones = torch.ones(500)
    assert_as_exact("sum", draws.sum(-1), ones, ones.double())


def test_averages():
    snapshots = rows(5)
    average = combine(c.mean(5, dtype=torch.float64)[None], snapshots)[0]
    assert_as_exact("mean", average, snapshots.mean(0), snapshots.mean(0))
    model = nn.Linear(7, 1, bias=False, dtype=torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for row in snapshots:
        model.weight.data.copy_(row)
        averaged.update_parameters(model)
    got = combine(c.ema(5, 0.9, dtype=torch.float64)[None], snapshots)
    exact = averaged.module.weight.detach()
    assert_as_exact("ema", got, exact, exact)


@pytest.mark.parametrize("around", ["final", "running"])
@pytest.mark.parametrize("rank", [2, 5])
def test_swag_low_rank_is_the_deviation_matrix(around, rank):
    snapshots, z = rows(5), rows(3, rank)
    means = [snapshots[: i + 1].mean(0) for i in range(5)]
    if around == "final":
        means = [snapshots.mean(0)] * 5
    deviations = (snapshots - torch.stack(means))[5 - rank :]
    exact = snapshots.mean(0) + z @ deviations / math.sqrt(2 * (rank - 1))
    coeffs = c.swag_low_rank(z, 5, around=around)
    assert_as_exact("samples", combine(coeffs, snapshots), exact, exact)
    ones = torch.ones(3, dtype=torch.float64)
    assert_as_exact("sum", coeffs.sum(-1), ones, ones)


def test_a_random_direction_goes_as_far_as_it_says():
    anchors = rows(2)
    t = torch.tensor([0.0, 3.0], dtype=torch.float64)
    points = combine(c.random_direction(t, anchors[1].norm()), anchors)
    assert_as_exact("distance", (points - anchors[0]).norm(dim=-1), t, t)


def test_offset_is_a_plane_through_the_first_anchor_with_gradients_of_its_own():
    anchors = rows(3)
    d = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    point = combine(c.offset(d)[None], anchors)[0]
    exact = anchors[0] + 0.5 * anchors[1] - 2 * anchors[2]
    assert_as_exact("point", point.detach(), exact, exact)
    g = rows(1)[0]
    found = torch.autograd.grad(point @ g, d)[0]
    assert_as_exact("gradient", found, anchors[1:] @ g, anchors[1:] @ g)


def test_filters_of_a_normalised_direction_are_as_long_as_those_of_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 5)).double()
    layout = FlatLayout(model)
    weights = layout.flatten(model)
    direction = rows(1, layout.P)[0]
    layout.views(direction)["0.weight"][1].zero_()  # a filter without a direction stays so
    found = layout.views(c.filter_normalised(direction, weights, layout))
    for name, w in layout.views(weights).items():
        if w.ndim == 1:
            assert not found[name].any(), name
            continue
        lengths, wanted = found[name].flatten(1).norm(dim=1), w.flatten(1).norm(dim=1)
        if name == "0.weight":
            assert lengths[1] == 0
            lengths[1] = wanted[1]
        assert_as_exact(name, lengths, wanted, wanted)
        given = layout.views(direction)[name].flatten(1)
        cosine = nn.functional.cosine_similarity(found[name].flatten(1), given)
        ones = (given.norm(dim=1) > 0).double()
        assert_as_exact(f"{name}: same direction", cosine, ones, ones)


def test_a_normalised_direction_has_gradients_and_takes_many_at_once():
    layout = FlatLayout(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    rows_ = torch.randn(3, layout.P, generator=torch.Generator().manual_seed(3))
    directions, weights = (rows_.double() * layout.mask).split((2, 1))
    leaves = directions.clone().requires_grad_(), weights[0].clone().requires_grad_()
    normalised = c.filter_normalised(*leaves, layout)
    assert torch.equal(normalised[1], c.filter_normalised(directions[1], leaves[1], layout))
    # a filter keeps its length whatever the direction, and follows that of the weights
    along, by_weights = torch.autograd.grad(normalised.square().sum() / 2, leaves)
    twice = torch.zeros_like(weights[0])
    for name, view in layout.views(twice).items():
        view.copy_(2 * layout.views(weights[0])[name] * (view.ndim > 1))
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-14)
    torch.testing.assert_close(by_weights, twice, rtol=1e-13, atol=1e-14)


SAMPLERS = [c.Line(), c.Simplex(4), c.Simplex(3, 0.5), c.Bezier(3), c.Bezier(5), c.PolyChain(4)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_samplers(sampler):
    def draw(seed):
        return sampler.draw(6, device="cpu", generator=torch.Generator().manual_seed(seed))

    first = draw(0)
    assert first.shape == (6, sampler.anchors) and first.dtype == torch.float32
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    assert len(first.unique(dim=0)) == 6
    ones = torch.ones(6)
    assert_as_exact("sum", first.sum(-1), ones, ones.double())
    middle = sampler.midpoint()
    if not isinstance(sampler, c.PolyChain):  # of an even number: on the middle segment
        assert_as_exact("symmetric", middle, middle.flip(0), middle.flip(0).double())
    assert copy.copy(sampler) == sampler and hash(sampler) is not None
    if isinstance(sampler, c.Simplex):
        back = sampler.at(first[:, 1:])
        assert_as_exact("coordinates", back, first, first.double())
    else:
        assert torch.equal(sampler.at(torch.tensor(0.5)), middle)


class Copies(TorchDispatchMode):
    """Counts tensors that are made from numbers of the host, which a CUDA graph cannot hold."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten.lift_fresh.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_draws_bring_nothing_from_the_host(sampler):
    with Copies() as copies:
        sampler.draw(2, device="cpu")
        assert copies.count == 0
        torch.tensor([1.0])
        assert copies.count == 1


def test_refusals():
    with pytest.raises(
        ValueError, match="Simplex: anchors must be an integer of at least 1; got 0"
    ):
        c.Simplex(0)
    with pytest.raises(ValueError, match="Simplex: concentration must be a finite number above 0"):
        c.Simplex(2, 0.0)
    with pytest.raises(ValueError, match="Bezier: anchors must be an integer of at least 2; got 1"):
        c.Bezier(1)
    with pytest.raises(ValueError, match="PolyChain: anchors must be an integer of at least 2"):
        c.PolyChain(True)
    with pytest.raises(ValueError, match="polychain: anchors must be an integer of at least 2"):
        c.polychain(T, 1)
    with pytest.raises(ValueError, match=r"Simplex.at: t must be \[..., K - 1\] with K = 3; got"):
        c.Simplex(3).at(torch.zeros(3))
    with pytest.raises(ValueError, match="segment: start must be an integer from 0 to K - 2 = 1"):
        c.segment(T, 2, 3)
    with pytest.raises(ValueError, match=r"ema: decay must be in \[0, 1\); got 1"):
        c.ema(3, 1)
    with pytest.raises(ValueError, match=r"swag_low_rank: z must be \[..., r\] with 2 <= r <= 3"):
        c.swag_low_rank(torch.zeros(1), 3)
    with pytest.raises(ValueError, match="around must be 'final' or 'running'; got 'mean'"):
        c.swag_low_rank(torch.zeros(2), 3, around="mean")
