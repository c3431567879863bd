"""hyper_batch_conv2d: the 3x3 convolutions of residual networks, where images are many or wide."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Case, Contestant, Target, Work, function
from bench.peers import compiled, ours
from landscape_fast.ops.hyper_batch_conv2d import (
    hyper_batch_conv2d,
    hyper_batch_conv2d_reference,
)

# (M, B, I, O, H = W), dtype, modes, targets: ResNet-20 and WRN-28-10.
CUDA = (
    (
        (4, 128, 16, 16, 32),
        torch.bfloat16,
        ("graph", "train-graph", "train"),
        (Target("graph", "must", over="compile", ratio=1.2),),
    ),
    (
        (4, 128, 32, 32, 16),
        torch.bfloat16,
        ("graph", "train-graph"),
        (Target("graph", "must", over="compile", ratio=1.0),),
    ),
    (
        (4, 64, 160, 160, 32),
        torch.bfloat16,
        ("train-graph",),
        (Target("train-graph", "must", over="compile", ratio=1.0),),
    ),
)
CPU = (
    ((4, 16, 16, 16, 32), torch.float32, ("train", "eager"), ()),
    ((4, 16, 64, 64, 8), torch.float32, ("train", "eager"), ()),
)
TINY = (((3, 2, 4, 6, 5), torch.float32, ("graph", "train-graph", "train", "eager"), ()),)


def two_layers(x, weight, delta, e, r, s):
    """The layer as its authors write it: two whole convolutions, and what the second responds."""
    M, B = x.shape[:2]

    def layer(kernel):
        images = (x * r[:, None, :, None, None]).flatten(0, 1)
        y = F.conv2d(images, kernel, padding=1).unflatten(0, (M, B))
        return y * s[:, None, :, None, None]

    return layer(weight) + layer(delta) * e[..., None, None]


def make(device, generator, M, B, I, O, H, dtype):
    """x, weight, delta, e, r, s; factors near one, responses small; images channels last."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    values = (
        normal(M, B, H, H, I).permute(0, 1, 4, 2, 3),
        normal(O, 3, 3, I).permute(0, 3, 1, 2) / (9 * I) ** 0.5,
        normal(O, 3, 3, I).permute(0, 3, 1, 2) / (9 * I) ** 0.5,
        0.3 * normal(M, B, O),
        1 + 0.3 * normal(M, I),
        1 + 0.3 * normal(M, O),
    )
    return tuple(v.to(dtype) for v in values)


def contestants(device: str, quick: bool, dtype: torch.dtype) -> list[Contestant]:
    """Everybody; `ours` includes the composition of library calls ("torch")."""
    op = partial(hyper_batch_conv2d, padding=1)
    return [
        *ours("hyper_batch_conv2d", op, device, dtype, composed=True),
        function("eager", "eager", two_layers),
        *compiled(
            "eager", two_layers, device, quick, static=lambda inputs: inputs[1:3] + inputs[4:]
        ),
    ]


def work(M, B, I, O, H, dtype) -> dict[str, Work]:
    """x, both weights and y once each; the backward two convolutions more for each."""
    elements = M * B * H * H * (I + O) + 18 * I * O + M * B * O
    flops = 2 * 18 * M * B * H * H * I * O
    forward = dtype.itemsize * elements
    return {"fwd": Work(forward, flops), "fwd+bwd": Work(3 * forward, 3 * flops)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (sizes, dtype, modes, targets) in enumerate(table):
        shape = dict(zip("MBIOH", sizes, strict=True))
        found.append(
            Case(
                "hyper_batch_conv2d",
                shape,
                dtype,
                partial(make, **shape, dtype=dtype),
                partial(hyper_batch_conv2d_reference, padding=1),
                partial(contestants, dtype=dtype),
                work(*sizes, dtype),
                modes,
                targets,
                priority,
            )
        )
    return found
