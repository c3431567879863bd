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
        between_runs: [pairs], fraction of rows, of networks of different runs and cycles.
        between_cycles: [pairs] of networks of different cycles of the same run.
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
                file = f"lr-{settings.lr:g}-repeat-{repeat}-{name}.pt"
                options["checkpoint"] = None if directory is None else Path(directory) / file
                options["identity"] = {"init": init, "run": name}
                fit(network, x, y, settings, **options)
                return predict(network, test_x)[0].argmax(-1).cpu()

            first = labels("first", (0, 0))
            accuracy[place, repeat] = (first == test_y.cpu()).double().mean()
            for name, case in _CASES.items():
                found[name][place, repeat] = (labels(name, case) != first).double().mean()
    return Origins(torch.tensor(lrs, dtype=torch.float64), accuracy, **found)


def cycle_diversity(logits: Tensor) -> CycleDiversity:
    """How far the cycles of a cyclical run lie apart, against networks of independent runs.

    Networks of a later cycle are trained longer, so both sides hold the same pairs of cycles: two
    different ones, of the same run or of different runs.

    Args:
        logits: [R, K, N, C] of the networks that R runs kept at the ends of their K cycles, R and K
            at least 2.

    Returns:
        `CycleDiversity`, on the CPU.

    Raises:
        ValueError: if the shape is another one.

    Source: Fort et al. 2019 (arXiv:1912.02757), figure S5, which compares with cSG-MCMC, Zhang et
        al. 2020 (arXiv:1902.03932).

    Example:
        >>> labels = torch.tensor([[0, 0], [1, 1]])  # one row; a run does not change its mind
        >>> cycle_diversity(torch.nn.functional.one_hot(labels)[:, :, None].float())
        CycleDiversity(between_runs=tensor([1., 1.]), between_cycles=tensor([0., 0.]))
    """
    ok = logits.ndim == 4 and min(logits.shape[:2]) >= 2
    rule = "[R, K, N, C] with R and K at least 2"
    require(ok, "cycle_diversity", "logits", rule, list(logits.shape))
    R, K = logits.shape[:2]
    matrix = pairwise_divergence(logits.flatten(0, 1), "disagreement").cpu()
    first, second = torch.triu_indices(R * K, R * K, 1)
    apart = matrix[first, second]
    same_run, same_cycle = first // K == second // K, first % K == second % K
    return CycleDiversity(apart[~same_run & ~same_cycle], apart[same_run])
