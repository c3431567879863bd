"""Results of several methods on several folds: means, standard errors, verdicts, files."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from landscape_fast.studies.report import format_table, to_csv, write_results, write_texts

COLUMNS = (
    ("method", "method", "{}"),
    ("members", "networks", "{:.1f}"),
    ("accuracy", "accuracy", "{}"),
    ("nll", "NLL (nats)", "{}"),
    ("brier", "Brier", "{}"),
    ("ece", "ECE", "{}"),
    ("disagreement", "disagreement", "{}"),
    ("nll_to_deep", "NLL - deep", "{}"),
    ("seconds", "seconds", "{:.0f}"),
)
_FORMS = {"accuracy": "{:.2%}", "nll": "{:.4f}", "brier": "{:.4f}", "ece": "{:.2%}",
          "disagreement": "{:.2%}", "nll_to_deep": "{:+.4f}"}  # fmt: skip

# Two-sided 95 % of Student's t, by degrees of freedom.
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: means over the folds, and their standard errors under key_se."""
    deep, rows = [run["nll"] for run in runs if run["method"] == "deep"], []
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        row = {"method": method, "members": sum(run["members"] for run in own) / len(own)}
        row |= means(own, ("accuracy", "nll", "brier", "ece", "member_nll", "disagreement"))
        differences = [run["nll"] - other for run, other in zip(own, deep, strict=True)]
        row["nll_to_deep"], row["nll_to_deep_se"] = mean_se(differences)
        row["parameters"] = sum(run["parameters"] for run in own) / len(own)
        row["seconds"] = sum(run["seconds"] for run in own)
        rows.append(row)
    return rows


def mean_se(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None for a value that a method does not always have."""
    if any(value is None for value in values):
        return None, None
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def means(rows: Sequence[dict[str, Any]], keys: Iterable[str]) -> dict[str, float | None]:
    """The mean of each key over the rows and its standard error, under key and key_se."""
    found = {}
    for key in keys:
        found[key], found[f"{key}_se"] = mean_se([row[key] for row in rows])
    return found


def make_notes(runs: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What the numbers mean, and for each of `pairs` whether its first method beats its second."""
    folds = len({run["fold"] for run in runs})
    notes = [
        f"mean over {folds} folds, each with its own training, and the standard error of that "
        "mean; the folds share training rows, so it is a little too small",
        "NLL - deep: mean difference on the same folds; seconds: training over all folds, with the "
        "searches",
        f"verdicts: at 95 % of Student's t, {_t95(folds):.2f} standard errors",
    ]
    values = {(run["method"], run["fold"]): run for run in runs}
    for name, other in pairs:
        said = []
        for key, form in (("nll", "{:.4f}"), ("accuracy", "{:.2%}")):
            gaps = [values[name, f][key] - values[other, f][key] for f in range(folds)]
            mean, error = mean_se(gaps)
            clear = error is not None and abs(mean) > _t95(folds) * error
            better = (mean < 0) == (key == "nll")
            verdict = ("better" if better else "worse") if clear else "no clear difference"
            number = form.replace(":", ":+").format(mean)
            said.append(f"{key.upper() if key == 'nll' else key} {number} ± "
                        f"{form.format(error or 0.0)} ({verdict})")  # fmt: skip
        notes.append(f"{name} against {other}: {', '.join(said)}")
    return notes


def _t95(folds: int) -> float:
    return _T95.get(folds - 1, 2.0)


def with_errors(row: dict[str, Any], forms: Mapping[str, str] = _FORMS) -> dict[str, Any]:
    """The row with `mean ± standard error` in place of the numbers that have a form."""
    shown = dict(row)
    for key, form in forms.items():
        value, error = row[key], row[f"{key}_se"]
        text = None if value is None else form.format(value)
        shown[key] = text if error is None else f"{text} ± {form.replace('+', '').format(error)}"
    return shown


def write(directory: Path, document: dict[str, Any]) -> None:
    """results.json and .csv (the rows), runs.csv, trials.csv, results.md (what `markdown` says)."""
    write_results(directory, document)
    tables = {f"{name}.csv": to_csv(document[name]) for name in ("runs", "trials")}
    write_texts(directory, {**tables, "results.md": markdown(document)})


def describe(document: dict[str, Any]) -> str:
    """The table and the notes as text."""
    return as_text(map(with_errors, document["rows"]), COLUMNS, document["notes"])


def as_text(rows: Iterable[dict[str, Any]], columns: Sequence[tuple], notes: Sequence[str]) -> str:
    """A table of rows `with_errors`, and notes below it."""
    return "\n".join([format_table(list(rows), columns), "", *(f"- {note}" for note in notes)])


def markdown(document: dict[str, Any]) -> str:
    """The table and the notes in Markdown."""
    lines = [[heading for _, heading, _ in COLUMNS], ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    for row in map(with_errors, document["rows"]):
        lines.append(
            ["-" if row[key] is None else form.format(row[key]) for key, _, form in COLUMNS]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([table, "", *(f"- {note}" for note in document["notes"]), ""])
