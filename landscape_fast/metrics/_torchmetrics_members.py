"""The `Metric` classes of members' logits; see `landscape_fast.metrics.torchmetrics`.

A `MetricCollection` lets metrics of equal states share them from their first batch on. States that
only happen to be equal then, as divergences of equal members, have names that differ.
"""

from torch import Tensor

from landscape_fast.metrics._torchmetrics import SumsMetric
from landscape_fast.metrics.diversity import off_diagonal_mean
from landscape_fast.metrics.members import prediction_products, variation_ratio
from landscape_fast.metrics.streaming import summary_of
from landscape_fast.nn.geometry import cosines
from landscape_fast.ops import divergence_sums, summary_sums
from landscape_fast.ops._checks import check_tensor, require
from landscape_fast.ops.ensemble_summary import check_bins
from landscape_fast.ops.pairwise_divergence import KINDS


class EnsembleSummaryMetric(SumsMetric):
    """`ops.ensemble_summary` over all batches: a dict of accuracy, nll, brier, ece and the rest.

    Args:
        members: M.
        bins: of the calibration errors.
        ignore_index: examples with this target are left out.
        per_member: False for the mean over members of each `member_` score, so that every value can
            be logged; True for [M] values.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = EnsembleSummaryMetric(members=2)
        >>> p = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]])
        >>> metric.update(p.log(), torch.tensor([0]))
        >>> metric.compute()["member_accuracy"]
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(
        self,
        members: int,
        bins: int = 15,
        ignore_index: int = -100,
        per_member: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.check_members(members)
        self.members, self.bins, self.ignore_index = members, bins, ignore_index
        self.per_member = per_member
        check_bins(self.op, bins)
        self.sums_name = f"sums_without_{ignore_index}"
        self.add_sums(self.sums_name, (members + 1) * (3 + bins) + 3)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds logits [M, N, C] and their targets [N]."""
        self.check_batch(logits)
        new = summary_sums(logits, targets, self.bins, ignore_index=self.ignore_index)
        self.add_to(self.sums_name, new)

    def compute(self) -> dict[str, Tensor]:
        """The fields of `EnsembleSummary`, in float64."""
        values = summary_of(getattr(self, self.sums_name), self.bins)._asdict()
        if self.per_member:
            return values
        return {name: value.mean() for name, value in values.items()}


class PairwiseDivergenceMetric(SumsMetric):
    """`ops.pairwise_divergence` over all batches, [M, M].

    Args:
        members: M.
        kind: "js", "kl" (nats) or "disagreement" (a fraction).
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = PairwiseDivergenceMetric(members=2, kind="disagreement")
        >>> metric.update(torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]))
        >>> metric.compute()
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """

    def __init__(self, members: int, kind: str = "js", **kwargs):
        super().__init__(**kwargs)
        self.check_members(members)
        self.members, self.kind = members, kind
        require(kind in KINDS, self.op, "kind", "'js', 'kl' or 'disagreement'", repr(kind))
        self.sums_name = f"{kind}_sums"
        self.add_sums(self.sums_name, members, members)
        self.add_sums("examples")

    def update(self, logits: Tensor) -> None:
        """Adds logits [M, N, C]."""
        self.check_batch(logits)
        self.add_to(self.sums_name, divergence_sums(logits, (self.kind,))[self.kind])
        self.add_to("examples", logits.shape[1])

    def compute(self) -> Tensor:
        """[M, M] float64."""
        return getattr(self, self.sums_name) / self.examples


class AveragePairwiseDiversity(PairwiseDivergenceMetric):
    """`metrics.average_pairwise_diversity` over all batches: the mean over pairs, one number.

    Args:
        members: M; NaN for 1, which has no pair.
        kind: "disagreement" (a fraction), "js" or "kl" (nats, mean over both directions).
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = AveragePairwiseDiversity(members=2)
        >>> metric(torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]))
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, members: int, kind: str = "disagreement", **kwargs):
        super().__init__(members, kind, **kwargs)

    def compute(self) -> Tensor:
        """0-dim float64."""
        return off_diagonal_mean(super().compute())


class PredictionCosines(SumsMetric):
    """`metrics.prediction_cosines` over all batches, [M, M].

    Args:
        members: M.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = PredictionCosines(members=2)
        >>> metric(torch.tensor([[[999.0, 0.0]], [[0.0, 0.0]]]))
        tensor([[1.0000, 0.7071],
                [0.7071, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, members: int, **kwargs):
        super().__init__(**kwargs)
        self.check_members(members)
        self.members = members
        self.add_sums("products", members, members)

    def update(self, logits: Tensor) -> None:
        """Adds logits [M, N, C], N at least 1."""
        self.check_batch(logits)
        self.add_to("products", prediction_products(self.op, logits.detach()))

    def compute(self) -> Tensor:
        """[M, M] float64."""
        return cosines(self.products)


class VariationRatio(SumsMetric):
    """Mean of `metrics.variation_ratio` over all examples.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = VariationRatio()
        >>> metric(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor(0.3333, dtype=torch.float64)
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_sums("total")
        self.add_sums("examples")

    def update(self, logits: Tensor) -> None:
        """Adds logits [M, N, C], members on axis 0; a vote is the first largest logit."""
        check_tensor(self.op, "logits", logits, "M, N, C", (None, None, None))
        self.add_to("total", variation_ratio(logits.argmax(-1)).sum())
        self.add_to("examples", logits.shape[1])

    def compute(self) -> Tensor:
        """0-dim float64, a fraction."""
        return self.total / self.examples
