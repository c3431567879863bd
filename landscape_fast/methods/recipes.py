"""Published training recipes as `TrainConfig`s, with the batch in plain words.

A recipe whose batch size means something else on another machine cannot be repeated. Here the
batch is given either as `fresh_rows`, the training rows that one step takes, or as `tiled_rows`,
the rows that it computes: members times as many, since every member sees every fresh row. The
learning rate follows the fresh rows: 0.1 for 128 of them, in proportion for others.
"""

import dataclasses
from typing import Any

from landscape_fast.methods.config import TrainConfig
from landscape_fast.ops._checks import require, whole

_FRESH_ROWS = 128
_LR = 0.1  # for 128 fresh rows


def batch_ensemble_recipe(
    *,
    members: int = 4,
    fresh_rows: int | None = None,
    tiled_rows: int | None = None,
    epochs: int = 250,
    l2: float = 3e-4,
    **changes: Any,
) -> TrainConfig:
    """BatchEnsemble of ResNet-20 or WRN-28-10 on CIFAR, as its authors train it.

    SGD with Nesterov momentum 0.9; learning rate 0.1 * fresh_rows / 128 after one epoch of warm-up,
    times 0.2 after 40, 80 and 90 % of the epochs (100, 200 and 225 of 250); random crops and flips.
    The factors, and the biases per member, learn with half the rate; the factors have no weight
    decay. Build the network with r_init="normal" and s_init="normal", N(1, 0.5), for the layers,
    no bias in the convolutions, and norms that the members share.

    Published with it for WRN-28-10 and 4 members: accuracy 96.3 % on CIFAR-10, 81.9 % on
    CIFAR-100; a single network 96.0 % and 79.8 % (`single_recipe`).

    Args:
        members: M, which turns tiled rows into fresh ones.
        fresh_rows: training rows per step, 128 by default: `TrainConfig.batch_size`.
        tiled_rows: instead, M times as many.
        epochs: of the whole run; the schedule stretches with it.
        l2: coefficient c of c * |w|**2 in the loss; the weight decay is 2 * c.
        changes: other settings of `TrainConfig`, which replace those of the recipe.

    Raises:
        ValueError: if both batch sizes are given, the tiled rows are no multiple of the members, or
            a setting breaks its rule.

    Source: the authors' training code for Wen et al. 2020 (arXiv:2002.06715).

    Example:
        >>> config = batch_ensemble_recipe(tiled_rows=256, members=4)
        >>> config.batch_size, config.lr, config.milestones, config.weight_decay
        (64, 0.05, (100, 200, 225), 0.0006)
    """
    op = "batch_ensemble_recipe"
    both = fresh_rows is not None and tiled_rows is not None
    require(not both, op, "fresh_rows", "None where tiled_rows is given", fresh_rows)
    require(whole(members, 1), op, "members", "at least 1", members)
    if tiled_rows is not None:
        rule = f"a positive multiple of members = {members}"
        require(tiled_rows > 0 and tiled_rows % members == 0, op, "tiled_rows", rule, tiled_rows)
        fresh_rows = tiled_rows // members
    fast = {"fast_lr_mult": 0.5, "member_bias": "fast"}
    return _nesterov(fresh_rows, epochs, (0.4, 0.8, 0.9), l2, {**fast, **changes})


def single_recipe(
    *, fresh_rows: int | None = None, epochs: int = 200, l2: float = 2e-4, **changes: Any
) -> TrainConfig:
    """The same authors' recipe for one plain network, and so for a deep ensemble.

    As `batch_ensemble_recipe`, but for 200 epochs, with drops after 30, 60 and 80 % (60, 120 and
    160 of 200) and weight decay 4e-4.
    """
    return _nesterov(fresh_rows, epochs, (0.3, 0.6, 0.8), l2, changes)


def _nesterov(rows: int | None, epochs: int, drops: tuple, l2: float, changes: dict) -> TrainConfig:
    rows = _FRESH_ROWS if rows is None else rows
    recipe = TrainConfig(
        epochs=epochs,
        batch_size=rows,
        optimizer="sgd",
        lr=_LR * rows / _FRESH_ROWS,
        momentum=0.9,
        weight_decay=2 * l2,
        schedule="step",
        step_factor=0.2,
        milestones=tuple(sorted({max(1, round(share * epochs)) for share in drops})),
        warmup_epochs=1,
        augment="crop_flip",
    )
    if changes.get("schedule", "step") != "step":
        changes = {"milestones": (), **changes}
    return dataclasses.replace(recipe, **changes)


RECIPES = {"batch_ensemble": batch_ensemble_recipe, "single": single_recipe}
