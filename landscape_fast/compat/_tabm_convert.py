"""The normalisations of `tabm`, and its functions that give a network members, in place."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from landscape_fast.compat._tabm_layers import (
    ElementwiseAffine,
    LinearBatchEnsemble,
    LinearEnsemble,
)
from landscape_fast.nn.functional import check_count
from landscape_fast.ops._checks import require


class BatchNorm1dEnsemble(nn.Module):
    """k independent `nn.BatchNorm1d`: [B, k, F] -> [B, k, F].

    Args:
        num_features: F.
        k: the number of members.
        affine: False leaves scale and shift out.
        options: of `nn.BatchNorm1d`.

    Example:
        >>> BatchNorm1dEnsemble(2, k=3)(torch.zeros(4, 3, 2)).shape
        torch.Size([4, 3, 2])
    """

    def __init__(self, num_features: int, *, k: int, affine: bool = True, **options):
        super().__init__()
        check_count("BatchNorm1dEnsemble", "k", k)
        self.impl = nn.BatchNorm1d(k * num_features, affine=False, **options)
        self.affine = _affine((k, num_features), options) if affine else None
        self._k = k

    @classmethod
    def from_batchnorm1d(cls, module: nn.BatchNorm1d, **options) -> "BatchNorm1dEnsemble":
        """k times `module`: its scale, shift and running statistics are kept."""
        names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
        taken = {name: getattr(module, name) for name in names}
        layer = cls(**taken, **_like(module), **options)
        _take_affine(layer, module)
        if module.running_mean is not None:
            for name in ("running_mean", "running_var"):
                getattr(layer.impl, name).copy_(getattr(module, name).repeat(layer.k))
            layer.impl.num_batches_tracked.copy_(module.num_batches_tracked)
        return layer

    k = property(lambda self: self._k, doc="The number of members.")

    def forward(self, x: Tensor) -> Tensor:
        fits = x.ndim == 3 and x.shape[1] == self.k
        require(fits, "BatchNorm1dEnsemble", "x", f"[B, k, F] with k = {self.k}", list(x.shape))
        y = self.impl(x.flatten(1)).unflatten(1, x.shape[1:])
        return y if self.affine is None else self.affine(y)


class LayerNormEnsemble(nn.Module):
    """k independent `nn.LayerNorm`: [*, k, *normalized_shape] -> the same.

    Args:
        normalized_shape: of one member.
        k: the number of members.
        elementwise_affine: False leaves scale and shift out.
        options: of `nn.LayerNorm`.

    Example:
        >>> LayerNormEnsemble((2, 3), k=4)(torch.zeros(5, 6, 4, 2, 3)).shape
        torch.Size([5, 6, 4, 2, 3])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        k: int,
        elementwise_affine: bool = True,
        **options,
    ):
        super().__init__()
        check_count("LayerNormEnsemble", "k", k)
        self.impl = nn.LayerNorm(normalized_shape, elementwise_affine=False, **options)
        shape = (k, *self.impl.normalized_shape)
        self.affine = _affine(shape, options) if elementwise_affine else None
        self._k = k

    @classmethod
    def from_layernorm(cls, module: nn.LayerNorm, **options) -> "LayerNormEnsemble":
        """k times `module`: its scale and shift are kept; one without a shift gets zero."""
        names = ("normalized_shape", "eps", "elementwise_affine")
        taken = {name: getattr(module, name) for name in names}
        layer = cls(**taken, **_like(module), **options)
        _take_affine(layer, module)
        return layer

    k = property(lambda self: self._k, doc="The number of members.")

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.k, *self.impl.normalized_shape)
        fits = x.ndim >= len(shape) and x.shape[x.ndim - len(shape) :] == shape
        rule = f"[..., {', '.join(map(str, shape))}]"
        require(fits, "LayerNormEnsemble", "x", rule, list(x.shape))
        y = self.impl(x)
        return y if self.affine is None else self.affine(y)


def _affine(shape: tuple[int, ...], options: dict) -> ElementwiseAffine:
    factory = {name: options.get(name) for name in ("dtype", "device")}
    return ElementwiseAffine(shape, bias=True, scaling_init="ones", **factory)


def _like(module: nn.Module) -> dict:
    """dtype and device of a normalisation, as far as it has tensors that tell."""
    tensors = [module.weight, getattr(module, "running_mean", None)]
    known = next((t for t in tensors if t is not None), None)
    return {} if known is None else {"dtype": known.dtype, "device": known.device}


@torch.no_grad()
def _take_affine(layer: nn.Module, module: nn.Module) -> None:
    for name in ("weight", "bias"):
        values = getattr(module, name)
        if layer.affine is not None and values is not None:
            getattr(layer.affine, name).copy_(values)


def ensemble_linear_layers_(module: nn.Module, **options) -> None:
    """Every `nn.Linear` inside `module` becomes a `LinearEnsemble`, in place.

    Args:
        module: the network around the layers.
        options: of `LinearEnsemble`; and `include` or `exclude`, a list of layers: only these are
            replaced, or all but these.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
        >>> ensemble_linear_layers_(model, exclude=[model[0]], k=5)
        >>> type(model[0]).__name__, type(model[2]).__name__
        ('Linear', 'LinearEnsemble')
    """
    _replace_(module, nn.Linear, LinearEnsemble.from_linear, **options)


def batchensemble_linear_layers_(module: nn.Module, **options) -> None:
    """Every `nn.Linear` inside `module` becomes a `LinearBatchEnsemble`, in place.

    Args:
        module: the network around the layers.
        options: of `LinearBatchEnsemble`, `include`, `exclude`; see `ensemble_linear_layers_`.
    """
    _replace_(module, nn.Linear, LinearBatchEnsemble.from_linear, **options)


def ensemble_batchnorm1d_layers_(module: nn.Module, **options) -> None:
    """Every `nn.BatchNorm1d` inside `module` becomes a `BatchNorm1dEnsemble`, in place.

    Args:
        module: the network around the layers.
        options: of `BatchNorm1dEnsemble`, `include`, `exclude`; see `ensemble_linear_layers_`.
    """
    _replace_(module, nn.BatchNorm1d, BatchNorm1dEnsemble.from_batchnorm1d, **options)


def ensemble_layernorm_layers_(module: nn.Module, **options) -> None:
    """Every `nn.LayerNorm` inside `module` becomes a `LayerNormEnsemble`, in place.

    Args:
        module: the network around the layers.
        options: of `LayerNormEnsemble`, `include`, `exclude`; see `ensemble_linear_layers_`.
    """
    _replace_(module, nn.LayerNorm, LayerNormEnsemble.from_layernorm, **options)


def _replace_(
    module: nn.Module,
    kind: type[nn.Module],
    factory: Callable[..., nn.Module],
    *,
    include: Sequence[nn.Module] | None = None,
    exclude: Sequence[nn.Module] | None = None,
    **options,
) -> None:
    """A layer that is used in several places is replaced once, and stays shared."""
    op = f"{factory.__self__.__name__} conversion"
    root = not isinstance(module, kind)
    require(root, op, "module", f"around an nn.{kind.__name__}, not one", type(module).__name__,
            f"call {factory.__self__.__name__}.{factory.__name__}")  # fmt: skip
    both = include is not None and exclude is not None
    require(not both, op, "include", "None where exclude is given", "both")
    inside = {id(m) for m in module.modules()}
    for name, listed in (("include", include), ("exclude", exclude)):
        for layer in listed or ():
            fits = isinstance(layer, kind) and id(layer) in inside
            rule = f"a list of nn.{kind.__name__} inside module"
            require(fits, op, name, rule, type(layer).__name__)
    chosen = None if include is None else {id(layer) for layer in include}
    kept = {id(layer) for layer in exclude or ()}
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, kind) or id(child) in kept:
                continue
            if chosen is None or id(child) in chosen:
                if child not in made:
                    made[child] = factory(child, **options)
                parent._modules[name] = made[child]
