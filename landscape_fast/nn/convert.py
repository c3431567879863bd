"""Turns the layers of an existing network into layers with members."""

import fnmatch
import logging
from collections.abc import Container, Iterable, Sequence

from torch import Generator, nn
from torch.nn.utils import parametrize

from landscape_fast.nn import batch_ensemble_conv as conv
from landscape_fast.nn import norm as norms
from landscape_fast.nn.attention import BatchEnsembleMultiheadAttention
from landscape_fast.nn.batch_ensemble import BatchEnsembleLinear
from landscape_fast.nn.functional import check_count
from landscape_fast.nn.init import Initialiser
from landscape_fast.ops._checks import message, require

_LOG = logging.getLogger(__name__)
_MAKERS = {
    nn.Linear: BatchEnsembleLinear.from_linear,
    nn.Conv1d: conv.BatchEnsembleConv1d.from_conv1d,
    nn.Conv2d: conv.BatchEnsembleConv2d.from_conv2d,
    nn.Conv3d: conv.BatchEnsembleConv3d.from_conv3d,
    nn.ConvTranspose1d: conv.BatchEnsembleConvTranspose1d.from_conv_transpose1d,
    nn.ConvTranspose2d: conv.BatchEnsembleConvTranspose2d.from_conv_transpose2d,
    nn.ConvTranspose3d: conv.BatchEnsembleConvTranspose3d.from_conv_transpose3d,
    nn.MultiheadAttention: BatchEnsembleMultiheadAttention.from_attention,
}
_NORMS = {
    nn.BatchNorm1d: norms.EnsembleBatchNorm1d.from_batchnorm,
    nn.BatchNorm2d: norms.EnsembleBatchNorm2d.from_batchnorm,
    nn.BatchNorm3d: norms.EnsembleBatchNorm3d.from_batchnorm,
    nn.LayerNorm: norms.EnsembleLayerNorm.from_layernorm,
}
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
    rank: int = 1,
    norm: str = "shared",
    generator: Generator | None = None,
) -> nn.Module:
    """Replaces the linear layers, convolutions and attentions of `model` by ensembles, in place.

    That is `nn.Linear`, `nn.Conv1d` to `nn.ConvTranspose3d` and `nn.MultiheadAttention`, the
    latter also inside the layers of `nn.Transformer`, whose fast path in evaluation mode, which
    reads the weights of its layers, then stays off. Weights, dtype, device, requires_grad and
    train mode stay. With r and s all ones every member computes what `model` did. A module used in
    several places is converted once and stays shared; the weight Parameters stay the same objects,
    but those of norms per member, which are copies. So tied weights stay tied and an optimiser
    needs only the new parameters (r, s, the bias per member, those of norms per member, and those
    of an attention whose input projections were packed in one). If an error is raised, nothing has
    changed.

    `ensemble_layers(model)` lists the layers with factors, and the logger
    `landscape_fast.nn.convert` tells at level INFO what was converted. The remaining modules must
    understand the layout: activations and `nn.Linear` take [M, B, ...]; pooling, shared batch
    normalisation, plain convolutions and `nn.Flatten` want layout="folded", with `FoldedEnsemble`
    around the result.

    Args:
        model: a network, or a single layer, which is then returned converted.
        members: M.
        include: what to convert: qualified names, patterns ("blocks.*.conv?"), layer types, or a
            list of such. A name or type also stands for all that is inside. None: every layer.
        exclude: what not to convert, in the same form; stronger than `include`.
        bias: True for a bias per member, a copy of the layer's, or "shared".
        layout: of the new layers; `r`, `s`, `r_init`, `s_init`, `rank` are theirs, too.
        norm: "shared" leaves normalisation as it is: one set of statistics and one affine for all
            members. "per_member" replaces BatchNorm and LayerNorm by the layers of
            `landscape_fast.nn.norm`, too.
        generator: draws all factors, in the order of `model.named_modules()`.

    Returns:
        `model`, or the new layer where `model` is itself a layer to convert.

    Raises:
        ValueError: if a selection or the whole call matches no layer, or if a layer cannot be
            replaced without loss: with hooks, parametrised (weight norm), a subclass, or read by
            a module around it instead of called (a layer of a transformer without its attention).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> model = convert_(model, members=4, exclude="2", r_init="random_sign")
        >>> from landscape_fast.nn import ensemble_layers
        >>> list(ensemble_layers(model)), model(torch.zeros(5, 8)).shape
        (['0'], torch.Size([4, 5, 3]))
    """
    check_count("convert_", "members", members)
    kinds = "'shared' or 'per_member'"
    require(norm in ("shared", "per_member"), "convert_", "norm", kinds, repr(norm))
    makers = _MAKERS | _NORMS if norm == "per_member" else _MAKERS
    chosen = _choose(model, _items("include", include), _items("exclude", exclude), makers)
    for layer, lineage in chosen.items():
        _refuse(layer, lineage, chosen)
    factors = {"r": r, "s": s, "r_init": r_init, "s_init": s_init, "rank": rank}
    options = {**factors, "bias": bias, "layout": layout, "generator": generator, "tie": True}
    made = {}
    for layer in chosen:
        own = {"layout": layout} if type(layer) in _NORMS else options
        made[layer] = makers[type(layer)](layer, members, **own)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    for layer, lineage in chosen.items():
        for _, around in lineage:
            if isinstance(around, nn.TransformerEncoder):
                around.use_nested_tensor = False  # the fast path, which reads weights
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


def _choose(model: nn.Module, include: Sequence | None, exclude: Sequence | None, makers) -> dict:
    """{layer to convert: its lineage}, in the order of `named_modules`.

    The lineage of a layer is (name, module) for itself and all modules around it, by every path
    that leads to it; its own first name comes first.
    """
    require(isinstance(model, nn.Module), "convert_", "model", "an nn.Module", type(model).__name__)
    lineages: dict[nn.Module, list] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, tuple(makers)):
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
    # an attention is converted as a whole
    parts = {part for layer in chosen if type(layer) in makers for part in layer.children()}
    chosen = {layer: lineage for layer, lineage in chosen.items() if layer not in parts}
    rule = "a network with layers to convert"
    require(bool(chosen), "convert_", "model", rule, f"{type(model).__name__} with none selected")
    return chosen


def _matches(item: str | type[nn.Module], lineage: Sequence) -> bool:
    """Whether the item is a type or a name pattern of the layer or of a module around it."""
    if isinstance(item, type):
        return any(isinstance(module, item) for _, module in lineage)
    return any(fnmatch.fnmatchcase(name, item) for name, _ in lineage)


def _refuse(layer: nn.Module, lineage: Sequence, chosen: Container) -> None:
    """Raises where replacing the layer would lose something."""
    name, kind, makers = lineage[0][0], type(layer), _MAKERS | _NORMS
    remedy = f"exclude={name!r} leaves it as it is"
    hooks = [hook for part in layer.modules() for hook in _HOOKS if getattr(part, hook, None)]
    parametrized = [part for part in layer.modules() if parametrize.is_parametrized(part)]
    readers = [type(m).__name__ for _, m in lineage if m is not layer and _reads(m, chosen)]
    if parametrized:
        rule, got = "free of parametrizations", ", ".join(parametrized[0].parametrizations)
    elif readers:
        rule, got = "called by what is around it", f"{readers[0]}, which reads its weights instead"
    elif kind not in makers:
        base = next(maker.__name__ for maker in makers if isinstance(layer, maker))
        rule, got = f"an nn.{base}, not a subclass", kind.__name__
    elif hooks:
        rule, got = "free of hooks", ", ".join(hooks)
    else:
        return
    raise ValueError(message("convert_", f"layer {name!r}", rule, got, remedy))


def _reads(module: nn.Module, chosen: Container) -> bool:
    """Whether the module reads the weights of its layers where it could call them.

    An attention always does; an encoder layer on its fast path, if its attention is a plain one.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        attention = module.self_attn
        plain = isinstance(attention, nn.MultiheadAttention) and attention not in chosen
        return plain and type(module).forward is nn.TransformerEncoderLayer.forward
    stock = isinstance(module, nn.MultiheadAttention)
    return stock and type(module).forward is nn.MultiheadAttention.forward
