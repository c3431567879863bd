"""Tables, criteria and files of the study of Garipov et al. 2018."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landscape_fast.studies._criteria import CRITERIA, criterion
from landscape_fast.studies._folds import means, with_errors
from landscape_fast.studies.report import (
    format_table,
    save_figures,
    to_csv,
    write_results,
    write_texts,
)

METHODS = (
    ("method", "method", "{}"),
    ("budget", "budget", "{}B"),
    ("members", "networks", "{}"),
    ("error", "test error", "{}"),
    ("nll", "NLL (nats)", "{}"),
    ("brier", "Brier", "{}"),
    ("member_error", "mean network", "{}"),
    ("seconds", "seconds", "{:.1f}"),
)
PATHS = (
    ("path", "path", "{}"),
    ("train_loss_end", "loss at ends", "{}"),
    ("train_loss_max", "largest", "{}"),
    ("barrier", "barrier", "{}"),
    ("error_end", "error at ends", "{}"),
    ("error_max", "largest", "{}"),
    ("gain_0.5", "pair at 1/2", "{}"),
    ("gain_1", "pair of ends", "{}"),
    ("agreement_middle", "middle agrees", "{}"),
    ("length", "length", "{}"),
)
_FORMS = {"error": "{:.2%}", "nll": "{:.4f}", "brier": "{:.4f}", "member_error": "{:.2%}",
          "train_loss_end": "{:.3f}", "train_loss_max": "{:.3f}", "barrier": "{:.3f}",
          "error_end": "{:.2%}", "error_max": "{:.2%}", "gain_0.5": "{:.2%}", "gain_1": "{:.2%}",
          "agreement_middle": "{:.2%}", "length": "{:.1f}"}  # fmt: skip


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and budget: means over the repeats, their standard errors as key_se."""
    rows = []
    for method, budget in dict.fromkeys((run["method"], run["budget"]) for run in runs):
        own = [run for run in runs if (run["method"], run["budget"]) == (method, budget)]
        row = {"method": method, "budget": budget, "members": own[0]["members"]}
        row |= means(own, ("error", "nll", "brier", "ece", "member_error"))
        rows.append(row | {"seconds": sum(run["seconds"] for run in own) / len(own)})
    return rows


def _mean_paths(paths: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(path["path"] for path in paths):
        own = [path for path in paths if path["path"] == name]
        rows.append({"path": name} | means(own, [key for key, _, _ in PATHS[1:]]))
    return rows


def judge(
    settings: Any, runs: Sequence[dict[str, Any]], paths: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The criteria: what has to hold, what was found, and pass, fail or inconclusive."""
    repeats = range(settings.repeats)
    path = [{p["path"]: p for p in paths if p["repeat"] == r} for r in repeats]
    error = [
        {m["method"]: m["error"] for m in runs if (m["repeat"], m["budget"]) == (r, 1)}
        for r in repeats
    ]
    least, gain = settings.barrier, settings.gain
    line = [p["line"]["barrier"] for p in path]
    rule = f"the straight line has a barrier of {least} nats or more"
    found = [criterion("G4", rule, "{:.3f}", line, lambda v: v >= least)]
    for kind in ("bezier", "polychain"):
        own = [p[kind] for p in path]
        part = [p["barrier"] / b if b >= least else None for p, b in zip(own, line, strict=True)]
        lost = [p["error_max"] - p["error_end"] for p in own]
        near = [p["agreement_middle"] - p["agreement_ends"] for p in own]
        found += [
            criterion(
                "G4, G5", f"{kind}: barrier at most 15 % of that", "{:.2%}", part,
                lambda v: v <= 0.15,
            ),
            criterion(
                "G9", f"{kind}: error at most 4 points above its ends", "{:+.2%}", lost,
                lambda v: v <= 0.04,
            ),
            criterion(
                "Fort", f"{kind}: its middle agrees with an end at most 5 points more than they do",
                "{:+.2%}", near, lambda v: v <= 0.05,
            ),
        ]  # fmt: skip
    higher = [p["bezier"]["train_loss_max"] - p["polychain"]["train_loss_max"] for p in path]
    rule = "largest loss of the bezier at most 0.1 nats above that of the polychain"
    found.append(criterion("README", rule, "{:+.3f}", higher, lambda v: v <= 0.1))
    best = [p["bezier"]["gain_1"] for p in path]
    rule = f"the ensemble of both ends is better by {gain:.1%} or more"
    found.append(criterion("G10", rule, "{:+.2%}", best, lambda v: v >= gain))
    for t, rule, holds in (
        (0.5, "phi(0) and phi(1/2) gain half of that or more", lambda v: v >= 0.5),
        (0.05, "phi(0) and phi(1/20) gain less than 30 % of that", lambda v: v < 0.3),
    ):
        gains = zip((p["bezier"][f"gain_{t:g}"] for p in path), best, strict=True)
        part = [own / most if most >= gain else None for own, most in gains]
        found.append(criterion("G10", rule, "{:.0%}", part, holds))
    for other, margin, rule in (
        ("Ind", -0.003, "FGE better than Ind by 0.3 points or more, at 1B"),
        ("SSE", 0.003, "FGE at most 0.3 points worse than SSE, at 1B"),
    ):
        gaps = [e["FGE"] - e[other] for e in error]
        found.append(criterion("G14", rule, "{:+.2%}", gaps, lambda v, m=margin: v <= m))
    return found


def describe(document: dict[str, Any]) -> str:
    """The tables and the notes as text."""
    parts = [format_table(rows, columns) for rows, columns in _tables(document)]
    notes = "\n".join(f"- {note}" for note in document["notes"])
    return "\n\n".join([*parts, notes])


def _tables(document: dict[str, Any]):
    methods = {key: form for key, form in _FORMS.items() if key in document["rows"][0]}
    paths = _mean_paths(document["paths"])
    forms = {key: form for key, form in _FORMS.items() if key in paths[0]}
    yield [with_errors(row, forms) for row in paths], PATHS
    yield [with_errors(row, methods) for row in document["rows"]], METHODS
    yield document["criteria"], CRITERIA


def write(directory: Path, document: dict[str, Any]) -> None:
    """results.json and .csv (methods), the other tables as CSV, results.md, paths.png."""
    write_results(directory, document)
    texts = {f"{name}.csv": to_csv(document[name])
             for name in ("paths", "points", "criteria", "runs")}  # fmt: skip
    texts["results.md"] = _markdown(document)
    write_texts(directory, texts)
    try:
        save_figures(directory, {"paths": _figure(document)})
    except ImportError:
        return  # matplotlib is an option


def _markdown(document: dict[str, Any]) -> str:
    lines = []
    for rows, columns in _tables(document):
        lines.append([heading for _, heading, _ in columns])
        lines.append(["---"] * len(columns))
        for row in rows:
            lines.append(["-" if row[key] is None else form.format(row[key])
                          for key, _, form in columns])  # fmt: skip
        lines.append([])
    text = "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)
    return "\n".join([text, *(f"- {note}" for note in document["notes"]), ""])


def _figure(document: dict[str, Any]):
    """Loss, error, and error of the pairs along the paths of the first repeat."""
    from landscape_fast.landscape.path_plots import path_panels

    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for key, label, factor in (
        ("train_loss", "training loss (nats)", 1),
        ("test_error", "test error (%)", 100),
        ("pair_error", "error of the ensemble\nof t = 0 and t (%)", 100),
    ):
        panels[label] = {}
        for name in dict.fromkeys(point["path"] for point in document["points"]):
            own = [p for p in document["points"] if p["path"] == name and p["repeat"] == 0]
            panels[label][name] = [p["t"] for p in own], [factor * p[key] for p in own]
    data = document["settings"]["data"]
    return path_panels(panels, title=f"{data}: paths between two networks")
