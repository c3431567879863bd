"""ensemble_summary: ten measures of an ensemble in one read of its logits."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Bound, Case, Contestant, Target, Work, function, missing
from bench.peers import compiled, imported, ours
from landscape_fast.ops.ensemble_summary import ensemble_summary, ensemble_summary_reference

BINS = 15
CUDA = (
    (
        (16, 50000, 1000),
        (
            Target("graph", "must", over="compile", ratio=2),
            Target("graph", "moonshot", over="compile", ratio=2.5, ms=0.830),
            Target("graph", "moonshot", over="eager", ratio=8),
        ),
    ),
    (
        (10, 10000, 10),
        (
            Target("eager", "must", over="eager", ratio=10),
            Target("eager", "moonshot", over="eager", ratio=20),
            Target("graph", "moonshot", ms=0.015),
        ),
    ),
    ((64, 10000, 100), ()),
    ((128, 10000, 1000), ()),
)
CPU = (((10, 10000, 10), ()), ((16, 2000, 1000), ()))
TINY = (((4, 50, 7), ()),)


def _ece(p: Tensor, targets: Tensor) -> Tensor:
    """Expected calibration error of [N, C] probabilities, equal-width bins (lo, hi]."""
    confidence, label = p.max(-1)
    correct = (label == targets).to(p.dtype)
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=p.dtype, device=p.device)
    return gaps.index_add(0, bins, confidence - correct).abs().sum() / len(targets)


def _brier(p: Tensor, targets: Tensor) -> Tensor:
    return (p - F.one_hot(targets, p.shape[-1])).square().sum(-1).mean(-1)


def separate(logits, targets):
    """One measure after the other, each from the logits, as metric packages compute them."""
    mean = logits.softmax(-1).mean(0)
    entropy = torch.special.entr(logits.softmax(-1).mean(0)).sum(-1).mean()
    mean_entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
    nll = [F.cross_entropy(member, targets) for member in logits]
    return (
        (logits.argmax(-1) == targets).to(logits.dtype).mean(-1),
        torch.stack(nll),
        _brier(logits.softmax(-1), targets),
        torch.stack([_ece(member.softmax(-1), targets) for member in logits]),
        (mean.argmax(-1) == targets).to(logits.dtype).mean(),
        F.nll_loss(mean.log(), targets),
        _brier(mean, targets),
        _ece(mean, targets),
        entropy,
        entropy - mean_entropy,
    )


def shared(logits, targets):
    """All measures from one log-softmax: as good as plain PyTorch gets."""
    log = logits.log_softmax(-1)
    p = log.exp()
    mean = p.mean(0)
    everybody = torch.cat([p, mean[None]])
    confidence, label = everybody.max(-1)
    correct = (label == targets).to(p.dtype)
    at = targets.expand(len(everybody), -1)[..., None]
    true = everybody.gather(-1, at)[..., 0]
    brier = (everybody.square().sum(-1) - 2 * true + 1).mean(-1)
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    gaps = confidence.new_zeros(len(everybody), BINS).scatter_add(1, bins, confidence - correct)
    ece = gaps.abs().sum(-1) / len(targets)
    accuracy = correct.mean(-1)
    entropy = torch.special.entr(mean).sum(-1).mean()
    nll = -log.gather(-1, at[:-1])[..., 0].mean(-1)
    members = (accuracy[:-1], nll, brier[:-1], ece[:-1])
    ensemble = (accuracy[-1], -true[-1].log().mean(), brier[-1], ece[-1])
    return *members, *ensemble, entropy, entropy + (p * log).sum(-1).mean()


def torchmetrics_part(bins_classes: int) -> Contestant:
    """torchmetrics for the two measures it shares with us, accuracy and ECE, of every member."""
    name = "torchmetrics (accuracy and ECE only)"
    module = "torchmetrics.functional.classification"
    accuracy, why = imported(module, "multiclass_accuracy")
    calibration, _ = imported(module, "multiclass_calibration_error")
    if accuracy is None:
        return missing(name, "library", why)

    def bind(inputs: tuple, train: bool) -> Bound:
        logits, targets = inputs
        options = {"num_classes": bins_classes, "validate_args": False}

        def call():
            return [
                (
                    accuracy(member, targets, average="micro", **options),
                    calibration(member.softmax(-1), targets, n_bins=BINS, **options),
                )
                for member in logits
            ]

        return Bound(call)

    return Contestant(name, "library", bind, same=False, note="two of the ten measures")


def make(device, generator, M, N, C):
    """Logits of members that agree in part and are right more often than not, and targets.

    No example has a tie within rounding, where float32 and float64 would count it differently:
    those that had one repeat the first example that has none.
    """
    targets = torch.randint(C, (N,), generator=generator, device=device)
    common = torch.randn(1, N, C, generator=generator, device=device)
    logits = 2 * common + torch.randn(M, N, C, generator=generator, device=device)
    logits.scatter_add_(2, targets.expand(M, N)[..., None], torch.full_like(logits[..., :1], 3.0))
    tied = torch.cat([_tied(part) for part in logits.split(1024, 1)])
    clear = (~tied).int().argmax()  # the first
    at = torch.where(tied, clear, torch.arange(N, device=device))
    return logits[:, at].contiguous(), targets[at]


def _tied(logits: Tensor) -> Tensor:
    """[N]: whether a confidence is at the edge of a bin or the two most probable classes tie."""
    p = logits.double().softmax(-1)
    top = torch.cat([p, p.mean(0, keepdim=True)]).topk(2).values  # [M + 1, N, 2]
    edge = top[..., 0] * BINS
    near = ((edge - edge.round()).abs() < 1e-4) | (top[..., 0] - top[..., 1] < 1e-5)
    return near.any(0)


def contestants(device: str, quick: bool, C: int) -> list[Contestant]:
    """Ours, separate metrics, the best eager formulation, its compilation, torchmetrics."""
    op = partial(ensemble_summary, bins=BINS)
    return [
        *ours("ensemble_summary", op, device, torch.float32),
        function("separate metrics", "eager", separate),
        function("one softmax", "eager", shared),
        *compiled("one softmax", shared, device, quick),
        torchmetrics_part(C),
    ]


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, ((M, N, C), targets) in enumerate(table):
        small = M * N * C <= 10_000_000
        found.append(
            Case(
                "ensemble_summary",
                {"M": M, "N": N, "C": C},
                torch.float32,
                partial(make, M=M, N=N, C=C),
                partial(ensemble_summary_reference, bins=BINS),
                partial(contestants, C=C),
                {"fwd": Work(4 * M * N * C + 8 * N)},
                ("graph", "eager") if small or device == "cpu" else ("graph",),
                targets,
                priority,
            )
        )
    return found
