"""Deep ensembles: M networks trained independently, each from its own random start."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.checkpoint import describe_model, describe_rows
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep_together import (
    Failure,
    TogetherRun,
    check_network,
    finite_members,
    finite_tensors,
)
from landscape_fast.methods.seeds import isolated_rng, stream_seed
from landscape_fast.methods.splits import Validation, check_rows, hold_out
from landscape_fast.methods.trainer import Diverged, History, Run, training_seconds
from landscape_fast.methods.trajectories import EpochKeeper
from landscape_fast.metrics.diversity import Diagnosis
from landscape_fast.nn.ensemble import DeepEnsemble
from landscape_fast.ops._checks import require, whole

TOGETHER = (False, True, "batched", "loop")
ORDERS = ("own", "shared")


class Trained(NamedTuple):
    """What a method returns.

    Attributes:
        model: maps rows [B, ...] to logits [M, B, C]; in evaluation mode. Without the members that
            failed.
        histories: one per training run: M for a deep ensemble, one for a BatchEnsemble.
        diversity: how the members differ, where the method measures it.
        failed: by number, the members of a deep ensemble whose loss or weights stopped being
            finite.
    """

    model: nn.Module
    histories: list[History]
    diversity: Diagnosis | None = None
    failed: Mapping[int, Failure] = MappingProxyType({})

    @property
    def seconds(self) -> list[float]:
        """Seconds of training of each run, over all its epochs, without evaluation.

        Members trained together share the seconds of an epoch equally.
        """
        return training_seconds(self.histories)


def train_deep_ensemble(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    members: int,
    together: bool | str = False,
    order: str = "own",
    validation: Validation | None = None,
    patience: int = 0,
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    keep_every: int = 0,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Trains M independent networks, in turn or together.

    Member m uses the seed's stream m for its initial weights, the order of its rows and its
    dropout, so it does not depend on M: the first members of a larger ensemble are the smaller
    ensemble, and a single network is the ensemble of `members=1`. Together, all members make a
    step in one pass (`landscape_fast.nn.StackedEnsemble`), each with weights, statistics of norms,
    state of the optimiser, dropout masks and rows of its own: the results are those of training in
    turn, to rounding. (On a GPU the dropout masks of a batched pass are others: they come from one
    stream for all members, so that there they depend on M and on the members that have ended.)

    A member whose loss or weights stop being finite ends, and the others go on: it is left out of
    the model, is warned about, and is found in `Trained.failed`.

    Args:
        build: makes an untrained network that maps [B, ...] to [B, C].
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings, the same for every member.
        members: M.
        together: False trains in turn. True makes one pass for all members where that is faster
            (elsewhere, for convolutions on a CPU and where `fast_parameters()` learn by settings of
            their own, one after another within a step); "batched" and "loop" insist on one or the
            other.
        order: "own": the order of the rows is that of each member's stream; "shared": all members
            see the batches of stream 0, which one pass reads once.
        validation: rows for early stopping: (x, y), or a fraction of the training rows, which then
            are not trained on.
        patience: epochs without a lower loss on the validation rows after which a member ends, with
            the weights of its lowest; the others go on. Then also a member that trains to the end
            has the weights of its lowest loss. 0 for all epochs, and the last weights.
        device: where to train.
        directory: folder of the checkpoints member-000.pt, ..., or together.pt; None keeps none.
        keep_every: E above 0 keeps there the weights of every member before training, after every
            E-th of its epochs and after epoch `config.epochs`, for `load_trajectories`; 0 keeps
            none. A resumed run has the files of one that was not interrupted; one that begins anew
            removes those of an earlier run, of all its members.
        resume: continue from the checkpoints found there; finished members are not trained again.
        progress: show progress.
        on_step: called after every step with the number of steps its run has done.

    Returns:
        Trained: the members that did not fail, and one history per member, failed ones up to the
        epoch before.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`; it is an
            error that all members fail.

    Source: Lakshminarayanan et al. 2017 (arXiv:1612.01474); Fort et al. 2019 (arXiv:1912.02757).
    """
    op = "train_deep_ensemble"
    require(whole(members, 1), op, "members", "an integer of at least 1", members)
    rule = f"one of {TOGETHER}"
    require(together in TOGETHER, op, "together", rule, repr(together))
    require(order in ORDERS, op, "order", f"one of {ORDERS}", repr(order))
    require(whole(patience, 0), op, "patience", "an integer of at least 0", patience)
    both = (validation is None) == (patience == 0)
    require(both, op, "validation", "given exactly where patience is", validation)
    require(whole(keep_every, 0), op, "keep_every", "an integer of at least 0", repr(keep_every))
    rule = "a folder where keep_every is above 0"
    require(not keep_every or directory is not None, op, "directory", rule, directory)
    check_rows(op, x, y)
    held = None
    if validation is not None:
        x, y, *held = hold_out(op, x, y, validation, config.seed)
        held = [t.to(device) for t in held]
    x, y = x.to(device), y.to(device)
    networks = [build_member(build, config, m, device) for m in range(members)]
    options = {"shared": order == "shared", "held": held, "patience": patience, "on_step": on_step}
    folder = None if directory is None else Path(directory)
    if together:
        how = together if isinstance(together, str) else "auto"
        label = f"{members} members together"
        path = folder and folder / "together.pt"
        groups = [(list(range(members)), {"how": how, "label": label, "checkpoint": path})]
    else:
        labels = [f"member {m + 1}/{members}" for m in range(members)]
        labels = labels if members > 1 else ["single network"]
        paths = [folder and folder / f"member-{m:03d}.pt" for m in range(members)]
        groups = [([m], {"label": labels[m], "checkpoint": paths[m]}) for m in range(members)]
    keeper = None
    if keep_every:
        identity = {**asdict(config), "method": "deep", "model": describe_model(networks[0])}
        identity |= {"data": describe_rows(x, y), "order": order, "patience": patience}
        identity["together"] = bool(together)
        keeper = EpochKeeper(folder, keep_every, config.epochs, identity)
        if not resume:
            keeper.clear()
    alone = not together and order == "own" and not patience
    histories, failed = [], {}
    for group, about in groups:
        chosen = [networks[m] for m in group]
        if alone:
            run = Run(chosen[0], x, y, config, group[0], on_step=on_step, **about)
        else:
            check_network(op, chosen[0], x)
            run = TogetherRun(chosen, x, y, config, streams=group, **options, **about)
        run.identity["method"] = "deep"
        if keeper is not None:
            run.keep_epochs(keeper)
        if alone:
            more, lost = _fit(run, resume, progress)
        else:
            run.execute(resume, progress)
            more, lost = run.histories, run.put_back()
        histories += more
        failed |= lost
    return Trained(_survivors(networks, failed), histories, None, failed)


def _fit(run: Run, resume: bool, progress: bool) -> tuple[list[History], dict[int, Failure]]:
    """Histories and failures of one member trained as `fit` does."""
    network, m, epochs = run.model, run.stream, run.config.epochs
    sound = finite_tensors(network.state_dict())
    try:
        run.execute(resume, progress)
    except Diverged as error:
        return [run.history], {m: Failure(len(run.history) + 1, str(error), None)}
    state = network.state_dict()
    if finite_members([state[name][None] for name in sound], 1) == [True]:
        return [run.history], {}
    reason = f"weights not finite in epoch {epochs}"
    return [run.history[:-1]], {m: Failure(epochs, reason, None)}


def _survivors(networks: list[nn.Module], failed: dict[int, Failure]) -> DeepEnsemble:
    """The members that did not fail, and a word about those that did."""
    if len(failed) == len(networks):
        m, first = next(iter(failed.items()))
        raise Diverged(f"train_deep_ensemble: all members failed; member {m}: {first.reason}")
    for m, failure in failed.items():
        text = f"train_deep_ensemble: member {m} failed and is left out: {failure.reason}"
        warnings.warn(text, stacklevel=3)
    return DeepEnsemble([n for m, n in enumerate(networks) if m not in failed]).eval()


def build_member(
    build: Callable[[], nn.Module],
    config: TrainConfig,
    stream: int,
    device: str | torch.device,
    index: int = 0,
) -> nn.Module:
    """An untrained network whose initial weights come from the seed's stream `stream`.

    It is built on the CPU and then moved, so that every device starts from the same weights.
    `index` numbers the networks of one stream.
    """
    with isolated_rng(stream_seed(config.seed, stream, "init", index), torch.device("cpu")):
        return build().to(device)
