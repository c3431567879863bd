"""The training runs and measurements of the study of Wortsman et al.: one seed at a time."""

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape_fast.data import Dataset, noisy_labels
from landscape_fast.methods import TrainConfig, fit, predict, train_deep_ensemble
from landscape_fast.methods.averaging import train_swa
from landscape_fast.methods.deep import build_member
from landscape_fast.methods.subspaces import cos2_penalty, train_subspace
from landscape_fast.methods.sweep import sweep
from landscape_fast.metrics.diversity import pair_diversity
from landscape_fast.models import ResNet
from landscape_fast.nn.coefficients import Bezier, Line, Simplex
from landscape_fast.nn.subspace import Subspace
from landscape_fast.ops import ensemble_summary

ECE_BINS = 20  # as the authors


@dataclass(frozen=True)
class Settings:
    """One size of the study.

    Attributes:
        data: "digits" or "cifar10".
        train_rows: to train on, the first ones; the others of digits join the test rows. None: all.
        test_rows: to test on; None for all.
        blocks: residual blocks per stage: 3 make the cResNet20 of the article.
        training: of every network.
        seeds: how many times everything is trained.
        corners: of the simplexes that are trained besides the line.
        positions: networks measured along a line or curve.
        order: of the grid in the triangle: (order + 1) (order + 2) / 2 networks inside, and
            3 * order around it, further from the midpoint than its edges by the factor `outside`.
        outside: that factor.
        smoothing: of the labels; `dropout`: in the blocks; of the networks with these.
        noise: fraction of training labels drawn anew.
        swa_lr: the constant rate of SWA, as a part of the learning rate.
        cycles: of SWA with a cyclic rate.
        rows_per_pass: test rows at a time.
    """

    data: str = "digits"
    train_rows: int | None = None
    test_rows: int | None = None
    blocks: int = 3
    training: TrainConfig = TrainConfig()
    seeds: int = 2
    corners: tuple[int, ...] = (3, 4)
    positions: int = 21
    order: int = 10
    outside: float = 1.4
    smoothing: float = 0.05
    dropout: float = 0.1
    noise: float = 0.2
    swa_lr: float = 0.5
    cycles: int = 5
    rows_per_pass: int = 500


@dataclass
class Lab:
    """Trains and measures the networks of one seed, and keeps what it found.

    Attributes:
        rows: one per network that is compared.
        paths: one row per position of every line and curve.
        triangle: one row per network in and around the triangle.
        facts: name to number, what the criteria need besides.
    """

    dataset: Dataset
    settings: Settings
    config: TrainConfig
    device: str
    folder: Path | None
    progress: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    paths: list[dict[str, Any]] = field(default_factory=list)
    triangle: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dataset = self.dataset.to(self.device)

    def build(self, dropout: float = 0.0) -> nn.Module:
        """An untrained residual network whose head has no bias."""
        options = {"order": "post", "shortcut": "conv_norm", "head_bias": False}
        shape, classes = self.dataset.image, len(self.dataset.classes)
        return ResNet(shape, classes, blocks=self.settings.blocks, dropout=dropout, **options)

    def options(self, name: str) -> dict[str, Any]:
        """What every method takes; a run that was interrupted goes on."""
        folder = None if self.folder is None else self.folder / name
        return {"directory": folder, "resume": True, "progress": self.progress}

    def rows_of(self, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training rows and their labels, or other labels."""
        return self.dataset.train_x, self.dataset.train_y if y is None else y

    # Training.

    def subspace(
        self, name: str, coefficients: Any, y: Tensor | None = None, **changes
    ) -> tuple[Subspace, float]:
        """A trained subspace and the seconds it took; `changes` of the settings by their names."""
        own = {key: changes.pop(key) for key in ("layerwise", "beta") if key in changes}
        found = train_subspace(
            self.build,
            *self.rows_of(y),
            replace(self.config, **changes),
            coefficients=coefficients,
            device=self.device,
            **own,
            **self.options(name),
        )
        return found.subspace, found.seconds[0]

    def independent(self) -> list[nn.Module]:
        """Two networks, measured as such, and what lies halfway between them."""
        x, y = self.rows_of()
        options = {"device": self.device, **self.options("standard")}
        trained = train_deep_ensemble(self.build, x, y, self.config, members=2, **options)
        seconds = trained.seconds
        logits = self.logits(trained.model)
        self.add("standard", logits[:1], seconds[0])
        self.add("two standard", logits, sum(seconds))
        self.facts["standard"] = float(self.score(logits)["member_accuracy"].mean())
        networks = list(trained.model.members)
        between = Subspace(networks[0], networks, Line(), trained=[False, False])
        middle = self.at(between, Line().midpoint()[None])
        self.add("halfway between two standard", middle, sum(seconds))
        return networks

    def regularised(self) -> None:
        """Networks with smoothed labels and with dropout."""
        x, y = self.rows_of()
        options = {"members": 1, "device": self.device}
        smooth = replace(self.config, label_smoothing=self.settings.smoothing)
        for name, build, config in (
            ("label smoothing", self.build, smooth),
            ("dropout", lambda: self.build(self.settings.dropout), self.config),
        ):
            told = self.options(name.replace(" ", "-"))
            trained = train_deep_ensemble(build, x, y, config, **options, **told)
            self.add(name, self.logits(trained.model), trained.seconds[0])

    def averaged(self) -> None:
        """SWA, with the constant and the cyclic rate."""
        settings = {
            "swa_lr": self.settings.swa_lr * self.config.lr,
            "cycles": self.settings.cycles,
            "device": self.device,
        }
        for kind, schedule in (("constant", "hold_linear"), ("cyclic", "cosine")):
            config = replace(self.config, schedule=schedule)
            options = self.options(f"swa-{kind}")
            trained = train_swa(
                self.build, *self.rows_of(), config, kind=kind, **settings, **options
            )
            self.add(f"SWA, {kind} rate", self.logits(trained.model), trained.seconds[0])

    def line(self, name: str, coefficients: Any, **changes) -> None:
        """A line or curve, at all positions, alone and with its mirror image."""
        subspace, seconds = self.subspace(name.replace(" ", "-"), coefficients, **changes)
        S = self.settings.positions
        t = torch.linspace(0, 1, S)
        logits = self.at(subspace, coefficients.at(t))
        for s in range(S):
            both = self.score(torch.stack([logits[s], logits[S - 1 - s]]))
            self.paths.append(
                {
                    "path": name,
                    "t": float(t[s]),
                    "accuracy": float(self.score(logits[s : s + 1])["accuracy"]),
                    "pair_accuracy": float(both["accuracy"]),
                }
            )
        self.add(f"{name}, midpoint", logits[S // 2][None], seconds)
        # the positions nearest to 0.2 and 0.8
        low = round(0.2 * (S - 1))
        self.add(f"{name}, 0.2 and 0.8", logits[[low, S - 1 - low]], seconds)
        self.facts[f"{name}: cos2"] = self.cosine(subspace)
        ends = pair_diversity(logits[[0, -1]])
        self.facts[f"{name}: ends disagree"] = float(ends.mean_disagreement)

    def simplex(self, corners: int) -> None:
        """A simplex at its midpoint; with three corners, all over and around the triangle."""
        name = f"simplex of {corners}"
        subspace, seconds = self.subspace(f"simplex-{corners}", Simplex(corners))
        middle = Simplex(corners).midpoint()[None]
        if corners != 3:
            self.add(f"{name}, midpoint", self.at(subspace, middle), seconds)
            return
        inside, edges = triangle_grid(self.settings.order)
        outside = middle + self.settings.outside * (edges - middle)
        coeffs = torch.cat([middle, inside, outside])
        logits = self.at(subspace, coeffs)
        self.add(f"{name}, midpoint", logits[:1], seconds)
        for i, c in enumerate(coeffs[1:]):
            score = self.score(logits[i + 1 : i + 2])
            place = "inside" if i < len(inside) else "outside"
            weights = dict(zip(("c1", "c2", "c3"), c.tolist(), strict=True))
            self.triangle.append({"place": place, **weights, "accuracy": float(score["accuracy"])})

    def smooth_simplex(self) -> None:
        """Layer-wise, with smoothed labels: the best calibrated of the article."""
        name = "layer-wise simplex of 3, label smoothing"
        changes = {"layerwise": True, "label_smoothing": self.settings.smoothing}
        subspace, seconds = self.subspace("smooth-simplex", Simplex(3), **changes)
        logits = self.at(subspace, Simplex(3).midpoint()[None])
        self.add(f"{name}, midpoint", logits, seconds)

    def noisy(self) -> None:
        """With wrong training labels: one network, epoch by epoch, and a layer-wise line."""
        x, y = self.rows_of()
        seed, classes = self.config.seed, len(self.dataset.classes)
        y = noisy_labels(y, self.settings.noise, classes, seed=seed)
        network = build_member(self.build, self.config, 0, self.device)
        steps = -(-len(y) // self.config.batch_size)
        history = []

        def measure(step: int) -> None:
            if step % steps == 0:
                summary = self.score(self.logits(network))
                history.append(float(summary["accuracy"]))

        # without a checkpoint: what was measured in earlier epochs would be lost
        done = fit(
            network, x, y, self.config, label="noisy labels", progress=self.progress,
            on_step=measure,
        )  # fmt: skip
        seconds = sum(epoch["seconds"] for epoch in done)
        self.add("standard, noisy labels", self.logits(network), seconds)
        self.facts["noisy: best epoch"] = max(history)
        self.facts["noisy: last epoch"] = history[-1]
        name = "layer-wise line, noisy labels"
        subspace, seconds = self.subspace("noisy-line", Line(), y, layerwise=True)
        self.add(f"{name}, midpoint", self.at(subspace, Line().midpoint()[None]), seconds)

    # Measuring.

    def at(self, subspace: Subspace, coeffs: Tensor) -> Tensor:
        """Logits [S, N, C] of the networks at `coeffs` [S, K], each with its own statistics."""
        coeffs = coeffs.to(self.device)
        found = sweep(
            subspace.network(),
            lambda start, stop: subspace.mix(coeffs[start:stop]).detach(),
            len(coeffs),
            self.dataset.test_x,
            self.dataset.test_y,
            statistics="recalibrate",
            calibration=self.dataset.train_x,
            batch_size=self.settings.rows_per_pass,
            keep_logits=True,
            progress=self.progress,
        )
        return found.logits.to(self.device)

    def logits(self, model: nn.Module) -> Tensor:
        """[M, N, C] on the test rows."""
        return predict(model, self.dataset.test_x, batch_size=self.settings.rows_per_pass)

    def score(self, logits: Tensor) -> dict[str, Tensor]:
        """Accuracy, NLL, Brier score and ECE of the mean probability of [M, N, C]."""
        return ensemble_summary(logits, self.dataset.test_y, bins=ECE_BINS)._asdict()

    def add(self, name: str, logits: Tensor, seconds: float) -> None:
        """A row for the ensemble of `logits` [M, N, C]."""
        summary = self.score(logits)
        values = {key: float(summary[key]) for key in ("accuracy", "nll", "brier", "ece")}
        row = {"network": name, "members": len(logits), **values, "seconds": seconds}
        self.rows.append({"seed": self.config.seed, **row})

    @torch.no_grad()
    def cosine(self, subspace: Subspace) -> float:
        """The largest squared cosine of two anchors."""
        pairs = itertools.combinations(range(len(subspace.order)), 2)
        return max(float(cos2_penalty(subspace, pair)) for pair in pairs)

    def everything(self) -> "Lab":
        """All networks of one seed."""
        self.independent()
        self.line("line", Line())
        self.line("line without beta", Line(), beta=0.0)
        self.line("layer-wise line", Line(), layerwise=True)
        self.line("Bezier curve", Bezier(3))
        for corners in self.settings.corners:
            self.simplex(corners)
        self.averaged()
        self.regularised()
        self.smooth_simplex()
        self.noisy()
        return self


def triangle_grid(order: int) -> tuple[Tensor, Tensor]:
    """Points of a triangular grid, [(order + 1)(order + 2) / 2, 3], and those on its edges.

    Example:
        >>> inside, edges = triangle_grid(10)
        >>> len(inside), len(edges)
        (66, 30)
    """
    whole = [(i, j, order - i - j) for i in range(order + 1) for j in range(order + 1 - i)]
    grid = torch.tensor(whole, dtype=torch.float32) / order
    return grid, grid[(grid == 0).any(1)]
