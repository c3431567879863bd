"""Ensembles on shifted and unknown data: scores, calibration, and how much the members differ.

Source: Fort et al. 2019 (arXiv:1912.02757), figures 9 and 10 and section 5.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.metrics import DivergenceAccumulator, SummaryAccumulator
from landscape_fast.metrics.diversity import off_diagonal_mean
from landscape_fast.ops._checks import message, require, whole

Predict = Callable[[Tensor], Tensor]
Images = Tensor | Callable[[], Tensor]


class ShiftScores(NamedTuple):
    """Scores of one ensemble on K sets of images, [K] each, float64 on the CPU.

    Attributes:
        accuracy: of the averaged probabilities, fraction; so are the next three.
        nll: nats.
        brier: in [0, 2].
        ece: fraction.
        entropy: of the averaged probabilities, nats.
        js: generalised Jensen-Shannon divergence of the M members, H(mean) - mean H, nats, at most
            ln M; it grows with M.
        pairwise_js: mean over the pairs of members, nats, at most ln 2; nan for one member.
        disagreement: fraction of the images with different labels, mean over the pairs; likewise.
    """

    accuracy: Tensor
    nll: Tensor
    brier: Tensor
    ece: Tensor
    entropy: Tensor
    js: Tensor
    pairwise_js: Tensor
    disagreement: Tensor


class ShiftCurves(NamedTuple):
    """Scores under shift.

    Attributes:
        severity: [V] int64, ascending.
        curves: method to `ShiftScores` [V], means over the shifts of each severity.
        shifts: the K pairs (name, severity), in the order given.
        each: method to `ShiftScores` [K], of every shift.
        members: M, the same for every method.
    """

    severity: Tensor
    curves: dict[str, ShiftScores]
    shifts: tuple[tuple[str, int], ...]
    each: dict[str, ShiftScores]
    members: int


@torch.no_grad()
def under_shift(
    predict: Predict | Mapping[str, Predict],
    shifts: Mapping[tuple[str, int], Images],
    targets: Tensor,
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    equal_members: int | None = None,
    batch_size: int | None = None,
    bins: int = 15,
) -> ShiftCurves:
    r"""Scores of ensembles by the severity of a shift of their inputs.

    .. math:: \mathrm{JS} = H\Big(\tfrac1M \sum_m p_m\Big) - \tfrac1M \sum_m H(p_m)

    The divergence of M members grows with M, so that all methods have the same number of them here.

    Args:
        predict: from images [N, ...] to the logits [M, N, C] of all members, which `groups` deals
            out to methods; or, without `groups`, method to such a function.
        shifts: (name, severity) to images, or to a function without arguments that makes them when
            it is their turn, so that not all are held at once. Severity 0 is the unchanged images.
        targets: [N] int64 classes, the same for every shift.
        groups: method to the places of its members among those of `predict`.
        equal_members: M; the first M members of every method are used. None: methods must have
            equally many.
        batch_size: how many images `predict` gets at a time; None gives it all of a shift.
        bins: of the calibration error.

    Returns:
        `ShiftCurves`.

    Raises:
        TypeError: if predictions are no tensor.
        ValueError: if methods have different numbers of members and `equal_members` is None, or
            another argument breaks its rule.

    Cost: one call of `predict` (or of each) per shift and batch; one `summary_sums` and one
        `divergence_sums` of two kinds of every method. With a `batch_size`, the logits of one batch
        are held.

    Source: Fort et al. 2019 (arXiv:1912.02757), figures 9 and 10; Hendrycks and Dietterich 2019
        (arXiv:1903.12261) for the severities.

    Example:
        >>> members, x = torch.randn(4, 8, 3), torch.randn(60, 8)
        >>> shifts = {("clean", 0): x, ("noise", 1): lambda: x + torch.randn(60, 8)}
        >>> y = (x @ members[0]).argmax(1)
        >>> groups = {"near": [0, 0], "independent": [0, 1, 2, 3]}
        >>> found = under_shift(lambda x: x @ members, shifts, y, groups, equal_members=2)
        >>> found.members, found.severity.tolist()
        (2, [0, 1])
        >>> found.curves["near"].js.tolist(), bool((found.curves["independent"].js > 0).all())
        ([0.0, 0.0], True)
    """
    op = "under_shift"
    require(len(shifts) >= 1, op, "shifts", "a mapping with at least one shift", "none")
    for key in shifts:
        good = isinstance(key, tuple) and len(key) == 2 and whole(key[1], 0)
        require(good, op, "shifts", "by (name, severity), severity of at least 0", repr(key))
    batching = (op, predict, groups, equal_members, batch_size)
    rows: dict[str, list[Tensor]] = {}
    for key, images in shifts.items():
        images = made(images)
        rule = f"of N = {len(targets)} images, as targets has it"
        require(len(images) == len(targets), op, f"shifts[{key}]", rule, len(images))
        found: dict[str, Measured] = {}
        for start, stop, batch in batches(images, *batching):
            for name, logits in batch.items():
                found.setdefault(name, Measured(bins)).update(logits, targets[start:stop])
        for name, measured in found.items():
            rows.setdefault(name, []).append(torch.stack(measured.scores()))
    members = next(iter(found.values())).members
    each = {name: ShiftScores(*torch.stack(found, 1)) for name, found in rows.items()}
    levels = torch.tensor([severity for _, severity in shifts])
    severity = levels.unique()
    curves = {
        name: ShiftScores(*(torch.stack([s[levels == v].mean() for v in severity]) for s in scores))
        for name, scores in each.items()
    }
    return ShiftCurves(severity, curves, tuple(shifts), each, members)


def made(images: Images) -> Tensor:
    """The images, if need be made now."""
    return images if isinstance(images, Tensor) else images()


def batches(
    images: Tensor,
    op: str,
    predict: Predict | Mapping[str, Predict],
    groups: Mapping[str, Sequence[int]] | None,
    equal_members: int | None,
    batch_size: int | None,
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """(start, stop, {method: logits [M, stop - start, C]}), M the same for all methods."""
    good = batch_size is None or whole(batch_size, 1)
    rule = "None or an integer of at least 1"
    require(good, op, "batch_size", rule, repr(batch_size))
    require(len(images) >= 1, op, "images", "[N, ...] with N at least 1", list(images.shape))
    many = isinstance(predict, Mapping)
    rule = "None where predict has the methods" if many else "method to places of members"
    require(many == (groups is None), op, "groups", rule, "None" if groups is None else "groups")
    step = batch_size or len(images)
    for start in range(0, len(images), step):
        part = images[start : start + step]
        if many:
            found = {name: _logits(op, own(part), part) for name, own in predict.items()}
        else:
            logits = _logits(op, predict(part), part)
            found = {name: _members(op, logits, name, places) for name, places in groups.items()}
        yield start, start + len(part), _equal(op, found, equal_members)


def _equal(op: str, found: dict[str, Tensor], equal_members: int | None) -> dict[str, Tensor]:
    require(len(found) >= 1, op, "groups", "at least one method", "none")
    counts = {name: len(logits) for name, logits in found.items()}
    if equal_members is None:
        rule, got = "of equal size, since JS grows with the members", f"members {counts}"
        remedy = f"equal_members={min(counts.values())} takes the first ones of each"
        require(len(set(counts.values())) == 1, op, "groups", rule, got, remedy)
        return found
    good = whole(equal_members, 1) and equal_members <= min(counts.values())
    rule = "None or an integer from 1 to the members of every method"
    require(good, op, "equal_members", rule, f"{equal_members!r} with {counts}")
    return {name: logits[:equal_members] for name, logits in found.items()}


def _logits(op: str, logits: Tensor, images: Tensor) -> Tensor:
    rule = f"logits [M, N, C] with N = {len(images)}, one row for each image"
    if not isinstance(logits, Tensor):
        raise TypeError(message(op, "predictions", rule, type(logits).__name__))
    fits = logits.ndim == 3 and logits.shape[1] == len(images) and min(logits.shape) >= 1
    require(fits, op, "predictions", rule, list(logits.shape))
    return logits


def _members(op: str, logits: Tensor, name: str, places: Sequence[int]) -> Tensor:
    index = torch.as_tensor(places, device=logits.device)
    M = len(logits)
    good = index.ndim == 1 and len(index) >= 1 and not index.is_floating_point()
    good = good and bool(((index >= 0) & (index < M)).all())
    rule = f"places from 0 to {M - 1}, at least one"
    require(good, op, f"groups[{name!r}]", rule, index.tolist())
    return logits[index.long()]


class Measured:
    """What is known of one ensemble after some batches."""

    def __init__(self, bins: int = 15) -> None:
        self.summary = SummaryAccumulator(bins)
        self.pairs = DivergenceAccumulator(("js", "disagreement"))
        self.members = 0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch."""
        self.members = len(logits)
        self.summary.update(logits, targets.to(logits.device))
        self.pairs.update(logits)

    def scores(self) -> ShiftScores:
        """0-dim float64 tensors on the CPU."""
        summary, pairs = self.summary.compute(), self.pairs.compute()
        scores = (summary.accuracy, summary.nll, summary.brier, summary.ece, summary.entropy)
        between = (off_diagonal_mean(pairs[kind]) for kind in ("js", "disagreement"))
        return ShiftScores(*(t.cpu() for t in (*scores, summary.mutual_information, *between)))
