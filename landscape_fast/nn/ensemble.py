"""Ensembles as whole networks: what wraps them, and how single members are taken out.

A layer with members is any module that has an integer `members` and a method `member(i)` which
returns a plain module: the layers of this package, and yours if they have the two.
"""

import copy
import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from landscape_fast.nn._rank_one import RankOneLayer
from landscape_fast.nn.functional import check_count, split_members
from landscape_fast.ops._checks import message, require


class DeepEnsemble(nn.Module):
    """M networks behind one call: rows [B, ...] to [M, B, C].

    Args:
        members: networks that map [B, ...] to [B, C].

    Example:
        >>> networks = [nn.Linear(8, 3) for _ in range(4)]
        >>> DeepEnsemble(networks)(torch.zeros(5, 8)).shape
        torch.Size([4, 5, 3])
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        require(len(self.members) >= 1, "DeepEnsemble", "members", "at least one network", 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [M, B, C]."""
        return torch.stack([member(x) for member in self.members])


class FoldedEnsemble(nn.Module):
    """A network of folded layers as a map from a shared batch [B, ...] to [M, B, ...].

    It copies the batch once per member, in front of the network, so every module in between sees
    ordinary [M*B, ...] input. A plain batch normalisation then takes its statistics over the rows
    of all members; `EnsembleBatchNorm2d` with layout="folded" takes those of each member.

    Args:
        model: maps [M*B, ...], the rows of a member together, to one tensor [M*B, ...].
        members: M.

    Example:
        >>> from landscape_fast.nn import convert_
        >>> cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
        >>> ensemble = FoldedEnsemble(convert_(cnn, members=4, layout="folded"), members=4)
        >>> ensemble(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(self, model: nn.Module, members: int):
        super().__init__()
        _check_module("FoldedEnsemble", model)
        check_count("FoldedEnsemble", "members", members)
        for name, layer in member_layers(model).items():
            layout = getattr(layer, "layout", "folded")
            fits = layout == "folded" and layer.members == members
            rule = f"folded, with {members} members"
            got = f"layout={layout!r}, members={layer.members}"
            require(fits, "FoldedEnsemble", f"layer {name!r} of model", rule, got)
        self.model, self.members = model, members

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [M, B, ...]."""
        # Not `tile_members`: a concatenation keeps channels-last, and torch.export can split it.
        return split_members(self.model(torch.cat([x] * self.members)), self.members)

    def extra_repr(self) -> str:
        return f"members={self.members}"


def ensemble_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` with factors r and s, by qualified name; a shared one appears once."""
    _check_module("ensemble_layers", model)
    return {name: m for name, m in model.named_modules() if isinstance(m, RankOneLayer)}


def member_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of `model` that can give a member, by qualified name."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():  # what is around a module comes before it
        if module not in inside and _gives_members(module):
            found[name] = module
            inside.update(module.modules())
    return found


def _check_module(op: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(message(op, "model", "an nn.Module", type(model).__name__))


def _gives_members(module: nn.Module) -> bool:
    members = getattr(module, "members", None)
    return isinstance(members, int) and callable(getattr(module, "member", None))


def _needs_i_alone(layer: nn.Module) -> bool:
    try:
        inspect.signature(layer.member).bind(0)
    except TypeError:
        return False
    return True


def count_members(model: nn.Module, op: str) -> int:
    """M, on which all layers with members and all wrappers inside `model` agree."""
    _check_module(op, model)
    told = {layer.members for layer in member_layers(model).values()}
    for module in model.modules():
        if isinstance(module, FoldedEnsemble):
            told.add(module.members)
        elif isinstance(module, DeepEnsemble):
            told.add(len(module.members))
    rule, got = "a network whose layers agree on the number of members", sorted(told) or "none"
    require(len(told) == 1, op, "model", rule, got)
    return told.pop()


def extract_member(model: nn.Module, i: int) -> nn.Module:
    """Member i of a whole network as a plain network: a deep copy that shares nothing with `model`.

    Every layer with members becomes its plain layer with merged weights; `FoldedEnsemble` and
    `DeepEnsemble` become the one network of member i; all else is copied. What mapped [B, ...] to
    [M, B, C], or [M*B, ...] to [M*B, C], then maps [B, ...] to [B, C]. A shared batch normalisation
    gives its statistics to every member, so the equality holds in evaluation mode.

    Args:
        model: holds layers with members, or is one.
        i: from 0 to M - 1.

    Returns:
        A network of the same train mode. A module used in several places is still one; a weight
        tied to a parameter elsewhere no longer is, since it was merged with factors.

    Raises:
        ValueError: if nothing in `model` has members, if they disagree on M, if a member depends on
            more than i (hyper-batch layers: on hyperparameters), or for i out of range.

    Example:
        >>> from landscape_fast.nn import convert_
        >>> model = convert_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), 4)
        >>> extract_member(model, 2)
        Sequential(
          (0): Linear(in_features=8, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=3, bias=True)
        )
    """
    M = count_members(model, "extract_member")
    fits = isinstance(i, int) and not isinstance(i, bool) and 0 <= i < M
    require(fits, "extract_member", "i", f"an integer from 0 to {M - 1}", repr(i))
    layers = member_layers(model)
    for name, layer in layers.items():
        rule = "free of layers whose members depend on more than i"
        got = f"{type(layer).__name__}" + (f" as {name!r}" if name else "")
        remedy = "call its own member(...)"
        require(_needs_i_alone(layer), "extract_member", "model", rule, got, remedy)
    # deepcopy takes what its memo holds in place of a copy, wherever the original is referred to.
    memo = {id(layer): layer.member(i) for layer in layers.values()}
    for module in reversed(list(model.modules())):  # inner wrappers before outer ones
        if isinstance(module, FoldedEnsemble):
            memo[id(module)] = copy.deepcopy(module.model, memo)
        elif isinstance(module, DeepEnsemble):
            memo[id(module)] = copy.deepcopy(module.members[i], memo)
    return copy.deepcopy(model, memo)


def to_deep_ensemble(model: nn.Module) -> DeepEnsemble:
    """All members of `model` as independent networks, with the outputs of `model` to rounding.

    Args:
        model: as for `extract_member`.

    Returns:
        A `DeepEnsemble`: [B, ...] to [M, B, C], also where `model` returns [B, M, C] or [M*B, C].
        It takes M times the parameters, and each member can then be trained or sent on its own.

    Raises:
        ValueError: see `extract_member`.

    Example:
        >>> from landscape_fast.nn import convert_
        >>> model = convert_(nn.Linear(8, 3), members=4, r_init="normal")
        >>> to_deep_ensemble(model)(torch.zeros(5, 8)).shape
        torch.Size([4, 5, 3])
    """
    M = count_members(model, "to_deep_ensemble")
    ensemble = DeepEnsemble(extract_member(model, i) for i in range(M))
    ensemble.training = model.training
    return ensemble
