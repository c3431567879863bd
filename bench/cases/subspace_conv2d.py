"""subspace_conv2d: members of a residual network with weights of their own, or on a line."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Case, Contestant, Target, Work, function
from bench.peers import compiled, ours
from landscape_fast.ops.subspace_conv2d import subspace_conv2d, subspace_conv2d_reference

GPU = ("graph", "train-graph", "train")
BF16, FP32 = torch.bfloat16, torch.float32
SMALL = (  # a launch for each member is what these cost
    Target("graph", "must", over="loop of F.conv2d", ratio=2.0),
    Target("train-graph", "must", over="loop of F.conv2d", ratio=1.5),
    Target("train", "must", over="loop of F.conv2d", ratio=3.0),
    Target("train-graph", "must", over="grouped", ratio=1.5),
)
WIDE = (Target("train-graph", "must", over="loop of F.conv2d", ratio=0.97),)
NARROW = (*SMALL, Target("graph", "moonshot", over="loop of F.conv2d", ratio=5.0))
# (M, K, B, I, O, H = W, kernel, stride), dtype, modes, targets; K = 0: every member its own weight.
# Channels last on a GPU, padding kernel // 2.
CUDA = (
    ((16, 0, 128, 16, 16, 32, 3, 1), BF16, GPU, NARROW),  # ResNet-20
    ((4, 0, 64, 32, 32, 16, 3, 1), BF16, GPU, SMALL),
    ((16, 0, 128, 64, 64, 8, 3, 1), BF16, GPU, SMALL),
    ((4, 2, 128, 64, 64, 8, 3, 1), BF16, GPU, SMALL),
    ((1, 2, 128, 16, 16, 32, 3, 1), BF16, GPU, ()),
    ((16, 0, 128, 16, 32, 32, 3, 2), BF16, ("train-graph",), SMALL[1:2]),
    ((4, 0, 128, 320, 320, 16, 3, 1), BF16, ("train-graph",), WIDE),  # WRN-28-10
    ((4, 0, 64, 256, 64, 56, 1, 1), BF16, ("train-graph",), ()),  # ResNet-50
    ((16, 0, 128, 16, 16, 32, 3, 1), FP32, ("train-graph",), ()),
)
SAME = (Target("train", "must", over="loop of F.conv2d", ratio=0.95),)
CPU = (
    ((8, 0, 8, 16, 16, 8, 3, 1), FP32, ("train", "eager"), SAME),
    ((4, 0, 32, 16, 16, 32, 3, 1), FP32, ("train", "eager"), SAME),
    ((4, 2, 32, 64, 64, 8, 3, 1), FP32, ("train", "eager"), SAME),
    ((1, 0, 8, 16, 16, 16, 3, 1), FP32, ("train", "eager"), SAME),
)
TINY = (
    ((2, 0, 3, 4, 6, 5, 3, 1), FP32, (*GPU, "eager"), ()),
    ((2, 3, 3, 4, 6, 5, 1, 2), FP32, (*GPU, "eager"), ()),
)


def weights(anchors, coeffs):
    """The members' weights, as plain PyTorch writes it."""
    return anchors if not coeffs else torch.tensordot(coeffs[0], anchors, 1)


def loop(x, anchors, *coeffs, stride, padding):
    """A library call for each member, as a deep ensemble is written."""
    own = weights(anchors, coeffs)
    pairs = zip(x.unbind(), own.unbind(), strict=True)
    return torch.stack([F.conv2d(images, w, None, stride, padding) for images, w in pairs])


def grouped(x, anchors, *coeffs, stride, padding):
    """One library call, with the members as groups of channels."""
    own, images = weights(anchors, coeffs), x.transpose(0, 1).flatten(1, 2)
    y = F.conv2d(images, own.flatten(0, 1), None, stride, padding, groups=len(own))
    return y.unflatten(1, (len(own), -1)).transpose(0, 1)


def vmapped(x, anchors, *coeffs, stride, padding):
    """torch.func.vmap over the members."""
    own = partial(F.conv2d, stride=stride, padding=padding)
    return torch.func.vmap(own)(x, weights(anchors, coeffs))


def plain(x, anchors, *coeffs, stride, padding):
    """One convolution of as many images: what several weights cost is the rest."""
    return F.conv2d(x.flatten(0, 1), anchors[0], None, stride, padding)


def make(device, generator, M, K, B, I, O, H, kernel, stride, dtype):
    """x, anchors, and coefficients around the middle where weights are mixed."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    last = device == "cuda"
    x = normal(M, B, H, H, I).movedim(-1, -3) if last else normal(M, B, I, H, H)
    scale = (I * kernel**2) ** 0.5
    anchors = normal(K or M, O, kernel, kernel, I).movedim(-1, 2) / scale
    anchors = anchors if last else anchors.contiguous()
    rest = (torch.softmax(normal(M, K), 1),) if K else ()
    return tuple(t.to(dtype) for t in (x, anchors, *rest))


def contestants(device: str, quick: bool, shape: dict, dtype) -> list[Contestant]:
    """Everybody; `ours` includes the composition of library calls ("torch")."""
    options = {"stride": shape["stride"], "padding": shape["kernel"] // 2}
    op = partial(subspace_conv2d, **options)
    found = ours("subspace_conv2d", op, device, dtype, composed=True)
    narrow = {shape["I"], shape["O"]} <= {16, 32}
    if shape["kernel"] != 3 or shape["stride"] != 1 or not narrow:
        found = [one for one in found if one.name != "ours (cuda)"]
    by_loop = partial(loop, **options)
    return [
        *found,
        function("loop of F.conv2d", "eager", by_loop),
        function("grouped", "eager", partial(grouped, **options)),
        function("vmap", "eager", partial(vmapped, **options)),
        *compiled("loop", by_loop, device, quick, static=lambda inputs: inputs[1:]),
        function("plain nn.Conv2d", "plain", partial(plain, **options), same=False),
    ]


def work(M, K, B, I, O, H, kernel, stride, dtype) -> dict[str, Work]:
    """x, weights and y once each; the backward adds two products and the gradients."""
    out = (H + 2 * (kernel // 2) - kernel) // stride + 1
    x, y, w = M * B * H * H * I, M * B * out * out * O, (K or M) * O * I * kernel**2
    flops, size = 2 * y * I * kernel**2, dtype.itemsize
    return {
        "fwd": Work(size * (x + w + y), flops),
        "fwd+bwd": Work(size * (3 * x + 3 * w + 2 * y), 3 * flops),
    }


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    found = []
    table = TINY if quick else CUDA if device == "cuda" else CPU
    names = ("M", "K", "B", "I", "O", "H", "kernel", "stride")
    for priority, (sizes, dtype, modes, targets) in enumerate(table):
        shape = dict(zip(names, sizes, strict=True))
        options = {"stride": shape["stride"], "padding": shape["kernel"] // 2}
        found.append(
            Case(
                "subspace_conv2d",
                shape,
                dtype,
                partial(make, **shape, dtype=dtype),
                partial(subspace_conv2d_reference, **options),
                partial(contestants, shape=shape, dtype=dtype),
                work(*sizes, dtype),
                modes,
                targets,
                priority,
            )
        )
    return found
