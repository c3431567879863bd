"""BatchEnsemble: one network whose members share their weights up to rank-1 factors."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import Trained, build_member
from landscape_fast.methods.trainer import fit
from landscape_fast.ops._checks import require


def train_batch_ensemble(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Trained:
    """Trains one BatchEnsemble network; every member sees every batch.

    The loss is the mean cross-entropy over members and rows. The factors r and s get their own
    learning rate and no weight decay (`landscape_fast.methods.param_groups`). Members that start
    equal stay equal: start r or s from random signs or a normal distribution.

    Args:
        build: makes an untrained network that maps [B, ...] to [M, B, C].
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings.
        device: where to train.
        directory: folder of the checkpoint batch.pt; None keeps none.
        resume: continue from the checkpoint found there.
        progress: show progress.
        on_step: called after every step with the number of steps done.

    Raises:
        ValueError: if the network has no member dimension.
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Source: Wen et al. 2020 (arXiv:2002.06715); every batch goes to all members, as in the authors'
    code.
    """
    network = build_member(build, config, 0, device)
    with torch.no_grad():
        network.eval()
        shape = list(network(x[:1].to(device)).shape)
    require(
        len(shape) == 3,
        "train_batch_ensemble",
        "build",
        "a function making a network that maps [B, ...] to [M, B, C]",
        f"output {shape}",
        "give its layers members=, or call landscape_fast.nn.convert_",
    )
    path = None if directory is None else Path(directory) / "batch.pt"
    history = fit(
        network,
        x,
        y,
        config,
        label=f"BatchEnsemble of {shape[0]}",
        checkpoint=path,
        identity={"method": "batch"},
        resume=resume,
        progress=progress,
        on_step=on_step,
    )
    return Trained(network, [history])
