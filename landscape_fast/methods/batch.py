"""BatchEnsemble: one network whose members share their weights up to rank-1 factors."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import Trained, build_member
from landscape_fast.methods.trainer import count_members, fit, predict
from landscape_fast.metrics.diversity import Diagnosis, diagnose
from landscape_fast.ops._checks import require

_REPORT_ROWS = 1000


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
    test: tuple[Tensor, Tensor] | None = None,
    report: bool = True,
) -> Trained:
    """Trains one BatchEnsemble network, and says how much its members differ.

    The loss is the mean cross-entropy over members and rows. Every member sees every batch, or,
    with `config.member_batches="own"`, batches of its own. The factors r and s get their own
    learning rate and weight decay (`landscape_fast.methods.param_groups`). Members that start
    equal stay equal: start r or s from random signs or a normal distribution. Members that start
    different may still end up nearly identical, on images in particular, which is why a report
    comes with every run.

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
        test: rows and classes that the report is measured on; without them up to 1,000 training
            rows, on which members differ less than on new ones.
        report: measure how the members differ, and print it on the standard error stream.

    Returns:
        `Trained`, with the report as `diversity` where there is one.

    Raises:
        ValueError: if the network has no member dimension.
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Source: Wen et al. 2020 (arXiv:2002.06715). In the authors' code every batch goes to all
    members; their text splits a batch of B rows among the members, which is member_batches="own"
    with batch_size B // M, where one epoch is then M passes over the data in their count.
    """
    network = build_member(build, config, 0, device)
    members = count_members(network, x[:1].to(device))
    require(
        members >= 1,
        "train_batch_ensemble",
        "build",
        "a function making a network that maps [B, ...] to [M, B, C]",
        "one without a member dimension",
        "give its layers members=, or call landscape_fast.nn.convert_",
    )
    path = None if directory is None else Path(directory) / "batch.pt"
    history = fit(
        network,
        x,
        y,
        config,
        label=f"BatchEnsemble of {members}",
        checkpoint=path,
        identity={"method": "batch"},
        resume=resume,
        progress=progress,
        on_step=on_step,
    )
    diversity = None
    if report and members > 1:
        diversity, where = _measure(network, x, y, test, config.batch_size)
        print(f"BatchEnsemble of {members}, on {where}:", file=sys.stderr)
        print(*(f"- {line}" for line in diversity.lines), sep="\n", file=sys.stderr)
    return Trained(network, [history], diversity)


def _measure(network, x, y, test, batch_size) -> tuple[Diagnosis, str]:
    """The diagnosis, and the rows it was made on in words."""
    if test is None:
        step = -(-len(y) // _REPORT_ROWS)
        x, y = x[::step], y[::step]
    else:
        x, y = test
    logits = predict(network, x, batch_size=batch_size)
    where = f"{len(y):,} {'training' if test is None else 'test'} rows"
    return diagnose(logits, y.to(logits.device)), where
