"""The benches measure what they say and refuse to time what is wrong."""

import json
import re
import sys
import time
import types
from functools import partial
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from bench import report, timing
from bench import run as runner
from bench.case import GROUPS, MODES, Case, Target, Work, function
from bench.cases import OPS, cases, tabm_step
from bench.peers import copy_floor, tabm_linear, torch_uncertainty_linear

ROW = set(
    "op backend group direction mode shape dtype quick device hardware isa driver torch cuda triton"
    " python threads commit dirty source date ms rounds calls sets gbs tflops floor_ms"
    " share_of_floor floor_rates noise clock_mhz error first_call_s".split()
)


def double(x):
    return 2 * x


def make(device, generator):
    return (torch.randn(64, generator=generator, device=device),)


def case(ours, targets=(), modes=("eager", "train")):
    return Case(
        "double",
        {"N": 64},
        torch.float32,
        make,
        double,
        lambda device, quick: [
            function("ours (cpp)", "ours", ours),
            function("eager", "eager", double),
            function("nonsense", "library", lambda x: x),
            copy_floor(lambda inputs: 512),
        ],
        {"fwd": Work(512, 64), "fwd+bwd": Work(1024, 128)},
        modes,
        targets,
    )


def rows_of(ours, mode="eager", **options):
    return list(runner.measure(case(ours, **options), mode, "cpu", timing.QUICK, True))


def by_name(rows):
    return {row["backend"]: row for row in rows}


class HalfWritten(torch.autograd.Function):
    """Leaves the last element of its output as it found the memory."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        out[:-1] = 2 * x[:-1]
        return out


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2.001 * grad


def raises(x):
    raise RuntimeError("kernel exploded")


@pytest.mark.parametrize(
    "ours, mode, reason",
    [
        (lambda x: 2.00001 * x, "eager", "error"),
        (lambda x: (2 * x).half(), "eager", "dtype"),
        (lambda x: 2 * x[:-1], "eager", "results of shapes"),
        (HalfWritten.apply, "eager", "NaN"),
        (WrongGradient.apply, "train", "result 1: error"),
        (raises, "eager", "kernel exploded"),
    ],
    ids=["wrong", "dtype", "shape", "unwritten", "gradient", "raises"],
)
def test_a_wrong_kernel_is_refused(ours, mode, reason):
    """Not one time is written, of it or of anybody else; the row says why."""
    torch.use_deterministic_algorithms(False)  # the bench must poison memory by itself
    rows = rows_of(ours, mode)
    assert all("ms" not in row for row in rows)
    assert re.search(reason, by_name(rows)["ours (cpp)"]["refused"])


def test_a_right_kernel_is_timed_against_its_peers():
    """A complete row for everybody, ratios on ours; a peer that computes something else is out."""
    rows = by_name(rows_of(lambda x: x + x))
    for name in ("ours (cpp)", "eager", "copy of as many bytes"):
        assert ROW <= set(rows[name]), ROW - set(rows[name])
    ours = rows["ours (cpp)"]
    assert set(ours["ratio"]) == {"eager", "copy of as many bytes"}
    expected = rows["eager"]["ms"]["p50"] / ours["ms"]["p50"]
    low, high = ours["ratio"]["eager"]["min"], ours["ratio"]["eager"]["max"]
    assert 0.5 * low <= expected <= 2 * high
    assert ours["error"] == 0.0 and rows["copy of as many bytes"]["error"] is None
    assert ours["floor_ms"] > 0 and ours["share_of_floor"] > 0 and ours["noise"] >= 0
    assert "another function" in rows["nonsense"]["refused"]
    assert rows["eager"]["group"] == "eager" and "ratio" not in rows["eager"]
    json.dumps(list(rows.values()))


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs(op, tmp_path):
    """All cases, modes and peers on tiny shapes; rows are appended and old ones left alone."""
    out = tmp_path / "rows.jsonl"
    out.write_text('{"old": 1}\n')
    rows = runner.run(op, "cpu", quick=True, out=out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"old": 1}, *rows]
    ours = [row for row in rows if row["group"] == "ours" and "ms" in row]
    assert ours and not any("refused" in row for row in rows)
    wanted = {
        (json.dumps(c.shape), m)
        for c in cases(op, "cpu", True)
        for m in runner.usable_modes(c, "cpu", None)
    }
    assert {(json.dumps(row["shape"]), row["mode"]) for row in ours} == wanted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_cases_and_targets_make_sense(op, device):
    """Targets name contestants that exist, in modes that are run; ours come first."""
    for c in cases(op, device):
        assert (c.direction == "step") == (c.shape.get("step") == "train")
        everybody = c.contestants(device, True)
        names = {p.name for p in everybody} | {p.group for p in everybody}
        assert everybody[0].group == "ours"
        assert all(p.group in GROUPS for p in everybody)
        assert len({p.name for p in everybody}) == len(everybody)
        assert set(c.modes) <= set(MODES)
        for target in c.targets:
            assert target.mode in c.modes and (target.over in names or not target.over)
            rivals = [p for p in everybody if target.over in (p.name, p.group)]
            assert not target.over or any(target.mode in p.modes for p in rivals), "never judged"
            assert target.ratio or target.ms
        for mode in c.modes:
            assert c.work[MODES[mode][0]].bytes > 0


def test_targets_are_judged_by_the_best_peer():
    """Met, missed, or not measured; a time limit counts with or without peers."""
    groups = {"a": "eager", "b": "eager", "c": "compile"}
    ratios = {"a": 12.0, "b": 9.0, "c": 5.0}
    assert Target("eager", "must", over="eager", ratio=9).judge(1.0, ratios, groups)["met"] is True
    assert Target("eager", "must", over="eager", ratio=10).judge(1.0, ratios, groups) == {
        "target": "must: >= 10x the best eager",
        "kind": "must",
        "met": False,
        "value": 9.0,
    }
    assert Target("eager", "must", over="c", ratio=5).judge(1.0, ratios, groups)["met"] is True
    assert Target("eager", "must", over="plain", ratio=1).judge(1.0, ratios, groups)["met"] is None
    assert Target("graph", "moonshot", ms=0.5).judge(0.4, {}, {})["met"] is True
    both = Target("graph", "moonshot", over="compile", ratio=4, ms=0.5)
    assert both.judge(0.6, ratios, groups)["met"] is False


def test_targets_are_written_with_the_row_of_ours():
    """The default backend carries the verdicts of its mode only."""
    targets = (Target("eager", "must", ms=1e9), Target("train", "must", ms=0.0, over="eager"))
    row = by_name(rows_of(lambda x: 2 * x, targets=targets))["ours (cpp)"]
    assert [t["met"] for t in row["targets"]] == [True]


def test_contestants_take_turns():
    """Forwards, then backwards; every one is sampled in every round."""
    turns = []

    def sampler(name):
        return timing.Sampler(lambda: turns.append(name) or 1.0, 1)

    settings = timing.Settings(rounds=2, warmup_ms=0, rep_ms=2.0)
    samples = timing.interleave({n: sampler(n) for n in "abc"}, settings)
    assert "".join(turns) == "aabbccccbbaa"
    assert samples == {n: [[1.0, 1.0], [1.0, 1.0]] for n in "abc"}


def test_warming_up_takes_no_estimate_from_a_call_that_compiles():
    """The first call may, and the second: where a model evaluates first and trains then."""
    times = iter([0.2, 0.2, 0.0])
    assert timing.warm(lambda: time.sleep(next(times)), "cpu", 1e-6) < 100


def test_medians_and_ratios():
    """The median of rounds, and ratios within a round: a slow spell hits both and cancels."""
    ours, peer = [[1.0, 1.1, 9.0], [4.0], [2.0]], [[2.2], [8.0], [5.0]]
    assert timing.summary(ours) == pytest.approx(
        {"p20": 1.08, "p50": 2.0, "p80": 5.0, "min": 1.1, "max": 4.0}, rel=0.1
    )
    assert timing.ratios(peer, ours) == pytest.approx({"p50": 2.0, "min": 2.0, "max": 2.5})
    assert [timing.quantile([3.0, 1.0, 2.0], q) for q in (0, 0.25, 1)] == [1.0, 1.5, 3.0]


class BatchLinear(nn.Module):
    """The interface of torch_uncertainty's layer: folded rows, its parameter names."""

    def __init__(self, into, out, members, bias=True, device=None, dtype=None):
        super().__init__()
        self.linear = nn.Linear(into, out, bias=False, device=device, dtype=dtype)
        self.r_group = nn.Parameter(torch.empty(members, into, device=device, dtype=dtype))
        self.s_group = nn.Parameter(torch.empty(members, out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(members, out, device=device, dtype=dtype))

    def forward(self, x):
        r, s, b = (
            t.repeat_interleave(len(x) // len(t), 0)
            for t in (self.r_group, self.s_group, self.bias)
        )
        return self.linear(x * r) * s + b


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("layout", ["member_major", "batch_major"])
def test_peers_of_the_linear_compute_the_same(layout, train, monkeypatch):
    """Values, parameters and gradients reach other packages' layers in their layouts."""
    from bench.agreement import verify
    from bench.cases import batch_ensemble_linear as linear

    name = "torch_uncertainty.layers.batch_ensemble"
    fake = types.ModuleType(name)
    fake.BatchLinear = BatchLinear
    for part in ("torch_uncertainty", "torch_uncertainty.layers"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, fake)
    tiny = next(c for c in linear.cases("cpu", True) if c.shape["layout"] == layout)
    batch_major = layout == "batch_major"
    peers = [tabm_linear("cpu", batch_major), torch_uncertainty_linear("cpu", batch_major)]
    present = [p for p in peers if not p.skipped]
    assert batch_major or present[-1].name.startswith("torch_uncertainty")
    inputs = tiny.make(torch.device("cpu"), torch.Generator().manual_seed(0))
    with torch.enable_grad() if train else torch.no_grad():
        checked, failures = verify(tiny, present, inputs, train)
    assert not failures
    assert all(checked[p.name]["error"] < 1e-6 for p in present)


def test_a_missing_package_is_a_reason_not_a_failure(monkeypatch):
    """The row of a peer that is not installed says so."""
    monkeypatch.setitem(sys.modules, "tabm", None)
    peer = tabm_linear("cpu", False)
    assert peer.bind is None and "tabm" in peer.skipped
    row = by_name(
        runner.measure(
            Case(
                "double",
                {"N": 64},
                torch.float32,
                make,
                double,
                lambda device, quick: [function("ours (cpp)", "ours", double), peer],
                {"fwd": Work(512)},
            ),
            "eager",
            "cpu",
            timing.QUICK,
            True,
        )
    )[peer.name]
    assert "ms" not in row and "tabm" in row["skipped"]


def test_the_report_shows_the_newest_row_of_every_case(tmp_path):
    """A markdown table and an SVG that parses; quick rows and a torn last line are left out."""
    rows = [r for r in rows_of(lambda x: 2 * x, targets=(Target("eager", "must", ms=1e9),))]
    old, new, quick = json.loads(json.dumps([rows] * 3))
    for changed, ms in ((old, 7.0), (new, 0.125), (quick, 9.0)):
        for row in changed:
            row["quick"] = changed is quick
            if "ms" in row:
                row["ms"]["p50"] = ms
    path = tmp_path / "some-cpu.jsonl"
    lines = [json.dumps(row) for row in [*old, *new, *quick]]
    path.write_text("\n".join(lines) + '\n{"op": "torn')
    text = report.write(tmp_path)
    table = [line for line in text.splitlines() if line.startswith("| `double`")]
    assert len(table) == 1 and " 0.125 [" in table[0] and "1 of 1" in table[0]
    picture = ElementTree.parse(tmp_path / "some-cpu.svg").getroot()
    assert any("double" in (node.text or "") for node in picture.iter())
    assert report.write(tmp_path / "empty").startswith("no measurements")


def test_no_rounding_decides_what_a_relu_lets_through():
    """In tabm_step under autocast every unit lies on the side of its bias, far from zero."""
    generator = torch.Generator().manual_seed(0)
    h, _, parameters = tabm_step.make(torch.device("cpu"), generator, 64, 8, 256, 64, low=True)
    h = h.unsqueeze(1)
    for i in range(0, 4 * tabm_step.BLOCKS, 4):
        weight, r, s, bias = parameters[i : i + 4]
        assert all(torch.equal(t, t.bfloat16().float()) for t in (r, s, bias))
        h = (h * r) @ weight.T * s + bias
        assert (h * bias.sign()).min() > 1
        h = h.relu()


@pytest.mark.parametrize(
    "arguments, rows",
    [(["--shape", "M=4"], 1), (["--shape", "M=5"], 0)],
)
def test_the_command_line_selects_shapes(arguments, rows, tmp_path, capsys):
    """A shape that no case has is an error, not an empty success."""
    run = partial(
        runner.main,
        [
            "pairwise_disagreement",
            "--device",
            "cpu",
            "--quick",
            "--out",
            str(tmp_path / "o"),
            *arguments,
        ],
    )
    if rows:
        assert run() == 0
        assert "ours (cpp)" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="has the shape"):
            run()
