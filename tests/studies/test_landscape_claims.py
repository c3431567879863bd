"""Claims of a landscape report: verdicts on numbers that decide them."""

import math
from typing import NamedTuple

import pytest
import torch

from landscape_fast.landscape import FamilyFit, OodReport, ShiftCurves
from landscape_fast.studies import _landscape_claims as claims
from landscape_fast.studies._landscape_measure import Diversity, Likeness
from landscape_fast.studies._landscape_pages import counted
from landscape_fast.studies._landscape_shift import SINGLE, Shift
from landscape_fast.studies._landscape_tables import fit_rows


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


def test_the_limits_hold_for_independent_runs_too():
    rows = claims.judge_diversity([around(0.795, 0.05, 0.6)], 10)
    assert [row["verdict"] for row in rows[1:3]] == ["fail", "pass"]


def test_a_loss_of_just_the_margin_is_compared():
    exactly = torch.tensor([0.8], dtype=torch.float64) - 0.01 - 1e-16
    plane = around(0.0, 0.05, 0.2)
    plane.points["random"] = (torch.ones(1), exactly, torch.tensor([0.05]))
    assert claims.judge_diversity([plane], 10)[0]["verdict"] == "pass"
    assert fit_rows([plane])[0]["best"] == "random 0.24"


def test_a_solution_at_chance_has_no_lower_limit():
    plane = around(0.1, 0.05, 0.2)._replace(accuracy=0.1)
    row = claims.judge_diversity([plane], 10)[2]
    assert (row["verdict"], row["reason"]) == ("inconclusive", claims.CHANCE)
    both = claims.judge_diversity([plane, around(0.7, 0.19, 0.2)], 10)[2]
    assert (both["verdict"], both["repeats"]) == ("pass", 1)


class Scores(NamedTuple):
    js: torch.Tensor
    brier: torch.Tensor | None = None


SINGLE_BRIER = {SINGLE: Scores(torch.zeros(3), torch.tensor([0.3, 0.4, 0.5]))}
WAYS = ("random", "diagonal")


def shift(**js):
    """Three severities of five networks; a Brier score that is lower by 0.01, 0.02 and 0.03."""
    better = torch.tensor([0.29, 0.375, 0.47])
    curves = {way: Scores(torch.tensor(value), better) for way, value in js.items()}
    found = ShiftCurves(torch.tensor([0, 3, 5]), SINGLE_BRIER | curves, (), {}, 5)
    return Shift(found, (), 100, "")


INDEPENDENT, RANDOM, DIAGONAL = [0.1, 0.2, 0.3], [0.05, 0.1, 0.1], [0.01, 0.02, 0.02]


@pytest.mark.parametrize(
    "changes, verdicts",
    [
        ({}, ["pass"] * 4),
        ({"random": [0.07, 0.1, 0.1]}, ["fail", "pass", "pass", "pass"]),  # 1.43 without corruption
        ({"independent": [0.1, 0.2, 0.19]}, ["pass", "fail", "pass", "pass"]),
        ({"diagonal": [0.01, 0.02, 0.11]}, ["pass", "pass", "fail", "pass"]),
    ],
)
def test_under_shift_the_worst_severity_decides(changes, verdicts):
    js = {"independent": INDEPENDENT, "random": RANDOM, "diagonal": DIAGONAL, **changes}
    rows = claims.judge_shift(shift(**js), WAYS, {})
    assert [row["verdict"] for row in rows] == verdicts


def test_under_shift_a_claim_says_which_samples_are_missing():
    reasons = {"random, under shift": "fewer than 5", "diagonal": "none was accurate"}
    rows = claims.judge_shift(shift(independent=INDEPENDENT), WAYS, reasons)
    assert rows[0]["reason"] == "random: fewer than 5; diagonal: none was accurate"
    assert rows[2]["reason"] == "none was accurate"
    rows = claims.judge_shift(shift(independent=INDEPENDENT, diagonal=DIAGONAL), WAYS, reasons)
    assert rows[0]["verdict"] == "pass" and rows[2]["reason"] == "random: fewer than 5"
    rows = claims.judge_shift(None, WAYS, reasons)
    assert {row["reason"] for row in rows} == {claims.ONE_RUN}


def elsewhere(**js):
    unknown = {way: {"noise": Scores(torch.tensor(value))} for way, value in js.items()}
    return OodReport({}, unknown, 5)


def test_on_foreign_images_a_claim_says_which_method_is_missing():
    rows = claims.judge_ood(elsewhere(independent=0.3, trajectory=0.2, diagonal=0.1), {})
    assert [row["verdict"] for row in rows] == ["pass", "pass"]
    rows = claims.judge_ood(elsewhere(independent=0.1, trajectory=0.2, diagonal=0.3), {})
    assert [row["verdict"] for row in rows] == ["fail", "fail"]
    reasons = {"trajectory, under shift": "too few checkpoints", "diagonal": "none was accurate"}
    rows = claims.judge_ood(elsewhere(independent=0.3, diagonal=0.1), reasons)
    assert [row["reason"] for row in rows] == ["too few checkpoints"] * 2
    rows = claims.judge_ood(elsewhere(independent=0.3, trajectory=0.1), reasons)
    assert [row["reason"] for row in rows] == ["", "none was accurate"]


def test_verdicts_are_counted_in_a_sentence():
    rows = [{"verdict": verdict} for verdict in ("pass", "pass", "fail", "inconclusive")]
    assert counted(rows) == "2 of 4 claims hold, 1 fails, 1 is inconclusive"
    assert counted(rows[:2]) == "2 of 2 claims hold, 0 fail, 0 are inconclusive"


def test_what_has_to_hold_everywhere_is_told_by_its_worst():
    assert claims.worst([]) == [] and claims.worst([3.0, -1.0, 2.0]) == [-1.0]
    assert math.isnan(claims.worst([1.0, math.nan])[0])
    row = claims.claim("x", "F", "above 0", "{:.1f}", [float("nan")], lambda v: v > 0, "too few")
    assert (row["verdict"], row["reason"]) == ("inconclusive", "too few")
