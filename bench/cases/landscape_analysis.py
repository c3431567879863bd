"""landscape_analysis: all that is measured on the predictions of the checkpoints of several runs.

Of R runs of T checkpoints, S = R * T functions on N examples: matrices of disagreement,
Jensen-Shannon divergence and distance between all of them, ten scores of every one and of their
average, and where each lies in the plane of accuracy against diversity. Ours is public functions
one after the other; the peers are what a notebook has in their place.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.case import Bound, Case, Contestant, Target, Work, function
from bench.cases.ensemble_summary import BINS, _tied, shared
from bench.cases.pairwise_divergence import js_rows
from landscape_fast.landscape import diversity_points, function_distances
from landscape_fast.ops import ensemble_summary, pairwise_divergence

CPU = (
    ((5, 40, 10000, 10), (Target("eager", "must", ms=10_000.0),)),
    ((5, 40, 1000, 10), ()),
)
CUDA = (((5, 40, 10000, 10), ()),)
TINY = (((2, 3, 50, 7), ()),)


def make(device, generator, R, T, N, C):
    """Logits of runs that start alike and end apart, each in ever smaller steps, and targets.

    As in the bench of ensemble_summary, no example has a tie within rounding.
    """

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    targets = torch.randint(C, (N,), generator=generator, device=device)
    end = 1.5 * randn(1, N, C) + 1.5 * randn(R, N, C)
    end.scatter_add_(2, targets.expand(R, N)[..., None], torch.full_like(end[..., :1], 3.0))
    logits = []
    for t in range(T):
        left = 0.1 ** (2 * t / T)  # of the way, and of the size of a step
        logits.append((1 - left) * end + left * randn(R, N, C))
    logits = torch.stack(logits, 1).flatten(0, 1)  # [S, N, C], run by run
    tied = torch.cat([_tied(part) for part in logits.split(1024, 1)])
    clear = (~tied).int().argmax()  # the first
    at = torch.where(tied, clear, torch.arange(N, device=device))
    return logits[:, at].contiguous(), targets[at]


def ours(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Everything, by public functions."""
    labels = logits.argmax(-1)
    points = diversity_points(labels, labels[-1], targets)
    found = [
        pairwise_divergence(logits, "disagreement"),
        pairwise_divergence(logits, "js"),
        function_distances(logits),
        points.disagreement,
        *ensemble_summary(logits, targets, BINS),
    ]
    return [value.float() for value in found]


def _entropies(p: Tensor) -> Tensor:
    """[S] of [S, N, C]: one sum over examples and classes, quicker than one after the other."""
    return -(p * p.clamp_min(1e-37).log()).sum((1, 2)) / p.shape[1]


def in_torch(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """The best plain PyTorch we know for each."""
    labels = logits.argmax(-1)
    flat = logits.softmax(-1).flatten(1)
    return [
        torch.stack([(row != labels).to(logits.dtype).mean(-1) for row in labels]),
        js_rows(logits, _entropies),
        torch.cdist(flat, flat),
        (labels != labels[-1]).to(logits.dtype).mean(-1),
        *shared(logits, targets),
    ]


def truth(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """The same in float64, with distances from differences."""
    found = in_torch(logits, targets)
    p = logits.softmax(-1).flatten(1)
    found[2] = torch.cdist(p, p, compute_mode="donot_use_mm_for_euclid_dist")
    return found


def in_numpy(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """A notebook without PyTorch."""
    S, N, C = x.shape
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    log = np.log(np.maximum(p, 1e-37))
    labels = x.argmax(-1)
    entropy = -(p * log).sum((1, 2)) / N
    js = np.zeros((S, S), x.dtype)
    for i in range(S - 1):
        mid = (p[i] + p[i + 1 :]) / 2
        mixed = -(mid * np.log(np.maximum(mid, 1e-37))).sum((1, 2)) / N
        js[i, i + 1 :] = js[i + 1 :, i] = mixed - (entropy[i] + entropy[i + 1 :]) / 2
    different = np.stack([(row != labels).mean(-1) for row in labels])
    flat = p.reshape(S, -1)
    squares = (flat * flat).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0))
    mean = p.mean(0)
    rows = np.concatenate([p, mean[None]])
    confidence, right = rows.max(-1), rows.argmax(-1) == y
    at = rows[:, np.arange(N), y]
    brier = ((rows * rows).sum(-1) - 2 * at + 1).mean(-1)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = [np.bincount(b, c - r, BINS) for b, c, r in zip(bins, confidence, right, strict=True)]
    ece = np.abs(gaps).sum(-1) / N
    accuracy, nll = right.mean(-1), -np.log(np.maximum(at, 1e-37)).mean(-1)
    total = -(mean * np.log(np.maximum(mean, 1e-37))).sum(-1).mean()
    scores = (accuracy, nll, brier, ece)
    return [
        different,
        js,
        distances,
        (labels != labels[-1]).mean(-1),
        *(score[:-1] for score in scores),
        *(score[-1] for score in scores),
        total,
        total - entropy.mean(),
    ]


def numpy_peer() -> Contestant:
    """On the host; nothing to time on a GPU."""

    def bind(inputs: tuple, train: bool) -> Bound:
        x, y = (t.numpy() for t in inputs)
        return Bound(lambda: [torch.from_numpy(np.asarray(v, x.dtype)) for v in in_numpy(x, y)])

    return Contestant("numpy", "library", bind)


def contestants(device: str, quick: bool) -> list[Contestant]:
    """Ours, plain PyTorch, and numpy on a CPU."""
    found = [function("ours", "ours", ours), function("plain torch", "eager", in_torch)]
    return found + ([numpy_peer()] if device == "cpu" else [])


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, ((R, T, N, C), targets) in enumerate(table):
        S = R * T
        # the logits once; a logarithm per pair and class; the distances by one product
        work = Work(4 * S * N * C + 8 * N, 2 * S * S * N * C, logs=S * (S - 1) // 2 * N * C)
        found.append(
            Case(
                "landscape_analysis",
                {"runs": R, "checkpoints": T, "N": N, "C": C},
                torch.float32,
                partial(make, R=R, T=T, N=N, C=C),
                truth,
                contestants,
                {"fwd": work},
                ("eager",),
                targets,
                priority,
            )
        )
    return found
