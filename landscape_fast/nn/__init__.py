"""Layers whose weights hold several models, and conversion of existing networks to them."""

from landscape_fast.nn.batch_ensemble import BatchEnsembleConv2d, BatchEnsembleLinear
from landscape_fast.nn.convert import FoldedEnsemble, convert_, ensemble_layers
from landscape_fast.nn.functional import batch_ensemble_conv2d, split_members, tile_members
from landscape_fast.nn.init import Normal, Ones, RandomSign, first_only_

__all__ = [
    "BatchEnsembleConv2d",
    "BatchEnsembleLinear",
    "FoldedEnsemble",
    "Normal",
    "Ones",
    "RandomSign",
    "batch_ensemble_conv2d",
    "convert_",
    "ensemble_layers",
    "first_only_",
    "split_members",
    "tile_members",
]
