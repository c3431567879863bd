"""A single network, a deep ensemble and a BatchEnsemble, trained alike and compared on test data.

The single network is the first member of the deep ensemble: it has the same random streams, so it
is trained once and counted in both rows.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape_fast import data as datasets
from landscape_fast import models
from landscape_fast.data import Dataset
from landscape_fast.methods import (
    TrainConfig,
    Trained,
    predict,
    train_batch_ensemble,
    train_deep_ensemble,
)
from landscape_fast.metrics.diversity import PairDiversity, pair_diversity
from landscape_fast.nn import BatchEnsembleConv2d, BatchEnsembleLinear, EnsembleBatchNorm2d
from landscape_fast.ops import ensemble_summary
from landscape_fast.ops._checks import require, whole
from landscape_fast.studies.presets import (
    DATA,
    EVALUATION_ROWS,
    FAST_INITS,
    IMAGENET_PIXELS,
    METHODS,
    MLP,
    MODELS,
    NORMED,
    NORMS,
    PIXELS,
)

_KINDS = {
    "lenet": models.LeNet,
    "small_cnn": models.SmallCNN,
    "medium_cnn": models.MediumCNN,
    "vgg16": models.vgg16,
    "resnet20": models.resnet20,
    "cresnet20": models.cresnet20,
    "preresnet20": partial(models.preresnet, 20),
    "preresnet110": partial(models.preresnet, 110),
    "preresnet164": partial(models.preresnet, 164),
    "wrn_28_10": models.wrn_28_10,
    "resnet50_v2": models.resnet50_v2,
}


def _imagenet(root: str, scale: str) -> Dataset:
    """Images of ImageNet, as many as four fifths of the machine's memory hold."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return datasets.image_folder(
        root, IMAGENET_PIXELS, scale=scale, most_gb=0.8 * memory, name="imagenet"
    )


_LOADERS = {
    "cifar10": datasets.cifar10,
    "cifar100": datasets.cifar100,
    "mnist": datasets.mnist,
    "svhn": datasets.svhn,
    "imagenet": _imagenet,
}


@dataclass(frozen=True)
class Problem:
    """What is compared: data, architecture, and how a BatchEnsemble starts.

    Attributes:
        data: "digits" (part of scikit-learn), "cifar10", "cifar100", "mnist", "svhn" (files in
            `root`) or "imagenet" (folders train/<class>/ and val/<class>/ in `root`, of images
            that are read with 64 pixels along each side, class by class).
        root: folder of the files; unused for digits.
        model: "mlp", "lenet", "small_cnn", "medium_cnn", "vgg16", "resnet20", "cresnet20",
            "preresnet20", "preresnet110", "preresnet164", "wrn_28_10" or "resnet50_v2".
        members: M of both ensembles.
        fast_init: initial values of the factors r and s: "random_sign", "normal" or "ones".
        pixels: "standardized" (mean 0, deviation 1 per channel), "unit" or "raw".
        norm: "shared", one norm for the rows of all members of a BatchEnsemble, or "member", for
            models that have norms.
        train_rows: so many of the training rows, the first ones; None for all.

    Raises:
        ValueError: if a setting is none of these.
    """

    data: str = "digits"
    root: str | None = None
    model: str = "mlp"
    members: int = 4
    fast_init: str = "random_sign"
    pixels: str = "standardized"
    norm: str = "shared"
    train_rows: int | None = None

    def __post_init__(self) -> None:
        normed = self.model in NORMED
        for name, known in (
            ("data", DATA),
            ("model", MODELS),
            ("fast_init", FAST_INITS),
            ("pixels", PIXELS),
            ("norm", NORMS if normed else NORMS[:1]),
        ):
            value = getattr(self, name)
            remedy = f"{self.model} has no norms" if name == "norm" and not normed else None
            require(value in known, "Problem", name, f"one of {known}", repr(value), remedy)
        require(
            whole(self.members, 1),
            "Problem",
            "members",
            "an integer of at least 1",
            self.members,
        )
        require(
            self.data == "digits" or self.root is not None,
            "Problem",
            "root",
            f"the folder of the {self.data} files",
            self.root,
        )

    def load(self) -> Dataset:
        """The data set; see `landscape_fast.data` for the errors of missing and damaged files."""
        scale = "raw" if self.pixels == "raw" else "unit"
        if self.data == "digits":
            loaded = datasets.digits(scale=scale)
        else:
            loaded = _LOADERS[self.data](self.root, scale=scale)
        loaded = loaded.take(train=self.train_rows)
        return loaded.standardized() if self.pixels == "standardized" else loaded

    def network(self, dataset: Dataset, ensemble: bool) -> nn.Module:
        """An untrained network, of plain layers or as a BatchEnsemble."""
        factories = {"linear": nn.Linear, "conv": nn.Conv2d}
        if ensemble:
            options = {"members": self.members, "r_init": self.fast_init, "s_init": self.fast_init}
            factories = {
                "linear": partial(BatchEnsembleLinear, **options),
                "conv": partial(BatchEnsembleConv2d, **options),
            }
        classes = len(dataset.classes)
        if self.model == "mlp":
            return models.MLP(
                dataset.image, classes=classes, linear=factories["linear"], **MLP[self.data]
            )
        if ensemble and self.norm == "member":
            factories["norm"] = partial(EnsembleBatchNorm2d, members=self.members)
        return _KINDS[self.model](dataset.image, classes, **factories)


@dataclass(frozen=True)
class Result:
    """One method, trained and measured on the test rows.

    Attributes:
        row: method, members, accuracy (of the mean of the members' probabilities),
            member_accuracy (mean over members), nll (nats), brier, ece, disagreement and js (means
            over pairs of members; None for one member), mutual_information (nats), parameters,
            seconds (of training).
        logits: [M, N, C] on the test rows, on the CPU.
        pairs: differences between the members.
        histories: one training history per run.
    """

    row: dict[str, Any]
    logits: Tensor
    pairs: PairDiversity
    histories: list[list[dict[str, Any]]]


def compare(
    problem: Problem,
    dataset: Dataset,
    methods: Sequence[str],
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    keep_every: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Result]:
    """Trains the methods on the training rows and measures them on the test rows.

    Args:
        problem: the architecture and the number of members.
        dataset: what `problem.load()` returned.
        methods: of "single", "deep" and "batch".
        config: the settings of every training run.
        device: where to train.
        directory: folder for checkpoints; None keeps none.
        keep_every: of "single" and "deep"; see `train_deep_ensemble`.
        resume: continue from the checkpoints found there.
        progress: show progress.

    Returns:
        Method to result, in the order single, deep, batch.

    Raises:
        TrainingInterrupted, ValueError, RuntimeError: see `landscape_fast.methods.fit`.
    """
    ok = len(methods) >= 1 and set(methods) <= set(METHODS)
    require(ok, "compare", "methods", f"some of {METHODS}", tuple(methods))
    rows = (dataset.train_x, dataset.train_y, config)
    options = {"device": device, "directory": directory, "resume": resume, "progress": progress}
    results, rows_at_once = {}, EVALUATION_ROWS.get(problem.model, 1000)
    if "single" in methods or "deep" in methods:
        trained = train_deep_ensemble(
            partial(problem.network, dataset, ensemble=False),
            *rows,
            members=problem.members if "deep" in methods else 1,
            keep_every=keep_every,
            **options,
        )
        if "single" in methods:
            first = Trained(trained.model.members[0], trained.histories[:1])
            results["single"] = _measure("single", first, dataset, rows_at_once)
        if "deep" in methods:
            results["deep"] = _measure("deep", trained, dataset, rows_at_once)
    if "batch" in methods:
        trained = train_batch_ensemble(
            partial(problem.network, dataset, ensemble=True),
            *rows,
            **options,
            report=False,  # the study measures all methods alike, and its notes say it
        )
        results["batch"] = _measure("batch", trained, dataset, rows_at_once)
    return results


def _measure(method: str, trained: Trained, dataset: Dataset, rows_at_once: int) -> Result:
    logits = predict(trained.model, dataset.test_x, batch_size=rows_at_once)
    summary = ensemble_summary(logits, dataset.test_y.to(logits.device))
    pairs = pair_diversity(logits)
    several = logits.shape[0] > 1
    row = {
        "method": method,
        "members": logits.shape[0],
        "accuracy": float(summary.accuracy),
        "member_accuracy": float(summary.member_accuracy.mean()),
        "nll": float(summary.nll),
        "brier": float(summary.brier),
        "ece": float(summary.ece),
        "disagreement": float(pairs.mean_disagreement) if several else None,
        "js": float(pairs.mean_js) if several else None,
        "mutual_information": float(summary.mutual_information) if several else None,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "seconds": sum(trained.seconds),
    }
    return Result(row, logits.cpu(), pairs, trained.histories)
