"""Differentiable ops, each with a plain PyTorch reference and fused kernels.

One page per op: docstring, checks, reference, autograd, registration.
`landscape_fast.show_config()` says which backend of each runs here.
"""

from landscape_fast.ops._divergence_sums import divergence_sums, divergence_sums_reference
from landscape_fast.ops._hyper_batch_l2 import hyper_batch_l2, hyper_batch_l2_reference
from landscape_fast.ops._summary_sums import summary_sums, summary_sums_reference
from landscape_fast.ops.anchor_step import (
    AdamRule,
    AnchorState,
    Cos2,
    SGDRule,
    anchor_step,
    anchor_step_reference,
)
from landscape_fast.ops.batch_ensemble_conv2d import (
    batch_ensemble_conv2d,
    batch_ensemble_conv2d_reference,
)
from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)
from landscape_fast.ops.combine import combine, combine_reference
from landscape_fast.ops.ensemble_summary import (
    EnsembleSummary,
    ensemble_summary,
    ensemble_summary_reference,
)
from landscape_fast.ops.gram import gram, gram_reference
from landscape_fast.ops.hyper_batch_conv2d import (
    hyper_batch_conv2d,
    hyper_batch_conv2d_reference,
)
from landscape_fast.ops.hyper_batch_linear import (
    hyper_batch_linear,
    hyper_batch_linear_reference,
)
from landscape_fast.ops.member_batch_norm import (
    member_batch_norm,
    member_batch_norm_reference,
)
from landscape_fast.ops.pairwise_divergence import (
    pairwise_disagreement,
    pairwise_disagreement_reference,
    pairwise_divergence,
    pairwise_divergence_reference,
)
from landscape_fast.ops.perturb import perturb, perturb_reference
from landscape_fast.ops.subspace_conv2d import subspace_conv2d, subspace_conv2d_reference
from landscape_fast.ops.subspace_linear import subspace_linear, subspace_linear_reference

__all__ = [
    "AdamRule",
    "AnchorState",
    "Cos2",
    "EnsembleSummary",
    "SGDRule",
    "anchor_step",
    "anchor_step_reference",
    "batch_ensemble_conv2d",
    "batch_ensemble_conv2d_reference",
    "batch_ensemble_linear",
    "batch_ensemble_linear_reference",
    "combine",
    "combine_reference",
    "divergence_sums",
    "divergence_sums_reference",
    "ensemble_summary",
    "ensemble_summary_reference",
    "gram",
    "gram_reference",
    "hyper_batch_conv2d",
    "hyper_batch_conv2d_reference",
    "hyper_batch_l2",
    "hyper_batch_l2_reference",
    "hyper_batch_linear",
    "hyper_batch_linear_reference",
    "member_batch_norm",
    "member_batch_norm_reference",
    "pairwise_disagreement",
    "pairwise_disagreement_reference",
    "pairwise_divergence",
    "pairwise_divergence_reference",
    "perturb",
    "perturb_reference",
    "subspace_conv2d",
    "subspace_conv2d_reference",
    "subspace_linear",
    "subspace_linear_reference",
    "summary_sums",
    "summary_sums_reference",
]
