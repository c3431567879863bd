"""A network of hyper-batch layers, which answers inputs together with hyperparameters."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from landscape_fast.nn._hyper_embedding import HyperEmbedding, LambdaDistribution
from landscape_fast.nn._hyper_layer import HyperBatchLayer
from landscape_fast.ops._checks import check_tensor, require


def own(layer: str, kind: str) -> str:
    """A hyperparameter for every weight and every bias: "head.weight", "head.bias"."""
    return f"{layer}.{kind}" if layer else kind


class HyperBatchNetwork(nn.Module):
    """Gives the hyper-batch layers of a network their responses to hyperparameters.

    The hyperparameters are L2 penalties of weights and biases: `l2` is the penalty that they make,
    `embedding` what the layers learn of them, and `distribution()` what they are drawn from.

    Args:
        network: any module with `HyperBatchLinear` or `HyperBatchConv2d` layers inside, all of the
            same number of members; for instance a model from `landscape_fast.models` made with
            `functools.partial(HyperBatchLinear, members=4)` as its layer factory. Its forward runs
            each of them as `layer(x)`.
        lower: of the hyperparameters, one number or H, in the order of `hyperparameters`.
        upper: of the same.
        group: called with the name of a layer and "weight" or "bias", says which hyperparameter
            penalises it; equal names share one, None leaves it without penalty. By default each
            has its own.
        trunk: see `HyperEmbedding`, also for `body` and `std`.
        generator: draws the initial values of the embedding.

    Raises:
        ValueError: if the network has no such layer, or layers of different numbers of members.

    Example:
        >>> from landscape_fast.nn import HyperBatchLinear
        >>> layers = [HyperBatchLinear(8, 16, members=4), nn.ReLU(), HyperBatchLinear(16, 3, 4)]
        >>> model = HyperBatchNetwork(nn.Sequential(*layers), lower=0.1, upper=100.0)
        >>> model.hyperparameters
        ('0.weight', '0.bias', '2.weight', '2.bias')
        >>> lambdas = model.distribution().sample(examples=5)
        >>> model(torch.zeros(5, 8), lambdas).shape, model.l2(lambdas).shape
        (torch.Size([4, 5, 3]), torch.Size([]))
    """

    def __init__(
        self,
        network: nn.Module,
        lower: float | Sequence[float],
        upper: float | Sequence[float],
        *,
        group: Callable[[str, str], str | None] = own,
        trunk: Sequence[int] = (),
        body: Sequence[int] = (),
        std: float = 1e-4,
        generator: Generator | None = None,
    ):
        super().__init__()
        op = "HyperBatchNetwork"
        self.network = network
        layers = self.layers()
        require(bool(layers), op, "network", "one with hyper-batch layers", "none")
        members = {layer.members for layer in layers.values()}
        require(len(members) == 1, op, "network", "of one number of members", sorted(members))
        self.members = members.pop()
        names: dict[str, int] = {}
        self._penalties: list[tuple[int | None, int | None]] = []
        for name, layer in layers.items():
            found = [group(name, "weight"), group(name, "bias") if layer.bias is not None else None]
            for hyperparameter in found:
                if hyperparameter is not None:
                    names.setdefault(hyperparameter, len(names))
            self._penalties.append(tuple(None if n is None else names[n] for n in found))
        require(bool(names), op, "group", "a function that names a hyperparameter", "none")
        self.hyperparameters = tuple(names)
        H = len(names)
        self.lower, self.upper = (
            [float(t)] * H if isinstance(t, int | float) else [float(v) for v in t]
            for t in (lower, upper)
        )
        for argument, values in (("lower", self.lower), ("upper", self.upper)):
            rule = f"one number, or one for each of {self.hyperparameters}"
            require(len(values) == H, op, argument, rule, values)
        sizes = [layer.response_size for layer in layers.values()]
        weight = next(iter(layers.values())).weight
        factory = {"device": weight.device, "dtype": weight.dtype, "generator": generator}
        self.embedding = HyperEmbedding(sizes, self.lower, self.upper, trunk, body, std, **factory)

    def layers(self) -> dict[str, HyperBatchLayer]:
        """The hyper-batch layers of the network, by name."""
        modules = self.network.named_modules()
        return {name: m for name, m in modules if isinstance(m, HyperBatchLayer)}

    def distribution(self, width: float = 0.2, generator: Generator | None = None):
        """A new `LambdaDistribution` of these hyperparameters, on the device of the network."""
        like = self.embedding.log_lower
        factory = {"device": like.device, "dtype": like.dtype, "generator": generator}
        return LambdaDistribution(self.lower, self.upper, self.members, width, **factory)

    def forward(self, x: Tensor, lambdas: Tensor) -> Tensor:
        """What the network makes of x, with the hyperparameters lambdas [M, B, H]."""
        layers = list(self.layers().values())
        try:
            for layer, e in zip(layers, self._responses(lambdas), strict=True):
                layer.response = e
            return self.network(x)
        finally:
            for layer in layers:
                layer.response = None

    def l2(self, lambdas: Tensor, *, fast_weights: bool = False) -> Tensor:
        """The sum over layers of their penalties: lambda times squared norms, a scalar.

        Args:
            lambdas: [M, B, H], as in the call whose loss it is added to (divided by the number of
                training rows, in the published objective).
            fast_weights: see `HyperBatchLinear.l2`.
        """
        total = lambdas.new_zeros(())
        for layer, e, (weight, bias) in zip(
            self.layers().values(), self._responses(lambdas), self._penalties, strict=True
        ):
            if weight is None and bias is None:
                continue
            none = torch.zeros_like(lambdas[..., 0])
            h, h_bias = (none if i is None else lambdas[..., i] for i in (weight, bias))
            options = {"fast_weights": fast_weights, "bias": bias is not None}
            total = total + layer.l2(e, h, h_bias, **options)
        return total

    @torch.no_grad()
    def member(self, i: int, lambdas: Tensor) -> nn.Module:
        """Member i at the hyperparameters lambdas [H]: a copy of the network with plain layers.

        All but the hyper-batch layers must work on a batch without members.
        """
        check_tensor("HyperBatchNetwork.member", "lambdas", lambdas, "H", (len(self.lower),))
        responses = [e[0] for e in self.embedding(lambdas.unsqueeze(0))]
        layers = self.layers()
        memo = {
            id(layer): layer.member(i, e)
            for layer, e in zip(layers.values(), responses, strict=True)
        }
        return copy.deepcopy(self.network, memo)

    def _responses(self, lambdas: Tensor) -> list[Tensor]:
        """For each layer its response, in the layer's layout."""
        sizes = (self.members, None, len(self.hyperparameters))
        check_tensor("HyperBatchNetwork", "lambdas", lambdas, "M, B, H", sizes)
        pairs = zip(self.embedding(lambdas), self.layers().values(), strict=True)
        return [_arranged(e, layer.layout) for e, layer in pairs]


def _arranged(e: Tensor, layout: str) -> Tensor:
    """[M, B, F] in a layout."""
    if layout == "member_major":
        return e
    return e.transpose(0, 1) if layout == "batch_major" else e.flatten(0, 1)
