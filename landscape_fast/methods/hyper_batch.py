"""Hyper-batch ensembles: one network whose members learn their own L2 penalties while they learn.

Two problems are solved in turn. Training steps fit the weights to training rows, each example with
penalties drawn from its member's distribution; tuning steps move the distributions so that the
ensemble is better on rows held out.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape_fast.methods.checkpoint import describe_rows
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep import Trained, build_member
from landscape_fast.methods.seeds import isolated_rng, stream_seed
from landscape_fast.methods.splits import Validation, hold_out
from landscape_fast.methods.trainer import Run, predict
from landscape_fast.metrics.diversity import diagnose
from landscape_fast.nn.hyper_batch import HyperBatchNetwork, LambdaDistribution
from landscape_fast.ops._checks import require, whole

# Counters of the random streams of purpose "tune"; what each draws.
_ROWS, _TRAINING, _TUNING, _EVALUATION = range(4)


@dataclass(frozen=True)
class Tuning:
    """How the distributions of the penalties are learned.

    Attributes:
        every: training steps before each tuning step.
        lr: learning rate of Adam on the bounds of the distributions.
        entropy: weight of their entropy (nats), which keeps them from shrinking to points.
        batch_size: rows of a tuning step; None for that of training.
        first_epoch: epochs of training before the first tuning step.
        width: half the width of the distributions at the start; see `LambdaDistribution`.
        fast_weights: whether the factors of the members count as part of the penalised weights.

    The defaults are the published ones (Wenzel et al. 2020, for wide residual networks, whose
    penalties lie in [0.1, 100]). Where training takes few steps, a larger `lr` makes the bounds
    move at all, and a larger `width` makes them move in the right direction: the network learns
    what a penalty does only from penalties that differ. A hidden layer in the embedding helps
    (`HyperBatchNetwork(body=...)`), since a linear one cannot tell the penalty's level from its
    effect.
    """

    every: int = 3
    lr: float = 1e-3
    entropy: float = 1e-3
    batch_size: int | None = None
    first_epoch: int = 0
    width: float = 0.2
    fast_weights: bool = False

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("first_epoch", 0)):
            value = getattr(self, name)
            ok = whole(value, least)
            require(ok, "Tuning", name, f"an integer of at least {least}", value)
        size = self.batch_size
        ok = size is None or whole(size, 1)
        require(ok, "Tuning", "batch_size", "None or an integer of at least 1", size)
        for name in ("lr", "width"):
            value = getattr(self, name)
            require(0 < value < math.inf, "Tuning", name, "a finite number above 0", value)
        rule = "a finite number of at least 0"
        require(0 <= self.entropy < math.inf, "Tuning", "entropy", rule, self.entropy)


class HyperBatchEnsemble(nn.Module):
    """A trained hyper-batch ensemble: rows [B, ...] to logits, at penalties of its own choice.

    By default every member answers once, at the mean of its distribution: [M, B, C]. With `samples`
    S it also answers at S penalties drawn from it, the same for all rows and in every call:
    [(1 + S) * M, B, C], the means first.

    Args:
        network: what maps rows and penalties to logits.
        distribution: of the penalties, with as many members.
        samples: S.
        seed: of the draws.
    """

    def __init__(
        self,
        network: HyperBatchNetwork,
        distribution: LambdaDistribution,
        samples: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        ok = whole(samples, 0)
        require(ok, "HyperBatchEnsemble", "samples", "an integer of at least 0", samples)
        self.network, self.distribution = network, distribution
        self.samples, self.seed = samples, seed

    def with_samples(self, samples: int, seed: int = 0) -> "HyperBatchEnsemble":
        """The same ensemble, sharing its parameters, that answers at `samples` draws, too."""
        other = HyperBatchEnsemble(self.network, self.distribution, samples, seed)
        return other.train(self.training)

    def lambdas(self) -> Tensor:
        """[1 + S, M, H]: the means, and the draws."""
        means = self.distribution.mean().unsqueeze(0)
        if not self.samples:
            return means
        seed = stream_seed(self.seed, 0, "tune", _EVALUATION)
        drawn = self.distribution.sample(self.samples, torch.Generator().manual_seed(seed))
        return torch.cat([means, drawn.transpose(0, 1)])

    def forward(self, x: Tensor) -> Tensor:
        rows = (-1, x.shape[0], -1)
        answers = [self.network(x, each.unsqueeze(1).expand(rows)) for each in self.lambdas()]
        return torch.cat(answers)

    def extra_repr(self) -> str:
        return f"samples={self.samples}, seed={self.seed}"


def ensemble_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -ln of the members' mean probability of the true class, nats.

    Args:
        logits: [M, B, C].
        targets: [B] int64 classes.

    Returns:
        A 0-dim tensor; never more than `gibbs_cross_entropy`.

    Example:
        >>> logits = torch.tensor([[[9.0, 9.0]], [[0.0, 0.0]]])
        >>> ensemble_cross_entropy(logits, torch.tensor([0]))  # log 2
        tensor(0.6931)
    """
    picked = logits.log_softmax(-1).gather(-1, targets.expand(logits.shape[0], -1)[..., None])
    return math.log(logits.shape[0]) - picked[..., 0].logsumexp(0).mean()


def train_hyper_batch(
    build: Callable[[], HyperBatchNetwork],
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    validation: Validation = 0.05,
    tuning: Tuning | None = None,
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
    report: bool = True,
) -> Trained:
    r"""Trains one hyper-batch ensemble and the distributions of its penalties.

    A training step draws the penalties :math:`\lambda` of every member and example, and goes down

    .. math::
        \frac1M \sum_m \mathrm{CE}_m(\lambda) + \frac{1}{N} R(\lambda)

    in the weights, R being `HyperBatchNetwork.l2` and N the number of training rows. After every
    `tuning.every` of them a tuning step, on rows held out and in evaluation mode, goes down

    .. math:: \mathrm{CE}(\overline{p}(\lambda)) - \tau H

    in the bounds of the distributions alone, through the draws and through what the layers make of
    them; then the bounds are brought back into their range.

    Args:
        build: makes an untrained `HyperBatchNetwork`.
        x: [N, ...] training rows.
        y: [N] int64 classes.
        config: the settings of the training steps. The factors follow `fast_lr_mult`, 0.5 as
            published; `weight_decay` comes on top of the learned penalties and is usually 0.
        validation: fraction of the rows of each class to hold out for the tuning steps, or rows and
            classes to use instead.
        tuning: the settings of the tuning steps; None for `Tuning()`.
        device: where to train.
        directory: folder of the checkpoint hyper-batch.pt; None keeps none.
        resume: continue from the checkpoint found there.
        progress: show progress.
        on_step: called after every training step with the number of steps done.
        report: measure on the rows held out how the members differ, and print it on the standard
            error stream.

    Returns:
        `Trained`, its model a `HyperBatchEnsemble`, with the report as `diversity`. The history
        has, beside what that of `fit` has (where the loss is the cross-entropy alone): penalty
        (:math:`R / N`, mean over steps), tuning_loss (nats, without the entropy; nan in an epoch
        without a tuning step), entropy (nats) and lambdas, the means over members of the
        distributions' means, by name.

    Raises:
        TrainingInterrupted, ValueError, Diverged: see `landscape_fast.methods.fit`.

    Source: Wenzel et al. 2020 (arXiv:2006.13570), equations 8 and 9, as in the authors' code.
    """
    op, tuning = "train_hyper_batch", tuning or Tuning()
    rule = "'shared': every member sees every row"
    shared = config.member_batches == "shared"
    require(shared, op, "config.member_batches", rule, repr(config.member_batches))
    network = build_member(build, config, 0, device)
    if not isinstance(network, HyperBatchNetwork):
        kind = type(network).__name__
        remedy = "wrap a network of HyperBatchLinear or HyperBatchConv2d layers"
        require(False, op, "build", "a function making a HyperBatchNetwork", kind, remedy)
    train_x, train_y, held_x, held_y = hold_out(op, x, y, validation, config.seed)
    where = next(network.parameters()).device
    with isolated_rng(stream_seed(config.seed, 0, "init", 1), torch.device("cpu")):
        distribution = network.distribution(tuning.width)
    run = _HyperRun(
        network,
        train_x.to(where),
        train_y.to(where),
        config,
        0,
        f"hyper-batch ensemble of {network.members}",
        None if directory is None else Path(directory) / "hyper-batch.pt",
        on_step,
    )
    run.prepare(distribution, tuning, held_x.to(where), held_y.to(where))
    history = run.execute(resume, progress)
    model, diversity = HyperBatchEnsemble(network, distribution).eval(), None
    if report and network.members > 1:
        logits = predict(model, held_x, batch_size=config.batch_size)
        diversity = diagnose(logits, held_y.to(logits.device))
        print(f"{run.label}, on {len(held_y):,} rows held out:", file=sys.stderr)
        print(*(f"- {line}" for line in diversity.lines), sep="\n", file=sys.stderr)
    return Trained(model, [history], diversity)


class _HyperRun(Run):
    """A run whose steps need penalties, with tuning steps between them."""

    def prepare(self, distribution: LambdaDistribution, tuning: Tuning, x: Tensor, y: Tensor):
        self.distribution, self.tuning, self.held_x, self.held_y = distribution, tuning, x, y
        self.tuner = torch.optim.Adam(distribution.parameters(), lr=tuning.lr)
        self.tuned = 0  # tuning steps of the whole run
        self.extra = self._zero_extra()
        self.identity |= {
            "method": "hyper_batch",
            **{f"tuning {name}": value for name, value in asdict(tuning).items()},
            "held out": describe_rows(x, y),
        }

    def _zero_extra(self) -> Tensor:
        # penalty, training steps, tuning loss, tuning steps
        return torch.zeros(4, dtype=torch.float64, device=self.device)

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "distribution": self.distribution.state_dict(),
            "tuner": self.tuner.state_dict(),
            "tuned": self.tuned,
            "extra": self.extra,
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.distribution.load_state_dict(state["distribution"])
        self.tuner.load_state_dict(state["tuner"])
        self.tuned, self.extra = state["tuned"], state["extra"].to(self.device)

    def _draw(self, rows: int, purpose: int, step: int) -> Tensor:
        """[M, rows, H], by a generator of its own for every step: a resumed run needs no state."""
        seed = stream_seed(self.config.seed, self.stream, "tune", purpose, step)
        return self.distribution.sample(rows, torch.Generator().manual_seed(seed))

    def _one_step(self, x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            lambdas = self._draw(y.shape[0], _TRAINING, self.step)
        logits = self.model(x, lambdas)
        penalty = self.model.l2(lambdas, fast_weights=self.tuning.fast_weights)
        penalty = penalty / self.batches.x.shape[0]
        self._descend(logits, y, penalty)
        with torch.no_grad():
            penalty = penalty.double()
            self.extra[:2] += torch.stack([penalty, torch.ones_like(penalty)])
        done, first = self.step + 1, self.tuning.first_epoch * self.steps_per_epoch
        if done > first and done % self.tuning.every == 0:
            self._tune()

    def _tune(self) -> None:
        x, y = self._held_batch()
        self.model.eval()
        try:
            lambdas = self._draw(len(y), _TUNING, self.tuned)
            loss = ensemble_cross_entropy(self.model(x, lambdas), y)
            goal = loss - self.tuning.entropy * self.distribution.entropy()
            bounds = list(self.distribution.parameters())
            for bound, gradient in zip(bounds, torch.autograd.grad(goal, bounds), strict=True):
                bound.grad = gradient
        finally:
            self.model.train()
        self.tuner.step()
        self.distribution.clip_()
        self.tuned += 1
        with torch.no_grad():
            loss = loss.double()
            self.extra[2:] += torch.stack([loss, torch.ones_like(loss)])

    def _held_batch(self) -> tuple[Tensor, Tensor]:
        """The next rows held out; through all of them in a new order again and again."""
        size = min(self.tuning.batch_size or self.config.batch_size, len(self.held_y))
        batches = len(self.held_y) // size  # the rows left over have their turn in another order
        passed, index = divmod(self.tuned, batches)
        seed = stream_seed(self.config.seed, self.stream, "tune", _ROWS, passed)
        order = torch.randperm(len(self.held_y), generator=torch.Generator().manual_seed(seed))
        rows = order[index * size : (index + 1) * size].to(self.held_x.device)
        return self.held_x[rows], self.held_y[rows]

    def _close_epoch(self, epoch: int, lr: float, loss: float, right: float, rows: float) -> None:
        super()._close_epoch(epoch, lr, loss, right, rows)
        penalty, steps, tuning_loss, tuned = self.extra.tolist()
        with torch.no_grad():
            means = self.distribution.mean().mean(0).tolist()
            entropy = float(self.distribution.entropy())
        self.history[-1] |= {
            "penalty": penalty / steps,
            "tuning_loss": tuning_loss / tuned if tuned else math.nan,
            "entropy": entropy,
            "lambdas": dict(zip(self.model.hyperparameters, means, strict=True)),
        }
        self.extra = self._zero_extra()
