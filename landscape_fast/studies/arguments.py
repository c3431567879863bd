"""Arguments that several commands of the command line have, readable without importing torch."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from landscape_fast.studies.presets import (
    AUGMENTS,
    DATA,
    MODEL_OF,
    MODELS,
    OPTIMIZERS,
    PIXELS,
    SCHEDULES,
)


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


count = _number(int, "an integer of at least 1", lambda value: value >= 1)
seed = _number(int, "a non-negative integer", lambda value: value >= 0)
positive = _number(float, "a number above 0", lambda value: value > 0 and math.isfinite(value))
non_negative = _number(
    float, "a number of at least 0", lambda value: value >= 0 and math.isfinite(value)
)
fraction = _number(float, "a number in [0, 1)", lambda value: 0 <= value < 1)


def add_command(commands, name: str, run: Callable, summary: str, description: str):
    """A command that calls `run(args)`; returns its parser. `args.usage_error(text)` leaves."""
    parser = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
    parser.set_defaults(run=run, usage_error=parser.error)
    return parser


def add_problem(parser: argparse.ArgumentParser, verb: str) -> None:
    """What to train on, and where to keep it: by default in a folder named by data and `verb`."""
    parser.add_argument(
        "--data",
        choices=DATA,
        default="digits",
        help="data set (default: digits, which needs no files)",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the data files, for all but digits"
    )
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
        help=f"folder of results and checkpoints (default: out/DATA-{verb})",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoints in --out"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the checkpoints of an earlier run in --out"
    )


def add_training(parser: argparse.ArgumentParser):
    """The settings of a training run; returns their group."""
    settings = parser.add_argument_group("training", "defaults depend on the data set")
    settings.add_argument("--epochs", type=count, metavar="N")
    settings.add_argument("--batch-size", type=count, metavar="N", help="training rows per step")
    settings.add_argument(
        "--train-rows", type=count, metavar="N", help="use the first N training rows only"
    )
    settings.add_argument("--optimizer", choices=OPTIMIZERS)
    settings.add_argument("--lr", type=positive, metavar="X", help="learning rate")
    settings.add_argument(
        "--weight-decay",
        type=non_negative,
        metavar="X",
        help="of all parameters",
    )
    settings.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate")
    settings.add_argument("--label-smoothing", type=fraction, metavar="X")
    settings.add_argument(
        "--pixels",
        choices=PIXELS,
        default="standardized",
        help="scale of the input (default: standardized per channel)",
    )
    settings.add_argument(
        "--augment",
        choices=AUGMENTS,
        help="random shifts and flips of images (default: none)",
    )
    return settings


def add_common(parser: argparse.ArgumentParser, threads: str = "torch's own choice") -> None:
    """Seed, device, and how results are told."""
    parser.add_argument("--seed", type=seed, metavar="N", help="of all random numbers (default: 0)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train (default: auto, a GPU where there is one)",
    )
    parser.add_argument(
        "--threads", type=count, metavar="N", help=f"CPU threads (default: {threads})"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON instead of a table"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
