"""Sections that the study of Fort et al. 2019 adds to the landscape report of its runs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from landscape_fast.landscape import (
    Origins,
    PathScores,
    cycle_comparison,
    init_shuffle_bars,
    tunnel_panels,
    wedge_panels,
)
from landscape_fast.studies._fort2019_claims import judge_cycles, judge_origins, judge_tunnel
from landscape_fast.studies._fort2019_runs import (
    CycleSettings,
    OriginSettings,
    TunnelScores,
    TunnelSettings,
)
from landscape_fast.studies._landscape_parts import Part

_CASES = {
    "same": "same start, same order",
    "shuffle": "same start, other order",
    "init": "other start, same order",
    "both": "other start, other order",
}
_PERCENT = "{:.2%}"


def origins_part(found: Origins, settings: OriginSettings, name: str) -> Part:
    """Initialisation against shuffling."""
    title = f"{name}: what makes functions differ"
    cases = {words: getattr(found, key) for key, words in _CASES.items()}
    rows = [
        {"lr": float(lr), "accuracy": float(found.accuracy[i].mean())}
        | {key: float(getattr(found, key)[i].mean()) for key in _CASES}
        for i, lr in enumerate(found.lr)
    ]
    columns = [("lr", "learning rate", "{:g}"), ("accuracy", "accuracy", _PERCENT)]
    columns += [(key, words, _PERCENT) for key, words in _CASES.items()]
    repeats = found.same.shape[1]
    return Part(
        "initialisation against shuffling",
        judge_origins(found),
        {
            "origins": (
                lambda: init_shuffle_bars(found.lr.tolist(), cases, title=title),
                "Disagreement of two runs that share their first weights, the order of their rows "
                "(with it dropout masks), both, or nothing; dots are repeats.",
            )
        },
        {"origins": (rows, columns, f"Disagreement, mean over {repeats} repeats.")},
        [
            f"initialisation against shuffling: {settings.model}, "
            f"{_rows(settings.rows)}, {settings.training.epochs} epochs"
        ],
    )


def cycles_part(found: Mapping[str, Tensor], settings: CycleSettings, name: str) -> Part:
    """Cycles of cSG-MCMC against independent runs."""
    groups = {key: value for key, value in found.items() if key != "accuracy"}
    rows = [
        {"repeat": r, **{key: float(value[r]) for key, value in found.items()}}
        for r in range(settings.repeats)
    ]
    columns = [("repeat", "repeat", "{}")]
    columns += [(key, key, _PERCENT) for key in found]
    return Part(
        "cycles of one run",
        judge_cycles(found),
        {
            "cycles": (
                lambda: cycle_comparison({name: groups}),
                "Disagreement of networks at the ends of cycles of cSG-MCMC: of different cycles "
                "of the same run, and of different cycles of different runs.",
            )
        },
        {"cycles": (rows, columns, "Mean disagreement of every repeat, and mean accuracy.")},
        [
            f"cycles: {settings.model}, {_rows(settings.rows)}, {settings.runs} runs of "
            f"{settings.cycles} cycles of {settings.training.epochs // settings.cycles} epochs in "
            "each repeat; both sides hold the same pairs of cycles"
        ],
    )


def tunnel_part(found: TunnelScores, settings: TunnelSettings, name: str) -> Part:
    """The tunnel between two solutions, and its wedge."""

    def tunnel():
        panels = {
            "Training loss (nats)": _both(found.line, found.tunnel, "loss"),
            "Test accuracy (%)": _both(found.line_test, found.tunnel_test, "accuracy", 100),
        }
        nodes = found.tunnel.along[:: settings.steps].tolist()
        return tunnel_panels(panels, nodes, title=f"{name}: two paths between two solutions")

    def wedge():
        w = found.wedge
        fields = {
            "Test loss (nats)": w.loss,
            "Test accuracy (%)": 100 * w.accuracy,
            "Agreement with solution 1 (%)": 100 * w.agreement[0],
            "Agreement with solution 2 (%)": 100 * w.agreement[1],
        }
        title = f"{name}: the tunnel seen from the origin"
        return wedge_panels(w.angle, w.radius, fields, w.nodes, w.path, title=title)

    rows = [
        _path_row("straight line", found.line, found.line_test),
        _path_row("tunnel", found.tunnel, found.tunnel_test),
    ]
    columns = [
        ("path", "path", "{}"),
        ("barrier", "barrier (nats)", "{:.3f}"),
        ("loss_max", "largest training loss (nats)", "{:.3f}"),
        ("accuracy_min", "lowest test accuracy", _PERCENT),
        ("middle", "middle agrees with an end", _PERCENT),
    ]
    moved = {None: "anywhere", "hyperplane": "within the hyperplane across the line"}
    return Part(
        "tunnel and wedge",
        judge_tunnel(found),
        {
            "tunnel": (
                tunnel,
                "Loss and accuracy along the straight line between the first two runs and along "
                "the tunnel, drawn over the share of the way from one to the other.",
            ),
            "wedge": (
                wedge,
                "The triangles that the segments of the tunnel span with the origin of weight "
                "space, side by side.",
            ),
        },
        {"paths": (rows, columns, "The barrier is the rise of the training loss over the chord.")},
        [
            f"tunnel: {settings.nodes} nodes of the line between runs 1 and 2, each trained for "
            f"{settings.training.epochs} epochs, {moved[settings.constrain]}"
        ],
    )


def _both(line: PathScores, tunnel: PathScores, key: str, factor: float = 1.0):
    return {
        "straight line": (line.along, factor * getattr(line, key)),
        "tunnel": (tunnel.along, factor * getattr(tunnel, key)),
    }


def _path_row(name: str, train: PathScores, test: PathScores) -> dict[str, Any]:
    loss = train.summary()
    return {
        "path": name,
        "barrier": loss.barrier,
        "loss_max": loss.maximum,
        "accuracy_min": float(test.accuracy.min()),
        "middle": float(test.agreement[:, len(test.t) // 2].max()),
    }


def _rows(count: int | None) -> str:
    return "all training rows" if count is None else f"the first {count:,} training rows"
