"""gram: inner products of K models in float64, flat and as the tensors of a network."""

import math
from functools import partial

import torch

from bench.case import Case, Contestant, Target, Work, function
from bench.cases.networks import NETWORKS
from bench.peers import compiled, copy_floor, ours
from landscape_fast.ops.gram import gram

# network, storage, K, dtype, targets
CUDA = (
    (
        "wrn_28_10",
        "flat",
        2,
        torch.float32,
        (
            Target("graph", "must", over="widened matmul", ratio=2),
            Target("graph", "moonshot", over="copy of as many bytes", ratio=0.9),
        ),
    ),
    ("resnet20", "list", 2, torch.float32, (Target("eager", "must", over="loop", ratio=5),)),
    ("wrn_28_10", "flat", 16, torch.float32, ()),
    ("resnet20", "flat", 3, torch.float32, ()),
)
CPU = (
    (
        "resnet20",
        "flat",
        2,
        torch.float32,
        (Target("eager", "must", over="widened matmul", ratio=1.5),),
    ),
    ("resnet20", "list", 2, torch.float32, (Target("eager", "must", over="loop", ratio=1.5),)),
    ("resnet20", "flat", 16, torch.float32, ()),
)
TINY = tuple(("tiny", storage, 3, torch.float32, ()) for storage in ("flat", "list"))


def widened_matmul(anchors):
    """BLAS in float64, on a copy in float64."""
    wide = anchors.double()
    return wide @ wide.T


def loop(*anchors):
    """A matmul for every tensor, as a penalty on each layer is written."""
    wide = [a.flatten(1).double() for a in anchors]
    return torch.stack([w @ w.T for w in wide])


def low_matmul(anchors):
    """Sums in the dtype of the anchors: not the same numbers, but what much code does."""
    return anchors @ anchors.T


def truth(*anchors):
    """Sums in pairs: those of a long matmul in float64 are off by more than what is held to it."""
    found = []
    for a in anchors:
        wide = a.flatten(1)
        found.append(torch.stack([(row * wide).sum(1) for row in wide]))
    return found


def make(device, generator, shapes, storage, K, dtype):
    """Anchors that are random normal."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if storage == "list":
        return tuple(normal(K, *shape) for shape in shapes)
    return (normal(K, sum(math.prod(s) for s in shapes)),)


def _on_list(function_, *anchors, **options):
    return function_(list(anchors), **options)


def _stacked(*anchors, storage):
    return torch.stack(truth(*anchors)) if storage == "list" else truth(*anchors)[0]


def contestants(device: str, quick: bool, storage: str, dtype, size: int) -> list[Contestant]:
    """Everybody for one kind of storage; `size` bytes are read."""
    floor = copy_floor(lambda inputs: size)
    if storage == "list":
        op = partial(_on_list, gram)
        return [*ours("gram", op, device, dtype), function("loop", "eager", loop), floor]
    return [
        *ours("gram", gram, device, dtype),
        function("widened matmul", "eager", widened_matmul),
        function("matmul in the dtype", "library", low_matmul, same=False),
        *compiled("widened matmul", widened_matmul, device, quick, static=lambda inputs: inputs),
        floor,
    ]


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (network, storage, K, dtype, targets) in enumerate(table):
        shapes = NETWORKS[network]()
        P = sum(math.prod(s) for s in shapes)
        size = dtype.itemsize * K * P
        found.append(
            Case(
                "gram",
                {"K": K, "P": P, "network": network, "storage": storage},
                dtype,
                partial(make, shapes=shapes, storage=storage, K=K, dtype=dtype),
                partial(_stacked, storage=storage),
                partial(contestants, storage=storage, dtype=dtype, size=size),
                {"fwd": Work(size, K * (K + 1) * P)},
                ("graph", "eager"),
                targets,
                priority,
            )
        )
    return found
