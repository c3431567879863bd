"""member_batch_norm: batch norms of M members, training step and evaluation."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Case, Contestant, Target, Work, function
from bench.peers import compiled, copy_floor, ours
from landscape_fast.ops.member_batch_norm import member_batch_norm

# The norms of ResNet-20 and of an MLP, ten members at batch 128; members of a sweep
# M, B, F, pixels, dtype, channels-last, modes, targets
CUDA = (
    (
        (10, 128, 16, (32, 32), torch.bfloat16, True, ("train-graph", "train", "graph")),
        (
            Target("train-graph", "must", over="F.batch_norm per member", ratio=1.5),
            Target("graph", "moonshot", over="copy of as many bytes", ratio=0.8),
        ),
    ),
    ((10, 128, 64, (8, 8), torch.bfloat16, True, ("train-graph", "train")), ()),
    ((10, 128, 32, (16, 16), torch.float32, False, ("train-graph", "train")), ()),
    ((10, 128, 512, (), torch.float32, False, ("train-graph", "train")), ()),
    ((61, 256, 64, (8, 8), torch.bfloat16, True, ("graph",)), ()),
)
CPU = (
    (
        (10, 128, 16, (32, 32), torch.float32, False, ("train", "eager")),
        (Target("train", "must", over="F.batch_norm per member", ratio=0.95),),
    ),
    ((10, 128, 64, (8, 8), torch.float32, True, ("train", "eager")), ()),
    ((10, 128, 512, (), torch.float32, False, ("train",)), ()),
)
TINY = (
    ((2, 3, 4, (3, 2), torch.float32, False, ("train", "eager", "train-graph")), ()),
    ((2, 3, 4, (), torch.float32, False, ("train", "eager", "train-graph")), ()),
)
EPS = 1.0  # the bench's gradient is dy = y, whose dx is zero, all rounding, where eps is small


def op(x, weight, bias, **options):
    return member_batch_norm(x, weight, bias, training=True, eps=EPS, **options)


def per_member(x, weight, bias):
    """One library call for each member, and their results put together."""
    rows = zip(x.unbind(0), weight.unbind(0), bias.unbind(0), strict=True)
    options = {"training": True, "eps": EPS}
    return torch.stack([F.batch_norm(r, None, None, w, b, **options) for r, w, b in rows])


def batch_major(x, weight, bias):
    """Members beside the features, M * F of them: a copy before and one after."""
    rows = x.transpose(0, 1).flatten(1, 2)
    y = F.batch_norm(rows, None, None, weight.flatten(), bias.flatten(), training=True, eps=EPS)
    return y.unflatten(1, weight.shape).transpose(0, 1)


def make(device, generator, M, B, features, pixels, dtype, channels_last):
    """Activations of a member-major pass, in the order of memory that convolutions leave."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    x = normal(M, B, features, *pixels)
    if channels_last:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    return x.to(dtype), normal(M, features), normal(M, features)


def contestants(device: str, quick: bool, dtype, bytes_: int) -> list[Contestant]:
    """Ours, the library's two ways, and torch.compile of the better one."""
    return [
        *ours("member_batch_norm", op, device, dtype),
        function("F.batch_norm per member", "eager", per_member),
        function("F.batch_norm of M * F features", "eager", batch_major),
        *compiled("F.batch_norm per member", per_member, device, quick),
        copy_floor(lambda inputs: bytes_),
    ]


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, ((M, B, features, pixels, dtype, last, modes), targets) in enumerate(table):
        size = dtype.itemsize * M * B * features * torch.Size(pixels).numel()
        # x is read for the statistics and again for y; backward: x and dy twice, dx
        work = {"fwd": Work(3 * size), "fwd+bwd": Work(8 * size)}
        shape = {"M": M, "B": B, "F": features, "pixels": "x".join(map(str, pixels)) or "none"}
        found.append(
            Case(
                "member_batch_norm",
                {**shape, "order": "channels-last" if last else "contiguous"},
                dtype,
                partial(
                    make,
                    M=M,
                    B=B,
                    features=features,
                    pixels=pixels,
                    dtype=dtype,
                    channels_last=last,
                ),
                per_member,
                partial(contestants, dtype=dtype, bytes_=work["fwd"].bytes),
                work,
                modes,
                targets,
                priority,
            )
        )
    return found
