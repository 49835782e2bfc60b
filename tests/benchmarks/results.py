"""Results of benchmarks: a figure with its goal, as a table for people and JSON for programs."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes
    ----------
    value
        None when the benchmark of this name could not be run.
    goal
        Like ">= 0.75"; None for a figure that only explains another.
    """

    name: str
    value: float | None
    unit: str
    goal: str | None = None

    @property
    def met(self) -> bool | None:
        """Tell whether the goal is met; None if there is none."""
        if self.value is None:
            return False
        if self.goal is None:
            return None
        comparison, bound = self.goal.split()
        return _COMPARE[comparison](self.value, float(bound))

    def to_json(self) -> dict[str, Any]:
        """Return the figure as bench-results.json keeps it."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "goal": self.goal,
            "met": self.met,
        }


def write_json(results: Sequence[Result], file: Path) -> None:
    """Write all results as a JSON list."""
    file.write_text(json.dumps([result.to_json() for result in results], indent=2) + "\n")


def as_table(results: Sequence[Result]) -> Table:
    """Draw all results as a table."""
    table = Table("figure")
    table.add_column("value", justify="right")
    for heading in ("unit", "goal", "met"):
        table.add_column(heading)
    marks = {True: "[green]yes", False: "[red]no", None: ""}
    for result in results:
        value = "failed" if result.value is None else f"{result.value:,.4g}"
        table.add_row(result.name, value, result.unit, result.goal or "", marks[result.met])
    return table
