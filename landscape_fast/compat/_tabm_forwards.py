"""What the layers of the package `tabm` compute with after `accelerate_`."""

from torch import Tensor

from landscape_fast.compat._tabm_layers import linear_batch_ensemble, linear_ensemble
from landscape_fast.models._tabm_blocks import run_blocks
from landscape_fast.ops._checks import require


def _batch_ensemble(self, x: Tensor) -> Tensor:
    return linear_batch_ensemble(x, self.weight, self.r, self.s, self.bias)


def _linear_ensemble(self, x: Tensor) -> Tensor:
    return linear_ensemble(x, self.weight, self.bias)


def _backbone(self, x: Tensor) -> Tensor:
    require(x.ndim >= 2, type(self).__name__, "x", "[B, k, D] or [B, D]", list(x.shape))
    return run_blocks(getattr(self, "affine", None), self.blocks, x)


FORWARDS = {
    ("tabm", "LinearBatchEnsemble"): _batch_ensemble,
    ("tabm", "LinearEnsemble"): _linear_ensemble,
    ("tabm", "MLPBackbone"): _backbone,
    ("tabm", "MLPBackboneEnsemble"): _backbone,
    ("tabm", "MLPBackboneMiniEnsemble"): _backbone,
    ("tabm", "MLPBackboneBatchEnsemble"): _backbone,
}
