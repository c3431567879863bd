"""anchor_step: one optimiser step of all anchors, cosine penalty included, for whole networks."""

import math
from functools import partial

import torch

from bench.case import Bound, Case, Contestant, Target, Work
from bench.cases.networks import NETWORKS
from bench.peers import copy_floor
from landscape_fast.ops import _dispatch
from landscape_fast.ops.anchor_step import (
    AnchorState,
    Cos2,
    SGDRule,
    anchor_step,
    anchor_step_reference,
)

RULE = SGDRule(1e-5, 0.9, weight_decay=1e-4)  # thousands of timed steps stay near the first
# network, anchors, modes, targets
CUDA = (
    (
        "wrn_28_10",
        3,
        ("graph",),
        (Target("graph", "must", over="copy of as many bytes", ratio=0.7),),
    ),
    ("resnet20", 2, ("graph", "eager"), (Target("graph", "must", over="library", ratio=3.0),)),
    ("resnet20", 6, ("graph",), ()),
)
CPU = (
    ("resnet20", 2, ("eager",), (Target("eager", "must", over="library", ratio=2.0),)),
    ("resnet20", 3, ("eager",), ()),
)
TINY = (("tiny", 3, ("eager", "graph"), ()),)


def make(device, generator, P, K):
    """grad, coeffs, anchors, momentum and the Gram matrix of the anchors."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    anchors = normal(K, P)
    return (
        normal(1, P),
        normal(1, K).softmax(1),
        anchors,
        normal(K, P),
        anchors.double() @ anchors.double().T,
    )


def fused(grad, coeffs, anchors, momentum, gram, step=anchor_step, **options):
    """Ours: anchors and momentum in place."""
    count = torch.ones((), device=grad.device)
    pair = torch.zeros((), dtype=torch.int64, device=grad.device)
    state = AnchorState(count, momentum)
    return step(grad, coeffs, anchors, RULE, state, penalty=Cos2(gram, pair, 1.0), **options)


def own(inputs):
    """The inputs, with rows of one's own to write."""
    grad, coeffs, anchors, momentum, gram = inputs
    return grad, coeffs, anchors.clone(), momentum.clone(), gram


def truth(*inputs):
    """Anchors and momentum after a step."""
    given = own(inputs)
    fused(*given, step=anchor_step_reference)
    return given[2], given[3]


def contestant(backend: str) -> Contestant:
    def bind(inputs, _):
        given = own(inputs)

        def call():
            fused(*given, backend=backend)
            return [given[2], given[3]]

        return Bound(call)

    return Contestant(f"ours ({backend})", "ours", bind)


def by_autograd(name: str, group: str, **options) -> Contestant:
    """The mixture and the penalty through autograd, then torch.optim.SGD over all anchors."""

    def bind(inputs, _):
        grad, coeffs, anchors, momentum, _ = own(inputs)
        anchors.requires_grad_()
        settings = {"momentum": RULE.momentum, "weight_decay": RULE.weight_decay}
        optimizer = torch.optim.SGD([anchors], RULE.lr, **settings, **options)
        optimizer.state[anchors]["momentum_buffer"] = momentum

        def call():
            anchors.grad = None
            with torch.enable_grad():
                a, b = anchors[0], anchors[1]
                cosine = (a * b).sum().square() / ((a * a).sum() * (b * b).sum())
                torch.autograd.backward([coeffs @ anchors, cosine], [grad, torch.ones_like(cosine)])
            optimizer.step()
            return [anchors.detach(), momentum]

        return Bound(call)

    return Contestant(name, group, bind)


def contestants(device: str, quick: bool, P: int, K: int) -> list[Contestant]:
    """Our backends; autograd with torch.optim one tensor at a time and fused; a copy."""
    first = _dispatch.explain("anchor_step", device, torch.float32)[0]
    return [
        *[contestant(name) for name in dict.fromkeys((first, "torch"))],
        by_autograd("autograd + torch.optim", "eager", foreach=False),
        by_autograd("autograd + torch.optim (fused)", "library", fused=True),
        copy_floor(lambda inputs: work(P, K)["fwd"].bytes),
    ]


def work(P: int, K: int) -> dict[str, Work]:
    """The gradient read once, anchors and momentum read and written."""
    return {"fwd": Work(4 * (1 + 4 * K) * P)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    table = TINY if quick else CUDA if device == "cuda" else CPU
    found = []
    for priority, (network, K, modes, targets) in enumerate(table):
        P = sum(math.prod(shape) for shape in NETWORKS[network]())
        found.append(
            Case(
                "anchor_step",
                {"step": "train", "K": K, "P": P, "network": network, "rule": "sgd"},
                torch.float32,
                partial(make, P=P, K=K),
                truth,
                partial(contestants, P=P, K=K),
                work(P, K),
                modes,
                targets,
                priority,
                "step",
            )
        )
    return found
