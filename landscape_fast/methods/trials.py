"""Training runs of a search, anywhere an Executor runs them: small to send, saved when done.

A finished trial is a file, so a search that was stopped goes on where it was, and what comes back
from an executor is a word.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.checkpoint import (
    describe_model,
    describe_rows,
    load_checkpoint,
    save_checkpoint,
)
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.trainer import Diverged, fit, predict
from landscape_fast.ops._checks import require

# Random streams of the restarts of a trial lie this far apart; the search itself is restart 0.
STREAMS = 10**6
# torch's random generators belong to the process, so trials in threads of one take turns.
_TURN = threading.Lock()


class Rows(NamedTuple):
    """Rows to train on, and rows to predict."""

    train_x: Tensor
    train_y: Tensor
    held_x: Tensor
    held_y: Tensor


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run: everything that decides its result, and where the result goes.

    Attributes:
        number: of its settings in the search.
        restart: 0 for the search; 1, 2, ... for the same settings from other initial weights.
        config: the training settings.
        arguments: for `build`.
        directory: folder of its files.
    """

    number: int
    restart: int
    config: TrainConfig
    arguments: dict[str, Any]
    directory: Path

    @property
    def stream(self) -> int:
        """Which of the seed's random streams it uses; no two trials share one."""
        return self.number + STREAMS * self.restart

    @property
    def path(self) -> Path:
        """The file of its result."""
        return self.directory / f"trial-{self.number:03d}-{self.restart}.pt"

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"trial {self.number}" + (f", restart {self.restart}" if self.restart else "")


class Work(NamedTuple):
    """A trial as it is sent to an executor; `rows` is their file where memory is not shared."""

    trial: Trial
    build: Callable[..., nn.Module]
    rows: Rows | Path
    device: str
    threads: int
    resume: bool
    stop: threading.Event | None


class _Stopped(Exception):
    """Raised between two steps of a trial in a thread, which Ctrl-C does not reach."""


def run_trial(work: Work) -> str:
    """Trains and saves one trial unless that was done; "done", "diverged" or "interrupted"."""
    with _TURN:
        threads = torch.get_num_threads()
        torch.set_num_threads(work.threads)
        try:
            rows = _read_rows(work.rows) if isinstance(work.rows, Path) else work.rows
            return _run(work, rows)
        except (KeyboardInterrupt, _Stopped):
            return "interrupted"
        finally:
            torch.set_num_threads(threads)


def _run(work: Work, rows: Rows) -> str:
    trial = work.trial

    def on_step(_: int) -> None:
        if work.stop is not None and work.stop.is_set():
            raise _Stopped

    if work.stop is not None and work.stop.is_set():
        return "interrupted"
    network = build_trial(work.build, trial, work.device)
    identity = identify(network, trial, rows)
    if work.resume and trial.path.exists():
        return load_checkpoint(trial.path, identity)["outcome"]
    training = trial.path.with_suffix(".training.pt")
    try:
        history = fit(
            network,
            rows.train_x,
            rows.train_y,
            trial.config,
            stream=trial.stream,
            label=trial.label,
            checkpoint=training,
            identity={"arguments": repr(trial.arguments)},
            resume=work.resume,
            progress=False,
            on_step=on_step,
        )
        logits = predict(network, rows.held_x).cpu()
        require(
            logits.shape[0] == 1,
            "train_hyper_deep",
            "build",
            "a function making a network that maps [B, ...] to [B, C]",
            f"{logits.shape[0]} members",
        )
        outcome = "done" if bool(logits.isfinite().all()) else "diverged"
    except Diverged:
        outcome = "diverged"
    state = {"outcome": outcome}
    if outcome == "done":
        state |= {"logits": logits[0], "model": network.state_dict(), "history": history}
    save_checkpoint(trial.path, identity, state)
    training.unlink(missing_ok=True)
    return outcome


def build_trial(build: Callable[..., nn.Module], trial: Trial, device: str) -> nn.Module:
    """The untrained network of a trial."""
    maker = functools.partial(build, **trial.arguments)
    return build_member(maker, trial.config, trial.stream, device)


def identify(network: nn.Module, trial: Trial, rows: Rows) -> dict[str, Any]:
    """What a result must have come from to be this trial's."""
    return {
        **dataclasses.asdict(trial.config),
        "method": "hyper_deep",
        "arguments": repr(trial.arguments),
        "stream": trial.stream,
        "model": describe_model(network),
        "data": describe_rows(rows.train_x, rows.train_y),
        "held out": describe_rows(rows.held_x, rows.held_y),
    }


def run_trials(works: Sequence[Work], executor: Executor | None) -> Iterator[tuple[int, str]]:
    """Yields (position, outcome) of the trials as they end; in order without an executor.

    Whatever ends it early, what has not begun is cancelled and threads are told to stop; a caller
    that may leave early closes it.
    """
    if executor is None:
        for position, work in enumerate(works):
            yield position, run_trial(work)
        return
    futures = {}
    try:
        for position, work in enumerate(works):
            futures[executor.submit(run_trial, work)] = position
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for work in works:
            if work.stop is not None:
                work.stop.set()
        for future in futures:
            future.cancel()


def shares_memory(executor: Executor | None) -> bool:
    """Whether trials run in this process; other processes read the rows from a file."""
    return executor is None or isinstance(executor, ThreadPoolExecutor)


def write_rows(path: Path, rows: Rows) -> None:
    """Saves the rows for other processes; the file appears complete or not at all."""
    save_checkpoint(path, {}, {"rows": [part.cpu() for part in rows]})


def _read_rows(path: Path) -> Rows:
    return _read_once(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read_once(path: Path, changed: int) -> Rows:
    """A worker process reads the rows once, however many trials it runs."""
    return Rows(*torch.load(path, weights_only=True, mmap=True)["state"]["rows"])
