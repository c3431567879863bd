"""The shipped configurations of the kernels of member_batch_norm, for `aot_cases`."""

from collections.abc import Callable, Iterator

import torch

from landscape_fast.kernels import member_batch_norm as norm
from landscape_fast.kernels import member_batch_norm_backward as norm_backward


def cases(arch: int, cores: dict) -> Iterator[tuple[str, Callable[[], object], tuple, tuple]]:
    """All cases for an architecture: the name, the call, and instructions it must and must not use.

    Training in several splits with a ReLU, in one split, and evaluation.
    """
    never = tuple(cores.values())
    for (a, bucket), config in norm.SHIPPED.items():
        for dtype in (torch.float32, torch.bfloat16) if a == arch else ():
            for kind in ("splits", "one split", "evaluation"):
                name = f"norm {bucket} {kind} {dtype}"
                yield name, _call(bucket, kind, config, dtype), (), never


def _call(bucket, kind, config, dtype):
    M, features, side = 4, 64, 4 if bucket == "few pixels" else 32
    B = 128 if kind == "splits" or bucket == "few pixels" else 1
    if bucket == "features":
        x, y, dx = (_new(M, B, side**2, features, dtype=dtype).transpose(2, 3) for _ in range(3))
    else:
        x, y, dx = (_new(M, B, features, side**2, dtype=dtype) for _ in range(3))
    own = [_new(M, features, dtype=torch.float32) for _ in range(6)]
    values = norm.Norm(*own[:4], 1e-5)
    training, relu = kind != "evaluation", kind == "splits"

    def call():
        if training:
            norm.member_batch_norm_stats(x, *own[4:], *own[2:4], 0.1, config)
        norm.member_batch_norm_fwd(x, values, relu, y, config)
        run = norm_backward.member_batch_norm_bwd
        run(y, x, values, training, relu, dx, *own[4:], config)

    return call


def _new(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")
