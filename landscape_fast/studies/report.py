"""The result of a comparison as a table, JSON, CSV and figures; all show the same rows."""

import csv
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import landscape_fast
from landscape_fast.data import Dataset
from landscape_fast.landscape.diversity import diversity_points
from landscape_fast.methods import TrainConfig
from landscape_fast.metrics.diversity import diagnose
from landscape_fast.metrics.reliability import reliability_bins
from landscape_fast.studies.compare import Problem, Result

# key of a row, heading, how the table shows it; JSON and CSV hold the plain numbers
COLUMNS = (
    ("method", "method", "{}"),
    ("members", "members", "{}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("member_accuracy", "mean member", "{:.2%}"),
    ("nll", "NLL (nats)", "{:.4f}"),
    ("brier", "Brier", "{:.4f}"),
    ("ece", "ECE", "{:.2%}"),
    ("disagreement", "disagreement", "{:.2%}"),
    ("js", "JS (nats)", "{:.5f}"),
    ("parameters", "parameters", "{:,}"),
    ("seconds", "seconds", "{:.1f}"),
)


def headline(document: dict[str, Any]) -> str:
    """One line: which data, network and training."""
    data, training = document["data"], document["training"]
    return (
        f"{data['name']}: {data['train_rows']:,} training and {data['test_rows']:,} test rows; "
        f"{document['problem']['model']}, {training['optimizer']} lr {training['lr']:g} "
        f"{training['schedule']}, {training['epochs']} epochs of batches of "
        f"{training['batch_size']}, seed {training['seed']}, {document['versions']['device']}"
    )


def format_table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple] = COLUMNS) -> str:
    """The rows as aligned text with one heading line; a dash where a value does not exist."""
    cells = [[heading for _, heading, _ in columns]]
    for row in rows:
        cells.append(
            ["-" if row[key] is None else form.format(row[key]) for key, _, form in columns]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV with a heading line of keys; an empty cell where a value does not exist."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_json(document: dict[str, Any]) -> str:
    """Strict JSON: what is not a finite number becomes null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def describe_run(
    dataset: Dataset, problem: Problem, config: TrainConfig, device: str
) -> dict[str, Any]:
    """What was run, and on what: the part that the documents of all commands share."""
    return {
        "data": {
            "name": dataset.name,
            "classes": list(dataset.classes),
            "train_rows": len(dataset.train_y),
            "test_rows": len(dataset.test_y),
        },
        "problem": asdict(problem),
        "training": asdict(config),
        "versions": {
            "landscape_fast": landscape_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": device,
            "threads": torch.get_num_threads(),
        },
    }


def make_document(
    results: dict[str, Result], dataset: Dataset, problem: Problem, config: TrainConfig, device: str
) -> dict[str, Any]:
    """Everything the study found, and from what, as numbers, strings, lists and dictionaries."""
    return {
        **describe_run(dataset, problem, config, device),
        "rows": [result.row for result in results.values()],
        "notes": make_notes(results, dataset, config),
        "pairs": {
            method: {
                "disagreement": result.pairs.disagreement.tolist(),
                "js": result.pairs.js.tolist(),
            }
            for method, result in results.items()
            if len(result.logits) > 1
        },
        "diversity": {
            method: diagnose(result.logits, dataset.test_y).numbers()
            for method, result in results.items()
            if len(result.logits) > 1
        },
        "histories": {method: result.histories for method, result in results.items()},
    }


def accuracy_note(rows: int, best: float) -> str:
    """What a difference in accuracy must exceed to mean something."""
    error = math.sqrt(best * (1 - best) / rows)
    return f"{rows:,} test rows: the standard error of an accuracy of {best:.2%} is {error:.2%}"


def make_notes(results: dict[str, Result], dataset: Dataset, config: TrainConfig) -> list[str]:
    """What to know when reading the table, in sentences; how the members differ among them."""
    rows, best = len(dataset.test_y), max(r.row["accuracy"] for r in results.values())
    lines = [accuracy_note(rows, best)]
    if "single" in results and "deep" in results:
        lines.append("single: the first member of deep, trained once and counted in both rows")
    if "batch" in results:
        members, size = results["batch"].row["members"], config.batch_size
        own = config.member_batches == "own"
        of = f"{size:,} training rows for each member" if own else f"{size:,} training rows"
        lines.append(f"batch: a step takes {of} and computes {members * size:,}")
    for method, result in results.items():
        if len(result.logits) > 1:
            found = diagnose(result.logits, dataset.test_y)
            lines += [f"{method}: {line}" for line in found.lines]
    return lines


def write_results(directory: Path, document: dict[str, Any]) -> list[Path]:
    """Writes results.json (everything) and results.csv (the rows); returns their paths."""
    texts = {"results.json": to_json(document), "results.csv": to_csv(document["rows"])}
    return write_texts(directory, texts)


def write_texts(directory: Path, texts: Mapping[str, str]) -> list[Path]:
    """Writes each text to the file of its name, which appears complete or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        temporary = directory / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / name)
    return [directory / name for name in texts]


def write_figures(directory: Path, results: dict[str, Result], dataset: Dataset) -> list[Path]:
    """Writes the figures as PNG and PDF and returns their paths.

    reliability always; heat_maps and accuracy_diversity where a method has several members.

    Raises:
        ImportError: without matplotlib.
    """
    from landscape_fast.landscape import plots

    targets, figures = dataset.test_y, {}
    several = {method: result for method, result in results.items() if len(result.logits) > 1}
    if several:
        maps = {
            method: {"disagreement": result.pairs.disagreement, "js": result.pairs.js}
            for method, result in several.items()
        }
        figures["heat_maps"] = plots.heat_maps(maps, f"{dataset.name}: how the members differ")
    figures["reliability"] = plots.reliability_diagram(
        {
            method: reliability_bins(result.logits.softmax(-1).mean(0), targets)
            for method, result in results.items()
        },
        f"{dataset.name}: is the confidence justified?",
    )
    if several:
        points = {}
        for method, result in several.items():
            labels = result.logits.argmax(-1)
            points[method] = diversity_points(labels[1:], labels[0], targets)
        figures["accuracy_diversity"] = plots.accuracy_diversity(
            points, len(dataset.classes), f"{dataset.name}: accuracy against diversity"
        )
    return save_figures(directory, figures)


def save_figures(
    directory: Path,
    figures: Mapping[str, Any],
    data: Mapping[str, Sequence[dict[str, Any]]] | None = None,
) -> list[Path]:
    """Writes each matplotlib figure as PNG and as PDF, and what it shows as CSV beside them.

    Args:
        directory: made if it does not exist.
        figures: name of the files to the figure.
        data: name to the rows of its CSV; without any, the rows that the figure carries in its
            attribute `rows`, as the docstrings of `landscape_fast.landscape` say of theirs. A
            figure with neither has no CSV.

    Returns:
        The paths: name.png, name.pdf and, where there are rows, name.csv of one figure after the
        other. Files hold no times: a figure that is drawn again has the same bytes.
    """
    import matplotlib

    directory.mkdir(parents=True, exist_ok=True)
    paths, options = [], {"png": {"dpi": 150}, "pdf": {"metadata": {"CreationDate": None}}}
    for name, figure in figures.items():
        for suffix, option in options.items():
            path, temporary = directory / f"{name}.{suffix}", directory / f".{name}.tmp"
            with matplotlib.rc_context({"pdf.fonttype": 42}):  # letters stay text in the PDF
                figure.savefig(temporary, format=suffix, **option)
            os.replace(temporary, path)
            paths.append(path)
        rows = (data or {}).get(name) or getattr(figure, "rows", None)
        if rows:
            paths += write_texts(directory, {f"{name}.csv": to_csv(rows)})
    return paths


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
