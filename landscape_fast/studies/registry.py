"""The studies that `landscape-fast study` runs, readable without importing torch.

A study is a module of this package with `SIZES`, `run(size, out, seed)`, which writes its results
to the folder `out` and returns a document, and `describe(document)`, which makes text of it. Those
of `ON_FILES` also take `root=`, the folder of CIFAR-10.
"""

from argparse import Namespace
from importlib import import_module
from pathlib import Path

STUDIES = {
    "garipov2018": "curves between optima; FGE against Snapshot Ensembles and independent networks",
    "gorishniy2024": "TabM, and 8 of its 32 members, against an MLP and a deep ensemble on tables",
    "wenzel2020": "hyper-deep and hyper-batch against deep ensembles and BatchEnsemble on digits",
    "wortsman2021": "lines, curves and simplexes trained in one run, against single networks, SWA",
}
SIZES = ("tiny", "small", "full")
ON_FILES = ("garipov2018", "wortsman2021")  # whose full size reads CIFAR-10


def study(args: Namespace) -> int:
    """Runs one study; prints its table, or its document as JSON."""
    reads = args.name in ON_FILES and args.size == "full"
    if reads != (args.root is not None):
        rule = "the folder of the CIFAR-10 files" if reads else "left out where no files are read"
        got = f"{args.root or 'none'} with {args.name} --size {args.size}"
        args.usage_error(f"argument --root: must be {rule}; got {got}")
    out = args.out or Path("out") / args.name
    out.mkdir(parents=True, exist_ok=True)
    module = import_module(f"landscape_fast.studies.{args.name}")
    before = _files(out)
    files = {"root": args.root} if reads else {}
    document = module.run(args.size, out, args.seed or 0, **files)
    if args.json:
        from landscape_fast.studies.report import to_json

        print(to_json(document), end="")
        return 0
    print(
        f"{args.name}, {args.size}, seed {document['seed']}", module.describe(document), sep="\n\n"
    )
    written = sorted(str(path) for path, time in _files(out).items() if before.get(path) != time)
    print(f"\nwrote {', '.join(written)}")
    return 0


def _files(out: Path) -> dict[Path, int]:
    """The folder's files, and when each was last written."""
    return {path: path.stat().st_mtime_ns for path in out.iterdir()}
