"""The study of Fort et al. 2019 at its smallest size, and what its claims are decided by."""

import json
import math

import pytest
import torch

from landscape_fast.landscape import Origins, PathScores
from landscape_fast.studies import fort2019
from landscape_fast.studies._fort2019_claims import judge_cycles, judge_origins, judge_tunnel
from landscape_fast.studies._fort2019_runs import TunnelScores
from landscape_fast.studies.run_folder import open_run

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("fort2019")
    return out, fort2019.run("smoke", out, seed=0, progress=False)


@pytest.mark.slow
def test_everything_is_measured_judged_and_written(smoke):
    out, document = smoke
    assert (document["study"], document["size"], document["seed"]) == ("fort2019", "smoke", 0)
    written = json.loads((out / "results.json").read_text())
    assert written["claims"] == json.loads(json.dumps(document["claims"]))
    claims = [row for rows in document["claims"].values() for row in rows]
    assert [row["number"] for row in claims] == list(range(1, len(claims) + 1))
    sources = " ".join(row["source"] for row in claims)
    for item in ("F2", "F3", "F4", "F13", "F17", "F18", "F21", "F22", "F23", "F11", "F25", "F26",
                 "F27", "F28", "F30"):  # fmt: skip
        assert item in sources, item
    # every section has its figures, as PNG, as a vector and as data, and the page holds them
    page = (out / "index.html").read_text()
    names = {"similarity", "functions", "samples", "diversity", "sizes", "corruption", "elsewhere",
             "plane", "starts", "origins", "tunnel", "wedge", "cycles"}  # fmt: skip
    assert names <= document["figures"].keys()
    for files in document["figures"].values():
        assert {name.rsplit(".")[-1] for name in files} == {"png", "pdf", "csv"}
        assert all((out / name).stat().st_size > 100 for name in files)
    assert page.count("data:image/png;base64,") == len(document["figures"])
    assert all(row["claim"].capitalize()[:20] in page or row["claim"][:20] in page
               for row in claims)  # fmt: skip
    text = fort2019.describe(document)
    assert all(row["claim"] in text for row in claims)


@pytest.mark.slow
def test_the_same_start_and_order_give_the_same_function(smoke):
    """The first row of the table, and the claim that is decided by it."""
    _, document = smoke
    assert [row["same"] for row in document["tables"]["origins"]] == [0.0, 0.0]
    assert all(row["both"] > 0 for row in document["tables"]["origins"])
    repeats = next(row for rows in document["claims"].values() for row in rows
                   if row["claim"] == "training repeats to the bit")  # fmt: skip
    assert repeats["verdict"] == "pass"


@pytest.mark.slow
def test_its_runs_are_a_folder_that_landscape_opens(smoke):
    out, _ = smoke
    settings = fort2019.SIZES["smoke"]
    run = open_run(out / "run")
    assert len(run.networks) == settings.runs
    assert run.trajectories.epochs == tuple(range(settings.training.epochs + 1))
    assert len(run.dataset.train_y) == settings.train_rows
    with pytest.raises(ValueError, match=f"with run.json; got {out} without; pass {out / 'run'}"):
        open_run(out)


def origins(**changes):
    lr, none = torch.tensor([0.1, 0.2]), torch.zeros(2, 2, dtype=torch.float64)
    found = {"same": none, "shuffle": none + 0.1, "init": none + 0.2, "both": none + 0.3, **changes}
    return Origins(lr, none, **found)


def verdicts(rows):
    return [row["verdict"] for row in rows]


def test_claims_about_origins():
    assert verdicts(judge_origins(origins())) == ["pass", "pass", "pass"]
    once = torch.tensor([[0.0, 0.001], [0.0, 0.0]], dtype=torch.float64)
    assert verdicts(judge_origins(origins(same=once)))[0] == "inconclusive"  # in one repeat
    assert verdicts(judge_origins(origins(same=once + 0.001)))[0] == "fail"
    assert verdicts(judge_origins(origins(init=origins().same)))[1] == "fail"
    falls = torch.tensor([[0.3, 0.3], [0.25, 0.25]], dtype=torch.float64)
    assert verdicts(judge_origins(origins(shuffle=falls)))[2] == "fail"
    one = Origins(*(t[:1] for t in origins()))
    row = judge_origins(one)[2]
    assert (row["verdict"], row["reason"]) == ("inconclusive", "one learning rate")


def test_claims_about_cycles():
    apart = {"independent runs": torch.tensor([0.3, 0.2]), "cycles of one run": torch.tensor([0.1])}
    assert verdicts(judge_cycles(apart)) == ["pass"]
    assert verdicts(judge_cycles({**apart, "cycles of one run": torch.tensor(0.25)})) == [
        "inconclusive"
    ]
    most = torch.tensor([0.0, 0.1, 0.1, 0.25])  # enough: in 3 of 4 repeats
    assert verdicts(
        judge_cycles(
            {**apart, "independent runs": most + 0.05, "cycles of one run": torch.tensor(0.1)}
        )
    ) == ["pass"]
    assert verdicts(
        judge_cycles({**apart, "independent runs": most, "cycles of one run": torch.tensor(0.15)})
    ) == ["inconclusive"]
    assert verdicts(judge_cycles({**apart, "cycles of one run": torch.tensor(0.3)})) == ["fail"]


def path(loss, agreement):
    t = torch.linspace(0, 1, len(loss), dtype=torch.float64)
    none = torch.zeros_like(t)
    loss = torch.tensor(loss, dtype=torch.float64)
    agreement = torch.tensor(agreement, dtype=torch.float64)
    return PathScores(t, t, t, none, none, loss, none, agreement)


def tunnel(line=(0.1, 2.0, 0.1), dug=(0.1, 0.2, 0.1), agreement=None):
    agreement = agreement or [[1.0, 0.8, 0.7], [0.7, 0.75, 1.0]]
    straight, other = path(line, agreement), path(dug, agreement)
    return TunnelScores(straight, other, straight, other, None)


def test_claims_about_tunnels():
    rows = judge_tunnel(tunnel(agreement=[[1.0, 0.72, 0.7], [0.7, 0.74, 1.0]]))
    assert verdicts(rows) == ["pass"] * 4
    assert rows[0]["found"] == "1.900" and rows[1]["found"] == "5.3%"
    assert verdicts(judge_tunnel(tunnel()))[2] == "fail"  # the middle agrees 10 points more
    assert verdicts(judge_tunnel(tunnel(dug=(0.1, 0.5, 0.1))))[1] == "fail"
    flat = judge_tunnel(tunnel(line=(0.1, 0.3, 0.1)))
    assert verdicts(flat)[:2] == ["fail", "inconclusive"]
    assert flat[1]["reason"] == "no barrier to go around"
    crossed = tunnel(agreement=[[0.7, 0.72, 1.0], [1.0, 0.74, 0.7]])
    assert verdicts(judge_tunnel(crossed))[3] == "fail"


def test_sizes_are_what_the_paper_trains():
    """Rates of Fort et al. 2019: halved every 10 of 40 epochs; for CIFAR-100 5e-7 at last."""
    paper = fort2019.PAPER
    assert fort2019.SIZES["paper"] is paper["cifar10"] and paper["cifar10"].pixels == "raw"
    rates = [paper["cifar10"].training.lr_factor(epoch, 1) for epoch in (0, 9, 10, 39)]
    assert rates == [1, 1, 0.5, 0.125]
    last = paper["cifar100"].training
    assert math.isclose(last.lr * last.lr_factor(199, 1), 5e-7)
    assert (paper["imagenet"].model, paper["imagenet"].training.batch_size) == ("resnet50_v2", 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "full"}, r"fort2019.run: size must be one of \('smoke', 'cpu', .*; got 'full'"),
        ({"size": "cpu"}, "root must be the folder of the files; got None; size 'cpu' trains on"),
        ({"size": "paper", "root": "."}, None),
        ({"size": "smoke", "data": "cifar10"}, "data must be None where the size has no choice"),
        ({"size": "paper", "data": "digits", "root": "."}, r"data must be one of \('cifar10',"),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    if message is None:  # that one is in order, but there are no files
        with pytest.raises(FileNotFoundError):
            fort2019.run(**options, out=tmp_path)
        return
    with pytest.raises(ValueError, match=message):
        fort2019.run(**options)
