"""The cases of every op: shapes, the work nobody can avoid, contestants, and targets as data."""

import importlib

OPS = (
    "batch_ensemble_linear",
    "batch_ensemble_conv2d",
    "hyper_batch_linear",
    "hyper_batch_conv2d",
    "pairwise_divergence",
    "ensemble_summary",
    "combine",
    "anchor_step",
    "subspace_step",
    "gram",
    "subspace_conv2d",
    "subspace_linear",
    "perturb",
    "member_batch_norm",
    "pairwise_disagreement",
    "tabm_step",
    "deep_together",
    "sweep",
    "landscape_analysis",
)


def cases(op: str, device: str, quick: bool = False) -> list:
    """The cases of `op` for a device type; with `quick`, tiny ones that only show that all runs."""
    return importlib.import_module(f"bench.cases.{op}").cases(device, quick)
