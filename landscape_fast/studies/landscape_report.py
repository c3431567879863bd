"""A report of networks in weight space and function space: measured, judged, drawn, written.

The measurements of Fort et al. 2019 (arXiv:1912.02757) on the networks of one training run.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from landscape_fast.landscape import OodReport
from landscape_fast.studies import _landscape_claims as claims
from landscape_fast.studies import _landscape_figures as figures
from landscape_fast.studies import _landscape_measure as measure
from landscape_fast.studies import _landscape_pages as pages
from landscape_fast.studies import _landscape_shift as shift
from landscape_fast.studies import _landscape_space as space
from landscape_fast.studies import _landscape_tables as tables
from landscape_fast.studies._landscape_bench import WAYS, Bench
from landscape_fast.studies._landscape_parts import Part
from landscape_fast.studies.commands import say
from landscape_fast.studies.landscape_settings import ReportSettings, settings_of
from landscape_fast.studies.report import (
    accuracy_note,
    describe_run,
    format_table,
    headline,
    save_figures,
    to_csv,
    to_json,
    write_texts,
)
from landscape_fast.studies.run_folder import RunFolder, open_run

__all__ = ["ReportSettings", "describe", "open_run", "report", "settings_of"]

SCRATCH = ".unfinished"
SAMPLED = (*WAYS, "random_low_rank")


def report(
    run: RunFolder,
    settings: ReportSettings,
    out: Path,
    *,
    corrupted: Path | None = None,
    foreign: Mapping[str, Path] | None = None,
    more: Sequence[Part] = (),
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures the networks of a run, judges the claims of the paper, and writes the report.

    A third of the test rows is for decisions (which samples are accepted, up to which scale they
    are drawn); what is reported is measured on the others.

    Args:
        run: what `open_run` found; with kept epochs, all that needs the training's trajectories.
        settings: how much of everything; `settings_of("smoke" | "small" | "paper")`.
        out: folder of index.html, results.json, results.md, results.csv, `figures` and `tables`.
            What an interrupted report has measured is kept there, and used by the next one.
        corrupted: folder of published arrays of corrupted test images (`<corruption>.npy` and
            `labels.npy`); None makes the corruptions of `settings`.
        foreign: name of a loader of `landscape_fast.data` ("svhn", "mnist", ...) to its folder:
            further images from elsewhere.
        more: sections of a study, after those of the report.
        about: what the document begins with, for instance the name of a study.
        progress: say what is measured.

    Returns:
        The document of results.json: data, problem, training, settings, claims, tables, notes.

    Raises:
        ValueError: if rows or folders do not fit.
        KeyboardInterrupt: on Ctrl-C; the same call goes on from there.

    Cost: forward passes, about R * (T + W * (scales * per_scale + 2 * samples + 84)) +
        plane_points^2 over the rows of each part, for R runs with T checkpoints and W ways to
        sample, whose scales are searched for in 84; under shift R * (2 + (1 + W) * shift_runs)
        networks for every corruption and severity.
    """
    bench = Bench(run, settings, Path(out) / SCRATCH)
    stages = _Stages(progress)
    shift.check_corrupted(bench, corrupted)
    images = shift.read_foreign(bench, foreign or {})
    found = _measure(bench, stages, corrupted, images)
    judged = _judge(bench, found) | {part.heading: list(part.claims) for part in more}
    for number, row in enumerate((row for rows in judged.values() for row in rows), 1):
        row["number"] = number
    document = {
        **(about or {}),
        **describe_run(run.dataset, run.problem, run.config, str(bench.device)),
        "settings": asdict(settings),
        "runs": {"members": list(run.members), "epochs": list(bench.epochs)},
        "claims": judged,
        "tables": _tables(found)
        | {name: list(given[0]) for part in more for name, given in part.tables.items()},
        "left_out": found["reasons"],
        "notes": [*_notes(bench, found), *(note for part in more for note in part.notes)],
        "seconds": stages.seconds,
    }
    _write(Path(out), bench, document, found, stages, more)
    shutil.rmtree(bench.scratch, ignore_errors=True)
    return document


class _Stages:
    """Runs the parts of a report one after another, says which, and how long each took."""

    def __init__(self, progress: bool) -> None:
        self.progress, self.seconds = progress, {}

    def __call__(self, name: str, part: Callable[[], Any]) -> Any:
        if self.progress:
            say(f"landscape: {name}")
        began = time.perf_counter()
        found = part()
        self.seconds[name] = time.perf_counter() - began
        return found


def _measure(bench: Bench, stage: _Stages, corrupted, foreign) -> dict[str, Any]:
    """Everything that the run allows; None for what it does not, with the reason."""
    R, T = bench.checkpoints.shape[:2]
    found: dict[str, Any] = dict.fromkeys(("shift", "ood", "radial", "starts", "curvature", "map"))
    found["likeness"], checkpoints = stage(
        f"{R * T} checkpoints of {R} runs", lambda: measure.measure_likeness(bench)
    )
    found["samples"], found["reasons"] = stage(
        "samples around every solution", lambda: measure.draw_samples(bench)
    )
    samples = found["samples"]
    found["diversity"] = stage(
        "diversity and accuracy of samples", lambda: measure.measure_diversity(bench)
    )
    found["sizes"] = stage("ensembles of every size", lambda: measure.measure_sizes(bench, samples))
    if found["likeness"].points is not None:
        found["map"] = stage(
            "map of functions", lambda: measure.map_samples(bench, checkpoints, samples)
        )
    if R > 1:
        found["radial"] = stage(
            f"{bench.settings.plane_points}^2 points of the plane of two solutions",
            lambda: space.measure_radial(bench, samples),
        )
    if bench.run.trajectories is not None and bench.epochs[0] == 0:
        found["starts"] = stage(
            "lines from the first weights to the last", lambda: space.measure_starts(bench)
        )
    if bench.settings.curvature_points:
        found["curvature"] = stage("curvature", lambda: space.measure_curvature(bench))
    groups = stage("ensembles of equal size", lambda: shift.make_groups(bench, samples))
    found["members"] = groups.members
    found["shift"] = stage("corruptions", lambda: shift.measure_shift(bench, groups, corrupted))
    found["ood"] = stage("images from elsewhere", lambda: shift.measure_ood(bench, groups, foreign))
    found["reasons"] |= {f"{way}, under shift": why for way, why in groups.reasons.items()}
    return found


def _judge(bench: Bench, found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Claims by section of the report."""
    return {
        "weights and functions": claims.judge_likeness(found["likeness"]),
        "diversity": claims.judge_diversity(found["diversity"], bench.classes),
        "ensembles": claims.judge_sizes(found["sizes"], SAMPLED, found["reasons"]),
        "corruption": claims.judge_shift(found["shift"], SAMPLED, found["reasons"]),
        "images from elsewhere": claims.judge_ood(found["ood"], found["reasons"]),
        "planes and paths": claims.judge_space(
            found["radial"], found["starts"], found["likeness"].norms
        ),
    }


def _tables(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    made = {
        "ensembles": tables.variant_rows(found["sizes"], found["samples"]),
        "samples": tables.sample_rows(found["samples"]),
        "diversity": tables.fit_rows(found["diversity"]),
    }
    if found["shift"] is not None:
        made["corruption"] = tables.shift_rows(found["shift"])
        made["each_corruption"] = tables.each_shift_rows(found["shift"])
    if isinstance(found["ood"], OodReport):
        made["elsewhere"] = tables.foreign_rows(found["ood"])
    if found["starts"] is not None:
        made["starts"] = tables.start_rows(found["starts"])
    if found["curvature"] is not None:
        made["curvature"] = tables.curvature_rows(found["curvature"])
    return {name: rows for name, rows in made.items() if rows}


def _notes(bench: Bench, found: dict[str, Any]) -> list[str]:
    """What to know when reading the report, in sentences."""
    validation, test = len(bench.validation.y), len(bench.test.y)
    notes = [
        f"samples are accepted, and their scales chosen, by {validation:,} of the test rows; "
        f"everything is measured on {test:,} others",
        accuracy_note(test, float(bench.accuracy.max())),
        f"a sample is accepted if it loses at most {bench.tolerance():.2%} on the rows for "
        f"decisions, within {bench.settings.tries} draws",
    ]
    if found["members"] > 1:
        notes.append(
            f"divergences are those of {found['members']} networks for every method, since they "
            "grow with the number of networks"
        )
    if found["shift"] is not None:
        notes.append(
            f"corruptions are {found['shift'].source}, {found['shift'].rows:,} of them: "
            f"{', '.join(found['shift'].corruptions)}"
        )
    if bench.normed:
        notes.append(
            "the statistics of the norms are taken anew for every network from "
            f"{len(bench.calibration):,} training rows; their scales, which start alike, are "
            "weights too, and raise the cosines"
        )
    if bench.run.trajectories is None:
        notes.append("no epochs were kept up to the last of every network: no trajectories")
    notes += bench.run.notes
    return notes + [f"{way} is left out: {why}" for way, why in found["reasons"].items()]


def _figures(bench: Bench, found: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Name of a figure to a function that draws it."""
    name, drawn = bench.run.dataset.name, {}
    drawn |= figures.likeness_figures(found["likeness"], name)
    if found["map"] is not None:
        drawn["samples"] = lambda: figures.sample_map(found["likeness"], found["map"], name)
    first = found["diversity"][0]
    drawn["diversity"] = lambda: figures.diversity_figure(first, bench.classes, name)
    if bench.R > 1:
        drawn["sizes"] = lambda: figures.size_figure(found["sizes"], name)
    drawn["corruption"] = lambda: figures.shift_figure(found["shift"], name)
    drawn["elsewhere"] = lambda: figures.ood_figure(found["ood"], name)
    if found["radial"] is not None:
        drawn["plane"] = lambda: figures.radial_figure(found["radial"], name)
    if found["starts"] is not None:
        drawn["starts"] = lambda: figures.start_figure(found["starts"], name)
    for place, line in enumerate(found["curvature"].top if found["curvature"] else ()):
        drawn[f"curvature_{place + 1}"] = lambda line=line: figures.curvature_figure(
            found["curvature"], line, name
        )
    return drawn


def _write(out: Path, bench: Bench, document, found, stage: _Stages, more: Sequence[Part]) -> None:
    made: dict[str, list[Path]] = {}

    def draw() -> None:
        drawn = _figures(bench, found)
        drawn |= {name: draw for part in more for name, (draw, _) in part.figures.items()}
        for name, figure in drawn.items():
            data = {"starts": document["tables"].get("starts")}
            made[name] = save_figures(out / "figures", {name: figure()}, data)

    try:
        stage("figures", draw)
    except ImportError as error:
        document["notes"].append(f"no figures: {error}")
    document["figures"] = {
        name: [path.relative_to(out).as_posix() for path in paths] for name, paths in made.items()
    }
    rows = [row for part in document["claims"].values() for row in part]
    write_texts(
        out / "tables", {f"{name}.csv": to_csv(part) for name, part in document["tables"].items()}
    )
    write_texts(
        out,
        {
            "claims.csv": to_csv(rows),
            "results.csv": to_csv(document["tables"]["ensembles"]),
            "results.json": to_json(document),
            "results.md": pages.markdown(document, more),
        },
    )
    pages.page(out, document, more)


def describe(document: dict[str, Any]) -> str:
    """Scores of single networks and of the largest ensembles, claims, notes: as text."""
    rows = document["tables"]["ensembles"]
    most = max(row["size"] for row in rows)
    judged = [row for part in document["claims"].values() for row in part]
    parts = [
        headline(document),
        format_table([row for row in rows if row["size"] in (1, most)], tables.VARIANTS),
        *map(_told, judged),
        pages.counted(judged),
        "\n".join(f"- {note}" for note in document["notes"]),
    ]
    return "\n\n".join(parts[:2] + ["\n".join(parts[2:-2])] + parts[-2:])


def _told(row: dict[str, Any]) -> str:
    """A claim in two lines."""
    first = f"{row['number']:>2}  {row['verdict']:<12}  {row['claim']}"
    found = f"not measured: {row['reason']}" if row["reason"] else f"{row['found']} ({row['rule']})"
    return f"{first}\n{'':18}{found}"
