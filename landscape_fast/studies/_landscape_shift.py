"""Ensembles of a run on corrupted test images and on images from elsewhere."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from landscape_fast import data
from landscape_fast.landscape import OodReport, ShiftCurves, out_of_distribution, under_shift
from landscape_fast.ops._checks import require
from landscape_fast.studies._landscape_bench import Bench, Networks, Rows, pool
from landscape_fast.studies._landscape_measure import Samples, weight_averages

OP = "landscape"
SINGLE = "original"  # one network, named as in the table of sizes


class Groups(NamedTuple):
    """Ensembles of equally many members.

    Attributes:
        networks: all members.
        places: of the members of each group, which is named "way" or "way/run".
        members: M.
        reasons: way to why it is left out.
    """

    networks: Networks
    places: dict[str, list[int]]
    members: int
    reasons: dict[str, str]


class Shift(NamedTuple):
    """What was found under corruptions.

    Attributes:
        curves: groups of one way still apart; see `mean_over_runs`.
        corruptions: names.
        rows: how many images.
        source: where the corrupted images come from.
    """

    curves: ShiftCurves
    corruptions: tuple[str, ...]
    rows: int
    source: str


def make_groups(bench: Bench, samples: dict[str, Samples]) -> Groups:
    """Independent runs, and as many networks around single runs, for each way."""
    M = bench.R
    around = range(bench.R if bench.settings.shift_runs is None else bench.settings.shift_runs)
    around = [r for r in around if r < bench.R]
    chosen = {"independent": bench.weights}
    reasons = {}
    averages = weight_averages(bench)
    if averages is not None:
        chosen["weight_average"] = averages
    last = bench.late(1.0)[-M:]
    if len(last) == M and M > 1:
        for r in around:
            chosen[f"trajectory/{r}"] = bench.checkpoints[r, last].to(bench.device)
    else:
        reasons["trajectory"] = f"needs two runs, and as many kept checkpoints as runs ({M})"
    for way, each in samples.items():
        if each.weights.shape[1] < M:
            reasons[way] = f"fewer than {M} samples were accepted around every run"
            continue
        for r in around:
            chosen[f"{way}/{r}"] = each.weights[r, :M]
    weights, places = pool(chosen)
    for r in range(bench.R):  # M times the same network: its own scores
        places[f"{SINGLE}/{r}"] = [r] * M
    return Groups(bench.networks(weights), places, M, reasons)


def mean_over_runs(groups: Mapping[str, NamedTuple]) -> dict[str, dict[str, Tensor]]:
    """Way to name of a score to its mean over the runs of that way."""
    ways = dict.fromkeys(name.partition("/")[0] for name in groups)
    found = {}
    for way in ways:
        each = [scores for name, scores in groups.items() if name.partition("/")[0] == way]
        fields = [f for f in each[0]._fields if isinstance(getattr(each[0], f), Tensor)]
        found[way] = {f: torch.stack([getattr(s, f) for s in each]).mean(0) for f in fields}
    return found


def _images(bench: Bench) -> tuple[Rows, Tensor]:
    """The test rows that are corrupted, and their images with pixels in [0, 1]."""
    rows = bench.test.first(bench.settings.shift_rows)
    return rows, bench.run.images[rows.index]


def measure_shift(bench: Bench, groups: Groups, corrupted: Path | None) -> Shift:
    """Scores by severity; severity 0 are the test images as they are.

    Args:
        corrupted: folder of published arrays, one for each corruption; None makes corruptions.
    """
    rows, images = _images(bench)
    names = bench.settings.corruptions or _all_names(images, corrupted)
    shifts: dict[tuple[str, int], Callable[[], Tensor]] = {
        ("none", 0): lambda: bench.run.inputs(images)
    }
    for name in names:
        for severity in bench.settings.severities:
            shifts[name, severity] = _maker(bench, images, rows, name, severity, corrupted)
    found = under_shift(
        groups.networks, shifts, rows.y.cpu(), groups.places, batch_size=bench.batch_size
    )
    source = f"the arrays in {corrupted}" if corrupted else "made from the test images"
    return Shift(found, tuple(names), len(rows.y), source)


def check_corrupted(bench: Bench, corrupted: Path | None) -> None:
    """Raises unless the folder has arrays of these test images; reads one of them."""
    if corrupted is not None:
        rows, images = _images(bench)
        name = (bench.settings.corruptions or _all_names(images, corrupted))[0]
        _maker(bench, images, rows, name, bench.settings.severities[0], corrupted)()


def _all_names(images: Tensor, corrupted: Path | None) -> tuple[str, ...]:
    if corrupted is not None:
        return data.c_names(corrupted)
    return tuple(n for n in data.CORRUPTIONS if n != "saturate" or images.shape[1] == 3)


def _maker(bench: Bench, images: Tensor, rows: Rows, name, severity, corrupted):
    """A function that makes the inputs of one corruption and severity."""

    def make() -> Tensor:
        if corrupted is None:
            seed = bench.settings.seed
            changed = data.corrupt(images, name, severity, seed=seed, index=rows.index)
        else:
            every, labels = data.cifar_c(corrupted, name, severity)
            known = len(labels) > int(rows.index.max())
            known = known and bool((labels[rows.index] == rows.y.cpu()).all())
            rule = "arrays of the test images of this run, in their order"
            require(known, OP, "corrupted", rule, f"others in {corrupted}")
            changed = every[rows.index]
        return bench.run.inputs(changed)

    return make


def read_foreign(bench: Bench, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    """Name of a data set to as many of its test images as are corrupted, in the run's shape."""
    found = {}
    for name, folder in folders.items():
        options = {"train": False} if name == "svhn" else {}
        read = getattr(data, name)(folder, **options).test_x[: bench.settings.shift_rows]
        found[name] = data.as_ood(read, bench.run.images)
    return found


def measure_ood(bench: Bench, groups: Groups, foreign: Mapping[str, Tensor]) -> OodReport:
    """Divergence and detection on images from elsewhere: stand-ins, and those given."""
    rows, images = _images(bench)
    about = {"seed": bench.settings.seed, "index": rows.index}
    patches = max(p for p in (1, 2, 4) if all(side % p == 0 for side in images.shape[2:]))
    sets = {
        "inverted": lambda: data.inverted(images),
        "patch_shuffled": lambda: data.patch_shuffled(images, patches, **about),
        "noise": lambda: data.noise_like(images, **about),
        **{name: lambda own=own: own for name, own in foreign.items()},
    }
    unknown = {name: lambda make=make: bench.run.inputs(make()) for name, make in sets.items()}
    known = bench.run.inputs(images)
    places = {name: at for name, at in groups.places.items() if not name.startswith(SINGLE)}
    return out_of_distribution(groups.networks, known, unknown, places, batch_size=bench.batch_size)
