"""What `landscape-fast landscape` does, from parsed arguments to an exit code.

torch is imported when the command runs, so that the parser can import this module for nothing.
"""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from landscape_fast.studies.commands import on_device
from landscape_fast.studies.landscape_settings import ReportSettings, settings_of

_ROWS = ("rows", "function_rows", "map_rows", "shift_rows", "validation_rows")


def landscape(args: Namespace) -> int:
    """The report of one folder."""
    if args.plane_points is not None and args.plane_points < 2:
        args.usage_error(f"argument --plane-points: must be at least 2; got {args.plane_points}")
    for flag, folder in (("--corrupted", args.corrupted), *(("--ood", d) for _, d in args.ood)):
        if folder is not None and not folder.is_dir():
            args.usage_error(f"argument {flag}: must be a folder that exists; got {folder}")
    settings = _settings(args)
    out = args.out or args.run_dir / "landscape"
    if out.resolve() == args.run_dir.resolve():
        rule = "another folder than that of the run, whose results.json would be lost"
        args.usage_error(f"argument --out: must be {rule}; got {out}")
    with on_device(args) as device:
        from landscape_fast.studies.landscape_report import describe, open_run, report
        from landscape_fast.studies.report import to_json

        run = open_run(args.run_dir, root=args.root, device=device)
        try:
            document = report(
                run, settings, out, corrupted=args.corrupted, foreign=dict(args.ood),
                progress=not args.quiet,
            )  # fmt: skip
        except KeyboardInterrupt as stop:
            text = f"stopped; what was measured is kept in {out}, and the same command goes on"
            raise KeyboardInterrupt(text) from stop
    print(to_json(document) if args.json else describe(document), end="" if args.json else "\n")
    if not args.json:
        print(f"\nwrote {out / 'index.html'} with {', '.join(_written(out))}")
    return 0


def _written(out: Path) -> list[str]:
    names = sorted(path.name for path in out.iterdir() if path.name != "index.html")
    return [f"{name}/" if (out / name).is_dir() else name for name in names]


def _settings(args: Namespace) -> ReportSettings:
    """Those of --size, with what was given instead."""
    chosen = asdict(settings_of(args.size))
    given = {name: getattr(args, name) for name in ("samples", "drop", "plane_points", "seed",
             "curvature_points")}  # fmt: skip
    if args.rows is not None:
        given |= {name: min(args.rows, chosen[name] or args.rows) for name in _ROWS}
    if args.corruptions is not None:
        given["corruptions"] = _corruptions(args)
    return settings_of(args.size, **given)


def _corruptions(args: Namespace) -> tuple[str, ...]:
    """Names, checked; () for all."""
    if args.corruptions == "all":
        return ()
    from landscape_fast.data import CORRUPTIONS

    names = tuple(name.strip() for name in args.corruptions.split(","))
    wrong = [name for name in names if name not in CORRUPTIONS]
    if wrong:
        rule = f"'all', or names out of {', '.join(CORRUPTIONS)}"
        args.usage_error(f"argument --corruptions: must be {rule}; got {', '.join(wrong)}")
    return names
