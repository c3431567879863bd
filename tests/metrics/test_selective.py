from itertools import permutations

import pytest
import torch

from landscape_fast.metrics import coverage_at_risk, risk_coverage


def answers(count=300, steps=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(count, generator=generator, dtype=torch.float64)
    right = torch.rand(count, generator=generator, dtype=torch.float64) < confidence
    return confidence if steps is None else (confidence * steps).round() / steps, right


def in_order(confidence, right):
    """The curve without ties, in a loop."""
    wrong = (~right[confidence.argsort(descending=True)]).double()
    return torch.stack([wrong[:k].mean() for k in range(1, len(wrong) + 1)])


def test_the_curve_is_that_of_a_loop():
    confidence, right = answers()
    found, risk = risk_coverage(confidence, right), in_order(confidence, right)
    torch.testing.assert_close(found.risk, risk)
    torch.testing.assert_close(found.coverage, torch.linspace(1 / 300, 1, 300).double())
    torch.testing.assert_close(found.aurc, risk.mean())
    best = in_order(right.double() + torch.linspace(0, 0.1, 300), right).mean()
    torch.testing.assert_close(found.eaurc, risk.mean() - best)


def test_a_tie_is_the_mean_over_its_orders():
    confidence = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1])
    right = torch.tensor([True, False, True, True, False, False, True])
    curves = []
    for middle in permutations(range(1, 5)):
        for last in permutations(range(5, 7)):
            order = torch.tensor([0, *middle, *last])
            curves.append(in_order(torch.arange(7, 0, -1), right[order]))
    torch.testing.assert_close(risk_coverage(confidence, right).risk, torch.stack(curves).mean(0))


def test_the_order_of_the_rows_never_matters():
    confidence, right = answers(steps=10)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        risk_coverage(confidence[order], right[order]),
        risk_coverage(confidence, right),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_ends_of_the_scale():
    yes, no = torch.ones(9).bool(), torch.zeros(9).bool()
    some = torch.arange(9) < 6
    falling = torch.arange(9, 0, -1).float()
    assert risk_coverage(falling, yes).aurc == 0 and risk_coverage(falling, yes).eaurc == 0
    assert risk_coverage(falling, no).aurc == 1 and risk_coverage(falling, no).eaurc == 0
    tied = torch.cat([torch.arange(60, 49, -1), torch.ones(49)])  # 49 * (1 / 49) is less than 1
    assert risk_coverage(tied, torch.arange(60) < 11).eaurc == 0
    assert risk_coverage(falling, some).eaurc == 0 < risk_coverage(falling, some).aurc
    assert risk_coverage(-falling, some).eaurc > 0.3
    constant = risk_coverage(torch.full((9,), 0.2), some)
    torch.testing.assert_close(constant.risk, torch.full((9,), 1 / 3).double())
    falling[3] = float("nan")
    found = risk_coverage(falling, some)
    assert found.risk.isnan().all() and found.aurc.isnan() and found.eaurc.isnan()
    assert coverage_at_risk(falling, some, 0.5).isnan()


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("risk", [0, 0.02, 0.2, 1])
def test_coverage_is_that_of_the_best_threshold(steps, risk):
    confidence, right = answers(steps=steps)
    shares = [
        float((confidence >= t).double().mean())
        for t in confidence
        if float((~right[confidence >= t]).double().mean()) <= risk
    ]
    assert float(coverage_at_risk(confidence, right, risk)) == pytest.approx(max(shares, default=0))


def test_nothing_is_answered_where_the_surest_answer_is_wrong():
    confidence, right = torch.tensor([0.9, 0.8]), torch.tensor([False, True])
    assert coverage_at_risk(confidence, right, 0.4) == 0
    assert coverage_at_risk(confidence, right, 0.5) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: risk_coverage(torch.ones(0), torch.ones(0).bool()),
            r"risk_coverage: confidence must be \[N\] with N at least 1; got \[0\]",
        ),
        (
            lambda: risk_coverage(torch.ones(2), torch.ones(2)),
            "risk_coverage: right must be one of bool",
        ),
        (
            lambda: coverage_at_risk(torch.ones(2), torch.ones(2).bool(), 5),
            r"coverage_at_risk: risk must be a fraction in \[0, 1\]; got 5",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
