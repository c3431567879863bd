"""Layers whose weights hold several models, and conversion of existing networks to them.

`convert_` turns a network into an ensemble, `FoldedEnsemble` runs one whose modules know nothing of
members, `extract_member` and `to_deep_ensemble` give plain networks back. Layouts and options are
described at `BatchEnsembleLinear` and `BatchEnsembleConv2d`; what one op call computes, in
`landscape_fast.ops`.

`Subspace` makes the weights of any network a combination of K anchors: `coefficients` says where
among them, `geometry` what their Gram matrix tells. `StackedEnsemble` runs M independent networks
in one pass. `recalibrate_` and `statistics_mode_` keep the statistics of batch norms with the
weights they belong to.
"""

from landscape_fast.nn.attention import BatchEnsembleMultiheadAttention
from landscape_fast.nn.batch_ensemble import BatchEnsembleLinear
from landscape_fast.nn.batch_ensemble_conv import (
    BatchEnsembleConv1d,
    BatchEnsembleConv2d,
    BatchEnsembleConv3d,
    BatchEnsembleConvTranspose1d,
    BatchEnsembleConvTranspose2d,
    BatchEnsembleConvTranspose3d,
)
from landscape_fast.nn.coefficients import Bezier, Line, PolyChain, Simplex
from landscape_fast.nn.convert import convert_
from landscape_fast.nn.dropout import ReLUDropout, relu_dropout
from landscape_fast.nn.ensemble import (
    DeepEnsemble,
    FoldedEnsemble,
    ensemble_layers,
    extract_member,
    to_deep_ensemble,
)
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.nn.functional import (
    batch_ensemble_conv,
    batch_ensemble_conv2d,
    split_members,
    tile_members,
)
from landscape_fast.nn.hyper_batch import (
    HyperBatchConv2d,
    HyperBatchLinear,
    HyperBatchNetwork,
    HyperEmbedding,
    LambdaDistribution,
)
from landscape_fast.nn.init import Normal, Ones, RandomSign, first_only_
from landscape_fast.nn.members import MemberLinear, MemberScale, member_linear
from landscape_fast.nn.memory import activation_memory, saved_bytes
from landscape_fast.nn.norm import (
    EnsembleBatchNorm1d,
    EnsembleBatchNorm2d,
    EnsembleBatchNorm3d,
    EnsembleLayerNorm,
)
from landscape_fast.nn.stacked import StackedEnsemble
from landscape_fast.nn.statistics import (
    BatchMoments,
    StatisticsGuard,
    batch_norms,
    recalibrate_,
    statistics_mode_,
)
from landscape_fast.nn.subspace import Subspace

__all__ = [
    "BatchEnsembleConv1d",
    "BatchEnsembleConv2d",
    "BatchEnsembleConv3d",
    "BatchEnsembleConvTranspose1d",
    "BatchEnsembleConvTranspose2d",
    "BatchEnsembleConvTranspose3d",
    "BatchEnsembleLinear",
    "BatchEnsembleMultiheadAttention",
    "BatchMoments",
    "Bezier",
    "DeepEnsemble",
    "EnsembleBatchNorm1d",
    "EnsembleBatchNorm2d",
    "EnsembleBatchNorm3d",
    "EnsembleLayerNorm",
    "FlatLayout",
    "FoldedEnsemble",
    "HyperBatchConv2d",
    "HyperBatchLinear",
    "HyperBatchNetwork",
    "HyperEmbedding",
    "LambdaDistribution",
    "Line",
    "MemberLinear",
    "MemberScale",
    "Normal",
    "Ones",
    "PolyChain",
    "RandomSign",
    "ReLUDropout",
    "Simplex",
    "StackedEnsemble",
    "StatisticsGuard",
    "Subspace",
    "activation_memory",
    "batch_ensemble_conv",
    "batch_ensemble_conv2d",
    "batch_norms",
    "convert_",
    "ensemble_layers",
    "extract_member",
    "first_only_",
    "member_linear",
    "recalibrate_",
    "relu_dropout",
    "saved_bytes",
    "split_members",
    "statistics_mode_",
    "tile_members",
    "to_deep_ensemble",
]
