"""What ensembles say to inputs from elsewhere: how unsure they are, how much their members differ.

Source: Fort et al. 2019 (arXiv:1912.02757), section 5, CIFAR-10 networks on SVHN.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.landscape.shift import Images, Measured, Predict, batches, made
from landscape_fast.metrics import OodDetection, ood_detection, ood_scores
from landscape_fast.ops._checks import require

# Scores by which unknown inputs are told from known ones; see `landscape_fast.metrics.ood_scores`.
SCORES = ("entropy", "max_probability", "mutual_information")


class OodScores(NamedTuple):
    """What one ensemble says to one set of inputs, 0-dim float64 tensors on the CPU.

    Attributes:
        entropy: of the averaged probabilities, nats, mean over the inputs.
        confidence: largest averaged probability, mean over the inputs.
        js: generalised Jensen-Shannon divergence of the M members, nats, at most ln M: the mutual
            information of prediction and member.
        pairwise_js: mean over the pairs of members, nats; nan for one member.
        disagreement: fraction of the inputs with different labels, mean over the pairs; likewise.
        detection: kind of score to `OodDetection`, how well it tells these inputs from the known
            ones; none for the known ones themselves.
    """

    entropy: Tensor
    confidence: Tensor
    js: Tensor
    pairwise_js: Tensor
    disagreement: Tensor
    detection: dict[str, OodDetection]


class OodReport(NamedTuple):
    """What ensembles say to known and unknown inputs.

    Attributes:
        known: method to `OodScores` of the known inputs.
        unknown: method to name of the inputs to `OodScores`.
        members: M, the same for every method.
    """

    known: dict[str, OodScores]
    unknown: dict[str, dict[str, OodScores]]
    members: int


@torch.no_grad()
def out_of_distribution(
    predict: Predict | Mapping[str, Predict],
    known: Images,
    unknown: Mapping[str, Images],
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    equal_members: int | None = None,
    batch_size: int | None = None,
    scores: Sequence[str] = SCORES,
) -> OodReport:
    """How ensembles meet inputs that belong to no class, and whether they notice.

    Args:
        predict: from images [N, ...] to the logits [M, N, C] of all members, which `groups` deals
            out to methods; or, without `groups`, method to such a function.
        known: inputs like those of training that were not trained on, or a function without
            arguments that makes them.
        unknown: name to inputs from elsewhere, or to a function that makes them.
        groups: method to the places of its members among those of `predict`.
        equal_members: M; the first M members of every method are used. None: methods must have
            equally many.
        batch_size: how many inputs `predict` gets at a time; None gives it all of a set.
        scores: by which inputs are told apart, of `landscape_fast.metrics.ood_scores`.

    Returns:
        `OodReport`. No labels are needed.

    Raises:
        TypeError: if predictions are no tensor.
        ValueError: if methods have different numbers of members and `equal_members` is None, or
            another argument breaks its rule.

    Cost: one call of `predict` (or of each) per set of inputs and batch; for every method one
        `summary_sums`, one `divergence_sums` of two kinds and the scores.

    Source: Fort et al. 2019 (arXiv:1912.02757), section 5: for SVHN a divergence of .384 nats among
        independent networks of CIFAR-10, .153 within a trajectory, .155 in a random subspace, .087
        in a low-rank and .034 in a diagonal Gaussian.

    Example:
        >>> members, x = torch.randn(4, 8, 3), torch.randn(60, 8)
        >>> predict = {"deep": lambda x: x @ members, "same": lambda x: x @ members[[0, 0, 0, 0]]}
        >>> report = out_of_distribution(predict, 4 * x, {"small": 0.1 * x})
        >>> float(report.unknown["same"]["small"].js)
        0.0
        >>> bool(report.unknown["deep"]["small"].detection["entropy"].auroc > 0.9)
        True
    """
    op = "out_of_distribution"
    require(len(unknown) >= 1, op, "unknown", "a mapping with at least one set", "none")
    kinds = tuple(scores)
    batching = (op, predict, groups, equal_members, batch_size)
    inside = _measured(made(known), kinds, batching)
    found: dict[str, dict[str, OodScores]] = {name: {} for name in inside}
    for place, images in unknown.items():
        for name, (measured, outside) in _measured(made(images), kinds, batching).items():
            detection = {
                kind: OodDetection(*(t.cpu() for t in ood_detection(inside[name][1][kind], rows)))
                for kind, rows in outside.items()
                if kind in kinds
            }
            found[name][place] = _described(measured, outside, detection)
    described = {name: _described(*of, {}) for name, of in inside.items()}
    return OodReport(described, found, next(iter(inside.values()))[0].members)


def _measured(
    images: Tensor, kinds: tuple[str, ...], batching: tuple
) -> dict[str, tuple[Measured, dict[str, Tensor]]]:
    """Method to what is measured of all inputs, and kind to the scores [N] of each."""
    found: dict[str, tuple[Measured, dict[str, list[Tensor]]]] = {}
    kinds = tuple(dict.fromkeys((*kinds, "max_probability")))  # for the confidence
    for start, stop, batch in batches(images, *batching):
        nobody = torch.zeros(stop - start, dtype=torch.int64)  # what is kept needs no classes
        for name, logits in batch.items():
            measured, rows = found.setdefault(name, (Measured(), {kind: [] for kind in kinds}))
            measured.update(logits, nobody)
            for kind in kinds:
                rows[kind].append(ood_scores(logits, kind))
    return {
        name: (measured, {kind: torch.cat(parts) for kind, parts in rows.items()})
        for name, (measured, rows) in found.items()
    }


def _described(
    measured: Measured, rows: dict[str, Tensor], detection: dict[str, OodDetection]
) -> OodScores:
    scores = measured.scores()
    confidence = 1 - rows["max_probability"].mean().cpu()
    between = (scores.js, scores.pairwise_js, scores.disagreement)
    return OodScores(scores.entropy, confidence, *between, detection)
