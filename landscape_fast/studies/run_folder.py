"""What `landscape-fast train` leaves in a folder: described when it starts, rebuilt afterwards."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape_fast.data import Dataset
from landscape_fast.methods import TrainConfig, Trajectories, load_trajectories
from landscape_fast.methods.checkpoint import describe_model, describe_rows, read_checkpoint
from landscape_fast.methods.trajectories import kept_epochs
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.ops._checks import require
from landscape_fast.studies.commands import RUN_FILE
from landscape_fast.studies.compare import Problem
from landscape_fast.studies.report import describe_run, to_json, write_texts

FORMAT = 1
OPENED = ("single", "deep", "all")  # methods whose networks are plain ones, one file each
OP = "open_run"


@dataclass(frozen=True, eq=False)
class RunFolder:
    """Networks that were trained alike, with all that they were trained from.

    Attributes:
        problem: data and architecture.
        dataset: `problem.load()`: pixels as the networks were given them.
        config: the settings of their training.
        networks: R of them, trained to the end, in evaluation mode.
        members: their numbers in the ensemble.
        trajectories: of these networks, or None where not all of them have kept epochs up to the
            last.
        path: the folder, or None.
        notes: what is missing, in sentences.
    """

    problem: Problem
    dataset: Dataset
    config: TrainConfig
    networks: tuple[nn.Module, ...]
    members: tuple[int, ...]
    trajectories: Trajectories | None = None
    path: Path | None = None
    notes: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """An untrained network of the architecture, on the device of the trained ones."""
        network = self.problem.network(self.dataset, ensemble=False)
        return network.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.networks[0].parameters()).device

    @cached_property
    def weights(self) -> Tensor:
        """[R, P], the trained weights, one network per row."""
        return FlatLayout(self.networks[0]).flatten_many(self.networks)

    @cached_property
    def _unit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Test images, and mean and deviation [C] of training images, with pixels in [0, 1]."""
        unit = self.problem.pixels == "unit"
        data = self.dataset if unit else dataclasses.replace(self.problem, pixels="unit").load()
        return data.test_x, *data.channel_statistics()

    @property
    def images(self) -> Tensor:
        """[N, C, H, W], the test images with pixels in [0, 1]."""
        return self._unit[0]

    def inputs(self, images: Tensor) -> Tensor:
        """Images with pixels in [0, 1] as the networks are to be given them.

        Args:
            images: [N, C, H, W], of any data set with this image format.
        """
        if self.problem.pixels == "unit":
            return images
        if self.problem.pixels == "raw":
            return images * (16.0 if self.problem.data == "digits" else 255.0)
        mean, std = (s.to(images.device).view(-1, 1, 1) for s in self._unit[1:])
        return (images - mean) / std


def describe_training(
    problem: Problem,
    dataset: Dataset,
    config: TrainConfig,
    method: str,
    keep_every: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """All that `open_run` needs to rebuild a run, for `run.json`."""
    root = problem.root and str(Path(problem.root).resolve())
    described = describe_run(dataset, dataclasses.replace(problem, root=root), config, device)
    return {
        "format": FORMAT,
        "method": method,
        "keep_every": keep_every,
        **described,
        "network": describe_model(problem.network(dataset, ensemble=False)),
        "training_rows": describe_rows(dataset.train_x, dataset.train_y),
    }


@contextmanager
def described(out: Path, document: dict[str, Any]) -> Iterator[None]:
    """Writes `run.json` before a run; puts an older one back if the run is refused."""
    path = out / RUN_FILE
    older = path.read_text(encoding="utf-8") if path.exists() else None
    write_texts(out, {RUN_FILE: to_json(document)})
    try:
        yield
    except ValueError:
        if older is not None:
            write_texts(out, {RUN_FILE: older})
        raise


def open_run(
    path: str | Path, *, root: str | None = None, device: str | torch.device = "cpu"
) -> RunFolder:
    """The networks, data and settings of a folder that `landscape-fast train` wrote.

    Args:
        path: the folder, of a run with `--method deep`, `single` or `all` (of which the deep
            ensemble is taken). It may have been interrupted: the members that are finished are
            taken.
        root: folder of the data files, where it is no longer the one of the training.
        device: where the networks go.

    Returns:
        RunFolder.

    Raises:
        ValueError: if the folder is no such run, is damaged, was made by other code or data, or has
            no finished network.
        OSError: if the data files are gone; see `landscape_fast.data`.

    Cost: reads the data set and, of every network, its checkpoint and all kept epochs.
    """
    path = Path(path)
    require(path.is_dir(), OP, "path", "a folder that 'landscape-fast train' wrote", path)
    document, source = _read(path)
    method = _method(document, source)
    problem, config = _settings(document, source, root)
    dataset = problem.load()
    model = problem.network(dataset, ensemble=False).to(device)
    for name, now in (
        ("network", describe_model(model)),
        ("training_rows", describe_rows(dataset.train_x, dataset.train_y)),
    ):
        stored = document.get(name, now)  # an older results.json has neither
        remedy = "use the version and the data files that it was trained with, or train again"
        require(stored == now, OP, f"{name} of the run", stored, now, remedy)
    checkpoints = path / "checkpoints"
    count = 1 if method == "single" else problem.members
    build = partial(problem.network, dataset, ensemble=False)
    found, notes = {}, []
    for m in range(count):
        network, why = _network(checkpoints / f"member-{m:03d}.pt", build, config, m, dataset)
        if network is None:
            notes.append(f"member {m + 1} of {count} is left out: {why}")
        else:
            found[m] = network.to(device).eval()
    remedy = "finish the training with --resume"
    got = "; ".join(notes)
    require(len(found) > 0, OP, "path", "a run with a finished network", got, remedy)
    kept = kept_epochs(checkpoints)
    trajectories = None
    if all(config.epochs in kept.get(m, ()) for m in found):  # else they do not reach the end
        trajectories = load_trajectories(checkpoints, model, members=list(found))
    return RunFolder(
        problem, dataset, config, tuple(found.values()), tuple(found), trajectories, path,
        tuple(notes),
    )  # fmt: skip


def _read(path: Path) -> tuple[dict[str, Any], Path]:
    """The description of a run and its file; before there was run.json, results.json had it."""
    rule = f"a folder that 'landscape-fast train' wrote, with {RUN_FILE}"
    below = path / "run"  # where a study keeps its own
    study = not (path / RUN_FILE).exists() and (below / RUN_FILE).exists()
    require(not study, OP, "path", rule, f"{path} without", f"pass {below}")
    for name in (RUN_FILE, "results.json"):
        source = path / name
        if not source.exists():
            continue
        try:
            document = json.loads(source.read_text(encoding="utf-8"))
        except ValueError as error:
            text = f"{OP}: {source} must be complete JSON; got {error}; train again"
            raise ValueError(text) from error
        good = isinstance(document, dict) and {"problem", "training"} <= document.keys()
        good = good and document.get("format", FORMAT) == FORMAT
        rule = f"the description of a training run, format {FORMAT}"
        require(good, OP, str(source), rule, "something else")
        return document, source
    require(False, OP, "path", rule, f"{path} without")


def _method(document: dict[str, Any], source: Path) -> str:
    method = document.get("method")
    if method is None:  # a results.json
        names = {row.get("method") for row in document.get("rows", [])}
        method = next((name for name in ("deep", "single", "batch") if name in names), None)
    remedy = "train with --method deep: members that share weights have no places of their own"
    require(method in OPENED, OP, str(source), f"of a method {OPENED}", repr(method), remedy)
    return method


def _settings(document, source: Path, root: str | None) -> tuple[Problem, TrainConfig]:
    given = dict(document["problem"])
    if root is not None:
        given["root"] = str(root)
    try:
        return Problem(**given), TrainConfig(**document["training"])
    except TypeError as error:
        rule = f"{OP}: {source} must hold settings that this version knows; got {error}"
        raise ValueError(f"{rule}; use the version that trained it") from error


def _network(file: Path, build, config: TrainConfig, member: int, dataset: Dataset):
    """(network, None), or (None, why there is none)."""
    if not file.exists():
        return None, f"no {file.name}"
    identity, state = read_checkpoint(file)
    expected = {**dataclasses.asdict(config), "stream": member, "method": "deep"}
    wrong = [name for name, value in expected.items() if identity.get(name, value) != value]
    rule = "a member of the run"
    require(not wrong, OP, str(file), rule, f"one with another {', '.join(wrong)}", "train again")
    steps = config.epochs * -(-len(dataset.train_y) // config.batch_size)
    if state["step"] < steps:
        return None, f"it is trained for {state['step']} of {steps} steps"
    network = build()
    try:
        network.load_state_dict(state["model"])
    except RuntimeError as error:
        remedy = "use the version that trained it, or train again"
        text = f"{OP}: {file} must hold the tensors of the network; got {error}; {remedy}"
        raise ValueError(text) from error
    if not all(bool(p.isfinite().all()) for p in network.parameters()):
        return None, "its weights are not finite"
    return network, None
