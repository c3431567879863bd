"""pairwise_divergence: [M, N, C] logits to [M, M], against every eager formulation we know."""

import math
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Contestant, Target, Work, function, missing
from bench.peers import compiled, imported, ours
from landscape_fast.ops.pairwise_divergence import pairwise_divergence

CUDA = (
    (
        (16, 50000, 1000),
        "js",
        (
            Target("graph", "must", over="compile", ratio=5),
            Target("graph", "moonshot", over="compile", ratio=7, ms=1.8),
            Target("graph", "moonshot", over="eager", ratio=40),
        ),
    ),
    (
        (10, 10000, 10),
        "js",
        (
            Target("eager", "must", over="eager", ratio=10),
            Target("eager", "moonshot", over="eager", ratio=20),
            Target("graph", "moonshot", ms=0.015),
        ),
    ),
    ((64, 10000, 100), "js", (Target("graph", "must", over="compile", ratio=5),)),
    ((16, 50000, 1000), "kl", (Target("graph", "must", over="eager", ratio=4),)),
    ((10, 10000, 10), "kl", ()),
    ((64, 10000, 100), "kl", ()),
    ((16, 50000, 1000), "disagreement", ()),
    (
        (128, 10000, 1000),
        "kl",
        (
            Target("graph", "must", over="eager", ratio=4),
            Target("graph", "moonshot", ms=1.7),
        ),
    ),
    (
        (128, 10000, 1000),
        "js",
        (
            Target("graph", "must", over="compile", ratio=5),
            Target("graph", "moonshot", ms=24.0),
        ),
    ),
)
CPU = (
    (
        (10, 10000, 10),
        "js",
        (
            Target("eager", "must", over="eager", ratio=10),
            Target("eager", "must", over="compile", ratio=5),
            Target("eager", "moonshot", over="eager", ratio=14),
            Target("eager", "moonshot", over="compile", ratio=8),
        ),
    ),
    (
        (16, 2000, 1000),
        "js",
        (
            Target("eager", "must", over="eager", ratio=25),
            Target("eager", "must", over="compile", ratio=4),
            Target("eager", "moonshot", over="eager", ratio=36),
            Target("eager", "moonshot", over="compile", ratio=6),
        ),
    ),
    ((10, 10000, 10), "kl", ()),
    ((16, 2000, 1000), "kl", ()),
    ((10, 10000, 10), "disagreement", ()),
)
TINY = tuple(((4, 50, 7), kind, ()) for kind in ("js", "kl", "disagreement"))
FEW = 16  # members up to which a loop in Python over members or pairs is worth unrolling


def _symmetric(M: int, pairs: list[Tensor], like: Tensor) -> Tensor:
    out = like.new_zeros(M, M)
    i, j = torch.triu_indices(M, M, 1, device=like.device)
    out[i, j] = torch.stack(pairs)
    return out + out.T


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1).mean(-1)


def js_pair_loop(logits):
    """JS(i, j) = H((p_i + p_j) / 2) - (H_i + H_j) / 2, a pair at a time."""
    p = logits.softmax(-1)
    h = _entropy(p)
    M = len(p)
    pairs = [
        _entropy((p[i] + p[j]) / 2) - (h[i] + h[j]) / 2 for i in range(M) for j in range(i + 1, M)
    ]
    return _symmetric(M, pairs, p)


def js_rows(logits, entropy=_entropy):
    """A row of the upper triangle at a time."""
    p = logits.softmax(-1)
    h = entropy(p)
    M = len(p)
    rows = [entropy((p[i] + p[i + 1 :]) / 2) - (h[i] + h[i + 1 :]) / 2 for i in range(M - 1)]
    return _symmetric(M, list(torch.cat(rows)), p)


def _entropy_by_log(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-37).log()).sum(-1).mean(-1)


js_rows_log = partial(js_rows, entropy=_entropy_by_log)


def js_broadcast(logits):
    """All M * M pairs at once."""
    p = logits.softmax(-1)
    h = _entropy(p)
    return _entropy((p[:, None] + p[None]) / 2) - (h[:, None] + h[None]) / 2


def kl_pair_loop(logits):
    """KL(i || j) = mean of sum p_i (log p_i - log p_j), a row at a time."""
    log = logits.log_softmax(-1)
    return torch.stack([(row.exp() * (row - log)).sum(-1).mean(-1) for row in log])


def kl_gemm(logits):
    """One matrix product over all examples and classes: fast, and inexact for close members."""
    log = logits.log_softmax(-1)
    M, N, _ = log.shape
    cross = log.exp().reshape(M, -1) @ log.reshape(M, -1).T / N
    return cross.diagonal()[:, None] - cross


def disagreement(logits):
    """Labels, then all pairs."""
    labels = logits.argmax(-1)
    return (labels[:, None] != labels[None]).float().mean(-1)


def torchmetrics_pairs(device: str, kind: str, C: int) -> Contestant:
    """torchmetrics, a pair at a time: of ordered pairs for KL."""
    name = "jensen_shannon_divergence" if kind == "js" else "kl_divergence"
    call, why = imported("torchmetrics.functional.regression", name)
    if call is None:
        return missing("torchmetrics", "library", why)
    if device == "cpu" and C > 100:
        return missing("torchmetrics", "library", "minutes on a CPU")

    def pairs(logits):
        log = logits.log_softmax(-1)
        M = len(log)
        if kind == "js":
            found = [call(log[i], log[j], log_prob=True) for i in range(M) for j in range(i + 1, M)]
            return _symmetric(M, found, log)
        rows = [torch.stack([call(p, q, log_prob=True) for q in log]) for p in log]
        return torch.stack(rows)

    return function("torchmetrics", "library", pairs)


def truth(logits, kind: str):
    """The definition in float64, a row at a time, in the memory of a few copies of the logits."""
    if kind == "disagreement":
        labels = logits.argmax(-1)
        return torch.stack([(row != labels).double().mean(-1) for row in labels])
    M, N, _ = logits.shape
    total = logits.new_zeros(M, M)
    step = max(1, (1 << 27) // max(1, logits[:, :1].numel()))  # about a gigabyte of float64
    for part in logits.split(step, 1):
        log = part.log_softmax(-1)
        p = log.exp()
        for i in range(M):
            if kind == "kl":
                row = p[i] * (log[i] - log)
            else:
                mid = torch.logaddexp(log[i], log[i:]) - math.log(2)
                row = (p[i] * (log[i] - mid) + p[i:] * (log[i:] - mid)) / 2
            total[i, M - len(row) :] += row.sum((-2, -1)) / N
    return total if kind == "kl" else torch.triu(total, 1) + torch.triu(total, 1).T


def make(device, generator, M, N, C):
    """Logits of members that agree in part: a common signal and a deviation of each."""
    common = torch.randn(1, N, C, generator=generator, device=device)
    return ((2 * common + torch.randn(M, N, C, generator=generator, device=device)),)


def contestants(device: str, quick: bool, kind: str, M: int, C: int) -> list[Contestant]:
    """Ours and the eager formulations; torch.compile of the best two."""
    everybody = ours("pairwise_divergence", partial(_ours, kind=kind), device, torch.float32)
    if kind == "disagreement":
        everybody.append(function("argmax, broadcast", "eager", disagreement))
        return everybody + compiled("argmax, broadcast", disagreement, device, quick)
    if kind == "kl":
        everybody.append(function("gemm", "eager", kl_gemm))
        if M <= FEW:
            everybody.append(function("row loop", "eager", kl_pair_loop))
            everybody.append(torchmetrics_pairs(device, kind, C))
        return everybody + compiled("gemm", kl_gemm, device, quick)
    everybody += [
        function("rows, entropy", "eager", js_rows),
        function("rows, log", "eager", js_rows_log),
    ]
    if M <= FEW:
        everybody.append(function("pair loop", "eager", js_pair_loop))
        everybody.append(torchmetrics_pairs(device, kind, C))
        everybody += compiled("rows, log", js_rows_log, device, quick)
    if M <= FEW and C <= 100:
        everybody.append(function("broadcast", "eager", js_broadcast))
    return everybody + compiled("broadcast", js_broadcast, device, quick)


def _ours(logits, kind, backend):
    return pairwise_divergence(logits, kind, backend=backend)


def work(kind: str, M: int, N: int, C: int) -> dict[str, Work]:
    """The logits once; JS takes a logarithm per pair and class. The product in KL counts nothing:
    on tensor cores it hides behind the read."""
    logs = M * (M - 1) // 2 * N * C if kind == "js" else 0
    return {"fwd": Work(4 * M * N * C, logs=logs)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (sizes, kind, targets) in enumerate(table):
        M, N, C = sizes
        small = M * N * C <= 10_000_000  # only there the launcher shows
        found.append(
            Case(
                "pairwise_divergence",
                {"kind": kind, "M": M, "N": N, "C": C},
                torch.float32,
                partial(make, M=M, N=N, C=C),
                partial(truth, kind=kind),
                partial(contestants, kind=kind, M=M, C=C),
                work(kind, M, N, C),
                ("graph", "eager") if small or device == "cpu" else ("graph",),
                targets,
                priority,
            )
        )
    return found
