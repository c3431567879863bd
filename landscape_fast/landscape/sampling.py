"""Samples around a solution that are about as accurate as it: drawn, measured, kept or drawn again.

The samplers themselves are in `landscape_fast.landscape.samplers`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.landscape.samplers import SubspaceSampler
from landscape_fast.methods.seeds import stream_seed
from landscape_fast.methods.sweep import exact_accuracy, sweep
from landscape_fast.ops._checks import require, whole

# Numbers of the draws of one try: those of the next begin here, whatever the count.
DRAWS_PER_TRY = 2**20


class Accepted(NamedTuple):
    """The S samples that were accurate enough, in the order of their numbers; S may be 0.

    Attributes:
        weights: [S, P] on the device of the sampler.
        scale: [S] float64 on the CPU, with which each was drawn; so are the next three.
        accuracy: [S], fraction.
        sample: [S] int64, which of the samples asked for each one is.
        tries: [count] int64, how many draws each of the samples asked for took; all of those
            allowed where none of its draws was accepted.
        best: the highest accuracy among all draws, also those that were not accepted.
        logits: [S, N, C] on the CPU, or None where they were not asked for.
    """

    weights: Tensor
    scale: Tensor
    accuracy: Tensor
    sample: Tensor
    tries: Tensor
    best: float
    logits: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether there are any."""
        return len(self.scale) > 0


@torch.no_grad()
def sample_accepted(
    model: nn.Module,
    sampler: SubspaceSampler,
    count: int,
    x: Tensor,
    y: Tensor,
    *,
    threshold: float,
    scales: float | tuple[float, float] | Tensor,
    tries: int = 5,
    seed: int = 0,
    statistics: str = "recalibrate",
    calibration: Tensor | None = None,
    batch_size: int = 1000,
    per_pass: int | str = "auto",
    keep_logits: bool = False,
    all_needed: bool = False,
    progress: bool = True,
) -> Accepted:
    """Draws samples around a solution and keeps those whose accuracy reaches a threshold.

    Sample i is drawn up to `tries` times, each time with another scale and another direction, until
    one reaches the threshold. All that are still wanted are drawn and measured together.

    Args:
        model: the architecture, with the buffers, settings and device; see
            `landscape_fast.methods.sweep`.
        sampler: for instance `RandomDirections`, made for this architecture.
        count: how many samples are wanted.
        x: [N, ...] rows to measure the accuracy on. Held-out ones: samples are chosen by them.
        y: [N] int64 classes.
        threshold: accuracy in [0, 1] from which a draw is accepted; the paper has .65 or .7 for
            solutions of .71, and 0 accepts everything.
        scales: one number for all; (low, high), from which every draw takes its own, uniformly; or
            [count], one for each sample.
        tries: the most draws of one sample.
        seed: of directions and scales. Sample i depends on it and on i alone, not on `count` or
            `per_pass`.
        statistics: of batch norms, as in `sweep`, which measures; so are the next three.
        calibration: rows for statistics="recalibrate".
        batch_size: the most rows of one model in one pass.
        per_pass: how many models go through the network together.
        keep_logits: also return what the accepted samples predict for x.
        all_needed: raise rather than return fewer than `count`.
        progress: show a progress bar for every round of draws.

    Returns:
        `Accepted`. Where nothing was accepted it is empty (and false), with `best` to compare the
        threshold with: a range of scales that is too wide is an outcome, not an error.

    Raises:
        ValueError: if an argument breaks its rule, or with `all_needed` if a sample is missing.

    Cost: as many passes over x as there are draws, at most count * tries; the weights of the
        accepted samples are drawn once more.

    Source: Fort et al. 2019 (arXiv:1912.02757), section 5, and the authors' code.

    Example:
        >>> from landscape_fast.landscape import RandomDirections
        >>> from landscape_fast.nn import FlatLayout
        >>> model, x = nn.Linear(4, 3), torch.randn(50, 4)
        >>> y, layout = model(x).argmax(1), FlatLayout(model)
        >>> around = RandomDirections(layout.flatten(model), layout)
        >>> options = {"threshold": 0.8, "scales": (0.0, 0.5), "progress": False}
        >>> found = sample_accepted(model, around, 6, x, y, **options)
        >>> found.weights.shape == (len(found.scale), layout.P)
        True
        >>> bool((found.accuracy >= 0.8).all())
        True
    """
    op = "sample_accepted"
    good = whole(count, 1) and count <= DRAWS_PER_TRY
    require(good, op, "count", f"an integer in [1, {DRAWS_PER_TRY}]", repr(count))
    require(whole(tries, 1) and tries < 4096, op, "tries", "an integer in [1, 4095]", repr(tries))
    require(whole(seed, 0), op, "seed", "an integer of at least 0", repr(seed))
    require(0 <= threshold <= 1, op, "threshold", "a fraction in [0, 1]", threshold)
    scale_of = _scale_of(op, scales, count, seed)
    options = {"statistics": statistics, "calibration": calibration, "batch_size": batch_size}
    options |= {"per_pass": per_pass, "keep_logits": keep_logits, "progress": progress}
    wanted, taken, best = list(range(count)), torch.full((count,), tries), 0.0
    kept: dict[int, tuple] = {}  # sample to (try, scale, accuracy, logits)
    for attempt in range(tries):
        drawn = torch.tensor([scale_of(i, attempt) for i in wanted], dtype=torch.float64)
        rows = _rows(sampler, seed, wanted, attempt, drawn)
        label = f"samples, try {attempt + 1} of {tries}"
        found = sweep(model, rows, len(wanted), x, y, label=label, **options)
        accuracy = exact_accuracy(found.accuracy, len(y))
        best = max(best, float(accuracy.max()))
        for place in (accuracy >= threshold).nonzero()[:, 0].tolist():
            logits = found.logits[place] if keep_logits else None
            kept[wanted[place]] = (attempt, drawn[place], accuracy[place], logits)
            taken[wanted[place]] = attempt + 1
        wanted = [i for i in wanted if i not in kept]
        if not wanted:
            break
    logits = found.logits[:0] if keep_logits else None
    if all_needed and wanted:
        remedy = f"the best draw has {best:.4g}: lower it, or draw with smaller scales"
        rule = f"reached by all {count} samples within {tries} tries"
        require(False, op, "threshold", rule, f"{len(kept)} at {threshold:.4g}", remedy)
    return _collected(sampler, seed, kept, taken, best, logits)


class ScaleFound(NamedTuple):
    """How far from a solution samples keep an accuracy.

    Attributes:
        scale: the largest one found at which they do; the lower end of the range where none does.
        accuracy: mean over the samples at that scale, fraction.
        reached: whether it is at least the threshold.
    """

    scale: float
    accuracy: float
    reached: bool


@torch.no_grad()
def scale_for_accuracy(
    model: nn.Module,
    sampler: SubspaceSampler,
    x: Tensor,
    y: Tensor,
    *,
    threshold: float,
    scales: tuple[float, float],
    samples: int = 5,
    steps: int = 8,
    seed: int = 0,
    **options: Any,
) -> ScaleFound:
    """The scale at which a sampler's samples are, in the mean, just accurate enough.

    How different samples are grows with how bad they may be, so that methods should be compared at
    one accuracy. The range is halved `steps` times, with the same random numbers for every scale.

    Args:
        model: as in `sample_accepted`; so are `sampler`, `x` and `y`.
        sampler: for instance `DiagonalGaussian`.
        x: [N, ...] rows to measure the accuracy on.
        y: [N] int64 classes.
        threshold: the accuracy to keep, a fraction.
        scales: (low, high), where to look.
        samples: how many samples the mean is of.
        steps: of halving: the scale is found to (high - low) / 2^steps.
        seed: of the samples.
        options: those of `landscape_fast.methods.sweep`.

    Returns:
        `ScaleFound`; `high` where even there the samples are accurate enough.

    Raises:
        ValueError: if an argument breaks its rule.

    Cost: at most (steps + 2) * samples passes over x.

    Example:
        >>> from landscape_fast.landscape import WeightDropout
        >>> from landscape_fast.nn import FlatLayout
        >>> model, x = nn.Linear(4, 3), torch.randn(50, 4)
        >>> y, around = model(x).argmax(1), WeightDropout(FlatLayout(model).flatten(model))
        >>> options = {"threshold": 0.8, "scales": (0.0, 0.9), "progress": False}
        >>> scale_for_accuracy(model, around, x, y, **options).reached
        True
    """
    op = "scale_for_accuracy"
    good = len(scales) == 2 and 0 <= scales[0] < scales[1] < math.inf
    require(good, op, "scales", "(low, high) with 0 <= low < high", scales)
    require(0 <= threshold <= 1, op, "threshold", "a fraction in [0, 1]", threshold)
    require(whole(samples, 1), op, "samples", "an integer of at least 1", repr(samples))
    require(whole(steps, 0), op, "steps", "an integer of at least 0", repr(steps))

    def mean(scale: float) -> float:
        def rows(start: int, stop: int) -> Tensor:
            return sampler.draw(stop - start, scale, seed, first=start)

        label = f"samples at scale {scale:.3g}"
        found = sweep(model, rows, samples, x, y, label=label, **options)
        return float(exact_accuracy(found.accuracy.double().mean(), samples * len(y)))

    low, high = map(float, scales)
    at_high = mean(high)
    if at_high >= threshold:
        return ScaleFound(high, at_high, True)
    accuracy = mean(low)
    if not accuracy >= threshold:
        return ScaleFound(low, accuracy, False)
    for _ in range(steps):
        middle = (low + high) / 2
        at_middle = mean(middle)
        if at_middle >= threshold:
            low, accuracy = middle, at_middle
        else:
            high = middle
    return ScaleFound(low, accuracy, True)


def _collected(sampler, seed, kept, taken, best, no_logits) -> Accepted:
    """What is kept, in order; `no_logits` [0, N, C] says whether logits are."""
    order = sorted(kept)
    if not order:
        weights, nothing = sampler.draw(1, 0.0, seed)[:0], torch.zeros(0, dtype=torch.float64)
        return Accepted(weights, nothing, nothing, nothing.long(), taken, best, no_logits)
    attempts, scale, accuracy, logits = zip(*(kept[i] for i in order), strict=True)
    weights = torch.cat(
        [_one(sampler, seed, i, a, s) for i, a, s in zip(order, attempts, scale, strict=True)]
    )
    scale, accuracy = torch.stack(scale), torch.stack(accuracy)
    logits = None if no_logits is None else torch.stack(logits)
    return Accepted(weights, scale, accuracy, torch.tensor(order), taken, best, logits)


def _rows(sampler, seed, wanted, attempt, scale):
    """What `sweep` takes: the weights of the samples that are still wanted."""

    def rows(start: int, stop: int) -> Tensor:
        if wanted[stop - 1] - wanted[start] == stop - 1 - start:  # neighbours: one draw
            first = attempt * DRAWS_PER_TRY + wanted[start]
            return sampler.draw(stop - start, scale[start:stop], seed, first=first)
        places = range(start, stop)
        return torch.cat([_one(sampler, seed, wanted[p], attempt, scale[p]) for p in places])

    return rows


def _one(sampler, seed, sample, attempt, scale) -> Tensor:
    return sampler.draw(1, scale, seed, first=attempt * DRAWS_PER_TRY + sample)


def _scale_of(op, scales, count, seed):
    """Function of (sample, attempt)."""
    if isinstance(scales, Tensor):
        require(scales.shape == (count,), op, "scales", f"[{count}]", list(scales.shape))
        each = scales.double().tolist()
        return lambda sample, attempt: each[sample]
    if isinstance(scales, int | float):
        return lambda sample, attempt: float(scales)
    good = isinstance(scales, tuple) and len(scales) == 2
    good = good and 0 <= scales[0] <= scales[1] < math.inf
    require(good, op, "scales", "a number, [count] or (low, high) with 0 <= low <= high", scales)
    low, high = scales

    def uniform(sample: int, attempt: int) -> float:
        own = torch.Generator().manual_seed(stream_seed(seed, sample, "posterior", attempt))
        return low + (high - low) * float(torch.rand((), generator=own, dtype=torch.float64))

    return uniform
