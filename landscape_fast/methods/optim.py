"""Optimisers of a run: what gets which learning rate and weight decay."""

from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from landscape_fast.methods.config import MEMBER_BIAS, TrainConfig
from landscape_fast.ops._checks import require


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    fast_lr_mult: float = 1.0,
    fast_weight_decay: float = 0.0,
    *,
    member_bias: str = "slow",
) -> list[dict[str, Any]]:
    """Optimiser groups: the shared parameters, and the fast ones, which are the factors of members.

    A layer says which of its parameters are fast by a method `fast_parameters()` that returns them;
    the layers of `landscape_fast.nn` and `landscape_fast.compat` have it, and any other module
    that has it is taken, too. The multiplier acts on the learning rate and not on the gradient,
    where Adam would cancel it.

    Args:
        model: any network.
        lr: learning rate of the shared parameters.
        weight_decay: of the shared parameters (norms and biases among them), as the torch
            optimiser defines it: SGD and Adam add `weight_decay * w` to the gradient. A Keras
            regulariser l2(c) adds c * w**2 to the loss, so it is `weight_decay=2 * c` here.
        fast_lr_mult: the fast parameters learn with `lr * fast_lr_mult`.
        fast_weight_decay: of the fast parameters.
        member_bias: what learning rate the biases per member [M, O] get: "slow" for `lr` (the JAX
            recipe of BatchEnsemble), "fast" for `lr * fast_lr_mult` (the TensorFlow recipe). Their
            weight decay is that of the shared parameters in both.

    Returns:
        The group of the shared parameters; that of the fast ones, if the model has any; and with
        member_bias="fast" that of the biases per member, if it has any. Every parameter of the
        model is in one group, once.

    Raises:
        ValueError: if `member_bias` is neither, or `fast_parameters()` returns something that is
            no parameter of the model.

    Source: Wen et al. 2020 (arXiv:2002.06715), as in the authors' training code.

    Example:
        >>> from landscape_fast.nn import BatchEnsembleLinear
        >>> layer = BatchEnsembleLinear(8, 3, members=4)
        >>> groups = param_groups(layer, lr=0.1, weight_decay=6e-4, fast_lr_mult=0.5)
        >>> [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 0.0006, 2), (0.05, 0.0, 2)]
    """
    op, rule = "param_groups", f"one of {MEMBER_BIAS}"
    require(member_bias in MEMBER_BIAS, op, "member_bias", rule, repr(member_bias))
    everything = {id(p): p for p in model.parameters()}
    fast, biases = _fast(model)
    lost = sum(key not in everything for key in fast)
    require(not lost, op, "fast_parameters()", "parameters of the model", f"{lost} others")
    if member_bias == "slow":
        biases = {}
    shared = [p for key, p in everything.items() if key not in fast and key not in biases]
    groups = [{"params": shared, "lr": lr, "weight_decay": weight_decay}]
    if fast:
        settings = {"lr": lr * fast_lr_mult, "weight_decay": fast_weight_decay}
        groups.append({"params": list(fast.values()), **settings})
    if biases:
        settings = {"lr": lr * fast_lr_mult, "weight_decay": weight_decay}
        groups.append({"params": list(biases.values()), **settings})
    return groups


def _fast(model: nn.Module) -> tuple[dict[int, Parameter], dict[int, Parameter]]:
    """Fast parameters, and biases per member of the same layers, by identity."""
    fast, biases = {}, {}
    for layer in model.modules():
        if callable(getattr(layer, "fast_parameters", None)):
            fast |= {id(p): p for p in layer.fast_parameters()}
            own = layer.named_parameters(recurse=False)
            biases |= {id(p): p for name, p in own if name.endswith("bias") and p.ndim == 2}
    return fast, {key: p for key, p in biases.items() if key not in fast}


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names, over the groups of `param_groups`."""
    groups = param_groups(
        model,
        config.lr,
        config.weight_decay,
        config.fast_lr_mult,
        config.fast_weight_decay,
        member_bias=config.member_bias,
    )
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr)
