"""What an ensemble of M members is worth: accuracy, proper scores, calibration, uncertainty."""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast import _extension
from landscape_fast.ops._checks import check_tensor, message, require, whole
from landscape_fast.ops._compiled import launch_cuda, logits_arguments
from landscape_fast.ops._dispatch import KERNEL_DTYPES, declare, pick, transforming, wants_grad
from landscape_fast.ops._library import define

OP = "ensemble_summary"
MOST_BINS = 4096  # of the calibration histogram

declare(OP, cpp=KERNEL_DTYPES, cuda=KERNEL_DTYPES)


class EnsembleSummary(NamedTuple):
    """Means over the examples; see `ensemble_summary`."""

    member_accuracy: Tensor  # [M], fraction
    member_nll: Tensor  # [M], nats
    member_brier: Tensor  # [M], in [0, 2]
    member_ece: Tensor  # [M], fraction
    accuracy: Tensor  # of the averaged probabilities, as the next three; 0-dim
    nll: Tensor
    brier: Tensor
    ece: Tensor
    entropy: Tensor  # nats, of the averaged probabilities; 0-dim
    mutual_information: Tensor  # nats, between prediction and member; 0-dim


def ensemble_summary(
    logits: Tensor,
    targets: Tensor,
    bins: int = 15,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
) -> EnsembleSummary:
    r"""Scores of M members and of their averaged probabilities, in one read of the logits.

    .. math::
        \bar p = \tfrac1M \sum_m p_m, \quad \mathrm{NLL} = -\ln p_y, \quad
        \mathrm{Brier} = \sum_c (p_c - [c = y])^2, \quad
        \mathrm{MI} = H(\bar p) - \tfrac1M \sum_m H(p_m), \quad
        \mathrm{ECE} = \sum_b \Big|\tfrac1N \sum_{n \in b} ([\hat y_n = y_n] - \max_c p_{nc})\Big|

    Args:
        logits: [M, N, C], what member m says about class c of example n; any strides, M and C at
            least 1. float32, bfloat16 or float16 (both widened to float32), or float64.
        targets: [N] int64, the true classes in [0, C).
        bins: of the ECE, in [1, 4096]: equal widths, bin b holds the confidences in
            (b / bins, (b + 1) / bins]; the first one also 0.
        ignore_index: examples with this target are left out of every mean.
        backend: "auto", "torch", "cpp" or "cuda"; see `landscape_fast.show_config`.

    Returns:
        EnsembleSummary: `member_accuracy`, `member_nll`, `member_brier`, `member_ece`, [M] each;
        `accuracy`, `nll`, `brier`, `ece` of the averaged probabilities, their `entropy`, and
        `mutual_information` (the generalised Jensen-Shannon divergence of the members), 0-dim
        each. float32 (float64 for float64 logits); nats and fractions; means over N, sums over C.
        A prediction is the first largest logit (averaged probability); NaN counts as the largest.
        NaN if no example is left. A NaN, a +inf or a row of -inf among the logits makes all but
        the accuracies of its member and of the ensemble NaN.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices are not as above, `bins` is out of range, or the
            backend cannot run here.
        IndexError: if a target is neither a class nor `ignore_index` and the tensors are on the
            CPU. On CUDA, where raising would wait for the device, every output that depends on the
            targets is then NaN; LANDSCAPE_FAST_DEBUG=1 makes it raise there too. Under a functorch
            transform and inside a compiled float64 graph the outputs are NaN as well.

    Cost: one read of the logits and M * N * C exponentials; no temporary of the size of the logits
        on the CPU. If `logits` requires a gradient the reference runs, which is differentiable to
        any order (through the confidences, in the ECE; accuracies are constant).

    Source: Guo et al. 2017 (arXiv:1706.04599) for the ECE; Brier 1950, summed over classes; mutual
        information as in Depeweg et al. 2018 (arXiv:1710.07283).

    Example:
        >>> import torch
        >>> from landscape_fast.ops.ensemble_summary import ensemble_summary
        >>> p = torch.tensor([[[0.8, 0.2], [0.4, 0.6]], [[0.6, 0.4], [0.8, 0.2]]])
        >>> summary = ensemble_summary(p.log(), torch.tensor([0, 1]))
        >>> summary.member_accuracy
        tensor([1.0000, 0.5000])
        >>> summary.accuracy, summary.brier  # p averages to 0.7, 0.3 and 0.6, 0.4
        (tensor(0.5000), tensor(0.4500))
    """
    check(OP, logits, targets, bins)
    name = pick(OP, backend, logits)
    if transforming():
        return ensemble_summary_reference(logits, targets, bins, ignore_index=ignore_index)
    if name == "torch" or wants_grad(logits):
        check_range(OP, targets, logits.shape[2], ignore_index)
        return ensemble_summary_reference(logits, targets, bins, ignore_index=ignore_index)
    members, ensemble = _summary_op(logits, targets, bins, ignore_index, name)
    return EnsembleSummary(*members.unbind(0), *ensemble.unbind(0))


def ensemble_summary_reference(
    logits: Tensor, targets: Tensor, bins: int = 15, *, ignore_index: int = -100
) -> EnsembleSummary:
    """The definition: every backend is tested against this, run in float64."""
    M = logits.shape[0]
    each = example_scores(logits, targets, bins, ignore_index)
    count = each.used.sum()
    correct, nll, brier, entropy, information = (
        values.sum(-1) / count
        for values in (each.correct, each.nll, each.brier, each.entropy, each.information)
    )
    ece = (each.gaps.sum(-1) / count).abs().sum(-1)
    scores = [s + each.poison for s in (correct, nll, brier, ece)]
    return EnsembleSummary(*(s[:M] for s in scores), *(s[M] for s in scores), entropy, information)


class ExampleScores(NamedTuple):
    """What each of N examples adds to a summary, 0 where it is ignored; the averaged probabilities
    come after the members."""

    used: Tensor  # [N] bool
    correct: Tensor  # [M + 1, N], as the next two
    nll: Tensor
    brier: Tensor
    gaps: Tensor  # [M + 1, bins, N], right - confidence in the bin of the confidence
    entropy: Tensor  # [N], of the averaged probabilities
    information: Tensor  # [N]
    poison: Tensor  # 0-dim: NaN where a target is out of range, else 0


def example_scores(logits: Tensor, targets: Tensor, bins: int, ignore_index: int) -> ExampleScores:
    """The definition of all that is summed, in plain PyTorch."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    M, _, C = x.shape
    used = targets != ignore_index
    bad = used & ((targets < 0) | (targets >= C))
    y = targets.masked_fill(~used | bad, 0)
    x = x.masked_fill(~used[:, None], 0.0)
    p = x.softmax(-1)
    mixed = p.mean(0, keepdim=True)
    ln_p, ln_mixed = _ln(p), _ln(mixed)
    entropy = -(mixed[0] * ln_mixed[0]).sum(-1)
    information = (p * (ln_p - ln_mixed)).sum(-1).mean(0)
    # From here on the averaged probabilities come after the members: [M + 1, N].
    ln_y = x.log_softmax(-1).gather(-1, y.expand(M, -1)[..., None])[..., 0]
    nll = -torch.cat([ln_y, ln_y.logsumexp(0, keepdim=True) - math.log(M)])
    p = torch.cat([p, mixed])
    label = torch.cat([x.argmax(-1), mixed.argmax(-1)])
    correct = (label == y).to(x.dtype)
    truth = y[:, None] == torch.arange(C, device=y.device)
    brier = (p - truth.to(x.dtype)).square().sum(-1)
    confidence = p.gather(-1, label[..., None])[..., 0]
    gaps = (correct - confidence)[:, None]  # [M + 1, 1, N]
    gaps = torch.where(_in_bins(confidence, bins), gaps, 0.0)
    values = (correct, nll, brier, gaps, entropy, information)
    poison = torch.where(bad.any(), float("nan"), 0.0)
    return ExampleScores(used, *(v.masked_fill(~used, 0.0) for v in values), poison)


def check(op: str, logits: Tensor, targets: Tensor, bins: int) -> None:
    """The rules for the arguments that cost no look at their values."""
    check_tensor(op, "logits", logits, "M, N, C", (None, None, None))
    M, N, C = logits.shape
    rule = "[M, N, C] with M and C at least 1"
    require(M > 0 and C > 0, op, "logits", rule, list(logits.shape))
    check_tensor(op, "targets", targets, "N", (N,), dtypes=(torch.int64,))
    on_device = f"on the device of logits, {logits.device}"
    require(targets.device == logits.device, op, "targets", on_device, str(targets.device))
    check_bins(op, bins)


def check_bins(op: str, bins: int) -> None:
    """ValueError unless a calibration histogram can have so many bins."""
    good = whole(bins, 1) and bins <= MOST_BINS
    require(good, op, "bins", f"an integer in [1, {MOST_BINS}]", bins)


def _ln(p: Tensor) -> Tensor:
    """ln p, finite at 0: 0 * ln 0 is then 0, with a gradient of 0."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _in_bins(confidence: Tensor, bins: int) -> Tensor:
    """[M, bins, N] of [M, N]: whether it is in (b / bins, (b + 1) / bins]; NaN in the last one."""
    inner = inner_edges(confidence, bins)[:, None]
    passed = (~(confidence[:, None] <= inner)).sum(1, keepdim=True)
    return passed == torch.arange(bins, device=confidence.device)[:, None]


def inner_edges(like: Tensor, bins: int) -> Tensor:
    """[bins - 1] of the dtype and device of `like`: b / bins, where two bins meet."""
    inner = torch.arange(1, bins, dtype=like.dtype, device=like.device)
    return inner / torch.full_like(inner, bins)  # rounded once; a Python divisor may be inverted


def _raises_here(targets: Tensor) -> bool:
    """Whether a target out of range is an error, rather than NaN in the result."""
    debug = os.environ.get("LANDSCAPE_FAST_DEBUG") == "1"
    return targets.device.type == "cpu" or (debug and targets.device.type == "cuda")


def check_range(op: str, targets: Tensor, C: int, ignore_index: int) -> None:
    """IndexError for the first target that is neither a class nor ignored, where one is raised."""
    if not _raises_here(targets) or torch.compiler.is_compiling():
        return
    bad = ((targets < 0) | (targets >= C)) & (targets != ignore_index)
    if bad.any():
        refuse(op, targets, C, ignore_index, int(bad.nonzero()[0, 0]))


def refuse(op: str, targets: Tensor, C: int, ignore_index: int, n: int) -> None:
    """The IndexError for example n."""
    rule = f"classes in [0, C) with C = {C}, or {ignore_index} to be ignored"
    got = f"{int(targets[n])} for example {n}"
    raise IndexError(message(op, "targets", rule, got))


def _summary(
    logits: Tensor, targets: Tensor, bins: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    outputs = _summary_fake(logits, targets, bins, ignore_index, backend)
    targets = targets.contiguous()
    about = (*logits_arguments(logits), targets.data_ptr(), bins, ignore_index)
    if backend == "cpp":
        pointers = [t.data_ptr() for t in outputs]
        n = _extension.C.ensemble_summary(*about, *pointers, 0, torch.get_num_threads())
        if n >= 0:
            refuse(OP, targets, logits.shape[2], ignore_index, n)
        return outputs
    bad = targets.new_empty(1)
    launch_cuda("ensemble_summary", logits, (*logits.shape, bins), about, (*outputs, bad, None))
    check_range(OP, targets, logits.shape[2], ignore_index)
    return outputs


def _summary_fake(
    logits: Tensor, targets: Tensor, bins: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    members = logits.new_empty((4, logits.shape[0]), dtype=torch.float32)
    return members, logits.new_empty(6, dtype=torch.float32)


_summary_op = define(
    "ensemble_summary(Tensor logits, Tensor targets, int bins, int ignore_index, str backend)"
    " -> (Tensor, Tensor)",
    _summary,
    _summary_fake,
)
