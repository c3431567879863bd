"""One vector per network: where each parameter tensor lies, and the way there and back."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from landscape_fast.ops._checks import FLOATS, message, names, require

ALIGNMENT = 8  # elements: every tensor starts at a multiple, so that kernels can use wide accesses

Source = nn.Module | Mapping[str, Tensor] | Tensor


class FlatLayout:
    """The parameters of a network as one vector [P], part by part, each padded to 8 elements.

    The parts are the parameter tensors in the order of `named_parameters()`, tied ones once. A pad
    holds zeros, adds nothing to a norm or a scalar product, and is left out of every view. The
    layout itself holds no tensor of the network and does not follow it to another device.

    Args:
        model: its parameters have one floating dtype and one device.

    Attributes:
        names: of the L parts, as in `named_parameters()`.
        shapes: of the L parameter tensors.
        counts: elements of each, without the pad.
        sizes: elements of each part with its pad, multiples of 8; as `sizes` of
            `landscape_fast.ops.combine`.
        offsets: where each part starts.
        P: sum of `sizes`.
        groups: for each part the place of its module among the modules that own parameters; the
            parts of one module share their coefficients in a layer-wise draw.
        dtype: of the parameters.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if it has no parameters, or not one floating dtype and device, or holds
            uninitialised (lazy) parameters.

    Example:
        >>> layout = FlatLayout(nn.Linear(3, 2))
        >>> layout.names, layout.sizes, layout.P
        (('weight', 'bias'), (8, 8), 16)
        >>> vector = layout.flatten({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        >>> vector
        tensor([1., 1., 1., 1., 1., 1., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0.])
        >>> layout.views(vector)["bias"]
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            raise TypeError(message("FlatLayout", "model", "an nn.Module", got))
        named = dict(model.named_parameters())
        _check(named)
        first = next(iter(named.values()))
        self.dtype = first.dtype
        self.names = tuple(named)
        self.shapes = tuple(p.shape for p in named.values())
        self.counts = tuple(p.numel() for p in named.values())
        self.sizes = tuple(count + -count % ALIGNMENT for count in self.counts)
        self.offsets = tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))
        self.P = sum(self.sizes)
        owners = [name.rpartition(".")[0] for name in named]
        places = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
        self.groups = tuple(places[owner] for owner in owners)

    def __len__(self) -> int:
        """L, the number of parts."""
        return len(self.names)

    @cached_property
    def mask(self) -> Tensor:
        """[P] on the CPU, in `dtype`: 1 on elements of parameters, 0 on pads."""
        return self.flatten({name: torch.ones(s) for name, s in self._named_shapes()})

    def _named_shapes(self):
        return zip(self.names, self.shapes, strict=True)

    def flatten(self, source: Source) -> Tensor:
        """A new vector [P] from a network, a state dict, or a vector.

        Args:
            source: a module or a mapping that holds every name of the layout (others, such as
                buffers and the second names of tied parameters, are passed over), or a vector: [P],
                or without pads as `torch.nn.utils.parameters_to_vector` makes it.

        Returns:
            [P] in `dtype`, on the device of the source, not part of any graph.

        Raises:
            ValueError: if a name is missing or a shape differs.
        """
        if isinstance(source, Tensor):
            return self._from_vector(source)
        if isinstance(source, nn.Module):
            source = dict(source.named_parameters(remove_duplicate=False))
        parts = []
        for name, shape in self._named_shapes():
            op, argument = "FlatLayout.flatten", f"source[{name!r}]"
            if name not in source:
                raise ValueError(message(op, argument, f"a Tensor {list(shape)}", "nothing"))
            require(source[name].shape == shape, op, argument, list(shape), [*source[name].shape])
            parts.append(source[name])
        return self._join(parts)

    def _from_vector(self, vector: Tensor) -> Tensor:
        count = sum(self.counts)
        fits = vector.ndim == 1 and len(vector) in (self.P, count)
        rule = f"[P] with P = {self.P}, or [{count}] without pads"
        require(fits, "FlatLayout.flatten", "source", rule, list(vector.shape))
        if len(vector) == count:
            return self._join(vector.split(self.counts))
        flat = vector.detach().to(self.dtype, copy=True)
        return flat.masked_fill_(self.mask.to(flat.device) == 0, 0)

    @torch.no_grad()
    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        flat = torch.zeros(self.P, dtype=self.dtype, device=parts[0].device)
        for part, to in zip(parts, self.views(flat).values(), strict=True):
            to.copy_(part.reshape(to.shape))
        return flat

    def flatten_many(self, sources: Sequence[Source]) -> Tensor:
        """[K, P], one row for each of K sources, on the device of the first."""
        require(len(sources) >= 1, "FlatLayout.flatten_many", "sources", "K of at least 1", 0)
        first = self.flatten(sources[0])
        rows = first.new_empty((len(sources), self.P))
        rows[0] = first
        for k, source in enumerate(sources[1:], 1):
            rows[k] = self.flatten(source)
        return rows

    def views(self, w: Tensor) -> dict[str, Tensor]:
        """The parameters in vectors, without a copy.

        Args:
            w: [..., P] with unit stride along P.

        Returns:
            Name to [..., *shape], views of `w`; what `torch.func.functional_call` takes.

        Raises:
            ValueError: if the last dimension is not P.
        """
        fits = w.ndim >= 1 and w.shape[-1] == self.P
        require(fits, "FlatLayout.views", "w", f"[..., P] with P = {self.P}", list(w.shape))
        # one split, whose gradient is one concatenation: L slices would be L vectors of zeros
        parts = w.split(self.sizes, -1)
        views = {}
        for name, shape, count, part in zip(
            self.names, self.shapes, self.counts, parts, strict=True
        ):
            own = part if part.shape[-1] == count else part.narrow(-1, 0, count)
            views[name] = own.view((*w.shape[:-1], *shape))
        return views

    def select(self, predicate: Callable[[str, torch.Size], bool]) -> Tensor:
        """Which parts fulfil a condition.

        Args:
            predicate: called with name and shape of each part.

        Returns:
            [L] bool, on the CPU.

        Example:
            >>> FlatLayout(nn.Linear(3, 2)).select(lambda name, shape: len(shape) > 1)
            tensor([ True, False])
        """
        return torch.tensor([bool(predicate(*part)) for part in self._named_shapes()])

    def per_part(self, per_group: Tensor) -> Tensor:
        """Coefficients of modules as those of parts: [M, G, ...] -> [M, L, ...].

        Example:
            >>> layout = FlatLayout(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
            >>> layout.per_part(torch.tensor([[0.25, 0.75]]))
            tensor([[0.2500, 0.2500, 0.7500, 0.7500]])
        """
        G = max(self.groups) + 1
        fits = per_group.ndim >= 2 and per_group.shape[1] == G
        rule = f"[M, G, ...] with G = {G}"
        require(fits, "FlatLayout.per_part", "per_group", rule, list(per_group.shape))
        index = torch.tensor(self.groups, device=per_group.device)
        return per_group.index_select(1, index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlatLayout):
            return NotImplemented
        return (self.names, self.shapes, self.dtype) == (other.names, other.shapes, other.dtype)

    def __hash__(self) -> int:
        return hash((self.names, self.shapes))

    def __repr__(self) -> str:
        return f"FlatLayout(L={len(self)}, P={self.P}, of which {sum(self.counts)} elements)"


def _check(named: dict[str, nn.Parameter]) -> None:
    op, rule = "FlatLayout", "a network with parameters"
    require(len(named) > 0, op, "model", rule, "one without")
    for name, p in named.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            remedy = "run one batch through the network first"
            require(False, op, f"parameter {name!r}", "initialised", "a lazy one", remedy)
    dtypes = list(dict.fromkeys(p.dtype for p in named.values()))
    fits = len(dtypes) == 1 and dtypes[0] in FLOATS
    remedy = "convert it with .to(dtype)"
    require(fits, op, "parameters", f"of one of {names(FLOATS)}", names(dtypes), remedy)
    devices = list(dict.fromkeys(str(p.device) for p in named.values()))
    require(len(devices) == 1, op, "parameters", "on one device", ", ".join(devices))
