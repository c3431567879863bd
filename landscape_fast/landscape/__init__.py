"""What an ensemble looks like: how its members differ, how its confidence fits, and the figures."""

from landscape_fast.landscape.diversity import (
    Diagnosis,
    DiversityPoints,
    PairDiversity,
    diagnose,
    diversity_points,
    lower_limit,
    pair_diversity,
    upper_limit,
)
from landscape_fast.landscape.plots import accuracy_diversity, heat_maps, reliability_diagram
from landscape_fast.landscape.reliability import ReliabilityBins, reliability_bins

__all__ = [
    "Diagnosis",
    "DiversityPoints",
    "PairDiversity",
    "ReliabilityBins",
    "accuracy_diversity",
    "diagnose",
    "diversity_points",
    "heat_maps",
    "lower_limit",
    "pair_diversity",
    "reliability_bins",
    "reliability_diagram",
    "upper_limit",
]
