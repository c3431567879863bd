"""The command `landscape-fast`: demo, train, landscape, subspace, curve, fge, swag, study and more.

The parser is built without importing torch, so that help and errors of usage come at once.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from landscape_fast import __version__
from landscape_fast.studies import commands as study
from landscape_fast.studies import registry
from landscape_fast.studies.arguments import (
    add_command,
    add_common,
    add_problem,
    add_training,
    count,
    non_negative,
    positive,
    seed,
)
from landscape_fast.studies.commands import PROGRAM, say
from landscape_fast.studies.landscape_arguments import add_landscape
from landscape_fast.studies.presets import (
    FAST_INITS,
    MEMBER_BATCHES,
    MEMBER_BIAS,
    METHODS,
    NORMS,
    RECIPES,
    TRAINING,
)
from landscape_fast.studies.subspace_arguments import add_curve, add_fge, add_subspace, add_swag


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (the process's own if None); returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt as stop:
        say(f"{PROGRAM}: {str(stop) or 'stopped'}{_how_to_resume(args, argv)}")
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if os.environ.get("LANDSCAPE_FAST_DEBUG") == "1":
            raise
        say(f"{PROGRAM} {args.command}: error: {error}")
        return 1


class _Parser(argparse.ArgumentParser):
    """Errors of usage in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `args.run(args)` runs the chosen one."""
    parser = _Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Ensembles of neural networks, trained and compared.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_demo(commands)
    _add_train(commands)
    for add in (add_landscape, add_subspace, add_curve, add_fge, add_swag):
        add(commands)
    _add_study(commands)
    show = add_command(
        commands,
        "show-config",
        _show_config,
        "print versions, devices and the backend of every op",
        "Prints what this installation consists of and which backend runs each op.",
    )
    show.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_demo(commands) -> None:
    parser = add_command(
        commands,
        "demo",
        study.demo,
        "train and compare ensembles on digits, in a minute",
        "Trains a single network, a deep ensemble and a BatchEnsemble on the digits of "
        "scikit-learn; prints a table and writes it with three figures.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="folder of the results (default: out)",
    )
    parser.add_argument(
        "--epochs",
        type=count,
        metavar="N",
        help=f"training epochs (default: {TRAINING['digits']['epochs']})",
    )
    _add_members(parser)
    add_common(parser, "1, networks this small gain nothing from more")


def _add_train(commands) -> None:
    parser = add_command(
        commands,
        "train",
        study.train,
        "train an ensemble and measure it",
        "Trains on real data and measures on its test rows. Ctrl-C saves a "
        "checkpoint; the same command with --resume continues to the same result.",
    )
    add_problem(parser, "METHOD")
    parser.add_argument(
        "--method",
        choices=(*METHODS, "all"),
        default="deep",
        help="how to train; all: compare the three (default: deep)",
    )
    parser.add_argument(
        "--keep-every",
        type=count,
        metavar="N",
        help="also keep the weights before training, after every N-th epoch and the last, for the "
        "trajectories of `landscape` (default: keep none)",
    )
    _add_members(parser)
    add_common(parser)
    _add_factors(add_training(parser))


def _add_factors(settings) -> None:
    """What only a BatchEnsemble has, and its recipes."""
    settings.description = "defaults depend on the data set, or on the recipe"
    settings.add_argument(
        "--recipe",
        choices=RECIPES,
        help="of the authors of BatchEnsemble for ResNets on CIFAR: batch_ensemble, 250 epochs; "
        "single, 200. Their rate is 0.1 for batches of 128 rows, in proportion for others; a "
        "BatchEnsemble computes M times as many rows. Images are augmented by crop_flip",
    )
    settings.add_argument(
        "--fast-init",
        choices=FAST_INITS,
        help="start of a BatchEnsemble's factors (default: random_sign; normal with --recipe "
        "batch_ensemble)",
    )
    settings.add_argument(
        "--fast-lr-mult",
        type=positive,
        metavar="X",
        help="learning rate of these factors as a multiple of --lr (default: 1, or by recipe)",
    )
    settings.add_argument(
        "--fast-weight-decay",
        type=non_negative,
        metavar="X",
        help="of these factors, which --weight-decay leaves out (default: 0)",
    )
    settings.add_argument(
        "--member-bias",
        choices=MEMBER_BIAS,
        help="learning rate of the biases per member: slow, --lr; fast, that of the factors "
        "(default: slow)",
    )
    settings.add_argument(
        "--member-batches",
        choices=MEMBER_BATCHES,
        help="whether all members of a BatchEnsemble see the same batch (default: shared)",
    )
    settings.add_argument(
        "--norm",
        choices=NORMS,
        help="whether they share the norms of a ResNet (default: shared)",
    )


def _add_study(commands) -> None:
    lines = [f"{name}: {summary}" for name, summary in registry.STUDIES.items()]
    parser = add_command(
        commands,
        "study",
        registry.study,
        "repeat a paper's comparison",
        "Trains all that a study compares, prints a table and writes it with every run. "
        f"{'; '.join(lines)}.",
    )
    parser.add_argument("name", choices=registry.STUDIES, metavar="NAME", help="which study")
    parser.add_argument(
        "--size",
        choices=list(dict.fromkeys(size for sizes in registry.SIZES.values() for size in sizes)),
        default="small",
        help="tiny or smoke: to see that it runs; small: minutes, of fort2019 on a GPU (default); "
        "full: hours, or a GPU; of fort2019 also cpu, an hour of two CPU cores, and paper, as the "
        "authors ran it",
    )
    on_files = ", ".join(f"{name} ({' '.join(sizes)})" for name, sizes in registry.ON_FILES.items())
    parser.add_argument(
        "--root", metavar="DIR", help=f"folder of CIFAR-10, or of --data, for {on_files}"
    )
    parser.add_argument(
        "--data",
        choices=registry.DATA,
        help="of fort2019 --size paper: which of the paper's data sets (default: cifar10)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results (default: out/NAME)"
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="of all random numbers (default: 0)")
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON instead of a table"
    )


def _add_members(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--members", type=count, metavar="M", help="members of each ensemble (default: 4)"
    )


def _show_config(args: argparse.Namespace) -> int:
    from landscape_fast.config import show_config

    show_config(args.json)
    return 0


def _how_to_resume(args: argparse.Namespace, argv: Sequence[str]) -> str:
    if not hasattr(args, "resume"):
        return ""
    again = [word for word in argv if word != "--overwrite"]
    again += [] if "--resume" in again else ["--resume"]
    return f"\ncontinue with: {PROGRAM} {shlex.join(again)}"
