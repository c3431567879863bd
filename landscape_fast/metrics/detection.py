"""Detection of examples from elsewhere: scores of an ensemble, ROC and precision-recall figures."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.metrics._ranking import Ranking, ranking
from landscape_fast.ops._checks import check_tensor, require

KINDS = ("entropy", "max_probability", "mutual_information", "energy")


class OodDetection(NamedTuple):
    """How well a score separates out-of-distribution (OOD) rows from in-distribution ones.

    Attributes:
        auroc: 0-dim float64; the same whichever side is called positive.
        aupr_in: average precision with the in-distribution rows as positives, found by low scores.
        aupr_out: average precision with the OOD rows as positives, found by high scores.
        fpr95: share of the OOD rows accepted where at least 95 % of the in-distribution rows are.
        fpr95_out: share of the in-distribution rows reported where at least 95 % of the OOD rows
            are.
    """

    auroc: Tensor
    aupr_in: Tensor
    aupr_out: Tensor
    fpr95: Tensor
    fpr95_out: Tensor


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    r"""Area under the ROC curve: how often a positive row has the larger score of two.

    .. math:: P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)

    Args:
        scores: [N] floats, high for positives; infinities are values like others.
        positive: [N] bool.

    Returns:
        0-dim float64. Ties count one half, exactly: pairs are counted in integers. 0.5 for a
        constant score. NaN without positives, without negatives, or if a score is NaN.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as said, or N is 0.

    Cost: O(N log N). No host synchronisation. Constant almost everywhere: it has no gradient.

    Source: Hanley and McNeil 1982.

    Example:
        >>> auroc(torch.tensor([0.1, 0.5, 0.5, 0.9]), torch.tensor([False, False, True, True]))
        tensor(0.8750, dtype=torch.float64)
    """
    return _auroc(ranking("auroc", "scores", scores, "positive", positive))


def aupr(scores: Tensor, positive: Tensor) -> Tensor:
    r"""Average precision, the area under the precision-recall curve without interpolation.

    .. math:: \sum_t (R_t - R_{t-1}) P_t \quad \text{over the distinct scores } t, \text{ falling}

    Args:
        scores: [N] floats, high for positives.
        positive: [N] bool.

    Returns:
        0-dim float64. Rows of equal score enter together. The share of positives for a constant
        score, 1 without negatives, NaN without positives or if a score is NaN.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as said, or N is 0.

    Cost: O(N log N). No host synchronisation. It has no gradient.

    Source: `average_precision_score` of scikit-learn; Davis and Goadrich 2006 on why not the
        trapezoidal rule.

    Example:
        >>> aupr(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
        tensor(0.8333, dtype=torch.float64)
    """
    return _aupr(ranking("aupr", "scores", scores, "positive", positive))


def fpr_at_recall(scores: Tensor, positive: Tensor, recall: float = 0.95) -> Tensor:
    """Share of the negatives that lie above the highest threshold that finds enough positives.

    Args:
        scores: [N] floats, high for positives.
        positive: [N] bool.
        recall: the share of the positives to find, in (0, 1]. Thresholds are the scores
            themselves; there is no interpolation between them.

    Returns:
        0-dim float64. 1 for a constant score. NaN without positives, without negatives, or if a
        score is NaN.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as said, N is 0, or `recall` is not.

    Cost: O(N log N). No host synchronisation. It has no gradient.

    Source: "FPR at 95 % TPR" of Liang et al. 2018 (arXiv:1706.02690).

    Example:
        >>> scores, positive = torch.arange(4.0), torch.tensor([False, True, False, True])
        >>> fpr_at_recall(scores, positive), fpr_at_recall(scores, positive, recall=0.5)
        (tensor(0.5000, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    op = "fpr_at_recall"
    good = isinstance(recall, (int, float)) and 0 < recall <= 1
    require(good, op, "recall", "a fraction in (0, 1]", recall)
    return _fpr(ranking(op, "scores", scores, "positive", positive), recall)


def ood_detection(in_scores: Tensor, out_scores: Tensor) -> OodDetection:
    """All figures of `OodDetection` from the scores of both sets.

    Args:
        in_scores: [N] floats, scores of the in-distribution rows, as of `ood_scores`: high means
            out of distribution.
        out_scores: [N'] of the same dtype and device, scores of the OOD rows.

    Returns:
        `OodDetection`, 0-dim float64 each; NaN if a score is.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as said, or a set is empty.

    Cost: two sorts of N + N' numbers. No host synchronisation. It has no gradient.

    Source: Hendrycks and Gimpel 2017 (arXiv:1610.02136) for AUROC and both AUPR; `fpr95` as in
        Liang et al. 2018 (arXiv:1706.02690), where in-distribution is positive.

    Example:
        >>> ood_detection(torch.tensor([0.1, 0.2]), torch.tensor([0.15, 0.9])).auroc
        tensor(0.7500, dtype=torch.float64)
    """
    op = "ood_detection"
    check_tensor(op, "in_scores", in_scores, "N", (None,))
    check_tensor(op, "out_scores", out_scores, "N", (None,), like=in_scores, like_name="in_scores")
    for name, given in (("in_scores", in_scores), ("out_scores", out_scores)):
        require(len(given) > 0, op, name, "[N] with N at least 1", list(given.shape))
    scores = torch.cat([in_scores, out_scores])
    out = torch.arange(len(scores), device=scores.device) >= len(in_scores)
    return figures_of(scores, out)


def figures_of(scores: Tensor, out: Tensor) -> OodDetection:
    """`ood_detection` of scores [N], of which the rows `out` [N] bool are OOD."""
    by_out = ranking("ood_detection", "scores", scores, "out", out)
    by_in = ranking("ood_detection", "scores", -scores, "out", ~out)
    return OodDetection(
        _auroc(by_out), _aupr(by_in), _aupr(by_out), _fpr(by_in, 0.95), _fpr(by_out, 0.95)
    )


def ood_scores(logits: Tensor, kind: str = "entropy") -> Tensor:
    r"""How much an ensemble takes each example for one from elsewhere: high means OOD.

    .. math::
        \bar p = \tfrac1M \sum_m p_m, \quad H(\bar p), \quad 1 - \max_c \bar p_c, \quad
        H(\bar p) - \tfrac1M \sum_m H(p_m), \quad -\tfrac1M \sum_m \ln \sum_c e^{z_{mc}}

    Args:
        logits: [M, N, C], M and C at least 1.
        kind: "entropy" of the averaged probabilities (nats), "max_probability" (1 - the largest
            averaged probability, summed from the other classes, so that sure predictions keep
            their order), "mutual_information" between prediction and member (nats, at least 0;
            0 for one member), or "energy" (mean over members; it depends on the offset of the
            logits, which the likelihood does not fix).

    Returns:
        [N] float64. An example with a NaN, a +inf or a row of -inf has the score NaN (for
        "energy", what the formula gives).

    Raises:
        TypeError: if `logits` is not a tensor.
        ValueError: if its shape or dtype is not as above, or `kind` is unknown.

    Cost: M * N * C exponentials in float64, [N, C] of them at a time. No host synchronisation.
        Differentiable; through the largest class as a constant.

    Source: Hendrycks and Gimpel 2017 (arXiv:1610.02136) for the largest probability,
        Lakshminarayanan et al. 2017 (arXiv:1612.01474) for the entropy of an ensemble, Depeweg et
        al. 2018 (arXiv:1710.07283) for the mutual information, Liu et al. 2020 (arXiv:2010.03759)
        for the energy.

    Example:
        >>> sure = torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]]])  # two members that contradict
        >>> ood_scores(sure, "mutual_information")
        tensor([0.6919], dtype=torch.float64)
    """
    op = "ood_scores"
    check_tensor(op, "logits", logits, "M, N, C", (None, None, None))
    M, _, C = logits.shape
    rule = "[M, N, C] with M and C at least 1"
    require(M > 0 and C > 0, op, "logits", rule, list(logits.shape))
    require(kind in KINDS, op, "kind", f"one of {', '.join(map(repr, KINDS))}", repr(kind))
    if kind == "energy":
        return -sum(member.double().logsumexp(-1) for member in logits.unbind(0)) / M
    mixed, own = 0.0, 0.0
    for member in logits.unbind(0):
        p = member.double().softmax(-1)
        mixed = mixed + p / M
        if kind == "mutual_information":
            own = own + _entropy(p) / M
    if kind == "max_probability":
        others = mixed.argmax(-1, keepdim=True) != torch.arange(C, device=logits.device)
        return (mixed * others).sum(-1)
    if kind == "entropy":
        return _entropy(mixed)
    return (_entropy(mixed) - own).clamp(min=0)  # rounding may go below


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def _auroc(r: Ranking) -> Tensor:
    missed = r.unmarked  # negatives so far
    positives, negatives = r.marked[-1], missed[-1]
    # of each positive: the negatives below it twice, those beside it once
    won = 2 * negatives - missed[r.stop] - missed[r.start]
    return r.known((won * r.marks).sum().double() / 2 / positives / negatives)


def _aupr(r: Ranking) -> Tensor:
    precision = r.marked[r.stop].double() / r.stop
    return r.known((precision * r.marks).sum() / r.marked[-1])


def _fpr(r: Ranking, recall: float) -> Tensor:
    missed = r.unmarked  # negatives so far
    positives, negatives = r.marked[-1], missed[-1]
    enough = r.marked[r.stop].double() / positives >= recall
    above = torch.where(enough, missed[r.stop], negatives).min()
    nothing = torch.where(positives > 0, 0.0, float("nan"))
    return r.known(above.double() / negatives + nothing)
