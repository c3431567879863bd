"""tabm_step: a whole training step of tabm's own model, and its inference on few rows.

A step is what a user's loop runs: forward, loss, backward, AdamW. Dropout is on, except in the
first call of every contestant, which is the one held against the truth. The biases are far from
zero, so that roundings rarely decide what a ReLU lets through, and half of the units are shut. For
autocast the rest is small beside them, so that none does, and the factors are numbers that bfloat16
has: our layers round them, and an error that all examples share is no noise.
"""

import contextlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bench.case import Bound, Case, Contestant, Target, Work, missing
from bench.peers import imported
from landscape_fast.compat import accelerate_
from landscape_fast.models import TabM
from landscape_fast.nn.memory import saved_bytes

M, WIDTH, BLOCKS, COLUMNS = 32, 512, 3, 64  # the defaults of TabM.make, and a table of 64 columns
DROPOUT = 0.1
TRAIN = (Target("eager", "must", over="tabm.TabM", ratio=1.1),)
TRAIN_CUDA = (Target("eager", "must", over="compile", ratio=1.7),)
INFER = (Target("eager", "must", over="tabm.TabM", ratio=1.3),)


def shapes(members: int, width: int, columns: int) -> list[tuple[int, ...]]:
    """Of the parameters, as tabm orders them: weight, r, s, bias of each block, and the head."""
    found = []
    for into in (columns, *[width] * (BLOCKS - 1)):
        found += [(width, into), (members, into), (members, width), (members, width)]
    return [*found, (members, width, 1), (members, 1)]


def make(device, generator, B, members, width, columns, low=False):
    """x [B, columns], targets [B], parameters; `low` for a step under autocast."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    parameters = []
    for i, shape in enumerate(shapes(members, width, columns)):
        kind = ("weight", "r", "s", "bias")[i % 4] if i < 4 * BLOCKS else "head"
        values = normal(*shape)
        if kind in ("r", "s"):
            values = 1 + 0.1 * values
            values = values.bfloat16().float() if low else values
        elif kind == "bias":
            values = (8 if low else 12) * values.sign()
        else:  # blocks after the first read units of the size of their biases
            inner = low and 0 < i < 4 * BLOCKS
            values = values / shape[1] ** 0.5 / (8 if inner else 1)
        parameters.append(values)
    return normal(B, columns), normal(B), parameters


class Formula(nn.Module):
    """The network as one writes it in plain PyTorch; with `plain`, without the members' factors."""

    def __init__(self, parameters, plain=False):
        super().__init__()
        self.values = nn.ParameterList(parameters)
        self.plain = plain

    def forward(self, x):
        *blocks, head, shift = self.values
        h = x.unsqueeze(1).expand(-1, head.shape[0], -1)
        for i in range(0, len(blocks), 4):
            weight, r, s, bias = blocks[i : i + 4]
            if self.plain:
                h = F.linear(h, weight, bias[0])
            else:
                h = (h * r) @ weight.T * s + bias
            h = F.dropout(h.relu(), DROPOUT, self.training)
        return torch.einsum("bki,kio->bko", h, head) + shift


def build(kind: str, parameters) -> nn.Module:
    """A network with these parameters."""
    if kind in ("formula", "plain"):
        return Formula([t.clone() for t in parameters], plain=kind == "plain")
    members, width, _ = parameters[-2].shape
    columns = parameters[0].shape[1]
    cls = TabM if kind == "ours" else imported("tabm", "TabM")[0].make
    model = cls(n_num_features=columns, d_out=1, k=members, d_block=width, n_blocks=BLOCKS)
    for own, values in zip(model.parameters(), parameters, strict=True):
        own.data = values.clone()
    return accelerate_(model) if kind == "accelerated" else model


def step(model, x, targets, low, context) -> list:
    """A training step; returns y and the gradients."""
    # the learning rate keeps thousands of timed steps where the first one was
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-9)
    model.eval()

    def call():
        with torch.enable_grad():
            optimiser.zero_grad()
            with context():
                y = model(x).float() if low else model(x)
            F.mse_loss(y.squeeze(-1), targets[:, None].expand(y.shape[:2])).backward()
        optimiser.step()
        model.train()
        return [y.detach(), *[p.grad for p in model.parameters()]]

    return call


def infer(model, x, low, context):
    model.eval()

    def call():
        with torch.inference_mode(), context():
            return model(x).float() if low else model(x)

    return call


def truth(x, targets, parameters, train):
    """What the contestants return, in the dtype of the inputs."""
    model = Formula([t.clone() for t in parameters])
    found = step(model, x, targets, False, contextlib.nullcontext)() if train else None
    return found or infer(model, x, False, contextlib.nullcontext)()


def contestant(name, group, kind, device, train, note="", compiled=False, **options) -> Contestant:
    low = device == "cuda"  # there with AMP, as TabM is trained
    context = partial(torch.autocast, device, torch.bfloat16) if low else contextlib.nullcontext

    def bind(inputs, _):
        x, targets, parameters = inputs
        model = build(kind, parameters)
        if compiled:
            model.compile(dynamic=False)
        chosen = (x, targets) if train else (x,)
        return Bound((step if train else infer)(model, *chosen, low, context))

    return Contestant(name, group, bind, note=note, **options)


def contestants(device: str, quick: bool, sizes: dict, train: bool) -> list[Contestant]:
    """Our model, tabm's with our layers, tabm's, the formula, compiled, and without factors."""
    of = partial(contestant, device=device, train=train)
    unknown = quick or not train or device != "cpu"  # bench/memory.py measures it on a GPU
    found = [of("ours (TabM)", "ours", "ours", note=kept("ours", sizes, unknown))]
    cls, why = imported("tabm", "TabM")
    for name, group, kind in (
        ("ours (accelerate_)", "ours", "accelerated"),
        ("tabm.TabM", "library", "tabm"),
    ):
        if cls is None:
            found.append(missing(name, group, why))
        else:
            found.append(of(name, group, kind, note=kept(kind, sizes, unknown)))
    found.append(of("eager", "eager", "formula"))
    if quick:
        why = "left out of --quick runs: compiling takes too long"
        found.append(missing("compile (eager)", "compile", why))
    else:
        found.append(of("compile (eager)", "compile", "formula", compiled=True))
    return [*found, of("plain nn.Linear", "plain", "plain", same=False)]


def kept(kind: str, sizes: dict, unknown: bool) -> str:
    """What a forward saves for the backward, without its input."""
    if unknown:
        return ""
    x, _, parameters = make(torch.device("cpu"), torch.Generator().manual_seed(0), **sizes)
    return f"keeps {saved_bytes(build(kind, parameters), x) - x.nbytes} bytes for the backward"


def work(B, members, width, columns, dtype) -> dict[str, Work]:
    """Parameters and x read once, y written once; a training step has two more products."""
    rows = B * members
    weights = [a * b for a, b, *_ in shapes(members, width, columns)[: 4 * BLOCKS : 4]]
    flops = 2 * rows * (sum(weights) + width)
    numbers = sum(torch.Size(s).numel() for s in shapes(members, width, columns))
    return {"fwd": Work(dtype.itemsize * (numbers + B * columns + rows), flops)}


def cases(device: str, quick: bool) -> list[Case]:
    """See `bench.cases.cases`."""
    table = [(256, True, TRAIN_CUDA if device == "cuda" else TRAIN)]
    table += [(B, False, INFER) for B in (1, 4, 16, 64)] if device == "cpu" else []
    if quick:
        table = [(6, True, ()), (2, False, ())]
    found = []
    for priority, (B, train, targets) in enumerate(table):
        members, width, columns = (3, 8, 5) if quick else (M, WIDTH, COLUMNS)
        sizes = {"B": B, "members": members, "width": width, "columns": columns}
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        one = work(**sizes, dtype=dtype)["fwd"]
        found.append(
            Case(
                "tabm_step",
                {"step": "train" if train else "infer", "M": members, "B": B, "D": width},
                dtype,
                partial(make, **sizes, low=device == "cuda"),
                partial(truth, train=train),
                partial(contestants, sizes=sizes, train=train),
                {"fwd": Work(3 * one.bytes, 3 * one.flops) if train else one},
                ("eager",),
                targets,
                priority,
                "step" if train else "",
            )
        )
    return found
