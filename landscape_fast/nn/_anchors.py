"""The first weights of the anchors of a subspace."""

import copy
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from landscape_fast.nn.flat import FlatLayout, Source
from landscape_fast.ops._checks import require, whole

STARTS = ("independent", "copies")


def start_anchors(
    model: nn.Module,
    layout: FlatLayout,
    anchors: int | Sequence[Source],
    start: str,
    generator: Generator | None,
) -> Tensor:
    """[K, P] on the device of `model`, as `Subspace` describes."""
    op = "Subspace"
    require(start in STARTS, op, "start", f"one of {STARTS}", repr(start))
    device = next(model.parameters()).device
    if not isinstance(anchors, int):
        return layout.flatten_many(list(anchors)).to(device)
    require(whole(anchors, 1), op, "anchors", "K of at least 1, or K networks", repr(anchors))
    if start == "copies":
        return layout.flatten(model).repeat(anchors, 1)
    own = [layout.flatten(redrawn(model, generator)) for _ in range(anchors - 1)]
    return torch.stack([layout.flatten(model), *(row.to(device) for row in own)])


def redrawn(model: nn.Module, generator: Generator | None) -> nn.Module:
    """A copy of `model` on the CPU with new initial values, by `reset_parameters` of its modules.

    Inner modules draw before outer ones, which have the last word. A generator gives the seed;
    without one the values come from torch's global generator.
    """
    model = copy.deepcopy(model).cpu()
    resets = {}
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        resets[name] = reset or getattr(module, "_reset_parameters", None)
    for name, module in model.named_modules():
        owns = next(module.parameters(recurse=False), None) is not None
        around = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]
        covered = any(resets[outer] for outer in (*around, ""))
        remedy = "pass a list of K networks"
        got = f"{type(module).__name__} {name!r} without it"
        rule = "made of modules with reset_parameters()"
        require(covered or not owns, "Subspace", "model", rule, got, remedy)
    with torch.random.fork_rng(devices=[], enabled=generator is not None):
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            torch.default_generator.manual_seed(int(seed))
        for reset in reversed(list(resets.values())):
            if reset is not None:
                reset()
    return model
