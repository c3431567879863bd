"""Every measure as a function of tensors, in one place; the pages are the modules beside this."""

from landscape_fast.metrics.calibration import adaptive_ece, calibration_error, classwise_ece, mce
from landscape_fast.metrics.detection import (
    OodDetection,
    aupr,
    auroc,
    fpr_at_recall,
    ood_detection,
    ood_scores,
)
from landscape_fast.metrics.diversity import PairDiversity, off_diagonal_mean, pair_diversity
from landscape_fast.metrics.members import (
    average_pairwise_diversity,
    prediction_cosines,
    variation_ratio,
    weight_cosines,
)
from landscape_fast.metrics.reliability import ReliabilityBins, reliability_bins
from landscape_fast.metrics.scores import ambiguity, brier, ensemble_nll, gibbs_nll, member_nll
from landscape_fast.metrics.selective import RiskCoverage, coverage_at_risk, risk_coverage

__all__ = [
    "OodDetection",
    "PairDiversity",
    "ReliabilityBins",
    "RiskCoverage",
    "adaptive_ece",
    "ambiguity",
    "aupr",
    "auroc",
    "average_pairwise_diversity",
    "brier",
    "calibration_error",
    "classwise_ece",
    "coverage_at_risk",
    "ensemble_nll",
    "fpr_at_recall",
    "gibbs_nll",
    "mce",
    "member_nll",
    "off_diagonal_mean",
    "ood_detection",
    "ood_scores",
    "pair_diversity",
    "prediction_cosines",
    "reliability_bins",
    "risk_coverage",
    "variation_ratio",
    "weight_cosines",
]
