"""The `Metric` classes: as the functions on everything, whatever the batches or processes."""

import copy
import os
import pickle
import sys

import pytest
import torch
import torch.distributed as dist

from landscape_fast import metrics
from landscape_fast.ops import pairwise_divergence

torchmetrics = pytest.importorskip("torchmetrics")
ours = metrics.torchmetrics
UNEVEN = (1, 20, 32, 7)
BEFORE = "ignore:The ``compute`` method of metric .* was called before the ``update``"


def data():
    """Inputs of all metrics by name; the examples are on the first axis but in the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 60, 4, generator=generator)
    logits[:, :1] = logits[:1, :1]  # the first batch has no diversity of any kind
    targets = torch.randint(4, (60,), generator=generator)
    logits[:, torch.arange(60), targets] += 1
    scores = (4 * metrics.ood_scores(logits)).round() / 4  # with ties
    out = torch.rand(60, generator=generator) < 0.5
    return {"logits": logits, "targets": targets, "probabilities": logits.softmax(-1).mean(0),
            "scores": scores, "out": out}  # fmt: skip


def cut(inputs, sizes):
    """One dict of inputs per batch."""
    parts = {name: t.split(sizes, 1 if name == "logits" else 0) for name, t in inputs.items()}
    return [{name: t[i] for name, t in parts.items()} for i in range(len(sizes))]


def summary(inputs, ignore_index=-100):
    found = metrics.SummaryAccumulator(ignore_index=ignore_index)
    found.update(inputs["logits"], inputs["targets"])
    return found.compute()._asdict()


def selective(p, targets):
    confidence, labels = p.max(1)
    curve = metrics.risk_coverage(confidence, labels == targets)
    return {"aurc": curve.aurc, "eaurc": curve.eaurc}


# name: how to make it, its value on all inputs
CASES = {
    "summary": (lambda: ours.EnsembleSummaryMetric(3, per_member=True), summary),
    "means": (
        lambda: ours.EnsembleSummaryMetric(3),
        lambda x: {name: value.mean() for name, value in summary(x).items()},
    ),
    "without": (
        lambda: ours.EnsembleSummaryMetric(3, ignore_index=2, per_member=True),
        lambda x: summary(x, 2),
    ),
    **{
        kind: (
            lambda kind=kind: ours.PairwiseDivergenceMetric(3, kind),
            lambda x, kind=kind: pairwise_divergence(x["logits"].double(), kind),
        )
        for kind in ("js", "kl", "disagreement")
    },
    "diversity": (
        lambda: ours.AveragePairwiseDiversity(3),
        lambda x: metrics.average_pairwise_diversity(x["logits"].double()),
    ),
    "cosines": (
        lambda: ours.PredictionCosines(3),
        lambda x: metrics.prediction_cosines(x["logits"]),
    ),
    "ratio": (
        ours.VariationRatio,
        lambda x: metrics.variation_ratio(x["logits"].argmax(-1)).mean(),
    ),
    **{
        norm: (
            lambda norm=norm: ours.CalibrationError(10, norm),
            lambda x, norm=norm: metrics.calibration_error(
                x["probabilities"], x["targets"], 10, norm=norm
            ),
        )
        for norm in ("l1", "l2", "max")
    },
    "mce": (
        ours.MaximumCalibrationError,
        lambda x: metrics.mce(x["probabilities"], x["targets"]),
    ),
    "reliability": (
        lambda: ours.ReliabilityBinsMetric(2),  # both have rows
        lambda x: metrics.reliability_bins(x["probabilities"], x["targets"], 2)._asdict(),
    ),
    "classwise": (
        lambda: ours.ClasswiseCalibrationError(4),
        lambda x: metrics.classwise_ece(x["probabilities"], x["targets"]),
    ),
    "adaptive": (
        ours.AdaptiveCalibrationError,
        lambda x: metrics.adaptive_ece(x["probabilities"], x["targets"]),
    ),
    "adaptive max": (
        lambda: ours.AdaptiveCalibrationError(7, "max"),
        lambda x: metrics.mce(x["probabilities"], x["targets"], 7, equal_mass=True),
    ),
    "selective": (
        ours.SelectivePrediction,
        lambda x: selective(x["probabilities"], x["targets"]),
    ),
    "ood": (
        ours.OodDetectionMetric,
        lambda x: metrics.ood_detection(x["scores"][~x["out"]], x["scores"][x["out"]])._asdict(),
    ),
}  # fmt: skip
every_metric = pytest.mark.parametrize("name", CASES)


def feed(metric, batches, method="update"):
    """What `method` returned for each batch."""
    return [getattr(metric, method)(**metric._filter_kwargs(**batch)) for batch in batches]


def assert_same(found, expected):
    # float32 sums within a batch of few classes depend on the batch; see `ops.divergence_sums`
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def is_nan(found):
    found = found if isinstance(found, dict) else {"value": found}
    return all(v.isnan().all() for k, v in found.items() if k not in ("edges", "counts"))


@every_metric
@pytest.mark.filterwarnings(BEFORE)
def test_any_batches_are_as_everything_at_once(name):
    make, oracle = CASES[name]
    metric, inputs = make(), data()
    feed(metric, cut(inputs, UNEVEN))
    assert_same(metric.compute(), oracle(inputs))
    metric.reset()
    assert is_nan(metric.compute())
    feed(metric, cut(inputs, (60,)))
    assert_same(metric.compute(), oracle(inputs))


@every_metric
def test_forward_is_the_value_of_the_batch(name):
    make, oracle = CASES[name]
    metric, inputs = make(), data()
    batches = cut(inputs, (30, 30))
    for batch, value in zip(batches, feed(metric, batches, "forward"), strict=True):
        assert_same(value, oracle(batch))
    assert_same(metric.compute(), oracle(inputs))


@every_metric
@pytest.mark.filterwarnings(BEFORE)
def test_copies_and_casts_change_nothing(name):
    """In the middle of an evaluation: through a file, a copy, a module that is cast."""
    make, oracle = CASES[name]
    metric, inputs = make(), data()
    first, *others = cut(inputs, UNEVEN)
    feed(metric, [first])
    metric = pickle.loads(pickle.dumps(metric))
    metric = copy.deepcopy(metric)
    module = torch.nn.ModuleDict({"metric": metric, "layer": torch.nn.Linear(1, 1)})
    module.to(torch.bfloat16).half().to("cpu")
    assert module["layer"].weight.dtype == torch.float16
    metric.set_dtype(torch.float16)
    feed(metric, others)
    assert_same(metric.compute(), oracle(inputs))
    metric.persistent(True)
    again = make()
    again.persistent(True)
    again.load_state_dict(metric.state_dict())
    assert_same(again.compute(), oracle(inputs))


def test_a_collection_of_all():
    """Its metrics share equal states from the first batch on, where all divergences are 0."""
    together = torchmetrics.MetricCollection({name: make() for name, (make, _) in CASES.items()},
                                             prefix="test/")  # fmt: skip
    inputs = data()
    for _ in range(2):
        for batch in cut(inputs, UNEVEN):
            together.update(**batch)
        found = together.compute()
        for name, (_, oracle) in CASES.items():
            expected = oracle(inputs)
            if isinstance(expected, dict):  # names that occur twice get that of the metric in front
                for field, value in expected.items():
                    assert_same(found[f"test/{name}_{field}"], value)
            else:
                assert_same(found[f"test/{name}"], expected)
        groups = [set(group) for group in together.compute_groups.values()]
        assert {"l1", "l2", "max"} in groups  # one set of sums
        assert {"adaptive", "adaptive max", "selective"} in groups
        assert {"disagreement", "diversity"} in groups and {"js"} in groups and {"kl"} in groups
        together.reset()


def _evaluate(rank, store, out, shares):
    """One of the processes: its batches, then the value over all."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    batches = cut(data(), UNEVEN)
    found = []
    for share in shares:
        metrics_here = {name: make() for name, (make, _) in CASES.items()}
        values = {}
        for name, metric in metrics_here.items():
            metric.to("cpu")
            feed(metric, [batches[i] for i in share[rank]])
            values[name] = metric.compute()
        found.append(values)
    torch.save(found, f"{out}-{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads can crash an interpreter that shuts down


def test_processes_with_unequal_batches(tmp_path):
    """Three batches and one; then all batches and none."""
    shares = [([0, 2, 3], [1]), ([], [0, 1, 2, 3])]
    out = tmp_path / "found"
    torch.multiprocessing.spawn(_evaluate, (str(tmp_path / "store"), str(out), shares), nprocs=2)
    ranks = [torch.load(f"{out}-{rank}") for rank in range(2)]
    inputs = data()
    for one, other in zip(*ranks, strict=True):
        for name, (_, oracle) in CASES.items():
            assert_same(one[name], oracle(inputs))
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=0)


def test_low_precision_is_as_the_functions():
    p, targets = data()["probabilities"].bfloat16(), data()["targets"]
    for metric, function in (
        (ours.AdaptiveCalibrationError(), metrics.adaptive_ece),
        (ours.ClasswiseCalibrationError(4), metrics.classwise_ece),
        (ours.CalibrationError(), metrics.calibration_error),
    ):
        assert_same(metric(p, targets), function(p, targets))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.EnsembleSummaryMetric(0), "EnsembleSummaryMetric: members must be an int"),
        (lambda: ours.PairwiseDivergenceMetric(2, "tv"), "PairwiseDivergenceMetric: kind must be"),
        (
            lambda: ours.EnsembleSummaryMetric(2, 4097),
            r"EnsembleSummaryMetric: bins must be an integer in \[1, 4096\]; got 4097",
        ),
        (
            lambda: ours.AveragePairwiseDiversity(2).update(torch.zeros(3, 1, 2)),
            r"AveragePairwiseDiversity: logits must be \[M, N, C\] with M = 2; got \[3, 1, 2\]",
        ),
        (lambda: ours.CalibrationError(norm="l3"), "CalibrationError: norm must be 'l1', 'l2' or"),
        (lambda: ours.AdaptiveCalibrationError(0), "AdaptiveCalibrationError: bins must be an in"),
        (
            lambda: ours.ClasswiseCalibrationError(3).update(torch.ones(1, 2), torch.tensor([0])),
            r"ClasswiseCalibrationError: probabilities must be \[N, C\] with C = 3; got \[1, 2\]",
        ),
        (
            lambda: ours.OodDetectionMetric().update(torch.ones(2), torch.ones(2)),
            "OodDetectionMetric: out must be one of bool",
        ),
        (
            lambda: ours.SelectivePrediction().update(torch.ones(2, 2), torch.ones(3)),
            r"SelectivePrediction: targets must be \[N\] with N = 2; got \[3\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_without_torchmetrics_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    for name in ("_torchmetrics", "_torchmetrics_members", "torchmetrics"):
        monkeypatch.delitem(sys.modules, f"landscape_fast.metrics.{name}")
        monkeypatch.delattr(metrics, name)
    with pytest.raises(ImportError, match=r"pip install 'landscape-fast\[metrics\]'"):
        _ = metrics.torchmetrics
    with pytest.raises(AttributeError, match="has no attribute 'accuracy'"):
        _ = metrics.accuracy
