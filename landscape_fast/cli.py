"""The command `landscape-fast`: demo, train, show-config.

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
from landscape_fast.studies.presets import (
    DATA,
    FAST_INITS,
    METHODS,
    MODEL_OF,
    MODELS,
    OPTIMIZERS,
    PIXELS,
    SCHEDULES,
    TRAINING,
)

PROGRAM = "landscape-fast"
# Options of `train` and `demo` that go into TrainConfig unchanged, where they are given.
_TRAINING_OPTIONS = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "label_smoothing",
    "fast_lr_multiplier",
    "seed",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (the process's own if None); returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt as stop:
        _say(f"{PROGRAM}: {str(stop) or 'stopped'}{_how_to_resume(args, argv)}")
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if os.environ.get("LANDSCAPE_FAST_DEBUG") == "1":
            raise
        _say(f"{PROGRAM} {args.command}: error: {error}")
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

    demo = _command(
        commands,
        "demo",
        _demo,
        "train and compare ensembles on digits, in a minute",
        "Trains a single network, a deep ensemble and a BatchEnsemble on the digits of "
        "scikit-learn; prints a table and writes it with three figures.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="folder of the results (default: out)",
    )
    demo.add_argument(
        "--epochs",
        type=_count,
        metavar="N",
        help=f"training epochs (default: {TRAINING['digits']['epochs']})",
    )
    _add_common(demo, "1, networks this small gain nothing from more")

    train = _command(
        commands,
        "train",
        _train,
        "train an ensemble and measure it",
        "Trains on real data and measures on its test rows. Ctrl-C saves a "
        "checkpoint; the same command with --resume continues to the same result.",
    )
    train.add_argument(
        "--data",
        choices=DATA,
        default="digits",
        help="data set (default: digits, which needs no files)",
    )
    train.add_argument("--root", metavar="DIR", help="folder of the files of cifar10 or mnist")
    train.add_argument(
        "--model",
        choices=MODELS,
        help="architecture (default: by data set: "
        + ", ".join(f"{data} {model}" for data, model in MODEL_OF.items())
        + ")",
    )
    train.add_argument(
        "--method",
        choices=(*METHODS, "all"),
        default="deep",
        help="how to train; all: compare the three (default: deep)",
    )
    train.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of results and checkpoints (default: out/DATA-METHOD)",
    )
    train.add_argument(
        "--resume", action="store_true", help="continue from the checkpoints in --out"
    )
    train.add_argument(
        "--overwrite", action="store_true", help="delete the checkpoints of an earlier run in --out"
    )
    _add_common(train, "torch's own choice")
    settings = train.add_argument_group("training", "defaults depend on the data set")
    settings.add_argument("--epochs", type=_count, metavar="N")
    settings.add_argument("--batch-size", type=_count, metavar="N")
    settings.add_argument("--optimizer", choices=OPTIMIZERS)
    settings.add_argument("--lr", type=_positive, metavar="X", help="learning rate")
    settings.add_argument(
        "--weight-decay",
        type=_non_negative,
        metavar="X",
        help="never applied to the factors of a BatchEnsemble",
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
        "--fast-init",
        choices=FAST_INITS,
        default="random_sign",
        help="start of a BatchEnsemble's factors (default: random_sign)",
    )
    settings.add_argument(
        "--fast-lr-multiplier",
        type=_positive,
        metavar="X",
        help="learning rate of these factors as a multiple of --lr (default: 1)",
    )

    show = _command(
        commands,
        "show-config",
        _show_config,
        "print versions, devices and the backend of every op",
        "Prints what this installation consists of and which backend runs each op.",
    )
    show.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _command(commands, name: str, run: Callable, summary: str, description: str):
    parser = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
    parser.set_defaults(run=run, usage_error=parser.error)
    return parser


def _add_common(parser: argparse.ArgumentParser, threads: str) -> None:
    parser.add_argument(
        "--members", type=_count, metavar="M", help="members of each ensemble (default: 4)"
    )
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


def _demo(args: argparse.Namespace) -> int:
    args.data, args.root, args.model, args.method = "digits", None, None, "all"
    args.threads = args.threads or 1
    return _study(args, checkpoints=None)


def _train(args: argparse.Namespace) -> int:
    if args.data != "digits" and args.root is None:
        args.usage_error(f"argument --root: must be the folder of the {args.data} files; got none")
    if args.method == "single" and args.members not in (None, 1):
        args.usage_error(f"argument --members: must be 1 with --method single; got {args.members}")
    if args.resume and args.overwrite:
        args.usage_error("argument --overwrite: must not be given with --resume")
    args.out = args.out or Path("out") / f"{args.data}-{args.method}"
    checkpoints = args.out / "checkpoints"
    old = sorted(checkpoints.glob("*.pt"))
    if args.overwrite:
        for path in old:
            path.unlink()
    elif old and not args.resume:
        args.usage_error(
            f"argument --out: must be a folder without an earlier run; got "
            f"{checkpoints} with {len(old)} checkpoints; add --resume or --overwrite"
        )
    elif args.resume and not old:
        _say(f"{PROGRAM} train: no checkpoints in {checkpoints}; starting from the beginning")
    return _study(args, checkpoints)


def _study(args: argparse.Namespace, checkpoints: Path | None) -> int:
    """What demo and train have in common: train, measure, print, write."""
    args.out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        return _run_study(args, checkpoints)
    finally:
        torch.set_num_threads(threads)


def _run_study(args: argparse.Namespace, checkpoints: Path | None) -> int:
    import torch

    from landscape_fast.methods import TrainConfig
    from landscape_fast.studies import report
    from landscape_fast.studies.compare import Problem, compare

    if args.device == "cuda" and not torch.cuda.is_available():
        args.usage_error("argument --device: must be auto or cpu where torch sees no GPU; got cuda")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = automatic if args.device == "auto" else args.device
    given = {name: getattr(args, name, None) for name in _TRAINING_OPTIONS}
    config = TrainConfig(
        **{
            **TRAINING[args.data],
            **{name: value for name, value in given.items() if value is not None},
        }
    )
    problem = Problem(
        args.data,
        args.root,
        args.model or MODEL_OF[args.data],
        args.members or 4,
        getattr(args, "fast_init", "random_sign"),
        getattr(args, "pixels", "standardized"),
    )
    dataset = problem.load()
    methods = METHODS if args.method == "all" else (args.method,)
    results = compare(
        problem,
        dataset,
        methods,
        config,
        device=device,
        directory=checkpoints,
        resume=getattr(args, "resume", False),
        progress=not args.quiet,
    )
    document = report.make_document(results, dataset, problem, config, device)
    paths = report.write_results(args.out, document)
    try:
        paths += report.write_figures(args.out, results, dataset)
    except ImportError as error:
        _say(f"{PROGRAM} {args.command}: no figures: {error}")
    if args.json:
        print(report.to_json(document), end="")
    else:
        print(report.headline(document), report.format_table(document["rows"]), sep="\n\n")
        print("", *(f"- {note}" for note in document["notes"]), sep="\n")
        print(f"\nwrote {', '.join(map(str, paths))}")
    return 0


def _how_to_resume(args: argparse.Namespace, argv: Sequence[str]) -> str:
    if args.command != "train":
        return ""
    again = [word for word in argv if word != "--overwrite"]
    again += [] if "--resume" in again else ["--resume"]
    return f"\ncontinue with: {PROGRAM} {shlex.join(again)}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
