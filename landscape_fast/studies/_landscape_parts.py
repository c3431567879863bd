"""What a study adds to a landscape report: sections of its own, with claims, tables and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """A section of a report.

    Attributes:
        heading: of the section.
        claims: rows of `_landscape_claims.claim`.
        figures: name to (function that draws it, caption).
        tables: name to (rows, columns as of `report.format_table`, caption).
        notes: what to know when reading it, in sentences.
    """

    heading: str
    claims: Sequence[dict[str, Any]] = ()
    figures: Mapping[str, tuple[Callable[[], Any], str]] = field(default_factory=dict)
    tables: Mapping[str, tuple[Sequence[dict[str, Any]], Sequence[tuple], str]] = field(
        default_factory=dict
    )
    notes: Sequence[str] = ()
