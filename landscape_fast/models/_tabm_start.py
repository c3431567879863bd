"""What a TabM starts from, drawn in the order of the package `tabm`, and its input columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from landscape_fast.nn.functional import check_count
from landscape_fast.nn.init import Normal, Ones, RandomSign, uniform_
from landscape_fast.ops._checks import require

STARTS = ("random-signs", "normal")
_SCALINGS = {"random-signs": RandomSign(), "normal": Normal(0.0, 1.0), "ones": Ones()}


@torch.no_grad()
def init_scaling_(
    x: Tensor,
    distribution: str,
    chunks: Sequence[int] | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Fills a factor [..., D] with ones, random signs, or normal numbers of deviation 1.

    Args:
        x: changed in place and returned.
        distribution: "ones", "random-signs" or "normal".
        chunks: sizes that sum to D; the entries of a chunk share one value per leading index.
        generator: draws; torch's global one by default.
    """
    op = "init_scaling_"
    known = tuple(_SCALINGS)
    require(distribution in known, op, "distribution", f"one of {known}", repr(distribution))
    draw_ = _SCALINGS[distribution]
    if chunks is None:
        return draw_(x, generator)
    require(distribution != "ones", op, "chunks", "None with distribution 'ones'", list(chunks))
    fits = x.ndim > 0 and sum(chunks) == x.shape[-1]
    rule = f"sizes that sum to the last dimension of {list(x.shape)}"
    require(fits, op, "chunks", rule, list(chunks))
    if x.is_meta:
        return x
    device = "cpu" if generator is None else generator.device
    for part, size in zip(x.split(list(chunks), -1), chunks, strict=True):
        if size:
            part.copy_(draw_(torch.empty(*x.shape[:-1], 1, device=device), generator))
    return x


@dataclass(frozen=True)
class Scaling:
    """`init_scaling_` as an initialiser of a layer: for its `r_init` or `s_init`."""

    distribution: str = "ones"
    chunks: tuple[int, ...] | None = None

    def __call__(self, tensor: Tensor, generator: Generator | None = None) -> Tensor:
        return init_scaling_(tensor, self.distribution, self.chunks, generator)


@torch.no_grad()
def reset_batch_ensemble_(layer: nn.Module, generator: Generator | None = None) -> None:
    """New weight, r, s, and a bias that all members start with, drawn in the order of `tabm`."""
    bound = layer.in_features**-0.5
    uniform_(layer.weight, bound, generator)
    layer.reset_factors(generator)
    if layer.bias is not None:
        layer.bias.copy_(uniform_(torch.empty_like(layer.bias[0]), bound, generator))


def feature_sizes(n_num: int, cardinalities: Sequence[int], embeddings) -> list[int]:
    """How many inputs of the first layer belong to each column of the table."""
    require(n_num >= 0, "TabM", "n_num_features", "an integer of at least 0", n_num)
    some = n_num > 0 or len(cardinalities) > 0
    require(some, "TabM", "n_num_features and cat_cardinalities", "not both empty", "no column")
    if embeddings is None:
        return [1] * n_num + list(cardinalities)
    require(n_num > 0, "TabM", "num_embeddings", "None without numerical columns", embeddings)
    fits = callable(getattr(embeddings, "get_output_shape", None))
    rule = "a module with get_output_shape() -> (n_num_features, d)"
    require(fits, "TabM", "num_embeddings", rule, type(embeddings).__name__)
    # Piecewise-linear embeddings of rtdl_num_embeddings in version "A" have linear0 = None.
    version_b = getattr(embeddings, "linear0", embeddings) is not None
    require(version_b, "TabM", "num_embeddings", 'of version "B"', "one without linear0")
    shape = tuple(embeddings.get_output_shape())
    fits = len(shape) == 2 and shape[0] == n_num
    require(fits, "TabM", "num_embeddings", f"of output shape ({n_num}, d)", shape)
    return [shape[1]] * n_num + list(cardinalities)


def table_rows(model: nn.Module, x_num: Tensor | None, x_cat: Tensor | None, k: int) -> Tensor:
    """The columns as the blocks read them: [B, D], or [B, k, D] where each member has its rows.

    Args:
        model: has `num_module` and `cat_module` (or None), `n_num` and `n_cat` columns.
        k: number of members; 0 where only [B, columns] will do.
    """
    columns, lead = [], None
    given = (
        ("x_num", x_num, model.n_num, model.num_module),
        ("x_cat", x_cat, model.n_cat, model.cat_module),
    )
    for name, x, n, module in given:
        got = None if x is None else list(x.shape)
        if n == 0:
            require(x is None, "TabM", name, "None where there are no such columns", got)
            continue
        fits = x is not None and x.ndim in (2, 3) and x.shape[-1] == n
        fits = fits and (x.ndim == 2 or x.shape[1] == k > 0)
        rule = f"[B, {n}]" + (f" or [B, k, {n}] with k = {k}" if k else "")
        require(fits, "TabM", name, rule, got)
        require(lead in (None, x.shape[:-1]), "TabM", name, "of as many rows as x_num", got)
        lead, rows = x.shape[:-1], x.flatten(0, -2)
        columns.append((rows if module is None else module(rows)).flatten(1))
    # Categories are integers until here; alone they would stay so.
    dtype = next(c.dtype for c in (*columns, *model.parameters()) if c.is_floating_point())
    columns = [c if c.is_floating_point() else c.to(dtype) for c in columns]
    x = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
    return x if len(lead) == 1 else x.unflatten(0, lead)


class OneHot(nn.Module):
    """int64 categories [N, columns] -> 0 and 1 [N, sum of the cardinalities].

    Args:
        cardinalities: number of categories of each column.

    Example:
        >>> OneHot([2, 3])(torch.tensor([[0, 0], [1, 2]]))
        tensor([[1, 0, 1, 0, 0],
                [0, 1, 0, 0, 1]])
    """

    def __init__(self, cardinalities: Sequence[int]):
        super().__init__()
        for size in cardinalities:
            check_count("OneHot", "cardinalities", size)
        self.cardinalities = tuple(cardinalities)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.one_hot(x[..., i], n) for i, n in enumerate(self.cardinalities)], -1)

    def extra_repr(self) -> str:
        return f"{self.cardinalities}"
