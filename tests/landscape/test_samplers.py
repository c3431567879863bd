"""Samplers against what their samples should be: moments, distributions, scikit-learn's PCA."""

import numpy as np
import pytest
import torch
from torch import nn

from landscape_fast.landscape import (
    DiagonalGaussian,
    LowRankGaussian,
    RandomDirections,
    WeightDropout,
)
from landscape_fast.nn import FlatLayout
from landscape_fast.testing import assert_as_exact

# Fixed seeds: a test of a distribution passes or fails once and for all. A right sampler would
# have failed at about one seed in a thousand.
LEVEL = 1e-3


def network():
    return nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 3))


LAYOUT = FlatLayout(network())
REAL = LAYOUT.mask.bool()


def solutions(count=8, spread=0.3):
    """[count, P] around 1, as `FlatLayout` orders them; one direction has more than another."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(count, count, generator=generator)
    steps = steps @ torch.randn(count, sum(LAYOUT.counts), generator=generator)
    return LAYOUT.flatten_many(list(1 + spread * steps))


def samplers():
    weights = solutions()
    return {
        "random": RandomDirections(weights[0], LAYOUT),
        "dropout": WeightDropout(weights[0]),
        "diagonal": DiagonalGaussian.from_checkpoints(weights),
        "low rank": LowRankGaussian.from_checkpoints(weights, 5),
        "singular": LowRankGaussian.from_checkpoints(weights, 5, scale="singular"),
    }


def chi_square(standard):
    """Two-sided p value that these numbers are independent standard normals."""
    stats = pytest.importorskip("scipy.stats")
    tail = stats.chi2.cdf(float(standard.double().square().sum()), standard.numel())
    return 2 * min(tail, 1 - tail)


@pytest.mark.parametrize("name", samplers())
def test_a_sample_is_told_by_seed_and_number(name):
    sampler, scale = samplers()[name], torch.linspace(0.1, 0.6, 6)
    together = sampler.draw(6, scale, seed=5)
    assert together.shape == (6, LAYOUT.P) and together.dtype == torch.float32
    for i in range(6):
        alone = sampler.draw(1, float(scale[i]), seed=5, first=i)[0]
        if "random" in name or name in ("dropout", "diagonal"):
            assert torch.equal(alone, together[i])
        else:  # the sum over directions is a matmul, which may order it by the number of rows
            torch.testing.assert_close(alone, together[i], rtol=1e-6, atol=1e-6)
    assert not torch.equal(together, sampler.draw(6, scale, seed=6))
    assert len(together.unique(dim=0)) == 6


@pytest.mark.parametrize("name", samplers())
def test_pads_stay_0_and_scale_0_is_the_centre(name):
    sampler = samplers()[name]
    assert sampler.draw(3, 0.7, seed=0)[:, ~REAL].count_nonzero() == 0
    still = sampler.draw(2, 0.0, seed=0)
    centre = getattr(sampler, "mean", None)
    centre = sampler.centre if centre is None else centre
    assert torch.equal(still, centre.expand(2, -1))


@pytest.mark.parametrize("name", samplers())
def test_samplers_refuse_what_has_no_meaning(name):
    sampler = samplers()[name]
    with pytest.raises(ValueError, match=r"\.draw: count must be an integer of at least 1; got 0"):
        sampler.draw(0, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"\.draw: scale must be (at least 0|in \[0, 1\)); got -1"):
        sampler.draw(2, -1.0, seed=0)
    with pytest.raises(ValueError, match=r"\.draw: scale must be a number, or \[count\] with cou"):
        sampler.draw(2, torch.ones(3) / 2, seed=0)
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\^64\); got -1"):
        sampler.draw(2, 0.5, seed=-1)


def test_random_directions_are_as_long_as_asked_and_uniform():
    """In three dimensions every coordinate of a uniform direction is uniform (Archimedes)."""
    stats = pytest.importorskip("scipy.stats")
    model = nn.Linear(3, 1, bias=False).double()
    layout = FlatLayout(model)
    centre = layout.flatten(model)
    scale = torch.linspace(0.5, 70, 3000, dtype=torch.float64)
    steps = RandomDirections(centre, layout).draw(3000, scale, seed=2) - centre
    torch.testing.assert_close(steps.norm(dim=1), scale)
    directions = (steps / scale[:, None])[:, :3]
    for axis in (*torch.eye(3).double(), torch.ones(3).double() / 3**0.5):
        assert stats.kstest((directions @ axis).numpy(), "uniform", (-1, 2)).pvalue > LEVEL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", samplers())
def test_samples_of_short_weights_are_those_of_float32_rounded_once(name, dtype):
    """But for the low-rank ones, whose directions are rounded when they are made."""
    short, layout = solutions().to(dtype), FlatLayout(network().to(dtype))
    make = {
        "random": lambda w, layout: RandomDirections(w[0], layout),
        "dropout": lambda w, _: WeightDropout(w[0]),
        "diagonal": lambda w, _: DiagonalGaussian(w[0], w[1].abs()),
        "low rank": lambda w, _: LowRankGaussian(w[0], w[1:4]),
        "singular": lambda w, _: LowRankGaussian(w[0], w[4:6]),
    }[name]
    found = make(short, layout).draw(3, 0.5, seed=4)
    truth = make(short.float(), LAYOUT).draw(3, 0.5, seed=4)
    assert found.dtype == dtype
    if name in ("random", "diagonal", "dropout"):
        assert torch.equal(found, truth.to(dtype))
    else:  # coordinates are drawn in float32 and combined so, in what order is the backend's
        assert_as_exact(name, found, truth.to(dtype), truth.double())


def test_dropout_takes_weights_and_biases_alike():
    stats = pytest.importorskip("scipy.stats")
    centre, draws = solutions()[0], 2000
    for p in (0.05, 0.4):
        found = WeightDropout(centre).draw(draws, p, seed=8)[:, REAL]
        kept = found != 0
        assert torch.allclose(found[kept], (centre[REAL].expand_as(found) / (1 - p))[kept])
        gone = (~kept).sum(0).numpy()  # of every weight and bias: binomial
        assert gone.min() > 0
        spread = ((gone - draws * p) ** 2 / (draws * p * (1 - p))).sum()
        tail = stats.chi2.cdf(spread, len(gone))
        assert 2 * min(tail, 1 - tail) > LEVEL


def test_each_row_of_dropout_has_its_own_chance():
    found = WeightDropout(solutions()[0]).draw(2, torch.tensor([0.0, 0.9]), seed=8)[:, REAL]
    assert torch.equal(found[0], solutions()[0][REAL])
    assert float((found[1] == 0).float().mean()) > 0.7


@pytest.mark.parametrize("spread", [0.3, 1e-4])
def test_moments_are_those_of_numpy_in_float64(spread):
    """Population moments, also where the checkpoints differ by little."""
    w = solutions(spread=spread)
    found, w64 = DiagonalGaussian.from_checkpoints(w), w.double()
    assert_as_exact("mean", found.mean, w.mean(0), w64.mean(0))
    truth = torch.from_numpy(np.std(w64.numpy(), 0))
    assert_as_exact("sigma", found.sigma, truth.float(), truth)
    one = DiagonalGaussian.from_checkpoints(w[:1])
    assert torch.equal(one.mean, w[0]) and one.sigma.count_nonzero() == 0


def test_sigma_is_a_deviation_and_no_variance():
    """sigma 0.01 and 3: taken for variances they would be 0.1 and 1.7."""
    stats = pytest.importorskip("scipy.stats")
    sigma = torch.tensor([0.01, 3.0]).double()
    gaussian = DiagonalGaussian(torch.tensor([5.0, -5.0]).double(), sigma)
    found = gaussian.draw(3000, 2.0, seed=4)
    standard = (found - gaussian.mean) / (2 * sigma)
    for column in standard.T:
        assert chi_square(column) > LEVEL
        assert stats.kstest(column.numpy(), "norm").pvalue > LEVEL
    assert abs(float(np.corrcoef(standard.T.numpy())[0, 1])) < 4 / 3000**0.5


@pytest.mark.parametrize("scale", ["unit", "singular"])
@pytest.mark.parametrize("spread", [0.3, 1e-4])
def test_directions_are_the_principal_ones(scale, spread):
    """Against scikit-learn in float64, up to signs; also around weights that hardly differ."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    w = solutions(spread=spread)
    pca = decomposition.PCA(4, svd_solver="full").fit(w.double().numpy())
    truth = torch.from_numpy(pca.components_)
    if scale == "singular":
        truth = truth * torch.from_numpy(pca.explained_variance_).sqrt()[:, None]
    found = LowRankGaussian.from_checkpoints(w, 4, scale=scale)
    _, lengths, plain = torch.linalg.svd(w - w.mean(0), full_matrices=False)
    if scale == "singular":
        plain = plain * lengths[:, None] / (len(w) - 1) ** 0.5
    got, plain = (
        rows * (rows * truth).sum(1, keepdim=True).sign().float()
        for rows in (found.directions, plain[:4])
    )
    assert_as_exact("directions", got, plain, truth)
    assert torch.equal(found.mean, DiagonalGaussian.from_checkpoints(w).mean)


@pytest.mark.parametrize("scale", ["unit", "singular"])
def test_low_rank_samples_are_normal_along_the_directions_and_nowhere_else(scale):
    w = solutions().double()
    gaussian = LowRankGaussian.from_checkpoints(w, 3, scale=scale)
    directions, s = gaussian.directions, 6.0
    lengths = directions.norm(dim=1)
    if scale == "unit":
        torch.testing.assert_close(lengths, torch.ones(3).double())
    away = gaussian.draw(2000, s, seed=9) - gaussian.mean
    z = away @ (directions / lengths[:, None].square()).T / s
    torch.testing.assert_close(z @ directions * s, away)  # all of it lies there
    for column in z.T:
        assert chi_square(column) > LEVEL
    between = np.corrcoef(z.T.numpy())[np.triu_indices(3, 1)]
    assert np.abs(between).max() < 4 / 2000**0.5


def test_directions_without_spread_are_left_out():
    """Six checkpoints, of which three are others over again."""
    gaussian = LowRankGaussian.from_checkpoints(solutions(3)[[0, 1, 2, 0, 1, 2]], 4)
    lengths = gaussian.directions.norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_low_rank_gaussian_of_samples():
    """The principal directions of accepted random samples: a sampler made of a sampler's rows."""
    rows = RandomDirections(solutions()[0], LAYOUT).draw(9, 4.0, seed=3)
    gaussian = LowRankGaussian.from_checkpoints(rows, 4)
    found = gaussian.draw(5, 1.0, seed=1)
    assert found[:, ~REAL].count_nonzero() == 0
    span = torch.linalg.qr((rows - rows.mean(0)).double().T).Q
    away = (found - gaussian.mean).double()
    # float32 weights of size 1: 6e-8 each, over 48 of them
    assert float((away - away @ span @ span.T).norm(dim=1).max()) < 1e-6 * float(away.norm())


def test_makers_refuse_what_does_not_fit():
    w = solutions(4)
    rule = r"from_checkpoints: rank must be an integer from 1 to T - 1 = 3; got 4; give more"
    with pytest.raises(ValueError, match=rule):
        LowRankGaussian.from_checkpoints(w, 4)
    with pytest.raises(ValueError, match="scale must be 'unit' or 'singular'; got 'whitened'"):
        LowRankGaussian.from_checkpoints(w, 2, scale="whitened")
    with pytest.raises(ValueError, match=r"weights must be \[T, P\] with T at least 1; got \[0"):
        DiagonalGaussian.from_checkpoints(w[:0])
    with pytest.raises(ValueError, match=r"sigma must be \[P\] with P = 64; got \[40\]"):
        DiagonalGaussian(w[0], w[0, :40])
    with pytest.raises(ValueError, match=r"directions must be \[k, P\] with P = 64"):
        LowRankGaussian(w[0], w[:2, :40])
    with pytest.raises(ValueError, match=r"centre must be \[P\] with P = 64; got \[40\]"):
        RandomDirections(w[0, :40], LAYOUT)
    with pytest.raises(TypeError, match=r"WeightDropout: centre must be a Tensor \[P\]; got list"):
        WeightDropout([1.0])
