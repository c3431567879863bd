"""The plane of accuracy against diversity: how different functions are, and could be.

Source: Fort et al. 2019 (arXiv:1912.02757), section 4.2 and appendix D.
"""

from typing import NamedTuple

from torch import Tensor

from landscape_fast.ops._checks import require


class DiversityPoints(NamedTuple):
    """Where functions lie in the plane of accuracy against diversity.

    Attributes:
        accuracy: [M], fraction of right labels.
        disagreement: [M], fraction of rows on which the label differs from the base's.
        normalised: [M], disagreement / (1 - accuracy); inf for a function without errors that
            differs from the base, nan for one that does not.
        base_accuracy: 0-dim, accuracy of the base.
    """

    accuracy: Tensor
    disagreement: Tensor
    normalised: Tensor
    base_accuracy: Tensor


def diversity_points(labels: Tensor, base: Tensor, targets: Tensor) -> DiversityPoints:
    r"""Accuracy of M functions and their disagreement with a base function.

    .. math:: d_m = \frac1N \sum_n [f_m(x_n) \ne f^*(x_n)], \qquad \bar d_m = d_m / (1 - a_m)

    Args:
        labels: [M, N] predicted classes of the functions, integers.
        base: [N] predicted classes of the base function f*, for instance one trained network.
        targets: [N] true classes.

    Returns:
        `DiversityPoints` in float64.

    Raises:
        ValueError: if the shapes disagree or there are no rows.

    Source: Fort et al. 2019 (arXiv:1912.02757), section 4.2.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]])
        >>> base, targets = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 1])
        >>> diversity_points(labels, base, targets).normalised
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    op = "diversity_points"
    require(
        labels.ndim == 2 and labels.shape[1] >= 1,
        op,
        "labels",
        "[M, N] with N at least 1",
        list(labels.shape),
    )
    rows = labels.shape[1]
    require(list(base.shape) == [rows], op, "base", f"[N] with N = {rows}", list(base.shape))
    require(
        list(targets.shape) == [rows], op, "targets", f"[N] with N = {rows}", list(targets.shape)
    )
    wrong = (labels != targets).double().mean(1)
    disagreement = (labels != base).double().mean(1)
    base_accuracy = (base == targets).double().mean()
    return DiversityPoints(1 - wrong, disagreement, disagreement / wrong, base_accuracy)


def upper_limit(accuracy: Tensor, base_accuracy: float, classes: int) -> Tensor:
    r"""Disagreement of a function whose errors are independent of the base's.

    .. math:: d = (1 - a^*) a + (1 - a) a^* + (1 - a^*)(1 - a) \frac{C - 2}{C - 1}

    Args:
        accuracy: any shape, accuracies a of the function.
        base_accuracy: accuracy a* of the base.
        classes: C, at least 2; errors fall on the C - 1 wrong classes alike.

    Returns:
        Disagreement (a fraction) in the shape of `accuracy`.

    Source: Fort et al. 2019, appendix D.1.
    """
    _check_plane("upper_limit", base_accuracy, classes)
    a, b = accuracy, base_accuracy
    return (1 - b) * a + (1 - a) * b + (1 - b) * (1 - a) * (classes - 2) / (classes - 1)


def lower_limit(accuracy: Tensor, base_accuracy: float, classes: int) -> Tensor:
    r"""Disagreement of the base function with a random part of its labels replaced.

    .. math:: a = a^* (1 - d) + d \frac{1 - a^*}{C - 1}, \qquad
              d = \frac{(C - 1)(a^* - a)}{C a^* - 1}

    Args:
        accuracy: any shape, accuracies a of the function.
        base_accuracy: accuracy a* of the base, above 1 / C.
        classes: C, at least 2.

    Returns:
        Disagreement (a fraction) in the shape of `accuracy`; 0 where a >= a*.

    Source: Fort et al. 2019, appendix D.2.
    """
    _check_plane("lower_limit", base_accuracy, classes)
    require(
        classes * base_accuracy > 1,
        "lower_limit",
        "base_accuracy",
        f"above chance, 1 / C = {1 / classes:.4g}",
        base_accuracy,
    )
    limit = (classes - 1) * (base_accuracy - accuracy) / (classes * base_accuracy - 1)
    return limit.clamp(min=0)


def _check_plane(op: str, base_accuracy: float, classes: int) -> None:
    require(0 <= base_accuracy <= 1, op, "base_accuracy", "a fraction in [0, 1]", base_accuracy)
    require(classes >= 2, op, "classes", "at least 2", classes)
