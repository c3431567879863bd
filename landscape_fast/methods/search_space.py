"""What a random search draws from: a distribution for every setting, each on its own."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.seeds import stream_seed
from landscape_fast.ops._checks import require

_FIELDS = {field.name: field.type for field in dataclasses.fields(TrainConfig)}


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number between `low` and `high`, every one equally likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        ok = math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high
        require(ok, "Uniform", "low and high", "finite and in order", f"{self.low}, {self.high}")

    def at(self, u: float) -> float:
        """The value below which a share `u` of all draws lies."""
        return self.low + u * (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """A positive number between `low` and `high`, every order of magnitude equally likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        ok = 0 < self.low <= self.high < math.inf
        got = f"{self.low}, {self.high}"
        require(ok, "LogUniform", "low and high", "positive, finite and in order", got)

    def at(self, u: float) -> float:
        """The value below which a share `u` of all draws lies."""
        return min(self.low * (self.high / self.low) ** u, self.high)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of `options`, each equally likely."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        require(len(self.options) >= 1, "Choice", "options", "at least one", self.options)

    def at(self, u: float) -> Any:
        """The option that a share `u` of all draws leads up to."""
        return self.options[min(int(u * len(self.options)), len(self.options) - 1)]


Space = Mapping[str, Uniform | LogUniform | Choice]


def check_space(op: str, space: Space) -> None:
    """Raises unless `space` maps names to distributions, and leaves the seed alone."""
    require(len(space) >= 1, op, "space", "a setting to search or more", dict(space))
    for name, distribution in space.items():
        rule = "of Uniform, LogUniform or Choice"
        known = isinstance(distribution, Uniform | LogUniform | Choice)
        require(known, op, f"space[{name!r}]", rule, repr(distribution))
    rule, remedy = "without the seed", "every trial has its own random stream already"
    require("seed" not in space, op, "space", rule, "seed", remedy)


def draw(space: Space, seed: int, trial: int) -> dict[str, Any]:
    """The settings of trial number `trial`, in the order of `space`.

    A value depends on the seed, the trial and its own name only: a longer search begins with the
    shorter one, and another setting in the space changes no value of the others. Settings that are
    integers in `TrainConfig` are rounded.
    """
    found = {}
    for name, distribution in space.items():
        bits = stream_seed(seed, trial, "search", zlib.crc32(name.encode()))
        value = distribution.at((bits >> 11) * 2.0**-53)
        found[name] = round(value) if _FIELDS.get(name) in (int, "int") else value
    return found


def apply(config: TrainConfig, settings: Mapping[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """The training settings, and what is left: arguments for the function that builds a network."""
    training = {name: value for name, value in settings.items() if name in _FIELDS}
    arguments = {name: value for name, value in settings.items() if name not in _FIELDS}
    return dataclasses.replace(config, **training), arguments
