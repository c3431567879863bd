"""The configurations of anchor_step, for `aot_cases`."""

from collections.abc import Iterator
from functools import partial

import torch

from landscape_fast.kernels import anchor_step

P, SIZES = 65536, (32768, 32000, 768)  # so many tiles that the sum takes its largest blocks
NESTEROV, ADAMW = 2, 4  # kinds of rules: the others are shorter


def cases(arch: int, cores: dict[int, str]) -> Iterator[tuple]:
    """(name, call, must, never) of all cases for an architecture."""
    for (a, held), config in anchor_step.SHIPPED.items():
        if a != arch:
            continue
        never = tuple(cores.values())
        for kind in (ADAMW, NESTEROV) if held == 2 else (ADAMW,):
            call = partial(_call, config, held, kind, torch.float32)
            yield f"anchor_step S={held} kind={kind}", call, ("wide",), never
        if held == 4:
            call = partial(_call, config, held, ADAMW, torch.bfloat16, pair=False, parts=True)
            yield f"anchor_step S={held} bfloat16", call, ("wide",), never


def _call(config, S, kind, dtype, pair=True, parts=False):
    T = (S + 1) // 2 if S > 2 else S
    F = S - T

    def rows(n):
        return torch.empty(n, P, dtype=dtype)

    hyper = [0.1, 0.9, 0.99, 1e-8, 1e-4, 1e-4, 1.0]
    double = partial(torch.empty, dtype=torch.float64)
    pair = torch.zeros((), dtype=torch.int64) if pair and S > 1 else None
    anchor_step.anchor_step(
        rows(2), torch.empty(2, len(SIZES), S), rows(T), rows(F) if F else None,
        rows(T) if kind else None, rows(T) if kind > 2 else None, torch.zeros(()),
        torch.zeros(()) if parts else None, kind, hyper, SIZES,
        torch.ones(len(SIZES), dtype=torch.bool), double(S, S), pair,
        "parts" if parts else "total", double(len(SIZES), S, S) if parts else double(S, S), config,
    )  # fmt: skip
