"""Accumulators: as one pass over everything, whatever the batches, the parts and the processes."""

import io
import os
from math import nan

import pytest
import torch
import torch.distributed as dist

from landscape_fast.metrics.streaming import DivergenceAccumulator, SummaryAccumulator
from landscape_fast.ops import (
    divergence_sums,
    ensemble_summary_reference,
    pairwise_divergence,
    pairwise_divergence_reference,
)
from landscape_fast.testing import assert_as_exact

KINDS = ("js", "kl", "disagreement")
ALIGNED, RAGGED = (64, 160, 96), (1, 100, 0, 37, 182)  # of 320 examples


def case(C, M=4, N=320, dtype=torch.float32):
    generator = torch.Generator().manual_seed(C)
    logits = 2 * torch.randn(M, N, C, generator=generator)
    logits[1] = logits[0] + 1e-3 * logits[1]  # close: a divergence near 1e-6
    targets = torch.randint(0, C, (N,), generator=generator)
    logits[:, torch.arange(N), targets] += 2
    targets[3::7] = -100
    return logits.to(dtype), targets


def batches(logits, targets, sizes):
    return zip(logits.split(sizes, 1), targets.split(sizes), strict=True)


def both(logits, targets, sizes):
    """A pair of accumulators that have seen everything in batches of these sizes."""
    divergence, summary = DivergenceAccumulator(), SummaryAccumulator()
    for x, y in batches(logits, targets, sizes):
        divergence.update(x)
        summary.update(x, y)
    return divergence, summary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("C, sizes", [(10, ALIGNED), (10, (320,)), (70, ALIGNED), (70, RAGGED)])
def test_batches_of_whole_blocks_are_as_one_pass(C, sizes, dtype):
    logits, targets = case(C, dtype=dtype)
    divergence, summary = both(logits, targets, sizes)
    one = divergence_sums(logits, KINDS)
    got = divergence.compute()
    assert tuple(got) == KINDS and torch.equal(got["disagreement"], one["disagreement"] / 320)
    for kind in KINDS:
        torch.testing.assert_close(got[kind], one[kind] / 320, rtol=1e-14, atol=0)
    whole = SummaryAccumulator()
    whole.update(logits, targets)
    for name, a, b in zip(
        summary.compute()._fields, summary.compute(), whole.compute(), strict=True
    ):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15, msg=name)
    assert torch.equal(summary.compute().member_accuracy, whole.compute().member_accuracy)


@pytest.mark.parametrize("C", [10, 70])
def test_any_batches_are_as_exact_as_plain_pytorch(C):
    logits, targets = case(C)
    divergence, summary = both(logits, targets, RAGGED)
    for kind, got in divergence.compute().items():
        plain = pairwise_divergence_reference(logits, kind)
        truth = pairwise_divergence_reference(logits.double(), kind)
        assert_as_exact(kind, got.float(), plain, truth)
    assert torch.equal(got.float(), pairwise_divergence(logits, "disagreement"))  # counts
    plain = ensemble_summary_reference(logits, targets)
    truth = ensemble_summary_reference(logits.double(), targets)
    for name, got, *two in zip(plain._fields, summary.compute(), plain, truth, strict=True):
        assert_as_exact(name, got.float(), *two)


def test_close_members_keep_their_digits_over_batches():
    logits, _ = case(10)
    got = DivergenceAccumulator(("js",))
    for x in logits.split(32, 1):
        got.update(x)
    truth = pairwise_divergence_reference(logits.double(), "js")
    assert 0 < truth[0, 1] < 2e-6
    # 1e-5 of it: the rounding of p to float32, 6e-8, against a step of 1e-3, squared
    torch.testing.assert_close(got.compute()["js"][0, 1], truth[0, 1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("C", [10, 70])
def test_merging_parts_is_adding_them_in_order(C):
    logits, targets = case(C)
    whole = both(logits, targets, ALIGNED)
    parts = [both(x, y, (len(y),)) for x, y in batches(logits, targets, ALIGNED)]
    for k in range(2):
        never = type(whole[k])()
        merged = never.merge(*(part[k] for part in parts), type(whole[k])())
        assert merged is never
        for got, want in zip(_numbers(merged), _numbers(whole[k]), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"^DivergenceAccumulator: others must be .* got Summary"):
        parts[0][0].merge(parts[0][1])
    with pytest.raises(ValueError, match=r"^SummaryAccumulator: others must be .*'bins': 15"):
        parts[0][1].merge(SummaryAccumulator(bins=10))
    before = _numbers(parts[0][0])
    other = DivergenceAccumulator()
    other.update(torch.zeros(3, 2, C))
    with pytest.raises(ValueError, match=r"M must be the same in every batch and part; got \[3, 3"):
        parts[0][0].merge(parts[1][0], other)
    assert all(map(torch.equal, _numbers(parts[0][0]), before))  # nothing was added


def _numbers(accumulator):
    total = accumulator.compute()
    return list(total.values()) if isinstance(total, dict) else list(total)


def test_state_dicts_survive_a_file():
    logits, targets = case(10)
    for first, again in zip(
        both(logits, targets, ALIGNED), (DivergenceAccumulator(), SummaryAccumulator()), strict=True
    ):
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
        buffer.seek(0)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        assert all(map(torch.equal, _numbers(again), _numbers(first)))
        again.merge(first)  # what was loaded is its own
        assert all(map(torch.equal, _numbers(again), _numbers(first)))
        first.reset()
        with pytest.raises(ValueError, match="compute must be called after an update; got no up"):
            first.compute()
    with pytest.raises(ValueError, match=r"settings must be .*15.*; got .*'bins': 3"):
        SummaryAccumulator().load_state_dict(SummaryAccumulator(bins=3).state_dict())


def test_poison_and_nothing():
    logits, targets = case(10)
    logits[2, 5, 1] = nan
    divergence, summary = both(logits, targets, ALIGNED)
    js = divergence.compute()["js"]
    assert js[2].isnan().all() and js[:, 2].isnan().all() and js[:2, :2].isfinite().all()
    assert summary.compute().member_nll.isnan().tolist() == [False, False, True, False]
    empty = both(logits[:, :0], targets[:0], (0,))
    assert empty[0].compute()["kl"].isnan().all() and empty[1].compute().nll.isnan()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: DivergenceAccumulator(("tv",)), r"DivergenceAccumulator: kinds must be some of"),
        (lambda: SummaryAccumulator(bins=0), r"SummaryAccumulator: bins must be an integer"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(make, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        make()


def _evaluate(rank, store, out, shares):
    """One of the processes: some batches, then the total of all."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, targets = case(10)
    found = []
    for share in shares:
        pair = DivergenceAccumulator(), SummaryAccumulator()
        pieces = list(batches(logits, targets, (32,) * 10))
        for k in share[rank]:
            pair[0].update(pieces[k][0])
            pair[1].update(*pieces[k])
        found.append([accumulator.reduce_().state_dict() for accumulator in pair])
    torch.save(found, f"{out}-{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads can crash an interpreter that shuts down


def test_processes_with_unequal_batches_end_with_the_same_bits(tmp_path):
    """Of ten batches one process sees seven, or all: the other one then has nothing to add."""
    shares = [(range(7), range(7, 10)), (range(0), range(10))]
    out = tmp_path / "found"
    torch.multiprocessing.spawn(_evaluate, (str(tmp_path / "store"), str(out), shares), nprocs=2)
    ranks = [torch.load(f"{out}-{rank}", weights_only=True) for rank in range(2)]
    one = both(*case(10), (320,))
    for k, share in enumerate(shares):
        for which, whole in enumerate(one):
            states = [rank[k][which] for rank in ranks]
            for name, sums in states[0]["sums"].items():
                assert torch.equal(sums, states[1]["sums"][name]), name
                want = whole.state_dict()["sums"][name]
                torch.testing.assert_close(sums, want, rtol=1e-14, atol=1e-13)
            again = type(whole)()
            again.load_state_dict(states[0])
            if which == 0:
                exact = whole.compute()["disagreement"]
                assert torch.equal(again.compute()["disagreement"], exact), share


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc of Linux")
def test_many_members_and_classes_take_bounded_memory():
    """Twelve more batches of 8 MiB: kept, they would be 96 MiB."""
    logits, targets = torch.randn(128, 16, 1000), torch.zeros(16, dtype=torch.int64)
    divergence, summary = DivergenceAccumulator(), SummaryAccumulator()
    divergence.update(logits)
    summary.update(logits, targets)
    before = _peak_of_memory(reset=True)
    for _ in range(12):
        batch = logits.clone()
        divergence.update(batch)
        summary.update(batch, targets)
    grown = _peak_of_memory() - before
    # two copies of a batch at a time, and what the kernels take: 16 partial sums of [M, M], 2 MiB
    assert grown < 48 * 2**20, f"{grown / 2**20:.0f} MiB more"


def _peak_of_memory(reset=False):
    """Bytes that were resident at most, since the last reset."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
