"""`nn.Linear` for M members that share one weight (BatchEnsemble).

The convolutions are in `landscape_fast.nn.batch_ensemble_conv`.

Member m has the weight `weight[o, i] * s[m, o] * r[m, i]`, so M networks take little more memory
than one, and one pass runs them all. Parameters:

=========  =========================  ==========================================================
`weight`   [O, I]                     shared; drawn as in `nn.Linear`
`r`        [M, I], [K, M, I] or None  scales the input features of each member
`s`        [M, O], [K, M, O] or None  scales its output features
`bias`     [M, O], [O] or None        one draw copied to all members (`bias=True`), or one for all
=========  =========================  ==========================================================

A state dict of the plain layer loads with `strict=False`: its bias goes to every member, and r and
s stay as they are.
"""

from math import prod

import torch
from torch import Generator, Tensor, nn

from landscape_fast.nn._rank_one import RankOneLayer
from landscape_fast.nn.functional import check_count
from landscape_fast.nn.init import Initialiser
from landscape_fast.ops._checks import require
from landscape_fast.ops.batch_ensemble_linear import batch_ensemble_linear


class BatchEnsembleLinear(RankOneLayer):
    """M linear layers with one weight: `y[m] = ((x[m] * r[m]) @ weight.T) * s[m] + bias[m]`.

    Args:
        in_features: I.
        out_features: O.
        members: M.
        bias: True for one bias per member, all equal at first; "shared" for one bias; False.
        layout: where the members are. "member_major": x [M, B, I] -> [M, B, O]; "batch_major", as
            in TabM: [B, M, I] -> [B, M, O]; "folded": [M*B, I] -> [M*B, O], the rows of a member
            together. In the first two, x [B, I] is shared by all members and read without a copy.
            Further dimensions between batch and features are kept: [M, B, L, I], [B, L, M, I] and
            [M*B, L, I], flattened to a view (to a copy only where strides allow none).
        r: False leaves the factor out; `s` likewise.
        r_init: "ones", "random_sign", "normal" or a callable, see `landscape_fast.nn.init`;
            `s_init` likewise.
        rank: K. Above 1 there are K pairs of factors, and member m has the weight
            `weight * sum_k outer(s[k, m], r[k, m])`, at the cost of K layers. Only the first s
            starts by `s_init`, the others at zero; let `r_init` draw, or the pairs stay equal.
        activation: "relu" to apply it in the same pass, after the bias; None for no activation.
        generator: draws all initial values; torch's global one by default.
        device: of the parameters; `dtype` likewise.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit, such as
            folded rows that M does not divide: no row is given to a member silently.

    Source: Wen et al. 2020 (arXiv:2002.06715); batch_major and the copied bias: TabM
    (arXiv:2410.24210); rank K: edward2's `DenseBatchEnsemble`.

    Example:
        >>> layer = BatchEnsembleLinear(8, 3, members=4, r_init="random_sign")
        >>> layer(torch.zeros(16, 8)).shape  # a batch shared by the members
        torch.Size([4, 16, 3])
        >>> layer.member(2)
        Linear(in_features=8, out_features=3, bias=True)
        >>> folded = BatchEnsembleLinear(8, 3, members=4, layout="folded")
        >>> folded(torch.zeros(5, 8), index=torch.tensor([0, 3, 3, 1, 0])).shape
        torch.Size([5, 3])
    """

    _plain = nn.Linear
    _layouts = ("member_major", "batch_major", "folded")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        members: int,
        bias: bool | str = True,
        *,
        layout: str = "member_major",
        r: bool = True,
        s: bool = True,
        r_init: str | Initialiser = "ones",
        s_init: str | Initialiser = "ones",
        rank: int = 1,
        activation: str | None = None,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_count("BatchEnsembleLinear", "in_features", in_features)
        check_count("BatchEnsembleLinear", "out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        shape, features = (out_features, in_features), (in_features, out_features)
        factory = {"device": device, "dtype": dtype}
        factors = ((r, s), (r_init, s_init), rank)
        self._make(shape, features, members, bias, layout, *factors, activation, factory)
        self.reset_parameters(generator)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        members: int,
        *,
        bias: bool | str = True,
        generator: Generator | None = None,
        tie: bool = False,
        **options,
    ) -> "BatchEnsembleLinear":
        """`members` times `layer`: its weight, bias, dtype, device, requires_grad and mode.

        Args:
            layer: the source; a subclass counts as the nn.Linear it is.
            members: M.
            bias: True or "shared", where `layer` has a bias; where it has none, nothing.
            generator: draws r and s.
            tie: keep the Parameter objects of `layer` instead of copies (a bias per member is
                always new).
            options: `layout`, `r`, `s`, `r_init`, `s_init`, `rank`, `activation` of the
                constructor.
        """
        return cls._from(layer, members, bias=bias, generator=generator, tie=tie, **options)

    @staticmethod
    def _arguments(layer):
        return {"in_features": layer.in_features, "out_features": layer.out_features}

    def member(self, i: int) -> nn.Module:
        """Member i as a plain layer with its own, merged weight; a ReLU follows if this has one."""
        meta = {"device": "meta", "dtype": self.weight.dtype}
        bias = self.bias is not None
        return self._member(nn.Linear(self.in_features, self.out_features, bias, **meta), i)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """[M, B, I] or shared [B, I] -> [M, B, O]; other layouts as described above.

        Args:
            x: the input.
            index: [N] int64, layout "folded" only: the member that reads each row of x [N, ..., I],
                in any order and number. None: the rows of a member are together, B for each.
        """
        op = "BatchEnsembleLinear"
        rule = f"[..., I] with I = {self.in_features} and at least 2 dimensions"
        fits = x.ndim >= 2 and x.shape[-1] == self.in_features
        require(fits, op, "x", rule, list(x.shape))
        if index is not None:
            given = f"a tensor for layout={self.layout!r}"
            require(self.layout == "folded", op, "index", "None unless layout='folded'", given)
            fits = isinstance(index, Tensor) and index.shape == x.shape[:1]
            got = list(index.shape) if isinstance(index, Tensor) else type(index).__name__
            require(fits, op, "index", f"[N] with N = {x.shape[0]}", got)
        rows = x
        if x.ndim > (2 if self.layout == "folded" else 3):
            # What lies between the members (or the start) and the features is all rows.
            spans = {"member_major": (1, -2), "batch_major": (0, -3), "folded": (0, -2)}
            rows = x.flatten(*spans[self.layout])
            if index is not None:
                index = index.repeat_interleave(prod(x.shape[1:-1]))

        def call(r, s, bias, activation):
            options = {"layout": self.layout, "index": index, "activation": activation}
            return batch_ensemble_linear(rows, self.weight, r, s, bias, **options)

        y = self._summed(call)
        return y if rows is x else y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._options_repr()}"
