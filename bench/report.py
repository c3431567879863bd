"""The table and the figures of bench/results, with the standard library only."""

import json
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

RESULTS = Path(__file__).resolve().parent / "results"
GROUPS = ("eager", "compile", "library", "plain")
COLOURS = {"eager": "#4c78a8", "compile": "#f58518", "library": "#54a24b"}
WIDTH, LABEL, ROW = 900, 380, 34


class Line(NamedTuple):
    """The newest measurement of ours for one op, shape, dtype and mode."""

    row: dict
    best: dict[str, tuple[float, str]]  # group -> (ratio to its best contestant, its name)


def read(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; a last line cut short by a kill is left out."""
    rows = []
    for text in path.read_text().splitlines():
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return rows


def key(row: dict) -> tuple:
    """What two rows share when they measure the same thing."""
    return (row["op"], json.dumps(row["shape"]), row["dtype"], row["mode"])


def lines(rows: list[dict]) -> list[Line]:
    """The newest run of every case, with the backend that runs by default."""
    newest, groups = {}, {}
    for row in rows:
        if "ms" not in row or row.get("quick"):
            continue
        groups[row["backend"]] = row["group"]
        if row["group"] == "ours" and "targets" in row:
            newest[key(row)] = row
    found = []
    for row in newest.values():
        best = {}
        for name, ratio in row["ratio"].items():
            group = groups.get(name, "")
            if group not in best or ratio["p50"] < best[group][0]:
                best[group] = (ratio["p50"], name)
        found.append(Line(row, best))
    return sorted(found, key=lambda line: key(line.row))


def shape_text(row: dict) -> str:
    """M=4 N=100 float32."""
    return " ".join(f"{k}={v}" for k, v in row["shape"].items()) + f" {row['dtype']}"


def markdown(found: list[Line]) -> str:
    """A table for the README: ours, the floor, and how many times slower the peers are."""
    head = (
        "| op, shape | mode | ours, ms | of floor | eager | torch.compile | other package "
        "| plain layer | error | targets |"
    )
    table = [head, "|" + "---|" * 10]
    for row, best in found:
        cells = [f"{best[g][0]:.2f}x" if g in best else "" for g in GROUPS]
        judged = [t for t in row["targets"] if t["met"] is not None and t["kind"] == "must"]
        met = f"{sum(t['met'] for t in judged)} of {len(judged)}" if judged else ""
        ms = row["ms"]
        table.append(
            f"| `{row['op']}` {shape_text(row)} | {row['mode']} "
            f"| {ms['p50']:.4g} [{ms['min']:.4g}, {ms['max']:.4g}] "
            f"| {100 * row['share_of_floor']:.0f} % | {' | '.join(cells)} "
            f"| {row['error']:.0e} | {met} |"
        )
    return "\n".join(table)


def svg(found: list[Line], title: str) -> str:
    """Horizontal bars: how many times slower the best of each kind of peer is than ours."""
    top = max([r for line in found for g, (r, _) in line.best.items() if g in COLOURS] + [1.0])
    scale = (WIDTH - LABEL - 70) / top
    height = 60 + ROW * len(found)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-size="14">{escape(title)}</text>',
    ]
    for i, (group, colour) in enumerate(COLOURS.items()):
        x = 10 + 110 * i
        parts.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="35">best {group}</text>')
    for i, (row, best) in enumerate(found):
        y = 46 + ROW * i
        label = f"{row['op']} {shape_text(row)} {row['mode']}"
        parts.append(
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end" font-size="9">'
            f"{escape(label)}</text>"
        )
        for j, (group, colour) in enumerate(COLOURS.items()):
            if group not in best:
                continue
            ratio, name = best[group]
            length = max(1.0, ratio * scale)
            at = y + 9 * j
            parts.append(
                f'<rect x="{LABEL}" y="{at}" width="{length:.1f}" height="8" fill="{colour}">'
                f"<title>{escape(name)}</title></rect>"
                f'<text x="{LABEL + length + 4:.1f}" y="{at + 8}" font-size="9">{ratio:.1f}x</text>'
            )
    one = LABEL + scale
    parts.append(
        f'<line x1="{one:.1f}" y1="42" x2="{one:.1f}" y2="{height - 8}" stroke="black" '
        'stroke-dasharray="3 3"/>'
    )
    return "\n".join([*parts, "</svg>", ""])


def write(results: Path = RESULTS) -> str:
    """Writes one SVG beside every results file, and returns the tables as markdown."""
    texts = []
    for path in sorted(results.glob("*.jsonl")):
        found = lines(read(path))
        if not found:
            continue
        about = found[-1].row
        title = f"{about['hardware']}, {about['threads']} threads, torch {about['torch']}"
        if about["device"] == "cuda":
            title = f"{about['hardware']}, driver {about['driver']}, torch {about['torch']}"
        path.with_suffix(".svg").write_text(svg(found, f"Times slower than ours: {title}"))
        texts.append(f"{title}:\n\n{markdown(found)}")
    return "\n\n".join(texts) or f"no measurements in {results}"
