"""One page of HTML that holds a whole report: verdicts, claims, figures, tables, settings."""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from landscape_fast.ops._checks import require
from landscape_fast.studies._page_style import STYLE
from landscape_fast.studies.report import write_texts

VERDICTS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
_CLAIMS = (
    ("number", "no."),
    ("claim", "claim"),
    ("source", "source"),
    ("found", "found"),
    ("rule", "criterion"),
    ("verdict", "verdict"),
)
_IMAGES = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        path: PNG or SVG file, put into the page itself.
        caption: what it shows, below it.
        alt: what it shows, in words for those who do not see it; the caption if empty.
        files: further files, linked below it, for instance the PDF and the CSV.
    """

    path: Path
    caption: str
    alt: str = ""
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class PageTable:
    """A table of the page.

    Attributes:
        rows: dictionaries; None and absent keys are shown as a dash.
        columns: (key, heading, format) of each column, as of `report.COLUMNS`; the keys of the
            first row as they are if empty.
        caption: above it.
    """

    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[tuple[str, str, str]] = ()
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page, in this order.

    Attributes:
        heading: of the section; sections have different ones.
        text: paragraphs.
        claims: rows of `_criteria.criterion`: source, rule, found, verdict, and if there are any
            "number", "claim" (in words) and "reason" (why nothing can be said).
        figures: of the section.
        tables: of the section.
        settings: name to value, nested as one likes: what was run, on what, with which versions.
    """

    heading: str
    text: Sequence[str] = ()
    claims: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[PageFigure] = ()
    tables: Sequence[PageTable] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes one HTML file that needs no other: images inside, no scripts, nothing from a network.

    Args:
        path: of the page. Links to `PageFigure.files` are relative to its folder.
        title: of the page.
        sections: in their order; the verdicts of all their claims are counted at the top.

    Returns:
        The path. The file appears complete or not at all, with the same bytes for the same
        arguments.

    Raises:
        ValueError: if two headings are the same, a verdict is unknown, or a file does not exist or
            is no PNG or SVG.
    """
    path, op = Path(path), "write_page"
    headings = [section.heading for section in sections]
    require(len(set(headings)) == len(headings), op, "sections", "of different headings", headings)
    claims = [claim for section in sections for claim in section.claims]
    for claim in claims:
        known = claim["verdict"] in VERDICTS
        require(known, op, "verdict", f"one of {list(VERDICTS)}", repr(claim["verdict"]))
    for figure in (figure for section in sections for figure in section.figures):
        known = Path(figure.path).suffix.lower() in _IMAGES
        require(known, op, "figure", "a PNG or SVG file", str(figure.path))
        for file in (figure.path, *figure.files):
            require(Path(file).is_file(), op, "figure", "of files that exist", str(file))
    places = {heading: f"section-{place}" for place, heading in enumerate(headings, 1)}
    body = [_element("h1", title), _verdicts(claims, sections, places)]
    body += [_contents(places)] if len(places) > 1 else []
    body += [_section(section, places[section.heading], path.parent) for section in sections]
    head = (
        '<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>"
    )
    page = f"<head>\n{head}\n</head>\n<body>\n<main>\n{''.join(body)}</main>\n</body>"
    text = f'<!DOCTYPE html>\n<html lang="en">\n{page}\n</html>\n'
    write_texts(path.parent, {path.name: text})
    return path


def _verdicts(claims: Sequence[Mapping], sections: Sequence[Section], places: Mapping) -> str:
    if not claims:
        return ""
    counts = {v: sum(claim["verdict"] == v for claim in claims) for v in VERDICTS}
    boxes = "".join(
        f'<li class="{verdict}"><b>{count}</b> {_badge(verdict)}</li>\n'
        for verdict, count in counts.items()
    )
    links = "".join(
        f'<li><a href="#{places[section.heading]}">{escape(section.heading)}</a>: '
        + ", ".join(
            f"{sum(claim['verdict'] == v for claim in section.claims)} {v}"
            for v in VERDICTS
            if any(claim["verdict"] == v for claim in section.claims)
        )
        + "</li>\n"
        for section in sections
        if section.claims
    )
    total = f"{len(claims)} claim{'s' if len(claims) > 1 else ''}, compared with what was measured"
    return (
        f'<section class="summary" aria-label="Verdicts">\n<p>{total}:</p>\n'
        f'<ul class="counts">\n{boxes}</ul>\n<ul class="by-section">\n{links}</ul>\n</section>\n'
    )


def _contents(places: Mapping[str, str]) -> str:
    links = "".join(
        f'<li><a href="#{place}">{escape(heading)}</a></li>\n' for heading, place in places.items()
    )
    return f'<nav aria-label="Contents">\n<ol>\n{links}</ol>\n</nav>\n'


def _section(section: Section, place: str, folder: Path) -> str:
    parts = [_element("h2", section.heading)]
    parts += [_element("p", paragraph) for paragraph in section.text]
    parts += [_claims(section.claims)] if section.claims else []
    parts += [_figure(figure, folder) for figure in section.figures]
    parts += [_table(table) for table in section.tables]
    parts += [_settings(section.settings)] if section.settings else []
    return f'<section id="{place}">\n{"".join(parts)}</section>\n'


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    columns = [(key, name) for key, name in _CLAIMS if any(claim.get(key) for claim in claims)]
    rows = []
    for claim in claims:
        cells = []
        for key, name in columns:
            text = escape(str(claim.get(key) or "-"))
            if key == "verdict":
                repeats = claim.get("repeats", 1)
                of = f" ({claim['holds']} of {repeats})" if repeats > 1 else ""
                text = _badge(claim["verdict"]) + of
                text += _element("small", claim["reason"]).rstrip() if claim.get("reason") else ""
            cells.append(f'<td data-label="{name}">{text}</td>')
        rows.append(f'<tr class="{claim["verdict"]}">{"".join(cells)}</tr>\n')
    heads = "".join(f'<th scope="col">{name}</th>' for _, name in columns)
    return _wide(f'<table class="claims">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
                 f"{''.join(rows)}</tbody>\n</table>\n")  # fmt: skip


def _badge(verdict: str) -> str:
    symbol = f'<span aria-hidden="true">{VERDICTS[verdict]}</span>'
    return f'<span class="verdict">{symbol} {verdict}</span>'


def _figure(figure: PageFigure, folder: Path) -> str:
    path = Path(figure.path)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    source = f"data:{_IMAGES[path.suffix.lower()]};base64,{data}"
    links = " · ".join(
        f'<a href="{escape(_relative(file, folder))}">{escape(Path(file).suffix[1:].upper())}</a>'
        for file in (path, *(file for file in figure.files if Path(file) != path))
    )
    alt = escape(figure.alt or figure.caption)
    return (
        f'<figure>\n<a href="{escape(_relative(path, folder))}">'  # a small screen can enlarge it
        f'<img alt="{alt}" src="{source}"></a>\n'
        f'<figcaption>{escape(figure.caption)} <span class="files">{links}</span></figcaption>\n'
        "</figure>\n"
    )


def _relative(file: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(file, folder)).as_posix())


def _table(table: PageTable) -> str:
    rows = list(table.rows)
    columns = table.columns or [(key, key, "{}") for key in (rows[0] if rows else ())]
    right = ' class="number"'
    numeric = {
        key for key, _, _ in columns for row in rows if isinstance(row.get(key), int | float)
    }
    heads = "".join(
        f'<th scope="col"{right if key in numeric else ""}>{escape(name)}</th>'
        for key, name, _ in columns
    )
    lines = []
    for row in rows:
        cells = []
        for key, _, form in columns:
            value = row.get(key)
            kind = right if key in numeric else ""
            cells.append(f"<td{kind}>{'-' if value is None else escape(form.format(value))}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    caption = _element("caption", table.caption) if table.caption else ""
    return _wide(f"<table>\n{caption}<thead><tr>{heads}</tr></thead>\n<tbody>\n"
                 f"{''.join(lines)}</tbody>\n</table>\n")  # fmt: skip


def _settings(settings: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in _flat(settings)
    )
    return f'<dl class="settings">\n{items}</dl>\n'


def _flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in settings.items():
        name = f"{before}{name}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}.")
        else:
            several = isinstance(value, list | tuple)
            found.append((name, ", ".join(map(str, value)) if several else str(value)))
    return found


def _wide(table: str) -> str:
    """A frame in which a table wider than the screen can be moved."""
    return f'<div class="wide" tabindex="0">\n{table}</div>\n'


def _element(tag: str, text: str) -> str:
    return f"<{tag}>{escape(text)}</{tag}>\n"
