"""The cases of tests/aot_cases.py for subspace_conv2d: (name, call, must, never)."""

from collections.abc import Iterator
from functools import partial

import torch

from landscape_fast.kernels import subspace_conv2d as images
from landscape_fast.kernels import subspace_conv2d_backward as backward
from landscape_fast.kernels import subspace_conv2d_tiles as tiles

MEMBERS, IMAGES, ANCHORS = 4, 64, 3


def cases(arch: int, cores: dict[int, str]) -> Iterator[tuple]:
    """Every shipped configuration with a 3x3 kernel, and what else changes the code.

    `cores` names the tensor-core instruction of each architecture.
    """
    for (a, bucket), config in tiles.SHIPPED.items():
        if a != arch:
            continue
        stage, kind, *mode, width = bucket.split()
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        thin = width == "thin"
        loads = ("tma",) if config.tma else () if thin or mode else ("cp.async",)
        must = () if kind == "ieee" else (cores[arch], *loads)
        never = tuple(cores.values()) if kind == "ieee" else ()
        sizes = (3 if thin else int(width), 32 if thin else int(width))
        call = _call(stage, config, dtype, *sizes, 3, kind == "tf32", mixed="mixed" in mode)
        yield f"subspace conv {bucket}", call, must, never
    half = torch.float16
    for stage in tiles.STAGES:
        config, must = tiles.SHIPPED[arch, f"{stage} half 32"], (cores[arch],)
        name = f"subspace conv {stage}"
        yield f"{name} stride 2", _call(stage, config, half, 32, 32, 3, step=2), must, ()
        yield f"{name} shared", _call(stage, config, half, 32, 32, 3, shared=True), must, ()
        yield f"{name} long", _call(stage, config, half, 32, 32, 3, long=True), must, ()
        if arch > 80:
            config = tiles.SHIPPED[arch, f"{stage} half boxes 64"]
            call = _call(stage, config, half, 72, 72, 1, shared=stage != "x")
            yield f"{name} boxes 1x1, ragged", call, (*must, "tma"), ()


def _call(
    stage, config, dtype, summed, columns, kernel, tf32=False, step=1, shared=False, long=False,
    mixed=False,
):  # fmt: skip
    """A launch of a stage with that many channels summed over and in the columns of its tile."""
    I, O = (columns, summed) if stage == "x" else (summed, columns)
    H, out, pad = 32, 32 // step, kernel // 2
    new = partial(torch.empty, device="meta")

    def pictures(members, channels, size):
        width = 2**24 if long else size  # of what lies between rows
        rows = new(members, IMAGES, size, width, channels, dtype=dtype)
        return rows[:, :, :, :size].permute(0, 1, 4, 2, 3)

    x, y = pictures(1 if shared else MEMBERS, I, H), pictures(MEMBERS, O, out)
    rows, held = (ANCHORS, torch.float32) if mixed else (MEMBERS, dtype)
    weight = new(rows, O, kernel, kernel, I, dtype=held)
    coeffs, bias = new(MEMBERS, ANCHORS) if mixed else None, new(rows, O)
    options = ((step, step), (pad, pad), (1, 1), tf32)

    def call():
        if stage == "fwd":
            images.subspace_conv2d_fwd(x, weight, coeffs, bias, y, *options, config=config)
        elif stage == "x":
            images.subspace_conv2d_bwd_x(y, weight, coeffs, x, *options, config=config)
        else:
            dweight = new(MEMBERS, O, kernel, kernel, I)
            backward.subspace_conv2d_bwd_weight(y, x, dweight, *options, config=config, splits=8)

    return call
