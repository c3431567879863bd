"""Recalibration against the statistics of all rows at once, and the guard against stale ones."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from landscape_fast.nn import (
    BatchEnsembleLinear,
    BatchMoments,
    EnsembleBatchNorm1d,
    EnsembleBatchNorm2d,
    FoldedEnsemble,
    recalibrate_,
    statistics_mode_,
)
from landscape_fast.nn._moments import over_ranks

N, F, M = 23, 4, 3
ROWS = torch.randn(N, 2, 5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ROWS = (ROWS + 1) * torch.arange(1.0, N + 1).view(
    N, 1, 1, 1
)  # means and spreads differ between batches


def network():
    """Two norms, dropout between them."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, F, 3, padding=1),
        nn.BatchNorm2d(F),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(F * 15, F),
        nn.BatchNorm1d(F, momentum=None),
    ).double()


def buffers(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num_b" in k}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, values in one.items():
        assert torch.equal(values, other[key]), key


def of_all(x, dims):
    return x.mean(dims), x.var(dims)


@pytest.mark.parametrize("batch_size", [N, 10, 4])
def test_the_first_norm_gets_the_statistics_of_all_rows(batch_size):
    """However the rows are cut."""
    model = network()
    recalibrate_(model, ROWS, batch_size=batch_size)
    mean, var = of_all(model[0](ROWS), (0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)


def test_every_norm_gets_those_of_its_input_normalised_by_the_batch():
    """As one pass of training sees it, without dropout; unequal batches count by their rows."""
    model = network()
    batches = [(ROWS[:3], None), (ROWS[3:20], None), [ROWS[20:]]]
    recalibrate_(model, batches)
    plain = [layer for layer in network() if not isinstance(layer, nn.Dropout)]
    seen = []
    for rows, *_ in batches:
        for layer in plain[:-1]:
            rows = layer(rows)
        seen.append(rows)
    mean, var = of_all(torch.cat(seen), 0)
    torch.testing.assert_close(model[5].running_mean, mean)
    torch.testing.assert_close(model[5].running_var, var)
    assert model[5].num_batches_tracked == 3


def test_one_batch_is_what_update_bn_does():
    model = network().requires_grad_(False)
    model[2].p = 0.0
    other = copy.deepcopy(model)
    recalibrate_(model, ROWS)
    torch.optim.swa_utils.update_bn([ROWS], other)
    for key, values in buffers(model).items():
        torch.testing.assert_close(values, buffers(other)[key])


def test_equal_batches_and_update_bn_differ_by_the_spread_of_their_means():
    """The means are equal; update_bn averages the variances within a batch."""
    model = network()
    model[2].p = 0.0
    other = copy.deepcopy(model)
    batches = list(ROWS[:20].split(5))
    recalibrate_(model, batches)
    torch.optim.swa_utils.update_bn(batches, other)
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)
    torch.testing.assert_close(model[5].running_mean, other[5].running_mean)
    n = 5 * 15
    means = torch.stack([model[0](rows).mean((0, 2, 3)) for rows in batches])
    between = n * (means - means.mean(0)).square().sum(0)
    want = (4 * (n - 1) * other[1].running_var + between) / (4 * n - 1)
    torch.testing.assert_close(model[1].running_var, want)
    assert (model[1].running_var > 1.01 * other[1].running_var).any()


def test_many_batches_far_from_zero_lose_no_digits():
    """A sum of squares would: the spread is 1e-6 of the mean; more batches than are kept apart."""
    x = 1e6 + torch.randn(4 * 41, F, dtype=torch.float64)
    norm = recalibrate_(nn.BatchNorm1d(F).double(), x, batch_size=4)
    assert norm.num_batches_tracked == 41
    mean, var = of_all(x, 0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-9, atol=0)  # 1e6**2 * 1e-16 / 1


@pytest.mark.parametrize("layout", ["member_major", "batch_major", "folded"])
def test_all_members_in_one_pass(layout):
    """Each gets what it would get alone."""
    torch.manual_seed(2)
    layers = [
        BatchEnsembleLinear(2, F, M, layout=layout, s_init="normal"),
        EnsembleBatchNorm1d(F, M, layout=layout),
        nn.ReLU(),
        BatchEnsembleLinear(F, F, M, layout=layout, s_init="normal"),
        EnsembleBatchNorm1d(F, M, layout=layout),
    ]
    model = nn.Sequential(*layers).double()
    whole = FoldedEnsemble(model, M) if layout == "folded" else model
    rows = ROWS[:, :, 0, 0]
    batches = [rows[:6], rows[6:8], rows[8:]]
    calls = []
    handle = whole.register_forward_hook(lambda *args: calls.append(1))
    recalibrate_(whole, batches)
    handle.remove()
    assert len(calls) == 3
    for m in range(M):
        alone = nn.Sequential(*[x.member(m) if hasattr(x, "member") else x for x in model])
        want = buffers(alone)
        recalibrate_(alone, batches)
        for key, values in buffers(alone).items():
            torch.testing.assert_close(want[key], values)


def test_a_norm_that_is_used_twice_sees_both():
    norm = nn.BatchNorm1d(2).double()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) + self.norm(x[:3] + 5)

    x = ROWS[:3, :, 0, 0]
    recalibrate_(Twice(), [x])
    mean, var = of_all(torch.cat([x, x + 5]), 0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)


def test_a_fixed_subset():
    some = network()
    recalibrate_(some, ROWS, subset=7)
    again = network()
    recalibrate_(again, ROWS, subset=7)
    assert_same(buffers(some), buffers(again))
    positions = torch.tensor([0, 5, 6, 22])
    recalibrate_(some, ROWS, subset=positions)
    recalibrate_(again, ROWS[positions])
    assert_same(buffers(some), buffers(again))


def test_modes_momentum_and_random_state_are_as_before():
    model = network().train()
    model[2].eval()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    y = []
    recalibrate_(model, ROWS, call=lambda x: y.append(model(x)))
    assert torch.equal(torch.get_rng_state(), before), "dropout was on"
    assert not y[0].requires_grad
    assert [m.training for m in model.modules()] == modes
    assert model[1].momentum == 0.1 and model[5].momentum is None
    assert not model[1]._forward_hooks and not model[5]._forward_hooks


def test_a_failure_leaves_the_statistics_as_they_were():
    model = network()
    model(ROWS)
    before = buffers(model)

    def batches():
        yield ROWS[:5]
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        recalibrate_(model, batches())
    assert_same(buffers(model), before)
    assert model.training and model[1].momentum == 0.1 and not model[1]._forward_hooks


def test_norms_that_are_not_used_keep_theirs():
    model = network()
    model.unused = nn.BatchNorm1d(3)
    model.unused.running_mean.fill_(7)
    recalibrate_(model, ROWS, call=lambda x: model[1](model[0](x)))
    assert (model.unused.running_mean == 7).all() and (model[5].running_mean == 0).all()
    assert (model[1].running_mean != 0).all()


def test_without_running_statistics_nothing_is_run():
    def fail(x):
        pytest.fail("was run")

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert recalibrate_(model, ROWS, call=fail) is model


ERRORS = [
    ({"batch_size": 0}, "recalibrate_: batch_size must be an integer of at least 1; got 0"),
    ({"subset": 24}, r"recalibrate_: subset must be an integer from 1 to N = 23, or pos.*; got 24"),
    (
        {"batches_or_rows": ROWS[:0]},
        r"batches_or_rows must be \[N, ...\] with at least one row; got \[0, 2",
    ),
    (
        {"batches_or_rows": []},
        "batches_or_rows must be rows that give each channel two numbers or more; go",
    ),
    (
        {"batches_or_rows": [ROWS], "subset": 3},
        "subset must be None unless rows are given as one tensor; g",
    ),
]


@pytest.mark.parametrize("options, text", ERRORS, ids=str)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        recalibrate_(network(), **{"batches_or_rows": ROWS, **options})


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"statistics_mode_: mode must be one of \('recalibrate'"):
        statistics_mode_(network(), "interpolate")


def test_moments_of_parts_of_any_size():
    x = ROWS.flatten(1)
    parts = [BatchMoments.of(rows, (0,)) for rows in x.split((1, 5, 2, 15))]
    nothing = BatchMoments(torch.zeros((), dtype=torch.float64), *[parts[0].mean * torch.nan] * 2)
    whole = BatchMoments.merge([nothing, *parts])
    assert whole.count == N
    torch.testing.assert_close(whole.mean, x.mean(0))
    torch.testing.assert_close(whole.variance(), x.var(0))
    torch.testing.assert_close(whole.variance(0), x.var(0, correction=0))


def _of_a_process(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = network()
    # shares of unequal sizes; the second also has a smaller batch
    batches = [ROWS[:5]] if rank == 0 else [ROWS[5:20], ROWS[20:]]
    recalibrate_(model, batches, group=dist.group.WORLD)
    nothing = BatchMoments(*[torch.zeros(s, dtype=torch.float64) for s in ((), (F,), (F,))])
    some = BatchMoments.of(torch.ones(rank + 1, F), (0,))
    moments = over_ranks([nothing if rank else some, some], dist.group.WORLD)
    torch.save((buffers(model), [m._asdict() for m in moments]), f"{out}-{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads can crash an interpreter that shuts down


def test_processes_get_the_statistics_of_all_their_rows(tmp_path):
    out = tmp_path / "out"
    torch.multiprocessing.spawn(_of_a_process, (str(tmp_path / "store"), str(out)), nprocs=2)
    (first, moments), (second, _) = (torch.load(f"{out}-{rank}") for rank in range(2))
    alone = network()
    recalibrate_(alone, [ROWS[:5], ROWS[5:20], ROWS[20:]])
    for key, values in buffers(alone).items():
        if "num_batches" not in key:
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], values)
    assert (first["1.num_batches_tracked"], second["1.num_batches_tracked"]) == (1, 2)
    assert [m["count"].item() for m in moments] == [1, 3]  # one rank may have seen nothing


class TestGuard:
    def test_stale_statistics_are_an_error_that_names_the_ways_out(self):
        model = network().eval()
        guard = statistics_mode_(model, "recalibrate")
        text = (
            "BatchNorm2d: running statistics must be of the weights that are evaluated; got those "
            r"of other weights; .*'recalibrate'.*'shared'.*'batch'"
        )
        for _ in range(2):
            with pytest.raises(RuntimeError, match=text):
                model(ROWS)
            recalibrate_(model, ROWS)
            assert not guard.stale
            model(ROWS)
            guard.stale = True  # the weights have moved
        model.train()(ROWS)  # training needs none

    def test_shared_takes_what_is_there(self):
        model = network()
        model(ROWS)
        guard = statistics_mode_(model, "recalibrate")
        want = copy.deepcopy(model).eval()
        statistics_mode_(want, "shared")
        assert statistics_mode_(model, "shared") is guard, "one guard per model"
        plain = network().eval()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(ROWS), plain(ROWS))
        assert torch.equal(want(ROWS), plain(ROWS))

    @pytest.mark.parametrize("kind", [nn.BatchNorm2d, EnsembleBatchNorm2d])
    def test_batch_takes_those_of_the_batch_and_changes_nothing(self, kind):
        own = (M,) if kind is EnsembleBatchNorm2d else ()
        norm = kind(2, *own).double()
        x = ROWS.expand(*own, *ROWS.shape)
        want = norm(x)
        before = buffers(norm)
        statistics_mode_(norm, "batch")
        assert torch.equal(norm.eval()(x), want)
        assert_same(buffers(norm), before)
        assert norm.running_mean is not None
        with pytest.raises((ValueError, RuntimeError)):
            norm(ROWS[:, :1])
        assert norm.running_mean is not None, "also where a forward fails"

    @pytest.mark.parametrize("mode", ["recalibrate", "batch"])
    def test_compiles(self, mode):
        torch._dynamo.reset()
        model = network().eval()
        statistics_mode_(model, mode)
        recalibrate_(model, ROWS)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ROWS), model(ROWS))

    def test_a_copy_has_a_guard_of_its_own(self):
        model = network().eval()
        guard = statistics_mode_(model, "recalibrate")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            recalibrate_(other, ROWS)
            other(ROWS)
            assert guard.stale
            assert other[1]._statistics_guard is other[5]._statistics_guard
            with pytest.raises(RuntimeError, match="running statistics must be"):
                model(ROWS)
