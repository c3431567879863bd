"""Every shipped configuration of the subspace_linear kernels, for `aot_cases`."""

from functools import partial

import torch

from landscape_fast.kernels import subspace_linear as kernels
from landscape_fast.kernels import subspace_linear_backward as backward
from landscape_fast.kernels import subspace_linear_tiles as tiles


def cases(arch, cores):
    """(name, call, instructions that must, and that must not, be in the code)."""
    core = cores[arch]
    for (a, bucket), config in tiles.SHIPPED.items():
        if a != arch:
            continue
        stage, kind, size, *_ = bucket.split()
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        must = () if kind == "ieee" else (core if size != "skinny" else "mma.sync",)
        must += ("tma",) if config.tma else ("cp.async",)
        never = tuple(cores.values()) if kind == "ieee" else ()
        name = f"subspace linear {bucket}"
        if stage == "weight":
            yield name, _weight(config, dtype, kind), must, never
            continue
        for turned in (False, True):
            title = f"{name}{' dx' if turned else ''}"
            K = tiles.MOST_ANCHORS if stage == "mixed" else 0
            yield title, _product(config, dtype, kind, turned, K), must, never
            if stage == "mixed" and kind == "half" and not turned:
                call = _product(config, dtype, kind, turned, K, torch.float32)
                yield f"{title}, float32 anchors", call, must, never
    name = "half tiny" if arch == 80 else "half tiny tma"
    for stage in ("product", "mixed"):  # ragged sizes, and 64-bit offsets
        config, K = tiles.SHIPPED[arch, f"{stage} {name}"], 2 if stage == "mixed" else 0
        call = _product(config, torch.float16, "half", False, K, I=1008, O=1008)
        yield f"subspace linear {stage} ragged", call, (core,), ()
        config = tiles.SHIPPED[arch, f"{stage} half tiny"]
        call = _product(config, torch.float16, "half", False, K, long=True)
        yield f"subspace linear {stage} long", call, (core,), ()


def _product(config, dtype, kind, turned, K, held=None, I=1024, O=1024, long=False):
    M, B = 4, 512
    new = partial(torch.empty, dtype=dtype, device="meta")
    weights = partial(new, dtype=held or dtype)
    x, y = new(M, B, I), new(M, B, O)
    weight, bias = weights(K or M, *((I, O) if turned else (O, I))), weights(K or M, O)
    coeffs = torch.empty(M, K, device="meta") if K else None
    options = {"config": config, "long": long}
    return lambda: kernels.subspace_linear_product(
        x, weight, coeffs, bias, y, kind == "tf32", turned, **options
    )


def _weight(config, dtype, kind):
    M, B, I, O = 4, 512, 1024, 1024
    new = partial(torch.empty, dtype=dtype, device="meta")

    def call():
        for split in ((1, B), (2, B // 2)):
            outputs = (new(M, O, I), new(M, O))
            backward.subspace_linear_bwd_weight(
                new(M, B, O), new(M, B, I), *outputs, kind == "tf32", config=config, split=split
            )

    return call
