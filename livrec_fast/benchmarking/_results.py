"""The files that results are kept in, one per machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._files import replacing
from ._machine import Machine
from ._run import Row

_CASE = ("op", "label", "dtype", "direction")


def read(path: Path) -> dict[str, Any]:
    """Return a results file, {"machine": ..., "rows": [...]}; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"machine": {}, "rows": []}


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Replace old rows by new ones, case by case.

    A case's rows are replaced together, even those of contestants that did not run again: a ratio
    means something only within one run.
    """
    new = list(new)
    again = {case_of(row) for row in new}
    latest = {(*case_of(row), row["contestant"]): row for row in new}
    kept = [row for row in old if case_of(row) not in again]
    return sorted([*kept, *latest.values()], key=case_of)


def case_of(row: Row) -> tuple[str, ...]:
    """Return what tells a row's case from others."""
    return tuple(row[key] for key in _CASE)


def milliseconds(value: float) -> str:
    """Write a time in three digits, or whole milliseconds."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def remarks(row: Row) -> str:
    """Say in brackets what a row notes of its contestant and of the output; "" where nothing."""
    facts = [f"{name} {value:.6g}" for name, value in row.get("facts", {}).items()]
    said = "; ".join(filter(None, [row.get("note", ""), *facts]))
    return f" ({said})" if said else ""


def floor_ms(row: Row, machine: Mapping[str, Any]) -> float:
    """Return the milliseconds below which the machine's measured rates allow no implementation."""
    copying = row["bytes"] / (1e9 * machine["copy_gb_s"])
    multiplying = row["flops"] / (1e12 * machine[f"matmul_{row['math']}_tflop_s"])
    return 1e3 * max(copying, multiplying)


def add(folder: Path, machine: Machine, rows: Iterable[Row]) -> Path:
    """Merge `rows` into the machine's file in `folder`, and return its path.

    Of the rates, the best that any run saw stays: a disturbed one would set the floor too low.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.slug}.json"
    old = read(path)
    rates = {
        name: max(rate, old["machine"].get(name, 0.0)) for name, rate in machine.measured().items()
    }
    merged = {
        "machine": {**old["machine"], **machine.describe(), **rates},
        "rows": merge(old["rows"], rows),
    }
    with replacing(path) as file:
        file.write(json.dumps(merged, indent=1).encode() + b"\n")
    return path
