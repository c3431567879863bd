"""How alike checkpoints are: in weight space, in what they predict, and as a picture.

Source: Fort et al. 2019 (arXiv:1912.02757), figures 2 and 3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast.metrics import weight_cosines
from landscape_fast.nn.geometry import distances as gram_distances
from landscape_fast.ops import divergence_sums, gram
from landscape_fast.ops._checks import check_tensor, require, whole

# Numbers of the predictions that are widened to float64 at a time.
WIDENED = 2**21
# Squared distances come from a Gram matrix in float64, whose rounding is some 1e-15 of the squared
# lengths. Below this share of them a distance is summed again from differences.
CLOSE = 1e-6
PERPLEXITY = 30.0


class Similarity(NamedTuple):
    """How alike S checkpoints are, in float64.

    Attributes:
        cosine: [S, S], cosine of the angle between the weights; nan for weights that are all 0.
        disagreement: [S, S], fraction of the examples that get different labels.
    """

    cosine: Tensor
    disagreement: Tensor


class ClusterDistances(NamedTuple):
    """What separates runs and what a run covers; 0-dim float64 tensors.

    Attributes:
        across: the smallest distance between late checkpoints of two runs.
        within: the largest distance between late checkpoints of one run.
    """

    across: Tensor
    within: Tensor


@torch.no_grad()
def similarity(weights: Tensor, logits: Tensor) -> Similarity:
    r"""Cosines of the weights and disagreement of the labels, for every pair of S checkpoints.

    .. math:: \cos_{ij} = \frac{w_i \cdot w_j}{|w_i| |w_j|}, \qquad
        d_{ij} = \frac1N \sum_n [f_i(x_n) \ne f_j(x_n)]

    Args:
        weights: [S, P], the weights and biases of one checkpoint per row, of one run or of all of
            them one after another, as `FlatLayout` orders them.
        logits: [S, N, C], what each predicts for the same N examples.

    Returns:
        `Similarity`. Both are symmetric, with exact diagonals; disagreement is exact counts.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if the shapes disagree.

    Cost: one read of the weights and of the logits; S * S * (P + N) operations.

    Source: Fort et al. 2019 (arXiv:1912.02757), figures 2 (a), 2 (b) and 3.

    Example:
        >>> weights = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).expand(3, 2, 2).clone()
        >>> logits[2, 0] = torch.tensor([0.0, 4.0])
        >>> found = similarity(weights, logits)
        >>> found.cosine[:2]
        tensor([[1.0000, 0.0000, 0.7071],
                [0.0000, 1.0000, 0.7071]], dtype=torch.float64)
        >>> found.disagreement[0]
        tensor([0.0000, 0.0000, 0.5000], dtype=torch.float64)
    """
    _check_logits("similarity", logits)
    check_tensor("similarity", "weights", weights, "S, P", (logits.shape[0], None))
    counts = divergence_sums(logits, ("disagreement",))["disagreement"]
    return Similarity(weight_cosines(weights), counts / logits.shape[1])


@torch.no_grad()
def function_distances(logits: Tensor) -> Tensor:
    r"""Euclidean distances of what S checkpoints predict: of all probabilities, as one vector each.

    .. math:: D_{ij}^2 = \sum_{nc} (p_{inc} - p_{jnc})^2, \qquad p = \mathrm{softmax}_c

    Args:
        logits: [S, N, C].

    Returns:
        [S, S] float64, at most sqrt(2 N); symmetric, 0 on the diagonal. At least nine digits are
        right however close two checkpoints are: all probabilities are in float64 and relative to
        their mean over the checkpoints, and distances that are small against what is left are
        summed from differences. NaN to and from a checkpoint whose probabilities are not finite.

    Raises:
        TypeError: if `logits` is no tensor.
        ValueError: if it is not [S, N, C].

    Cost: S * N * C exponentials and S * S * N * C operations in float64; memory for 16 MiB of
        probabilities besides the result. Checkpoints that lie that close cost a second reading.

    Source: the space of Fort et al. 2019 (arXiv:1912.02757), figure 2 (c).

    Example:
        >>> p = torch.tensor([[[0.5, 0.5]], [[0.8, 0.2]], [[0.5, 0.5]]])
        >>> function_distances(p.log())
        tensor([[0.0000, 0.4243, 0.0000],
                [0.4243, 0.0000, 0.4243],
                [0.0000, 0.4243, 0.0000]], dtype=torch.float64)
    """
    _check_logits("function_distances", logits)
    S, _, C = logits.shape
    products = torch.zeros(S, S, dtype=torch.float64, device=logits.device)
    step = max(1, WIDENED // (S * C))
    for part in logits.split(step, 1):
        products += gram(_centred(part).flatten(1))
    found = gram_distances(products)
    squares = products.diagonal()
    close = found.square() < CLOSE * (squares[:, None] + squares)
    pairs = close.triu(1).nonzero()  # [pairs, 2]
    if len(pairs):
        sums = found.new_zeros(len(pairs))
        step = max(1, WIDENED // (C * (S + 2 * len(pairs))))
        for part in logits.split(step, 1):
            p = _centred(part).flatten(1)
            sums += (p[pairs[:, 0]] - p[pairs[:, 1]]).square().sum(1)
        i, j = pairs.unbind(1)
        found[i, j] = found[j, i] = sums.sqrt()
    return found.fill_diagonal_(0)


def tsne(
    logits: Tensor,
    *,
    perplexity: float | str = "auto",
    seed: int = 0,
    distances: Tensor | None = None,
) -> Tensor:
    """A picture of S functions: t-SNE of all their probabilities, as one vector each.

    How far apart two clusters are in it says little; `cluster_ratio` is a number to go with it.

    Args:
        logits: [S, N, C] with S at least 4.
        perplexity: about how many neighbours count, at least 1 and below S. "auto": 30, as in the
            paper, or (S - 1) / 3 where there are fewer than 91 functions.
        seed: of the random state, below 2^32.
        distances: [S, S], what `function_distances(logits)` gave, to save computing them again.

    Returns:
        [S, 2] float64 on the CPU. It starts from the principal components, as scikit-learn does by
        itself for points, and is the same every time, with any number of threads, on one machine.

    Raises:
        ImportError: without scikit-learn, which the extra `plot` brings.
        TypeError: if `logits` is no tensor.
        ValueError: if there are fewer than 4 functions, or too few for the perplexity, or one has
            probabilities that are not finite.

    Cost: `function_distances` and, in scikit-learn, some seconds for hundreds of points.

    Source: Fort et al. 2019 (arXiv:1912.02757), figures 2 (c) and 4; van der Maaten and Hinton
        2008.

    Example:
        >>> near = 0.01 * torch.randn(2, 5, 8, 3)
        >>> logits = (near + 3 * torch.randn(2, 1, 8, 3)).flatten(0, 1)  # two runs of 5 checkpoints
        >>> tsne(logits).shape
        torch.Size([10, 2])
    """
    op = "tsne"
    _check_logits(op, logits)
    S = logits.shape[0]
    require(S >= 4, op, "logits", "[S, N, C] with S at least 4", list(logits.shape))
    rule = "an integer in [0, 2^32), as scikit-learn has it"
    require(whole(seed, 0) and seed < 2**32, op, "seed", rule, repr(seed))
    if perplexity == "auto":
        perplexity = min(PERPLEXITY, (S - 1) / 3)
    number = isinstance(perplexity, (int, float)) and not isinstance(perplexity, bool)
    rule = f"'auto' or a number of at least 1 and below S = {S}"
    remedy = "'auto' chooses one that fits"
    require(number and 1 <= perplexity < S, op, "perplexity", rule, repr(perplexity), remedy)
    if distances is None:
        distances = function_distances(logits)
    check_tensor(op, "distances", distances, "S, S", (S, S))
    distances = distances.double().cpu()
    spoilt = int((~distances.isfinite()).sum())
    remedy = "leave out checkpoints whose predictions are not finite"
    require(spoilt == 0, op, "distances", "finite", f"{spoilt} that are not", remedy)
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits  # which scikit-learn brings
    except ImportError as error:
        raise ImportError(
            f"tsne: scikit-learn must be installed; got {error}; pip install 'landscape-fast[plot]'"
        ) from error
    start = _principal(distances)
    start = start / start[:, 0].std(correction=0).clamp(min=1e-300) * 1e-4  # as scikit-learn's own
    embedding = TSNE(
        n_components=2,
        perplexity=float(perplexity),
        metric="precomputed",
        init=start.float().numpy(),
        random_state=seed,
    )
    with threadpool_limits(1):  # so few points are no faster with more, and add up in one order
        places = embedding.fit_transform(distances.numpy())
    return torch.from_numpy(places).double()


def cluster_distances(distances: Tensor, run: Tensor, late: Tensor) -> ClusterDistances:
    """How far apart runs end, and how far one run still moves at its end.

    Args:
        distances: [S, S] between checkpoints, for instance those of `function_distances` or the
            disagreement of `similarity`.
        run: [S] integers, which run each belongs to.
        late: [S] bool, which belong to the late part of their run; others are left out, among them
            the untrained networks, whose predictions are all alike.

    Returns:
        `ClusterDistances`: nan for `across` where there is one run, and for `within` where no run
        has two late checkpoints.

    Raises:
        TypeError: if `distances` is no tensor.
        ValueError: if the shapes disagree or `late` is not bool.
    """
    op = "cluster_distances"
    check_tensor(op, "distances", distances, "S, S", (None, None))
    S = distances.shape[0]
    require(distances.shape == (S, S), op, "distances", "[S, S]", list(distances.shape))
    run, late = torch.as_tensor(run), torch.as_tensor(late)
    require(run.shape == (S,), op, "run", f"[S] with S = {S}", list(run.shape))
    good = late.shape == (S,) and late.dtype == torch.bool
    require(good, op, "late", f"[S] bool with S = {S}", f"{late.dtype} {list(late.shape)}")
    run, late = run.to(distances.device), late.to(distances.device)
    both = (late[:, None] & late).triu(1)
    same = run[:, None] == run
    across, within = (distances[both & pairs].double() for pairs in (~same, same))
    nothing = distances.new_full((), float("nan"), dtype=torch.float64)
    return ClusterDistances(
        across.min() if len(across) else nothing, within.max() if len(within) else nothing
    )


def cluster_ratio(distances: Tensor, run: Tensor, late: Tensor) -> Tensor:
    """Whether runs are clusters: the distance that separates them, by the size of the largest.

    Args:
        distances: as in `cluster_distances`; `run` and `late` too.
        run: [S] integers.
        late: [S] bool.

    Returns:
        0-dim float64: `across` / `within` of `cluster_distances`. Above 1 every late checkpoint is
        closer to all of its own run than to any of another run.

    Source: the distance criterion beside figure 2 (c) of Fort et al. 2019 (arXiv:1912.02757).

    Example:
        >>> place = torch.tensor([0.0, 1.0, 5.0, 6.5])  # of two checkpoints of two runs
        >>> distances = (place[:, None] - place).abs()
        >>> cluster_ratio(distances, torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool))
        tensor(2.6667, dtype=torch.float64)
    """
    found = cluster_distances(distances, run, late)
    return found.across / found.within


def _check_logits(op: str, logits: Tensor) -> None:
    check_tensor(op, "logits", logits, "S, N, C", (None, None, None))
    rule = "[S, N, C] with N and C at least 1"
    require(logits.shape[1] >= 1 and logits.shape[2] >= 1, op, "logits", rule, list(logits.shape))


def _centred(logits: Tensor) -> Tensor:
    """[S, C, n] probabilities in float64, less their mean over the checkpoints.

    Classes come before examples, so that vectors run along the examples: a softmax along ten
    classes takes a CPU six times as long.
    """
    p = logits.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    p -= p.amax(1, keepdim=True)
    p.exp_()
    p /= p.sum(1, keepdim=True)
    return p.sub_(p.mean(0).nan_to_num_())  # a diverged checkpoint must not spoil the others


def _principal(distances: Tensor) -> Tensor:
    """[S, 2]: the first two principal components of points with these distances."""
    centre = torch.eye(len(distances), dtype=torch.float64) - 1 / len(distances)
    values, vectors = torch.linalg.eigh(centre @ distances.square() @ centre / -2)
    places = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp(min=0).sqrt()
    # the sign of an eigenvector is a matter of the library; this fixes it
    largest = places.gather(0, places.abs().argmax(0, keepdim=True))
    return places * torch.where(largest < 0, -1.0, 1.0)
