"""combine: the weights of M networks from K anchors, flat and as the tensors of a network."""

import math
from functools import partial

import torch

from bench.case import Bound, Case, Contestant, Target, Work, function
from bench.cases.networks import NETWORKS
from bench.peers import compiled, copy_floor, ours
from landscape_fast.ops.combine import combine, combine_reference

K = 3
# network, storage, M, dtype, modes, targets
CUDA = (
    (
        "wrn_28_10",
        "flat",
        16,
        torch.float32,
        ("graph", "train-graph"),
        (
            Target("graph", "must", over="flat matmul", ratio=1.2),
            Target("graph", "moonshot", over="copy of as many bytes", ratio=0.92),
        ),
    ),
    (
        "resnet20",
        "list",
        16,
        torch.float32,
        ("eager", "graph", "train"),
        (
            Target("eager", "must", over="einsum loop", ratio=20),
            Target("graph", "moonshot", over="einsum loop", ratio=80, ms=0.005),
        ),
    ),
    ("resnet20", "list", 4, torch.float32, ("eager", "graph"), ()),
    ("resnet50", "list", 4, torch.bfloat16, ("graph", "train-graph"), ()),
    ("resnet50", "flat", 16, torch.float32, ("graph",), ()),
    ("resnet20", "flat", 4, torch.float32, ("graph", "eager"), ()),
    ("wrn_28_10", "layers", 4, torch.float32, ("graph",), ()),
    ("wrn_28_10", "list", 4, torch.float32, ("graph",), ()),
)
CPU = (
    ("resnet20", "flat", 4, torch.float32, ("eager", "train"), ()),
    ("resnet20", "list", 16, torch.float32, ("eager",), ()),
)
TINY = tuple(
    ("tiny", storage, 4, torch.float32, ("graph", "train-graph", "train", "eager"), ())
    for storage in ("flat", "list", "layers")
)


def flat_matmul(coeffs, anchors):
    """cuBLAS with an inner dimension of K."""
    return coeffs.to(anchors.dtype) @ anchors


def split_matmul(coeffs, anchors, sizes):
    """Per-layer coefficients, a matmul a layer."""
    parts = anchors.split(sizes, 1)
    return torch.cat([c @ a for c, a in zip(coeffs.unbind(1), parts, strict=True)], 1)


def einsum_loop(coeffs, *anchors):
    """One einsum a tensor, as `torch.func` code does it."""
    return [torch.einsum("mk,k...->m...", coeffs.to(a.dtype), a) for a in anchors]


def foreach(coeffs, *anchors):
    """Multi-tensor kernels, a pass for every member and anchor: M lists of L tensors."""
    members = []
    for row in coeffs.to(anchors[0].dtype):
        mixed = torch._foreach_mul([a[0] for a in anchors], row[0])
        for k in range(1, K):
            torch._foreach_add_(mixed, torch._foreach_mul([a[k] for a in anchors], row[k]))
        members.append(mixed)
    return members


def bind_foreach(inputs: tuple, train: bool) -> Bound:
    """Its M lists are stacked for the comparison only; a user can do without."""
    L = len(inputs) - 1

    def view(results):
        return [torch.stack(results[part :: L]) for part in range(L)]

    return Bound(lambda: foreach(*inputs), view=view)


def make(device, generator, shapes, storage, M, dtype):
    """Coefficients of random points of a simplex, and anchors."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    coeffs = normal(M, K).softmax(1)
    if storage == "list":
        return (coeffs, *[normal(K, *shape).to(dtype) for shape in shapes])
    anchors = normal(K, sum(math.prod(s) for s in shapes)).to(dtype)
    if storage == "layers":
        coeffs = normal(M, len(shapes), K).softmax(2)
    return coeffs, anchors


def contestants(device: str, quick: bool, storage, sizes, M, dtype) -> list[Contestant]:
    """Everybody for one kind of storage."""
    bytes_ = work(M, sum(sizes), dtype)["fwd"].bytes
    floor = copy_floor(lambda inputs: bytes_)
    if storage == "list":
        op = partial(_on_list, combine)
        return [
            *ours("combine", op, device, dtype),
            function("einsum loop", "eager", einsum_loop),
            # it adds in place: there is nothing to differentiate through
            Contestant("torch._foreach", "library", bind_foreach, modes=("eager", "graph")),
            floor,
        ]
    if storage == "layers":
        return [
            *ours("combine", partial(combine, sizes=sizes), device, dtype),
            function("matmul per layer", "eager", partial(split_matmul, sizes=sizes)),
            floor,
        ]
    return [
        *ours("combine", combine, device, dtype),
        function("flat matmul", "eager", flat_matmul),
        *compiled("flat matmul", flat_matmul, device, quick, static=lambda inputs: inputs),
        floor,
    ]


def _on_list(function_, coeffs, *anchors, **options):
    return function_(coeffs, list(anchors), **options)


def work(M: int, P: int, dtype: torch.dtype) -> dict[str, Work]:
    """K anchors read, M models written; backward: M gradients and K anchors read, K written."""
    size = dtype.itemsize
    forward, backward = size * (K + M) * P, size * (2 * K + M) * P
    return {"fwd": Work(forward), "fwd+bwd": Work(forward + backward)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (network, storage, M, dtype, modes, targets) in enumerate(table):
        shapes = NETWORKS[network]()
        sizes = tuple(math.prod(s) for s in shapes)
        reference = partial(_on_list, combine_reference) if storage == "list" else combine_reference
        if storage == "layers":
            reference = partial(combine_reference, sizes=sizes)
        found.append(
            Case(
                "combine",
                {"M": M, "K": K, "P": sum(sizes), "network": network, "storage": storage},
                dtype,
                partial(make, shapes=shapes, storage=storage, M=M, dtype=dtype),
                reference,
                partial(contestants, storage=storage, sizes=sizes, M=M, dtype=dtype),
                work(M, sum(sizes), dtype),
                modes,
                targets,
                priority,
            )
        )
    return found
