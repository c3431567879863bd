"""Wrong labels on purpose: what a method makes of training rows that are not to be trusted."""

from dataclasses import replace

import torch
from torch import Generator, Tensor

from landscape_fast.data.dataset import Dataset

KINDS = ("including_true", "excluding_true")


def noisy_labels(
    y: Tensor, fraction: float, classes: int, *, seed: int = 0, kind: str = "including_true"
) -> Tensor:
    """A copy of the labels in which a random part is drawn anew, uniformly over the classes.

    Args:
        y: [N] int64 labels.
        fraction: of the rows to draw anew, in [0, 1]; rounded to whole rows.
        classes: C.
        seed: which rows, and their new labels; those of a smaller fraction are among those of a
            larger one.
        kind: "including_true": the true label may be drawn again, so that of a fraction of 0.2 only
            0.18 are wrong with ten classes; what the code of Wortsman et al. does.
            "excluding_true": every one of them is wrong, as their text says.

    Returns:
        [N] int64, on the device of `y`.

    Raises:
        ValueError: if an argument is out of range.

    Source: Wortsman et al. 2021 (arXiv:2102.10472).

    Example:
        >>> y = torch.zeros(1000, dtype=torch.int64)
        >>> int((noisy_labels(y, 0.2, 10, kind="excluding_true") != y).sum())
        200
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"noisy_labels: fraction must be in [0, 1]; got {fraction}")
    if kind not in KINDS:
        raise ValueError(f"noisy_labels: kind must be one of {KINDS}; got {kind!r}")
    first = 0 if kind == "including_true" else 1  # the least that is drawn
    least = first + 1
    if classes < least or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes):
        got = f"{classes} with labels {int(y.min())} to {int(y.max())}" if len(y) else classes
        raise ValueError(
            f"noisy_labels: classes must be at least {least} and above all labels; got {got}"
        )
    generator = Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    chosen = order[: round(fraction * len(y))].to(y.device)
    every = torch.empty(len(y), dtype=torch.int64).random_(first, classes, generator=generator)
    drawn = every[: len(chosen)].to(y.device)
    noisy = y.clone()
    noisy[chosen] = (y[chosen] + drawn) % classes if first else drawn
    return noisy


def with_label_noise(
    dataset: Dataset, fraction: float, *, seed: int = 0, kind: str = "including_true"
) -> Dataset:
    """The data set with `noisy_labels` on its training rows; test rows are left alone."""
    noisy = noisy_labels(dataset.train_y, fraction, len(dataset.classes), seed=seed, kind=kind)
    return replace(dataset, train_y=noisy)
