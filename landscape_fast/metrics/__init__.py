"""What an ensemble predicts, in numbers: diversity, calibration, detection, selective prediction.

`functional` has every measure as a function of tensors, `torchmetrics` most of them as `Metric`
classes; that module loads on first use and needs `pip install 'landscape-fast[metrics]'`.
"""

import importlib

from landscape_fast.metrics import functional
from landscape_fast.metrics.diversity import Diagnosis, diagnose
from landscape_fast.metrics.functional import *  # noqa: F403  its __all__ is part of ours
from landscape_fast.metrics.streaming import DivergenceAccumulator, SummaryAccumulator

__all__ = ["Diagnosis", "DivergenceAccumulator", "SummaryAccumulator", "diagnose"]
__all__ += functional.__all__


def __getattr__(name):
    if name == "torchmetrics":
        return importlib.import_module("landscape_fast.metrics.torchmetrics")
    raise AttributeError(f"module 'landscape_fast.metrics' has no attribute {name!r}")
