import math

import pytest
import torch

from landscape_fast.landscape.diversity import diversity_points, lower_limit, upper_limit


def test_points_by_hand():
    targets = torch.tensor([0, 1, 2, 0, 1])
    base = torch.tensor([0, 1, 2, 0, 0])  # 4 of 5 right
    labels = torch.tensor(
        [
            [0, 1, 2, 0, 0],  # the base again
            [0, 1, 1, 1, 0],  # 2 right, differs on 2
            [0, 1, 2, 0, 1],  # all right, differs on 1
            [1, 2, 0, 1, 2],  # all wrong, differs on 5
        ]
    )
    points = diversity_points(labels, base, targets)
    assert points.accuracy.tolist() == pytest.approx([0.8, 0.4, 1.0, 0.0])
    assert points.disagreement.tolist() == pytest.approx([0.0, 0.4, 0.2, 1.0])
    assert points.normalised.tolist() == pytest.approx([0.0, 0.4 / 0.6, math.inf, 1.0])
    assert float(points.base_accuracy) == pytest.approx(0.8)
    perfect = diversity_points(targets[None], targets, targets)
    assert math.isnan(perfect.normalised)


@pytest.mark.parametrize(
    ("labels", "base", "targets", "message"),
    [
        ((3,), (3,), (3,), r"labels must be \[M, N\] with N at least 1; got \[3\]"),
        ((2, 0), (0,), (0,), r"labels must be \[M, N\] with N at least 1; got \[2, 0\]"),
        ((2, 3), (2,), (3,), r"base must be \[N\] with N = 3; got \[2\]"),
        ((2, 3), (3,), (4,), r"targets must be \[N\] with N = 3; got \[4\]"),
    ],
)
def test_points_that_do_not_fit_are_refused(labels, base, targets, message):
    arguments = [torch.zeros(shape, dtype=torch.int64) for shape in (labels, base, targets)]
    with pytest.raises(ValueError, match=f"^diversity_points: {message}"):
        diversity_points(*arguments)


def simulated(classes, base_accuracy, rows=400_000):
    """A base function of that accuracy whose errors fall on all wrong classes alike."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(classes, (rows,), generator=generator)
    return targets, with_accuracy(targets, base_accuracy, classes, generator), generator


def with_accuracy(targets, accuracy, classes, generator):
    wrong = torch.rand(len(targets), generator=generator) >= accuracy
    return replaced(targets, wrong, classes, generator)


def replaced(labels, where, classes, generator):
    """Another class, any of the other C - 1, where `where` is true."""
    shift = torch.randint(1, classes, (len(labels),), generator=generator)
    return torch.where(where, (labels + shift) % classes, labels)


@pytest.mark.parametrize(
    ("classes", "base", "accuracy"),
    [(10, 0.71, 0.3), (10, 0.98, 0.97), (3, 0.6, 0.5), (2, 0.9, 0.8)],
)
def test_the_upper_limit_is_what_independent_errors_give(classes, base, accuracy):
    targets, labels, generator = simulated(classes, base)
    other = with_accuracy(targets, accuracy, classes, generator)
    point = diversity_points(other[None], labels, targets)
    expected = upper_limit(point.accuracy, float(point.base_accuracy), classes)
    # four standard errors of a fraction over 400,000 rows
    torch.testing.assert_close(point.disagreement, expected, rtol=0, atol=4 * 0.5 / 400_000**0.5)


@pytest.mark.parametrize(
    ("classes", "base", "p"), [(10, 0.71, 0.2), (10, 0.98, 0.01), (3, 0.6, 0.5)]
)
def test_the_lower_limit_is_what_replaced_labels_give(classes, base, p):
    targets, labels, generator = simulated(classes, base)
    where = torch.rand(len(labels), generator=generator) < p
    other = replaced(labels, where, classes, generator)
    point = diversity_points(other[None], labels, targets)
    expected = lower_limit(
        torch.tensor(base * (1 - p) + p * (1 - base) / (classes - 1)), base, classes
    )
    assert float(expected) == pytest.approx(p)  # the inverse of a(p), exactly
    assert float(point.disagreement) == pytest.approx(p, abs=4 * 0.5 / 400_000**0.5)


def test_published_values_of_the_limits():
    """Fort et al., C = 10, a* = 0.71."""
    a = torch.tensor([0.3, 0.71], dtype=torch.float64)
    assert float(upper_limit(a, 0.71, 10)[0]) == pytest.approx(0.7644, abs=5e-5)
    assert float(upper_limit(a, 0.71, 10)[1] / 0.29) == pytest.approx(1.678, abs=5e-4)
    assert lower_limit(a, 0.71, 10).tolist() == pytest.approx([9 * 0.41 / 6.1, 0.0])


def test_no_disagreement_is_needed_to_be_better_than_the_base():
    assert lower_limit(torch.tensor([0.8, 0.9]), 0.75, 10).tolist() == [0.0, 0.0]


def test_limits_refuse_what_has_no_meaning():
    a = torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"upper_limit: base_accuracy must be a fraction in"):
        upper_limit(a, 1.2, 10)
    with pytest.raises(ValueError, match="lower_limit: classes must be at least 2; got 1"):
        lower_limit(a, 0.5, 1)
    with pytest.raises(ValueError, match=r"base_accuracy must be above chance, 1 / C = 0\.1; got"):
        lower_limit(a, 0.1, 10)
