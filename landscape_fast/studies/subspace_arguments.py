"""The arguments of `landscape-fast subspace|curve|fge|swag`, readable without importing torch."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from landscape_fast.studies import subspace_commands as run
from landscape_fast.studies.presets import CURVES, CYCLES, SUBSPACES


class Builders(NamedTuple):
    """What the command line has for all its verbs.

    Attributes:
        command: adds a verb: (commands, name, run, summary, description) -> parser.
        problem: adds --data, --root, --model, --out, --resume and --overwrite.
        common: adds --seed, --device, --threads, --json and --quiet.
        training: adds the settings of a training run.
        count: converts an integer of at least 1.
        positive: converts a number above 0, `non_negative` one of at least 0.
    """

    command: Callable
    problem: Callable
    common: Callable
    training: Callable
    count: Callable
    positive: Callable
    non_negative: Callable


def add_subspace(commands, build: Builders) -> None:
    """The verb `subspace`."""
    parser = build.command(
        commands,
        "subspace",
        run.subspace,
        "train a line, curve or simplex of networks in one run",
        "Trains all networks of a subspace at once: every step draws one of them, and its gradient "
        "moves the K anchors that it is mixed from. Measures networks along the line or in the "
        "triangle, and their ensembles (Wortsman et al. 2021).",
    )
    build.problem(parser)
    parser.add_argument(
        "--kind", choices=SUBSPACES, default="line", help="of the subspace (default: line)"
    )
    parser.add_argument(
        "--anchors",
        type=build.count,
        metavar="K",
        help="of a simplex, a Bezier curve or a chain (default: 3); a line has 2",
    )
    parser.add_argument(
        "--layerwise",
        action="store_true",
        help="draw the coefficients of each layer by itself in training",
    )
    parser.add_argument(
        "--beta",
        type=build.non_negative,
        default=1.0,
        metavar="X",
        help="weight of the squared cosine of two anchors in the loss (default: 1)",
    )
    _add_points(parser, build, 21)
    build.common(parser)
    build.training(parser)


def add_curve(commands, build: Builders) -> None:
    """The verb `curve`."""
    parser = build.command(
        commands,
        "curve",
        run.curve,
        "connect two trained networks by a path of low loss",
        "Trains two networks, then the bends of a curve between them, and measures networks along "
        "the curve and along the straight line (Garipov et al. 2018).",
    )
    build.problem(parser)
    parser.add_argument(
        "--kind", choices=CURVES, default="bezier", help="of the curve (default: bezier)"
    )
    parser.add_argument(
        "--bends", type=build.count, default=1, metavar="N", help="trained points (default: 1)"
    )
    parser.add_argument(
        "--curve-epochs", type=build.count, metavar="N", help="of the curve (default: --epochs)"
    )
    parser.add_argument(
        "--curve-lr", type=build.positive, metavar="X", help="of the curve (default: --lr)"
    )
    _add_points(parser, build, 61)
    build.common(parser)
    build.training(parser)


def add_fge(commands, build: Builders) -> None:
    """The verb `fge`."""
    parser = build.command(
        commands,
        "fge",
        run.fge,
        "collect an ensemble along the training of one network",
        "Trains one network with a cyclic learning rate and collects a network in every cycle: "
        "fast geometric ensembling (Garipov et al. 2018), or snapshot ensembles (Huang et al. "
        "2017).",
    )
    build.problem(parser)
    parser.add_argument(
        "--kind", choices=CYCLES, default="fge", help="fge, or snapshot (default: fge)"
    )
    parser.add_argument(
        "--cycles", type=build.count, default=5, metavar="N", help="networks (default: 5)"
    )
    parser.add_argument(
        "--cycle-epochs",
        type=build.count,
        metavar="N",
        help="epochs of a cycle, even for fge (default: 2; a snapshot ensemble divides --epochs)",
    )
    parser.add_argument(
        "--lr-low",
        type=build.positive,
        metavar="X",
        help="smallest rate of an fge cycle (default: a hundredth of --lr)",
    )
    parser.add_argument(
        "--lr-high",
        type=build.positive,
        metavar="X",
        help="largest rate of an fge cycle (default: half of --lr)",
    )
    build.common(parser)
    build.training(parser)


def add_swag(commands, build: Builders) -> None:
    """The verb `swag`."""
    parser = build.command(
        commands,
        "swag",
        run.swag,
        "a Gaussian over weights from the end of one training run",
        "Trains one network, goes on with a constant learning rate, and fits a Gaussian to the "
        "weights it passes: their mean (SWA), and an ensemble of samples (SWAG, Maddox et al. "
        "2019).",
    )
    build.problem(parser)
    parser.add_argument(
        "--collect",
        type=build.count,
        default=20,
        metavar="N",
        help="epochs with a constant rate, a network taken after each (default: 20)",
    )
    parser.add_argument(
        "--swa-lr", type=build.positive, metavar="X", help="that rate (default: half of --lr)"
    )
    parser.add_argument(
        "--rank",
        type=build.count,
        default=20,
        metavar="R",
        help="deviations that are kept (default: 20)",
    )
    parser.add_argument(
        "--samples", type=build.count, default=30, metavar="S", help="networks (default: 30)"
    )
    parser.add_argument(
        "--scale",
        type=build.positive,
        default=0.5,
        metavar="X",
        help="of the covariance (default: 0.5)",
    )
    build.common(parser)
    build.training(parser)


def _add_points(parser: argparse.ArgumentParser, build: Builders, points: int) -> None:
    parser.add_argument(
        "--points",
        type=build.count,
        default=points,
        metavar="N",
        help=f"networks to measure along the path (default: {points})",
    )
