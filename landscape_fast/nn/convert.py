"""Turns the layers of an existing network into layers with members."""

import fnmatch
import logging
from collections.abc import Iterable, Sequence

from torch import Generator, nn
from torch.nn.utils import parametrize

from landscape_fast.nn.batch_ensemble import BatchEnsembleLinear
from landscape_fast.nn.batch_ensemble_conv import BatchEnsembleConv2d
from landscape_fast.nn.functional import check_count
from landscape_fast.nn.init import Initialiser
from landscape_fast.ops._checks import message, require

_LOG = logging.getLogger(__name__)
_MAKERS = {nn.Linear: BatchEnsembleLinear.from_linear, nn.Conv2d: BatchEnsembleConv2d.from_conv2d}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# These read the weights of their linear layers instead of calling them (the encoder layer on its
# fast path): factors would be ignored without a word.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

Selection = str | type[nn.Module] | Iterable[str | type[nn.Module]] | None


def convert_(
    model: nn.Module,
    members: int,
    *,
    include: Selection = None,
    exclude: Selection = None,
    bias: bool | str = True,
    layout: str = "member_major",
    r: bool = True,
    s: bool = True,
    r_init: str | Initialiser = "ones",
    s_init: str | Initialiser = "ones",
    generator: Generator | None = None,
) -> nn.Module:
    """Replaces every `nn.Linear` and `nn.Conv2d` inside `model` by its BatchEnsemble, in place.

    Weights, dtype, device, requires_grad and train mode stay. With r and s all ones every member
    computes what `model` did. A module used in several places is converted once and stays shared;
    the weight Parameters stay the same objects, so tied weights stay tied and an optimiser needs
    only the new parameters (r, s, and the bias per member). If an error is raised, nothing has
    changed.

    `ensemble_layers(model)` lists what was converted, and the logger `landscape_fast.nn.convert`
    tells it at level INFO. The remaining modules must understand the layout: activations and
    `nn.Linear` take [M, B, ...]; pooling, batch normalisation, plain convolutions and `nn.Flatten`
    want layout="folded", with `FoldedEnsemble` around the result.

    Args:
        model: a network, or a single layer, which is then returned converted.
        members: M.
        include: what to convert: qualified names, patterns ("blocks.*.conv?"), layer types, or a
            list of such. A name or type also stands for all that is inside. None: every layer.
        exclude: what not to convert, in the same form; stronger than `include`.
        bias: True for a bias per member, a copy of the layer's, or "shared".
        layout: of the new layers; `r`, `s`, `r_init`, `s_init` are theirs, too.
        generator: draws all factors, in the order of `model.named_modules()`.

    Returns:
        `model`, or the new layer where `model` is itself a layer to convert.

    Raises:
        ValueError: if a selection or the whole call matches no layer, or if a layer cannot be
            replaced without loss: with hooks, parametrised (weight norm), a subclass, or inside a
            module that reads its weights directly (attention).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> model = convert_(model, members=4, exclude="2", r_init="random_sign")
        >>> from landscape_fast.nn import ensemble_layers
        >>> list(ensemble_layers(model)), model(torch.zeros(5, 8)).shape
        (['0'], torch.Size([4, 5, 3]))
    """
    check_count("convert_", "members", members)
    chosen = _choose(model, _items("include", include), _items("exclude", exclude))
    for layer, lineage in chosen.items():
        _refuse(layer, lineage)
    options = {"bias": bias, "layout": layout, "r": r, "s": s, "r_init": r_init, "s_init": s_init}
    made = {
        layer: _MAKERS[type(layer)](layer, members, generator=generator, tie=True, **options)
        for layer in chosen
    }
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    for layer, lineage in chosen.items():
        _LOG.info("%s: %s", lineage[0][0] or "model", made[layer])
    return made.get(model, model)


def _items(argument: str, selection: Selection) -> tuple[str | type[nn.Module], ...] | None:
    if selection is None:
        return None
    several = isinstance(selection, Iterable) and not isinstance(selection, str | type)
    items = tuple(selection) if several else (selection,)
    for item in items:
        ok = isinstance(item, str) or isinstance(item, type) and issubclass(item, nn.Module)
        require(ok, "convert_", argument, "names, patterns or module types", repr(item))
    return items


def _choose(model: nn.Module, include: Sequence | None, exclude: Sequence | None) -> dict:
    """{layer to convert: its lineage}, in the order of `named_modules`.

    The lineage of a layer is (name, module) for itself and all modules around it, by every path
    that leads to it; its own first name comes first.
    """
    require(isinstance(model, nn.Module), "convert_", "model", "an nn.Module", type(model).__name__)
    lineages: dict[nn.Module, list] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, tuple(_MAKERS)):
            path = name.split(".") if name else []
            outer = [".".join(path[:end]) for end in range(len(path), -1, -1)]
            lineage = [(outer_name, model.get_submodule(outer_name)) for outer_name in outer]
            lineages.setdefault(module, []).extend(lineage)
    for argument, items in (("include", include), ("exclude", exclude)):
        for item in items or ():
            used = any(_matches(item, lineage) for lineage in lineages.values())
            known = ", ".join(repr(lineage[0][0]) for lineage in lineages.values()) or "none"
            shown = item.__name__ if isinstance(item, type) else repr(item)
            rule = "a name, pattern or type of layers that can be converted"
            require(used, "convert_", argument, rule, shown, f"there are {known}")
    chosen = {
        layer: lineage
        for layer, lineage in lineages.items()
        if (include is None or any(_matches(item, lineage) for item in include))
        and not any(_matches(item, lineage) for item in exclude or ())
    }
    rule = "a network with an nn.Linear or nn.Conv2d to convert"
    require(bool(chosen), "convert_", "model", rule, f"{type(model).__name__} with none selected")
    return chosen


def _matches(item: str | type[nn.Module], lineage: Sequence) -> bool:
    """Whether the item is a type or a name pattern of the layer or of a module around it."""
    if isinstance(item, type):
        return any(isinstance(module, item) for _, module in lineage)
    return any(fnmatch.fnmatchcase(name, item) for name, _ in lineage)


def _refuse(layer: nn.Module, lineage: Sequence) -> None:
    """Raises where replacing the layer would lose something."""
    name, kind = lineage[0][0], type(layer)
    remedy = f"exclude={name!r} leaves it as it is"
    hooks = [hook for hook in _HOOKS if getattr(layer, hook, None)]
    readers = [
        type(module).__name__
        for _, module in lineage[1:]
        if any(isinstance(module, t) and type(module).forward is t.forward for t in _READERS)
    ]
    if parametrize.is_parametrized(layer):
        rule, got = "free of parametrizations", ", ".join(layer.parametrizations)
    elif readers:
        rule, got = "called by what is around it", f"{readers[0]}, which reads its weights instead"
    elif kind not in _MAKERS:
        rule, got = "an nn.Linear or nn.Conv2d, not a subclass", kind.__name__
    elif hooks:
        rule, got = "free of hooks", ", ".join(hooks)
    else:
        return
    raise ValueError(message("convert_", f"layer {name!r}", rule, got, remedy))
