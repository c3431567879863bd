"""The command `landscape-fast`: demo, train, subspace, curve, fge, swag, study, show-config.

The parser is built without importing torch, so that help and errors of usage come at once.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from landscape_fast import __version__
from landscape_fast.studies import commands as study
from landscape_fast.studies import registry
from landscape_fast.studies.commands import PROGRAM, say
from landscape_fast.studies.presets import (
    AUGMENTS,
    DATA,
    FAST_INITS,
    MEMBER_BATCHES,
    MEMBER_BIAS,
    METHODS,
    MODEL_OF,
    MODELS,
    NORMS,
    OPTIMIZERS,
    PIXELS,
    RECIPES,
    SCHEDULES,
    TRAINING,
)
from landscape_fast.studies.subspace_arguments import (
    Builders,
    add_curve,
    add_fge,
    add_subspace,
    add_swag,
)


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
    build = Builders(
        _command, _add_problem, _add_common, _add_training, _count, _positive, _non_negative
    )
    for add in (add_subspace, add_curve, add_fge, add_swag):
        add(commands, build)
    _add_study(commands)
    show = _command(
        commands,
        "show-config",
        _show_config,
        "print versions, devices and the backend of every op",
        "Prints what this installation consists of and which backend runs each op.",
    )
    show.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_demo(commands) -> None:
    parser = _command(
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
        type=_count,
        metavar="N",
        help=f"training epochs (default: {TRAINING['digits']['epochs']})",
    )
    _add_members(parser)
    _add_common(parser, "1, networks this small gain nothing from more")


def _add_train(commands) -> None:
    parser = _command(
        commands,
        "train",
        study.train,
        "train an ensemble and measure it",
        "Trains on real data and measures on its test rows. Ctrl-C saves a "
        "checkpoint; the same command with --resume continues to the same result.",
    )
    _add_problem(parser, "out/DATA-METHOD")
    parser.add_argument(
        "--method",
        choices=(*METHODS, "all"),
        default="deep",
        help="how to train; all: compare the three (default: deep)",
    )
    _add_members(parser)
    _add_common(parser)
    _add_factors(_add_training(parser))


def _add_problem(parser: argparse.ArgumentParser, folder: str = "out/DATA-VERB") -> None:
    """What to train on, and where to keep it."""
    parser.add_argument(
        "--data",
        choices=DATA,
        default="digits",
        help="data set (default: digits, which needs no files)",
    )
    parser.add_argument("--root", metavar="DIR", help="folder of the files of cifar10 or mnist")
    parser.add_argument(
        "--model",
        choices=MODELS,
        help="architecture (default: by data set: "
        + ", ".join(f"{data} {model}" for data, model in MODEL_OF.items())
        + ")",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder of results and checkpoints (default: {folder})",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoints in --out"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the checkpoints of an earlier run in --out"
    )


def _add_training(parser: argparse.ArgumentParser):
    """The settings of a training run; returns their group."""
    settings = parser.add_argument_group("training", "defaults depend on the data set")
    settings.add_argument("--epochs", type=_count, metavar="N")
    settings.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="training rows per step",
    )
    settings.add_argument(
        "--train-rows", type=_count, metavar="N", help="use the first N training rows only"
    )
    settings.add_argument("--optimizer", choices=OPTIMIZERS)
    settings.add_argument("--lr", type=_positive, metavar="X", help="learning rate")
    settings.add_argument(
        "--weight-decay",
        type=_non_negative,
        metavar="X",
        help="of all parameters (but the factors of a BatchEnsemble)",
    )
    settings.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate")
    settings.add_argument("--label-smoothing", type=_fraction, metavar="X")
    settings.add_argument(
        "--pixels",
        choices=PIXELS,
        default="standardized",
        help="scale of the input (default: standardized per channel)",
    )
    settings.add_argument(
        "--augment",
        choices=AUGMENTS,
        help="random shifts and flips of images (default: none, or by recipe)",
    )
    return settings


def _add_factors(settings) -> None:
    """What only a BatchEnsemble has."""
    settings.add_argument(
        "--recipe",
        choices=RECIPES,
        help="of the authors of BatchEnsemble for ResNets on CIFAR: batch_ensemble, 250 epochs; "
        "single, 200. Their rate is 0.1 for batches of 128 rows, in proportion for others; a "
        "BatchEnsemble computes M times as many rows",
    )
    settings.add_argument(
        "--fast-init",
        choices=FAST_INITS,
        help="start of a BatchEnsemble's factors (default: random_sign; normal with --recipe "
        "batch_ensemble)",
    )
    settings.add_argument(
        "--fast-lr-mult",
        type=_positive,
        metavar="X",
        help="learning rate of these factors as a multiple of --lr (default: 1, or by recipe)",
    )
    settings.add_argument(
        "--fast-weight-decay",
        type=_non_negative,
        metavar="X",
        help="of these factors (default: 0)",
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
    parser = _command(
        commands,
        "study",
        registry.study,
        "repeat a paper's comparison",
        "Trains all methods of a study several times, prints a table with standard errors and "
        f"writes it with every run. {'; '.join(lines)}.",
    )
    parser.add_argument("name", choices=registry.STUDIES, metavar="NAME", help="which study")
    parser.add_argument(
        "--size",
        choices=registry.SIZES,
        default="small",
        help="tiny: seconds, to see that it runs; small: minutes (default); full: hours, or a GPU",
    )
    on_files = " and ".join(registry.ON_FILES)
    parser.add_argument(
        "--root", metavar="DIR", help=f"folder of CIFAR-10, for the full size of {on_files}"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results (default: out/NAME)"
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="of all random numbers (default: 0)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON instead of a table"
    )


def _command(commands, name: str, run: Callable, summary: str, description: str):
    parser = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
    parser.set_defaults(run=run, usage_error=parser.error)
    return parser


def _add_members(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--members", type=_count, metavar="M", help="members of each ensemble (default: 4)"
    )


def _add_common(parser: argparse.ArgumentParser, threads: str = "torch's own choice") -> None:
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="of all random numbers (default: 0)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train (default: auto, a GPU where there is one)",
    )
    parser.add_argument(
        "--threads", type=_count, metavar="N", help=f"CPU threads (default: {threads})"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON instead of a table"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


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


def _number(kind: type, rule: str, ok: Callable[[float], bool]) -> Callable[[str], float]:
    """A converter for argparse whose error says the rule."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not ok(value):
            raise argparse.ArgumentTypeError(f"must be {rule}; got {text!r}")
        return value

    return convert


_count = _number(int, "an integer of at least 1", lambda value: value >= 1)
_seed = _number(int, "a non-negative integer", lambda value: value >= 0)
_positive = _number(float, "a number above 0", lambda value: value > 0 and math.isfinite(value))
_non_negative = _number(
    float, "a number of at least 0", lambda value: value >= 0 and math.isfinite(value)
)
_fraction = _number(float, "a number in [0, 1)", lambda value: 0 <= value < 1)
