"""TabM: one network for tables that makes k predictions, as k MLPs that share most weights.

Names of arguments, attributes and the state dict are those of the package `tabm`, so its
checkpoints load, and code written for it runs. Given the same state of torch's random generator the
initial values are the same, too.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from landscape_fast.models._tabm_blocks import TabMBackbone, TabMMember
from landscape_fast.models._tabm_start import (
    STARTS,
    OneHot,
    Scaling,
    feature_sizes,
    init_scaling_,
    reset_batch_ensemble_,
    table_rows,
)
from landscape_fast.nn._rank_one import check_member
from landscape_fast.nn.batch_ensemble import BatchEnsembleLinear
from landscape_fast.nn.init import default_
from landscape_fast.nn.members import MemberLinear, MemberScale
from landscape_fast.ops._checks import require

ARCHS = ("tabm", "tabm-mini", "tabm-packed")


class TabM(nn.Module):
    """k MLPs for tables, trained side by side.

    ==============  ===========================  ===============================================
    arch_type       linear layers of the blocks  what the k members do not share
    ==============  ===========================  ===============================================
    "tabm"          `BatchEnsembleLinear`        r [k, I], s [k, O], bias [k, O] of every block
    "tabm-mini"     `nn.Linear`                  one factor r [k, I], in front of the first block
    "tabm-packed"   `MemberLinear`               everything
    ==============  ===========================  ===============================================

    and in all of them the heads, `output`. Train on the mean loss of all predictions, never on the
    loss of their mean; predict with the mean of the members' probabilities.

    Args:
        n_num_features: number of numerical columns.
        cat_cardinalities: the number of categories of every categorical column (one-hot encoded).
        d_out: outputs per member: classes, or 1 for regression; None returns the last block.
        num_embeddings: a module [N, n_num_features] -> [N, n_num_features, d] with
            `get_output_shape()`, shared by the members (for instance of `rtdl_num_embeddings`).
        n_blocks: blocks of linear, activation, dropout; by default 3, with embeddings 2.
        d_block: width of the blocks.
        dropout: probability of zeroing a unit.
        activation: name of a class of `torch.nn` without arguments.
        k: number of members.
        arch_type: "tabm", "tabm-mini" or "tabm-packed".
        start_scaling_init: how the first factor starts, with one value per member and column:
            "random-signs" (default) or "normal" with mean 0 and deviation 1 (default with
            embeddings). All other factors start at one. Not for "tabm-packed", which takes None.
        generator: draws all initial values; torch's global one by default.
        device: of the parameters; `dtype` likewise.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Gorishniy et al. 2024 (arXiv:2410.24210).

    Example:
        >>> model = TabM(n_num_features=8, cat_cardinalities=[3, 5], d_out=2, k=4)
        >>> model(torch.zeros(16, 8), torch.zeros(16, 2, dtype=torch.long)).shape
        torch.Size([16, 4, 2])
        >>> model.prune([2, 0]).k
        2
    """

    def __init__(
        self,
        *,
        n_num_features: int = 0,
        cat_cardinalities: Sequence[int] | None = None,
        d_out: int | None,
        num_embeddings: nn.Module | None = None,
        n_blocks: int | None = None,
        d_block: int = 512,
        dropout: float = 0.1,
        activation: str = "ReLU",
        k: int = 32,
        arch_type: str = "tabm",
        start_scaling_init: str | None = "auto",
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        cardinalities = tuple(cat_cardinalities or ())
        d_features = feature_sizes(n_num_features, cardinalities, num_embeddings)
        require(arch_type in ARCHS, "TabM", "arch_type", f"one of {ARCHS}", repr(arch_type))
        if start_scaling_init == "auto":
            start = "random-signs" if num_embeddings is None else "normal"
            start_scaling_init = None if arch_type == "tabm-packed" else start
        starts = (None,) if arch_type == "tabm-packed" else STARTS
        rule = f"one of {starts} with arch_type {arch_type!r}"
        given = repr(start_scaling_init)
        require(start_scaling_init in starts, "TabM", "start_scaling_init", rule, given)
        if n_blocks is None:
            n_blocks = 3 if num_embeddings is None else 2
        self.num_module = num_embeddings
        self.cat_module = OneHot(cardinalities) if cardinalities else None
        self.arch_type, self.start_scaling_init = arch_type, start_scaling_init
        self.n_num, self.n_cat, self._chunks = n_num_features, len(cardinalities), tuple(d_features)
        # On the meta device first: every initial value is drawn once, in the order of `tabm`.
        meta = {"device": "meta", "dtype": dtype}
        self.backbone = TabMBackbone(
            d_in=sum(d_features),
            n_blocks=n_blocks,
            d_block=d_block,
            dropout=dropout,
            activation=activation,
            k=k,
            linear=lambda index, i, o: self._layer(index, i, o, k, meta),
            affine=MemberScale((k, sum(d_features)), **meta) if arch_type == "tabm-mini" else None,
        )
        self.output = None if d_out is None else self._packed(d_block, d_out, k, meta)
        device = torch.get_default_device() if device is None else device
        if torch.device(device).type != "meta":
            self.backbone.to_empty(device=device)
            if self.output is not None:
                self.output.to_empty(device=device)
            self.reset_parameters(generator)

    @classmethod
    def make(cls, **options) -> "TabM":
        """The constructor, under the name that `tabm` gives the one with defaults."""
        return cls(**options)

    def _layer(self, index: int, i: int, o: int, k: int, factory: dict) -> nn.Module:
        """The linear layer of a block."""
        if self.arch_type == "tabm-mini":
            return nn.Linear(i, o, **factory)
        if self.arch_type == "tabm-packed":
            return self._packed(i, o, k, factory)
        start = (self.start_scaling_init, self._chunks) if index == 0 else ("ones", None)
        return self._batch_ensemble(i, o, k, start, factory)

    def _batch_ensemble(self, i: int, o: int, k: int, start: tuple, factory: dict) -> nn.Module:
        options = {"layout": "batch_major", "r_init": Scaling(*start), **factory}
        return BatchEnsembleLinear(i, o, k, **options)

    def _packed(self, i: int, o: int, k: int, factory: dict) -> nn.Module:
        return MemberLinear(i, o, k, layout="batch_major", **factory)

    @property
    def k(self) -> int:
        """The number of members."""
        return self.backbone.k

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New initial values for all but the embeddings."""
        for layer, *_ in self.backbone.blocks:
            if self.arch_type == "tabm":
                reset_batch_ensemble_(layer, generator)
            elif self.arch_type == "tabm-mini":
                default_(layer.weight, layer.bias, generator)
            else:
                layer.reset_parameters(generator)
        if self.backbone.affine is not None:
            start = self.start_scaling_init
            init_scaling_(self.backbone.affine.weight, start, self._chunks, generator)
        if self.output is not None:
            self.output.reset_parameters(generator)

    def forward(self, x_num: Tensor | None = None, x_cat: Tensor | None = None) -> Tensor:
        """-> [B, k, d_out].

        Args:
            x_num: [B, n_num_features], read by all members; or [B, k, n_num_features], for a batch
                per member in training.
            x_cat: int64 categories [B, columns] or [B, k, columns], each below its cardinality.
        """
        x = self.backbone(table_rows(self, x_num, x_cat, self.k))
        return x if self.output is None else self.output(x)

    members = property(lambda self: self.k, doc="The number of members.")

    def member(self, i: int) -> nn.Module:
        """Member i as a plain MLP: (x_num, x_cat) -> [B, d_out]."""
        check_member("TabM", i, self.k)
        return TabMMember(self, i)

    def prune(self, members: Sequence[int]) -> "TabM":
        """A copy that has only these members, in this order; a member may come more than once.

        Args:
            members: indices in [0, k), for instance of `landscape_fast.methods.select_members`.
        """
        known = all(isinstance(m, int) and 0 <= m < self.k for m in members) and len(members) > 0
        rule = f"indices from 0 to {self.k - 1}, at least one"
        require(known, "TabM.prune", "members", rule, list(members))
        pruned, k = copy.deepcopy(self), len(members)
        for module in [
            pruned.backbone.affine,
            pruned.output,
            *(b[0] for b in pruned.backbone.blocks),
        ]:
            if isinstance(module, BatchEnsembleLinear):
                names, module.members = ("r", "s", "bias"), k
            elif isinstance(module, MemberScale | MemberLinear):
                names = ("weight", "bias")
            else:
                continue
            for name in names:
                old = getattr(module, name)
                if old is not None:
                    kept = old.detach()[list(members)]
                    setattr(module, name, Parameter(kept, requires_grad=old.requires_grad))
        pruned.backbone._k = k
        return pruned
