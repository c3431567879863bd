"""The shipped configurations of the hyper-batch kernels, for `aot_cases`."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from landscape_fast.kernels import hyper_batch_conv2d as conv
from landscape_fast.kernels import hyper_batch_conv2d_tiles as conv_tiles
from landscape_fast.kernels import hyper_batch_linear as linear
from landscape_fast.kernels import hyper_batch_linear_backward as linear_backward
from landscape_fast.kernels import hyper_batch_linear_tiles as linear_tiles


def cases(arch: int, cores: dict) -> Iterator[tuple[str, Callable[[], object], tuple, tuple]]:
    """All cases for an architecture: the name, the call, and instructions it must and must not use.

    `cores` names the tensor-core instruction of each architecture, for tiles of at least 64 rows.
    """
    tensor_core = cores[arch]
    for (a, bucket), config in linear_tiles.SHIPPED.items():
        if a != arch:
            continue
        dtype = torch.float32 if "half" not in bucket else torch.bfloat16
        core = tensor_core if config.tiles["BLOCK_B"] >= 64 else "mma.sync"
        must = (() if "ieee" in bucket else (core,)) + (("tma",) if config.tma else ("cp.async",))
        never = tuple(cores.values()) if "ieee" in bucket else ()
        for tied in (True, False) if bucket.startswith("fwd") else ("tied" in bucket,):
            name = f"hyper {bucket}{' tied' if tied and bucket.startswith('fwd') else ''}"
            yield name, _linear_call(bucket, config, dtype, tied), must, never
    # the same code in float16 with float32 factors and ragged sizes, and with 64-bit offsets
    for bucket in ("fwd half small", "x half small", "x tied half small"):
        config, tied = linear_tiles.SHIPPED[arch, bucket], "tied" in bucket
        options = {"factors": torch.float32, "I": 1008, "O": 1008, "long": True}
        call = _linear_call(bucket, config, torch.float16, tied, **options)
        yield f"hyper {bucket} long", call, (tensor_core,), ()
    for (a, bucket), config in conv_tiles.SHIPPED.items():
        if a != arch:
            continue
        kind, width = bucket.split()
        must = (
            ()
            if kind == "ieee"
            else (tensor_core if config.tiles["BLOCK_P"] >= 64 else "mma.sync",)
        )
        never = tuple(cores.values()) if kind == "ieee" else ()
        for tied in (True, False):
            name = f"hyper conv {bucket}{' tied' if tied else ''}"
            yield name, _conv_call(kind, width, config, tied), must, never


def _conv_call(kind, width, config, tied):
    """A 3x3 convolution with that many channels; of a picture where the width is "thin"."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    (I, O), M, B, H = (3, 32) if width == "thin" else (int(width),) * 2, 4, 64, 32

    new = partial(torch.empty, dtype=dtype, device="meta")
    x, y, z = (new(M, B, H, H, C).permute(0, 1, 4, 2, 3) for C in (I, O, O))
    weight, e, held = new(O, 3, 3, I), new(M, B, O), torch.float32
    r, s = new(M, I, dtype=held), new(M, O, dtype=held)
    u, v = (None, None) if tied else (r, s)
    tensors = (x, weight, weight, e, r, s, u, v, new(M, B, O, dtype=held), y, z)
    options = ((1, 1), (1, 1), (1, 1), kind == "tf32")
    return lambda: conv.hyper_batch_conv2d_fwd(*tensors, *options, config=config)


def _linear_call(bucket, config, dtype, tied, factors=None, I=1024, O=1024, long=False):
    M, B, tf32 = 4, 1024, "tf32" in bucket
    factors = factors or dtype

    new = partial(torch.empty, dtype=dtype, device="meta")
    x, weight, delta = new(M, B, I), new(O, I), new(O, I)
    y, z, e = new(M, B, O), new(M, B, O), new(M, B, 2 * O)[..., :O]
    r, u = new(M, I, dtype=factors), None if tied else new(M, I, dtype=factors)
    s, v = new(M, O, dtype=factors), None if tied else new(M, O, dtype=factors)
    inputs = (x, weight, delta, e, r, s, u, v)

    def call():
        options = {"config": config, "long": long}
        if bucket.startswith("fwd"):
            linear.hyper_batch_linear_fwd(*inputs, s, s, e, y, z, tf32, **options)
        else:
            du = None if tied else torch.empty_like(r)
            outputs = (torch.empty_like(x), torch.empty_like(r), du)
            linear_backward.hyper_batch_linear_bwd_x(y, *inputs, *outputs, tf32, **options)

    return call
