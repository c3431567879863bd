"""batch_ensemble_linear: TabM's small layers, GEMMs that fill the chip, single examples."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Case, Contestant, Target, Work, function
from bench.peers import compiled, ours, tabm_linear, torch_uncertainty_linear
from landscape_fast.ops.batch_ensemble_linear import (
    batch_ensemble_linear,
    batch_ensemble_linear_reference,
)

GPU = ("graph", "train-graph", "train", "eager")

# (M, B, I, O), layout, dtype, modes, targets. On the GPU in order of importance: the first ones
# are the reason for the kernels, in the large ones a library GEMM is hard to beat.
CUDA = (
    (
        (32, 256, 512, 512),
        "batch_major",
        torch.bfloat16,
        GPU,
        (
            Target("graph", "must", over="compile", ratio=1.7),
            Target("graph", "moonshot", over="compile", ratio=2.2, ms=0.009),
            Target("graph", "moonshot", over="eager", ratio=3.0),
            Target("train-graph", "must", over="compile", ratio=1.3),
            Target("train-graph", "moonshot", over="compile", ratio=1.7, ms=0.037),
            Target("train-graph", "moonshot", over="eager", ratio=2.1),
            Target("train", "moonshot", over="eager", ratio=4.0),
        ),
    ),
    (
        (16, 512, 1024, 1024),
        "member_major",
        torch.bfloat16,
        ("train-graph", "graph"),
        (
            Target("train-graph", "must", over="compile", ratio=1.15),
            Target("train-graph", "moonshot", over="compile", ratio=1.35, ms=0.100),
        ),
    ),
    (
        (4, 128, 1024, 1024),
        "member_major",
        torch.bfloat16,
        ("train-graph", "graph", "train"),
        (
            Target("train-graph", "must", over="compile", ratio=1.2),
            Target("train-graph", "moonshot", over="compile", ratio=1.4, ms=0.021),
        ),
    ),
    (
        (16, 1, 8192, 8192),
        "member_major",
        torch.bfloat16,
        ("graph", "train-graph"),
        (
            Target("graph", "must", over="compile", ratio=1.05),
            Target("graph", "moonshot", over="compile", ratio=1.12, ms=0.034),
            Target("train-graph", "must", over="compile", ratio=1.0),
        ),
    ),
    (
        (8, 512, 4096, 4096),
        "member_major",
        torch.bfloat16,
        ("train-graph", "graph"),
        (
            Target("train-graph", "must", over="compile", ratio=1.0),
            Target("train-graph", "moonshot", over="compile", ratio=1.07, ms=0.600),
        ),
    ),
    (
        (4, 4096, 4096, 4096),
        "member_major",
        torch.bfloat16,
        ("train-graph",),
        (
            Target("train-graph", "must", over="compile", ratio=1.0),
            Target("train-graph", "moonshot", over="compile", ratio=1.06, ms=2.370),
        ),
    ),
    ((32, 256, 512, 512), "member_major", torch.float16, ("graph",), ()),
    ((32, 256, 512, 512), "member_major", torch.float32, ("train-graph",), ()),
)
CPU = (
    ((32, 256, 128, 128), "batch_major", torch.float32, ("train", "eager"), ()),
    ((4, 128, 512, 512), "member_major", torch.float32, ("train", "eager"), ()),
)
TINY = (
    ((3, 5, 8, 6), "member_major", torch.float32, ("graph", "train-graph", "train", "eager"), ()),
    ((3, 5, 8, 6), "batch_major", torch.float32, ("graph", "train-graph", "train", "eager"), ()),
)


def eager(x, weight, r, s, bias, layout):
    """The layer as users write it."""
    if layout == "batch_major":
        return F.linear(x * r, weight) * s + bias
    return F.linear(x * r[:, None], weight) * s[:, None] + bias[:, None]


def plain(x, weight, r, s, bias):
    """One nn.Linear on the same rows: what the members' factors cost is the rest."""
    return F.linear(x, weight, bias[0])


def make(device, generator, M, B, I, O, layout, dtype):
    """x, weight, r, s, bias; factors near one, as in a trained ensemble."""

    def normal(*shape):
        values = torch.randn(shape, generator=generator, device=device)
        return values

    rows = (B, M) if layout == "batch_major" else (M, B)
    values = (
        normal(*rows, I),
        normal(O, I) / I**0.5,
        1 + 0.3 * normal(M, I),
        1 + 0.3 * normal(M, O),
        0.1 * normal(M, O),
    )
    return tuple(v.to(dtype) for v in values)


def contestants(device: str, quick: bool, layout: str, dtype: torch.dtype) -> list[Contestant]:
    """Everybody; `ours` includes the composition of library calls ("torch")."""
    op = partial(batch_ensemble_linear, layout=layout)
    batch_major = layout == "batch_major"
    formula = partial(eager, layout=layout)
    return [
        *ours("batch_ensemble_linear", op, device, dtype, composed=True),
        function("eager", "eager", formula),
        *compiled("eager", formula, device, quick, static=lambda inputs: inputs[1:]),
        tabm_linear(device, batch_major),
        torch_uncertainty_linear(device, batch_major),
        function("plain nn.Linear", "plain", plain, same=False),
    ]


def work(M, B, I, O, dtype) -> dict[str, Work]:
    """x, weight, y and the factors once each; the backward adds two GEMMs and the gradients."""
    size = dtype.itemsize
    x, w, y, factors = M * B * I, O * I, M * B * O, M * (I + 2 * O)
    flops = 2 * M * B * I * O
    forward = size * (x + w + y + factors)
    backward = size * (2 * x + 2 * w + y + 2 * factors)
    return {"fwd": Work(forward, flops), "fwd+bwd": Work(forward + backward, 3 * flops)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (sizes, layout, dtype, modes, targets) in enumerate(table):
        shape = dict(zip("MBIO", sizes, strict=True))
        found.append(
            Case(
                "batch_ensemble_linear",
                {**shape, "layout": layout},
                dtype,
                partial(make, **shape, layout=layout, dtype=dtype),
                partial(batch_ensemble_linear_reference, layout=layout),
                partial(contestants, layout=layout, dtype=dtype),
                work(*sizes, dtype),
                modes,
                targets,
                priority,
            )
        )
    return found
