"""The correlated family against simulated label flips, its limits, and scipy's least squares."""

import math

import numpy as np
import pytest
import torch

from landscape_fast.landscape import (
    correlated_family,
    diversity_points,
    fit_correlated_family,
    lower_limit,
)


def simulated(p, exponent, reference_accuracy, classes, rows=400_000):
    """Accuracy and disagreement of labels of which these shares are replaced."""
    generator = torch.Generator().manual_seed(7)

    def replaced(labels, where):
        shift = torch.randint(1, classes, (rows,), generator=generator)
        return torch.where(where, (labels + shift) % classes, labels)

    targets = torch.randint(classes, (rows,), generator=generator)
    wrong = torch.rand(rows, generator=generator) >= reference_accuracy
    reference = replaced(targets, wrong)
    chance = torch.where(wrong, p**exponent, p)
    labels = replaced(reference, torch.rand(rows, generator=generator) < chance)
    points = diversity_points(labels[None], reference, targets)
    return float(points.accuracy), float(points.disagreement)


@pytest.mark.parametrize(
    ("p", "exponent", "reference", "classes"),
    [(0.1, 0.22, 0.71, 10), (0.3, 0.5, 0.6, 3), (0.2, 2.0, 0.9, 2), (0.01, 0.0, 0.8, 100)],
)
def test_the_family_is_what_flipped_labels_give(p, exponent, reference, classes):
    found = correlated_family(torch.tensor(p).double(), exponent, reference, classes)
    truth = simulated(p, exponent, reference, classes)
    # four standard errors of a fraction over 400,000 rows
    assert torch.stack(found).tolist() == pytest.approx(truth, abs=4 * 0.5 / 400_000**0.5)


def test_the_two_sides_are_the_right_way_round():
    """The paper prints accuracy and disagreement exchanged; these two digits were simulated."""
    found = correlated_family(torch.tensor(0.1).double(), math.log(0.603, 0.1), 0.71, 10)
    assert float(found.disagreement) == pytest.approx(0.2458, abs=1e-4)
    assert float(found.accuracy) == pytest.approx(0.6584, abs=1e-4)


def test_limits_of_the_exponent():
    p = torch.linspace(0, 1, 11).double()
    lower = correlated_family(p, 1.0, 0.71, 10)
    torch.testing.assert_close(lower_limit(lower.accuracy, 0.71, 10), lower.disagreement)
    kept = correlated_family(p[:-1], math.inf, 0.71, 10)  # wrong labels stay
    torch.testing.assert_close(kept.disagreement, 0.71 - kept.accuracy)
    moved = correlated_family(p, 0.0, 0.71, 10)  # all wrong labels change at once
    torch.testing.assert_close(moved.disagreement, 0.71 * p + 0.29)


@pytest.mark.parametrize(
    ("reference", "classes", "excess"), [(0.71, 10, 0.0069), (0.6, 100, 0.0005)]
)
def test_accuracy_first_rises_above_the_reference(reference, classes, excess):
    """So that it has no inverse; with e of at least 1 it falls from the start."""
    p = torch.logspace(-8, 0, 20_001).double()
    found = correlated_family(p, 0.22, reference, classes).accuracy
    assert float(found.max()) - reference == pytest.approx(excess, abs=5e-5)
    assert bool((correlated_family(p, 1.0, reference, classes).accuracy <= reference).all())


@pytest.mark.parametrize("exponent", [0.02, 0.22, 0.9, 1.0, 3.0, 20.0])
def test_a_curve_is_found_again(exponent):
    p = torch.linspace(0.001, 0.6, 23).double()
    fit = fit_correlated_family(*correlated_family(p, exponent, 0.68, 10), 0.68, 10)
    assert fit.exponent == pytest.approx(exponent, rel=1e-5)
    torch.testing.assert_close(fit.p, p, rtol=1e-5, atol=1e-6)
    assert fit.rmse < 1e-7 and (fit.reference_accuracy, fit.classes) == (0.68, 10)


def noisy(exponent, reference, classes, noise, count=16):
    generator = torch.Generator().manual_seed(11)
    p = torch.rand(count, generator=generator).double() * 0.5
    curve = torch.stack(correlated_family(p, exponent, reference, classes))
    return (curve + noise * torch.randn(2, count, generator=generator).double()).clamp(0, 1)


@pytest.mark.parametrize(("exponent", "reference", "classes"), [(0.3, 0.7, 10), (0.6, 0.5, 100)])
def test_the_fit_is_the_least_squares_of_scipy(exponent, reference, classes):
    """Over e and all p at once."""
    optimize = pytest.importorskip("scipy.optimize")
    points = noisy(exponent, reference, classes, 0.01).numpy()

    def residuals(variables):
        e, p = np.exp(variables[0]), variables[1:]
        accuracy = reference * (1 - p) + (1 - reference) * p**e / (classes - 1)
        disagreement = reference * p + (1 - reference) * p**e
        return np.concatenate([accuracy - points[0], disagreement - points[1]])

    start = np.concatenate([[np.log(0.5)], np.full(points.shape[1], 0.2)])
    bounds = ([-7] + [1e-12] * points.shape[1], [7] + [1.0] * points.shape[1])
    truth = optimize.least_squares(residuals, start, bounds=bounds, xtol=1e-14, ftol=1e-14)
    fit = fit_correlated_family(*torch.from_numpy(points), reference, classes)
    squares = float(fit.distance.square().sum())
    assert squares <= 2 * truth.cost * (1 + 1e-6)  # and where scipy stops short of it, below
    assert fit.exponent == pytest.approx(np.exp(truth.x[0]), rel=1e-3)
    assert fit.rmse == pytest.approx((squares / points.shape[1]) ** 0.5)


@pytest.mark.parametrize(("e", "least"), [(0.22, -6), (0.03, -40), (5.0, -6)])
def test_the_nearest_point_is_found_in_p_and_not_by_accuracy(e, least):
    """A point above the reference's accuracy has its nearest one on the rising part."""
    reference, classes = 0.71, 10
    p = torch.logspace(least, 0, 200_001, dtype=torch.float64)
    p = torch.cat([torch.zeros_like(p[:1]), p])
    curve = torch.stack(correlated_family(p, e, reference, classes))
    for point in ([0.7165, 0.11], [0.72, 0.15], [0.4, 0.4], [0.71, 0.0], [0.9, 0.9]):
        point = torch.tensor(point).double()
        fit_p, distance = nearest(point[:, None], e, reference, classes)
        truth = (curve - point[:, None]).norm(dim=0)
        # golden sections see p to the root of the rounding of float64
        assert float(distance) == pytest.approx(float(truth.min()), rel=1e-6, abs=1e-7)
        assert float(fit_p) == pytest.approx(float(p[truth.argmin()]), rel=2e-3, abs=1e-6)


def nearest(points, e, *about):
    from landscape_fast.landscape.diversity import _nearest

    return (found[0] for found in _nearest(points, torch.tensor([e]).double(), *about))


def test_what_has_no_meaning_is_refused():
    p = torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match=r"correlated_family: p must be in \[0, 1\]"):
        correlated_family(p + 1, 0.5, 0.7, 10)
    with pytest.raises(ValueError, match="correlated_family: exponent must be at least 0; got -1"):
        correlated_family(p, -1, 0.7, 10)
    with pytest.raises(ValueError, match=r"reference_accuracy must be a fraction in \[0, 1\]"):
        correlated_family(p, 1, 70, 10)
    op = "fit_correlated_family"
    with pytest.raises(ValueError, match=f"{op}: classes must be at least 2; got 1"):
        fit_correlated_family(p, p, 0.7, 1)
    with pytest.raises(
        ValueError, match=rf"{op}: disagreement must be \[S\] with S = 2; got \[1\]"
    ):
        fit_correlated_family(p, p[:1], 0.7, 10)
    with pytest.raises(ValueError, match=rf"{op}: accuracy must be \[S\] with S at least 1; got"):
        fit_correlated_family(p[:0], p[:0], 0.7, 10)
    with pytest.raises(ValueError, match=rf"{op}: disagreement must be in \[0, 1\]; got \[0.1"):
        fit_correlated_family(p, torch.tensor([0.1, math.nan]), 0.7, 10)
    with pytest.raises(ValueError, match=f"{op}: disagreement must be above 0 for some point"):
        fit_correlated_family(p, torch.zeros(2), 0.7, 10)
