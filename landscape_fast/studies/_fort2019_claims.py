"""What Fort et al. 2019 claim beyond one set of runs: origins, cycles of one run, tunnels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from landscape_fast.landscape import Origins
from landscape_fast.studies._fort2019_runs import TunnelScores
from landscape_fast.studies._landscape_claims import claim

BARRIER = 0.8  # nats by which the straight line has to rise for a tunnel to have a meaning
PART = 0.15  # of that barrier, which a tunnel may keep
NEARER = 0.05  # by which its middle may agree with an end more than the ends with each other
MOST = 0.75  # of the repeats, in which independent runs have to disagree more
SLACK = 0.01  # by which a disagreement may fall where it is expected to grow


def judge_origins(found: Origins) -> list[dict[str, Any]]:
    """Claims of figure S4; one value for each repeat, where there is no other rule."""
    repeats = range(found.same.shape[1])
    same = [float(found.same[:, r].max()) for r in repeats]
    gap = [float((found.init - found.shuffle)[:, r].mean()) for r in repeats]
    by_rate = found.shuffle[found.lr.argsort()].mean(1)
    rises = [float(by_rate.diff().min())] if len(found.lr) > 1 else []
    source = "F27, Fig S4"
    return [
        claim(
            "training repeats to the bit", source,
            "largest disagreement of two runs with the same start and order: exactly 0", "{:.2%}",
            same, lambda v: v == 0,
        ),
        claim(
            "another start changes the function more than another order", source,
            "difference of the disagreements, mean over learning rates, above 0", "{:+.2%}", gap,
            lambda v: v > 0,
        ),
        claim(
            "the effect of the order grows with the learning rate", source,
            f"smallest change of its disagreement to the next rate at least {-SLACK:.0%}",
            "{:+.2%}", rises, lambda v: v >= -SLACK, "one learning rate",
        ),
    ]  # fmt: skip


def judge_cycles(found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The claim of figure S5; one value for each repeat, and enough if most of them agree."""
    gaps = (found["independent runs"] - found["cycles of one run"]).tolist()
    rule = "difference of the disagreements above 0, in at least 3 of 4 repeats"
    words = "independent runs disagree more than cycles of one run"
    row = claim(words, "F28, Fig S5", rule, "{:+.2%}", gaps, lambda v: v > 0)
    most = row["holds"] >= MOST * row["repeats"] > 0
    return [row | ({"verdict": "pass"} if most else {})]


def judge_tunnel(found: TunnelScores) -> list[dict[str, Any]]:
    """Claims of figures S2 and S3, of one pair of networks."""
    barrier, left = (path.summary().barrier for path in (found.line, found.tunnel))
    agreement, t = found.tunnel_test.agreement, found.tunnel_test.t
    ends = float(agreement[0, -1])
    middle = float(agreement[:, len(t) // 2].max())
    nearer = torch.where(t < 0.5, agreement[0] - agreement[1], agreement[1] - agreement[0])
    return [
        claim(
            "a barrier is between two solutions", "F25, Fig S2",
            f"training loss above the chord, along the straight line: {BARRIER} nats or more",
            "{:.3f}", [barrier], lambda v: v >= BARRIER,
        ),
        claim(
            "a tunnel of low loss leads around it", "F25, Fig S2",
            f"barrier of the tunnel at most {PART:.0%} of that", "{:.1%}",
            [left / barrier] if barrier >= BARRIER else [], lambda v: v <= PART,
            "no barrier to go around",
        ),
        claim(
            "connected in loss, not in function", "F26, Fig S3",
            "the middle of the tunnel agrees with an end at most "
            f"{100 * NEARER:.0f} points more than the ends with each other", "{:+.1%}",
            [middle - ends], lambda v: v <= NEARER,
        ),
        claim(
            "along the tunnel the functions go from one to the other", "F26, Fig S3",
            "every network agrees more with the end it is nearer to; smallest difference above 0",
            "{:+.1%}", [float(nearer[t != 0.5].min())], lambda v: v > 0,
        ),
    ]  # fmt: skip
