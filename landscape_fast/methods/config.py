"""The settings of one training run, checked when they are made."""

import dataclasses
import math

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "step")
MEMBER_BIAS = ("slow", "fast")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a network is trained: everything that changes the result, and nothing else.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows per step; the last batch of an epoch may be smaller.
        optimizer: "sgd" (Nesterov where `momentum` > 0), "adam" or "adamw".
        lr: learning rate at the end of the warm-up.
        momentum: of SGD; the other optimisers ignore it.
        weight_decay: of the shared parameters, as the torch optimiser defines it (a Keras
            regulariser l2(c) is `weight_decay=2 * c`).
        schedule: "constant", "cosine" (to 0 at the last step) or "step" (times `step_factor`
            every `step_epochs` epochs).
        step_epochs: epochs between two drops of the "step" schedule.
        step_factor: factor of one drop.
        warmup_epochs: linear rise from 0 at the start; may be a fraction.
        label_smoothing: fraction in [0, 1) of the target spread over all classes.
        fast_lr_mult: learning rate of the factors r and s, as a multiple of `lr`; see
            `landscape_fast.methods.param_groups`.
        fast_weight_decay: of the factors.
        member_bias: "slow" or "fast": whether a bias per member learns with `lr` or with the
            factors' rate.
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
    step_factor: float = 0.5
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    fast_lr_mult: float = 1.0
    fast_weight_decay: float = 0.0
    member_bias: str = "slow"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "step_epochs"):
            self._require(name, _is_int(getattr(self, name), 1), "an integer of at least 1")
        self._require("seed", _is_int(self.seed, 0), "a non-negative integer")
        for name in ("lr", "step_factor", "fast_lr_mult"):
            self._require(
                name,
                _is_number(getattr(self, name)) and getattr(self, name) > 0,
                "a finite number above 0",
            )
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
        self._require("optimizer", self.optimizer in OPTIMIZERS, f"one of {OPTIMIZERS}")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {SCHEDULES}")
        self._require("member_bias", self.member_bias in MEMBER_BIAS, f"one of {MEMBER_BIAS}")

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
            return self.step_factor ** (step // steps_per_epoch // self.step_epochs)
        return 1.0


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
