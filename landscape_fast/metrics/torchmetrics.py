"""The measures as torchmetrics `Metric` classes: any batches, any number of processes.

Needs `pip install 'landscape-fast[metrics]'`. Sums are kept where a measure is made of sums, all
scores where it needs their order. Both are float64, on the device of the metric, and stay float64
when a module that holds the metric is cast to another dtype. Every measure is NaN before the first
update. In a `MetricCollection`, call `update` with keywords, `logits=`, `probabilities=`,
`targets=` and so on: each metric takes those that it knows.
"""

import torch
from torch import Tensor

from landscape_fast.metrics._torchmetrics import RowsMetric, SumsMetric
from landscape_fast.metrics._torchmetrics_members import (
    AveragePairwiseDiversity,
    EnsembleSummaryMetric,
    PairwiseDivergenceMetric,
    PredictionCosines,
    VariationRatio,
)
from landscape_fast.metrics.calibration import NORMS, classwise_gaps, error_of
from landscape_fast.metrics.detection import figures_of
from landscape_fast.metrics.reliability import (
    bin_sums,
    check_predictions,
    reliability_of,
    top_sums,
    with_ends,
)
from landscape_fast.metrics.selective import risk_coverage
from landscape_fast.ops._checks import check_tensor, require, whole
from landscape_fast.ops.ensemble_summary import inner_edges

__all__ = [
    "AdaptiveCalibrationError",
    "AveragePairwiseDiversity",
    "CalibrationError",
    "ClasswiseCalibrationError",
    "EnsembleSummaryMetric",
    "MaximumCalibrationError",
    "OodDetectionMetric",
    "PairwiseDivergenceMetric",
    "PredictionCosines",
    "ReliabilityBinsMetric",
    "SelectivePrediction",
    "VariationRatio",
]


class CalibrationError(SumsMetric):
    """`metrics.calibration_error` over all batches, for bins of equal width.

    Args:
        bins: how many.
        norm: "l1" (expected), "l2" (root mean square) or "max" (maximum calibration error).
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = CalibrationError()
        >>> metric(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, bins: int = 15, norm: str = "l1", **kwargs):
        super().__init__(**kwargs)
        require(whole(bins, 1), self.op, "bins", "an integer of at least 1", bins)
        require(norm in NORMS, self.op, "norm", "'l1', 'l2' or 'max'", repr(norm))
        self.bins, self.norm = bins, norm
        self.add_sums("sums", 3, bins)

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Adds probabilities [N, C], of an ensemble their mean over members, and targets [N]."""
        check_predictions(self.op, probabilities, targets)
        new = top_sums(probabilities.detach(), targets, self.bins)
        self.add_to("sums", torch.cat([new.counts, new.right, new.confidence]))

    def compute(self) -> Tensor:
        """0-dim float64, a fraction."""
        return error_of(*self.sums, self.norm)


class MaximumCalibrationError(CalibrationError):
    """`metrics.mce` over all batches.

    Args:
        bins: how many, of equal width.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = MaximumCalibrationError()
        >>> metric(torch.tensor([[0.75, 0.25], [0.125, 0.875]]), torch.tensor([0, 0]))
        tensor(0.8750, dtype=torch.float64)
    """

    def __init__(self, bins: int = 15, **kwargs):
        super().__init__(bins, "max", **kwargs)


class ReliabilityBinsMetric(CalibrationError):
    """`metrics.reliability_bins` over all batches, for bins of equal width: a dict of its fields.

    Args:
        bins: how many.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = ReliabilityBinsMetric(bins=2)
        >>> metric(torch.tensor([[0.75, 0.25], [0.375, 0.625]]), torch.tensor([0, 0]))["accuracy"]
        tensor([   nan, 0.5000], dtype=torch.float64)
    """

    higher_is_better = None

    def __init__(self, bins: int = 15, **kwargs):
        super().__init__(bins, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The fields of `ReliabilityBins`; without rows all but the edges and counts are NaN."""
        counts, right, confidence = self.sums
        edges = with_ends(inner_edges(counts, self.bins))
        return reliability_of(edges, counts.long(), right, confidence)._asdict()


class ClasswiseCalibrationError(SumsMetric):
    """`metrics.classwise_ece` over all batches, for bins of equal width.

    Args:
        classes: C.
        bins: how many for each class.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = ClasswiseCalibrationError(classes=2)
        >>> metric(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, classes: int, bins: int = 15, **kwargs):
        super().__init__(**kwargs)
        require(whole(classes, 1), self.op, "classes", "an integer of at least 1", classes)
        require(whole(bins, 1), self.op, "bins", "an integer of at least 1", bins)
        self.classes, self.bins = classes, bins
        self.add_sums("gaps", classes, bins)
        self.add_sums("examples")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Adds probabilities [N, C] and targets [N]."""
        check_predictions(self.op, probabilities, targets)
        check_tensor(self.op, "probabilities", probabilities, "N, C", (None, self.classes))
        self.add_to("gaps", classwise_gaps(probabilities.detach(), targets, self.bins))
        self.add_to("examples", len(targets))

    def compute(self) -> Tensor:
        """0-dim float64, a fraction."""
        return self.gaps.abs().sum() / self.examples / self.classes


class AdaptiveCalibrationError(RowsMetric):
    """`metrics.adaptive_ece` over all batches: bins of equal mass of all confidences together.

    Args:
        bins: how many.
        norm: "l1", "l2" or "max".
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = AdaptiveCalibrationError(bins=2)
        >>> metric(torch.tensor([[0.75, 0.25], [0.125, 0.875]]), torch.tensor([0, 0]))
        tensor(0.5625, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, bins: int = 15, norm: str = "l1", **kwargs):
        super().__init__(**kwargs)
        require(whole(bins, 1), self.op, "bins", "an integer of at least 1", bins)
        require(norm in NORMS, self.op, "norm", "'l1', 'l2' or 'max'", repr(norm))
        self.bins, self.norm = bins, norm

    def figures(self, scores: Tensor, marks: Tensor) -> Tensor:
        _, *sums = bin_sums(scores[None], marks[None], self.bins, True)
        return error_of(*sums, self.norm)[0]


class SelectivePrediction(RowsMetric):
    """`metrics.risk_coverage` over all batches: a dict of aurc and eaurc.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = SelectivePrediction()
        >>> metric(torch.tensor([[0.75, 0.25], [0.625, 0.375]]), torch.tensor([0, 1]))["aurc"]
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def figures(self, scores: Tensor, marks: Tensor) -> dict[str, Tensor]:
        found = risk_coverage(scores, marks)
        return {"aurc": found.aurc, "eaurc": found.eaurc}


class OodDetectionMetric(RowsMetric):
    """`metrics.ood_detection` over all batches: a dict of auroc, aupr_in, aupr_out, fpr95, ...

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = OodDetectionMetric()
        >>> metric.update(torch.tensor([0.1, 0.2]), torch.tensor([False, False]))
        >>> metric.update(torch.tensor([0.15, 0.9]), torch.tensor([True, True]))
        >>> metric.compute()["auroc"]
        tensor(0.7500, dtype=torch.float64)
    """

    rows = ("scores", "out")

    def update(self, scores: Tensor, out: Tensor) -> None:
        """Adds scores [N], as of `metrics.ood_scores`, and out [N] bool, which rows are OOD."""
        check_tensor(self.op, "scores", scores, "N", (None,))
        check_tensor(self.op, "out", out, "N", (len(scores),), dtypes=(torch.bool,))
        self.add_rows(scores, out)

    def figures(self, scores: Tensor, marks: Tensor) -> dict[str, Tensor]:
        return figures_of(scores, marks)._asdict()
