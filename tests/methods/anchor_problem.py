"""What the tests of anchor optimisers share: networks, data, and the same run in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from landscape_fast.methods.anchor_optim import AnchorAdam, AnchorAdamW, AnchorSGD
from landscape_fast.nn.coefficients import Bezier, Line, Simplex
from landscape_fast.nn.subspace import Subspace

STEPS = 50
RULES = {
    "plain": (AnchorSGD, torch.optim.SGD, {}),
    "momentum": (AnchorSGD, torch.optim.SGD, {"momentum": 0.9}),
    "dampening": (AnchorSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "nesterov": (AnchorSGD, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "decay": (AnchorSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "adam": (AnchorAdam, torch.optim.Adam, {"betas": (0.8, 0.99), "weight_decay": 0.01}),
    "adamw": (AnchorAdamW, torch.optim.AdamW, {"eps": 1e-6, "weight_decay": 0.1}),
}
KINDS = {
    "line": (2, Line(), {}),
    "layer-wise simplex": (3, Simplex(3), {"layerwise": True}),
    "curve with fixed ends": (3, Bezier(3), {"trained": (False, True, False)}),
}


def network():
    """Rounding does not grow along a training run: the network is smooth, and no bias stands in
    front of the norm, where all of its gradient would be rounding, which Adam makes large."""
    conv = nn.Conv2d(1, 3, 3, padding=1, bias=False)
    return nn.Sequential(
        conv, nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    )


def problem(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(STEPS, 8, 1, 6, 6, generator=generator)
    y = torch.randint(4, (STEPS, 8), generator=generator)
    return x.to(device, dtype), y.to(device)


def subspace(kind="line", dtype=torch.float32, device="cpu", **options):
    torch.manual_seed(3)
    K, coefficients, more = KINDS[kind]
    made = Subspace(network().to(device), K, coefficients, **more, **options)
    return made.to(dtype)


def coefficients_of(space):
    """Of the current point, in the order the user gave."""
    return torch.empty_like(space.coeffs).index_copy_(
        -1, torch.tensor(space.order, device=space.coeffs.device), space.coeffs
    )


def weights_only(space, w):
    """The parts of w [..., P] that the cosine penalty is about."""
    views = space.layout.views(w)
    return torch.cat([v.flatten(w.ndim - 1) for v in views.values() if v.ndim > w.ndim], -1)


def cos2_of_all(space, i, j):
    every = space.anchors if space.fixed is None else torch.cat([space.anchors, space.fixed])
    a, b = weights_only(space, every)[[i, j]]
    return (a @ b) ** 2 / ((a @ a) * (b @ b))


def pair_of(code, S):
    i, j = divmod(code, S - 1)
    return i, j + (j >= i)


def draws(kind, count, seed=7):
    """Coefficients [1, ...] of every step, and the seed of the pairs."""
    space, generator = subspace(kind, torch.float64), torch.Generator().manual_seed(seed)
    return [coefficients_of(space.draw_(generator)).clone() for _ in range(count)]


def fused(kind, rule, dtype, lr=0.05, device="cpu", **penalties):
    """Anchors after STEPS steps of ours."""
    space = subspace(kind, dtype, device)
    cls, _, options = RULES[rule]
    generator = torch.Generator(device).manual_seed(11)
    optimizer = cls(space, lr, **options, **penalties, generator=generator)
    for step, (c, x, y) in enumerate(zip(draws(kind, STEPS), *problem(dtype, device), strict=True)):
        if step % 2:  # both homes of the gradient
            optimizer.zero_grad()
        space.move_to_(c[0])
        F.cross_entropy(space.model(x), y).backward()
        optimizer.step()
    return space.anchors.detach()


def plain(kind, rule, dtype, lr=0.05, cos2=0.0, curve_l2=0.0):
    """The same by autograd through the mixture, and torch.optim."""
    space = subspace(kind, dtype)
    _, cls, options = RULES[rule]
    generator, S = torch.Generator().manual_seed(11), len(space.order)
    optimizer = cls([space.anchors], lr, **options)
    for c, x, y in zip(draws(kind, STEPS), *problem(dtype), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(space(x, c)[0], y)
        if curve_l2:
            loss = loss + curve_l2 / 2 * space.mix(c).square().sum()
        if cos2:
            code = torch.randint(S * (S - 1), (), generator=generator).item() if S > 2 else 0
            loss = loss + cos2 * cos2_of_all(space, *pair_of(code, S))
        loss.backward()
        optimizer.step()
    return space.anchors.detach()


def run(space, optimizer, steps=3, zero=True):
    generator = torch.Generator().manual_seed(1)
    for x, y in zip(*(t[:steps] for t in problem(space.anchors.dtype)), strict=True):
        if zero:
            optimizer.zero_grad()
        space.draw_(generator)
        F.cross_entropy(space.model(x), y).backward()
        optimizer.step()
    return space.anchors.detach().clone()
