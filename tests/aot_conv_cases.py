"""The cases of tests/aot_cases.py for the convolution kernels: (name, call, must, never)."""

from collections.abc import Iterator
from functools import partial

import torch

from landscape_fast.kernels import batch_ensemble_conv2d as forward
from landscape_fast.kernels import batch_ensemble_conv2d_backward as backward
from landscape_fast.kernels import batch_ensemble_conv2d_tiles as tiles

MEMBERS, IMAGES = 4, 64


def cases(arch: int, cores: dict[int, str]) -> Iterator[tuple]:
    """Every shipped configuration with a 3x3 kernel, and what else changes the code.

    `cores` names the tensor-core instruction of each architecture.
    """
    for (a, bucket), config in tiles.SHIPPED.items():
        if a != arch:
            continue
        stage, kind, width = bucket.split()
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        must = () if kind == "ieee" else (cores[arch], "cp.async")
        never = tuple(cores.values()) if kind == "ieee" else ()
        thin = width == "thin"
        sizes = (3 if thin else int(width), 32 if thin else int(width))
        call = _call(stage, config, dtype, *sizes, 3, kind == "tf32")
        yield f"conv {bucket}", call, must[:1] if thin else must, never
    half = torch.float16
    for stage in tiles.STAGES:
        # a tile of few k has rows for mma.sync only, where k are its rows
        must = ("mma.sync" if stage == "weight" else cores[arch],)
        config = tiles.SHIPPED[arch, f"{stage} half 16"]
        yield f"conv {stage} 1x1", _call(stage, config, half, 16, 16, 1), must, ()
        config, must = tiles.SHIPPED[arch, f"{stage} half 32"], (cores[arch],)
        yield f"conv {stage} stride 2", _call(stage, config, half, 32, 32, 3, step=2), must, ()
        yield f"conv {stage} bare", _call(stage, config, half, 32, 32, 3, factors=False), must, ()
        yield f"conv {stage} long", _call(stage, config, half, 32, 32, 3, long=True), must, ()
    config = tiles.SHIPPED[arch, "x half 16"]
    yield "conv x shared", _call("x", config, half, 16, 16, 3, shared=True), (cores[arch],), ()


def _call(
    stage, config, dtype, summed, columns, kernel, tf32=False, step=1, factors=True, shared=False,
    long=False,
):  # fmt: skip
    """A launch of a stage with that many channels summed over and in the columns of its tile."""
    I, O = (columns, summed) if stage == "x" else (summed, columns)
    H, out, pad = 32, 32 // step, kernel // 2

    def images(members, channels, size):
        width = 2**24 if long else size  # of what lies between rows
        rows = torch.empty(members, IMAGES, size, width, channels, dtype=dtype, device="meta")
        return rows[:, :, :, :size].permute(0, 1, 4, 2, 3)

    new = partial(torch.empty, dtype=dtype, device="meta")
    x, y = images(1 if shared else MEMBERS, I, H), images(MEMBERS, O, out)
    weight, held = new(O, kernel, kernel, I), torch.float32
    r, s, bias = (new(MEMBERS, n, dtype=held) if factors else None for n in (I, O, O))
    options = ((step, step), (pad, pad), (1, 1))

    def call():
        if stage == "fwd":
            arguments = (x, weight, r, s, bias, y, *options, True, tf32)
            forward.batch_ensemble_conv2d_fwd(*arguments, config=config)
            return
        outputs = (x, None, None, None, None)
        if stage == "weight":
            dr, ds = (r, s) if factors else (None, None)
            outputs = (None, new(*weight.shape, dtype=held), dr, ds, bias)
        backward.batch_ensemble_conv2d_bwd(
            y, x, weight, r, s, *outputs, *options, tf32,
            x_config=config, weight_config=config, split=tiles.Split(2, 2**14, 8),
        )  # fmt: skip

    return call
