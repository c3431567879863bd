"""The settings of one training run, checked when they are made."""

import dataclasses
import math

from landscape_fast.ops._checks import whole

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "step", "hold_linear")
MEMBER_BIAS = ("slow", "fast")
MEMBER_BATCHES = ("shared", "own")
AUGMENTS = ("none", "crop_flip")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a network is trained: everything that changes the result, and nothing else.

    Attributes:
        epochs: passes over the training rows.
        batch_size: fresh rows per step, so many of the training rows; the last batch of an epoch
            may be smaller. Each member sees so many: a step of M members computes
            M * batch_size rows, whatever `member_batches` says.
        optimizer: "sgd" (Nesterov where `momentum` > 0), "adam" or "adamw".
        lr: learning rate at the end of the warm-up.
        momentum: of SGD; the other optimisers ignore it.
        weight_decay: of the shared parameters, as the torch optimiser defines it (a Keras
            regulariser l2(c) is `weight_decay=2 * c`).
        schedule: "constant", "cosine" (to 0 at the last step), "step" (times `step_factor`
            after every `step_epochs` epochs, or at `milestones`) or "hold_linear" (`hold_linear`
            with the factor 0.01, a value per epoch: Garipov et al. 2018).
        step_epochs: epochs between two drops of the "step" schedule without milestones.
        step_factor: factor of one drop; or one for each of `milestones`.
        milestones: numbers of finished epochs at which the "step" schedule drops; () for every
            `step_epochs`.
        warmup_epochs: linear rise from 0 at the start; may be a fraction.
        label_smoothing: fraction in [0, 1) of the target spread over all classes.
        fast_lr_mult: learning rate of the factors r and s, as a multiple of `lr`; see
            `landscape_fast.methods.param_groups`.
        fast_weight_decay: of the factors.
        member_bias: "slow" or "fast": whether a bias per member learns with `lr` or with the
            factors' rate.
        member_batches: "shared": every member sees the same batch, which is the default of the
            authors of BatchEnsemble; "own": each member draws its own permutation of all rows, so
            the members see different rows in one step. Plain networks make no difference.
        augment: "none", or "crop_flip" for images: a random shift by up to 4 pixels, with zeros
            where the image ends, and a random flip left to right.
        seed: non-negative; every random stream of the run is derived from it.

    Raises:
        ValueError: if a setting breaks its rule.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    step_epochs: int = 10
    step_factor: float | tuple[float, ...] = 0.5
    milestones: tuple[int, ...] = ()
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    fast_lr_mult: float = 1.0
    fast_weight_decay: float = 0.0
    member_bias: str = "slow"
    member_batches: str = "shared"
    augment: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "step_epochs"):
            self._require(name, whole(getattr(self, name), 1), "an integer of at least 1")
        self._require("seed", whole(self.seed, 0), "a non-negative integer")
        for name in ("milestones", "step_factor"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("lr", "step_factor", "fast_lr_mult"):
            given = getattr(self, name)
            each = given if name == "step_factor" and isinstance(given, tuple) else (given,)
            ok = all(_is_number(number) and number > 0 for number in each)
            self._require(name, ok, "a finite number above 0")
        for name in ("weight_decay", "fast_weight_decay", "warmup_epochs"):
            self._require(
                name,
                _is_number(getattr(self, name)) and getattr(self, name) >= 0,
                "a finite number of at least 0",
            )
        for name in ("momentum", "label_smoothing"):
            self._require(
                name,
                _is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1,
                "a number in [0, 1)",
            )
        self._require(
            "warmup_epochs",
            self.warmup_epochs <= self.epochs,
            "at most epochs",
            f"with epochs {self.epochs}",
        )
        self._require(
            "milestones",
            isinstance(self.milestones, tuple)
            and all(whole(epoch, 1) for epoch in self.milestones)
            and sorted(set(self.milestones)) == list(self.milestones),
            "rising integers of at least 1",
        )
        self._require(
            "milestones",
            not self.milestones or self.schedule == "step",
            "() unless the schedule is 'step'",
            f"with schedule {self.schedule!r}",
        )
        if isinstance(self.step_factor, tuple):
            count = len(self.milestones)
            ok = 0 < count == len(self.step_factor)
            self._require("step_factor", ok, f"a number, or one for each of {count} milestones")
        self._require("optimizer", self.optimizer in OPTIMIZERS, f"one of {OPTIMIZERS}")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {SCHEDULES}")
        for name, known in (
            ("member_bias", MEMBER_BIAS),
            ("member_batches", MEMBER_BATCHES),
            ("augment", AUGMENTS),
        ):
            self._require(name, getattr(self, name) in known, f"one of {known}")

    def _require(self, name: str, ok: bool, rule: str, more: str = "") -> None:
        if not ok:
            got = f"{getattr(self, name)!r} {more}".strip()
            raise ValueError(f"TrainConfig: {name} must be {rule}; got {got}")

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step `step` (counted from 0) as a multiple of `lr`."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "cosine":
            total = self.epochs * steps_per_epoch
            done = (step - warmup) / max(1.0, total - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.schedule == "step":
            epoch = step // steps_per_epoch
            drops = sum(epoch >= milestone for milestone in self.milestones)
            if isinstance(self.step_factor, tuple):
                return math.prod(self.step_factor[:drops])
            return self.step_factor ** (drops if self.milestones else epoch // self.step_epochs)
        if self.schedule == "hold_linear":
            return hold_linear(step // steps_per_epoch / self.epochs, 0.01)
        return 1.0


def hold_linear(part: float, last: float) -> float:
    """1 for the first half of a run, then linear to `last` at nine tenths of it, and so to its end.

    Args:
        part: of the run that is done, from 0 to 1.
        last: the last factor of the learning rate.

    Source: the authors' code for Garipov et al. 2018 (arXiv:1802.10026), and for SWA (Izmailov et
        al. 2018, arXiv:1803.05407), where `last` leads to the constant rate at which it averages.

    Example:
        >>> [round(hold_linear(part, 0.2), 3) for part in (0.0, 0.5, 0.7, 0.9, 1.0)]
        [1.0, 1.0, 0.6, 0.2, 0.2]
    """
    return 1 - (1 - last) * min(max((part - 0.5) / 0.4, 0.0), 1.0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
