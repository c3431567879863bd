"""Whether a model's confidence is the share of its answers that are right."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from landscape_fast.ops._checks import LOW, check_tensor, check_types, require, whole
from landscape_fast.ops.ensemble_summary import inner_edges
from landscape_fast.ops.pairwise_divergence import LABELS


class ReliabilityBins(NamedTuple):
    """Rows sorted by confidence into bins, (edge, next edge].

    Attributes:
        edges: [bins + 1], from 0 to 1; of equal mass, those at a confidence of nan are nan.
        counts: [bins] int64, rows in each bin.
        accuracy: [bins], fraction of right answers; nan in an empty bin.
        confidence: [bins], mean confidence; nan in an empty bin.
        ece: 0-dim, sum over bins of (count / N) * abs(accuracy - confidence), a fraction.
    """

    edges: Tensor
    counts: Tensor
    accuracy: Tensor
    confidence: Tensor
    ece: Tensor


class BinSums(NamedTuple):
    """Sums over the rows of each bin, which add over batches where the edges are fixed.

    Attributes:
        edges: [A, bins + 1].
        counts: [A, bins] int64, rows.
        right: [A, bins] float64, right answers; `confidence` likewise, their confidences.
    """

    edges: Tensor
    counts: Tensor
    right: Tensor
    confidence: Tensor


def reliability_bins(
    probabilities: Tensor, targets: Tensor, bins: int = 15, *, equal_mass: bool = False
) -> ReliabilityBins:
    """Accuracy and mean confidence per confidence bin, in float64.

    Args:
        probabilities: [N, C] predicted distributions, of an ensemble its mean over members.
        targets: [N] integers, the true classes.
        bins: how many, each open below and closed above.
        equal_mass: False for bins of equal width on [0, 1]. True for bins of N / bins rows: bin b
            ends at the confidence of rank ceil((b + 1) N / bins). Rows of equal confidence share a
            bin, whatever their order, so that ties make bins uneven and leave some empty.

    Returns:
        `ReliabilityBins`.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as said, there are no rows, or `bins` is
            below 1.

    Cost: one read, a search among the bins, and for `equal_mass` a sort. No host synchronisation.
        Differentiable through the confidences; labels and bins are constant.

    Source: Guo et al. 2017 (arXiv:1706.04599); bins of equal mass as in Nguyen and O'Connor 2015
        (arXiv:1508.05154). The ECE of equal widths is that of `ops.ensemble_summary`.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.25, 0.75]])
        >>> reliability_bins(p, torch.tensor([0, 1, 0]), bins=5).counts
        tensor([0, 0, 0, 2, 1])
        >>> reliability_bins(p, torch.tensor([0, 1, 0]), bins=3, equal_mass=True).counts
        tensor([1, 1, 1])
    """
    check_predictions("reliability_bins", probabilities, targets, bins)
    return reliability_of(*(t[0] for t in top_sums(probabilities, targets, bins, equal_mass)))


def reliability_of(
    edges: Tensor, counts: Tensor, right: Tensor, confidence: Tensor
) -> ReliabilityBins:
    """The bins of one set of `BinSums`, of one batch or of many."""
    ece = (right - confidence).abs().sum() / counts.sum()
    return ReliabilityBins(edges.double(), counts, right / counts, confidence / counts, ece)


def check_predictions(op: str, probabilities: Tensor, targets: Tensor, bins: int = 1) -> None:
    """The rules of everything that takes [N, C] probabilities, [N] classes and a number of bins."""
    given = {"probabilities": probabilities, "targets": targets}
    check_types(op, given, list(given))
    shape = list(probabilities.shape)
    good = len(shape) == 2 and min(shape) >= 1
    require(good, op, "probabilities", "[N, C] with N and C at least 1", shape)
    check_tensor(op, "probabilities", probabilities, "N, C", (None, None))
    check_tensor(op, "targets", targets, "N", (shape[0],), dtypes=LABELS)
    on_device = f"on the device of probabilities, {probabilities.device}"
    require(targets.device == probabilities.device, op, "targets", on_device, str(targets.device))
    require(whole(bins, 1), op, "bins", "an integer of at least 1", bins)


def top_sums(
    probabilities: Tensor, targets: Tensor, bins: int, equal_mass: bool = False
) -> BinSums:
    """`bin_sums` of the largest probability and whether its class is the true one, A = 1."""
    confidence, labels = probabilities.max(dim=1)
    return bin_sums(confidence[None], (labels == targets)[None], bins, equal_mass)


def bin_sums(confidence: Tensor, right: Tensor, bins: int, equal_mass: bool = False) -> BinSums:
    """Sums per bin for A independent sets of N rows: confidence [A, N], right [A, N] bool.

    Counts are exact. On CUDA the order in which confidences are added, in float64, is not fixed but
    under `torch.use_deterministic_algorithms`.
    """
    A, N = confidence.shape
    if confidence.dtype in LOW:
        confidence = confidence.float()
    confidence = confidence.contiguous()
    device = confidence.device
    if equal_mass:
        ends = torch.arange(1, bins, device=device) * N
        inner = confidence.detach().sort(1).values[:, (ends + bins - 1) // bins - 1]
    else:
        inner = inner_edges(confidence, bins).repeat(A, 1)
    # rounding of a softmax can exceed 1; a confidence of 0 belongs to the first bin
    index = torch.searchsorted(inner, confidence)
    index = (index + torch.arange(0, A * bins, bins, device=device)[:, None]).flatten()
    none = torch.zeros(A * bins, dtype=torch.float64, device=device)
    counts = none.long().index_add(0, index, torch.ones_like(index))
    hits = none.index_add(0, index, right.flatten().double())
    total = none.index_add(0, index, confidence.flatten().double())
    return BinSums(with_ends(inner), *(t.view(A, bins) for t in (counts, hits, total)))


def with_ends(inner: Tensor) -> Tensor:
    """[..., bins - 1] edges between bins -> [..., bins + 1], from 0 to 1."""
    return pad(pad(inner, (1, 0)), (0, 1), value=1.0)
