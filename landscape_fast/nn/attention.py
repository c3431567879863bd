"""Multi-head attention of M members whose four projections share their weights (BatchEnsemble)."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn._rank_one import check_member
from landscape_fast.nn.batch_ensemble import BatchEnsembleLinear
from landscape_fast.nn.functional import check_count
from landscape_fast.nn.init import Initialiser, xavier_
from landscape_fast.ops._checks import message, require

NAMES = ("q_proj", "k_proj", "v_proj")


class BatchEnsembleMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` whose q, k, v and out projections are `BatchEnsembleLinear`.

    Args:
        embed_dim: E.
        num_heads: H, a divisor of E.
        members: M.
        dropout: probability of dropping an attention weight in training.
        bias: True for biases per member, all equal at first; "shared"; or False.
        kdim: features of the keys, E by default; `vdim` likewise of the values.
        batch_first: whether sequences are [N, L, E] instead of [L, N, E], as in
            `nn.MultiheadAttention`.
        layout: "folded": N = M*B, the sequences of a member together; "member_major": all
            tensors have a dimension M in front, [M, B, L, E] or [M, L, B, E].
        r: `r`, `s`, `r_init`, `s_init`, `rank`, `generator`, `device` and `dtype` are those of the
            four projections, as in `BatchEnsembleLinear`.

    Raises:
        ValueError: for options out of range; on a call, for input that does not fit.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); all four projections as in edward2's
    `MultiHeadDotProductAttentionBE`.

    Example:
        >>> attention = BatchEnsembleMultiheadAttention(8, 2, members=3, batch_first=True)
        >>> x = torch.zeros(3 * 5, 7, 8)  # 3 members, 5 sequences each, 7 tokens, 8 features
        >>> y, weights = attention(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([15, 7, 8]), torch.Size([15, 7, 7]))
    """

    # Read by nn.TransformerEncoderLayer before it takes its fast path, which would pass over the
    # factors: without a packed bias there is none.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        members: int,
        dropout: float = 0.0,
        bias: bool | str = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        layout: str = "folded",
        r: bool = True,
        s: bool = True,
        r_init: str | Initialiser = "ones",
        s_init: str | Initialiser = "ones",
        rank: int = 1,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op = "BatchEnsembleMultiheadAttention"
        for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            check_count(op, name, count)
        rule = f"a divisor of embed_dim = {embed_dim}"
        require(embed_dim % num_heads == 0, op, "num_heads", rule, num_heads)
        require(0 <= dropout < 1, op, "dropout", "a probability in [0, 1)", dropout)
        layouts = ("member_major", "folded")
        require(layout in layouts, op, "layout", "'member_major' or 'folded'", repr(layout))
        self.embed_dim, self.num_heads, self.members = embed_dim, num_heads, members
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.layout = dropout, batch_first, layout
        options = {"r": r, "s": s, "r_init": r_init, "s_init": s_init, "rank": rank}
        options |= {"bias": bias, "layout": "folded", "device": device, "dtype": dtype}

        self.out_proj = BatchEnsembleLinear(
            embed_dim, embed_dim, members, generator=generator, **options
        )
        place = self.out_proj.weight.device
        options["device"] = "meta"
        for name, size in zip(NAMES, (embed_dim, self.kdim, self.vdim), strict=True):
            layer = BatchEnsembleLinear(size, embed_dim, members, **options)
            setattr(self, name, layer.to_empty(device=place))
        self._start(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New weights and biases as in the plain layer, and new factors; all from `generator`."""
        self.out_proj.reset_parameters(generator)
        self._start(generator)

    @torch.no_grad()
    def _start(self, generator: Generator | None) -> None:
        """Xavier for what comes in, drawn as one packed weight where the sizes allow; no biases."""
        layers = [getattr(self, name) for name in NAMES]
        if self.kdim == self.vdim == self.embed_dim:
            packed = self.out_proj.weight.new_empty(3 * self.embed_dim, self.embed_dim)
            xavier_(packed, None, generator)
            for layer, part in zip(layers, packed.chunk(3), strict=True):
                layer.weight.copy_(part)
        else:
            for layer in layers:
                xavier_(layer.weight, None, generator)
        for layer in (self.out_proj, *layers):
            if layer.bias is not None:
                layer.bias.zero_()
        for layer in layers:
            layer.reset_factors(generator)

    @classmethod
    def from_attention(
        cls,
        layer: nn.MultiheadAttention,
        members: int,
        *,
        bias: bool | str = True,
        generator: Generator | None = None,
        tie: bool = False,
        **options,
    ) -> "BatchEnsembleMultiheadAttention":
        """`members` times `layer`: its weights, biases, dropout, dtype, device and mode.

        Args:
            layer: the source, without `add_bias_kv` and `add_zero_attn`.
            members: M.
            bias: True or "shared", where `layer` has biases.
            generator: draws r and s.
            tie: keep the Parameter objects of `layer`, but those of a packed `in_proj_weight`,
                which is cut in three.
            options: `layout`, `r`, `s`, `r_init`, `s_init`, `rank` of the constructor.
        """
        op = cls.__name__
        if not isinstance(layer, nn.MultiheadAttention):
            rule = "an nn.MultiheadAttention"
            raise TypeError(message(op, "layer", rule, type(layer).__name__))
        extra = layer.bias_k is not None or layer.add_zero_attn
        require(not extra, op, "layer", "without add_bias_kv and add_zero_attn", "one with")
        require(bias is True or bias == "shared", op, "bias", "True or 'shared'", repr(bias))
        sizes = {"kdim": layer.kdim, "vdim": layer.vdim, "batch_first": layer.batch_first}
        kept = bias if layer.in_proj_bias is not None else False
        meta = {"device": "meta", "dtype": layer.out_proj.weight.dtype}
        shape = (layer.embed_dim, layer.num_heads, members, layer.dropout, kept)
        new = cls(*shape, **sizes, **options, **meta)
        scales = {name: getattr(new.out_proj, name) is not None for name in "rs"}
        inits = {name: getattr(new.out_proj, name) for name in ("r_init", "s_init", "rank")}
        how = {**scales, **inits, "layout": "folded", "bias": bias, "generator": generator}
        make = BatchEnsembleLinear.from_linear
        new.out_proj = make(layer.out_proj, members, tie=tie, **how)
        for name, plain in _projections(layer).items():
            setattr(new, name, make(plain, members, tie=tie, **how))
        return new.train(layer.training)

    @torch.no_grad()
    def member(self, i: int) -> nn.MultiheadAttention:
        """Member i as a plain layer with its own, merged weights."""
        check_member("BatchEnsembleMultiheadAttention", i, self.members)
        has_bias, weight = self.out_proj.bias is not None, self.out_proj.weight
        sizes = {"kdim": self.kdim, "vdim": self.vdim, "batch_first": self.batch_first}
        shape = (self.embed_dim, self.num_heads, self.dropout, has_bias)
        plain = nn.MultiheadAttention(*shape, **sizes, device="meta", dtype=weight.dtype)
        own = [getattr(self, name).member(i) for name in NAMES]
        if plain.in_proj_weight is not None:
            plain.in_proj_weight = _joined([layer.weight for layer in own])
        else:
            for name, layer in zip(NAMES, own, strict=True):
                setattr(plain, f"{name}_weight", layer.weight)
        out = self.out_proj.member(i)
        plain.out_proj.weight = out.weight
        if has_bias:
            plain.in_proj_bias = _joined([layer.bias for layer in own])
            plain.out_proj.bias = out.bias
        return plain.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of `nn.MultiheadAttention`; need_weights=False is the quicker way.

        Args:
            query: [N, L, E] or [L, N, E], see `batch_first`; N = M*B, or M in front. Key [N, S,
                kdim] and value [N, S, vdim] likewise.
            key: see `query`; `value` likewise.
            key_padding_mask: [N, S], or [B, S] for all members (in both layouts): True, or -inf,
                at keys to leave out; other numbers are added to the scores.
            need_weights: also return the attention weights.
            attn_mask: [L, S], [N*H, L, S], or [B*H, L, S] for all members: True, or -inf, where
                not to look.
            average_attn_weights: over the heads.
            is_causal: that `attn_mask` is the causal one, which must be given all the same.

        Returns:
            The output, shaped as the query, and the weights [N, L, S], or [N, H, L, S] where not
            averaged, or None; [M, B, ...] in the member-major layout.
        """
        op, M, E, H = type(self).__name__, self.members, self.embed_dim, self.num_heads
        major = self.layout == "member_major"
        q, k, v = (self._folded(name, t) for name, t in
                   (("query", query), ("key", key), ("value", value)))  # fmt: skip
        same = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1]
        got = f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        require(same, op, "query, key and value", "of one batch, and one number of keys", got)
        given = attn_mask is not None or not is_causal
        require(given, op, "attn_mask", "given with is_causal=True", "None")
        N, L, S = q.shape[0], q.shape[1], k.shape[1]
        q, k, v = (
            project(t).unflatten(-1, (H, E // H)).transpose(1, 2)
            for project, t in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        # The kernels know the causal mask: then it need not be read.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, N, L, S, q.dtype)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q * (E // H) ** -0.5 @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights.to(v.dtype) @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.unflatten(0, (M, N // M)) if major else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
            weights = None
        y = self.out_proj(y.transpose(1, 2).flatten(-2))
        y = y.unflatten(0, (M, N // M)) if major else y
        return y if self.batch_first else y.transpose(-3, -2), weights

    def _folded(self, name: str, t: Tensor) -> Tensor:
        """[M*B, L, features]."""
        op, M = type(self).__name__, self.members
        n = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}[name]
        major = self.layout == "member_major"
        rows = "M, B, L" if self.batch_first else "M, L, B"
        rows = rows if major else "M*B, L" if self.batch_first else "L, M*B"
        fits = t.ndim == (4 if major else 3) and t.shape[-1] == n
        batch = t.shape[0 if major or self.batch_first else 1] if fits else 0
        fits = fits and (batch == M if major else batch % M == 0)
        require(fits, op, name, f"[{rows}, {n}] with M = {M}", list(t.shape))
        t = t if self.batch_first else t.transpose(-3, -2)
        return t.flatten(0, 1) if major else t

    def _mask(self, attention, padding, N, L, S, dtype) -> Tensor | None:
        """What is added to the scores, broadcast to [N, H, L, S]; None for nothing."""
        op, M, H, total = type(self).__name__, self.members, self.num_heads, None
        if attention is not None:
            shape = list(attention.shape)
            B, rows = N // M, shape[0] if len(shape) == 3 else 0
            fits = shape == [L, S] or (shape[1:] == [L, S] and rows in (N * H, B * H))
            rule = f"[{L}, {S}] or [rows * {H}, {L}, {S}] with rows = {N} or, for all members, {B}"
            require(fits, op, "attn_mask", rule, shape)
            total = _added(attention, dtype)
            if total.ndim == 3:
                total = total.unflatten(0, (rows // H, H))
                total = total if rows == N * H else total.repeat(M, 1, 1, 1)
        if padding is not None:
            padding = padding.flatten(0, 1) if padding.ndim == 3 else padding
            B, shape = N // M, list(padding.shape)
            fits = shape in ([N, S], [B, S])
            rule = f"[rows, {S}] with rows = {N} or, for all members, {B}"
            require(fits, op, "key_padding_mask", rule, shape)
            padding = _added(padding, dtype)
            padding = padding if shape[0] == N else padding.repeat(M, 1)
            padding = padding[:, None, None]
            total = padding if total is None else total + padding
        return total

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also takes the weights of `nn.MultiheadAttention`, packed or not."""
        for kind in ("weight", "bias"):
            packed = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            for j, name in enumerate(NAMES):
                part = state_dict.pop(f"{prefix}{name}_{kind}", None)
                part = part if packed is None else packed.chunk(3)[j]
                if part is not None:
                    state_dict[f"{prefix}{name}.{kind}"] = part
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, members={self.members}"
        rest = f"dropout={self.dropout}, batch_first={self.batch_first}, layout={self.layout!r}"
        return f"{sizes}, {rest}"


def _projections(layer: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """The three projections of a plain layer as linear layers around its own parameters."""
    E, packed = layer.embed_dim, layer.in_proj_weight
    found = {}
    for j, (name, size) in enumerate(zip(NAMES, (E, layer.kdim, layer.vdim), strict=True)):
        linear = nn.Linear(size, E, layer.in_proj_bias is not None, device="meta")
        if packed is None:
            linear.weight = getattr(layer, f"{name}_weight")
        else:
            linear.weight = _part(packed, j)
        if layer.in_proj_bias is not None:
            linear.bias = _part(layer.in_proj_bias, j)
        found[name] = linear
    return found


def _part(packed: Parameter, j: int) -> Parameter:
    return Parameter(packed.detach().chunk(3)[j].clone(), requires_grad=packed.requires_grad)


def _joined(parts: list[Parameter]) -> Parameter:
    return Parameter(torch.cat(parts), requires_grad=parts[0].requires_grad)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where to look and -inf elsewhere, from a mask that is True elsewhere; numbers stay."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
