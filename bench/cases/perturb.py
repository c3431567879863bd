"""perturb: noise and dropout on the weights of M networks, against the random numbers of torch."""

import math
from dataclasses import replace
from functools import partial

import torch

from bench.case import Case, Contestant, Target, Work, function
from bench.cases.networks import NETWORKS
from bench.peers import compiled, copy_floor, ours
from landscape_fast.ops.perturb import perturb, perturb_reference

# network, kind, M, dtype, modes, targets
CUDA = (
    (
        "wrn_28_10",
        "noise",
        4,
        torch.float32,
        ("graph", "train-graph"),
        (
            Target("graph", "must", over="torch.randn", ratio=1.5),
            Target("graph", "moonshot", over="copy of as many bytes", ratio=0.8),
        ),
    ),
    ("wrn_28_10", "both", 4, torch.float32, ("graph",), ()),
    ("resnet20", "noise", 16, torch.float32, ("graph", "eager"), ()),
    ("wrn_28_10", "dropout", 4, torch.bfloat16, ("graph",), ()),
)
CPU = (
    (
        "resnet20",
        "noise",
        4,
        torch.float32,
        ("eager", "train"),
        (Target("eager", "must", over="torch.randn", ratio=1),),
    ),
    (
        "resnet20",
        "dropout",
        4,
        torch.float32,
        ("eager",),
        (Target("eager", "must", over="torch.rand", ratio=1),),
    ),
)
TINY = tuple(
    ("tiny", kind, 3, torch.float32, ("graph", "train-graph", "eager", "train"), ())
    for kind in ("noise", "dropout", "both")
)
OPTIONS = {
    "noise": {"scale": 0.1},
    "dropout": {"scale": 0.0, "dropout": 0.25},
    "both": {"scale": 0.1, "dropout": 0.25},
}


def randn(weights, sigma, scale):
    """Other numbers of the same distribution, kept for the backward."""
    return weights + scale * sigma * torch.randn_like(weights)


def rand(weights, sigma, dropout):
    """A mask from uniform numbers."""
    return weights * ((torch.rand_like(weights) >= dropout) / (1 - dropout))


def dropout(weights, sigma, p):
    """The layer's function."""
    return torch.nn.functional.dropout(weights, p)


def with_sigma(function_, weights, sigma, kind, **options):
    sigma = None if kind == "dropout" else sigma
    return function_(weights, 1, sigma=sigma, **OPTIONS[kind], **options)


def make(device, generator, P, M, dtype):
    """Weights of M networks, and the deviations of each."""
    weights = torch.randn(M, P, generator=generator, device=device).to(dtype)
    return weights, torch.rand(M, P, generator=generator, device=device).to(dtype)


def contestants(device: str, quick: bool, kind, P, M, dtype) -> list[Contestant]:
    """Ours, and the random numbers of torch: they differ, so they are only timed."""
    op = partial(with_sigma, perturb, kind=kind)
    plain = {
        "noise": partial(randn, scale=OPTIONS["noise"]["scale"]),
        "dropout": partial(rand, dropout=OPTIONS["dropout"]["dropout"]),
    }.get(kind)
    found = ours("perturb", op, device, dtype)
    # without a gradient of sigma there is nothing to hold against ours in training
    timed = {"same": False, "modes": ("eager", "graph")}
    if plain:
        name = {"noise": "torch.randn", "dropout": "torch.rand"}[kind]
        found.append(function(name, "eager", plain, **timed))
        found += [replace(c, **timed) for c in compiled(name, plain, device, quick)]
    if kind == "dropout":
        library = partial(dropout, p=OPTIONS["dropout"]["dropout"])
        found.append(function("F.dropout", "library", library, **timed))
    return [*found, copy_floor(lambda inputs: work(P, M, dtype, kind)["fwd"].bytes)]


def work(P: int, M: int, dtype: torch.dtype, kind: str) -> dict[str, Work]:
    """Weights and deviations read, models written; backward: a gradient read, two written."""
    rows = 2 if kind == "dropout" else 3
    size = dtype.itemsize * M * P
    return {"fwd": Work(rows * size), "fwd+bwd": Work(2 * rows * size)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (network, kind, M, dtype, modes, targets) in enumerate(table):
        P = sum(math.prod(s) for s in NETWORKS[network]())
        found.append(
            Case(
                "perturb",
                {"M": M, "P": P, "network": network, "kind": kind},
                dtype,
                partial(make, P=P, M=M, dtype=dtype),
                partial(with_sigma, perturb_reference, kind=kind),
                partial(contestants, kind=kind, P=P, M=M, dtype=dtype),
                work(P, M, dtype, kind),
                modes,
                targets,
                priority,
            )
        )
    return found
