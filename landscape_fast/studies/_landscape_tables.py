"""The tables of a landscape report, as rows of plain numbers, and their text."""

from collections.abc import Sequence
from typing import Any

from landscape_fast.landscape import OodReport, SizeCurve
from landscape_fast.studies._landscape_claims import mean_elsewhere, near_diversity, run_diversity
from landscape_fast.studies._landscape_figures import mean_auroc
from landscape_fast.studies._landscape_measure import Diversity, Samples
from landscape_fast.studies._landscape_shift import Shift, mean_over_runs
from landscape_fast.studies._landscape_space import Curvature, Starts

CLAIMS = (
    ("number", "", "{}"),
    ("claim", "claim", "{}"),
    ("rule", "criterion", "{}"),
    ("found", "found", "{}"),
    ("verdict", "verdict", "{}"),
)
VARIANTS = (
    ("variant", "variant", "{}"),
    ("samples", "samples", "{}"),
    ("size", "networks", "{}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("nll", "NLL (nats)", "{:.4f}"),
    ("brier", "Brier", "{:.4f}"),
    ("ece", "ECE", "{:.2%}"),
)
SAMPLES = (
    ("way", "samples", "{}"),
    ("count", "around each run", "{}"),
    ("scale", "mean scale", "{:.4g}"),
    ("tries", "draws for one", "{:.2f}"),
)
FITS = (
    ("run", "run", "{}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("exponent", "exponent e", "{:.3g}"),
    ("rmse", "distance (rms)", "{:.4f}"),
    ("independent", "independent runs", "{:.3f}"),
    ("best", "best sample near", "{}"),
)
SHIFTED = (
    ("method", "method", "{}"),
    ("severity", "severity", "{}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("brier", "Brier", "{:.4f}"),
    ("nll", "NLL (nats)", "{:.4f}"),
    ("ece", "ECE", "{:.2%}"),
    ("js", "JS (nats)", "{:.4f}"),
)
FOREIGN = (
    ("method", "method", "{}"),
    ("data", "images", "{}"),
    ("js", "JS (nats)", "{:.4f}"),
    ("entropy", "entropy (nats)", "{:.4f}"),
    ("auroc", "AUROC of the entropy", "{:.4f}"),
    ("auroc_mi", "of the mutual information", "{:.4f}"),
)


def variant_rows(found: dict[str, SizeCurve], samples: dict[str, Samples]) -> list[dict[str, Any]]:
    """Scores of every variant at every size."""
    rows = []
    for variant, curve in found.items():
        count = samples[variant].logits.shape[1] if variant in samples else 1
        for k, size in enumerate(curve.sizes.tolist()):
            row = {"variant": variant, "samples": count, "size": size}
            row |= {"subsets": int(curve.subsets[k])}
            row |= {key: float(getattr(curve, key)[k]) for key in ("accuracy", "nll", "brier",
                    "ece", "accuracy_std", "nll_std", "brier_std", "ece_std")}  # fmt: skip
            rows.append(row)
    return rows


def sample_rows(found: dict[str, Samples]) -> list[dict[str, Any]]:
    """How the accepted samples were drawn."""
    return [
        {"way": way, "count": each.logits.shape[1], "scale": sum(each.scale) / len(each.scale),
         "tries": each.tries}
        for way, each in found.items()
    ]  # fmt: skip


def fit_rows(found: Sequence[Diversity]) -> list[dict[str, Any]]:
    """The fitted family of every run, and the most diverse sample of each way that is accurate."""
    rows = []
    for each in found:
        others = run_diversity(each)
        best = []
        for way, (_, accuracy, away) in each.points.items():
            near = near_diversity(each, accuracy, away)
            if len(near):
                best.append(f"{way} {float(near.max()):.2f}")
        rows.append({
            "run": each.run,
            "accuracy": each.accuracy,
            "exponent": None if each.fit is None else each.fit.exponent,
            "rmse": None if each.fit is None else each.fit.rmse,
            "independent": float(others.mean()) if len(others) else None,
            "best": ", ".join(best) or None,
        })  # fmt: skip
    return rows


def shift_rows(found: Shift) -> list[dict[str, Any]]:
    """Every method at every severity, mean over corruptions and runs."""
    levels = found.curves.severity.tolist()
    return [
        {"method": way, "severity": level, **{key: float(t[k]) for key, t in scores.items()}}
        for way, scores in mean_over_runs(found.curves.curves).items()
        for k, level in enumerate(levels)
    ]


def each_shift_rows(found: Shift) -> list[dict[str, Any]]:
    """Every method on every corruption by itself."""
    return [
        {"method": way, "corruption": name, "severity": severity,
         **{key: float(t[k]) for key, t in scores.items()}}
        for way, scores in mean_over_runs(found.curves.each).items()
        for k, (name, severity) in enumerate(found.curves.shifts)
    ]  # fmt: skip


def foreign_rows(found: OodReport) -> list[dict[str, Any]]:
    """Every method on every set of images, mean over runs; first the known images."""
    known = mean_over_runs(found.known)
    auroc, by_information = mean_auroc(found), mean_auroc(found, "mutual_information")
    rows = [
        {"method": way, "data": "test images", "js": float(t["js"]), "entropy": float(t["entropy"]),
         "auroc": None, "auroc_mi": None}
        for way, t in known.items()
    ]  # fmt: skip
    js, entropy = (mean_elsewhere(found, score) for score in ("js", "entropy"))
    return rows + [
        {"method": way, "data": s, "js": js[way][s], "entropy": entropy[way][s],
         "auroc": auroc[way][s], "auroc_mi": by_information[way][s]}
        for way, sets in js.items()
        for s in sets
    ]  # fmt: skip


def start_rows(found: Starts) -> list[dict[str, Any]]:
    """Loss and accuracy along the lines from the start."""
    return [
        {"run": r, "t": float(t), "loss": float(found.loss[r, k]),
         "accuracy": float(found.accuracy[r, k])}
        for r in range(len(found.loss))
        for k, t in enumerate(found.t)
    ]  # fmt: skip


def curvature_rows(found: Curvature) -> list[dict[str, Any]]:
    """Largest eigenvalue and trace along the lines."""
    return [
        {"line": line, "t": float(t), "top": float(found.top[line][k]),
         "trace": float(found.trace[line][k]), "trace_se": float(found.trace_se[line][k])}
        for line in found.top
        for k, t in enumerate(found.t)
    ]  # fmt: skip
