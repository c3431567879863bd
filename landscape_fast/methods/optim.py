"""Optimisers of a run: what gets which learning rate and weight decay."""

from typing import Any

import torch
from torch import nn

from landscape_fast.methods.config import TrainConfig
from landscape_fast.nn import ensemble_layers


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, fast_lr_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Optimiser groups: the shared parameters, and the factors r and s of BatchEnsemble layers.

    The factors get `lr * fast_lr_multiplier` and no weight decay. The multiplier is a learning rate
    and not a factor of the gradient, which Adam would cancel.

    Source: training recipe of BatchEnsemble (Wen et al. 2020, arXiv:2002.06715).
    """
    fast = [
        factor
        for layer in ensemble_layers(model).values()
        for factor in (layer.r, layer.s)
        if factor is not None
    ]
    known = {id(factor) for factor in fast}
    shared = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": shared, "lr": lr, "weight_decay": weight_decay}]
    if fast:
        groups.append({"params": fast, "lr": lr * fast_lr_multiplier, "weight_decay": 0.0})
    return groups


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names, over the groups of `param_groups`."""
    groups = param_groups(model, config.lr, config.weight_decay, config.fast_lr_multiplier)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr)
