"""Which rows a step sees, and how they are changed on the way: shared or own batches, random crops.

Everything random here depends on the seed, the stream and the epoch only, and is drawn on the CPU:
every device sees the same batches, and a resumed run needs no stored state.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.seeds import epoch_order, stream_seed
from landscape_fast.ops._checks import require

CROP_PADDING = 4


class Batches:
    """The batches of a run, epoch by epoch.

    Args:
        x: [N, ...] rows, on the device where they are used.
        y: [N] targets.
        config: the settings that name the batches.
        stream: which of the seed's random streams to use.
        members: M where each member has its own batches; 0 where there is one batch per step.
    """

    def __init__(self, x: Tensor, y: Tensor, config: TrainConfig, stream: int, members: int = 0):
        self.x, self.y, self.config, self.stream, self.members = x, y, config, stream, members
        self.augment = config.augment == "crop_flip"
        ok = x.ndim == 4 or not self.augment
        rule = "images [N, C, H, W] with augment 'crop_flip'"
        require(ok, "fit", "x", rule, list(x.shape))

    def __len__(self) -> int:
        """Batches of one epoch."""
        return -(-self.x.shape[0] // self.config.batch_size)

    def open(self, epoch: int) -> None:
        """Draws the order of the rows in this epoch, and how each is changed."""
        self._cut(*self._drawn(epoch, self.stream))

    def _drawn(self, epoch: int, stream: int) -> tuple[Tensor, ...]:
        """Orders [..., N] of the rows; shifts [..., N, 2] and flips where they are augmented."""
        order = epoch_order(self.x.shape[0], self.config.seed, stream, epoch, self.members)
        if not self.augment:
            return (order,)
        seed = stream_seed(self.config.seed, stream, "augment", epoch)
        generator = torch.Generator().manual_seed(seed)
        shape = (*order.shape, 2)
        shifts = torch.randint(2 * CROP_PADDING + 1, shape, generator=generator) - CROP_PADDING
        return order, shifts, torch.randint(2, order.shape, generator=generator).bool()

    def _cut(self, order: Tensor, shifts: Tensor | None = None, flips: Tensor | None = None):
        size, device = self.config.batch_size, self.x.device
        self.order = order.to(device).split(size, dim=-1)
        if shifts is not None:
            self.shifts = shifts.to(device).split(size, dim=-2)
            self.flips = flips.to(device).split(size, dim=-1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Batch `index` of the open epoch: x [B, ...] and y [B], or [M, B, ...] and [M, B]."""
        rows = self.order[index]
        x, y = self.x[rows], self.y[rows]
        if self.augment:
            shifts, flips = self.shifts[index].flatten(0, -2), self.flips[index].flatten()
            x = crop_flip(x.flatten(0, -4), shifts, flips).view(x.shape)
        return x, y


class StreamBatches(Batches):
    """The batches of several runs at once, each with the rows that its own stream gives it.

    Args:
        x: as for `Batches`, and so `y` and `config`.
        streams: one stream per run; the batches are x [M, B, ...] and y [M, B].
    """

    def __init__(self, x: Tensor, y: Tensor, config: TrainConfig, streams: Sequence[int]):
        super().__init__(x, y, config, 0)
        self.streams = list(streams)

    def open(self, epoch: int) -> None:
        """Draws for every stream what a run of that stream alone draws."""
        drawn = [self._drawn(epoch, stream) for stream in self.streams]
        self._cut(*(torch.stack(each) for each in zip(*drawn, strict=True)))


def crop_flip(x: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Moves every image by its own whole pixels, with zeros from outside, and flips some.

    The usual augmentation of CIFAR, a crop out of the image padded with 4 zeros, is a shift by -4
    to 4 pixels. Zero is the mean of a channel where the images are standardised.

    Args:
        x: [R, C, H, W] images.
        shifts: [R, 2] int64: pixel (i, j) of the result is (i, j) + shift of the image.
        flips: [R] bool: which results are then reversed left to right.

    Returns:
        [R, C, H, W], new memory.

    Example:
        >>> image = torch.arange(4.0).view(1, 1, 2, 2)
        >>> crop_flip(image, torch.tensor([[1, 0]]), torch.tensor([True]))
        tensor([[[[3., 2.],
                  [0., 0.]]]])
    """
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device) + shifts[:, :1]  # [R, H]
    columns = torch.arange(width, device=x.device)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]  # [R, W]
    pad = CROP_PADDING
    padded = F.pad(x, (pad, pad, pad, pad))
    image = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[:, None, None]
    return padded[image, channel, (rows + pad)[:, None, :, None], (columns + pad)[:, None, None]]
