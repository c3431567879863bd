"""deep_together: a training step of M networks in one run, against runs in turn and vmap.

A step is what a user's loop runs: forward, loss, backward, SGD with momentum; every member has rows
of its own. Dropout is off, so that everybody computes the same. Losses, and the norms of all
gradients, are held against float64: single gradients differ by what a ReLU or a maximum at its edge
lets through.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Bound, Case, Contestant, Target, Work
from landscape_fast.methods.config import TrainConfig
from landscape_fast.methods.deep_together import TogetherRun
from landscape_fast.models import MLP, MediumCNN, ResNet, SmallCNN, resnet20

LR = 1e-9  # thousands of timed steps stay where the first one was
MOMENTUM = 0.9
IN_TURN, ALONE = "runs in turn", "one member alone"


def networks() -> dict:
    """By name: how to build one, and the shape of a row."""
    picture = (3, 32, 32)
    return {
        "mlp": (partial(MLP, 64), (64,)),
        "small_cnn": (partial(SmallCNN, dropout=0.0), picture),
        "medium_cnn": (partial(MediumCNN, dropout=0.0), picture),
        "resnet20": (partial(resnet20, dropout=0.0), picture),
        "tiny_cnn": (partial(SmallCNN, (1, 8, 8), dropout=0.0), (1, 8, 8)),
        "tiny_resnet": (partial(ResNet, (1, 8, 8), 10, blocks=1, dropout=0.0), (1, 8, 8)),
    }


def _gpu_targets(times: float) -> tuple[Target, ...]:
    return (
        Target("eager", "must", over=IN_TURN, ratio=4),
        Target("eager", "must", over=ALONE, ratio=round(1 / times, 3)),
    )


NEVER_SLOWER = (Target("eager", "must", over=IN_TURN, ratio=0.95),)  # 1, less the noise of a bench
CUDA = (
    ("small_cnn", 10, 128, _gpu_targets(1.3)),
    ("medium_cnn", 10, 128, _gpu_targets(1.5)),
    ("resnet20", 10, 128, _gpu_targets(2.5)),
)
CPU = (
    ("small_cnn", 10, 128, NEVER_SLOWER),
    ("resnet20", 4, 32, NEVER_SLOWER),
    ("medium_cnn", 4, 32, NEVER_SLOWER),
    ("mlp", 10, 128, (Target("eager", "must", over=IN_TURN, ratio=1.5),)),
)
TINY = (("tiny_cnn", 2, 3, ()), ("tiny_resnet", 2, 3, ()))


def make(device, generator, name: str, M: int, B: int):
    """x [M, B, ...], classes [M, B], and the parameters of M networks, [M, ...] each."""
    build, shape = networks()[name]
    x = torch.randn(M, B, *shape, generator=generator, device=device)
    y = torch.randint(10, (M, B), generator=generator, device=device)
    parameters = []
    for p in build().parameters():
        ones = p.detach().to(device)
        noise = torch.randn(M, *p.shape, generator=generator, device=device)
        scale = ones.std() if p.ndim > 1 else 0.1  # a norm stays near its ones and zeros
        parameters.append(scale * noise + (0 if p.ndim > 1 else ones))
    return x, y, parameters


def members_of(name: str, parameters: list[Tensor], count: int | None = None) -> list[nn.Module]:
    """The networks with these parameters, in training mode."""
    first = networks()[name][0]().to(parameters[0].device, parameters[0].dtype)
    found = []
    for m in range(len(parameters[0]) if count is None else count):
        network = copy.deepcopy(first)
        for own, values in zip(network.parameters(), parameters, strict=True):
            own.data = values[m].clone()
        found.append(network.train())
    return found


def _norms(gradients) -> Tensor:
    """[M] norms of gradients [M, ...]."""
    return torch.stack([g.flatten(1).norm(dim=1) for g in gradients], 1)


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, nesterov=True)


def in_turn(name, inputs, count=None):
    """A step of every network by itself, as a loop over runs makes it."""
    x, y, parameters = inputs
    nets = members_of(name, parameters, count)
    optimizers = [_sgd(network.parameters()) for network in nets]

    def call():
        with torch.enable_grad():
            losses = []
            for network, optimizer, rows, classes in zip(nets, optimizers, x, y, strict=False):
                loss = F.cross_entropy(network(rows), classes)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return torch.stack(losses)

    def view(results):
        each = zip(*[network.parameters() for network in nets], strict=True)
        return [*results, _norms(torch.stack([p.grad for p in ps]) for ps in each)]

    return Bound(call, view=view)


def together(name, inputs):
    """Ours, on the way that it chooses."""
    x, y, parameters = inputs
    config = TrainConfig(batch_size=x.shape[1], optimizer="sgd", lr=LR, momentum=MOMENTUM)
    streams = range(len(x))
    run = TogetherRun(members_of(name, parameters), x[0], y[0], config, streams=streams)
    engine = run.engine
    engine.module.train()

    def call():
        with torch.enable_grad():
            return engine.step(x, y, True)[0]

    def view(results):
        if engine.way == "batched":
            return [*results, _norms(p.grad for p in engine.module.parameters())]
        each = zip(*[network.parameters() for network in engine.module], strict=True)
        return [*results, _norms(torch.stack([p.grad for p in ps]) for ps in each)]

    return Bound(call, view=view)


def vmapped(name, inputs):
    """torch.func: vmap over stack_module_state. Norms then cannot keep running statistics."""
    x, y, parameters = inputs
    nets = members_of(name, parameters)
    for network in nets:
        torch.func.replace_all_batch_norm_modules_(network)
    stacked, buffers = torch.func.stack_module_state(nets)
    optimizer = _sgd(list(stacked.values()))
    base = copy.deepcopy(nets[0]).to("meta")

    def loss(values, fixed, rows, classes):
        logits = torch.func.functional_call(base, (values, fixed), (rows,))
        return F.cross_entropy(logits, classes)

    step = torch.func.vmap(torch.func.grad_and_value(loss), randomness="different")

    def call():
        with torch.enable_grad():
            gradients, losses = step(stacked, buffers, x, y)
            for key, p in stacked.items():
                p.grad = gradients[key]
            optimizer.step()
        return losses

    def view(results):
        return [*results, _norms(p.grad for p in stacked.values())]

    return Bound(call, view=view)


def truth(x, y, parameters, name):
    """What the contestants return, in the dtype of the inputs."""
    bound = in_turn(name, (x, y, parameters))
    return bound.view([bound.call()])


def contestants(device: str, quick: bool, name: str) -> list[Contestant]:
    """Ours, M runs in turn, vmap, and what one run alone takes."""

    def bound(way, **options):
        return lambda inputs, train: way(name, inputs, **options)

    note = "without running statistics" if "resnet" in name else ""
    return [
        Contestant("ours (together)", "ours", bound(together)),
        Contestant(IN_TURN, "eager", bound(in_turn)),
        Contestant("vmap over stack_module_state", "library", bound(vmapped), note=note),
        Contestant(ALONE, "plain", bound(in_turn, count=1), same=False),
    ]


def work(name: str, M: int, B: int) -> Work:
    """Parameters, gradients and momenta read and written; rows read. Flops are not counted."""
    build, shape = networks()[name]
    numbers = sum(p.numel() for p in build().parameters())
    return Work(4 * M * (5 * numbers + B * torch.Size(shape).numel()))


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    table = TINY if quick else CUDA if device == "cuda" else CPU
    return [
        Case(
            "deep_together",
            {"step": "train", "network": name, "M": M, "B": B},
            torch.float32,
            partial(make, name=name, M=M, B=B),
            partial(truth, name=name),
            partial(contestants, name=name),
            {"fwd": work(name, M, B)},
            ("eager",),
            targets,
            priority,
            "step",
        )
        for priority, (name, M, B, targets) in enumerate(table)
    ]
