"""What the BatchEnsemble layers share: their parameters, how they start, conversion, members."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn import init
from landscape_fast.nn.functional import check_count, merged_weight
from landscape_fast.ops._checks import message, require


class RankOneLayer(nn.Module):
    """A shared weight, factors r [M, I] and s [M, O], a bias [M, O] or [O]; each but one optional.

    A subclass names the plain layer it stands for (`_plain`), its layouts, and reads the sizes and
    options of a plain layer (`_arguments`).
    """

    _plain: type[nn.Module]
    _layouts: tuple[str, ...]
    _version = 1

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
        self.members, self.layout = members, layout
        self.r_init = init.resolve(op, "r_init", initialisers[0])
        self.s_init = init.resolve(op, "s_init", initialisers[1])

        def parameter(wanted, *sizes):
            return Parameter(torch.empty(sizes, **factory)) if wanted else None

        sizes = (members, features[1]) if per_member else (features[1],)
        self.weight = parameter(True, *shape)
        self.register_parameter("r", parameter(scales[0], members, features[0]))
        self.register_parameter("s", parameter(scales[1], members, features[1]))
        self.register_parameter("bias", parameter(bias, *sizes))

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New weight and bias as in the plain layer, then new factors; all from `generator`."""
        init.default_(self.weight, self.bias, generator)
        self.reset_factors(generator)

    def reset_factors(self, generator: Generator | None = None) -> None:
        """New r and s, by `r_init` and `s_init`; the weight and the bias stay."""
        for factor, initialise in ((self.r, self.r_init), (self.s, self.s_init)):
            if factor is not None and not factor.is_meta:
                with torch.no_grad():
                    initialise(factor, generator)

    def fast_parameters(self) -> list[Parameter]:
        """The factors; `landscape_fast.methods.param_groups` gives them their own settings."""
        return [factor for factor in (self.r, self.s) if factor is not None]

    @classmethod
    def _from(
        cls,
        layer: nn.Module,
        members: int,
        bias: bool | str,
        generator: Generator | None,
        tie: bool,
        options: dict,
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
        rule = f"an integer from 0 to {self.members - 1}"
        ok = isinstance(i, int) and 0 <= i < self.members
        require(ok, f"{type(self).__name__}.member", "i", rule, repr(i))
        r, s = (None if factor is None else factor[i] for factor in (self.r, self.s))
        merged = merged_weight(self.weight, r, s, getattr(self, "groups", 1))
        plain.weight = Parameter(merged, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = _copied(self.bias[i] if self.bias.ndim == 2 else self.bias, self.bias)
        return plain.train(self.training)

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
        return ", ".join(parts)


def _copied(values: Tensor, like: Parameter) -> Parameter:
    return Parameter(values.detach().clone(), requires_grad=like.requires_grad)
