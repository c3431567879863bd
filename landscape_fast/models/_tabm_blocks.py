"""The blocks of a TabM and how they run, in fewer passes than module by module."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from landscape_fast.models._tabm_start import table_rows
from landscape_fast.nn.batch_ensemble import BatchEnsembleLinear
from landscape_fast.nn.dropout import relu_dropout
from landscape_fast.nn.functional import check_count
from landscape_fast.ops._checks import require
from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear

_SCALES = ("MemberScale", "ElementwiseAffine")  # the latter also of the package `tabm`


class TabMBackbone(nn.Module):
    """The blocks of k MLPs: [B, k, d_in], or shared [B, d_in] -> [B, k, d_block].

    Args:
        d_in, n_blocks, d_block, dropout, activation, k: see `TabM`.
        linear: makes the layer of a block, `linear(index, in_features, out_features)`.
        affine: a scale [k, d_in] in front of the first block, or None.
    """

    def __init__(
        self,
        *,
        d_in: int,
        n_blocks: int,
        d_block: int,
        dropout: float,
        activation: str = "ReLU",
        k: int,
        linear: Callable[[int, int, int], nn.Module],
        affine: nn.Module | None = None,
    ):
        super().__init__()
        sizes = {"d_in": d_in, "n_blocks": n_blocks, "d_block": d_block, "k": k}
        for name, value in sizes.items():
            check_count("TabM", name, value)
        kind = getattr(nn, activation, None)
        require(kind is not None, "TabM", "activation", "a class of torch.nn", repr(activation))
        widths = [d_in, *[d_block] * n_blocks]
        self.blocks = nn.ModuleList(
            nn.Sequential(linear(i, widths[i], d_block), kind(), nn.Dropout(dropout))
            for i in range(n_blocks)
        )
        self.affine, self._k, self._d_block = affine, k, d_block

    @property
    def k(self) -> int:
        """The number of members."""
        return self._k

    def get_original_output_shape(self) -> torch.Size:
        """The shape of one member's output for one row."""
        return torch.Size((self._d_block,))

    def forward(self, x: Tensor) -> Tensor:
        """[B, k, d_in] or shared [B, d_in] -> [B, k, d_block]."""
        return run_blocks(self.affine, self.blocks, x, self.k)


class TabMMember(nn.Module):
    """One member of a TabM as a plain MLP with merged weights, copied from `model`."""

    def __init__(self, model: nn.Module, i: int):
        super().__init__()
        self.n_num, self.n_cat = model.n_num, model.n_cat
        self.num_module = copy.deepcopy(model.num_module)
        self.cat_module = copy.deepcopy(model.cat_module)
        blocks = []
        for layer, *rest in model.backbone.blocks:
            own = layer.member(i) if hasattr(layer, "member") else copy.deepcopy(layer)
            blocks.append(nn.Sequential(own, *map(copy.deepcopy, rest)))
        if model.backbone.affine is not None:
            with torch.no_grad():
                blocks[0][0].weight *= model.backbone.affine.weight[i]
        self.blocks = nn.Sequential(*blocks)
        self.output = None if model.output is None else model.output.member(i)
        self.train(model.training)

    def forward(self, x_num: Tensor | None = None, x_cat: Tensor | None = None) -> Tensor:
        """-> [B, d_out]."""
        x = self.blocks(table_rows(self, x_num, x_cat, 0))
        return x if self.output is None else self.output(x)


def run_blocks(affine: nn.Module | None, blocks: nn.ModuleList, x: Tensor, k: int) -> Tensor:
    """The blocks of a TabM, one after the other, in fewer passes where nobody can tell.

    A scale in front of a shared `nn.Linear` becomes one product with it; ReLU becomes a part of the
    product, or, with dropout, keeps no activation of its own. With hooks on the modules in
    question, each is called as it stands.
    """
    first = blocks[0]
    if affine is not None:
        x = x if x.ndim == 3 else x.unsqueeze(1)
        scale = type(affine).__name__ in _SCALES and affine.bias is None
        plain = _is_plain_block(first) and type(first[0]) is nn.Linear
        if scale and plain and x.is_floating_point() and not hooked(affine, first[0]):
            x, layer = x[:, 0] if x.shape[1] == 1 else x, first[0]
            factors = (affine.weight, None, layer.bias)
            x = _relu_dropout(first, lambda **o: _product(x, layer.weight, *factors, **o))
            blocks = blocks[1:]
        else:
            x = affine(x.expand(-1, k, -1) if x.shape[1] == 1 else x)
    for block in blocks:
        if not _is_plain_block(block):
            x = block(x)
            continue
        layer = block[0]
        if type(layer) is BatchEnsembleLinear and _is_plain_layer(layer):
            run = partial(_product, x, layer.weight, layer.r, layer.s, layer.bias)
        else:
            run = partial(layer.with_activation, x) if hasattr(layer, "with_activation") else None
        if run is None or hooked(layer):
            x = relu_dropout(layer(x), block[2].p, block[2].training)
        else:
            x = _relu_dropout(block, run)
    return x


def _product(x, weight, r, s, bias, **options) -> Tensor:
    return batch_ensemble_linear(x, weight, r, s, bias, layout="batch_major", **options)


def _relu_dropout(block: nn.Sequential, run: Callable[..., Tensor]) -> Tensor:
    """`run()` is the layer of a plain block; it also takes activation="relu"."""
    dropout = block[2]
    if dropout.training and dropout.p > 0:
        return relu_dropout(run(), dropout.p)
    return run(activation="relu")


def _is_plain_block(block: nn.Module) -> bool:
    """Whether it is (layer, ReLU, Dropout), and no hook sees what is between."""
    if type(block) is not nn.Sequential or len(block) != 3:
        return False
    _, relu, dropout = block
    plain = type(relu) is nn.ReLU and type(dropout) is nn.Dropout and 0 <= dropout.p < 1
    return plain and not hooked(block, relu, dropout)


def _is_plain_layer(layer: BatchEnsembleLinear) -> bool:
    return layer.layout == "batch_major" and layer.rank == 1 and layer.activation is None


def hooked(*modules: nn.Module) -> bool:
    """Whether something would notice that one of the modules is not called as it stands."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        if "forward" in m.__dict__:
            return True
    return bool(  # the conditions of nn.Module.__call__
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )
