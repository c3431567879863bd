"""Claims of a landscape report: verdicts on numbers that decide them."""

import pytest
import torch

from landscape_fast.landscape import FamilyFit
from landscape_fast.studies import _landscape_claims as claims
from landscape_fast.studies._landscape_measure import Diversity, Likeness


def likeness(disagreement, distances, cosine=None):
    """Two runs of two checkpoints, both late."""
    runs, late = [0, 0, 1, 1], torch.ones(4, dtype=torch.bool)
    cosine = torch.eye(4) if cosine is None else cosine
    return Likeness(runs, [1, 2] * 2, late, cosine, disagreement, distances, None, torch.ones(2, 2))


def pairs(within, across):
    """[4, 4] of two runs: between their checkpoints, and across."""
    value = torch.full((4, 4), across, dtype=torch.float64)
    value[0, 1] = value[1, 0] = value[2, 3] = value[3, 2] = within
    return value.fill_diagonal_(0)


@pytest.mark.parametrize("within, across, verdict", [(0.1, 0.16, "pass"), (0.1, 0.13, "fail")])
def test_runs_are_apart_by_the_ratio_of_the_paper(within, across, verdict):
    rows = claims.judge_likeness(likeness(pairs(within, across), pairs(within, across)))
    assert rows[2]["verdict"] == rows[3]["verdict"] == verdict
    assert rows[2]["found"] == f"{across / within:.2f}"


def test_orthogonal_means_every_pair_of_solutions():
    cosine = torch.eye(4)
    cosine[1, 3] = cosine[3, 1] = -0.2
    rows = claims.judge_likeness(likeness(pairs(0.1, 0.3), pairs(1.0, 3.0), cosine))
    assert (rows[0]["found"], rows[0]["verdict"]) == ("0.2000", "fail")


def around(accuracy, away, independent):
    """A plane around a solution of 0.8 with one other run of the same accuracy."""
    points = {"random": (torch.ones(1), torch.tensor([accuracy]), torch.tensor([away]))}
    fit = FamilyFit(0.2, *(torch.zeros(1) for _ in range(4)), 0.02, 0.8, 10)
    optima = (torch.tensor([0.8]), torch.tensor([independent]))
    return Diversity(0, 0.8, points, optima, fit)


@pytest.mark.parametrize(
    "accuracy, away, verdicts",
    [
        (0.795, 0.05, ("pass", "pass", "pass", "fail")),
        (0.795, 0.19, ("fail", "pass", "pass", "fail")),  # as diverse as independent runs
        (0.70, 0.19, ("inconclusive", "pass", "pass", "fail")),  # not accurate enough to compare
        (0.795, 0.60, ("fail", "fail", "pass", "fail")),  # above the upper limit
        (0.50, 0.10, ("inconclusive", "pass", "fail", "fail")),  # below the lower one
    ],
)
def test_diversity_is_compared_where_accuracy_is_kept(accuracy, away, verdicts):
    rows = claims.judge_diversity([around(accuracy, away, 0.2)], 10)
    assert tuple(row["verdict"] for row in rows) == verdicts


def test_what_has_to_hold_everywhere_is_told_by_its_worst():
    assert claims.worst([]) == [] and claims.worst([3.0, -1.0, 2.0]) == [-1.0]
    row = claims.claim("x", "F", "above 0", "{:.1f}", [float("nan")], lambda v: v > 0, "too few")
    assert (row["verdict"], row["reason"]) == ("inconclusive", "too few")
