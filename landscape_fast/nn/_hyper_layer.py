"""What the hyper-batch layers share: parameters, responses, the penalty, members."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from landscape_fast.nn import init
from landscape_fast.nn._rank_one import check_member
from landscape_fast.nn.functional import check_count, merged_weight
from landscape_fast.ops._checks import message, require
from landscape_fast.ops._hyper_batch_l2 import hyper_batch_l2


class HyperBatchLayer(nn.Module):
    """Two weights, factors of each, and two biases; a subclass says how they are applied."""

    _layouts: tuple[str, ...]

    def _make(
        self,
        shape: Sequence[int],
        features: tuple[int, int],
        members: int,
        bias: bool | str,
        layout: str,
        scales: tuple[bool, bool],
        tie_factors: bool,
        initialisers: tuple,
        factory: dict,
    ) -> None:
        """Checks the options and registers parameters, with values still to come.

        Args:
            shape: of the weight; features: (I, O).
            scales: whether there is an r (and u), an s (and v); initialisers: for them.
            factory: device and dtype.
        """
        op = type(self).__name__
        check_count(op, "members", members)
        kinds = "True (one per member), 'shared' or False"
        require(bias in (True, False, "shared"), op, "bias", kinds, repr(bias))
        layouts = " or ".join(map(repr, self._layouts))
        require(layout in self._layouts, op, "layout", layouts, repr(layout))
        for name, flag in (("r", scales[0]), ("s", scales[1]), ("tie_factors", tie_factors)):
            require(isinstance(flag, bool), op, name, "True or False", repr(flag))
        self.members, self.layout, self.tie_factors = members, layout, tie_factors
        self.r_init = init.resolve(op, "r_init", initialisers[0])
        self.s_init = init.resolve(op, "s_init", initialisers[1])
        self.response: Tensor | tuple[Tensor, Tensor] | None = None

        def parameter(wanted, *sizes):
            return Parameter(torch.empty(sizes, **factory)) if wanted else None

        inner, outer = (members, features[0]), (members, features[1])
        self.weight, self.delta = parameter(True, *shape), parameter(True, *shape)
        self.register_parameter("r", parameter(scales[0], *inner))
        self.register_parameter("s", parameter(scales[1], *outer))
        self.register_parameter("u", parameter(scales[0] and not tie_factors, *inner))
        self.register_parameter("v", parameter(scales[1] and not tie_factors, *outer))
        sizes = outer[1:] if bias == "shared" else outer
        self.register_parameter("bias", parameter(bias, *sizes))
        self.register_parameter("delta_bias", parameter(bias, *sizes))

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """New weight and bias as in the plain layer, then all else; all from `generator`."""
        init.default_(self.weight, self.bias, generator)
        self.reset_factors(generator)

    def reset_factors(self, generator: Generator | None = None) -> None:
        """All but weight and bias: factors by `r_init` and `s_init`, delta as a weight, no bias."""
        init.default_(self.delta, None, generator)
        with torch.no_grad():
            if self.delta_bias is not None:
                self.delta_bias.zero_()
        pairs = ((self.r, self.r_init), (self.s, self.s_init))
        for factor, initialise in (*pairs, (self.u, self.r_init), (self.v, self.s_init)):
            if factor is not None and not factor.is_meta:
                with torch.no_grad():
                    initialise(factor, generator)

    def fast_parameters(self) -> list[Parameter]:
        """The factors; `landscape_fast.methods.param_groups` gives them their own settings."""
        return [f for f in (self.r, self.s, self.u, self.v) if f is not None]

    @property
    def out_size(self) -> int:
        """O."""
        return self.weight.shape[0]

    @property
    def response_size(self) -> int:
        """Numbers that the layer wants per member and example: 2 * O, or O without a bias."""
        return self.out_size * (1 if self.bias is None else 2)

    def _halves(self, e: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """(e, e_bias) from what was given or, without it, from what the network around said."""
        e = self.response if e is None else e
        op, biased = type(self).__name__, self.bias is not None
        remedy = "call layer(x, e), or the HyperBatchNetwork around it"
        require(e is not None, op, "e", "given", None, remedy)
        if isinstance(e, tuple):
            require(biased and len(e) == 2, op, "e", "a pair where there is a bias", len(e))
            return e
        if not isinstance(e, Tensor):
            raise TypeError(message(op, "e", "a Tensor or two", type(e).__name__))
        rule = f"[..., {'2 * ' if biased else ''}O], of {self.response_size} last"
        require(e.ndim > 1 and e.shape[-1] == self.response_size, op, "e", rule, list(e.shape))
        return e.split(self.out_size, -1) if biased else (e, None)

    def l2(
        self,
        e: Tensor | tuple[Tensor, Tensor] | None,
        h: Tensor,
        h_bias: Tensor | None = None,
        *,
        fast_weights: bool = False,
        bias: bool = True,
    ) -> Tensor:
        """The penalty: the mean of h times the squared norm of every member and example's weight.

        Args:
            e: the response, as in a call.
            h: [M, B], the L2 hyperparameter of the weight.
            h_bias: [M, B], that of the bias; None for `h`.
            fast_weights: whether the factors count as part of the weight; the published recipe
                penalises `weight + delta * e` alone.
            bias: whether to penalise the bias, too.

        Returns:
            A scalar, see `landscape_fast.ops.hyper_batch_l2`.
        """
        e, e_bias = (self._by_member(t) for t in self._halves(e))
        factors = (self.r, self.s, self.u, self.v) if fast_weights else (None,) * 4
        if not bias or self.bias is None:
            return hyper_batch_l2(self.weight, self.delta, e, h, *factors)
        biases = (self.bias, self.delta_bias, e_bias, h_bias)
        return hyper_batch_l2(self.weight, self.delta, e, h, *factors, *biases)

    def _by_member(self, e: Tensor | None) -> Tensor | None:
        """e [M, B, O], from the layout of the layer."""
        if e is None or self.layout == "member_major":
            return e
        if self.layout == "batch_major":
            return e.transpose(0, 1)
        return e.unflatten(0, (self.members, e.shape[0] // self.members))

    @torch.no_grad()
    def _at(self, plain: nn.Module, i: int, e: Tensor) -> nn.Module:
        """Gives `plain`, made on the meta device, copies of what member i has at the response e."""
        op, size = type(self).__name__, self.response_size
        check_member(op, i, self.members)
        require(tuple(e.shape) == (size,), f"{op}.member", "e", f"[{size}]", list(e.shape))
        r, s, u, v = self.r, self.s, self.u, self.v
        u, v = (r, s) if self.tie_factors else (u, v)
        r, s, u, v = (None if f is None else f[i] for f in (r, s, u, v))
        e, e_bias = e[: self.out_size], e[self.out_size :]
        groups = getattr(self, "groups", 1)
        weight = merged_weight(self.weight, r, s, groups)
        weight += merged_weight(self.delta, u, e if v is None else v * e, groups)
        plain.weight = Parameter(weight)
        if self.bias is not None:
            own = [b if b.ndim == 1 else b[i] for b in (self.bias, self.delta_bias)]
            plain.bias = Parameter(own[0] + own[1] * e_bias)
        return plain.train(self.training)

    def _options_repr(self) -> str:
        kind = False if self.bias is None else "shared" if self.bias.ndim == 1 else True
        parts = [f"members={self.members}", f"bias={kind!r}", f"layout={self.layout!r}"]
        for name in "rs":
            used, start = getattr(self, name) is not None, getattr(self, f"{name}_init")
            parts.append(f"{name}_init={start}" if used else f"{name}=False")
        return ", ".join([*parts, f"tie_factors={self.tie_factors}"])
