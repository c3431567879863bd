"""How different the members of an ensemble are, in numbers and in sentences."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops import ensemble_summary, pairwise_divergence
from landscape_fast.ops._checks import check_tensor, require

# Disagreement per error below which members are called nearly identical. Independent networks lie
# well above 0.5 (Fort et al.); at a tenth, averaging changes the prediction on hardly any row.
NEARLY_IDENTICAL = 0.1


class PairDiversity(NamedTuple):
    """Differences between members, all on the same rows.

    Attributes:
        disagreement: [M, M], fraction of rows with different labels.
        js: [M, M], Jensen-Shannon divergence of the predicted distributions, nats, at most log 2.
        mean_disagreement: 0-dim, mean over pairs of different members; nan for one member.
        mean_js: 0-dim, likewise.
    """

    disagreement: Tensor
    js: Tensor
    mean_disagreement: Tensor
    mean_js: Tensor


def pair_diversity(logits: Tensor) -> PairDiversity:
    """Disagreement and Jensen-Shannon divergence between all pairs of members.

    Args:
        logits: [M, N, C].

    Returns:
        `PairDiversity`; see `landscape_fast.ops.pairwise_divergence` for dtypes and rules.

    Raises:
        TypeError, ValueError: as `ops.pairwise_divergence`, which computes both.

    Cost: that of `ops.pairwise_divergence`, twice. Differentiable but for the disagreement.

    Source: Fort et al. 2019 (arXiv:1912.02757), section 4.2; Lin 1991 for JS.

    Example:
        >>> logits = torch.tensor([[[9.0, 0.0], [0.0, 9.0]], [[9.0, 0.0], [2.0, 0.0]]])
        >>> pair_diversity(logits).mean_disagreement
        tensor(0.5000)
    """
    disagreement = pairwise_divergence(logits, "disagreement")
    js = pairwise_divergence(logits, "js")
    return PairDiversity(disagreement, js, off_diagonal_mean(disagreement), off_diagonal_mean(js))


def off_diagonal_mean(matrix: Tensor) -> Tensor:
    """Mean over all pairs of different members.

    Args:
        matrix: [M, M], floats; an entry for each pair.

    Returns:
        0-dim, of the dtype of the matrix, over the entries [i, j] with i != j. nan for M = 1.

    Raises:
        TypeError: if `matrix` is not a tensor.
        ValueError: if it is not square, or not of floats.

    Cost: M * M elements. No host synchronisation. Differentiable.

    Source: the mean over pairs of Fort et al. 2019 (arXiv:1912.02757).

    Example:
        >>> off_diagonal_mean(torch.tensor([[9.0, 0.5], [0.25, 9.0]]))
        tensor(0.3750)
    """
    op = "off_diagonal_mean"
    check_tensor(op, "matrix", matrix, "M, M", (None, None))
    members = matrix.shape[0]
    require(matrix.shape[1] == members, op, "matrix", "[M, M]", list(matrix.shape))
    same = torch.eye(members, dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(same, 0).sum() / (members * (members - 1))


@dataclass(frozen=True)
class Diagnosis:
    """How much of an ensemble its members make: numbers, and what they mean in sentences.

    Attributes:
        members: M.
        rows: N, on which everything below was measured.
        accuracy: of the mean of the members' probabilities, a fraction; `nll` (nats) likewise.
        member_accuracy: mean over members; `member_nll` likewise.
        disagreement: fraction of rows on which two members give different labels, mean over pairs;
            so are `js` (Jensen-Shannon divergence, nats, at most log 2) and `kl` (nats, mean over
            both directions).
        mutual_information: between prediction and member, nats.
        disagreement_per_error: disagreement / (1 - member_accuracy); 0 without errors.
        nearly_identical: whether that is below `NEARLY_IDENTICAL`.
        lines: the sentences; `str()` of the diagnosis joins them.
    """

    members: int
    rows: int
    accuracy: float
    member_accuracy: float
    nll: float
    member_nll: float
    disagreement: float
    js: float
    kl: float
    mutual_information: float
    disagreement_per_error: float
    nearly_identical: bool
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def numbers(self) -> dict[str, float]:
        """All but the sentences."""
        return {name: value for name, value in asdict(self).items() if name != "lines"}


def diagnose(logits: Tensor, targets: Tensor) -> Diagnosis:
    """What the members' diversity means for this ensemble, in numbers and in sentences to print.

    The last sentence is a warning if the disagreement of two members is below `NEARLY_IDENTICAL`
    times the mean error of a member, so that they act as one network, or if their mean prediction
    is no more accurate than the mean member. BatchEnsembles are known to end there on images
    (arXiv:2601.16936).

    Args:
        logits: [M, N, C] with M at least 2 and N at least 1.
        targets: [N] int64, the true classes.

    Raises:
        TypeError, ValueError, IndexError: as `ops.ensemble_summary`, or if M or N is too small.

    Example:
        >>> logits = torch.tensor([[[9.0, 0.0], [0.0, 9.0]], [[9.0, 0.0], [2.0, 0.0]]])
        >>> print(diagnose(logits, torch.tensor([0, 1])))
        two members disagree on 50.00% of the rows, 2.00 times the mean error of a member (25.00%)
        divergence of two members: JS 0.2514, KL 2.4219 nats; mutual information 0.2514 nats
        ensemble against mean member: accuracy 100.00% (+25.00%), NLL 0.2904 (-0.2414) nats
    """
    op, rule = "diagnose", "[M, N, C] with M at least 2 and N at least 1"
    check_tensor(op, "logits", logits, "M, N, C", (None, None, None))
    require(logits.shape[0] >= 2 and logits.shape[1] >= 1, op, "logits", rule, list(logits.shape))
    pairs, summary = pair_diversity(logits), ensemble_summary(logits, targets)
    kl = float(off_diagonal_mean(pairwise_divergence(logits, "kl")))
    member, together = float(summary.member_accuracy.mean()), float(summary.accuracy)
    member_nll, nll = float(summary.member_nll.mean()), float(summary.nll)
    js, information = float(pairs.mean_js), float(summary.mutual_information)
    disagreement, error = float(pairs.mean_disagreement), 1 - member
    share = disagreement / error if error > 0 else 0.0
    lines = [
        f"two members disagree on {disagreement:.2%} of the rows, "
        f"{share:.2f} times the mean error of a member ({error:.2%})",
        f"divergence of two members: JS {_nats(js)}, KL {_nats(kl)} nats; "
        f"mutual information {_nats(information)} nats",
        f"ensemble against mean member: accuracy {together:.2%} ({together - member:+.2%}), "
        f"NLL {nll:.4f} ({nll - member_nll:+.4f}) nats",
    ]
    if share < NEARLY_IDENTICAL:
        lines.append(
            "WARNING: the members are nearly identical; as an ensemble they are worth "
            "little more than one network"
        )
    elif together - member < 0.5 / len(targets):  # half a row: rounding is not a gain
        lines.append(
            "WARNING: on these rows the mean prediction is no more accurate than the mean member"
        )
    return Diagnosis(
        members=logits.shape[0],
        rows=len(targets),
        accuracy=together,
        member_accuracy=member,
        nll=nll,
        member_nll=member_nll,
        disagreement=disagreement,
        js=js,
        kl=kl,
        mutual_information=information,
        disagreement_per_error=share,
        nearly_identical=share < NEARLY_IDENTICAL,
        lines=tuple(lines),
    )


def _nats(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 else f"{value:.2e}"
