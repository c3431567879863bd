"""hyper_batch_linear: from few rows, where weights are streamed once, to GEMMs that fill a chip."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Case, Contestant, Target, Work, function
from bench.peers import compiled, ours
from landscape_fast.ops.hyper_batch_linear import (
    hyper_batch_linear,
    hyper_batch_linear_reference,
)

# (M, B, I, O), dtype, modes, targets. On the GPU in order of importance: with M * B = 128 rows the
# time is that of reading both weights.
CUDA = (
    (
        (4, 32, 4096, 4096),
        torch.bfloat16,
        ("graph", "train-graph", "eager"),
        (
            Target("graph", "must", over="compile", ratio=1.2),
            Target("graph", "moonshot", over="compile", ratio=1.4, ms=0.019),
        ),
    ),
    (
        (4, 512, 1024, 1024),
        torch.bfloat16,
        ("graph", "train-graph"),
        (
            Target("graph", "must", over="compile", ratio=1.0),
            Target("graph", "moonshot", over="compile", ratio=1.2),
        ),
    ),
    (
        (4, 128, 640, 640),
        torch.bfloat16,
        ("train-graph", "graph", "train"),
        (Target("train-graph", "must", over="compile", ratio=1.0),),
    ),
    (
        (4, 1024, 4096, 4096),
        torch.bfloat16,
        ("graph", "train-graph"),
        (Target("graph", "must", over="compile", ratio=1.0),),
    ),
)
CPU = (
    ((4, 64, 256, 256), torch.float32, ("train", "eager"), ()),
    ((4, 128, 512, 512), torch.float32, ("train", "eager"), ()),
)
TINY = (((3, 5, 8, 6), torch.float32, ("graph", "train-graph", "train", "eager"), ()),)


def two_layers(x, weight, delta, e, r, s, bias, delta_bias, e_bias):
    """The layer as its authors write it: two whole layers, and what the second responds."""
    first = F.linear(x * r[:, None], weight) * s[:, None]
    second = F.linear(x * r[:, None], delta) * s[:, None]
    return first + bias[:, None] + e * second + delta_bias[:, None] * e_bias


def op(x, weight, delta, e, r, s, bias, delta_bias, e_bias, function=hyper_batch_linear, **options):
    """With u = r and v = s."""
    factors = (r, s, None, None, bias, delta_bias, e_bias)
    return function(x, weight, delta, e, *factors, **options)


def make(device, generator, M, B, I, O, dtype):
    """x, weight, delta, e, r, s, bias, delta_bias, e_bias; factors near one, responses small."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    values = (
        normal(M, B, I),
        normal(O, I) / I**0.5,
        normal(O, I) / I**0.5,
        0.3 * normal(M, B, O),
        1 + 0.3 * normal(M, I),
        1 + 0.3 * normal(M, O),
        0.1 * normal(M, O),
        0.1 * normal(M, O),
        0.3 * normal(M, B, O),
    )
    return tuple(v.to(dtype) for v in values)


def contestants(device: str, quick: bool, dtype: torch.dtype) -> list[Contestant]:
    """Everybody; `ours` includes the composition of library calls ("torch")."""
    return [
        *ours("hyper_batch_linear", op, device, dtype, composed=True),
        function("eager", "eager", two_layers),
        *compiled(
            "eager", two_layers, device, quick, static=lambda inputs: inputs[1:3] + inputs[4:8]
        ),
    ]


def work(M, B, I, O, dtype) -> dict[str, Work]:
    """x, both weights, y, both responses and the factors once each; the backward as much twice."""
    size = dtype.itemsize
    x, w, y, factors = M * B * I, 2 * O * I, 3 * M * B * O, M * (I + 3 * O)
    flops = 4 * M * B * I * O
    forward = size * (x + w + y + factors)
    return {"fwd": Work(forward, flops), "fwd+bwd": Work(3 * forward, 3 * flops)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (sizes, dtype, modes, targets) in enumerate(table):
        shape = dict(zip("MBIO", sizes, strict=True))
        found.append(
            Case(
                "hyper_batch_linear",
                shape,
                dtype,
                partial(make, **shape, dtype=dtype),
                partial(op, function=hyper_batch_linear_reference),
                partial(contestants, dtype=dtype),
                work(*sizes, dtype),
                modes,
                targets,
                priority,
            )
        )
    return found
