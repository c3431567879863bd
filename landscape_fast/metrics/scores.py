"""Proper scores of members and of their average, and the gap between the two."""

from torch import Tensor

from landscape_fast.ops import EnsembleSummary, ensemble_summary
from landscape_fast.ops._checks import require

SCORES = ("nll", "brier")


def member_nll(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Negative log-likelihood of each member, mean over the examples.

    Args:
        logits: [M, N, C].
        targets: [N] int64, the true classes.
        ignore_index: examples with this target are left out.

    Returns:
        [M], nats, float32 (float64 for float64 logits). inf where a member rules out a true class;
        NaN without examples.

    Raises:
        TypeError, ValueError, IndexError: as `ops.ensemble_summary`, which computes it.

    Cost: one read of the logits. Differentiable to any order.

    Source: the logarithmic score of Good 1952.

    Example:
        >>> import torch
        >>> p = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
        >>> member_nll(p.log(), torch.tensor([0]))
        tensor([0.6931, 1.3863])
    """
    return _summary(logits, targets, ignore_index).member_nll


def gibbs_nll(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Negative log-likelihood of a member drawn at random: the mean of `member_nll`.

    Args:
        logits: [M, N, C].
        targets: [N] int64, the true classes.
        ignore_index: examples with this target are left out.

    Returns:
        0-dim, nats. At least `ensemble_nll`.

    Raises:
        TypeError, ValueError, IndexError: as `ops.ensemble_summary`, which computes it.

    Cost: one read of the logits. Differentiable to any order.

    Source: the Gibbs classifier of PAC-Bayes, as in Masegosa 2020 (arXiv:1912.08335).

    Example:
        >>> import torch
        >>> p = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
        >>> gibbs_nll(p.log(), torch.tensor([0]))
        tensor(1.0397)
    """
    return member_nll(logits, targets, ignore_index=ignore_index).mean()


def ensemble_nll(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Negative log-likelihood of the averaged probabilities.

    Args:
        logits: [M, N, C].
        targets: [N] int64, the true classes.
        ignore_index: examples with this target are left out.

    Returns:
        0-dim, nats. Not the score of averaged logits or averaged log-probabilities.

    Raises:
        TypeError, ValueError, IndexError: as `ops.ensemble_summary`, which computes it.

    Cost: one read of the logits. Differentiable to any order.

    Source: Lakshminarayanan et al. 2017 (arXiv:1612.01474), section 2.4.

    Example:
        >>> import torch
        >>> p = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
        >>> ensemble_nll(p.log(), torch.tensor([0]))  # - ln 0.375
        tensor(0.9808)
    """
    return _summary(logits, targets, ignore_index).nll


def brier(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Brier score of the averaged probabilities, summed over classes.

    Args:
        logits: [M, N, C]; [1, N, C] for one network.
        targets: [N] int64, the true classes.
        ignore_index: examples with this target are left out.

    Returns:
        0-dim in [0, 2]; for two classes twice the score of Brier's binary form.

    Raises:
        TypeError, ValueError, IndexError: as `ops.ensemble_summary`, which computes it.

    Cost: one read of the logits. Differentiable to any order.

    Source: Brier 1950.

    Example:
        >>> import torch
        >>> p = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
        >>> brier(p.log(), torch.tensor([0]))  # 0.625 ** 2 twice
        tensor(0.7812)
    """
    return _summary(logits, targets, ignore_index).brier


def ambiguity(
    logits: Tensor, targets: Tensor, score: str = "nll", *, ignore_index: int = -100
) -> Tensor:
    r"""What averaging gains over the mean member: mean score of the members - that of the average.

    .. math::
        \text{nll: } \tfrac1N \sum_n \Big(\ln \bar p_{n y_n} - \tfrac1M \sum_m \ln p_{mn y_n}\Big),
        \quad
        \text{brier: } \tfrac1{MN} \sum_{mnc} (p_{mnc} - \bar p_{nc})^2

    For "nll" this is the Jensen gap, which depends on the targets; for "brier" the variance of the
    members' probabilities, which does not.

    Args:
        logits: [M, N, C].
        targets: [N] int64, the true classes.
        score: "nll" or "brier".
        ignore_index: examples with this target are left out.

    Returns:
        0-dim, nats for "nll"; at least 0 up to the rounding of the two scores it is the difference
        of, in the dtype of the summary (pass float64 logits for members that are nearly equal).

    Raises:
        ValueError: if `score` is unknown.
        TypeError, ValueError, IndexError: as `ops.ensemble_summary`, which computes both scores.

    Cost: one read of the logits. Differentiable to any order.

    Source: Krogh and Vedelsby 1995 for squared errors; Abe et al. 2022 (arXiv:2202.06985) for
        both scores.

    Example:
        >>> import torch
        >>> p = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
        >>> ambiguity(p.log(), torch.tensor([0]))  # 1.0397 - 0.9808
        tensor(0.0589)
        >>> ambiguity(p.log(), torch.tensor([0]), "brier")  # 2 * 0.125 ** 2
        tensor(0.0312)
    """
    require(score in SCORES, "ambiguity", "score", "'nll' or 'brier'", repr(score))
    found = _summary(logits, targets, ignore_index)
    if score == "nll":
        return found.member_nll.mean() - found.nll
    return found.member_brier.mean() - found.brier


def _summary(logits: Tensor, targets: Tensor, ignore_index: int) -> EnsembleSummary:
    return ensemble_summary(logits, targets, 1, ignore_index=ignore_index)
