"""Residual networks, built from layer factories: one class, every variant.

The factories `conv`, `linear` and `norm` are called as `nn.Conv2d`, `nn.Linear` and
`nn.BatchNorm2d` would be; see `landscape_fast.models.small`. Between layers with members the rows
of all members are one batch [M*B, ...], so that a plain norm normalises over all of them, and the
first layer reads a batch that the members share without a copy per member.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from landscape_fast.models._network import Factory, Network, through
from landscape_fast.nn.functional import check_count, tile_members
from landscape_fast.nn.init import he_
from landscape_fast.ops._checks import require

ORDERS = ("post", "pre")
SHORTCUTS = ("pad", "conv", "conv_norm", "conv_input")
BLOCKS = ("basic", "bottleneck")
STEMS = ("small", "large")
EXPANSION = 4  # channels of a bottleneck's output, times those of its 3x3 convolution


class ResNet(Network):
    """Stem, stages of blocks, mean over the image, head.

    The stages have 16, 32, 64, ... channels times `width`; all but the first halve the image.
    Depth, as papers count it, with three stages: 6 * blocks + 2 (9 * blocks + 2 with bottlenecks);
    wide networks count 6 * blocks + 4.

    Args:
        image: shape (C, H, W) of one image.
        classes: number of classes.
        blocks: per stage, for three stages; or one number for each stage.
        width: multiplies the channels of the stages, not the 16 of the stem.
        order: "post": conv, norm, ReLU, conv, norm, then the sum and a ReLU (He et al. 2015);
            "pre": norm, ReLU, conv, norm, ReLU, conv, then the sum, and one norm and ReLU before
            the head (He et al. 2016, Zagoruyko and Komodakis 2016).
        shortcut: where a block changes the shape. "pad": every second pixel, and zeros for the new
            channels (He et al. 2015, option A); "conv": a 1x1 convolution; "conv_norm": and a norm.
            With order "pre" the convolution reads what the first ReLU returns, as in Zagoruyko's
            code; "conv_input" is "conv" but reads what enters the block, as in Garipov's. It comes
            from the factory as all others do.
        conv_bias: what the convolutions get as `bias`: False, True, or "shared" for layers with
            members.
        dropout: probability of zeroing an activation before the last convolution of a block.
        block: "basic": two 3x3 convolutions; "bottleneck": 1x1, 3x3 and 1x1, the last to four times
            the channels (He et al. 2015).
        head_bias: False leaves the bias of the head out.
        stem: "small": a 3x3 convolution to 16 channels, with norm and ReLU where order is "post";
            "large", for images of 224 pixels: a 7x7 convolution to 64 channels that halves the
            image, likewise, and max pooling 3x3 that halves it again.
        conv: makes the convolutions, `linear` the head, `norm` the norms. For norms with members
            pass a factory of `nn.EnsembleBatchNorm2d`; by default members share them.
        generator: draws the initial values: He normal for weights, 0 for biases.
        device: of the parameters; `dtype` likewise.

    With plain layers the network maps [B, C, H, W] to [B, classes]. With layers that have members,
    a batch shared by them [B, C, H, W], or one batch per member [M, B, C, H, W], to
    [M, B, classes].

    Source: He et al. 2015 (arXiv:1512.03385) and 2016 (arXiv:1603.05027), Zagoruyko and Komodakis
    2016 (arXiv:1605.07146).

    Example:
        >>> from functools import partial
        >>> from landscape_fast.nn import BatchEnsembleConv2d, BatchEnsembleLinear
        >>> members = {"members": 4, "r_init": "normal", "s_init": "normal"}
        >>> net = ResNet(
        ...     blocks=1,
        ...     conv=partial(BatchEnsembleConv2d, **members),
        ...     linear=partial(BatchEnsembleLinear, **members),
        ... )
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([4, 2, 10])
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        blocks: int | tuple[int, ...] = 3,
        width: int = 1,
        order: str = "post",
        shortcut: str = "conv_norm",
        conv_bias: bool | str = False,
        dropout: float = 0.0,
        block: str = "basic",
        head_bias: bool = True,
        stem: str = "small",
        *,
        conv: Factory = nn.Conv2d,
        linear: Factory = nn.Linear,
        norm: Factory = nn.BatchNorm2d,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        op, shape = "ResNet", tuple(image)
        super().__init__(shape, classes, dropout)
        require(len(shape) == 3, op, "image", "the shape (C, H, W) of one image", shape)
        stages = tuple(blocks) if isinstance(blocks, tuple | list) else (blocks,) * 3
        require(len(stages) >= 1, op, "blocks", "a number, or one for each stage", blocks)
        for count in stages:
            check_count(op, "blocks", count)
        check_count(op, "width", width)
        require(order in ORDERS, op, "order", f"one of {ORDERS}", repr(order))
        require(shortcut in SHORTCUTS, op, "shortcut", f"one of {SHORTCUTS}", repr(shortcut))
        require(block in BLOCKS, op, "block", f"one of {BLOCKS}", repr(block))
        require(stem in STEMS, op, "stem", f"one of {STEMS}", repr(stem))
        self.order, bottleneck = order, block == "bottleneck"
        self.pool = stem == "large"
        factory = {"device": device, "dtype": dtype}

        def make_conv(inputs, outputs, kernel_size, stride=1):
            padding = kernel_size // 2
            options = {"stride": stride, "padding": padding, "bias": conv_bias, **factory}
            return conv(inputs, outputs, kernel_size, **options)

        def make_norm(channels):
            return norm(channels, **factory)

        first = channels = 64 if self.pool else 16
        self.stem = make_conv(shape[0], first, *((7, 2) if self.pool else (3,)))
        self.blocks = nn.ModuleList()
        for stage, count in enumerate(stages):
            for place in range(count):
                inner, stride = 16 * width * 2**stage, 2 if stage and not place else 1
                outputs = EXPANSION * inner if bottleneck else inner
                sizes = (channels, inner, outputs, stride)
                self.blocks.append(_Block(sizes, order, shortcut, dropout, make_conv, make_norm))
                channels = outputs
        # after the stem, or before the head
        self.norm = make_norm(first if order == "post" else channels)
        self.head = linear(channels, classes, **({} if head_bias else {"bias": False}), **factory)
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
        x, members = through(self.stem, x, members)
        if self.order == "post":
            x, members = through(self.norm, x, members)
            x = x.relu()
        if self.pool:
            x = F.max_pool2d(x, 3, 2, 1)
        for block in self.blocks:
            x, members = block(x, members)
        if self.order == "pre":
            x, members = through(self.norm, x, members)
            x = x.relu()
        x, members = through(self.head, x.mean((-2, -1)), members)
        return x.unflatten(0, (members, x.shape[0] // members)) if members else x


class _Block(nn.Module):
    """Convolutions around a shortcut; maps folded rows, and how many members they have.

    Two of 3x3 or, where the channels inside are not those of the output, 1x1, 3x3 and 1x1.
    """

    def __init__(self, sizes, order, shortcut, dropout, make_conv, make_norm):
        super().__init__()
        inputs, inner, outputs, stride = sizes
        pre, bottleneck = order == "pre", inner != outputs
        self.order, self.stride, self.added = order, stride, outputs - inputs
        self.before_norm = shortcut == "conv_input"
        shapes = [(inputs, inner, 3, stride), (inner, outputs, 3)]
        if bottleneck:
            shapes = [(inputs, inner, 1), (inner, inner, 3, stride), (inner, outputs, 1)]
        for i, shape in enumerate(shapes, 1):
            self.add_module(f"conv{i}", make_conv(*shape))
            self.add_module(f"norm{i}", make_norm(shape[0] if pre else shape[1]))
        self.depth = len(shapes)
        self.dropout = nn.Dropout(dropout)
        changes = inputs != outputs or stride != 1
        projects = changes and shortcut != "pad"
        self.shortcut = make_conv(inputs, outputs, 1, stride) if projects else None
        normalised = projects and shortcut == "conv_norm"
        self.shortcut_norm = make_norm(outputs) if normalised else None

    def forward(self, x: Tensor, members: int) -> tuple[Tensor, int]:
        kept, before, pre = x, members, self.order == "pre"
        for i in range(1, self.depth + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"norm{i}")
            if pre:
                x, members = through(norm, x, members)
            if pre or i > 1:
                x = x.relu()
            if i == 1 and pre and self.shortcut is not None and not self.before_norm:
                kept, before = x, members
            if i == self.depth:
                x = self.dropout(x)
            x, members = through(conv, x, members)
            if not pre:
                x, members = through(norm, x, members)
        kept, before = self._shorten(kept, before)
        if before != members:  # the first layer with members is in one of the two branches
            x = x if members else tile_members(x, before)
            kept = kept if before else tile_members(kept, members)
        x = x + kept
        return (x if pre else x.relu()), max(members, before)

    def _shorten(self, x: Tensor, members: int) -> tuple[Tensor, int]:
        if self.shortcut is not None:
            x, members = through(self.shortcut, x, members)
            return through(self.shortcut_norm, x, members) if self.shortcut_norm else (x, members)
        if self.stride != 1:
            x = x[..., :: self.stride, :: self.stride]
        return (F.pad(x, (0, 0, 0, 0, 0, self.added)) if self.added else x), members


def resnet20(image: tuple[int, int, int] = (3, 32, 32), classes: int = 10, **options) -> ResNet:
    """ResNet-20 for CIFAR (He et al. 2015): 272,474 parameters for CIFAR-10.

    With shortcut="pad" it has 269,722, the network of that paper; with conv_bias=True and
    shortcut="conv" 273,066, the network of the Keras examples. `options` are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet20().parameters())
        272474
    """
    return ResNet(image, classes, blocks=3, **{"order": "post", "shortcut": "conv_norm", **options})


def cresnet20(image: tuple[int, int, int] = (3, 32, 32), classes: int = 10, **options) -> ResNet:
    """The ResNet-20 of Wortsman et al. 2021: `resnet20` with a head without bias.

    272,464 parameters for CIFAR-10, in 64 tensors; 270,896 of them are weights of convolutions or
    of the head, a 1x1 convolution in their code. `options` are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in cresnet20().parameters() if p.ndim > 1)
        270896
    """
    return resnet20(image, classes, **{"head_bias": False, **options})


def preresnet(
    depth: int = 164, image: tuple[int, int, int] = (3, 32, 32), classes: int = 10, **options
) -> ResNet:
    """A PreResNet as in Garipov et al. 2018: norm and ReLU before each convolution.

    Args:
        depth: 6 * n + 2 below 44, with basic blocks: 20 has 272,282 parameters for CIFAR-10. From
            44 on 9 * n + 2, with bottlenecks: 110 has 1,146,842 and 164 has 1,703,258.
        image: shape (C, H, W) of one image.
        classes: number of classes.
        options: those of `ResNet`.

    A block that changes the shape has a 1x1 convolution of what enters it as its shortcut; no
    convolution has a bias.

    Example:
        >>> sum(p.numel() for p in preresnet(20).parameters())
        272282
    """
    bottleneck = isinstance(depth, int) and depth >= 44
    per_block = 9 if bottleneck else 6
    fits = isinstance(depth, int) and depth > 2 and (depth - 2) % per_block == 0
    require(fits, "preresnet", "depth", "6 n + 2 below 44, or 9 n + 2 from there on", depth)
    fixed = {
        "blocks": (depth - 2) // per_block,
        "block": "bottleneck" if bottleneck else "basic",
        "order": "pre",
        "shortcut": "conv_input",
    }
    return ResNet(image, classes, **{**fixed, **options})


def resnet50_v2(
    image: tuple[int, int, int] = (3, 224, 224), classes: int = 1000, **options
) -> ResNet:
    """ResNet-50 with norm and ReLU before each convolution (He et al. 2016), for ImageNet.

    25,549,352 parameters. Stages of 3, 4, 6 and 3 bottlenecks; the first block of a stage halves
    the image, in its 3x3 convolution, and has a 1x1 convolution of what its first ReLU returns as
    its shortcut. `options` are those of `ResNet`.

    Example:
        >>> sum(p.numel() for p in resnet50_v2(device="meta").parameters())
        25549352
    """
    fixed = {
        "blocks": (3, 4, 6, 3),
        "width": 4,
        "block": "bottleneck",
        "order": "pre",
        "shortcut": "conv",
        "stem": "large",
    }
    return ResNet(image, classes, **{**fixed, **options})


def wrn_28_10(image: tuple[int, int, int] = (3, 32, 32), classes: int = 10, **options) -> ResNet:
    """WRN-28-10 (Zagoruyko and Komodakis 2016): 36,479,194 parameters for CIFAR-10.

    `options` are those of `ResNet`.
    """
    fixed = {"blocks": 4, "width": 10, "order": "pre", "shortcut": "conv"}
    return ResNet(image, classes, **{**fixed, **options})
