"""Calibration errors: how far confidence is from accuracy, over bins of rows."""

import torch
from torch import Tensor

from landscape_fast.metrics.reliability import bin_sums, check_predictions, top_sums
from landscape_fast.ops._checks import require

NORMS = ("l1", "l2", "max")
ENTRIES = 2**22  # that class-wise sums widen at a time


def calibration_error(
    probabilities: Tensor,
    targets: Tensor,
    bins: int = 15,
    *,
    norm: str = "l1",
    equal_mass: bool = False,
) -> Tensor:
    r"""How far the accuracy of a model is from its confidence, over bins of confidence.

    .. math::
        g_b = |\mathrm{acc}_b - \mathrm{conf}_b|, \quad
        \mathrm{l1} = \sum_b \tfrac{n_b}{N} g_b, \quad
        \mathrm{l2} = \Big(\sum_b \tfrac{n_b}{N} g_b^2\Big)^{1/2}, \quad
        \mathrm{max} = \max_b g_b

    Args:
        probabilities: [N, C] predicted distributions, of an ensemble its mean over members. N and
            C at least 1.
        targets: [N] integers, the true classes. A class that is not in [0, C) counts as never
            predicted.
        bins: how many, each open below and closed above.
        norm: "l1" is the expected calibration error, "max" the maximum calibration error, "l2" the
            root mean square one. Empty bins count in none of them.
        equal_mass: bins of as many rows each instead of equal width; see `reliability_bins`.

    Returns:
        0-dim float64, a fraction. Of constant confidence, abs(accuracy - confidence) in every norm.
        NaN if a probability is.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as said, there are no rows, or `bins` or
            `norm` is unknown.

    Cost: one read, a search among the bins, and for `equal_mass` a sort. No host synchronisation.
        Differentiable through the confidences; labels and bins are constant.

    Source: Guo et al. 2017 (arXiv:1706.04599) for "l1" and "max", Kumar et al. 2019
        (arXiv:1909.10155) for "l2".

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
        >>> calibration_error(p, torch.tensor([0, 0, 0]), bins=2)  # one bin holds all of 0.5, ends
        tensor(0.3333, dtype=torch.float64)
    """
    op = "calibration_error"
    require(norm in NORMS, op, "norm", "'l1', 'l2' or 'max'", repr(norm))
    check_predictions(op, probabilities, targets, bins)
    _, *sums = top_sums(probabilities, targets, bins, equal_mass)
    return error_of(*sums, norm)[0]


def adaptive_ece(probabilities: Tensor, targets: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error over bins of equal mass: `calibration_error(equal_mass=True)`.

    Args:
        probabilities: [N, C]; rows of equal confidence share a bin, whatever their order.
        targets: [N] true classes.
        bins: how many; each holds N / bins rows where there are no ties.

    Returns:
        0-dim float64, a fraction.

    Raises:
        TypeError, ValueError: as `calibration_error`.

    Cost: that of `calibration_error`. Differentiable through the confidences.

    Source: Nguyen and O'Connor 2015 (arXiv:1508.05154); "AdaECE" of Mukhoti et al. 2020
        (arXiv:2002.09437).

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.125, 0.875]])
        >>> adaptive_ece(p, torch.tensor([0, 0]), bins=2)  # (1 - 0.75) / 2 + 0.875 / 2
        tensor(0.5625, dtype=torch.float64)
    """
    return calibration_error(probabilities, targets, bins, equal_mass=True)


def mce(
    probabilities: Tensor, targets: Tensor, bins: int = 15, *, equal_mass: bool = False
) -> Tensor:
    """Maximum calibration error: `calibration_error(norm="max")`.

    Args:
        probabilities: [N, C].
        targets: [N] true classes.
        bins: how many; a bin of few rows can dominate, equal mass guards against it.
        equal_mass: bins of as many rows each instead of equal width.

    Returns:
        0-dim float64, a fraction.

    Raises:
        TypeError, ValueError: as `calibration_error`.

    Cost: that of `calibration_error`. Differentiable through the confidences.

    Source: Guo et al. 2017 (arXiv:1706.04599), equation 5.

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.125, 0.875]])
        >>> mce(p, torch.tensor([0, 0]), bins=10)
        tensor(0.8750, dtype=torch.float64)
    """
    return calibration_error(probabilities, targets, bins, norm="max", equal_mass=equal_mass)


def classwise_ece(
    probabilities: Tensor, targets: Tensor, bins: int = 15, *, equal_mass: bool = False
) -> Tensor:
    r"""Calibration of the probability of every class, not only of the predicted one.

    .. math::
        \tfrac1C \sum_c \sum_b \tfrac{n_{cb}}{N} \Big|
            \tfrac{1}{n_{cb}} \sum_{n \in (c, b)} ([y_n = c] - p_{nc}) \Big|

    Args:
        probabilities: [N, C]; each class has its own bins, over its column.
        targets: [N] true classes. A class without rows counts like the others.
        bins: how many for each class.
        equal_mass: bins of N / bins rows for each class ("adaptive calibration error") instead of
            bins of equal width ("static calibration error").

    Returns:
        0-dim float64, a fraction. NaN if a probability is.

    Raises:
        TypeError, ValueError: as `calibration_error`.

    Cost: N * C entries searched among the bins, some columns at a time; for `equal_mass` sorted.
        No host synchronisation. Differentiable through the probabilities.

    Source: Nixon et al. 2019 (arXiv:1904.01685), SCE and ACE; classwise-ECE of Kull et al. 2019
        (arXiv:1910.12656).

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
        >>> classwise_ece(p, torch.tensor([0, 1]))
        tensor(0.2500, dtype=torch.float64)
    """
    check_predictions("classwise_ece", probabilities, targets, bins)
    gaps = classwise_gaps(probabilities, targets, bins, equal_mass)
    return gaps.abs().sum() / probabilities.numel()


def classwise_gaps(
    probabilities: Tensor, targets: Tensor, bins: int, equal_mass: bool = False
) -> Tensor:
    """[C, bins] float64, sums of ([y = c] - p) over the rows of each class and bin."""
    N, C = probabilities.shape
    found = []
    for start in range(0, C, max(1, ENTRIES // N)):
        columns = probabilities[:, start : start + max(1, ENTRIES // N)].T
        classes = torch.arange(start, start + len(columns), device=targets.device)
        sums = bin_sums(columns, targets == classes[:, None], bins, equal_mass)
        found.append(sums.right - sums.confidence)
    return torch.cat(found)


def error_of(counts: Tensor, right: Tensor, confidence: Tensor, norm: str) -> Tensor:
    """[...], the calibration error of `BinSums` [..., bins], of one batch or of many."""
    gaps = (right - confidence).abs()
    rows = counts.sum(-1)
    if norm == "l1":
        return gaps.sum(-1) / rows
    per_row = gaps / counts.clamp(min=1)  # 0 in an empty bin
    if norm == "l2":
        return (gaps * per_row).sum(-1).div(rows).sqrt()
    return torch.where(rows > 0, per_row.max(-1).values, float("nan"))
