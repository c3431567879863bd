"""A training step of a line and a simplex of networks, over that of the network alone.

Everybody draws a point, runs cResNet20 there, adds the cosine penalty of a pair of anchors, and
takes a step of SGD with momentum and weight decay. The peers are written from what their papers and
code say: every layer mixing its own weights with Python floats (Wortsman et al. 2021), and a
dictionary of mixed weights for `torch.func.functional_call`.
"""

import functools
import itertools
import operator
import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.case import Bound, Case, Contestant, Target, Work
from landscape_fast.methods.anchor_optim import AnchorSGD
from landscape_fast.models import SmallCNN, cresnet20
from landscape_fast.nn.coefficients import Line, Simplex
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.nn.subspace import Subspace

IMAGE, CLASSES = (3, 32, 32), 10
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
BETA = 1.0  # of the cosine penalty
TIMED_LR = 1e-9  # keeps thousands of timed steps where the first one was
MOST = {(4, 2): 1.15, (16, 2): 1.08, (128, 2): 1.02}  # (B, K) -> times the plain network, on a CPU
MOST_CUDA = {(128, 2): 1.15, (128, 3): 1.2}


def network(quick: bool) -> nn.Module:
    if quick:
        return SmallCNN((3, 8, 8), CLASSES, dropout=0.0)
    return cresnet20(IMAGE, CLASSES)


def make(device, generator, B, K, quick):
    """x, targets, anchors without pads, and the coefficients of the first step."""
    model, (C, H, W) = network(quick), (3, 8, 8) if quick else IMAGE
    anchors = []
    for _ in range(K):
        for p in model.parameters():
            size = p[0].numel()
            values = torch.randn(p.shape, generator=generator, device=device)
            anchors.append(values / size**0.5 if p.ndim > 1 else 1 + 0.1 * values)
    rows = torch.stack([torch.cat([p.flatten() for p in row]) for row in _rows(anchors, K)])
    x = torch.randn((B, C, H, W), generator=generator, device=device)
    targets = torch.randint(CLASSES, (B,), generator=generator, device=device)
    coeffs = torch.rand(K, generator=generator, device=device).softmax(0)
    return x, targets, rows, coeffs


def _rows(tensors, K):
    each = len(tensors) // K
    return [tensors[k * each : (k + 1) * each] for k in range(K)]


def placed(rows: Tensor, quick: bool) -> tuple[nn.Module, FlatLayout]:
    """The network on the device and in the dtype of the anchors."""
    model = network(quick).to(rows.device, rows.dtype).train()
    return model, FlatLayout(model)


def cosine(products, norms_i, norms_j) -> Tensor:
    """cos^2 of two anchors, from sums over the layers."""
    return sum(products).square() / (sum(norms_i) * sum(norms_j))


class Blended(nn.Module):
    """A layer with K sets of weights, mixed in every forward with floats that others set."""

    def __init__(self, layer: nn.Module, sets: list[dict[str, Tensor]]):
        super().__init__()
        self.layer = layer
        for name in sets[0]:
            delattr(layer, name)
            own = [nn.Parameter(values[name]) for values in sets]
            setattr(self, name, nn.ParameterList(own))
        self.names, self.mixture = tuple(sets[0]), [1.0] + [0.0] * (len(sets) - 1)

    def forward(self, x):
        for name in self.names:
            shares = map(operator.mul, self.mixture, getattr(self, name))
            setattr(self.layer, name, functools.reduce(operator.add, shares))
        return self.layer(x)


def blend(model: nn.Module, rows: list[dict[str, Tensor]]) -> list[Blended]:
    """Replaces every layer that has parameters; rows are the anchors by parameter name."""
    layers = []
    for path, module in list(model.named_modules()):
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if not names:
            continue
        start = f"{path}." if path else ""
        sets = [{name: row[start + name].clone() for name in names} for row in rows]
        parent, _, last = path.rpartition(".")
        layers.append(Blended(module, sets))
        setattr(model.get_submodule(parent), last, layers[-1])
    return layers


def drawn(K: int) -> list[float]:
    """A uniform point of a simplex, on the host."""
    each = [random.expovariate(1.0) for _ in range(K)]
    return [e / sum(each) for e in each]


class PerLayer:
    """Each layer blends its own weights; the penalty is a loop over the layers."""

    def __init__(self, rows: Tensor, quick: bool):
        self.model, self.layout = placed(rows, quick)
        views = [self.layout.views(self.layout.flatten(row)) for row in rows]
        self.layers = blend(self.model, views)
        self.weights = [m.weight for m in self.layers if m.weight[0].ndim > 1]
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SETTINGS)

    def step(self, x, targets, coeffs):
        mixture = drawn(len(self.weights[0])) if coeffs is None else coeffs.tolist()
        for layer in self.layers:
            layer.mixture = mixture
        y = self.model(x)
        loss = F.cross_entropy(y, targets)
        i, j = random.sample(range(len(mixture)), 2) if coeffs is None else (0, 1)
        pairs = [(w[i], w[j]) for w in self.weights]
        loss = loss + BETA * cosine(
            [(a * b).sum() for a, b in pairs],
            [(a * a).sum() for a, _ in pairs],
            [(b * b).sum() for _, b in pairs],
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()  # two logged numbers a step
        loss.item()
        return y

    def anchors(self):
        return [t for k in range(len(self.weights[0])) for t in self._anchor(k)]

    def _anchor(self, k):
        return [getattr(layer, name)[k].flatten() for layer in self.layers for name in layer.names]


class Functional:
    """A dictionary of mixed weights, a matrix product for each tensor, and functional_call."""

    def __init__(self, rows: Tensor, quick: bool):
        self.model, self.layout = placed(rows, quick)
        stacked = self.layout.views(self.layout.flatten_many(list(rows)))
        self.stacks = {name: t.clone().requires_grad_() for name, t in stacked.items()}
        self.K = len(rows)
        self.optimizer = torch.optim.SGD(self.stacks.values(), **SETTINGS)

    def step(self, x, targets, coeffs):
        i, j = (0, 1) if coeffs is not None else random.sample(range(self.K), 2)
        if coeffs is None:
            each = torch.empty(self.K, device=x.device).exponential_()
            coeffs = each / each.sum()
        mixed = {name: torch.tensordot(coeffs, t, 1) for name, t in self.stacks.items()}
        y = functional_call(self.model, mixed, (x,))
        weights = [t.flatten(1) for t in self.stacks.values() if t.ndim > 2]
        loss = F.cross_entropy(y, targets) + BETA * cosine(
            [w[i] @ w[j] for w in weights],
            [w[i] @ w[i] for w in weights],
            [w[j] @ w[j] for w in weights],
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return y

    def anchors(self):
        return [t[k].flatten() for k in range(self.K) for t in self.stacks.values()]


class Ours:
    """Subspace and AnchorSGD."""

    def __init__(self, rows: Tensor, quick: bool):
        model, _ = placed(rows, quick)
        K = len(rows)
        self.space = Subspace(model, list(rows), Line() if K == 2 else Simplex(K)).train()
        self.optimizer = AnchorSGD(self.space, **SETTINGS, cos2=BETA)

    def step(self, x, targets, coeffs):
        self.optimizer.zero_grad()
        if coeffs is None:
            self.space.draw_()
        else:
            self.space.move_to_(coeffs)
        y = self.space.model(x)
        F.cross_entropy(y, targets).backward()
        if coeffs is not None:  # the first pair, for the comparison
            self.optimizer._drawn_pair = lambda: torch.zeros((), dtype=torch.int64, device=x.device)
        self.optimizer.step()
        if coeffs is not None:
            del self.optimizer._drawn_pair
        return y

    def anchors(self):
        views = self.space.layout.views(self.space.anchors)
        return [t[k].flatten() for k in range(len(self.space.anchors)) for t in views.values()]


class Plain:
    """The network alone: the first anchor, no point to draw, no penalty."""

    def __init__(self, rows: Tensor, quick: bool):
        self.model, layout = placed(rows, quick)
        torch.nn.utils.vector_to_parameters(rows[0], self.model.parameters())
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SETTINGS)

    def step(self, x, targets, coeffs):
        self.optimizer.zero_grad()
        y = self.model(x)
        F.cross_entropy(y, targets).backward()
        self.optimizer.step()
        return y

    def anchors(self):
        return [p.flatten() for p in self.model.parameters()]


def contestant(name: str, group: str, cls, quick: bool, **options) -> Contestant:
    def bind(inputs, _):
        x, targets, rows, coeffs = inputs
        with torch.enable_grad():
            made = cls(rows, quick)
        calls = itertools.count()

        def call():
            first = next(calls) == 0
            with torch.enable_grad():
                y = made.step(x, targets, coeffs if first else None)
            if not first:
                return y
            made.optimizer.param_groups[0]["lr"] = TIMED_LR
            return [y.detach(), torch.cat([t.detach().clone() for t in made.anchors()])]

        return Bound(call)

    return Contestant(name, group, bind, **options)


def truth(x, targets, rows, coeffs, quick):
    """Logits and anchors after the first step, in the dtype of the inputs."""
    with torch.enable_grad():
        made = Functional(rows, quick)
        y = made.step(x, targets, coeffs)
    return y.detach(), torch.cat([t.detach() for t in made.anchors()])


def contestants(device: str, quick: bool) -> list[Contestant]:
    """Ours, both peers, and the network alone."""
    return [
        contestant("ours", "ours", Ours, quick),
        contestant("functional_call", "eager", Functional, quick),
        contestant("blended layer by layer", "library", PerLayer, quick, modes=("eager",)),
        contestant("plain", "plain", Plain, quick, same=False),
    ]


def work(B: int, K: int, quick: bool) -> dict[str, Work]:
    """Anchors and momentum read and written, the point written and its gradient read."""
    P = sum(p.numel() for p in network(quick).parameters())
    return {"fwd": Work(4 * (4 * K + 2) * P)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    most = MOST_CUDA if device == "cuda" else MOST
    mode = "graph" if device == "cuda" else "eager"
    table = [(B, 2) for B in (4, 16, 128)] + [(128, 3)] if device == "cpu" else [(128, 2), (128, 3)]
    if quick:
        table = [(4, 3)]
    found = []
    for priority, (B, K) in enumerate(table):
        ratio = most.get((B, K))
        targets = (Target(mode, "must", over="plain", ratio=1 / ratio),) if ratio else ()
        found.append(
            Case(
                "subspace_step",
                {"step": "train", "B": B, "K": K, "network": "SmallCNN" if quick else "cresnet20"},
                torch.float32,
                partial(make, B=B, K=K, quick=quick),
                partial(truth, quick=quick),
                contestants,
                work(B, K, quick),
                ("eager", "graph"),
                () if quick else targets,
                priority,
                "step",
            )
        )
    return found
