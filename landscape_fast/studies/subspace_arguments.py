"""The arguments of `landscape-fast subspace|curve|fge|swag`, readable without importing torch."""

import argparse

from landscape_fast.studies import subspace_commands as run
from landscape_fast.studies.arguments import (
    add_command,
    add_common,
    add_problem,
    add_training,
    count,
    non_negative,
    positive,
)
from landscape_fast.studies.presets import CURVES, CYCLES, SUBSPACES


def add_subspace(commands) -> None:
    """The verb `subspace`."""
    parser = add_command(
        commands,
        "subspace",
        run.subspace,
        "train a line, curve or simplex of networks in one run",
        "Trains all networks of a subspace at once: every step draws one of them, and its gradient "
        "moves the K anchors that it is mixed from. Measures networks along the line or in the "
        "triangle, and their ensembles (Wortsman et al. 2021).",
    )
    add_problem(parser, "subspace")
    parser.add_argument(
        "--kind", choices=SUBSPACES, default="line", help="of the subspace (default: line)"
    )
    parser.add_argument(
        "--anchors",
        type=count,
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
        type=non_negative,
        default=1.0,
        metavar="X",
        help="weight of the squared cosine of two anchors in the loss (default: 1)",
    )
    _add_points(parser, 21)
    add_common(parser)
    add_training(parser)


def add_curve(commands) -> None:
    """The verb `curve`."""
    parser = add_command(
        commands,
        "curve",
        run.curve,
        "connect two trained networks by a path of low loss",
        "Trains two networks, then the bends of a curve between them, and measures networks along "
        "the curve and along the straight line (Garipov et al. 2018).",
    )
    add_problem(parser, "curve")
    parser.add_argument(
        "--kind", choices=CURVES, default="bezier", help="of the curve (default: bezier)"
    )
    parser.add_argument(
        "--bends", type=count, default=1, metavar="N", help="trained points (default: 1)"
    )
    parser.add_argument(
        "--curve-epochs", type=count, metavar="N", help="of the curve (default: --epochs)"
    )
    parser.add_argument(
        "--curve-lr", type=positive, metavar="X", help="of the curve (default: --lr)"
    )
    _add_points(parser, 61)
    add_common(parser)
    add_training(parser)


def add_fge(commands) -> None:
    """The verb `fge`."""
    parser = add_command(
        commands,
        "fge",
        run.fge,
        "collect an ensemble along the training of one network",
        "Trains one network with a cyclic learning rate and collects a network in every cycle: "
        "fast geometric ensembling (Garipov et al. 2018), or snapshot ensembles (Huang et al. "
        "2017), which need the schedule cosine and have it by default.",
    )
    add_problem(parser, "fge")
    parser.add_argument(
        "--kind", choices=CYCLES, default="fge", help="fge, or snapshot (default: fge)"
    )
    parser.add_argument(
        "--cycles", type=count, default=5, metavar="N", help="networks (default: 5)"
    )
    parser.add_argument(
        "--cycle-epochs",
        type=count,
        metavar="N",
        help="epochs of an fge cycle, with an even number of steps (default: 2); those of a "
        "snapshot ensemble share --epochs equally",
    )
    parser.add_argument(
        "--lr-low",
        type=positive,
        metavar="X",
        help="smallest rate of an fge cycle (default: a hundredth of --lr)",
    )
    parser.add_argument(
        "--lr-high",
        type=positive,
        metavar="X",
        help="largest rate of an fge cycle (default: half of --lr)",
    )
    add_common(parser)
    add_training(parser)


def add_swag(commands) -> None:
    """The verb `swag`."""
    parser = add_command(
        commands,
        "swag",
        run.swag,
        "a Gaussian over weights from the end of one training run",
        "Trains one network, with a constant learning rate in its last epochs, and fits a Gaussian "
        "to the weights it passes there: their mean (SWA), and an ensemble of samples (SWAG, "
        "Maddox et al. 2019). Needs the schedule hold_linear, and has it by default.",
    )
    add_problem(parser, "swag")
    parser.add_argument(
        "--collect",
        type=count,
        default=20,
        metavar="N",
        help="last epochs, with a constant rate; a network is taken after each (default: 20)",
    )
    parser.add_argument(
        "--swa-lr", type=positive, metavar="X", help="that rate (default: half of --lr)"
    )
    parser.add_argument(
        "--rank",
        type=count,
        default=20,
        metavar="R",
        help="deviations that are kept (default: 20)",
    )
    parser.add_argument(
        "--samples", type=count, default=30, metavar="S", help="networks (default: 30)"
    )
    parser.add_argument(
        "--scale",
        type=positive,
        default=0.5,
        metavar="X",
        help="of the covariance (default: 0.5)",
    )
    add_common(parser)
    add_training(parser)


def _add_points(parser: argparse.ArgumentParser, points: int) -> None:
    parser.add_argument(
        "--points",
        type=count,
        default=points,
        metavar="N",
        help=f"networks to measure along the path (default: {points})",
    )
