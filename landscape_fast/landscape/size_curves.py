"""What ensembles of every size are worth, whatever their members are.

Source: Fort et al. 2019 (arXiv:1912.02757), figure 8.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.metrics import SummaryAccumulator
from landscape_fast.ops._checks import check_tensor, require, whole

SUBSETS = 20_000  # the most of one variant
WAITING_BYTES = 1 << 26  # log probabilities of subsets that are scored together


class SizeCurve(NamedTuple):
    """Scores of ensembles by size, [K] each, on the CPU; float64.

    Attributes:
        sizes: int64, how many solutions are averaged.
        subsets: int64, how many subsets have that size: R choose size.
        accuracy: fraction, mean over the subsets; so are the next three.
        nll: nats.
        brier: in [0, 2].
        ece: fraction, 15 bins.
        accuracy_std: standard deviation over the subsets (0 for one); so are the last three.
            Subsets share members: it is no standard error.
        nll_std: of `nll`.
        brier_std: of `brier`.
        ece_std: of `ece`.
    """

    sizes: Tensor
    subsets: Tensor
    accuracy: Tensor
    nll: Tensor
    brier: Tensor
    ece: Tensor
    accuracy_std: Tensor
    nll_std: Tensor
    brier_std: Tensor
    ece_std: Tensor


@torch.no_grad()
def size_curves(
    logits: Mapping[str, Tensor],
    targets: Tensor,
    sizes: Sequence[int] | None = None,
) -> dict[str, SizeCurve]:
    """Scores of ensembles of every size, as means over all subsets of the solutions.

    An ensemble averages the probabilities of all samples of all of its solutions. With one sample
    of each it is a deep ensemble; with S samples around each solution it is what combines ensembles
    with subspace sampling; with one solution and S samples, sampling alone.

    Args:
        logits: for every variant [R, S, N, C]: R independent solutions, S samples around each
            (S = 1 for the solutions themselves or their weight averages).
        targets: [N] int64 classes.
        sizes: which sizes, from 1 to R, ascending; None for all. A variant with fewer solutions
            leaves out those above its own R.

    Returns:
        Variant to `SizeCurve`, in the order given.

    Raises:
        TypeError: if a value is no tensor.
        ValueError: if shapes or sizes do not fit, or there are more than 20,000 subsets.
        IndexError: if a target is out of range, as in `ops.ensemble_summary`.

    Cost: 2 * S * R * N * C exponentials; then, for every subset, one addition to a smaller one (of
        probabilities, in logarithms, so that none underflows) and one `summary_sums`: with R
        solutions and all sizes (2^R - 1) * N * C of each. No network is evaluated.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure 8 and section 5.

    Example:
        >>> p = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.7, 0.3], [0.2, 0.8]]])
        >>> curve = size_curves({"deep": p.log()[:, None]}, torch.tensor([0, 1]))["deep"]
        >>> curve.sizes.tolist(), curve.subsets.tolist()
        ([1, 2], [2, 1])
        >>> curve.accuracy.tolist(), curve.accuracy_std.tolist()
        ([0.75, 1.0], [0.25, 0.0])
    """
    op = "size_curves"
    require(len(logits) >= 1, op, "logits", "a mapping with at least one variant", "none")
    wanted = {}
    for name, values in logits.items():
        argument = f"logits[{name!r}]"
        check_tensor(op, argument, values, "R, S, N, C", (None, None, len(targets), None))
        rule = "[R, S, N, C], none of them 0"
        require(min(values.shape) >= 1, op, argument, rule, list(values.shape))
        wanted[name] = _wanted(op, sizes, values.shape[0], name)
    return {name: _curve(values, targets, wanted[name]) for name, values in logits.items()}


def _wanted(op: str, sizes: Sequence[int] | None, R: int, name: str) -> list[int]:
    if sizes is None:
        sizes = range(1, R + 1)
    sizes = list(sizes)
    good = sizes and all(whole(k, 1) for k in sizes) and sizes == sorted(set(sizes))
    require(bool(good), op, "sizes", "None or ascending integers of at least 1", sizes)
    own = [k for k in sizes if k <= R]
    require(bool(own), op, "sizes", f"at most R = {R} somewhere, as {name!r} has it", sizes)
    count = sum(math.comb(R, k) for k in own)
    remedy = "name fewer sizes, or give fewer solutions"
    rule = f"sizes with at most {SUBSETS} subsets of R = {R}"
    require(count <= SUBSETS, op, "sizes", rule, f"{count} subsets", remedy)
    return own


def _curve(logits: Tensor, targets: Tensor, sizes: list[int]) -> SizeCurve:
    R, S, N, C = logits.shape
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # means over samples, but for a constant, which changes no probability: [R, N, C]
    solutions = torch.stack([_log_sum(w) for w in wide])
    scores: dict[int, list[Tensor]] = {size: [] for size in sizes}
    waiting: list[tuple[int, Tensor]] = []
    most = max(1, WAITING_BYTES // (N * C * wide.element_size()))

    def score() -> None:
        summary = SummaryAccumulator()  # in float64, with exact numbers of right answers
        summary.update(torch.stack([t for _, t in waiting]), targets.to(wide.device))
        found = torch.stack(summary.compute()[:4], 1).cpu()  # of the members
        for (size, _), row in zip(waiting, found, strict=True):
            scores[size].append(row)
        waiting.clear()

    for size, sums in _subsets(solutions, sizes):
        waiting.append((size, sums))
        if len(waiting) >= most:
            score()
    if waiting:
        score()
    rows = [torch.stack(scores[size]) for size in sizes]  # [subsets, 4], as SizeCurve orders them
    mean = torch.stack([r.mean(0) for r in rows], 1)
    std = torch.stack([r.std(0, correction=0) for r in rows], 1)
    counts = torch.tensor([len(r) for r in rows])
    return SizeCurve(torch.tensor(sizes), counts, *mean, *std)


def _log_sum(logits: Tensor) -> Tensor:
    """[S, N, C] -> [N, C], logarithms of the summed probabilities.

    Along classes that lie next to each other a softmax takes a CPU ten times as long.
    """
    by_class = logits.transpose(1, 2).contiguous()
    return by_class.log_softmax(1).logsumexp(0).T.contiguous()


def _subsets(solutions: Tensor, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Log sums of the probabilities of every subset of a wanted size, each from a smaller one."""
    R = len(solutions)

    def grow(start: int, size: int, sums: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        for i in range(start, R):
            if not any(size < k <= size + R - i for k in sizes):
                return  # too few are left for the smallest wanted size
            own = solutions[i] if sums is None else torch.logaddexp(sums, solutions[i])
            if size + 1 in sizes:
                yield size + 1, own
            yield from grow(i + 1, size + 1, own)

    return grow(0, 0, None)
