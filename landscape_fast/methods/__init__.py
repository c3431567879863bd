"""How ensembles are trained, on one resumable loop, and which of their members are worth it."""

from landscape_fast.methods.anchor_optim import AnchorAdam, AnchorAdamW, AnchorSGD
from landscape_fast.methods.averaging import TrainedSwag, train_swa, train_swag
from landscape_fast.methods.batch import train_batch_ensemble
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.curves import (
    curve_statistics,
    pair_ensemble,
    straight_line,
    train_curve,
)
from landscape_fast.methods.cyclic import (
    fge_learning_rate,
    train_csgmcmc,
    train_fge,
    train_snapshot,
)
from landscape_fast.methods.deep import DeepEnsemble, Trained, train_deep_ensemble
from landscape_fast.methods.hyper_batch import (
    HyperBatchEnsemble,
    Tuning,
    ensemble_cross_entropy,
    train_hyper_batch,
)
from landscape_fast.methods.hyper_deep import (
    HyperDeep,
    WeightedEnsemble,
    load_network,
    train_hyper_deep,
)
from landscape_fast.methods.interrupt import TrainingInterrupted
from landscape_fast.methods.langevin import LangevinSGD
from landscape_fast.methods.optim import make_optimizer, param_groups
from landscape_fast.methods.recipes import batch_ensemble_recipe, single_recipe
from landscape_fast.methods.search_space import Choice, LogUniform, Uniform
from landscape_fast.methods.selection import Selection, select_members
from landscape_fast.methods.subspaces import (
    TrainedSubspace,
    average_prediction,
    subspace_ensemble,
    train_subspace,
)
from landscape_fast.methods.swag import Swag
from landscape_fast.methods.sweep import Sweep, SweepInterrupted, sweep
from landscape_fast.methods.trainer import fit, gibbs_cross_entropy, predict
from landscape_fast.methods.trajectories import Trajectories, load_trajectories
from landscape_fast.methods.tunnels import Tunnel, find_tunnel

__all__ = [
    "AnchorAdam",
    "AnchorAdamW",
    "AnchorSGD",
    "Choice",
    "DeepEnsemble",
    "HyperBatchEnsemble",
    "HyperDeep",
    "LangevinSGD",
    "LogUniform",
    "Selection",
    "Swag",
    "Sweep",
    "SweepInterrupted",
    "TrainConfig",
    "Trained",
    "TrainedSubspace",
    "TrainedSwag",
    "TrainingInterrupted",
    "Trajectories",
    "Tuning",
    "Tunnel",
    "Uniform",
    "WeightedEnsemble",
    "average_prediction",
    "batch_ensemble_recipe",
    "curve_statistics",
    "ensemble_cross_entropy",
    "fge_learning_rate",
    "find_tunnel",
    "fit",
    "gibbs_cross_entropy",
    "load_network",
    "load_trajectories",
    "make_optimizer",
    "pair_ensemble",
    "param_groups",
    "predict",
    "select_members",
    "single_recipe",
    "straight_line",
    "subspace_ensemble",
    "sweep",
    "train_batch_ensemble",
    "train_csgmcmc",
    "train_curve",
    "train_deep_ensemble",
    "train_fge",
    "train_hyper_batch",
    "train_hyper_deep",
    "train_snapshot",
    "train_subspace",
    "train_swa",
    "train_swag",
]
