"""`import landscape_fast.compat.tabm as tabm`: the package `tabm` on the ops of this library.

Names, arguments, layouts, attributes and state-dict keys are those of tabm 0.0.3, and so are the
initial values for a given state of torch's random generator. Deliberate differences: conversion
keeps weights and statistics (`LinearEnsemble` excepted), integer columns alone work in every
architecture, `LayerNormEnsemble` takes normalisations without scale and shift, a layer used twice
stays one layer, and under autocast outputs stay in the low type.
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from landscape_fast.compat._tabm_convert import (
    BatchNorm1dEnsemble,
    LayerNormEnsemble,
    batchensemble_linear_layers_,
    ensemble_batchnorm1d_layers_,
    ensemble_layernorm_layers_,
    ensemble_linear_layers_,
)
from landscape_fast.compat._tabm_layers import (
    ElementwiseAffine,
    EnsembleView,
    LinearBatchEnsemble,
    LinearEnsemble,
    ensemble_view,
)
from landscape_fast.models import tabm as models
from landscape_fast.models._tabm_blocks import TabMBackbone
from landscape_fast.models._tabm_start import OneHot, init_scaling_
from landscape_fast.ops._checks import require

__all__ = [
    "BatchNorm1dEnsemble",
    "ElementwiseAffine",
    "EnsembleView",
    "LayerNormEnsemble",
    "LinearBatchEnsemble",
    "LinearEnsemble",
    "MLPBackbone",
    "MLPBackboneBatchEnsemble",
    "MLPBackboneEnsemble",
    "MLPBackboneEnsembleBase",
    "MLPBackboneMiniEnsemble",
    "ScalingInitialization",
    "ScalingRandomInitialization",
    "TabM",
    "TabMArchitectureType",
    "batchensemble_linear_layers_",
    "ensemble_batchnorm1d_layers_",
    "ensemble_layernorm_layers_",
    "ensemble_linear_layers_",
    "ensemble_view",
    "init_scaling_",
    "make_tabm_backbone",
]

ScalingRandomInitialization = Literal["random-signs", "normal"]
ScalingInitialization = Literal["random-signs", "normal", "ones"]
TabMArchitectureType = Literal["tabm", "tabm-mini", "tabm-packed"]
_OneHotEncoding = OneHot  # the name in tabm's doctest


class MLPBackbone(TabMBackbone):
    """Blocks of linear, activation and dropout, without members: [*, d_in] -> [*, d_block].

    Args:
        options: d_in, n_blocks, d_block, dropout and activation of `make_tabm_backbone`.
    """

    def __init__(self, **options):
        super().__init__(k=1, linear=lambda index, i, o: nn.Linear(i, o), **options)


class MLPBackboneEnsembleBase(TabMBackbone):
    """What the backbones with members have in common: `k`, `blocks`."""


class MLPBackboneEnsemble(MLPBackboneEnsembleBase):
    """k MLPs that share nothing: [B, k, d_in] -> [B, k, d_block].

    Args:
        k: the number of members.
        options: of `MLPBackbone`.
    """

    def __init__(self, *, k: int, **options):
        super().__init__(k=k, linear=lambda index, i, o: LinearEnsemble(i, o, k=k), **options)


class MLPBackboneMiniEnsemble(MLPBackboneEnsembleBase):
    """k MLPs that share all but a scale of the input: [B, k, d_in] -> [B, k, d_block].

    Args:
        affine_bias: True for a shift of the input, too.
        affine_scaling_init: start of the scale: "random-signs" or "normal".
        affine_scaling_init_chunks: sizes of the parts of d_in that start with one value.
        k: the number of members.
        options: of `MLPBackbone`.
    """

    def __init__(
        self,
        *,
        affine_bias: bool,
        affine_scaling_init: str,
        affine_scaling_init_chunks: Sequence[int] | None = None,
        k: int,
        **options,
    ):
        super().__init__(k=k, linear=lambda index, i, o: nn.Linear(i, o), **options)
        start = {"scaling_init_chunks": affine_scaling_init_chunks, "bias": affine_bias}
        shape = (k, options["d_in"])
        self.affine = ElementwiseAffine(shape, scaling_init=affine_scaling_init, **start)


class MLPBackboneBatchEnsemble(MLPBackboneEnsembleBase):
    """k MLPs that share weights up to rank-one factors: [B, k, d_in] -> [B, k, d_block].

    Args:
        tabm_init: True for `scaling_init` in the very first factor and ones in all others.
        scaling_init: "random-signs" or "normal".
        start_scaling_init_chunks: sizes of the parts of d_in that start with one value.
        k: the number of members.
        options: of `MLPBackbone`.
    """

    def __init__(
        self,
        *,
        tabm_init: bool,
        scaling_init: str,
        start_scaling_init_chunks: Sequence[int] | None,
        k: int,
        **options,
    ):
        def linear(index: int, i: int, o: int) -> nn.Module:
            first = scaling_init if index == 0 or not tabm_init else "ones"
            start = (first, "ones" if tabm_init else scaling_init)
            chunks = start_scaling_init_chunks if index == 0 else None
            return LinearBatchEnsemble(
                i, o, k=k, scaling_init=start, first_scaling_init_chunks=chunks
            )

        super().__init__(k=k, linear=linear, **options)


def make_tabm_backbone(
    *,
    d_in: int,
    n_blocks: int,
    d_block: int,
    dropout: float,
    activation: str = "ReLU",
    k: int,
    arch_type: str = "tabm",
    start_scaling_init: str | None,
    start_scaling_init_chunks: Sequence[int] | None,
) -> MLPBackboneEnsembleBase:
    """The backbone of a TabM.

    Args:
        d_in: inputs of the first block.
        n_blocks: number of blocks; `d_block`: their width.
        dropout: probability of zeroing a unit.
        activation: name of a class of `torch.nn`.
        k: number of members.
        arch_type: "tabm", "tabm-mini" or "tabm-packed".
        start_scaling_init: "random-signs" or "normal"; None with "tabm-packed".
        start_scaling_init_chunks: how many inputs belong to each column of the table.
    """
    op, archs = "make_tabm_backbone", models.ARCHS
    require(arch_type in archs, op, "arch_type", f"one of {archs}", repr(arch_type))
    known = (None,) if arch_type == "tabm-packed" else models.STARTS
    rule = f"one of {known} with arch_type {arch_type!r}"
    require(start_scaling_init in known, op, "start_scaling_init", rule, repr(start_scaling_init))
    some = start_scaling_init is not None or start_scaling_init_chunks is None
    given = start_scaling_init_chunks
    require(some, op, "start_scaling_init_chunks", "None without start_scaling_init", given)
    options = {"d_in": d_in, "n_blocks": n_blocks, "d_block": d_block, "dropout": dropout}
    options |= {"activation": activation, "k": k}
    if arch_type == "tabm-packed":
        return MLPBackboneEnsemble(**options)
    if arch_type == "tabm-mini":
        start = {"affine_scaling_init": start_scaling_init, "affine_scaling_init_chunks": given}
        return MLPBackboneMiniEnsemble(affine_bias=False, **start, **options)
    start = {"scaling_init": start_scaling_init, "start_scaling_init_chunks": given}
    return MLPBackboneBatchEnsemble(tabm_init=True, **start, **options)


class TabM(models.TabM):
    """`landscape_fast.models.TabM` whose linear layers with members are those of this module.

    Args:
        options: see there.

    Example:
        >>> import torch
        >>> model = TabM.make(n_num_features=8, d_out=1, arch_type="tabm-mini")
        >>> sum(p.numel() for p in model.parameters()), model(torch.zeros(5, 8)).shape
        (546592, torch.Size([5, 32, 1]))
    """

    def _batch_ensemble(self, i, o, k, start, factory):
        first, chunks = start
        starts = {"scaling_init": (first, "ones"), "first_scaling_init_chunks": chunks}
        return LinearBatchEnsemble(i, o, k=k, **starts, **factory)

    def _packed(self, i, o, k, factory):
        return LinearEnsemble(i, o, k=k, **factory)
