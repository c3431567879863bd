"""What a landscape report measures on the test rows: likeness, samples, diversity, sizes."""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.landscape import (
    FamilyFit,
    SizeCurve,
    cluster_distances,
    diversity_points,
    fit_correlated_family,
    function_distances,
    similarity,
    size_curves,
    tsne,
)
from landscape_fast.studies._landscape_bench import WAYS, Bench

PLANE_REACH = 0.5  # of the way from the solution's accuracy to chance, that the samples go down
SHOWN = 5  # samples of each way and run in the map of functions


class Likeness(NamedTuple):
    """How alike the checkpoints are; S of them, run after run.

    Attributes:
        runs: [S], numbers of the runs.
        epochs: [S].
        late: [S] bool, those of the second half of training.
        cosine: [S, S] of the weights.
        disagreement: [S, S], fraction of the rows.
        distances: [S, S], of the probabilities of all rows as one vector.
        points: [S, 2], t-SNE of the checkpoints, or None where there are too few.
        norms: [R, T], of the weights.
    """

    runs: list[int]
    epochs: list[int]
    late: Tensor
    cosine: Tensor
    disagreement: Tensor
    distances: Tensor
    points: Tensor | None
    norms: Tensor


def measure_likeness(bench: Bench) -> tuple[Likeness, Tensor]:
    """Likeness of all kept checkpoints, and their logits [S, N, C] on the rows of it."""
    R, T = bench.checkpoints.shape[:2]
    weights = bench.checkpoints.flatten(0, 1)
    rows = bench.test.first(bench.settings.function_rows)
    logits = bench.logits(weights, rows, "checkpoints")
    found = similarity(weights, logits)
    apart = function_distances(logits)
    late = torch.zeros(R, T, dtype=torch.bool)
    late[:, bench.late(0.5)] = True
    return Likeness(
        [r for r in range(R) for _ in range(T)],
        list(bench.epochs) * R,
        late.flatten(),
        found.cosine,
        found.disagreement,
        apart,
        tsne(logits, seed=bench.settings.seed, distances=apart) if len(logits) >= 4 else None,
        weights.double().norm(dim=1).view(R, T),
    ), logits


class Samples(NamedTuple):
    """Accepted samples of one way around every run.

    Attributes:
        weights: [R, S, P], equally many around each.
        logits: [R, S, N, C] on the test rows.
        scale: [R], mean of the accepted.
        tries: mean draws of a sample.
    """

    weights: Tensor
    logits: Tensor
    scale: list[float]
    tries: float


def draw_samples(bench: Bench) -> tuple[dict[str, Samples], dict[str, str]]:
    """Accepted samples of every way, and why there are none of the others."""
    found: dict[str, Samples] = {}
    reasons: dict[str, str] = {}
    for way in (*WAYS, "random_low_rank"):
        accepted = []
        for r in range(bench.R):
            if way == "random_low_rank":
                around = found["random"].weights[r] if "random" in found else []
                sampler = bench.low_rank(around) if len(around) >= 2 else None
            else:
                sampler = bench.sampler(way, r)
            if sampler is None:
                reasons[way] = (
                    "too few random samples were accepted" if way == "random_low_rank"
                    else "needs at least two checkpoints kept in the last "
                    f"{bench.settings.late_share:.0%} of training: see train --keep-every"
                )  # fmt: skip
                break
            accepted.append(bench.accepted(sampler, way, r, bench.settings.samples))
            if not accepted[-1]:
                reasons[way] = (
                    f"no sample around run {r} was accurate enough on the validation rows; the "
                    f"best had {accepted[-1].best:.2%}"
                )
                break
        if way in reasons:
            continue
        S = min(len(each.scale) for each in accepted)
        weights = torch.stack([each.weights[:S] for each in accepted])
        logits = bench.logits(weights.flatten(0, 1), bench.test, f"samples of {way}")
        tries = float(torch.stack([each.tries for each in accepted]).double().mean())
        scale = [float(each.scale.mean()) for each in accepted]
        found[way] = Samples(weights, logits.unflatten(0, (bench.R, S)), scale, tries)
    return found, reasons


def map_samples(
    bench: Bench, checkpoints: Tensor, samples: dict[str, Samples]
) -> tuple[Tensor, dict[str, tuple[Tensor, list[int]]]] | None:
    """t-SNE of checkpoints and samples together: places of the checkpoints, and of each way's.

    Args:
        checkpoints: their logits on the rows of likeness.
    """
    count = min(len(bench.test.y), bench.settings.function_rows)
    rows = torch.linspace(0, len(bench.test.y) - 1, count).round().long()
    shown = {w: samples[w].logits[:, :SHOWN, rows] for w in WAYS if w in samples}  # [R, S, n, C]
    if not shown:
        return None
    parts = [checkpoints, *(t.flatten(0, 1) for t in shown.values())]
    first, *others = tsne(torch.cat(parts), seed=bench.settings.seed).split([*map(len, parts)])
    return first, {
        way: (where, [r for r in range(bench.R) for _ in range(t.shape[1])])
        for (way, t), where in zip(shown.items(), others, strict=True)
    }


class Diversity(NamedTuple):
    """The plane of accuracy and diversity around one run; the reference is its solution.

    Attributes:
        run: number of the run.
        accuracy: of the reference.
        points: way to (scale [S], accuracy [S], disagreement with the reference [S]).
        optima: (accuracy [R - 1], disagreement [R - 1]) of the other runs.
        fit: of the correlated family to all points, or None where nothing differs.
    """

    run: int
    accuracy: float
    points: dict[str, tuple[Tensor, Tensor, Tensor]]
    optima: tuple[Tensor, Tensor]
    fit: FamilyFit | None


def measure_diversity(bench: Bench) -> list[Diversity]:
    """The plane around every run, over scales down to where accuracy is half lost."""
    targets, labels = bench.test.y.cpu(), bench.solutions.argmax(-1)
    found = []
    for r in range(bench.R):
        base = float(bench.accuracy[r])
        points = {}
        for way in WAYS:
            sampler = bench.sampler(way, r)
            if sampler is None:
                continue
            start = float(bench.validation_accuracy[r])
            least = start - PLANE_REACH * (start - 1 / bench.classes)
            top = bench.scale_at(sampler, way, r, least)
            grid = torch.arange(1, bench.settings.scales + 1, dtype=torch.float64)
            scale = (top / bench.settings.scales * grid).repeat_interleave(bench.settings.per_scale)
            points[way] = _at_scales(bench, sampler, scale, labels[r], f"plane of {way} {r}")
        others = [j for j in range(bench.R) if j != r]
        optima = (torch.zeros(0), torch.zeros(0))
        if others:
            apart = diversity_points(labels[others], labels[r], targets)
            optima = (apart.accuracy, apart.disagreement)
        accuracy, away = (torch.cat([p[k] for p in points.values()]) for k in (1, 2))
        fits = bool((away > 0).any())
        fit = fit_correlated_family(accuracy, away, base, bench.classes) if fits else None
        found.append(Diversity(r, base, points, optima, fit))
    return found


def _at_scales(bench: Bench, sampler, scale: Tensor, base: Tensor, label: str):
    def part(start: int, stop: int) -> Tensor:
        seed = bench.settings.seed + 1  # other samples than those that scales were chosen by
        return sampler.draw(stop - start, scale[start:stop], seed, first=start)

    rows = bench.test
    labels = bench.sweep(part, len(scale), rows, label, keep_labels=True).labels
    apart = diversity_points(labels.long(), base, rows.y.cpu())
    return scale, apart.accuracy, apart.disagreement


def measure_sizes(bench: Bench, samples: dict[str, Samples]) -> dict[str, SizeCurve]:
    """Scores of ensembles of every size, of the solutions and of all that is around them."""
    variants = {"original": bench.solutions[:, None]}
    averages = weight_averages(bench)
    if averages is not None:
        variants["weight_average"] = bench.logits(averages, bench.test, "weight averages")[:, None]
    variants |= {way: each.logits for way, each in samples.items()}
    return size_curves(variants, bench.test.y.cpu())


def weight_averages(bench: Bench) -> Tensor | None:
    """[R, P], mean of the late checkpoints of every run; None where fewer than two were kept."""
    late = [bench.late_weights(r) for r in range(bench.R)]
    if len(late[0]) < 2:
        return None
    return torch.stack([each.double().mean(0).to(each.dtype) for each in late])


def clusters(likeness: Likeness) -> tuple[float, float]:
    """The smallest distance of late checkpoints across runs, the largest within one; or NaN."""
    runs = torch.tensor(likeness.runs)
    found = cluster_distances(likeness.distances, runs, likeness.late)
    return float(found.across), float(found.within)
