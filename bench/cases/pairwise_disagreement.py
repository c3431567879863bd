"""pairwise_disagreement: [M, N] labels to [M, M]."""

from functools import partial

import torch

from bench.case import Case, Contestant, Target, Work, function
from bench.peers import compiled, ours
from landscape_fast.ops.pairwise_divergence import pairwise_disagreement

CUDA = (
    (
        (128, 10000),
        torch.int64,
        (
            Target("graph", "must", over="eager", ratio=10),
            Target("graph", "moonshot", ms=0.010),
        ),
    ),
    ((10, 10000), torch.int64, ()),
    ((128, 10000), torch.uint8, ()),
)
CPU = (
    (
        (10, 10000),
        torch.int64,
        (
            Target("eager", "must", over="eager", ratio=8),
            Target("eager", "moonshot", over="eager", ratio=14),
        ),
    ),
    ((16, 2000), torch.int64, ()),
    ((128, 10000), torch.int64, ()),
    ((128, 10000), torch.uint8, ()),
)
TINY = (((4, 50), torch.int64, ()), ((4, 50), torch.uint8, ()))


def broadcast(labels):
    """All pairs at once."""
    return (labels[:, None] != labels[None]).float().mean(-1)


def rows(labels):
    """A member against all at a time."""
    return torch.stack([(row != labels).float().mean(-1) for row in labels])


def truth(labels):
    """The definition in float64."""
    return torch.stack([(row != labels).double().mean(-1) for row in labels])


def make(device, generator, M, N, dtype):
    """Labels of ten classes, of members that agree on about two thirds."""
    common = torch.randint(10, (1, N), generator=generator, device=device)
    own = torch.randint(10, (M, N), generator=generator, device=device)
    keep = torch.rand(M, N, generator=generator, device=device) < 0.8
    return (torch.where(keep, common, own).to(dtype),)


def contestants(device: str, quick: bool, dtype: torch.dtype) -> list[Contestant]:
    """Ours, two eager formulations, and torch.compile of the better one."""
    return [
        *ours("pairwise_disagreement", pairwise_disagreement, device, dtype),
        function("broadcast", "eager", broadcast),
        function("rows", "eager", rows),
        *compiled("broadcast", broadcast, device, quick),
    ]


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, ((M, N), dtype, targets) in enumerate(table):
        found.append(
            Case(
                "pairwise_disagreement",
                {"M": M, "N": N},
                dtype,
                partial(make, M=M, N=N, dtype=dtype),
                truth,
                partial(contestants, dtype=dtype),
                {"fwd": Work(dtype.itemsize * M * N)},
                ("graph", "eager"),
                targets,
                priority,
            )
        )
    return found
