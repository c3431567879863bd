"""What an `anchor_step` is told: the rule of the optimiser, its state, and the cosine penalty."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.ops._checks import message, require


@dataclass(frozen=True)
class SGDRule:
    """The hyper-parameters of `torch.optim.SGD`; `lr` a number or a 0-dim float32 tensor."""

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name in ("momentum", "weight_decay"):
            _check_not_negative("SGDRule", name, getattr(self, name))
        _check_lr("SGDRule", self.lr)
        if self.nesterov and not (self.momentum > 0 and self.dampening == 0):
            rule = "positive, with dampening = 0, for nesterov"
            got = f"{self.momentum} with dampening = {self.dampening}"
            raise ValueError(message("SGDRule", "momentum", rule, got))

    @property
    def states(self) -> int:
        """Vectors [T, P] that it keeps."""
        return int(self.momentum != 0)


@dataclass(frozen=True)
class AdamRule:
    """The hyper-parameters of `torch.optim.Adam`, or with `decoupled` of `torch.optim.AdamW`."""

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        for name in ("eps", "weight_decay"):
            _check_not_negative("AdamRule", name, getattr(self, name))
        _check_lr("AdamRule", self.lr)
        inside = all(0 <= beta < 1 for beta in self.betas)
        require(inside, "AdamRule", "betas", "two numbers in [0, 1)", self.betas)

    @property
    def states(self) -> int:
        """Vectors [T, P] that it keeps."""
        return 2


Rule = SGDRule | AdamRule


def _check_not_negative(op: str, name: str, value: float) -> None:
    require(value >= 0, op, name, "at least 0", value)


def _check_lr(op: str, lr) -> None:
    if isinstance(lr, Tensor):  # its value is on a device: nobody looks
        require(lr.ndim == 0, op, "lr", "a number or a 0-dim tensor", list(lr.shape))
    else:
        _check_not_negative(op, "lr", lr)


class AnchorState(NamedTuple):
    """What a rule remembers; `anchor_step` writes it.

    `step` is 0-dim float32, the number of steps made. `first` [T, P] is the momentum buffer of SGD
    or the average of gradients of Adam, `second` [T, P] Adam's average of their squares; None where
    the rule keeps none.
    """

    step: Tensor
    first: Tensor | None = None
    second: Tensor | None = None

    @classmethod
    def zeros(cls, rule: Rule, anchors: Tensor) -> "AnchorState":
        """The state before the first step, on the device and in the dtype of `anchors` [T, P]."""
        kept = [torch.zeros_like(anchors, requires_grad=False) for _ in range(rule.states)]
        return cls(torch.zeros((), dtype=torch.float32, device=anchors.device), *kept)


class Cos2(NamedTuple):
    r"""The penalty :math:`\beta \cos^2(A_i, A_j)` of one pair of anchors.

    `gram` [S, S] float64 holds the scalar products of the anchors before the step (over the parts
    that the penalty concerns), as the step before returned them. `pair`, a 0-dim int64 tensor in
    [0, S * (S - 1)), names the pair: i = pair // (S - 1), and j is the (pair % (S - 1))-th of the
    others. No value is read on the host, so that it may be drawn in a CUDA graph.
    """

    gram: Tensor
    pair: Tensor
    beta: float = 1.0

    def matrix(self) -> Tensor:
        """Its gradient is `matrix() @ A`: [S, S] float64."""
        others = self.gram.shape[0] - 1
        i, j = self.pair // others, self.pair % others
        j = j + (j >= i).to(j.dtype)
        places = torch.arange(others + 1, device=self.gram.device)
        at_i, at_j = (places == i).to(self.gram), (places == j).to(self.gram)
        s = at_i @ self.gram @ at_j
        norm_i, norm_j = at_i @ self.gram @ at_i, at_j @ self.gram @ at_j
        factor = 2 * self.beta * s / (norm_i * norm_j)
        cross = torch.outer(at_i, at_j)
        return factor * (cross + cross.T - s / norm_i * at_i.diag() - s / norm_j * at_j.diag())
