"""batch_ensemble_conv2d: layers bound by memory, where kernels win, and such as cuDNN fills."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Bound, Case, Contestant, Target, Work, function, missing
from bench.peers import compiled, imported, ours
from landscape_fast.ops.batch_ensemble_conv2d import (
    batch_ensemble_conv2d,
    batch_ensemble_conv2d_reference,
)

GPU = ("graph", "train-graph", "train")
BF16, FP32 = torch.bfloat16, torch.float32
SMALL = (  # memory bounds these: one pass less is time less
    Target("graph", "must", over="compile", ratio=1.2),
    Target("graph", "moonshot", over="compile", ratio=1.6),
    Target("train-graph", "must", over="compile", ratio=1.2),
)
WIDE = (
    Target("train-graph", "must", over="compile", ratio=0.95),
    Target("train-graph", "moonshot", over="compile", ratio=1.1),
)
# (M, B, I, O, H = W, kernel, stride), dtype, modes, targets; channels last, padding kernel // 2
CUDA = (
    ((4, 128, 16, 16, 32, 3, 1), BF16, GPU, SMALL),  # ResNet-20
    ((4, 128, 32, 32, 16, 3, 1), BF16, GPU, SMALL),
    ((4, 64, 64, 256, 56, 1, 1), BF16, GPU, SMALL),  # ResNet-50
    ((4, 64, 256, 64, 56, 1, 1), BF16, GPU, SMALL),
    ((4, 128, 64, 64, 8, 3, 1), BF16, GPU, SMALL),
    ((4, 128, 320, 320, 16, 3, 1), BF16, ("train-graph", "graph"), WIDE),  # WRN-28-10
    ((4, 128, 640, 640, 8, 3, 1), BF16, ("train-graph", "graph"), WIDE),
    ((4, 128, 160, 160, 32, 3, 1), BF16, ("train-graph",), WIDE),
    ((4, 128, 16, 32, 32, 3, 2), BF16, ("train-graph",), ()),
    ((16, 128, 16, 16, 32, 3, 1), BF16, ("train-graph",), ()),
    ((4, 128, 16, 16, 32, 3, 1), FP32, ("train-graph",), ()),
)
CPU = (
    ((4, 32, 16, 16, 32, 3, 1), FP32, ("train", "eager"), ()),
    ((4, 32, 64, 64, 8, 3, 1), FP32, ("train", "eager"), ()),
    ((4, 32, 64, 256, 8, 1, 1), FP32, ("train", "eager"), ()),
)
TINY = (
    ((2, 3, 4, 6, 5, 3, 1), FP32, ("graph", "train-graph", "train", "eager"), ()),
    ((2, 3, 4, 6, 5, 1, 2), FP32, ("graph", "train-graph", "train", "eager"), ()),
)


def channels(t):
    """A factor [M, C] as it meets [M, B, C, H, W]."""
    return t[:, None, :, None, None]


def eager(x, weight, r, s, bias, stride, padding):
    """The layer as users write it."""
    images = (x * channels(r)).flatten(0, 1)
    y = F.conv2d(images, weight, None, stride, padding).unflatten(0, x.shape[:2])
    return y * channels(s) + channels(bias)


def plain(x, weight, r, s, bias, stride, padding):
    """One nn.Conv2d on the same images: what the members' factors cost is the rest."""
    return F.conv2d(x.flatten(0, 1), weight, bias[0], stride, padding)


def make(device, generator, M, B, I, O, H, kernel, stride, dtype):
    """x and weight in channels-last memory, r, s, bias; factors near one, as when trained."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    x = normal(M, B, H, H, I).movedim(-1, -3)
    weight = (normal(O, kernel, kernel, I) / (I * kernel**2) ** 0.5).movedim(-1, 1)
    factors = (1 + 0.3 * normal(M, I), 1 + 0.3 * normal(M, O), 0.1 * normal(M, O))
    return tuple(v.to(dtype) for v in (x, weight, *factors))


def torch_uncertainty_conv2d(stride: int, padding: int) -> Contestant:
    """torch_uncertainty's BatchConv2d, on the folded images [M*B, I, H, W]."""
    name = "torch_uncertainty.BatchConv2d"
    cls, why = imported("torch_uncertainty.layers.batch_ensemble", "BatchConv2d")
    if cls is None:
        return missing(name, "library", why)

    def bind(inputs: tuple, train: bool) -> Bound:
        x, weight, r, s, bias = inputs
        own = x.flatten(0, 1).detach().requires_grad_(train)
        (O, I, kernel, _), M = weight.shape, r.shape[0]
        factory = {"device": x.device, "dtype": x.dtype}
        layer = cls(I, O, kernel, M, stride=stride, padding=padding, **factory)
        found = dict(layer.named_parameters())
        values = {"conv.weight": weight, "r_group": r, "s_group": s, "bias": bias}
        for key, value in values.items():
            found[key].data = value.detach().view_as(found[key])
            found[key].requires_grad_(train)

        def view(results):
            y, *grads = results
            shaped = [g.view_as(t) for g, t in zip(grads, inputs, strict=False)]
            return [y.unflatten(0, x.shape[:2]), *shaped]

        return Bound(lambda: layer(own), [own, *[found[key] for key in values]], view)

    return Contestant(name, "library", bind)


def contestants(device: str, quick: bool, stride: int, kernel: int, dtype) -> list[Contestant]:
    """Everybody; `ours` includes the composition of library calls ("torch")."""
    options = {"stride": stride, "padding": kernel // 2}
    formula = partial(eager, **options)
    op = partial(batch_ensemble_conv2d, **options)
    return [
        *ours("batch_ensemble_conv2d", op, device, dtype, composed=True),
        function("eager", "eager", formula),
        *compiled("eager", formula, device, quick, static=lambda inputs: inputs[1:]),
        torch_uncertainty_conv2d(**options),
        function("plain nn.Conv2d", "plain", partial(plain, **options), same=False),
    ]


def work(M, B, I, O, H, kernel, stride, dtype) -> dict[str, Work]:
    """x, weight, y and the factors once each; the backward adds two products and the gradients."""
    out = (H + 2 * (kernel // 2) - kernel) // stride + 1
    x, y, w = M * B * H * H * I, M * B * out * out * O, O * I * kernel**2
    flops, size, factors = 2 * y * I * kernel**2, dtype.itemsize, M * (I + 2 * O)
    forward = size * (x + w + y + factors)
    backward = size * (2 * x + 2 * w + y + 2 * factors)
    return {"fwd": Work(forward, flops), "fwd+bwd": Work(forward + backward, 3 * flops)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    for priority, (sizes, dtype, modes, targets) in enumerate(table):
        shape = dict(zip(("M", "B", "I", "O", "H", "kernel", "stride"), sizes, strict=True))
        options = {"stride": shape["stride"], "padding": shape["kernel"] // 2}
        found.append(
            Case(
                "batch_ensemble_conv2d",
                shape,
                dtype,
                partial(make, **shape, dtype=dtype),
                partial(batch_ensemble_conv2d_reference, **options),
                partial(contestants, stride=sizes[-1], kernel=sizes[-2], dtype=dtype),
                work(*sizes, dtype),
                modes,
                targets,
                priority,
            )
        )
    return found
