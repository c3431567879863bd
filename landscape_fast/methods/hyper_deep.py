"""Hyper-deep ensembles: networks of different settings and different initial weights, selected."""

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.checkpoint import load_checkpoint
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import DeepEnsemble
from landscape_fast.methods.search_space import Space, apply, check_space, draw
from landscape_fast.methods.seeds import isolated_rng
from landscape_fast.methods.selection import OBJECTIVES, Selection, select_members
from landscape_fast.methods.splits import Validation, hold_out
from landscape_fast.methods.trials import (
    STREAMS,
    Rows,
    Trial,
    Work,
    build_trial,
    identify,
    run_trials,
    shares_memory,
    write_rows,
)
from landscape_fast.ops import ensemble_summary
from landscape_fast.ops._checks import require, whole


class WeightedEnsemble(DeepEnsemble):
    """Networks of which some count more than once: rows [B, ...] to logits [sum(weights), B, C].

    The logits of a network of weight w stand there w times, one after the other, so everything that
    averages over members is right without knowing of weights; each network runs once.

    Args:
        members: M networks that map [B, ...] to [B, C].
        weights: M integers of at least 1.
    """

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[int]) -> None:
        super().__init__(members)
        ok = len(weights) == len(self.members) and all(weight >= 1 for weight in weights)
        rule = f"{len(self.members)} integers of at least 1"
        require(ok, "WeightedEnsemble", "weights", rule, list(weights))
        self.register_buffer("weights", torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).repeat_interleave(self.weights, 0)


class HyperDeep(NamedTuple):
    """What `train_hyper_deep` returns.

    Attributes:
        model: the selected networks with their weights, in evaluation mode.
        table: one dictionary per trained network, those of the search first: trial, restart,
            settings (what was drawn; none for trial 0), outcome ("done" or "diverged"), nll (nats),
            accuracy (fraction) and brier on the rows held out, search_weight (how often the search
            alone picked it), weight (how often it counts in `model`), seconds (of training), file
            (see `load_network`; None without a directory).
        search: selection among the networks of the search, members as positions in `table`.
        selection: the selection behind `model`, likewise.
        logits: [P, N, C] on the rows held out, on the CPU; nan where the outcome is "diverged".
        targets: [N], the classes of these rows.
    """

    model: WeightedEnsemble
    table: list[dict[str, Any]]
    search: Selection
    selection: Selection
    logits: Tensor
    targets: Tensor


def load_network(build: Callable[..., nn.Module], row: Mapping[str, Any]) -> nn.Module:
    """The trained network of a row of `HyperDeep.table`, on the CPU, in evaluation mode.

    Args:
        build: what `train_hyper_deep` was given.
        row: of a search with a directory, its outcome "done".
    """
    op, file = "load_network", row["file"]
    require(file is not None, op, "row", "of a search with a directory", "a row without a file")
    require(row["outcome"] == "done", op, "row", "of a trial that ended well", row["outcome"])
    _, arguments = apply(TrainConfig(), row["settings"])
    with isolated_rng(0, torch.device("cpu")):  # what it draws is replaced
        network = build(**arguments)
    content = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(content["state"]["model"])
    return network.eval()


class SearchInterrupted(KeyboardInterrupt):
    """A search was stopped by Ctrl-C; what it had trained is in its directory, if it has one."""


def train_hyper_deep(
    build: Callable[..., nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    space: Space,
    trials: int,
    members: int,
    restarts: int | None = None,
    validation: Validation = 0.1,
    objective: str = "nll",
    keep_search: bool = True,
    executor: Executor | None = None,
    threads: int = 1,
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> HyperDeep:
    """Random search, greedy selection, retraining from other initial weights, selection again.

    Trial 0 has the settings of `config`; the others draw theirs from `space`. The best `members`
    networks by `select_members` are trained again from `restarts` other initial weights each, and
    the ensemble is selected among all of them. Every trial has its own random stream. The result is
    the same with any executor and any number of its workers.

    Args:
        build: makes an untrained network that maps [B, ...] to [B, C]; called with the settings of
            `space` that are no fields of `TrainConfig` as keyword arguments. For processes, a
            function at the top of a module, or a `functools.partial` of one.
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings that `space` leaves alone; the seed of everything.
        space: name to `Uniform`, `LogUniform` or `Choice`: fields of `TrainConfig` (weight_decay,
            lr, label_smoothing, ...) or arguments of `build` (dropout, ...).
        trials: networks of the search.
        members: K, the number of different networks wanted; there may be fewer, see
            `select_members`.
        restarts: other initial weights per selected settings; K by default, 0 ends after the
            search.
        validation: fraction of the rows of each class to hold out for the selection, or rows and
            classes to use instead.
        objective: of the selection; see `select_members`.
        keep_search: whether the last selection may also pick networks of the search; False leaves
            it the retrained ones.
        executor: runs the trials; None runs them here one after the other. Threads take turns, as
            torch's random generators belong to the process: to train several networks at a time
            use a `ProcessPoolExecutor`, on a GPU with `multiprocessing.get_context("spawn")`.
        threads: CPU threads of each trial, wherever it runs; part of the result's last bits.
        device: where to train.
        directory: folder of the trials' files: settings, network, logits on the rows held out; None
            keeps none. Executors of other machines need one that all machines share.
        resume: continue from the files found there; finished trials are not trained again, the
            one that was stopped goes on from its last epoch. A longer search extends a shorter one.
        progress: one line per trial on the standard error stream.

    Returns:
        `HyperDeep`.

    Raises:
        SearchInterrupted: a KeyboardInterrupt; after Ctrl-C.
        ValueError: if an argument breaks its rule, or a file belongs to another search.
        RuntimeError: if the loss of every trial stopped being finite.

    Source: Wenzel et al. 2020 (arXiv:2006.13570), algorithm 1. Whether its last selection is among
    the retrained networks only is not said; the default is all. The stratified step follows a
    public replication: every selected setting from K initial weights.
    """
    op = "train_hyper_deep"
    restarts = members if restarts is None else restarts
    for name, value, least in (
        ("trials", trials, 1),
        ("members", members, 1),
        ("restarts", restarts, 0),
        ("threads", threads, 1),
    ):
        require(whole(value, least), op, name, f"an integer of at least {least}", value)
    require(trials <= STREAMS, op, "trials", f"at most {STREAMS}", trials)
    kinds = tuple(kind for kind in OBJECTIVES if kind != "mse")
    require(objective in kinds, op, "objective", f"one of {kinds}", repr(objective))
    check_space(op, space)
    rows = Rows(*hold_out(op, x, y, validation, config.seed))
    with tempfile.TemporaryDirectory() as temporary:
        search = _Search(
            build=build,
            config=config,
            space=space,
            rows=rows,
            executor=executor,
            threads=threads,
            device=str(device),
            directory=Path(directory or temporary),
            kept=directory is not None,
            resume=resume,
            progress=progress,
        )
        search.train([(number, 0) for number in range(trials)])
        first = search.select(members, objective, lambda trial: True)
        chosen = sorted(search.done[position].number for position in first.members)
        search.train([(number, s) for number in chosen for s in range(1, restarts + 1)])
        last = first
        if restarts:
            allowed = (lambda trial: True) if keep_search else (lambda trial: trial.restart > 0)
            last = search.select(members, objective, allowed)
        return search.finish(first, last)


class _Search:
    """The trials so far, in the order in which they were asked for."""

    def __init__(self, **arguments: Any) -> None:
        self.__dict__.update(arguments)
        self.done: list[Trial] = []
        self.results: list[dict[str, Any]] = []
        self.total = 0

    def trial(self, number: int, restart: int) -> Trial:
        settings = apply(self.config, self.settings(number))
        return Trial(number, restart, *settings, self.directory)

    def train(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Trains the trials (number, restart) and appends them to `done` in this order."""
        new = [self.trial(*pair) for pair in wanted]
        self.total += len(new)
        shared = shares_memory(self.executor)
        file = self.directory / "rows.pt"
        stop = Event() if shared and self.executor is not None else None
        common = (self.device, self.threads, self.resume, stop)
        works = [Work(trial, self.build, self.rows if shared else file, *common) for trial in new]
        outcomes, ended = {}, len(self.done)
        try:
            if not shared and works:
                write_rows(file, self.rows)
            with closing(run_trials(works, self.executor)) as ends:
                for position, outcome in ends:
                    if outcome == "interrupted":
                        raise KeyboardInterrupt
                    outcomes[position] = outcome
                    self.report(new[position], outcome, ended + len(outcomes))
        except KeyboardInterrupt:
            saved = f"saved in {self.directory}" if self.kept else "nothing was saved"
            count = ended + len(outcomes)
            raise SearchInterrupted(
                f"hyper-deep search stopped after {count} of {self.total} trials; {saved}"
            ) from None
        finally:
            file.unlink(missing_ok=True)
        for trial in new:
            self.done.append(trial)
            state = self.load(trial)[1]
            self.results.append({name: state[name] for name in state if name != "model"})

    def load(self, trial: Trial) -> tuple[nn.Module, dict[str, Any]]:
        """What a trial saved: its network, as it began, and the file's content."""
        network = build_trial(self.build, trial, "cpu")
        return network, load_checkpoint(trial.path, identify(network, trial, self.rows))

    def select(self, members: int, objective: str, allowed: Callable[[Trial], bool]) -> Selection:
        """Selection among the trials that ended well, members as positions in `done`."""
        pool = [
            position
            for position, trial in enumerate(self.done)
            if self.results[position]["outcome"] == "done" and allowed(trial)
        ]
        if not pool:
            raise RuntimeError(
                "train_hyper_deep: the loss of one trial or more must stay finite; got none of "
                f"{len(self.done)}; lower the learning rates"
            )
        logits = torch.stack([self.results[position]["logits"] for position in pool])
        size = min(members, len(pool))
        found = select_members(logits, self.rows.held_y.cpu(), size, objective)
        return found._replace(
            members=[pool[member] for member in found.members],
            picks=[pool[member] for member in found.picks],
        )

    def finish(self, first: Selection, last: Selection) -> HyperDeep:
        networks = []
        for position in last.members:
            network, state = self.load(self.done[position])
            network.load_state_dict(state["model"])
            networks.append(network)
        y = self.rows.held_y.cpu()
        good = self.results[last.members[0]]["logits"]
        table, logits = [], []
        for position, (trial, result) in enumerate(zip(self.done, self.results, strict=True)):
            logits.append(result.get("logits", torch.full_like(good, torch.nan)))
            table.append(
                {
                    "trial": trial.number,
                    "restart": trial.restart,
                    "settings": self.settings(trial.number),
                    "outcome": result["outcome"],
                    **_scores(logits[-1], y),
                    "search_weight": first.picks.count(position),
                    "weight": last.picks.count(position),
                    "seconds": sum(epoch["seconds"] for epoch in result.get("history", ())),
                    "file": str(trial.path) if self.kept else None,
                }
            )
        model = WeightedEnsemble(networks, last.weights).to(self.device).eval()
        return HyperDeep(model, table, first, last, torch.stack(logits), y)

    def settings(self, number: int) -> dict[str, Any]:
        """What was drawn; nothing for trial 0, which has the configuration as it was given."""
        return draw(self.space, self.config.seed, number) if number else {}

    def report(self, trial: Trial, outcome: str, count: int) -> None:
        if self.progress:
            values = self.settings(trial.number).items()
            drawn = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values]
            print(
                f"{trial.label} {outcome} ({count} of {self.total}): "
                f"{', '.join(drawn) or 'settings as given'}",
                file=sys.stderr,
                flush=True,
            )


def _scores(logits: Tensor, y: Tensor) -> dict[str, float]:
    found, bad = ensemble_summary(logits[None].double(), y), bool(logits.isnan().any())
    names = ("nll", "accuracy", "brier")
    return {name: math.nan if bad else float(getattr(found, name)) for name in names}
