"""The way of each network through weight space: weights kept before, during and after training."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.checkpoint import (
    read_checkpoint,
    require_identity,
    save_checkpoint,
)
from landscape_fast.nn._stacked_build import tensors
from landscape_fast.nn.flat import FlatLayout
from landscape_fast.ops._checks import require, whole

State = dict[str, Tensor]
_FILE = re.compile(r"member-(\d{3,})-epoch-(\d{4,})\.pt")


class EpochKeeper:
    """Writes the weights of the networks of a training run after some of its epochs.

    A file appears before the checkpoint of the run says that its epoch is done, so a run that
    resumes from the checkpoint finds or writes again every file of the epochs before.

    Args:
        directory: where the files go, beside the checkpoints.
        every: keeps epoch 0 (before training), every `every`-th epoch, and the last.
        epochs: of the whole run.
        identity: settings (strings and numbers) that all files of the run share.
    """

    def __init__(self, directory: Path, every: int, epochs: int, identity: dict[str, Any]) -> None:
        self.directory, self.every, self.epochs = Path(directory), every, epochs
        self.identity = identity | {"keep_every": every}

    def path(self, member: int, epoch: int) -> Path:
        """The file of a member after an epoch."""
        return self.directory / f"member-{member:03d}-epoch-{epoch:04d}.pt"

    def due(self, epoch: int) -> bool:
        """Whether the weights after this epoch are kept."""
        return epoch % self.every == 0 or epoch == self.epochs

    def write(self, member: int, epoch: int, state: State) -> None:
        """Keeps parameters and buffers of one network, if this epoch is due."""
        if self.due(epoch):
            own = {name: t.detach().to("cpu", copy=True) for name, t in state.items()}
            identity = self.identity | {"member": member, "epoch": epoch}
            save_checkpoint(self.path(member, epoch), identity, own)

    def clear(self) -> None:
        """Removes what an earlier run has left in the folder, of all members."""
        for files in kept_epochs(self.directory).values():
            for path in files.values():
                path.unlink()

    def check(self, member: int, done: int) -> None:
        """Raises unless every file is there that `done` finished epochs of a member have left."""
        missing = [
            self.path(member, epoch)
            for epoch in range(done + 1)
            if self.due(epoch) and not self.path(member, epoch).exists()
        ]
        remedy = "train again without resume"
        rule = "those of a run whose kept epochs are all there"
        got = f"no {missing[0]}" if missing else ""
        require(not missing, "resume", "checkpoints", rule, got, remedy)


class Trajectories(NamedTuple):
    """R networks at T epochs each, on the CPU.

    Attributes:
        members: numbers of the R networks in their ensemble.
        epochs: [T] numbers of finished epochs; 0 is before training.
        weights: [R, T, P], rows of `FlatLayout`.
        buffers: `buffers[r][t]`, by name, those of network r after epoch `epochs[t]`.
    """

    members: tuple[int, ...]
    epochs: tuple[int, ...]
    weights: Tensor
    buffers: list[list[State]]

    @torch.no_grad()
    def network(self, model: nn.Module, r: int, t: int) -> nn.Module:
        """Gives `model` the weights and buffers of network r at epoch `epochs[t]`; returns it."""
        layout, named = FlatLayout(model), tensors(model)
        for name, value in layout.views(self.weights[r, t]).items():
            named[name].copy_(value)
        for name, value in self.buffers[r][t].items():
            named[name].copy_(value)
        return model.eval()


def kept_epochs(directory: str | Path) -> dict[int, dict[int, Path]]:
    """Member to epoch to file, of what a run with `keep_every` has written so far."""
    found: dict[int, dict[int, Path]] = {}
    for path in Path(directory).glob("member-*-epoch-*.pt"):
        match = _FILE.fullmatch(path.name)
        if match:
            member, epoch = map(int, match.groups())
            found.setdefault(member, {})[epoch] = path
    return {m: dict(sorted(found[m].items())) for m in sorted(found)}


def load_trajectories(
    directory: str | Path, model: nn.Module, *, members: Sequence[int] | None = None
) -> Trajectories:
    """What `train_deep_ensemble(..., keep_every=N)` has kept, also of a run that is not finished.

    Args:
        directory: the folder of its checkpoints.
        model: a network of the architecture that was trained; it is not changed.
        members: numbers of the networks to load; None for all that are there.

    Returns:
        Trajectories, at the epochs that all these members have.

    Raises:
        ValueError: if there are none, or none of a member, if a file is damaged or holds another
            architecture, or if the files are those of several runs.

    Cost: R * T files read; R * T * P numbers held.

    Source: the training trajectories of Fort et al. 2019 (arXiv:1912.02757), sections 4.1 and 4.3.

    Example:
        >>> import tempfile
        >>> from landscape_fast.methods import TrainConfig, train_deep_ensemble
        >>> x, y, folder = torch.randn(20, 4), torch.arange(20) % 3, tempfile.mkdtemp()
        >>> options = {"members": 2, "keep_every": 2, "directory": folder, "progress": False}
        >>> config = TrainConfig(epochs=5)
        >>> trained = train_deep_ensemble(lambda: nn.Linear(4, 3), x, y, config, **options)
        >>> found = load_trajectories(folder, nn.Linear(4, 3))
        >>> found.epochs, list(found.weights.shape)
        ((0, 2, 4, 5), [2, 4, 24])
    """
    op = "load_trajectories"
    files = kept_epochs(directory)
    rule = "a folder with kept epochs (member-000-epoch-0000.pt, ...)"
    remedy = "train with keep_every"
    require(len(files) > 0, op, "directory", rule, f"{directory} without", remedy)
    chosen = list(files) if members is None else list(members)
    ok = len(chosen) >= 1 and all(whole(m, 0) and m in files for m in chosen)
    require(ok, op, "members", f"some of {list(files)}", chosen)
    epochs = sorted(set.intersection(*(set(files[m]) for m in chosen)))
    require(len(epochs) > 0, op, "members", "some with kept epochs in common", chosen)
    layout, names = FlatLayout(model), list(tensors(model))
    weights = torch.empty(len(chosen), len(epochs), layout.P, dtype=layout.dtype)
    buffers: list[list[State]] = []
    shared: dict[str, Any] | None = None
    for r, m in enumerate(chosen):
        buffers.append([])
        for t, epoch in enumerate(epochs):
            path = files[m][epoch]
            identity, state = read_checkpoint(path)
            shared = identity if shared is None else shared
            require_identity(path, identity, shared | {"member": m, "epoch": epoch})
            rule = f"a file with the tensors of {type(model).__name__}"
            require(list(state) == names, op, "directory", rule, f"{path} with others")
            weights[r, t] = layout.flatten(state)
            buffers[-1].append({n: state[n] for n in names if n not in layout.names})
    return Trajectories(tuple(chosen), tuple(epochs), weights, buffers)
