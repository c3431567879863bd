"""Deep ensembles: M networks trained independently, each from its own random start."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.landscape.diversity import Diagnosis
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.seeds import isolated_rng, stream_seed
from landscape_fast.methods.trainer import History, fit
from landscape_fast.nn.ensemble import DeepEnsemble
from landscape_fast.ops._checks import require, whole


class Trained(NamedTuple):
    """What a method returns.

    Attributes:
        model: maps rows [B, ...] to logits [M, B, C]; in evaluation mode.
        histories: one per training run: M for a deep ensemble, one for a BatchEnsemble.
        diversity: how the members differ, where the method measures it.
    """

    model: nn.Module
    histories: list[History]
    diversity: Diagnosis | None = None

    @property
    def seconds(self) -> list[float]:
        """Seconds of training of each run, over all its epochs, without evaluation."""
        return [sum(epoch["seconds"] for epoch in history) for history in self.histories]


def train_deep_ensemble(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    members: int,
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Trains M independent networks in turn.

    Member m uses the seed's stream m for its initial weights, the order of its rows and its
    dropout, so it does not depend on M: the first members of a larger ensemble are the smaller
    ensemble, and a single network is the ensemble of `members=1`.

    Args:
        build: makes an untrained network that maps [B, ...] to [B, C].
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings, the same for every member.
        members: M.
        device: where to train.
        directory: folder of the checkpoints member-000.pt, ...; None keeps none.
        resume: continue from the checkpoints found there; finished members are not trained again.
        progress: show progress.
        on_step: called after every step with the number of steps its member has done.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Source: Lakshminarayanan et al. 2017 (arXiv:1612.01474); Fort et al. 2019 (arXiv:1912.02757).
    """
    require(
        whole(members, 1),
        "train_deep_ensemble",
        "members",
        "an integer of at least 1",
        members,
    )
    networks, histories = [], []
    for m in range(members):
        network = build_member(build, config, m, device)
        label = f"member {m + 1}/{members}" if members > 1 else "single network"
        path = None if directory is None else Path(directory) / f"member-{m:03d}.pt"
        histories.append(
            fit(
                network,
                x,
                y,
                config,
                stream=m,
                label=label,
                checkpoint=path,
                identity={"method": "deep"},
                resume=resume,
                progress=progress,
                on_step=on_step,
            )
        )
        networks.append(network)
    return Trained(DeepEnsemble(networks).eval(), histories)


def build_member(
    build: Callable[[], nn.Module], config: TrainConfig, stream: int, device: str | torch.device
) -> nn.Module:
    """An untrained network whose initial weights come from the seed's stream `stream`.

    It is built on the CPU and then moved, so that every device starts from the same weights.
    """
    with isolated_rng(stream_seed(config.seed, stream, "init"), torch.device("cpu")):
        return build().to(device)
