"""Whether a model's confidence is the share of its answers that are right."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops._checks import require, whole


class ReliabilityBins(NamedTuple):
    """Rows sorted by confidence into bins of equal width, (edge, next edge].

    Attributes:
        edges: [bins + 1], from 0 to 1.
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


def reliability_bins(probabilities: Tensor, targets: Tensor, bins: int = 15) -> ReliabilityBins:
    """Accuracy and mean confidence per confidence bin, in float64.

    Args:
        probabilities: [N, C] predicted distributions, of an ensemble its mean over members.
        targets: [N] true classes.
        bins: bins of equal width on [0, 1], each open below and closed above.

    Raises:
        ValueError: if the shapes disagree or `bins` is below 1.

    Source: Guo et al. 2017 (arXiv:1706.04599). The ECE is that of `ops.ensemble_summary`.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.25, 0.75]])
        >>> reliability_bins(p, torch.tensor([0, 1, 0]), bins=5).counts
        tensor([0, 0, 0, 2, 1])
    """
    op = "reliability_bins"
    require(
        probabilities.ndim == 2 and probabilities.shape[0] >= 1,
        op,
        "probabilities",
        "[N, C] with N at least 1",
        list(probabilities.shape),
    )
    rows = probabilities.shape[0]
    require(
        list(targets.shape) == [rows], op, "targets", f"[N] with N = {rows}", list(targets.shape)
    )
    require(whole(bins, 1), op, "bins", "an integer of at least 1", bins)
    confidence, labels = probabilities.max(dim=1)
    right = (labels == targets).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    # rounding of a softmax can exceed 1; a confidence of 0 belongs to the first bin
    index = torch.bucketize(confidence, edges[1:-1], right=False)
    one = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    counts = torch.bincount(index, minlength=bins)
    right = one.index_add(0, index, right)
    total = one.index_add(0, index, confidence.double())
    accuracy, mean = right / counts, total / counts
    ece = (right - total).abs().sum() / rows
    return ReliabilityBins(edges.double(), counts, accuracy, mean, ece)
