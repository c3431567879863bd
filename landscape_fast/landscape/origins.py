"""What makes two runs end in different functions: their first weights, or the order of their rows.

Also whether cycles of one run differ as much as independent runs do.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.trainer import fit, predict
from landscape_fast.ops import pairwise_divergence
from landscape_fast.ops._checks import require, whole

# (stream of the first weights, stream of the order of rows) of the runs compared with run (0, 0).
_CASES = {"same": (0, 0), "shuffle": (0, 1), "init": (1, 0), "both": (1, 1)}


class Origins(NamedTuple):
    """Disagreement of two runs by what they share, at L learning rates, in R repeats.

    Attributes:
        lr: [L] learning rates.
        accuracy: [L, R] of the first run of each, a fraction of the test rows.
        same: [L, R], disagreement of two runs with the same first weights and the same order of
            rows: exactly 0 where training repeats to the bit.
        shuffle: [L, R] with the same first weights and another order of rows.
        init: [L, R] with other first weights and the same order of rows.
        both: [L, R] with nothing in common but the settings.
    """

    lr: Tensor
    accuracy: Tensor
    same: Tensor
    shuffle: Tensor
    init: Tensor
    both: Tensor


class CycleDiversity(NamedTuple):
    """Disagreement between independent runs and between the cycles of one run.

    Attributes:
        between_runs: [pairs], fraction of rows, of all pairs of independent networks.
        between_cycles: [pairs] of all pairs of networks of different cycles of the same run.
    """

    between_runs: Tensor
    between_cycles: Tensor


def init_or_shuffle(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    config: TrainConfig,
    *,
    lrs: Sequence[float],
    repeats: int = 1,
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Origins:
    """The 2x2 of {same, other} first weights and {same, other} order of rows.

    Run (i, s) starts from the weights of stream i of the seed and sees the rows in the order of
    stream s, which is that of its dropout masks and random crops, too. In every repeat run (0, 0)
    is compared with (0, 0) trained once more, (0, 1), (1, 0) and (1, 1).

    Args:
        build: makes an untrained network that maps [B, ...] to [B, C].
        x: [N, ...] training rows.
        y: [N] int64 classes.
        test_x: [N', ...] rows on which labels are compared.
        test_y: [N'] int64 classes.
        config: the settings; `lr` is that of none of the runs.
        lrs: the learning rates, at least one.
        repeats: R, with streams of their own.
        device: where to train.
        directory: folder of the checkpoints; None keeps none.
        resume: continue from the checkpoints found there; finished runs are not trained again.
        progress: show progress.

    Returns:
        `Origins`, float64 on the CPU.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.

    Cost: 5 training runs for each learning rate and repeat.

    Source: Fort, Hu and Lakshminarayanan 2019 (arXiv:1912.02757), figure S4. There the same run
        twice agrees on a TPU, not on a GPU; the kernels of this library add in a fixed order.

    Example:
        >>> x, y = torch.randn(30, 2), torch.arange(30) % 3
        >>> config = TrainConfig(epochs=1, batch_size=10)
        >>> build = lambda: nn.Linear(2, 3)
        >>> init_or_shuffle(build, x, y, x, y, config, lrs=[0.1], progress=False).same
        tensor([[0.]], dtype=torch.float64)
    """
    op = "init_or_shuffle"
    require(len(lrs) >= 1, op, "lrs", "at least one learning rate", list(lrs))
    require(whole(repeats, 1), op, "repeats", "an integer of at least 1", repeats)
    shape = (len(lrs), repeats)
    accuracy = torch.zeros(shape, dtype=torch.float64)
    found = {name: torch.zeros(shape, dtype=torch.float64) for name in _CASES}
    for place, lr in enumerate(lrs):
        settings = replace(config, lr=lr)
        for repeat in range(repeats):

            def labels(name, case, settings=settings, repeat=repeat):
                init, order = (2 * repeat + stream for stream in case)
                network = build_member(build, settings, init, device)
                options = {"progress": progress, "resume": resume, "stream": order}
                options["label"] = f"lr {settings.lr:g}, repeat {repeat + 1}/{repeats}, {name}"
                options["checkpoint"] = _checkpoint(directory, settings.lr, repeat, name)
                options["identity"] = {"init": init, "run": name}
                fit(network, x, y, settings, **options)
                return predict(network, test_x)[0].argmax(-1).cpu()

            first = labels("first", (0, 0))
            accuracy[place, repeat] = (first == test_y.cpu()).double().mean()
            for name, case in _CASES.items():
                found[name][place, repeat] = (labels(name, case) != first).double().mean()
    return Origins(torch.tensor(lrs, dtype=torch.float64), accuracy, **found)


def _checkpoint(directory: Path | None, lr: float, repeat: int, name: str) -> Path | None:
    return directory and Path(directory) / f"lr-{lr:g}-repeat-{repeat}-{name}.pt"


def cycle_diversity(independent: Tensor, cycles: Tensor) -> CycleDiversity:
    """How far the cycles of a cyclical run lie apart, against independent runs.

    Args:
        independent: [R, N, C] logits of R networks trained apart, R at least 2.
        cycles: [R', K, N, C] logits of the networks of K cycles of each of R' runs, K at least 2.

    Returns:
        `CycleDiversity`.

    Raises:
        ValueError: if a shape is another one.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure S5, which compares with cSG-MCMC, Zhang et
        al. 2020 (arXiv:1902.03932).

    Example:
        >>> independent = torch.eye(3)[:, None]  # three networks, one row, all labels differ
        >>> cycles = torch.eye(3)[None, [0, 0], None]  # two cycles that agree
        >>> cycle_diversity(independent, cycles)
        CycleDiversity(between_runs=tensor([1., 1., 1.]), between_cycles=tensor([0.]))
    """
    op = "cycle_diversity"
    ok = independent.ndim == 3 and len(independent) >= 2
    require(ok, op, "independent", "[R, N, C] with R at least 2", list(independent.shape))
    ok = cycles.ndim == 4 and cycles.shape[1] >= 2 and cycles.shape[2:] == independent.shape[1:]
    rule = f"[R', K, N, C] with K at least 2 and [N, C] = {list(independent.shape[1:])}"
    require(ok, op, "cycles", rule, list(cycles.shape))
    pairs = [_pairs(run) for run in cycles]
    return CycleDiversity(_pairs(independent), torch.cat(pairs))


def _pairs(logits: Tensor) -> Tensor:
    """Disagreement of all pairs of the members of [M, N, C]."""
    matrix = pairwise_divergence(logits, "disagreement")
    first, second = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return matrix[first, second]
