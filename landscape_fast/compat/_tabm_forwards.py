"""What the layers of the package `tabm` compute with after `accelerate_`."""

from torch import Tensor

from landscape_fast.compat._tabm_layers import linear_ensemble, with_activation
from landscape_fast.models._tabm_blocks import run_blocks
from landscape_fast.ops._checks import require


def _batch_ensemble(self, x: Tensor) -> Tensor:
    return with_activation(self, x)


def _linear_ensemble(self, x: Tensor) -> Tensor:
    return linear_ensemble(x, self.weight, self.bias)


def _backbone(self, x: Tensor) -> Tensor:
    require(x.ndim >= 2, type(self).__name__, "x", "[B, k, D] or [B, D]", list(x.shape))
    return run_blocks(getattr(self, "affine", None), self.blocks, x, getattr(self, "k", 1))


METHODS = {
    ("tabm", "LinearBatchEnsemble"): {
        "forward": _batch_ensemble,
        "with_activation": with_activation,
    },
    ("tabm", "LinearEnsemble"): {"forward": _linear_ensemble},
    ("tabm", "MLPBackbone"): {"forward": _backbone},
    ("tabm", "MLPBackboneEnsemble"): {"forward": _backbone},
    ("tabm", "MLPBackboneMiniEnsemble"): {"forward": _backbone},
    ("tabm", "MLPBackboneBatchEnsemble"): {"forward": _backbone},
}
