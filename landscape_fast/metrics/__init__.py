"""What an ensemble predicts, in numbers: diversity, calibration, reliability."""

from landscape_fast.metrics.diversity import Diagnosis, PairDiversity, diagnose, pair_diversity
from landscape_fast.metrics.reliability import ReliabilityBins, reliability_bins

__all__ = [
    "Diagnosis",
    "PairDiversity",
    "ReliabilityBins",
    "diagnose",
    "pair_diversity",
    "reliability_bins",
]
