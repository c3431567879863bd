"""The arguments of `landscape-fast landscape`, readable without importing torch."""

import argparse
from pathlib import Path

from landscape_fast.studies import landscape_commands as run
from landscape_fast.studies.arguments import add_command, add_common, count, non_negative
from landscape_fast.studies.landscape_settings import FOREIGN, SIZES


def add_landscape(commands) -> None:
    """The verb `landscape`."""
    parser = add_command(
        commands,
        "landscape",
        run.landscape,
        "report where trained networks lie, in weight space and function space",
        "Opens a folder that 'landscape-fast train --method deep' wrote and measures its networks: "
        "likeness of checkpoints, samples around solutions, diversity against accuracy, ensembles "
        "of every size, corrupted and foreign images, the plane of two solutions. Writes tables, "
        "figures and one page, index.html, with every claim of Fort et al. 2019, its criterion and "
        "whether it holds here. Trajectories need a run with --keep-every. The same command goes "
        "on where an interrupted one was.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the training run")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the report (default: RUN_DIR/landscape)"
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="smoke: seconds for small networks; small: samples, ensembles and diversity on all "
        "test rows (default); paper: as many rows, samples and corruptions as the paper, for a GPU",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the data files, if they have moved since"
    )
    add_common(parser)
    more = parser.add_argument_group("measurements", "defaults depend on --size")
    more.add_argument(
        "--rows", type=count, metavar="N", help="measure on so many test rows at most, everywhere"
    )
    more.add_argument(
        "--samples", type=count, metavar="N", help="accepted samples around every solution"
    )
    more.add_argument(
        "--drop",
        type=non_negative,
        metavar="X",
        help="how much less accurate an accepted sample may be, a fraction (default: 0.01)",
    )
    more.add_argument(
        "--plane-points", type=count, metavar="N", help="points of the plane along each axis"
    )
    more.add_argument(
        "--curvature-points",
        type=count,
        metavar="N",
        help="points of straight lines at which the Hessian is measured (default: none, or 11 "
        "with --size paper)",
    )
    more.add_argument(
        "--corruptions",
        metavar="NAME[,NAME...]",
        help="instead of those of --size; 'all' for all that fit the images",
    )
    more.add_argument(
        "--corrupted",
        type=Path,
        metavar="DIR",
        help="read corrupted test images from the published arrays (CIFAR-10-C) in this folder",
    )
    more.add_argument(
        "--ood",
        action="append",
        default=[],
        type=_foreign,
        metavar="NAME=DIR",
        help=f"also measure on these foreign images, one of {', '.join(FOREIGN)}, from a folder; "
        "can be repeated",
    )


def _foreign(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if name not in FOREIGN or not equals or not folder:
        rule = f"NAME=DIR with NAME one of {', '.join(FOREIGN)}"
        raise argparse.ArgumentTypeError(f"must be {rule}; got {text!r}")
    return name, Path(folder)
