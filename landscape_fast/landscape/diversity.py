"""The plane of accuracy against diversity: how different functions are, and could be.

Source: Fort et al. 2019 (arXiv:1912.02757), section 4.2 and appendix D.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops._checks import require

# Where the exponent is looked for: outside, p^e is within 0.005 of its limits at 0 and infinity for
# every p from 0.01 to 0.99.
EXPONENTS = (1e-3, 1e3)
_GOLDEN = (math.sqrt(5) - 1) / 2
# Golden sections of a bracket: down to where a minimum in float64 is flat, some 1e-8 of it. A round
# quarters the bracket of the exponent.
_SECTIONS, _ROUNDS, _GRID = 35, 13, 257


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


class FamilyCurve(NamedTuple):
    """Points of `correlated_family`.

    Attributes:
        accuracy: fraction, in the shape of `p`; so is `disagreement`.
        disagreement: from the reference, fraction.
    """

    accuracy: Tensor
    disagreement: Tensor


def correlated_family(
    p: Tensor, exponent: float, reference_accuracy: float, classes: int
) -> FamilyCurve:
    r"""Functions that keep what the reference has right rather than what it has wrong.

    Of the reference's right labels a share p, and of its wrong labels a share p^e, is replaced by
    any other class:

    .. math:: d = a^* p + (1 - a^*) p^e, \qquad
              a = a^* (1 - p) + (1 - a^*) \frac{p^e}{C - 1}

    With e = 1 it is `lower_limit`; with e without end, where wrong labels stay, d = a* - a, the
    least there can be; with e = 0 all wrong labels change at once. For e below 1 the accuracy first
    rises above a* and then falls: p tells the points of the curve apart, a does not. `upper_limit`
    is no member of the family.

    Args:
        p: any shape, shares in [0, 1] of the right labels that change.
        exponent: e, at least 0; infinity too.
        reference_accuracy: a*, a fraction.
        classes: C, at least 2.

    Returns:
        `FamilyCurve`, in the shape and dtype of `p`.

    Raises:
        ValueError: if a number is out of range.

    Source: Fort et al. 2019 (arXiv:1912.02757), appendix D.3, which prints the two left-hand sides
        the wrong way round.

    Example:
        >>> correlated_family(torch.tensor([0.0, 0.1]), 1.0, 0.7, 10)
        FamilyCurve(accuracy=tensor([0.7000, 0.6333]), disagreement=tensor([0.0000, 0.1000]))
    """
    op = "correlated_family"
    _check_plane(op, reference_accuracy, classes, "reference_accuracy")
    require(exponent >= 0, op, "exponent", "at least 0", exponent)
    inside = bool(((p >= 0) & (p <= 1)).all())
    require(inside, op, "p", "in [0, 1]", "numbers outside")
    return FamilyCurve(*_family(p, p.pow(exponent), reference_accuracy, classes))


def _family(right: Tensor, wrong: Tensor, a: float, classes: int) -> tuple[Tensor, Tensor]:
    """Accuracy and disagreement where these shares of right and wrong labels are replaced."""
    accuracy = a * (1 - right) + (1 - a) * wrong / (classes - 1)
    return accuracy, a * right + (1 - a) * wrong


class FamilyFit(NamedTuple):
    """The curve of `correlated_family` nearest to S points.

    Attributes:
        exponent: e.
        p: [S] float64, where on the curve each point's nearest one is; so are the next three.
        accuracy: [S], of that nearest point.
        disagreement: [S], of that nearest point.
        distance: [S], from the point to it, in the plane of accuracy and disagreement.
        rmse: root of the mean squared distance.
        reference_accuracy: a*.
        classes: C.
    """

    exponent: float
    p: Tensor
    accuracy: Tensor
    disagreement: Tensor
    distance: Tensor
    rmse: float
    reference_accuracy: float
    classes: int


def fit_correlated_family(
    accuracy: Tensor, disagreement: Tensor, reference_accuracy: float, classes: int
) -> FamilyFit:
    """The exponent whose curve lies nearest to S points, by the squares of their distances.

    A point's distance is that to the nearest point of the curve, found in p: the accuracy is never
    inverted, for a curve may have one accuracy twice.

    Args:
        accuracy: [S] fractions.
        disagreement: [S] fractions, from the reference, not normalised; not all 0, where every
            curve fits.
        reference_accuracy: a*; at 0 or 1, where the reference has one kind of labels only, the
            exponent says nothing.
        classes: C, at least 2.

    Returns:
        `FamilyFit`, on the CPU. An exponent at an end of `EXPONENTS` means the limit beyond it.

    Raises:
        ValueError: if shapes disagree or a number is out of range.

    Cost: some hundred distances of every point to a curve; a fraction of a second for hundreds.

    Source: Fort et al. 2019 (arXiv:1912.02757), appendix D.3 and figure S6, where e = 0.22.

    Example:
        >>> curve = correlated_family(torch.linspace(0, 0.3, 7).double(), 0.25, 0.7, 10)
        >>> fit = fit_correlated_family(*curve, 0.7, 10)
        >>> round(fit.exponent, 6), fit.rmse < 1e-6
        (0.25, True)
    """
    op = "fit_correlated_family"
    _check_plane(op, reference_accuracy, classes, "reference_accuracy")
    good = accuracy.ndim == 1 and len(accuracy) >= 1
    require(good, op, "accuracy", "[S] with S at least 1", list(accuracy.shape))
    same, rule = disagreement.shape == accuracy.shape, f"[S] with S = {len(accuracy)}"
    require(same, op, "disagreement", rule, list(disagreement.shape))
    points = torch.stack([accuracy, disagreement]).double().cpu()
    for name, values in zip(("accuracy", "disagreement"), points, strict=True):
        require(bool(((values >= 0) & (values <= 1)).all()), op, name, "in [0, 1]", values.tolist())
    some = bool((points[1] > 0).any())
    require(some, op, "disagreement", "above 0 for some point", "0 for all")
    about = (reference_accuracy, classes)

    low, high = (math.log(e) for e in EXPONENTS)
    for points_between, sections in ((57, 12), *[(9, _SECTIONS)] * _ROUNDS):
        grid = torch.linspace(low, high, points_between, dtype=torch.float64)
        losses = [_nearest(points, part.exp(), *about, sections)[1] for part in grid.split(9)]
        at = int(torch.cat(losses).square().sum(1).argmin())
        low, high = grid[max(at - 1, 0)].item(), grid[min(at + 1, len(grid) - 1)].item()
    exponent = math.exp((low + high) / 2)
    ends = torch.tensor([exponent], dtype=torch.float64)
    p, distance = (found[0] for found in _nearest(points, ends, *about))
    found = _family(p, p.pow(exponent), *about)
    rmse = float(distance.square().mean().sqrt())
    return FamilyFit(exponent, p, *found, distance, rmse, *about)


def _nearest(
    points: Tensor, exponents: Tensor, a: float, classes: int, sections: int = _SECTIONS
) -> tuple[Tensor, Tensor]:
    """Where on E curves the points [2, S] have their nearest ones, [E, S], and how far these are.

    The place on a curve is looked for twice, as p and as p^e: one moves where the other is steep.
    """
    e = exponents[:, None, None, None]
    to_right = torch.cat([torch.ones_like(e), 1 / e], 1)  # [E, 2, 1, 1]
    to_wrong = torch.cat([e, torch.ones_like(e)], 1)

    def away(t: Tensor) -> Tensor:  # [E, 2, S, G]
        curve = _family(t.pow(to_right), t.pow(to_wrong), a, classes)
        pairs = zip(curve, points[..., None], strict=True)
        return sum((own - point).square() for own, point in pairs)

    grid = torch.linspace(0, 1, _GRID, dtype=torch.float64)
    at = away(grid.expand(len(e), 2, 1, -1)).argmin(-1)  # [E, 2, S]
    left, right = grid[(at - 1).clamp(min=0)], grid[(at + 1).clamp(max=_GRID - 1)]
    for _ in range(sections):
        step = _GOLDEN * (right - left)
        inner = torch.stack([right - step, left + step], -1)
        lower, upper = away(inner).unbind(-1)
        first = lower <= upper
        left = torch.where(first, left, inner[..., 0])
        right = torch.where(first, inner[..., 1], right)
    # and the point of the grid: 0 is far from what lies beside it where the curve is steep
    t = torch.stack([grid[at], (left + right) / 2], -1)  # [E, 2, S, 2]
    p, found = (v.transpose(1, 2).flatten(2) for v in (t.pow(to_right), away(t)))
    distances, best = found.min(-1, keepdim=True)
    return p.gather(-1, best)[..., 0], distances[..., 0].sqrt()


def _check_plane(op: str, accuracy: float, classes: int, name: str = "base_accuracy") -> None:
    require(0 <= accuracy <= 1, op, name, "a fraction in [0, 1]", accuracy)
    require(classes >= 2, op, "classes", "at least 2", classes)
