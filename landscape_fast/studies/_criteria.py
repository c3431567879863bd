"""What a study expects, and whether it came out: pass, fail, or the repeats do not agree."""

from collections.abc import Callable, Sequence
from typing import Any

CRITERIA = (
    ("source", "from", "{}"),
    ("rule", "criterion", "{}"),
    ("found", "found", "{}"),
    ("verdict", "verdict", "{}"),
)


def criterion(
    source: str,
    rule: str,
    form: str,
    values: Sequence[float | None],
    holds: Callable[[float], bool],
) -> dict[str, Any]:
    """A row for the table of criteria; `CRITERIA` are its columns.

    Args:
        source: where the statement comes from.
        rule: the statement.
        form: of a value.
        values: one number per repeat, None where it cannot tell.
        holds: whether a value agrees with the statement.

    Returns:
        source, rule, found (the values as text), holds (in how many repeats) of repeats, verdict:
        "pass" if it holds in every repeat that can tell, "fail" if in none, else "inconclusive".

    Example:
        >>> row = criterion("", "above 0", "{:+.1f}", [0.5, -0.25, None], lambda v: v > 0)
        >>> row["found"], row["holds"], row["repeats"], row["verdict"]
        ('+0.5 -0.2', 1, 2, 'inconclusive')
    """
    told = [value for value in values if value is not None]
    met = [bool(holds(value)) for value in told]
    decided = bool(met) and all(met) == any(met)
    verdict = ("pass" if all(met) else "fail") if decided else "inconclusive"
    shown = " ".join(form.format(value) for value in told) or "-"
    return {"source": source, "rule": rule, "found": shown, "holds": sum(met),
            "repeats": len(met), "verdict": verdict}  # fmt: skip
