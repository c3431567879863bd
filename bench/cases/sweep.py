"""sweep: scores of the models of a curve or a plane in weight space; models per second is S / time.

Everybody gets the rows, the ends and the coefficients of all models, and returns the loss of each.
Batch norms are recalibrated at every point, in one batch, where the usual way is exact, too.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from bench.case import Case, Contestant, Target, Work, function
from landscape_fast.methods import sweep
from landscape_fast.models import SmallCNN, cresnet20
from landscape_fast.nn import FlatLayout

NETWORKS = {"SmallCNN": SmallCNN, "cResNet20": cresnet20}
CALIBRATION = 1000  # rows, at most, in one batch
# Equal on a CPU, less what the timing of two runs of the same differs by.
CPU = (Target("eager", "must", over="one at a time", ratio=0.95),)
CUDA = (Target("eager", "must", over="one at a time", ratio=4.0),)


def build(name: str, like: torch.Tensor, generator=None) -> nn.Module:
    """An untrained network in evaluation mode, for rows like these."""
    model = NETWORKS[name](tuple(like.shape[1:]), generator=generator, dtype=like.dtype)
    return model.to(like.device).eval().requires_grad_(False)


def make(device, generator, name, S, N, size):
    """Rows, classes, rows to calibrate on, the corners of a line or a plane, coefficients."""
    on_cpu = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, size, size, generator=generator, device=device)
    rows = torch.randn(min(N, CALIBRATION), *x.shape[1:], generator=generator, device=device)
    side = round(S**0.5)
    plane = S == side * side
    corners = [build(name, x, generator=on_cpu) for _ in range(2 + plane)]
    t = torch.linspace(0, 1, side if plane else S, device=device)
    points = torch.cartesian_prod(t, t) if plane else t[:, None]
    coeffs = torch.cat([1 - points.sum(1, keepdim=True), points], 1)  # [S, K]
    y = torch.arange(N, device=device) % 10
    return x, y, rows, FlatLayout(corners[0]).flatten_many(corners), coeffs


def ours(x, y, calibration, corners, coeffs, name, per_pass):
    found = sweep(
        build(name, x),
        lambda start, stop: coeffs[start:stop] @ corners,
        len(coeffs),
        x,
        y,
        calibration=calibration,
        per_pass=per_pass,
        progress=False,
    )
    return found.loss.to(x.device)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def one_at_a_time(x, y, calibration, corners, coeffs, name):
    """The usual loop: load the weights, recalibrate, score."""
    model = build(name, x)
    layout, found = FlatLayout(model), []
    for layer in norms(model):
        layer.momentum = None  # so that statistics are those of the batch
    for point in coeffs:
        views = layout.views(point @ corners)
        for key, parameter in model.named_parameters():
            parameter.copy_(views[key])
        if norms(model):
            for layer in norms(model):
                layer.reset_running_stats()
                layer.train()
            model(calibration)
            model.eval()
        logits = torch.cat([model(rows) for rows in x.split(1000)])
        found.append(F.cross_entropy(logits, y))
    return torch.stack(found)


@torch.no_grad()
def vmapped(x, y, calibration, corners, coeffs, name, together):
    """`torch.func.vmap` over stacked states, `together` of them at once."""
    model = build(name, x)
    layout, found = FlatLayout(model), []
    for layer in norms(model):
        layer.momentum = 1.0
    training = copy.deepcopy(model)
    for layer in norms(training):
        layer.train()

    def run(network, weights, buffers, rows):
        call = torch.vmap(lambda *both: functional_call(network, both, (rows,)))
        return call(weights, buffers)

    for points in coeffs.split(together):
        weights = layout.views(points @ corners)
        buffers = {k: b.expand(len(points), *b.shape).clone() for k, b in model.named_buffers()}
        if buffers:
            run(training, weights, buffers, calibration)
        logits = torch.cat([run(model, weights, buffers, rows) for rows in x.split(1000)], 1)
        found += [F.cross_entropy(one, y) for one in logits]
    return torch.stack(found)


def contestants(device: str, quick: bool, name: str) -> list[Contestant]:
    """One at a time or several, by us; the usual loop; vmap."""
    together = 3 if quick else 8 if device == "cpu" else 16
    return [
        function("ours (auto)", "ours", partial(ours, name=name, per_pass="auto")),
        function(f"ours ({together})", "ours", partial(ours, name=name, per_pass=together)),
        function("one at a time", "eager", partial(one_at_a_time, name=name)),
        function(f"vmap ({together})", "library", partial(vmapped, name=name, together=together)),
    ]


def work(name: str, S: int, N: int, size: int) -> dict[str, Work]:
    """Rows read once and all weights written once; the products of the convolutions."""
    one, flops = torch.zeros(1, 3, size, size), []
    model = build(name, one)

    def count(layer, given, y):
        flops.append(2 * y.numel() * layer.weight[0].numel())

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(count)
    model(one)
    rows = N + (min(N, CALIBRATION) if norms(model) else 0)
    moved = 4 * (S * FlatLayout(model).P + N * one.numel())
    return {"fwd": Work(moved, S * rows * sum(flops))}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    size = 8 if quick else 32
    if quick:
        table = [("SmallCNN", 4, 4), ("cResNet20", 3, 4)]
    elif device == "cpu":
        table = [("SmallCNN", 61, 32), ("cResNet20", 16, 32)]
    else:
        table = [("SmallCNN", 61, 10000), ("cResNet20", 61, 10000), ("SmallCNN", 41 * 41, 1000)]
    return [
        Case(
            "sweep",
            {"model": name, "S": S, "N": N},
            torch.float32,
            partial(make, name=name, S=S, N=N, size=size),
            partial(one_at_a_time, name=name),
            partial(contestants, name=name),
            work(name, S, N, size),
            ("eager",),
            () if quick else CPU if device == "cpu" else CUDA,
            priority,
        )
        for priority, (name, S, N) in enumerate(table)
    ]
