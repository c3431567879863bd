"""What `landscape-fast subspace|curve|fge|swag` do, from parsed arguments to an exit code.

torch is imported when a command runs, so that the parser can import this module for nothing.
"""

from argparse import Namespace
from importlib import import_module

from landscape_fast.studies.commands import PROGRAM, claim_folder, prepared, say


def subspace(args: Namespace) -> int:
    """A subspace of networks, trained in one run and measured along it."""
    if args.kind == "line" and args.anchors not in (None, 2):
        args.usage_error(f"argument --anchors: must be 2 with --kind line; got {args.anchors}")
    args.anchors = args.anchors or (2 if args.kind == "line" else 3)
    if args.anchors < 2:
        args.usage_error(f"argument --anchors: must be at least 2; got {args.anchors}")
    _check_points(args)
    return _run(args, "path_runs", "run_subspace")


def curve(args: Namespace) -> int:
    """Two networks and a curve between them."""
    _check_points(args)
    return _run(args, "path_runs", "run_curve")


def fge(args: Namespace) -> int:
    """An ensemble collected along one training run with a cyclic learning rate."""
    if args.kind == "snapshot":
        args.schedule = args.schedule or "cosine"
        for name in ("cycle_epochs", "lr_low", "lr_high"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                args.usage_error(f"argument {flag}: must be left out with --kind snapshot")
    return _run(args, "subspace_runs", "run_fge")


def swag(args: Namespace) -> int:
    """A Gaussian over weights: its mean, and an ensemble of samples."""
    args.schedule = args.schedule or "hold_linear"
    return _run(args, "subspace_runs", "run_swag")


def _check_points(args: Namespace) -> None:
    if args.points < 2:
        args.usage_error(f"argument --points: must be at least 2, the ends; got {args.points}")


def _run(args: Namespace, module: str, name: str) -> int:
    """Trains, measures, writes results and figures, prints a table."""
    checkpoints, old = claim_folder(args, args.command)
    with prepared(args, old) as (problem, dataset, config, device):
        from landscape_fast.studies import report, subspace_runs

        job = subspace_runs.Job(problem, dataset, config, device, checkpoints, args)
        run = getattr(import_module(f"landscape_fast.studies.{module}"), name)
        found = run(job)
        document = {
            **report.describe_run(dataset, problem, config, device),
            "settings": found.settings,
            "rows": found.rows,
            "notes": found.notes,
            "numbers": found.numbers,
            "histories": found.histories,
        }
        texts = {"results.json": report.to_json(document), "results.csv": report.to_csv(found.rows)}
        for name, rows in found.tables.items():
            texts[f"{name}.csv"] = report.to_csv(rows)
        written = report.write_texts(args.out, texts)
        try:
            figures = {name: draw() for name, draw in found.figures.items()}
            written += report.save_figures(args.out, figures)
        except ImportError as error:
            say(f"{PROGRAM} {args.command}: no figures: {error}")
    if args.json:
        print(report.to_json(document), end="")
        return 0
    table = report.format_table(found.rows, subspace_runs.COLUMNS)
    print(report.headline(document), table, sep="\n\n")
    print("", *(f"- {note}" for note in found.notes), sep="\n")
    print(f"\nwrote {', '.join(map(str, written))}")
    return 0
