"""How alike members are: cosines of weights and of predictions, votes, the mean over pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from landscape_fast.metrics.diversity import off_diagonal_mean
from landscape_fast.nn.geometry import cosines
from landscape_fast.ops import gram, pairwise_divergence
from landscape_fast.ops._checks import LOW, check_tensor, require
from landscape_fast.ops.pairwise_divergence import LABELS

ENTRIES = 2**22  # of the probabilities that are there at a time


def weight_cosines(
    weights: Tensor | Sequence[Tensor], *, sizes: Sequence[int] | None = None
) -> Tensor:
    r"""Cosine of the angle between the weights of each pair of S models, seen from the origin.

    .. math:: \cos_{ij} = \frac{w_i \cdot w_j}{|w_i| |w_j|}

    Args:
        weights: [S, P], one flattened model per row, as `FlatLayout` makes; or a list of parameter
            tensors [S, ...], as `ops.gram` takes.
        sizes: the parts of a flat P, in order, for cosines part by part.

    Returns:
        [S, S] float64 (with `sizes` or for a list, one for each part) in [-1, 1], symmetric, with
        a diagonal of exactly 1. NaN for a model of zeros, which has no direction, or with a NaN.

    Raises:
        TypeError: if an argument is not a tensor, or not a list of them.
        ValueError: as `ops.gram`, which reads the weights.

    Cost: S * P elements read once; sums in float64 without a copy of the weights. Differentiable.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure 2a.

    Example:
        >>> weight_cosines(torch.tensor([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0]]))
        tensor([[ 1.0000,  0.9600, -1.0000],
                [ 0.9600,  1.0000, -0.9600],
                [-1.0000, -0.9600,  1.0000]], dtype=torch.float64)
    """
    return cosines(gram(weights, sizes=sizes))


def prediction_cosines(logits: Tensor) -> Tensor:
    r"""Cosine between the predictions of each pair of S models, all probabilities as one vector.

    .. math::
        \cos_{ij} = \frac{\sum_{nc} p_{inc} p_{jnc}}
                         {(\sum_{nc} p_{inc}^2 \sum_{nc} p_{jnc}^2)^{1/2}}

    Args:
        logits: [S, N, C], N and C at least 1.

    Returns:
        [S, S] float64 in [0, 1], symmetric, with a diagonal of exactly 1. NaN for a model with a
        NaN, a +inf or a row of -inf.

    Raises:
        TypeError: if `logits` is not a tensor.
        ValueError: if its shape or dtype is not as said.

    Cost: S * N * C exponentials and S * S * N * C flops in float64; some examples at a time, so
        that the probabilities of all are never there together. Differentiable.

    Source: the flattened probabilities whose t-SNE Fort et al. 2019 (arXiv:1912.02757) show in
        figure 2c.

    Example:
        >>> prediction_cosines(torch.tensor([[[999.0, 0.0]], [[0.0, 999.0]], [[0.0, 0.0]]]))
        tensor([[1.0000, 0.0000, 0.7071],
                [0.0000, 1.0000, 0.7071],
                [0.7071, 0.7071, 1.0000]], dtype=torch.float64)
    """
    return cosines(prediction_products("prediction_cosines", logits))


def prediction_products(op: str, logits: Tensor) -> Tensor:
    """[S, S] float64, sums over n and c of p_inc p_jnc, which add up over batches of examples."""
    check_tensor(op, "logits", logits, "S, N, C", (None, None, None))
    S, N, C = logits.shape
    rule = "[S, N, C] with N and C at least 1"
    require(N > 0 and C > 0, op, "logits", rule, list(logits.shape))
    products = torch.zeros(S, S, dtype=torch.float64, device=logits.device)
    for rows in logits.split(max(1, ENTRIES // max(1, S * C)), 1):
        x = rows.float() if rows.dtype in LOW else rows
        products = products + gram(x.softmax(-1).flatten(1))
    return products


def variation_ratio(labels: Tensor) -> Tensor:
    r"""Share of the members that do not vote for the most frequent label, of each example.

    .. math:: 1 - \tfrac1M \max_c \sum_m [\ell_{mn} = c]

    Args:
        labels: [M, N] integers or bools, the label that member m gives to example n. Members are
            on axis 0.

    Returns:
        [N] float64 in [0, 1 - 1 / M]; 0 where all members agree. Take the mean for one number.

    Raises:
        TypeError: if `labels` is not a tensor.
        ValueError: if its shape or dtype is not as said, or M is 0.

    Cost: O(N M log M). No host synchronisation. It has no gradient.

    Source: Freeman 1965; for networks Gal 2016 (thesis), section 3.3.

    Example:
        >>> variation_ratio(torch.tensor([[0, 3], [0, 1], [0, 1], [0, 2]]))
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    op = "variation_ratio"
    check_tensor(op, "labels", labels, "M, N", (None, None), dtypes=LABELS)
    M = labels.shape[0]
    require(M > 0, op, "labels", "[M, N] with M at least 1", list(labels.shape))
    modal = (labels == labels.mode(0).values).sum(0)
    return (M - modal).double() / M


def average_pairwise_diversity(logits: Tensor, kind: str = "disagreement") -> Tensor:
    """Mean over all pairs of different members of how differently they predict.

    Args:
        logits: [M, N, C].
        kind: "disagreement" (a fraction), "js" or "kl" (nats; mean over both directions).

    Returns:
        0-dim, float32 (float64 for float64 logits). NaN for one member, which has no pair, and
        without examples.

    Raises:
        TypeError, ValueError: as `ops.pairwise_divergence`, which computes the pairs.

    Cost: that of `ops.pairwise_divergence`. Differentiable for "js" and "kl".

    Source: Fort et al. 2019 (arXiv:1912.02757), section 4.2, for the disagreement; Lin 1991 for JS.

    Example:
        >>> p = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]], [[0.3, 0.7]]])
        >>> average_pairwise_diversity(p.log())
        tensor(0.6667)
    """
    return off_diagonal_mean(pairwise_divergence(logits, kind))
