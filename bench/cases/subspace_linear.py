"""subspace_linear: M linear layers, of weights mixed from K anchors (K = 0: their own)."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Case, Contestant, Target, Work, function
from bench.peers import compiled, ours
from landscape_fast.ops.subspace_linear import subspace_linear, subspace_linear_reference

BOTH = ("graph", "train-graph")
# M, K, B, I, O, shared x, dtype, modes, targets
CUDA = (
    (
        (8, 2, 128, 1024, 1024, False),
        torch.bfloat16,
        BOTH,
        (Target("graph", "must", over="mixed baddbmm", ratio=1.2),),
    ),
    (
        (8, 0, 128, 1024, 1024, False),
        torch.bfloat16,
        BOTH,
        (Target("graph", "must", over="baddbmm", ratio=1.0),),
    ),
    ((32, 2, 16, 1024, 1024, False), torch.bfloat16, BOTH, ()),
    ((10, 0, 128, 512, 10, False), torch.float32, BOTH, ()),
    ((10, 0, 128, 3072, 512, True), torch.float32, BOTH, ()),
    (
        (1, 0, 128, 512, 512, False),
        torch.float32,
        ("eager", "train"),
        (Target("eager", "must", over="F.linear", ratio=0.9),),
    ),
)
CPU = (
    (
        (10, 0, 128, 64, 10, False),
        torch.float32,
        ("eager", "train"),
        (
            Target("eager", "must", over="loop", ratio=1.5),
            Target("train", "must", over="loop", ratio=1.5),
        ),
    ),
    (
        (10, 0, 128, 784, 32, True),
        torch.float32,
        ("eager", "train"),
        (Target("train", "must", over="loop", ratio=1.0),),
    ),
    ((4, 2, 128, 256, 256, False), torch.float32, ("eager", "train"), ()),
    (
        (1, 0, 128, 256, 256, False),
        torch.float32,
        ("eager", "train"),
        (Target("train", "must", over="F.linear", ratio=0.9),),
    ),
)
TINY = (
    ((3, 2, 5, 8, 4, False), torch.float32, ("eager", "train", *BOTH), ()),
    ((3, 0, 5, 8, 4, True), torch.float32, ("eager", "train", *BOTH), ()),
)


def split(given):
    """(x, weights of the members, biases); mixed one after the other, as plain PyTorch would."""
    if len(given) == 3:
        return given
    x, anchors, coeffs, bias = given
    return x, torch.tensordot(coeffs, anchors, 1), coeffs @ bias


def baddbmm(*given):
    """One batched product."""
    x, weight, bias = split(given)
    rows = x if x.ndim == 3 else x.expand(weight.shape[0], *x.shape)
    return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))


def loop(*given):
    """A plain layer for each member."""
    x, weight, bias = split(given)
    rows = x if x.ndim == 3 else [x] * len(weight)
    return torch.stack([F.linear(r, w, b) for r, w, b in zip(rows, weight, bias, strict=True)])


def vmapped(*given):
    """torch.func over stacked parameters."""
    x, weight, bias = split(given)
    return torch.vmap(F.linear, in_dims=(0 if x.ndim == 3 else None, 0, 0))(x, weight, bias)


def plain(x, weight, bias):
    """The one layer that there is."""
    return F.linear(x[0], weight[0], bias[0])[None]


def _called(function_, *given, **options):
    if len(given) == 3:
        given = (*given[:2], None, given[2])
    return function_(*given, **options)


def make(device, generator, sizes, dtype):
    """x, anchors, coefficients of random points unless K = 0, bias."""
    M, K, B, I, O, shared = sizes

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x = normal(B, I) if shared else normal(M, B, I)
    anchors, bias = normal(K or M, O, I) / I**0.5, normal(K or M, O)
    return (x, anchors, normal(M, K).softmax(1), bias) if K else (x, anchors, bias)


def contestants(device: str, quick: bool, sizes, dtype) -> list[Contestant]:
    """Everybody for one shape."""
    op = partial(_called, subspace_linear)
    found = ours("subspace_linear", op, device, dtype, composed=True)
    if sizes[0] == 1:
        return [*found, function("F.linear", "eager", plain)]
    return [
        *found,
        function("mixed baddbmm" if sizes[1] else "baddbmm", "eager", baddbmm),
        function("loop", "eager", loop),
        function("vmap", "eager", vmapped),
        *compiled("baddbmm", baddbmm, device, quick, static=lambda inputs: inputs[1:]),
    ]


def work(sizes, dtype) -> dict[str, Work]:
    """Rows, anchors and results moved once; twice the flops for the gradients."""
    M, K, B, I, O, shared = sizes
    anchors, x, y = (K or M) * O * I, (1 if shared else M) * B * I, M * B * O
    bytes_, flops = dtype.itemsize * (anchors + x + y), 2 * M * B * I * O
    both = dtype.itemsize * (3 * anchors + 3 * x + 2 * y)
    return {"fwd": Work(bytes_, flops), "fwd+bwd": Work(both, 3 * flops)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (sizes, dtype, modes, targets) in enumerate(table):
        found.append(
            Case(
                "subspace_linear",
                dict(zip(("M", "K", "B", "I", "O", "shared"), sizes, strict=True)),
                dtype,
                partial(make, sizes=sizes, dtype=dtype),
                plain if sizes[0] == 1 else partial(_called, subspace_linear_reference),
                partial(contestants, sizes=sizes, dtype=dtype),
                work(sizes, dtype),
                modes,
                targets,
                priority,
            )
        )
    return found
