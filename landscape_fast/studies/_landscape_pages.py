"""A landscape report as text: one page of HTML, and Markdown with the same sections."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landscape_fast.studies import _landscape_tables as tables
from landscape_fast.studies._landscape_parts import Part
from landscape_fast.studies._page import PageFigure, PageTable, Section, write_page
from landscape_fast.studies.report import headline

# Of every section: figures with their captions, and tables with their columns and captions.
_FIGURES = {
    "weights and functions": {
        "similarity": "Cosines of the weights and disagreement of the labels, for every two "
        "checkpoints. Lines separate the runs.",
        "functions": "t-SNE of the probabilities that checkpoints predict: one path for each run. "
        "Distances in such a map say little; the ratio below it is that of the probabilities.",
        "samples": "The same with accepted samples around every solution.",
    },
    "diversity": {
        "diversity": "Samples around one solution (its accuracy is that of the green star) and the "
        "other runs (red stars): disagreement with the solution, divided by the error.",
    },
    "ensembles": {
        "sizes": "Scores of ensembles: means over all subsets of the runs, whose probabilities are "
        "averaged; bars are standard deviations over the subsets.",
    },
    "corruption": {
        "corruption": "Scores on corrupted test images by severity, means over the corruptions; "
        "every method has equally many networks, but for the original, which is one.",
    },
    "images from elsewhere": {
        "elsewhere": "Divergence on images that belong to no class, and how well the entropy of "
        "the mean prediction tells them from test images.",
    },
    "planes and paths": {
        "plane": "The plane through the origin of weight space and two solutions: loss, accuracy, "
        "and agreement with each; lines are the trajectories of training.",
        "starts": "Loss and accuracy along the straight line from the weights before training to "
        "those after it.",
        "curvature_1": "Largest eigenvalue and trace of the Hessian along a straight line.",
        "curvature_2": "The same along another line.",
    },
}
_TABLES = {
    "diversity": {
        "samples": (tables.SAMPLES, "Accepted samples."),
        "diversity": (tables.FITS, "The fitted family, and diversity divided by the error."),
    },
    "ensembles": {"ensembles": (tables.VARIANTS, "Scores by size.")},
    "corruption": {"corruption": (tables.SHIFTED, "Means over the corruptions.")},
    "images from elsewhere": {"elsewhere": (tables.FOREIGN, "Means over the runs.")},
}


def counted(rows: Sequence[dict[str, Any]]) -> str:
    """How many claims hold, fail, or are open, in a sentence."""
    passed, failed = (sum(row["verdict"] == v for row in rows) for v in ("pass", "fail"))
    rest = len(rows) - passed - failed
    told = "claim holds" if passed == len(rows) == 1 else "claims hold"
    fail, are = ("fails" if failed == 1 else "fail"), ("is" if rest == 1 else "are")
    return f"{passed} of {len(rows)} {told}, {failed} {fail}, {rest} {are} inconclusive"


def _shown(heading: str, more: Sequence[Part]) -> tuple[dict[str, str], dict[str, tuple]]:
    """Captions of the figures of a section, and columns and captions of its tables."""
    for part in more:
        if part.heading == heading:
            captions = {name: caption for name, (_, caption) in part.figures.items()}
            return captions, {name: given[1:] for name, given in part.tables.items()}
    return _FIGURES[heading], _TABLES.get(heading, {})


def page(out: Path, document: dict[str, Any], more: Sequence[Part] = ()) -> Path:
    """Writes index.html."""
    name = document["data"]["name"]
    sections = [Section("Overview", text=[headline(document), *_sentences(document["notes"])])]
    for heading, rows in document["claims"].items():
        figures, listed = _shown(heading, more)
        sections.append(
            Section(
                heading.capitalize(),
                claims=rows,
                figures=[
                    _figure(out, document["figures"][figure], caption)
                    for figure, caption in figures.items()
                    if figure in document["figures"]
                ],
                tables=[
                    PageTable(document["tables"][table], columns, caption)
                    for table, (columns, caption) in listed.items()
                    if table in document["tables"]
                ],
            )
        )
    keys = ("data", "problem", "training", "settings", "runs", "versions", "seconds")
    about = {key: document[key] for key in keys}
    sections.append(Section("What was run", settings=about))
    return write_page(out / "index.html", f"Landscape of {name}", sections)


def _figure(out: Path, files: Sequence[str], caption: str) -> PageFigure:
    paths = [out / file for file in files]
    return PageFigure(paths[0], caption, files=paths[1:])


def _sentences(notes: Sequence[str]) -> list[str]:
    return [f"{note[:1].upper()}{note[1:]}." for note in notes]


def markdown(document: dict[str, Any], more: Sequence[Part] = ()) -> str:
    """results.md: the same sections, with tables of text and linked figures."""
    name = document["data"]["name"]
    lines = [f"# Landscape of {name}", "", headline(document), ""]
    lines += [f"- {note}" for note in document["notes"]]
    rows = [row for part in document["claims"].values() for row in part]
    lines += ["", counted(rows) + ".", ""]
    for heading, claims in document["claims"].items():
        figures, listed = _shown(heading, more)
        lines += [f"## {heading.capitalize()}", "", *_table(claims, tables.CLAIMS), ""]
        lines += [
            f"{row['number']}: {row['reason']}." for row in claims if row["reason"]
        ]  # fmt: skip
        for figure, caption in figures.items():
            if figure in document["figures"]:
                lines += ["", f"![{caption}]({document['figures'][figure][0]})", "", caption]
        for table, (columns, caption) in listed.items():
            if table in document["tables"]:
                lines += ["", caption, "", *_table(document["tables"][table], columns)]
        lines.append("")
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple]) -> list[str]:
    """Lines of a Markdown table."""
    heads = [heading for _, heading, _ in columns]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = ["-" if row[key] is None else form.format(row[key]) for key, _, form in columns]
        shown = " | ".join(cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| {shown} |")
    return lines
