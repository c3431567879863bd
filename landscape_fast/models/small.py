"""MLP, LeNet, SmallCNN and MediumCNN, each built from layer factories.

A factory is called as the plain layer would be, `linear(in_features, out_features)` and
`conv(in_channels, out_channels, 3, padding=1)`, with `device` and `dtype`. With `nn.Linear` and
`nn.Conv2d` a network maps a batch [B, ...] to [B, C]. With
`functools.partial(BatchEnsembleLinear, members=4)`, and likewise for the convolution, the same
network maps a batch shared by the members, [B, ...], or one batch per member, [M, B, ...], to
[M, B, C]. The layers alone know about members: everything between them works on the last
dimensions and keeps those in front.
"""

from math import prod

import torch
from torch import Generator, Tensor, nn

from landscape_fast.models._network import Factory, Network, halved
from landscape_fast.nn.init import default_, xavier_
from landscape_fast.ops._checks import require


class MLP(Network):
    """Linear layers with ReLU (and dropout) between.

    Args:
        in_features: size of the last dimension of x, or the shape of one example, such as
            (1, 28, 28), which is flattened.
        hidden: width of each hidden layer; () for a linear model.
        classes: C.
        dropout: probability of zeroing a hidden unit, after its ReLU.
        linear: makes the layers, see the module's docstring.
        generator: draws new initial values, uniform within 1 / sqrt(fan_in) as in `nn.Linear`;
            without it the layers stay as the factory made them.
        device: of the parameters; `dtype` likewise.

    Example:
        >>> from functools import partial
        >>> from landscape_fast.nn import BatchEnsembleLinear
        >>> MLP(64, hidden=(32,))(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
        >>> factory = partial(BatchEnsembleLinear, members=4, r_init="random_sign")
        >>> MLP((1, 8, 8), hidden=(32,), linear=factory)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([4, 5, 10])
    """

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        hidden: tuple[int, ...] = (128, 128),
        classes: int = 10,
        dropout: float = 0.0,
        *,
        linear: Factory = nn.Linear,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (in_features,) if isinstance(in_features, int) else tuple(in_features)
        super().__init__(shape, classes, dropout)
        widths = [prod(shape), *hidden, classes]
        factory = {"device": device, "dtype": dtype}
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(linear(i, o, **factory) for i, o in pairs)
        if generator is not None:
            self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New initial values."""
        self._start(default_, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *shape] -> [B, C], or [M, B, C] with layers that have members."""
        self._check(x)
        x = x.flatten(-len(self.shape))
        for i, layer in enumerate(self.layers):
            x = layer(x) if i == 0 else layer(self.dropout(x.relu()))
        return x


class _ConvNet(Network):
    """Blocks of conv 3x3 -> dropout -> maxpool 2, with ReLU between blocks; then a head.

    The pattern of the networks that Fort et al. 2019 (arXiv:1912.02757) call CNNs: "same" padding
    in the convolution and in the pooling, no ReLU after the last block, and Xavier uniform initial
    values for biases, too.
    """

    def __init__(self, image, channels, classes, dropout, pool, conv, linear, generator, factory):
        super().__init__(tuple(image), classes, dropout)
        rule, n = "the shape (C, H, W) of one image", len(self.shape)
        require(n == 3, type(self).__name__, "image", rule, self.shape)
        inputs, height, width = self.shape
        pairs = zip([inputs, *channels[:-1]], channels, strict=True)
        self.convs = nn.ModuleList(conv(i, o, 3, padding=1, **factory) for i, o in pairs)
        for _ in channels:
            height, width = -(-height // 2), -(-width // 2)
        self.pool = pool
        if pool:
            first = linear(channels[-1], pool, **factory)
            self.head = nn.Sequential(first, nn.ReLU(), linear(pool, classes, **factory))
        else:
            self.head = linear(channels[-1] * height * width, classes, **factory)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New initial values."""
        self._start(xavier_, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], or [M, B, classes] with layers that have members."""
        self._check(x)
        for i, conv in enumerate(self.convs):
            x = conv(x) if i == 0 else conv(x.relu())
            x = halved(self.dropout(x))
        return self.head(x.mean((-2, -1)) if self.pool else x.flatten(-3))


class SmallCNN(_ConvNet):
    """Three 3x3 convolutions with 16, 32 and 32 channels (Fort et al. 2019).

    Args:
        image: shape (C, H, W) of one image.
        classes: number of classes.
        dropout: probability of zeroing an activation, after each convolution.
        head: "flatten": one linear layer on the flattened maps (512 -> 10 for CIFAR-10); "pool":
            the mean over each map, a hidden layer of 32 with ReLU, a linear layer. The paper gives
            no head; these are the two of its public replications.
        conv: makes the convolutions, `linear` the linear layers; see the module's docstring.
        generator: draws the initial values; see `landscape_fast.nn.init.xavier_`.
        device: of the parameters; `dtype` likewise.

    The network does not scale its input; see `MediumCNN`.

    Example:
        >>> SmallCNN()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        dropout: float = 0.1,
        head: str = "flatten",
        *,
        conv: Factory = nn.Conv2d,
        linear: Factory = nn.Linear,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        rule = "'flatten' or 'pool'"
        require(head in ("flatten", "pool"), "SmallCNN", "head", rule, repr(head))
        pool = 32 if head == "pool" else 0
        factory = {"device": device, "dtype": dtype}
        makers = (conv, linear, generator, factory)
        super().__init__(image, (16, 32, 32), classes, dropout, pool, *makers)


class MediumCNN(_ConvNet):
    """Four 3x3 convolutions with 64, 128, 256 and 256 channels (Fort et al. 2019).

    971,146 parameters for CIFAR-10, as the authors' published notebook prints.

    Args:
        image: shape (C, H, W) of one image.
        classes: number of classes.
        dropout: probability of zeroing an activation, after each convolution.
        conv: makes the convolutions, `linear` the last layer; see the module's docstring.
        generator: draws the initial values; see `landscape_fast.nn.init.xavier_`.
        device: of the parameters; `dtype` likewise.

    The network does not scale its input. The published recipe feeds raw pixels, floats from 0 to
    255, without normalisation (`data.cifar10(root, scale="raw")`), with Adam at 1.6e-3, halved
    every 10 of 40 epochs, batches of 128.

    Example:
        >>> MediumCNN()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        dropout: float = 0.1,
        *,
        conv: Factory = nn.Conv2d,
        linear: Factory = nn.Linear,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        makers = (conv, linear, generator, factory)
        super().__init__(image, (64, 128, 256, 256), classes, dropout, 0, *makers)


class LeNet(Network):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling.

    Convolutions 5x5 without padding, each with ReLU and pooling 2x2, then linear layers with ReLU
    between. Wenzel et al. 2020 (arXiv:2006.13570) use a LeNet without giving its sizes; the
    defaults here are those of LeCun, with a dropout that can be switched on.

    Args:
        image: shape (C, H, W) of one image; 28 x 28 is padded to 32 x 32 as by LeCun.
        classes: number of classes.
        channels: of each convolution.
        hidden: width of each hidden linear layer.
        dropout: probability of zeroing a hidden unit, before each linear layer but the first.
        conv: makes the convolutions, `linear` the linear layers; see the module's docstring.
        generator: draws new initial values, uniform within 1 / sqrt(fan_in) as in `nn.Conv2d`;
            without it the layers stay as the factories made them.
        device: of the parameters; `dtype` likewise.

    Example:
        >>> LeNet((1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        channels: tuple[int, ...] = (6, 16),
        hidden: tuple[int, ...] = (120, 84),
        dropout: float = 0.0,
        *,
        conv: Factory = nn.Conv2d,
        linear: Factory = nn.Linear,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(tuple(image), classes, dropout)
        require(len(self.shape) == 3, "LeNet", "image", "the shape (C, H, W) of one image", image)
        inputs, height, width = self.shape
        padding = 2 if (height, width) == (28, 28) else 0
        factory = {"device": device, "dtype": dtype}
        self.convs = nn.ModuleList()
        for outputs in channels:
            self.convs.append(conv(inputs, outputs, 5, padding=padding, **factory))
            height, width = ((n + 2 * padding - 4 + 1) // 2 for n in (height, width))
            inputs, padding = outputs, 0
        rule = f"large enough for {len(channels)} convolutions 5x5 without padding"
        require(min(height, width) >= 1, "LeNet", "image", rule, self.shape)
        widths = [inputs * height * width, *hidden, classes]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(linear(i, o, **factory) for i, o in pairs)
        if generator is not None:
            self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New initial values."""
        self._start(default_, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], or [M, B, classes] with layers that have members."""
        self._check(x)
        for conv in self.convs:
            x = halved(conv(x).relu())
        x = self.layers[0](x.flatten(-3))
        for layer in self.layers[1:]:
            x = layer(self.dropout(x.relu()))
        return x
