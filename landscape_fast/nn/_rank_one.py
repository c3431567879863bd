"""What the BatchEnsemble layers share: their parameters, how they start, conversion, members."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn import init
from landscape_fast.nn.functional import check_count, merged_weight
from landscape_fast.ops._checks import message, require


class RankOneLayer(nn.Module):
    """A shared weight, factors r [M, I] and s [M, O], a bias [M, O] or [O]; each but one optional.

    With rank K > 1 the factors are r [K, M, I] and s [K, M, O], and the outputs for the K pairs are
    added up. A subclass names the plain layer it stands for (`_plain`), its layouts, and reads the
    sizes and options of a plain layer (`_arguments`).
    """

    _plain: type[nn.Module]
    _layouts: tuple[str, ...]

    @staticmethod
    def _arguments(layer: nn.Module) -> dict:
        raise NotImplementedError

    def _make(
        self,
        shape: Sequence[int],
        features: tuple[int, int],
        members: int,
        bias: bool | str,
        layout: str,
        scales: tuple[bool, bool],
        initialisers: tuple,
        rank: int,
        activation: str | None,
        factory: dict,
    ) -> None:
        """Checks the options and registers parameters, with values still to come.

        Args:
            shape: of the weight; features: (I, O).
            scales: whether there is an r, an s; initialisers: for r, for s.
            factory: device and dtype.
        """
        op = type(self).__name__
        check_count(op, "members", members)
        per_member = bias is True
        kinds = "True (one per member), 'shared' or False"
        require(per_member or bias is False or bias == "shared", op, "bias", kinds, repr(bias))
        layouts = " or ".join(map(repr, self._layouts))
        require(layout in self._layouts, op, "layout", layouts, repr(layout))
        for name, flag in zip("rs", scales, strict=True):
            require(isinstance(flag, bool), op, name, "True or False", repr(flag))
        remedy = f"use nn.{self._plain.__name__} where members do not differ"
        given = f"r=False, s=False, bias={bias!r}"
        require(any(scales) or per_member, op, "r, s or bias", "True, per member", given, remedy)
        check_count(op, "rank", rank)
        require(rank == 1 or all(scales), op, "rank", "1 where r or s is left out", rank)
        require(activation in (None, "relu"), op, "activation", "None or 'relu'", repr(activation))
        self.members, self.layout, self.rank, self.activation = members, layout, rank, activation
        self.r_init = init.resolve(op, "r_init", initialisers[0])
        self.s_init = init.resolve(op, "s_init", initialisers[1])

        def parameter(wanted, *sizes):
            return Parameter(torch.empty(sizes, **factory)) if wanted else None

        sizes = (members, features[1]) if per_member else (features[1],)
        rows = (members,) if rank == 1 else (rank, members)
        self.weight = parameter(True, *shape)
        self.register_parameter("r", parameter(scales[0], *rows, features[0]))
        self.register_parameter("s", parameter(scales[1], *rows, features[1]))
        self.register_parameter("bias", parameter(bias, *sizes))

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New weight and bias as in the plain layer, then new factors; all from `generator`."""
        init.default_(self.weight, self.bias, generator)
        self.reset_factors(generator)

    @torch.no_grad()
    def reset_factors(self, generator: Generator | None = None) -> None:
        """New r and s, by `r_init` and `s_init`; the weight and the bias stay.

        With rank K > 1 all of r is drawn and the first s; the others are zero, so that the layer
        starts as the one of rank 1 and the variance of its outputs does not grow with K.
        """
        if self.r is not None and not self.r.is_meta:
            self.r_init(self.r, generator)
        if self.s is not None and not self.s.is_meta:
            self.s_init(self.s if self.rank == 1 else self.s[0], generator)
            if self.rank > 1:
                self.s[1:].zero_()

    def fast_parameters(self) -> list[Parameter]:
        """The factors; `landscape_fast.methods.param_groups` gives them their own settings."""
        return [factor for factor in (self.r, self.s) if factor is not None]

    def _summed(self, call: Callable[..., Tensor]) -> Tensor:
        """`call(r, s, bias, activation)`, or its sum over the K pairs and then the activation."""
        if self.rank == 1:
            return call(self.r, self.s, self.bias, self.activation)
        y = call(self.r[0], self.s[0], self.bias, None)
        for r, s in zip(self.r[1:], self.s[1:], strict=True):
            y = y + call(r, s, None, None)
        return y if self.activation is None else F.relu(y)

    @classmethod
    def _from(
        cls,
        layer: nn.Module,
        members: int,
        *,
        bias: bool | str = True,
        generator: Generator | None = None,
        tie: bool = False,
        **options,
    ) -> "RankOneLayer":
        """An ensemble with the weight and bias of `layer`: copies, or with `tie` the Parameters."""
        op, plain = cls.__name__, cls._plain.__name__
        if not isinstance(layer, cls._plain):
            raise TypeError(message(op, "layer", f"an nn.{plain}", type(layer).__name__))
        lazy = isinstance(layer.weight, nn.UninitializedParameter)
        remedy = "run one batch through it first"
        require(not lazy, op, "layer", "initialised", type(layer).__name__, remedy)
        require(bias is True or bias == "shared", op, "bias", "True or 'shared'", repr(bias))
        bias = bias if layer.bias is not None else False
        factory = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        meta = {"device": "meta", "dtype": layer.weight.dtype}
        new = cls(**cls._arguments(layer), members=members, bias=bias, **options, **meta)
        new.weight = layer.weight if tie else _copied(layer.weight, layer.weight)
        if bias == "shared":
            new.bias = layer.bias if tie else _copied(layer.bias, layer.bias)
        elif bias:
            new.bias = _copied(layer.bias.expand(members, -1), layer.bias)
        for name in "rs":
            factor = getattr(new, name)
            if factor is not None:
                setattr(new, name, Parameter(torch.empty(factor.shape, **factory)))
        new.reset_factors(generator)
        return new.train(layer.training)

    @torch.no_grad()
    def _member(self, plain: nn.Module, i: int) -> nn.Module:
        """Gives `plain`, made on the meta device, copies of what member i has."""
        check_member(type(self).__name__, i, self.members)
        r, s = (None if f is None else f[..., i, :] for f in (self.r, self.s))
        merged = self._merged(r, s) if self.rank == 1 else sum(map(self._merged, r, s))
        plain.weight = Parameter(merged, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = _copied(self.bias[i] if self.bias.ndim == 2 else self.bias, self.bias)
        if self.activation is not None:
            plain = nn.Sequential(plain, nn.ReLU())
        return plain.train(self.training)

    def _merged(self, r: Tensor | None, s: Tensor | None) -> Tensor:
        """The weight of one member for one pair of factors, r [I] and s [O]."""
        return merged_weight(self.weight, r, s, getattr(self, "groups", 1))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Also takes the bias [O] of a plain layer: it becomes the bias of every member."""
        given = state_dict.get(prefix + "bias")
        if given is not None and self.bias is not None and given.ndim == 1 < self.bias.ndim:
            state_dict[prefix + "bias"] = given.expand(self.members, -1).clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _options_repr(self) -> str:
        kind = False if self.bias is None else "shared" if self.bias.ndim == 1 else True
        parts = [f"members={self.members}", f"bias={kind!r}", f"layout={self.layout!r}"]
        for name in "rs":
            used, start = getattr(self, name) is not None, getattr(self, f"{name}_init")
            parts.append(f"{name}_init={start}" if used else f"{name}=False")
        if self.rank > 1:
            parts.append(f"rank={self.rank}")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)


def check_member(op: str, i: int, members: int) -> None:
    """i counts the members from 0."""
    ok = isinstance(i, int) and not isinstance(i, bool) and 0 <= i < members
    require(ok, f"{op}.member", "i", f"an integer from 0 to {members - 1}", repr(i))


def _copied(values: Tensor, like: Parameter) -> Parameter:
    return Parameter(values.detach().clone(), requires_grad=like.requires_grad)
