"""Lines, curves and simplexes of networks, trained in one run, against networks trained alone.

Everything is trained with the same settings and measured on the same test rows: single networks
and pairs of them, what lies halfway between two, lines (one coefficient per step, or one per layer;
with and without the penalty on the cosine), Bezier curves, simplexes, SWA with both rates, label
smoothing, dropout, and a single network and a layer-wise line on noisy labels. Batch norms get
their statistics anew at every point of a subspace and for SWA; networks that were trained alone
keep those of their training.

Source: Wortsman et al. 2021 (arXiv:2102.10472).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from landscape_fast.data import Dataset, cifar10, digits
from landscape_fast.methods import TrainConfig
from landscape_fast.ops._checks import require
from landscape_fast.studies._criteria import CRITERIA, criterion
from landscape_fast.studies._folds import as_text, means, with_errors
from landscape_fast.studies._wortsman_runs import Lab, Settings
from landscape_fast.studies.report import (
    accuracy_note,
    format_table,
    save_figures,
    to_csv,
    write_results,
    write_texts,
)

__all__ = ["SIZES", "Settings", "describe", "run"]

RECIPE = TrainConfig(
    epochs=160,
    batch_size=128,
    optimizer="sgd",
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="cosine",
    warmup_epochs=5,
    augment="crop_flip",
)
SMALL = Settings(
    data="digits",
    train_rows=600,
    blocks=1,
    training=replace(RECIPE, epochs=40, batch_size=50, warmup_epochs=3, augment="none"),
    seeds=3,
)
SIZES = {
    "tiny": replace(
        SMALL,
        train_rows=100,
        test_rows=200,
        training=replace(SMALL.training, epochs=5, warmup_epochs=1),
        seeds=1,
        corners=(3,),
        positions=5,
        order=2,
        cycles=1,
    ),
    "small": SMALL,
    "full": Settings(data="cifar10", training=replace(RECIPE, epochs=40)),
}
COLUMNS = (
    ("network", "network", "{}"),
    ("members", "members", "{}"),
    ("accuracy", "accuracy", "{}"),
    ("nll", "NLL (nats)", "{}"),
    ("brier", "Brier", "{}"),
    ("ece", "ECE", "{}"),
    ("seconds", "seconds", "{:.0f}"),
)
_FORMS = {"accuracy": "{:.2%}", "nll": "{:.4f}", "brier": "{:.4f}", "ece": "{:.2%}"}
_PATHS = ("line", "layer-wise line", "Bezier curve")


def run(
    size: str = "small",
    out: Path | None = None,
    seed: int = 0,
    *,
    root: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains and measures everything.

    Args:
        size: "tiny" (seconds), "small" (minutes on a CPU; both on digits) or "full" (cResNet20 on
            CIFAR-10, 40 epochs; for a GPU).
        out: folder for results.json, results.csv (means), runs.csv (every seed), paths.csv,
            triangle.csv, criteria.csv, the figures if matplotlib is there, and checkpoints, from
            which a run that was interrupted goes on. None writes nothing.
        seed: the first of the seeds.
        root: folder of the CIFAR-10 files, for "full".
        device: where to train; None for a GPU where there is one.
        progress: show progress.

    Returns:
        A document: rows (means over the seeds, with standard errors), runs, paths, triangle,
        criteria, notes, settings. `describe` makes text of it.

    Raises:
        ValueError: for an unknown size, or "full" without `root`.
        ImportError: without scikit-learn, for digits.
    """
    known = tuple(SIZES)
    require(size in known, "wortsman2021.run", "size", f"one of {known}", repr(size))
    settings = SIZES[size]
    dataset = load(settings, root)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    labs = []
    for offset in range(settings.seeds):
        config = replace(settings.training, seed=seed + offset)
        folder = None if out is None else Path(out) / "checkpoints" / f"seed-{config.seed}"
        labs.append(Lab(dataset, settings, config, device, folder, progress).everything())
    runs = [row for lab in labs for row in lab.rows]
    document = {
        "study": "wortsman2021",
        "size": size,
        "seed": seed,
        "settings": asdict(settings),
        "data": {"train": len(dataset.train_y), "test": len(dataset.test_y)},
        "rows": summarise(runs),
        "runs": runs,
        "paths": mean_rows([lab.paths for lab in labs]),
        "triangle": mean_rows([lab.triangle for lab in labs]),
        "facts": [lab.facts for lab in labs],
        "versions": {
            "torch": torch.__version__,
            "device": device,
            "threads": torch.get_num_threads(),
        },
    }
    best = max(row["accuracy"] for row in document["rows"])
    document["criteria"] = judge(labs)
    document["notes"] = [
        f"mean over {settings.seeds} seeds and its standard error; {len(dataset.train_y):,} "
        "training rows; seconds: training of one seed",
        accuracy_note(len(dataset.test_y), best),
        "a criterion passes if it holds for every seed that can tell, and fails if for none",
        *told(labs),
    ]
    if out is not None:
        write(Path(out), document)
    return document


def told(labs: Sequence[Lab]) -> list[str]:
    """Notes on what the table has no row for, as means over the seeds."""

    def mean(name: str) -> float:
        return sum(lab.facts[name] for lab in labs) / len(labs)

    cosines = [mean(f"{name}: cos2") for name in ("line", "line without beta")]
    apart = [mean(f"{name}: ends disagree") for name in ("line", "line without beta")]
    epochs = [mean(f"noisy: {which} epoch") for which in ("best", "last")]
    return [
        "ends of the line: squared cosine {:.2g}, without beta {:.2g}".format(*cosines),
        "ends of the line: disagree on {:.1%} of the rows, without beta {:.1%}".format(*apart),
        "single network on noisy labels: {:.2%} in its best epoch, {:.2%} in its last".format(
            *epochs
        ),
    ]


def load(settings: Settings, root: str | Path | None) -> Dataset:
    """The rows of the study, standardised."""
    if settings.data == "cifar10":
        remedy = "give the folder of the CIFAR-10 files"
        require(root is not None, "wortsman2021.run", "root", "a folder", None, remedy)
        given = cifar10(root).take(settings.train_rows, settings.test_rows)
        return given.standardized()
    given, rows = digits(), settings.train_rows
    x = torch.cat([given.train_x[:rows], given.test_x, given.train_x[rows:]])
    y = torch.cat([given.train_y[:rows], given.test_y, given.train_y[rows:]])
    cut = slice(rows, None if settings.test_rows is None else rows + settings.test_rows)
    parts = (x[:rows], y[:rows], x[cut], y[cut])
    return Dataset(*parts, given.classes, given.name).standardized()


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per network: mean over the seeds and its standard error, under key and key_se."""
    rows = []
    for name in dict.fromkeys(run["network"] for run in runs):
        own = [run for run in runs if run["network"] == name]
        row = {"network": name, "members": own[0]["members"], **means(own, _FORMS)}
        rows.append(row | {"seconds": sum(run["seconds"] for run in own) / len(own)})
    return rows


def mean_rows(tables: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean over seeds of tables with the same rows; text and positions are the same in all."""
    rows = []
    for same in zip(*tables, strict=True):
        means = {k: sum(row[k] for row in same) / len(same) for k in same[0] if "accuracy" in k}
        rows.append({**same[0], **means})
    return rows


def judge(labs: Sequence[Lab]) -> list[dict[str, Any]]:
    """The criteria: what the article finds, as an ordering with a margin, decided in every seed."""
    of = [{row["network"]: row for row in lab.rows} for lab in labs]

    def each(high: str, low: str, key: str = "accuracy") -> list[float]:
        return [seed[high][key] - seed[low][key] for seed in of]

    def facts(name: str) -> list[float]:
        return [lab.facts[name] for lab in labs]

    points, found = "{:+.2%}", []
    for name in _PATHS:
        paths = [[row["accuracy"] for row in lab.paths if row["path"] == name] for lab in labs]
        middle = [seed[f"{name}, midpoint"]["accuracy"] for seed in of]
        above = [m - (p[0] + p[-1]) / 2 for m, p in zip(middle, paths, strict=True)]
        below = [m - min(p) for m, p in zip(middle, paths, strict=True)]
        pair = each(f"{name}, 0.2 and 0.8", f"{name}, midpoint")
        rest = [m - s for m, s in zip(middle, facts("standard"), strict=True)]
        found += [
            criterion("figures 3-5", f"{name}: midpoint above its ends by 0.5 points or more",
                      points, above, lambda v: v >= 0.005),
            criterion("figure 3", f"{name}: no point more than 3 points below the midpoint",
                      points, below, lambda v: v <= 0.03),
            criterion("figure 3", f"{name}: 0.2 and 0.8 together at least as good as the midpoint",
                      points, pair, lambda v: v >= 0),
            criterion("figure 3", f"{name}: midpoint at most 0.5 points below a single network",
                      points, rest, lambda v: v >= -0.005),
        ]  # fmt: skip
    halfway = [seed["halfway between two standard"]["accuracy"] for seed in of]
    rule = "halfway between two single networks: accuracy at most 30 %"
    found.append(criterion("figure 3", rule, "{:.2%}", halfway, lambda v: v <= 0.3))
    with_beta, without = facts("line: cos2"), facts("line without beta: cos2")
    rule, form = "line: squared cosine of its ends at most 0.01", "{:.2g}"
    found.append(criterion("equation 3", rule, form, with_beta, lambda v: v <= 0.01))
    gaps = [b - a for a, b in zip(with_beta, without, strict=True)]
    found.append(
        criterion("equation 3", "line: larger without beta", "{:+.2g}", gaps, lambda v: v > 0)
    )
    found += _simplexes(labs, each)
    for name in of[0]:
        if name in [f"{path}, midpoint" for path in _PATHS] or "simplex" in name:
            rule = f"{name}: ECE at most that of a single network"
            gaps = each(name, "standard", "ece")
            found.append(criterion("figure 5", rule, points, gaps, lambda v: v <= 0))
    best, last = facts("noisy: best epoch"), facts("noisy: last epoch")
    middle = [seed["layer-wise line, noisy labels, midpoint"]["accuracy"] for seed in of]
    over = [m - end if top - end >= 0.01 else None
            for m, top, end in zip(middle, best, last, strict=True)]  # fmt: skip
    rule = "noisy labels, where a single network over-fits by 1 point: layer-wise midpoint above it"
    found.append(criterion("figure 7", f"{rule} by 0.5", points, over, lambda v: v >= 0.005))
    return found


def _simplexes(labs: Sequence[Lab], each: Callable) -> list[dict[str, Any]]:
    def mean(lab: Lab, place: str) -> float:
        values = [row["accuracy"] for row in lab.triangle if row["place"] == place]
        return sum(values) / len(values)

    gaps = [mean(lab, "inside") - mean(lab, "outside") for lab in labs]
    rule = "triangle: inside better than outside by 3 points or more, on average"
    found = [criterion("figure 2", rule, "{:+.2%}", gaps, lambda v: v >= 0.03)]
    for name in dict.fromkeys(row["network"] for lab in labs for row in lab.rows):
        if name.startswith("simplex"):
            rule = f"{name}: within 1 point of the line's"
            gaps = each(name, "line, midpoint")
            found.append(criterion("figure 4", rule, "{:+.2%}", gaps, lambda v: abs(v) <= 0.01))
    return found


def describe(document: dict[str, Any]) -> str:
    """The table, the criteria and the notes as text."""
    table = as_text(
        [with_errors(row, _FORMS) for row in document["rows"]], COLUMNS, document["notes"]
    )
    return "\n\n".join([table, format_table(document["criteria"], CRITERIA)])


def write(out: Path, document: dict[str, Any]) -> None:
    """All files of the study; figures only where matplotlib is."""
    write_results(out, document)
    tables = ("runs", "paths", "triangle", "criteria")
    write_texts(out, {f"{name}.csv": to_csv(document[name]) for name in tables})
    try:
        save_figures(out, {name: draw() for name, draw in figures(document).items()})
    except ImportError:
        return  # matplotlib is an option


def figures(document: dict[str, Any]) -> dict[str, Callable]:
    """Name to a function that draws it: accuracy along the lines, and over the triangle."""
    from landscape_fast.landscape import path_plots

    panels = {"test accuracy (%)": {}, "of t and 1 - t together (%)": {}}
    for name in dict.fromkeys(row["path"] for row in document["paths"]):
        rows = [row for row in document["paths"] if row["path"] == name]
        t = [row["t"] for row in rows]
        for panel, key in zip(panels.values(), ("accuracy", "pair_accuracy"), strict=True):
            panel[name] = t, [100 * row[key] for row in rows]
    standard = [facts["standard"] for facts in document["facts"]]
    level = 100 * sum(standard) / len(standard)
    levels = dict.fromkeys(panels, level)
    title = f"{document['settings']['data']}: trained lines and curves"
    weights = [[row[c] for c in ("c1", "c2", "c3")] for row in document["triangle"]]
    values = [100 * row["accuracy"] for row in document["triangle"]]
    return {
        "paths": lambda: path_plots.path_panels(
            panels, "position t", title, levels, "standard network"
        ),
        "triangle": lambda: path_plots.simplex_heat_map(
            torch.tensor(weights),
            values,
            "test accuracy (%)",
            f"{document['settings']['data']}: a simplex of 3",
        ),
    }
