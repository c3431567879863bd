"""Many networks of one architecture as one set of tensors, and the modules that read them."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn._stacked_loop import MemberStreams
from landscape_fast.nn.stacked_layers import stand_in
from landscape_fast.ops._checks import message, require

OP = "StackedEnsemble"


def stack(networks: list[nn.Module]) -> tuple[nn.Module, dict[int, Tensor]]:
    """The first network on the meta device, and the stacked tensors by the id of its tensors."""
    first = networks[0]
    for i, network in enumerate(networks):
        if not isinstance(network, nn.Module):
            text = message(OP, f"networks[{i}]", "an nn.Module", type(network).__name__)
            raise TypeError(text)
    every = [tensors(network) for network in networks]
    lazy = [n for n, t in every[0].items() if isinstance(t, nn.parameter.UninitializedTensorMixin)]
    require(not lazy, OP, "networks", "initialised", f"{lazy[:1]} without a shape", "call it once")
    shown, ties, set_to = repr(first), _ties(every[0]), _settings(first)
    for i, (network, named) in enumerate(zip(networks, every, strict=True)):
        if network is first:
            continue
        rule = "of the class, settings and names of networks[0]"
        alike = type(network) is type(first) and repr(network) == shown
        alike = alike and list(named) == list(every[0]) and _ties(named) == ties
        alike = alike and _settings(network) == set_to
        require(alike, OP, f"networks[{i}]", rule, f"a {type(network).__name__} that differs")
        for name, tensor in named.items():
            want, got = _kind(every[0][name]), _kind(tensor)
            rule = f"{want} in {name!r}, as networks[0]"
            require(want == got, OP, f"networks[{i}]", rule, got)
    memo, table = {}, {}
    for module in first.modules():  # what an older weight_norm leaves behind cannot be copied
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    for name, tensor in every[0].items():
        if id(tensor) in memo:
            continue
        full = torch.stack([named[name].detach() for named in every])
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, Parameter):
            full = Parameter(full, requires_grad=tensor.requires_grad)
            empty = Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)], table[id(empty)] = empty, full
    return copy.deepcopy(first, memo), table


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under each of their names."""
    named = list(model.named_parameters(remove_duplicate=False))
    return dict(named + list(model.named_buffers(remove_duplicate=False)))


def _ties(named: dict[str, Tensor]) -> list[int]:
    """For each name the place of the first one with the same tensor."""
    places: dict[int, int] = {}
    return [places.setdefault(id(t), place) for place, t in enumerate(named.values())]


def _settings(model: nn.Module) -> list[tuple[str, str]]:
    """Numbers and words that the modules keep, of which their descriptions need not tell."""
    every = [item for module in model.modules() for item in vars(module).items()]
    kept = [(key, value) for key, value in every if isinstance(value, bool | int | float | str)]
    return [(key, repr(v)) for key, v in kept if key != "training" and not key.startswith("_")]


def _kind(t: Tensor) -> str:
    grad = "" if t.requires_grad or not isinstance(t, Parameter) else ", without gradient"
    return f"{list(t.shape)} {t.dtype} on {t.device}{grad}"


def assemble(
    plain: nn.Module, members: int, table: dict[int, Tensor], streams: MemberStreams
) -> nn.Module:
    """The network of M members: `plain` with the tensors of `table`, and layers that read them."""
    made: dict[int, object] = {}
    _replace(plain, members, table, made, streams)
    for module in plain.modules():
        if isinstance(module, nn.TransformerEncoder) and id(module) not in made:
            module.use_nested_tensor = False  # it would read the weights of its layers
    for tensor in tensors(plain).values():
        made[id(tensor)] = table[id(tensor)]
    return copy.deepcopy(plain, made)


def _replace(plain, members, table, made, streams) -> None:
    """Enters in `made`, by id, what stands for `plain` or for the modules inside of it."""
    if id(plain) in made:
        return
    layer = stand_in(plain, members, table, made, streams)
    if layer is not None:
        made[id(plain)] = layer
        return
    for child in plain.children():
        _replace(child, members, table, made, streams)
