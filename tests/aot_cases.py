"""Every shipped configuration of every Triton kernel, launched on tensors without a GPU.

`python tests/aot_cases.py ARCH` compiles them for sm_<ARCH> and prints a line of JSON for each.
Must run without TRITON_INTERPRET, in a process of its own.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import aot
import aot_anchor_step
import aot_conv_cases
import aot_hyper_batch
import aot_norm_cases
import aot_subspace_conv_cases
import aot_subspace_linear
import torch

from landscape_fast.kernels import batch_ensemble_linear as linear
from landscape_fast.kernels import batch_ensemble_linear_backward as linear_backward
from landscape_fast.kernels import batch_ensemble_linear_tiles as linear_tiles
from landscape_fast.kernels import combine, gram, perturb
from landscape_fast.kernels._launch import SHARED_MEMORY
from landscape_fast.kernels._table import Row

TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


class Case(NamedTuple):
    """A launch of one configuration, and the instructions that its code must and must not hold."""

    name: str
    call: Callable[[], object]
    must: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


def cases(arch: int) -> Iterator[Case]:
    """All cases for an architecture."""
    yield from _linear(arch)
    yield from (Case(*case) for case in aot_conv_cases.cases(arch, TENSOR_CORES))
    yield from _combine(arch)
    yield from (Case(*case) for case in aot_hyper_batch.cases(arch, TENSOR_CORES))
    yield from (Case(*case) for case in aot_subspace_conv_cases.cases(arch, TENSOR_CORES))
    yield from (Case(*case) for case in aot_norm_cases.cases(arch, TENSOR_CORES))
    yield from _gram(arch)
    yield from (Case(*case) for case in aot_subspace_linear.cases(arch, TENSOR_CORES))
    yield from (Case(*case) for case in aot_anchor_step.cases(arch, TENSOR_CORES))
    yield from _perturb(arch)


def _linear(arch: int) -> Iterator[Case]:
    for (a, bucket), config in linear_tiles.SHIPPED.items():
        if a != arch:
            continue
        dtype = torch.float32 if "half" not in bucket else torch.bfloat16
        rows = config.tiles.get("BLOCK_B", 64)
        core = TENSOR_CORES[arch] if rows >= 64 or "weight" in bucket else "mma.sync"
        must = (() if "ieee" in bucket else (core,)) + (("tma",) if config.tma else ("cp.async",))
        never = tuple(TENSOR_CORES.values()) if "ieee" in bucket else ()
        yield Case(f"linear {bucket}", _linear_call(bucket, config, dtype), must, never)
        if "half" in bucket:  # as under autocast
            call = _linear_call(bucket, config, dtype, held=True)
            yield Case(f"linear {bucket}, float32 parameters", call, must, never)
    # the same code in float16 with ragged sizes, without factors, and with 64-bit offsets
    name = "fwd half medium" if arch == 80 else "fwd half medium tma"
    config, half = linear_tiles.SHIPPED[arch, name], torch.float16
    must = (TENSOR_CORES[arch],)
    yield Case("linear fwd ragged", _linear_call("fwd half", config, half, I=1008, O=1008), must)
    yield Case("linear fwd bare", _linear_call("fwd half", config, half, factors=False), must)
    yield Case("linear fwd relu", _linear_call("fwd half", config, half, relu=True), must)
    name = "weight half small" if arch == 80 else "weight half medium tma"
    config = linear_tiles.SHIPPED[arch, name]
    yield Case("linear weight bare", _linear_call("weight half", config, half, factors=False), must)
    for bucket in ("fwd half small", "x half small", "weight+r half tiny"):
        config = linear_tiles.SHIPPED[arch, bucket]
        yield Case(f"linear {bucket} long", _linear_call(bucket, config, half, long=True), must)


def _linear_call(
    bucket, config, dtype, I=1024, O=1024, factors=True, long=False, relu=False, held=False
):
    M, B, tf32 = 4, 1024, "tf32" in bucket

    new = partial(torch.empty, dtype=dtype, device="meta")

    def parameter(*shape):
        return new(*shape, dtype=torch.float32 if held else dtype)

    x = new(B, I) if "shared" in bucket else new(M, B, I)
    weight, y = new(O, I), new(M, B, O)
    r, s, bias = (parameter(M, n) for n in (I, O, O)) if factors else (None, None, None)
    dr, ds = (parameter(M, I), parameter(M, O)) if factors else (None, None)

    def call():
        if bucket.startswith("fwd"):
            linear.batch_ensemble_linear_fwd(
                x, weight, r, s, bias, y, tf32, relu, config=config, long=long
            )
        elif bucket.startswith("x"):
            outputs = (new(*x.shape), None, dr, None, None)
            linear_backward.batch_ensemble_linear_bwd(
                y, x, weight, r, s, *outputs, tf32, x_config=config, long=long
            )
        else:
            outputs = (None, parameter(O, I), dr if "+r" in bucket else None, ds, bias)
            linear_backward.batch_ensemble_linear_bwd(
                y, x, weight, r, s, *outputs, tf32, weight_config=config, long=long,
                split=linear_tiles.Split(2, B, 2),
            )  # fmt: skip

    return call


def _combine(arch: int) -> Iterator[Case]:
    for shipped, backward in ((combine.FORWARD_SHIPPED, False), (combine.BACKWARD_SHIPPED, True)):
        for (a, k), config in shipped.items():
            for parts in (1, 2) if k == 4 else (2,):  # two parts: the code of one, and more
                if a == arch:
                    name = f"combine {'bwd' if backward else 'fwd'} K={k or 'any'} parts={parts}"
                    call = _combine_call(config, k or 40, parts, backward)
                    yield Case(name, call, never=tuple(TENSOR_CORES.values()))


def _combine_call(config, K, parts, backward):
    M, P = 16, 4096
    anchors, weights, coeffs = torch.empty(K, P), torch.empty(M, P), torch.empty(M, parts, K)
    rows = [Row(P, 0, P, 0, P, 0, P, 0), Row(P // 2 + 1, 1, P, 1, P, 1, P, 1)][:parts]

    def call():
        if backward:
            outputs = (torch.empty_like(anchors), torch.empty_like(coeffs))
            combine.combine_bwd(coeffs, anchors, weights, *outputs, rows, config)
        else:
            combine.combine_fwd(coeffs, anchors, weights, rows, config)

    return call


def _gram(arch: int) -> Iterator[Case]:
    for (a, k), config in gram.SHIPPED.items():
        for parts in (1, 2) if k == 2 else (1,):  # two parts: the code of one, and more
            for dtype in (torch.float32, torch.bfloat16) if k == 4 else (torch.float32,):
                if a == arch:
                    name = f"gram K={k} parts={parts} {dtype}"
                    yield Case(name, _gram_call(config, k, parts, dtype))


def _gram_call(config, K, parts, dtype):
    P = 4096
    anchors, out = torch.empty(K, P, dtype=dtype), torch.empty(parts, K, K, dtype=torch.float64)
    rows = ((P, 0, P, 0, 0, -1, 0, 0), (P // 2 + 1, 1, P, 0, 0, -1, 0, 1))[:parts]
    return lambda: gram.gram(anchors, out, rows, config)


def _perturb(arch: int) -> Iterator[Case]:
    for (a, kernel), config in perturb.SHIPPED.items():
        for dtype in (torch.float32, torch.bfloat16) if a == arch else ():
            for shared in (False, True):
                name = f"perturb {kernel}{' shared' if shared else ''} {dtype}"
                yield Case(name, _perturb_call(kernel, config, dtype, shared), ("wide",))


def _perturb_call(kernel, config, dtype, shared):
    M, P = 4, 4096
    weights = torch.empty(P if shared else (M, P), dtype=dtype).reshape(-1, P)
    y, sigma, each = torch.empty(M, P, dtype=dtype), torch.empty_like(weights), torch.empty(M)
    draw = perturb.Draw(sigma, each, each, None, 1.0, 1.0, 3, 0)
    if kernel == "fwd":
        return lambda: perturb.perturb_fwd(weights, draw, y, config)
    return lambda: perturb.perturb_bwd(y, draw, weights, sigma, True, config)


def main(arch: int) -> None:
    """Compiles every distinct launch once."""
    seen = set()
    for case in cases(arch):
        for launch in aot.record(case.call):
            key = repr(launch._replace(grid=()))
            if key in seen:
                continue
            seen.add(key)
            kernel = launch.kernel.__name__
            adds_up = kernel.endswith(("sum_kernel", "sum_parts_kernel"))
            line = {
                "name": f"{case.name}: sum" if adds_up else case.name,
                "must": () if adds_up else case.must,
                "never": case.never,
                "limit": SHARED_MEMORY[arch],
            }
            print(json.dumps(line | aot.build(launch, arch)._asdict()), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
