"""What `landscape-fast demo` and `landscape-fast train` do, from parsed arguments to an exit code.

torch is imported when a command runs, so that the parser can import this module for nothing.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from landscape_fast.studies.presets import METHODS, MODEL_OF, TRAINING

PROGRAM = "landscape-fast"
RUN_FILE = "run.json"  # what a training run was started with
_UNTRAINED = "-epoch-0000.pt"  # end of the name of kept weights in which no work is lost
# Arguments that go into TrainConfig and Problem unchanged, where they are given.
_TRAINING = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "schedule",
    "label_smoothing",
    "fast_lr_mult",
    "fast_weight_decay",
    "member_bias",
    "member_batches",
    "augment",
    "seed",
)
_PROBLEM = ("data", "root", "model", "members", "fast_init", "pixels", "norm", "train_rows")


def demo(args: Namespace) -> int:
    """The three methods on digits, without checkpoints."""
    args.data, args.model, args.method = "digits", "mlp", "all"
    args.threads = args.threads or 1
    return _study(args, checkpoints=None, old=[])


def train(args: Namespace) -> int:
    """One method, or all, on any data set, with checkpoints in the output folder."""
    if args.method == "single" and args.members not in (None, 1):
        args.usage_error(f"argument --members: must be 1 with --method single; got {args.members}")
    if args.method == "batch" and args.keep_every:
        args.usage_error("argument --keep-every: must be left out with --method batch")
    if args.recipe == "batch_ensemble":
        args.fast_init = args.fast_init or "normal"
    return _study(args, *claim_folder(args, args.method))


def claim_folder(args: Namespace, verb: str) -> tuple[Path, list[Path]]:
    """Settles the model and the output folder of a run that keeps checkpoints.

    Returns:
        The folder of its checkpoints, and those of an earlier run that are to be deleted.
    """
    if args.data != "digits" and args.root is None:
        args.usage_error(f"argument --root: must be the folder of the {args.data} files; got none")
    if args.resume and args.overwrite:
        args.usage_error("argument --overwrite: must not be given with --resume")
    args.model = args.model or MODEL_OF[args.data]
    args.out = args.out or Path("out") / f"{args.data}-{verb}"
    checkpoints = args.out / "checkpoints"
    old = sorted(checkpoints.glob("*.pt"))
    if old and not (args.resume or args.overwrite):
        args.usage_error(
            f"argument --out: must be a folder without an earlier run; got {checkpoints} with "
            f"{len(old)} checkpoints; add --resume or --overwrite"
        )
    if args.resume and not old:
        found = f"no checkpoints in {checkpoints}"
        say(f"{PROGRAM} {args.command}: {found}; starting from the beginning")
    described = args.out / RUN_FILE
    old += [described] if old and described.exists() else []
    return checkpoints, old if args.overwrite else []


def say(text: str) -> None:
    """One line for the user that is no result."""
    print(text, file=sys.stderr, flush=True)


def _study(args: Namespace, checkpoints: Path | None, old: list[Path]) -> int:
    """Train, measure, write, print."""
    with prepared(args, old) as (problem, dataset, config, device):
        from landscape_fast.studies.compare import compare
        from landscape_fast.studies.run_folder import describe_training, described

        keep_every = getattr(args, "keep_every", None) or 0
        about = (problem, dataset, config, args.method, keep_every, device)
        with described(args.out, describe_training(*about)) if checkpoints else nullcontext():
            results = compare(
                problem,
                dataset,
                METHODS if args.method == "all" else (args.method,),
                config,
                device=device,
                directory=checkpoints,
                keep_every=keep_every,
                resume=getattr(args, "resume", False),
                progress=not args.quiet,
            )
        return _report(args, results, dataset, problem, config, device)


@contextmanager
def on_device(args: Namespace) -> Iterator[str]:
    """Yields where to compute, from --device, with --threads in force."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        args.usage_error("argument --device: must be auto or cpu where torch sees no GPU; got cuda")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        yield automatic if args.device == "auto" else args.device
    finally:
        torch.set_num_threads(threads)


@contextmanager
def prepared(args: Namespace, old: list[Path]):
    """Yields (Problem, Dataset, TrainConfig, device) of the arguments, with --threads in force.

    `old` checkpoints are deleted once the run has some of its own; see `replacing`.
    """
    from landscape_fast.studies.compare import Problem

    with on_device(args) as device:
        config = _config(args)
        problem = Problem(**_given(args, _PROBLEM))
        args.out.mkdir(parents=True, exist_ok=True)
        dataset = problem.load()
        with replacing(old):
            yield problem, dataset, config, device


@contextmanager
def replacing(old: list[Path]) -> Iterator[None]:
    """Sets checkpoints aside, and puts them back after a run that did not come to write any."""
    aside = {path: path.with_name(f"{path.name}.old") for path in old}
    for path, kept in aside.items():
        path.replace(kept)
    try:
        yield
    finally:
        new = list(old[0].parent.glob("*.pt")) if old else []
        replaced = any(not path.name.endswith(_UNTRAINED) for path in new)
        for path in new if not replaced else []:
            path.unlink()
        for path, kept in aside.items():
            if replaced:
                kept.unlink()
            else:
                kept.replace(path)


def _config(args: Namespace):
    """The recipe, or the settings of the data set, with what was given instead."""
    from landscape_fast.methods import TrainConfig
    from landscape_fast.methods.recipes import RECIPES

    given, recipe = _given(args, _TRAINING), getattr(args, "recipe", None)
    if recipe is None:
        return TrainConfig(**{**TRAINING[args.data], **given})
    return RECIPES[recipe](fresh_rows=given.pop("batch_size", None), **given)


def _report(args, results, dataset, problem, config, device) -> int:
    from landscape_fast.studies import report

    document = report.make_document(results, dataset, problem, config, device)
    paths = report.write_results(args.out, document)
    try:
        paths += report.write_figures(args.out, results, dataset)
    except ImportError as error:
        say(f"{PROGRAM} {args.command}: no figures: {error}")
    if args.json:
        print(report.to_json(document), end="")
        return 0
    print(report.headline(document), report.format_table(document["rows"]), sep="\n\n")
    print("", *(f"- {note}" for note in document["notes"]), sep="\n")
    print(f"\nwrote {', '.join(map(str, paths))}")
    return 0


def _given(args: Namespace, names: tuple[str, ...]) -> dict:
    found = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}
