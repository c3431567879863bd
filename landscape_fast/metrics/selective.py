"""Selective prediction: how the error falls when a model answers only where it is confident."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.metrics._ranking import ranking
from landscape_fast.ops._checks import require


class RiskCoverage(NamedTuple):
    """The risk-coverage curve, in float64.

    Attributes:
        coverage: [N], k / N for k = 1 to N, the share of the rows that are answered.
        risk: [N], share of wrong answers among the k most confident rows.
        aurc: 0-dim, mean of `risk`, the area under the curve.
        eaurc: 0-dim, `aurc` above that of an order with all right answers first; at least 0.
    """

    coverage: Tensor
    risk: Tensor
    aurc: Tensor
    eaurc: Tensor


def risk_coverage(confidence: Tensor, right: Tensor) -> RiskCoverage:
    r"""Error rate of the k most confident answers, for every k, and the area below.

    .. math::
        r_k = \tfrac1k \sum_{i \le k} [\hat y_{(i)} \ne y_{(i)}], \quad
        \mathrm{AURC} = \tfrac1N \sum_k r_k, \quad
        \mathrm{E\text{-}AURC} = \mathrm{AURC} - \tfrac1N \sum_k \tfrac{\max(0, k - n_{right})}{k}

    Args:
        confidence: [N] floats, for instance the largest probability, or minus an uncertainty.
        right: [N] bool, whether each answer is right.

    Returns:
        `RiskCoverage`. Within a tie the risk is the mean over all orders of its rows, so that the
        order of the input never matters; of a constant confidence it is the error rate everywhere.
        All NaN but the coverage if a confidence is NaN.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as said, or N is 0.

    Cost: O(N log N). No host synchronisation. It has no gradient.

    Source: El-Yaniv and Wiener 2010 for the curve; Geifman et al. 2019 (arXiv:1805.08206) for AURC
        and E-AURC, whose optimum is taken exactly for N rows here, not by its integral.

    Example:
        >>> curve = risk_coverage(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
        >>> curve.risk
        tensor([0.0000, 0.5000, 0.3333], dtype=torch.float64)
        >>> curve.aurc, curve.eaurc
        (tensor(0.2778, dtype=torch.float64), tensor(0.1667, dtype=torch.float64))
    """
    r = ranking("risk_coverage", "confidence", confidence, "right", right)
    answered = torch.arange(1, len(confidence) + 1, device=confidence.device)
    errors = r.unmarked  # so far
    before, after, size = errors[r.start], errors[r.stop], r.stop - r.start
    # in integers: a risk is rounded once, as the best one is, and never below it
    wrong_by_size = before * size + (after - before) * (answered - r.start)
    risk = r.known(wrong_by_size.double() / (size * answered))
    best = (answered - r.marked[-1]).clamp(min=0).double() / answered
    return RiskCoverage(
        answered.double() / len(confidence), risk, risk.mean(), (risk - best).mean()
    )


def coverage_at_risk(confidence: Tensor, right: Tensor, risk: float) -> Tensor:
    """The largest share of rows that a threshold on the confidence can answer at a given risk.

    Args:
        confidence: [N] floats.
        right: [N] bool, whether each answer is right.
        risk: the largest error rate among the answers, in [0, 1].

    Returns:
        0-dim float64. A threshold takes rows of equal confidence together. 0 where even the most
        confident rows have a larger risk; NaN if a confidence is NaN.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as said, N is 0, or `risk` is no fraction.

    Cost: O(N log N). No host synchronisation. It has no gradient.

    Source: El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017 (arXiv:1705.08500).

    Example:
        >>> right = torch.tensor([True, True, False, True])
        >>> coverage_at_risk(torch.tensor([0.9, 0.8, 0.7, 0.6]), right, 0.25)
        tensor(1., dtype=torch.float64)
        >>> coverage_at_risk(torch.tensor([0.9, 0.8, 0.7, 0.6]), right, 0.1)
        tensor(0.5000, dtype=torch.float64)
    """
    op = "coverage_at_risk"
    good = isinstance(risk, (int, float)) and 0 <= risk <= 1
    require(good, op, "risk", "a fraction in [0, 1]", risk)
    r = ranking(op, "confidence", confidence, "right", right)
    low = r.unmarked[r.stop].double() / r.stop <= risk
    return r.known((r.stop * low).max().double() / len(confidence))
