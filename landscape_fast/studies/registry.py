"""The studies that `landscape-fast study` runs, readable without importing torch.

A study is a module of this package with `SIZES`, `run(size, out, seed)`, which writes its results
to the folder `out` and returns a document, and `describe(document)`, which makes text of it. Those
of `ON_FILES` also take `root=`, the folder of their data, and that of `BY_DATA` `data=`, its name.
"""

from argparse import Namespace
from importlib import import_module
from pathlib import Path

STUDIES = {
    "fort2019": "deep ensembles in weight space and function space, with the report of `landscape`",
    "garipov2018": "curves between optima; FGE against Snapshot Ensembles and independent networks",
    "gorishniy2024": "TabM, and 8 of its 32 members, against an MLP and a deep ensemble on tables",
    "wenzel2020": "hyper-deep and hyper-batch against deep ensembles and BatchEnsemble on digits",
    "wortsman2021": "lines, curves and simplexes trained in one run, against single networks, SWA",
}
_SIZES = ("tiny", "small", "full")
SIZES = {name: _SIZES for name in STUDIES} | {"fort2019": ("smoke", "cpu", "small", "paper")}
# The sizes that read files: CIFAR-10, or what --data says.
ON_FILES = {
    "fort2019": ("cpu", "small", "paper"),
    "garipov2018": ("full",),
    "wortsman2021": ("full",),
}
BY_DATA = {"fort2019": "paper"}  # the study and its size that offer several data sets
DATA = ("cifar10", "cifar100", "imagenet")


def study(args: Namespace) -> int:
    """Runs one study; prints its table, or its document as JSON."""
    sizes = SIZES[args.name]
    if args.size not in sizes:
        got = f"{args.size} with {args.name}"
        args.usage_error(f"argument --size: must be one of {', '.join(sizes)}; got {got}")
    reads = args.size in ON_FILES.get(args.name, ())
    if reads != (args.root is not None):
        rule = "the folder of the data files" if reads else "left out where no files are read"
        got = f"{args.root or 'none'} with {args.name} --size {args.size}"
        args.usage_error(f"argument --root: must be {rule}; got {got}")
    chooses = BY_DATA.get(args.name) == args.size
    if args.data is not None and not chooses:
        got = f"{args.data} with {args.name} --size {args.size}"
        args.usage_error(f"argument --data: must be left out where there is no choice; got {got}")
    out = args.out or Path("out") / args.name
    out.mkdir(parents=True, exist_ok=True)
    module = import_module(f"landscape_fast.studies.{args.name}")
    before = _files(out)
    files = {"root": args.root} if reads else {}
    files |= {"data": args.data} if args.data is not None else {}
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
    return {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}
