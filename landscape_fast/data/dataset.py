"""What every loader returns."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SCALES = ("unit", "raw", "uint8")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, wholly in memory.

    Attributes:
        train_x: [N, C, H, W] images.
        train_y: [N] int64 labels, each the position of a name in `classes`.
        test_x: like `train_x`, [N', C, H, W].
        test_y: [N'].
        classes: the names.
        name: of the data set, for tables and file names.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    name: str

    def __post_init__(self):
        for part, x, y in self._parts():
            if x.ndim != 4 or y.ndim != 1 or len(x) != len(y):
                raise ValueError(
                    f"Dataset: {part}_x and {part}_y must be [N, C, H, W] and [N]; "
                    f"got {list(x.shape)} and {list(y.shape)}"
                )
            if y.dtype != torch.int64:
                raise ValueError(f"Dataset: {part}_y must be int64; got {y.dtype}")
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(self.classes):
                raise ValueError(
                    f"Dataset: {part}_y must be labels from 0 to {len(self.classes) - 1}; "
                    f"got {int(y.min())} to {int(y.max())}"
                )
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(
                "Dataset: test_x must have images of the shape of train_x, "
                f"{list(self.train_x.shape[1:])}; got {list(self.test_x.shape[1:])}"
            )

    @property
    def image(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one image."""
        return tuple(self.train_x.shape[1:])

    def take(self, train: int | None = None, test: int | None = None) -> "Dataset":
        """The first `train` and `test` examples, as views; None keeps all."""
        for argument, wanted, there in (
            ("train", train, len(self.train_y)),
            ("test", test, len(self.test_y)),
        ):
            if wanted is not None and not 0 < wanted <= there:
                raise ValueError(
                    f"Dataset.take: {argument} must be from 1 to the {there} examples there are; "
                    f"got {wanted}"
                )
        return replace(
            self,
            train_x=self.train_x[:train],
            train_y=self.train_y[:train],
            test_x=self.test_x[:test],
            test_y=self.test_y[:test],
        )

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device."""
        moved = {f"{part}_x": x.to(device) for part, x, _ in self._parts()}
        moved |= {f"{part}_y": y.to(device) for part, _, y in self._parts()}
        return replace(self, **moved)

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of `train_x`: two float32 tensors [C].

        In float64 inside, whatever the dtype of the images.
        """
        sums, squares = 0.0, 0.0
        for x in self.train_x.split(1024):  # bounds the float64 copy
            x = x.double()
            sums, squares = sums + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))
        count = self.train_x[:, 0].numel()
        mean = sums / count
        return mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float()

    def standardized(self, mean: Tensor | None = None, std: Tensor | None = None) -> "Dataset":
        """Float32 images with `(x - mean) / std` per channel.

        Args:
            mean: [C], by default that of `train_x`; `std` likewise. Pass those of the training
                data of a network to show it another data set.
        """
        own_mean, own_std = self.channel_statistics()
        mean = own_mean if mean is None else mean
        std = own_std if std is None else std
        if not bool((std > 0).all()):
            raise ValueError(f"Dataset.standardized: std must be positive; got {std.tolist()}")
        mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        done = {f"{part}_x": x.float().sub(mean).div_(std) for part, x, _ in self._parts()}
        return replace(self, **done)

    def _parts(self):
        yield "train", self.train_x, self.train_y
        yield "test", self.test_x, self.test_y


def scaled(pixels: Tensor, scale: str, top: int) -> Tensor:
    """uint8 pixels as a loader's `scale` asks for; `top` is the largest value a pixel can have.

    "unit": float32 in [0, 1]. "raw": float32 in [0, top]. "uint8": as stored, a quarter of the
    memory.
    """
    if scale == "uint8":
        return pixels
    x = pixels.float()
    return x.div_(top) if scale == "unit" else x


def check_scale(op: str, scale: str) -> None:
    """Raises unless `scale` is one of `SCALES`."""
    if scale not in SCALES:
        raise ValueError(
            f"{op}: scale must be one of {', '.join(map(repr, SCALES))}; got {scale!r}"
        )
