"""Sweeps against one model at a time: scores, statistics of batch norms, resuming, refusals."""

import copy
import signal
import sys

import pytest
import torch
from torch import nn

from landscape_fast.methods import SweepInterrupted, sweep
from landscape_fast.methods import progress as progress_module
from landscape_fast.models import MLP, ResNet, SmallCNN
from landscape_fast.nn import FlatLayout, Subspace, recalibrate_
from landscape_fast.nn.coefficients import Line
from landscape_fast.ops import ensemble_summary

S, N = 7, 23
MODULE = sys.modules["landscape_fast.methods.sweep"]


def residual():
    model = ResNet((1, 6, 6), classes=4, blocks=1)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.add_(torch.rand_like(buffer))
    return model


BUILD = {
    "residual": residual,
    "convolutions": lambda: SmallCNN((1, 6, 6), classes=4),
    "mlp": lambda: MLP((1, 6, 6), (5,), classes=4, dropout=0.5),
}


def problem(build):
    """A model, the weights of a line through it, rows, classes, rows to calibrate on."""
    model = build().double()
    layout = FlatLayout(model)
    ends = layout.flatten_many([model, build().double()])
    t = torch.linspace(0, 1, S, dtype=torch.float64)[:, None]

    def weights(start, stop):
        return torch.lerp(ends[:1], ends[1:], t[start:stop])

    x, y = torch.randn(N, 1, 6, 6).double(), torch.arange(N) % 4
    return model, layout, weights, x, y, torch.randn(17, 1, 6, 6).double()


def one_by_one(model, layout, weights, x, statistics, calibration, batch_size):
    """[S, N, C], as one writes it."""
    found = []
    for s in range(S):
        network = copy.deepcopy(model).eval()
        with torch.no_grad():
            for name, value in layout.views(weights(s, s + 1)[0]).items():
                network.get_parameter(name).copy_(value)
            if statistics == "recalibrate":
                recalibrate_(network, calibration, batch_size=batch_size)
            if statistics == "batch":
                for module in network.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.running_mean = module.running_var = None
            found.append(torch.cat([network(rows) for rows in x.split(batch_size)]))
    return torch.stack(found)


CASES = [(name, kind) for name in BUILD for kind in ("recalibrate", "shared", "batch", "none")]
CASES.remove(("residual", "none"))  # refused: it has batch norms


@pytest.mark.parametrize("per_pass", [1, 3, "auto"])
@pytest.mark.parametrize("name, statistics", CASES)
def test_equals_one_model_at_a_time(name, statistics, per_pass):
    model, layout, weights, x, y, calibration = problem(BUILD[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    options = {"statistics": statistics, "calibration": calibration, "batch_size": 9}
    found = sweep(
        model, weights, S, x, y, per_pass=per_pass, keep_logits=True, progress=False, **options
    )
    truth = one_by_one(model, layout, weights, x, **options)
    torch.testing.assert_close(found.logits, truth)
    want = ensemble_summary(truth, y)
    torch.testing.assert_close(found.loss, want.member_nll)
    torch.testing.assert_close(found.accuracy, want.member_accuracy)
    torch.testing.assert_close(found.brier, want.member_brier)
    torch.testing.assert_close(found.ece, want.member_ece)
    assert found.nll is found.loss and model.training
    for key, value in model.state_dict().items():  # untouched
        assert torch.equal(value, before[key])


def test_of_a_subspace():
    """Whose model is guarded against statistics of other weights."""
    *_, x, y, calibration = problem(residual)
    subspace = Subspace(residual().double(), 2, Line())
    coeffs = torch.linspace(0, 1, S)[:, None]
    coeffs = torch.cat([1 - coeffs, coeffs], 1)
    results = [
        sweep(
            subspace.model,
            lambda start, stop: subspace.mix(coeffs[start:stop]),
            S,
            x,
            y,
            calibration=calibration,
            per_pass=per_pass,
            progress=False,
        )
        for per_pass in (1, 4)
    ]
    torch.testing.assert_close(results[0].loss, results[1].loss)
    network = recalibrate_(subspace.network(coeffs[2]).eval(), calibration)
    loss = nn.functional.cross_entropy(network(x), y)
    torch.testing.assert_close(results[0].loss[2], loss)
    assert results[0].logits is None and results[0].loss.requires_grad is False


def test_resumes_to_the_same_numbers(tmp_path):
    model, _, weights, x, y, calibration = problem(residual)
    options = {"calibration": calibration, "keep_logits": True, "progress": False}
    options["keep_labels"] = True
    truth = sweep(model, weights, S, x, y, **options)
    file, called = tmp_path / "sweep.pt", []

    def interrupted(start, stop):
        called.append(start)
        if called.count(3) == 2:
            signal.raise_signal(signal.SIGINT)  # after which this pass is still done
        return weights(start, stop)

    with pytest.raises(SweepInterrupted, match="after 4 of 7 models; saved") as caught:
        sweep(model, interrupted, S, x, y, checkpoint=file, **options)
    assert caught.value.checkpoint == file
    called.clear()

    def counted(start, stop):
        called.append(start)
        return weights(start, stop)

    found = sweep(model, counted, S, x, y, checkpoint=file, resume=True, per_pass=2, **options)
    assert called == [0, 3, S - 1, 4, 6]  # the first three tell whose weights they are
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want)
    called.clear()
    again = sweep(model, counted, S, x, y, checkpoint=file, resume=True, **options)
    assert called == [0, 3, S - 1] and torch.equal(again.loss, found.loss)


def test_ctrl_c_in_the_last_pass_is_not_lost(tmp_path):
    """A report of many short sweeps would otherwise go on."""
    model, _, weights, x, y, calibration = problem(residual)
    options = {"calibration": calibration, "progress": False, "checkpoint": tmp_path / "sweep.pt"}
    asked = []

    def interrupted(start, stop):
        asked.append(start)
        if asked.count(S - 1) == 2:  # the first time tells whose weights they are
            signal.raise_signal(signal.SIGINT)
        return weights(start, stop)

    with pytest.raises(SweepInterrupted, match="after 7 of 7 models; saved"):
        sweep(model, interrupted, S, x, y, **options)
    found = sweep(model, weights, S, x, y, resume=True, **options)
    assert len(found.loss) == S


class Table(nn.Module):
    """Gives row n the class that its parameter n says."""

    def __init__(self, rows, classes):
        super().__init__()
        self.table, self.classes = nn.Parameter(torch.zeros(rows)), classes

    def forward(self, x):
        return -(torch.arange(self.classes) - self.table[x[:, 0].long(), None]).square()


LABELS = (4, torch.uint8), (256, torch.uint8), (257, torch.int16), (40000, torch.int32)


@pytest.mark.parametrize("per_pass", [1, 3])
@pytest.mark.parametrize("classes, dtype", LABELS)
def test_keeps_labels(classes, dtype, per_pass):
    """All the way to the last class, which needs the most bits."""
    model, x, y = Table(5, classes), torch.arange(5.0)[:, None], torch.zeros(5, dtype=torch.int64)
    labels = torch.arange(S * 5).view(S, 5) % 4 * (classes - 1) // 3
    weights = torch.stack([FlatLayout(model).flatten({"table": row.float()}) for row in labels])
    given = (model, lambda start, stop: weights[start:stop], S, x, y)
    found = sweep(*given, keep_labels=True, per_pass=per_pass, progress=False)
    assert found.labels.dtype == dtype and found.logits is None
    assert torch.equal(found.labels.long(), labels)
    assert sweep(*given, per_pass=per_pass, progress=False).labels is None


@pytest.mark.parametrize(
    "foreign", ["weights", "bend", "rows", "calibration", "count", "shared", "model"]
)
def test_a_foreign_checkpoint_is_refused(foreign, tmp_path):
    model, _, weights, x, y, calibration = problem(residual)
    file = tmp_path / "sweep.pt"
    options = {"calibration": calibration, "checkpoint": file, "progress": False}
    sweep(model, weights, S, x, y, **options)
    given = [model, weights, S, x, y]
    if foreign == "weights":
        given[1] = lambda start, stop: 1.5 * weights(start, stop)
    elif foreign == "bend":  # another curve between the same ends
        given[1] = lambda start, stop: weights(start, stop) + float(0 < start < S - 1)
    elif foreign == "rows":
        given[3] = x + 1
    elif foreign == "calibration":
        options["calibration"] = calibration + 1
    elif foreign == "count":
        given[2] = S - 1
    elif foreign == "shared":
        options["statistics"] = "shared"
    else:
        given[0] = copy.deepcopy(model)
        given[0].norm.running_mean.add_(1)
    with pytest.raises(ValueError, match="checkpoint must be of this configuration"):
        sweep(*given, resume=True, **options)
    sweep(*given, **options)  # without resuming it is written anew


def test_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(MODULE, "SECONDS_BETWEEN_SCORES", 0.0)
    model, _, weights, x, y, _ = problem(BUILD["mlp"])
    sweep(model, weights, S, x, y, per_pass=3, label="line")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"line: model {n}/7" for n in (3, 6, 7)]


class Mixing(nn.Module):
    """Each row depends on all others, so that rows of several models cannot be one batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(36, 4)

    def forward(self, x):
        y = self.layer(x.flatten(1))
        return y - y.mean(0)


def test_what_cannot_be_batched_takes_one_at_a_time():
    model, layout, weights, x, y, _ = problem(Mixing)
    found = sweep(model, weights, S, x, y, keep_logits=True, progress=False)
    truth = one_by_one(model, layout, weights, x, "none", None, N)
    torch.testing.assert_close(found.logits, truth)
    with pytest.raises(ValueError, match="must be one whose rows can be batched"):
        sweep(model, weights, S, x, y, per_pass=2, progress=False)


class Scaled(nn.Sequential):
    """Runs member by member, whatever is around it."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(36, 4))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


def test_how_many_go_together_on_a_gpu():
    cases = (residual, 5, 5), (residual, 100, 16), (Mixing, 5, 1), (Scaled, 5, 1)
    for build, count, most in cases:
        model, _, weights, x, _, calibration = problem(build)
        models = MODULE._Models(model, x, calibration, "recalibrate", 9)
        assert models.together(count, weights(0, 1)) == most
        assert models.choose(count, weights(0, 1)) == 1  # on this CPU


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"count": 0}, "count must be an integer of at least 1; got 0"),
        ({"per_pass": 0}, "per_pass must be 'auto' or an integer of at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"statistics": "old"}, "statistics must be one of .*; got 'old'"),
        ({"statistics": "none"}, "statistics must be one of .* with batch norms; got 'none'"),
        ({"calibration": None}, "calibration must be rows .* for statistics='recalibrate'"),
        ({"calibration": torch.zeros(3, 2)}, r"calibration must be \[N, 1, 6, 6\], as x"),
        ({"y": torch.zeros(N)}, "y must be int64"),
        ({"weights": lambda a, b: torch.zeros(b - a, 5)}, r"weights\(0, 1\) must be \[1, P\]"),
    ],
)
def test_refuses(change, match):
    model, _, weights, x, y, calibration = problem(residual)
    given = {"weights": weights, "count": S, "x": x, "y": y, "calibration": calibration}
    with pytest.raises(ValueError, match=f"sweep: {match}"):
        sweep(model, **(given | change), progress=False)


@pytest.mark.parametrize("per_pass", [1, 3])
def test_other_results_than_logits_are_refused(per_pass):
    model, _, weights, x, y, _ = problem(BUILD["mlp"])
    for change, got in ((lambda t: t[:, 0], r"\[23\]"), (lambda t: t[..., None], r"\[.*4, 1\]")):
        other = copy.deepcopy(model)
        other.layers[-1].register_forward_hook(lambda layer, given, y, change=change: change(y))
        match = rf"sweep: model must be .* to logits \[B, C\]; got results {got}"
        with pytest.raises(ValueError, match=match):
            sweep(other, weights, S, x, y, per_pass=per_pass, progress=False)


def test_weights_must_be_tensors():
    model, _, _, x, y, calibration = problem(residual)
    with pytest.raises(TypeError, match=r"weights\(0, 1\) must be a Tensor \[1, P\]"):
        sweep(model, lambda start, stop: [], S, x, y, calibration=calibration, progress=False)
