"""The claims of Fort et al. 2019 about one set of runs: criterion, what was found, verdict."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from landscape_fast.landscape import OodReport, SizeCurve, lower_limit, upper_limit
from landscape_fast.studies._criteria import criterion
from landscape_fast.studies._landscape_measure import Diversity, Likeness, clusters
from landscape_fast.studies._landscape_shift import SINGLE, Shift, mean_over_runs
from landscape_fast.studies._landscape_space import Radial, Starts

ORTHOGONAL, ALIGNED = 0.05, 0.95  # cosines across runs, and to the end of one run
APART = 1.5  # disagreement across runs by that within one
CLUSTERS = 1.4  # distance across runs by that within one
NEAR = 0.01  # loss of accuracy up to which the diversity of samples is compared
SHARE = 0.6  # of the diversity of independent runs, which samples then have at most
ABOVE, BELOW = 0.02, 0.03  # beyond the limits, for counting errors
FAMILY = 0.015  # root mean square distance to the fitted curve
GAIN = 0.015  # of accuracy, by an ensemble
LOST = 0.005  # of accuracy, which an ensemble of samples may be worse
AVERAGE = 0.01  # of accuracy, around that of a single network
MORE_DIVERSE = 1.5  # divergence of independent runs by that of samples
BRIER = 0.02  # less by an ensemble under shift
HALFWAY = 0.3  # accuracy between two optima, at their radius, at most
OWN_SIDE = 30.0  # degrees from an optimum up to which functions agree more with it
ONE_RUN = "needs two runs or more; this folder has one network"
NO_WAY = "needs checkpoints of the training: train with --keep-every"
NO_LATE = "needs two checkpoints or more of the second half of training: see train --keep-every"
CHANCE = "the solution is no more accurate than chance"


def claim(
    words: str,
    source: str,
    rule: str,
    form: str,
    values: Sequence[float | None] | None,
    holds: Callable[[float], bool],
    reason: str = "",
) -> dict[str, Any]:
    """A row of `criterion` with the claim in words, and why it cannot be decided if it cannot."""
    told = [v for v in values or [] if v is not None and math.isfinite(v)]
    row = criterion(source, rule, form, told, holds)
    return {"claim": words, **row, "reason": "" if told else reason}


def worst(values: Iterable[float]) -> list[float]:
    """The smallest alone, of a statement that has to hold for all of them; NaN if one is NaN."""
    values = list(values)
    return [math.nan if any(map(math.isnan, values)) else min(values)] if values else []


def judge_likeness(found: Likeness) -> list[dict[str, Any]]:
    """X1: what is within a run and what is across runs."""
    runs = torch.tensor(found.runs)
    R = int(runs.max()) + 1
    ends = torch.tensor([int((runs == r).nonzero()[-1]) for r in range(R)])
    pairs = torch.ones(R, R, dtype=torch.bool).triu(1)
    cosine = found.cosine[ends][:, ends][pairs].abs().max() if R > 1 else None
    late = [((runs == r) & found.late).nonzero()[:, 0] for r in range(R)]
    aligned = [found.cosine[ends[r], late[r]].min() for r in range(R) if len(late[r]) > 1]
    within = [found.disagreement[a][:, a].max() for a in late if len(a) > 1]
    across = [found.disagreement[a][:, b].min() for a, b in itertools.combinations(late, 2)]
    ratio = None
    if within and across:
        ratio = float(min(across)) / max(float(max(within)), 1e-12)
    far, near = clusters(found)
    why = ONE_RUN if R == 1 else NO_LATE
    return [
        claim(
            "independent runs end in weights that are orthogonal", "F2, Fig 3",
            f"largest |cosine| of two solutions at most {ORTHOGONAL}", "{:.4f}",
            [] if cosine is None else [float(cosine)], lambda v: v <= ORTHOGONAL, ONE_RUN,
        ),
        claim(
            "late checkpoints of a run point where its end points", "F2, Fig 2a",
            f"smallest cosine with the end, over the second half, at least {ALIGNED}", "{:.4f}",
            [float(a) for a in aligned], lambda v: v >= ALIGNED, NO_LATE,
        ),
        claim(
            "two runs disagree more than late checkpoints of one run", "F3, Fig 2b, 3",
            f"smallest disagreement across by largest within at least {APART}", "{:.2f}",
            [ratio], lambda v: v >= APART, why,
        ),
        claim(
            "runs are clusters in function space", "F4, Fig 2c",
            f"smallest distance across by largest within at least {CLUSTERS}", "{:.2f}",
            [far / near] if near > 0 else [], lambda v: v >= CLUSTERS, why,
        ),
    ]  # fmt: skip


def judge_diversity(found: Sequence[Diversity], classes: int) -> list[dict[str, Any]]:
    """X3: samples around a solution against independent runs; one value for each run."""
    ratios, excess, short, rmse = [], [], [], []
    for each in found:
        accuracy, away = (torch.cat([p[k] for p in each.points.values()]) for k in (1, 2))
        best, others = near_diversity(each, accuracy, away), run_diversity(each)
        told = len(best) and len(others) and float(others.mean()) > 0
        ratios.append(float(best.max() / others.mean()) if told else None)
        accuracy, away = (torch.cat(p) for p in zip((accuracy, away), each.optima, strict=True))
        excess.append(float((away - upper_limit(accuracy, each.accuracy, classes)).max()))
        able = classes * each.accuracy > 1  # the lower limit starts at chance
        least = lower_limit(accuracy, each.accuracy, classes) if able else None
        short.append(float((least - away).max()) if able else None)
        rmse.append(None if each.fit is None else each.fit.rmse)
    why = ONE_RUN if len(found) == 1 else f"no sample is within {NEAR:.0%} of its solution"
    return [
        claim(
            "samples around a solution are less diverse than independent runs", "F13, F14, Fig 6",
            f"most diverse sample within {NEAR:.0%} of the accuracy, by independent runs, at most "
            f"{SHARE}", "{:.2f}", ratios, lambda v: v <= SHARE, why,
        ),
        claim(
            "no function is more diverse than one of independent errors", "F15, Fig 6",
            f"disagreement above the upper limit by at most {ABOVE}", "{:+.3f}", excess,
            lambda v: v <= ABOVE,
        ),
        claim(
            "no function is less diverse than random changes of the reference", "F16, Fig 6",
            f"disagreement below the lower limit by at most {BELOW}", "{:+.3f}", short,
            lambda v: v <= BELOW, CHANCE,
        ),
        claim(
            "samples lie on a one-parameter family", "F17, Fig S6",
            f"root mean square distance to the fitted curve at most {FAMILY}", "{:.4f}", rmse,
            lambda v: v <= FAMILY, "no sample differs from its solution",
        ),
    ]  # fmt: skip


def near_diversity(found: Diversity, accuracy: Tensor, away: Tensor) -> Tensor:
    """Disagreement by error of the samples that lose at most NEAR, but for rounding."""
    kept = (accuracy >= found.accuracy - NEAR - 1e-9) & (accuracy < 1)
    return (away / (1 - accuracy))[kept]


def run_diversity(found: Diversity) -> Tensor:
    """Disagreement by error of the other runs."""
    return found.optima[1] / (1 - found.optima[0]).clamp(min=1e-12)


def judge_sizes(
    found: dict[str, SizeCurve], ways: Sequence[str], reasons: dict[str, str]
) -> list[dict[str, Any]]:
    """X4: what ensembles gain, alone and with samples around each of their networks."""
    plain = found["original"]
    k = min(4, len(plain.sizes))
    several = k > 1
    ends = float(plain.accuracy[k - 1] - plain.accuracy[0])
    brier = float(plain.brier.diff().max()) if several else None
    drawn = [w for w in ways if w in found]
    combined = {w: float(found[w].accuracy[k - 1] - plain.accuracy[k - 1]) for w in drawn}
    alone = [float(found[w].accuracy[0] - plain.accuracy[0]) for w in drawn]
    average = found.get("weight_average")
    moved = None if average is None else float(average.accuracy[0] - plain.accuracy[0])
    names, of = ", ".join(drawn) or "none", f"{k} networks" if several else "one network"
    return [
        claim(
            "an ensemble is more accurate than its members", "F18, Fig 8",
            f"{of} instead of one gain at least {100 * GAIN:g} points", "{:+.2%}",
            [ends] if several else [], lambda v: v >= GAIN, ONE_RUN,
        ),
        claim(
            "the Brier score falls with every network", "F18, F20, Fig 8",
            "largest change from one size to the next below 0", "{:+.4f}", [brier],
            lambda v: v < 0, ONE_RUN,
        ),
        claim(
            "samples around its networks do not harm an ensemble", "F18, Fig 8",
            f"{of} with samples ({names}) lose at most {100 * LOST:g} points", "{:+.2%}",
            worst(combined.values()), lambda v: v >= -LOST, _why(ways, reasons),
        ),
        claim(
            "an ensemble gains more than sampling around one solution", "F18, Fig 8",
            "gain of the ensemble less the best gain by samples above 0", "{:+.2%}",
            [ends - max(alone)] if several and alone else [], lambda v: v > 0,
            _why(ways, reasons) if several else ONE_RUN,
        ),
        claim(
            "averaging the last checkpoints stays at the same solution", "F19, Fig 8",
            f"accuracy within {100 * AVERAGE:g} point of the solutions", "{:+.2%}", [moved],
            lambda v: abs(v) <= AVERAGE, _left_out("diagonal", reasons),
        ),
    ]  # fmt: skip


def judge_shift(
    found: Shift | None, ways: Sequence[str], reasons: dict[str, str]
) -> list[dict[str, Any]]:
    """X5: divergence and Brier score under corruption; the value of the worst severity."""
    curves = {} if found is None else mean_over_runs(found.curves.curves)
    levels = [] if found is None else found.curves.severity.tolist()
    several = found is not None and found.curves.members > 1
    js = {way: scores["js"] for way, scores in curves.items()}
    around = [way for way in ways if way in js]
    ratio, grows, least, better = [], [], [], []
    if several:
        most = torch.stack([js[way] for way in around]).max(0).values if around else None
        ratio = [] if most is None else (js["independent"] / most.clamp(min=1e-12)).tolist()
        grows = js["independent"].diff().tolist()
        others = [way for way in around if way != "diagonal"]
        if "diagonal" in js and others:
            least = (torch.stack([js[w] for w in others]).min(0).values - js["diagonal"]).tolist()
        gap = (curves[SINGLE]["brier"] - curves["independent"]["brier"]).tolist()
        better = [g for g, level in zip(gap, levels, strict=True) if level >= 3]
    M = found.curves.members if several else 0
    left_out = [f"{way}: {_left_out(way, reasons)}" for way in ways if way not in js]
    no_other = "; ".join(left_out) if "diagonal" in js else _left_out("diagonal", reasons)
    return [
        claim(
            "under corruption independent runs diverge more than samples", "F22, Fig 9",
            f"JS by the largest of the samples at least {MORE_DIVERSE} at every severity from 0 on",
            "{:.2f}", worst(ratio), lambda v: v >= MORE_DIVERSE,
            "; ".join(left_out) if several else ONE_RUN,
        ),
        claim(
            "the divergence of independent runs grows with the corruption", "F22, Fig 9",
            "smallest change of JS from one severity to the next, from 0 on, above 0 (nats)",
            "{:+.3g}", worst(grows), lambda v: v > 0, ONE_RUN,
        ),
        claim(
            "samples of the diagonal Gaussian diverge least", "F22, Fig 9",
            "smallest JS of the other samples less its own above 0 at every severity from 0 on "
            "(nats)",
            "{:+.3g}", worst(least), lambda v: v > 0, no_other if several else ONE_RUN,
        ),
        claim(
            "ensembles are better under strong corruption", "F21, Fig 9",
            f"Brier score of {M or 'several'} networks lower by at least {BRIER} at severities "
            "from 3 on", "{:+.4f}", worst(better), lambda v: v >= BRIER,
            "no severity of 3 or more was measured" if several else ONE_RUN,
        ),
    ]  # fmt: skip


def judge_ood(found: OodReport | None, reasons: dict[str, str]) -> list[dict[str, Any]]:
    """X6: the order of divergences on images from elsewhere; the value of the worst set."""
    values = {"independent": [], "trajectory": []}
    several = found is not None and found.members > 1
    ways = mean_elsewhere(found, "js") if several else {}
    lower_end = next((w for w in ("trajectory", "diagonal") if w not in ways), "diagonal")
    if several:
        for upper, lower in (("independent", "trajectory"), ("trajectory", "diagonal")):
            if upper in ways and lower in ways:
                values[upper] = [ways[upper][s] - ways[lower][s] for s in ways[upper]]
    return [
        claim(
            "on foreign images independent runs diverge more than one trajectory", "F23, text",
            "JS less that of the last checkpoints of a run above 0 on every set (nats)", "{:+.3g}",
            worst(values["independent"]), lambda v: v > 0,
            _left_out("trajectory", reasons) if several else ONE_RUN,
        ),
        claim(
            "and a trajectory more than the diagonal Gaussian", "F23, text",
            "JS less that of the samples above 0 on every set (nats)", "{:+.3g}",
            worst(values["trajectory"]), lambda v: v > 0,
            _left_out(lower_end, reasons) if several else ONE_RUN,
        ),
    ]  # fmt: skip


def mean_elsewhere(found: OodReport, score: str) -> dict[str, dict[str, float]]:
    """Way to set of images to a score, mean over runs."""
    sets = next(iter(found.unknown.values()))
    each = {s: mean_over_runs({g: v[s] for g, v in found.unknown.items()}) for s in sets}
    return {way: {s: float(each[s][way][score]) for s in sets} for way in next(iter(each.values()))}


def judge_space(radial: Radial | None, starts: Starts | None, norms: Tensor):
    """X7 and F30: the plane between two solutions, norms, and the way from the start."""
    middle, same, sides = [], [], []
    if radial is not None:
        middle = [float(radial.arc.accuracy[len(radial.angle) // 2])]
        ends = radial.arc.agreement[0, -1], radial.arc.agreement[1, 0]
        same = [max(abs(float(e) - (1 - radial.disagreement)) for e in ends)]
        gap = radial.arc.agreement[0] - radial.arc.agreement[1]
        first, second = radial.angle < OWN_SIDE, radial.angle > radial.end - OWN_SIDE
        sides = [float(gap[first].min()), float(-gap[second].max())]
    grows = [] if norms.shape[1] < 2 else norms.diff(dim=1).min(1).values.tolist()
    rises = [] if starts is None else starts.loss.diff(dim=1).max(1).values.tolist()
    return [
        claim(
            "between two solutions, at their distance from the origin, accuracy is lost",
            "F11, Fig 5", f"accuracy halfway at most {HALFWAY:.0%}", "{:.1%}", middle,
            lambda v: v <= HALFWAY, ONE_RUN,
        ),
        claim(
            "agreement of the solutions is 1 - disagreement", "F3, F11, Fig 5",
            "difference, by rounding of the weights, at most 0.1% of the rows", "{:.2%}", same,
            lambda v: v <= 1e-3, ONE_RUN,
        ),
        claim(
            "functions near a solution agree with it rather than with the other", "F11, Fig 5",
            f"difference of the agreements above 0 up to {OWN_SIDE:.0f} degrees from each",
            "{:+.1%}", worst(sides), lambda v: v > 0, ONE_RUN,
        ),
        claim(
            "weights move away from the origin during training", "F11, Fig 5",
            "smallest change of the norm from one checkpoint to the next above 0", "{:+.3f}",
            grows, lambda v: v > 0, NO_WAY,
        ),
        claim(
            "the loss falls all along the straight line from the first weights to the last",
            "F30, text", "largest rise of the training loss from one point to the next at most 0 "
            "(nats)", "{:+.3g}", rises, lambda v: v <= 0, NO_WAY,
        ),
    ]  # fmt: skip


def _left_out(way: str, reasons: dict[str, str]) -> str:
    """Why a method is not among those that meet other images."""
    return reasons.get(way) or reasons.get(f"{way}, under shift") or NO_WAY


def _why(ways: Sequence[str], reasons: dict[str, str]) -> str:
    return "; ".join(f"{way}: {reasons[way]}" for way in ways if way in reasons) or ONE_RUN
