"""VGG networks for small images, built from layer factories; see `landscape_fast.models.small`."""

import torch
from torch import Generator, Tensor, nn

from landscape_fast.models._network import Factory, Network, halved, through
from landscape_fast.nn.functional import check_count
from landscape_fast.nn.init import he_
from landscape_fast.ops._checks import require

STAGES = {
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(Network):
    """Stages of 3x3 convolutions with ReLU, pooling 2x2 after each, and two hidden layers.

    As Garipov et al. 2018 use it for CIFAR: hidden layers of 512 instead of 4096, with dropout
    before each, and no norms.

    Args:
        image: shape (C, H, W) of one image.
        classes: number of classes.
        stages: the channels of the convolutions of each stage.
        hidden: width of each hidden layer.
        dropout: probability of zeroing what enters a hidden layer.
        conv: makes the convolutions, `linear` the linear layers; see `landscape_fast.models.small`.
        norm: makes a norm between each convolution and its ReLU, as `nn.BatchNorm2d` would be
            called; None for none. For norms with members pass a factory of
            `nn.EnsembleBatchNorm2d`; any other is shared by them.
        generator: draws the initial values: He normal for weights, 0 for biases.
        device: of the parameters; `dtype` likewise.

    With plain layers the network maps [B, C, H, W] to [B, classes]. With layers that have members,
    a batch shared by them [B, C, H, W], or one batch per member [M, B, C, H, W], to
    [M, B, classes]. An odd row or column is pooled alone, so images may be of any size.

    Source: Simonyan and Zisserman 2015 (arXiv:1409.1556); Garipov et al. 2018 (arXiv:1802.10026).

    Example:
        >>> net = VGG((1, 8, 8), stages=((8,), (16,)), hidden=(32,))
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        stages: tuple[tuple[int, ...], ...] = STAGES[16],
        hidden: tuple[int, ...] = (512, 512),
        dropout: float = 0.5,
        *,
        conv: Factory = nn.Conv2d,
        linear: Factory = nn.Linear,
        norm: Factory | None = None,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        op, shape = "VGG", tuple(image)
        super().__init__(shape, classes, dropout)
        require(len(shape) == 3, op, "image", "the shape (C, H, W) of one image", shape)
        for channels in (*(c for stage in stages for c in stage), *hidden):
            check_count(op, "a number of channels", channels)
        require(len(stages) and all(stages), op, "stages", "tuples of channels", stages)
        factory = {"device": device, "dtype": dtype}
        inputs, height, width = shape
        self.stages = nn.ModuleList()
        for stage in stages:
            layers = nn.ModuleList()
            for outputs in stage:
                layers.append(conv(inputs, outputs, 3, padding=1, **factory))
                if norm is not None:
                    layers.append(norm(outputs, **factory))
                layers.append(nn.ReLU())
                inputs = outputs
            self.stages.append(layers)
            height, width = -(-height // 2), -(-width // 2)
        widths = [inputs * height * width, *hidden, classes]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(linear(i, o, **factory) for i, o in pairs)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New initial values; norms stay as they are."""
        self._start(he_, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], or [M, B, classes] with layers that have members."""
        self._check(x)
        members = 0
        if x.ndim == 5:
            members, x = x.shape[0], x.flatten(0, 1)
        for stage in self.stages:
            for layer in stage:
                x, members = through(layer, x, members)
            x = halved(x)
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x, members = through(layer, self.dropout(x), members)
            x = x.relu()
        x, members = through(self.layers[-1], x, members)
        return x.unflatten(0, (members, x.shape[0] // members)) if members else x


def vgg16(image: tuple[int, int, int] = (3, 32, 32), classes: int = 10, **options) -> VGG:
    """VGG-16 without norms, for CIFAR: 15,245,130 parameters for 10 classes, 15,291,300 for 100.

    `options` are those of `VGG`; norm=nn.BatchNorm2d adds 8,448.

    Example:
        >>> sum(p.numel() for p in vgg16(device="meta").parameters())
        15245130
    """
    return VGG(image, classes, **{"stages": STAGES[16], **options})


def vgg19(image: tuple[int, int, int] = (3, 32, 32), classes: int = 10, **options) -> VGG:
    """VGG-19 without norms, for CIFAR: 20,554,826 parameters for 10 classes.

    `options` are those of `VGG`.
    """
    return VGG(image, classes, **{"stages": STAGES[19], **options})
