"""Similarity of checkpoints against numpy and scipy, one pair at a time."""

import sys

import numpy as np
import pytest
import torch

from landscape_fast.landscape import (
    cluster_distances,
    cluster_ratio,
    function_distances,
    similarity,
    tsne,
)

MODULE = sys.modules["landscape_fast.landscape.similarity"]


def two_runs(checkpoints=5, rows=12, classes=4, step=0.3, dtype=torch.float32):
    """[S, N, C]: two runs, whose checkpoints are `step` apart."""
    generator = torch.Generator().manual_seed(3)
    runs = 2 * torch.randn(2, 1, rows, classes, generator=generator, dtype=dtype)
    steps = torch.randn(2, checkpoints, rows, classes, generator=generator, dtype=dtype)
    return (runs + step * steps).flatten(0, 1)


def probabilities(logits):
    """[S, N * C] in float64."""
    softmax = pytest.importorskip("scipy.special").softmax
    return softmax(logits.double().numpy(), -1).reshape(len(logits), -1)


def test_similarity_equals_one_pair_at_a_time():
    weights, logits = torch.randn(6, 40) + 0.5, torch.randn(6, 17, 3)
    found = similarity(weights, logits)
    labels, w = logits.argmax(-1).numpy(), weights.double().numpy()
    for i in range(6):
        for j in range(6):
            assert float(found.disagreement[i, j]) == np.mean(labels[i] != labels[j])
            cosine = w[i] @ w[j] / np.sqrt(w[i] @ w[i]) / np.sqrt(w[j] @ w[j])
            assert float(found.cosine[i, j]) == pytest.approx(cosine, rel=1e-12)
    assert found.cosine.dtype == found.disagreement.dtype == torch.float64
    assert found.cosine.diagonal().tolist() == [1.0] * 6


def test_shares_are_not_rounded_to_float32():
    """Of 3 rows one differs: 1/3 in float64."""
    logits = torch.eye(3)[None].repeat(2, 1, 1)
    logits[1, 0] = torch.tensor([0.0, 5.0, 0.0])
    found = similarity(torch.ones(2, 1), logits)
    assert float(found.disagreement[0, 1]) == 1 / 3


# Steps down to the rounding of float64; 1e-9 is what the docstring promises.
@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("widened", [2**21, 64])
def test_distances_keep_their_digits(step, widened, monkeypatch):
    """However close checkpoints of a run are, and whatever is read at a time."""
    distance = pytest.importorskip("scipy.spatial.distance")
    monkeypatch.setattr(MODULE, "WIDENED", widened)
    logits = two_runs(step=step, dtype=torch.float64)
    found = function_distances(logits)
    flat = probabilities(logits)
    truth = torch.from_numpy(distance.cdist(flat, flat))  # from differences
    # the difference of two probabilities is right to 1e-16 of them, whatever comes after
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-15)
    assert torch.equal(found, found.T) and found.diagonal().count_nonzero() == 0


def test_same_functions_are_no_distance_apart():
    logits = two_runs()[[0, 1, 0, 7]]
    found = function_distances(logits + torch.tensor([0.0, 0.0, 8.0, 0.0])[:, None, None])
    # the shift by 8 rounds the float32 logits, no more
    assert found[0, 2] < 1e-5 < 1e-2 < found[0, 1]
    assert function_distances(logits)[0, 2] == 0


def test_a_diverged_checkpoint_spoils_its_own_distances_alone():
    logits = two_runs()
    truth = function_distances(logits)
    logits[3, 2] = float("nan")
    found = function_distances(logits)
    others = torch.arange(10) != 3
    torch.testing.assert_close(found[others][:, others], truth[others][:, others])
    assert bool(found[3, others].isnan().all()) and bool(found[others, 3].isnan().all())
    with pytest.raises(ValueError, match="tsne: distances must be finite; got 18 that are not"):
        tsne(logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distances_of_short_logits_are_those_of_their_values(dtype):
    logits = two_runs().to(dtype)
    assert torch.equal(function_distances(logits), function_distances(logits.float()))


def test_the_start_of_tsne_is_the_principal_components():
    """As scikit-learn's own start for points, up to signs."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    logits = two_runs()
    truth = decomposition.PCA(2, svd_solver="full").fit_transform(probabilities(logits))
    truth = torch.from_numpy(truth)
    found = MODULE._principal(function_distances(logits))
    signs = (found * truth).sum(0).sign()
    torch.testing.assert_close(found, truth * signs)
    assert bool((found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all())


def test_tsne_keeps_runs_together_and_is_the_same_every_time():
    pytest.importorskip("sklearn")
    logits = two_runs(checkpoints=8)
    places = tsne(logits, seed=1)
    again = tsne(logits, seed=1, distances=function_distances(logits))
    assert torch.equal(places, again) and places.shape == (16, 2)
    apart = torch.cdist(places, places).fill_diagonal_(float("inf"))
    run = torch.arange(16) // 8
    assert torch.equal(run[apart.argmin(1)], run)
    # not all at once: an embedding without spread would pass the line above by luck alone
    assert float(apart.min()) > 0


def test_tsne_says_what_is_wrong(monkeypatch):
    logits = two_runs()
    with pytest.raises(ValueError, match=r"tsne: logits must be \[S, N, C\] with S at least 4"):
        tsne(logits[:3])
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\^32\)"):
        tsne(logits, seed=2**32)
    rule = r"perplexity must be 'auto' or a number of at least 1 and below S = 10; got 30; 'auto'"
    with pytest.raises(ValueError, match=rule):
        tsne(logits, perplexity=30)
    with pytest.raises(ValueError, match=r"distances must be \[S, S\] with S = 10; got \[4, 4\]"):
        tsne(logits, distances=torch.zeros(4, 4))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r"scikit-learn must be installed.*landscape-fast\[plot"):
        tsne(logits)


def test_cluster_distances_equal_one_pair_at_a_time():
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(12, 2, generator=generator)
    distances = torch.cdist(places, places)
    run = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    late = torch.tensor([False, True, True, True] * 3)
    across, within = [], []
    for i in range(12):
        for j in range(i):
            if late[i] and late[j]:
                (within if run[i] == run[j] else across).append(float(distances[i, j]))
    found = cluster_distances(distances, run, late)
    assert float(found.across) == min(across) and float(found.within) == max(within)
    assert float(cluster_ratio(distances, run, late)) == min(across) / max(within)


def test_what_cannot_be_compared_is_nan():
    distances = torch.ones(3, 3).fill_diagonal_(0)
    late = torch.ones(3, dtype=torch.bool)
    one_run = cluster_distances(distances, torch.zeros(3), late)
    assert one_run.across.isnan() and one_run.within == 1
    single = cluster_distances(distances, torch.arange(3), late)
    assert single.within.isnan() and single.across == 1
    assert cluster_ratio(distances, torch.arange(3), late).isnan()


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"similarity: weights must be \[S, P\] with S = 2"):
        similarity(torch.ones(3, 4), torch.ones(2, 5, 3))
    with pytest.raises(ValueError, match=r"function_distances: logits must be \[S, N, C\] with N"):
        function_distances(torch.ones(3, 0, 4))
    with pytest.raises(TypeError, match="function_distances: logits must be a Tensor"):
        function_distances([1.0])
    with pytest.raises(ValueError, match=r"late must be \[S\] bool with S = 3; got torch.int64"):
        cluster_ratio(torch.ones(3, 3), torch.zeros(3), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"run must be \[S\] with S = 3; got \[2\]"):
        cluster_ratio(torch.ones(3, 3), torch.zeros(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"distances must be \[S, S\]; got \[3, 2\]"):
        cluster_ratio(torch.ones(3, 2), torch.zeros(3), torch.ones(3, dtype=torch.bool))


def test_checkpoints_that_are_all_close_are_read_once(monkeypatch):
    """What they share is taken off first: only what is close against the rest costs more."""
    calls = []
    centred = MODULE._centred
    monkeypatch.setattr(MODULE, "_centred", lambda part: calls.append(1) or centred(part))
    function_distances(two_runs(step=1e-6, dtype=torch.float64)[:5])
    assert len(calls) == 1
    function_distances(two_runs(step=1e-6, dtype=torch.float64))
    assert len(calls) == 3
