"""`livrec-fast validate`: a modest set of the checks for every op and backend of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import click
import torch

from .checks import (
    Expected,
    check_forward,
    check_gradients,
    check_poisoned,
    check_repeat,
    check_strided,
    check_threads,
    expected,
)
from .subjects import Inputs, Subject, Target, corners, inputs_for, subjects, targets

Row = dict[str, Any]
Check = Callable[..., None]
AGREEMENT: tuple[Check, ...] = (check_forward, check_gradients)


def validate(op: str | None = None, backend: str | None = None) -> list[Row]:
    """Check every op on every backend, instruction-set level and device of this machine.

    Args:
        op: the name of the only op to check.
        backend: the name of the only backend to check.

    Returns:
        A row per op and target: op, backend, isa, device, checks (how many ran), failures (texts).

    """
    chosen = [subject for name, subject in subjects().items() if op in (None, name)]
    return [
        _row(subject, target)
        for subject in chosen
        for target in targets(subject)
        if backend in (None, target.backend)
    ]


def _row(subject: Subject, target: Target) -> Row:
    count, failures = 0, []
    for check, case, dtype in _plan(subject, target):
        label = f"{check.__name__}, {case}, {str(dtype)[6:]}"
        try:
            inputs, wanted = prepared(subject.op.name, case, dtype, target.device)
            if subject.refusal(inputs, target.backend) is None:
                count += 1
                with target.active():
                    compared = [wanted] if check in AGREEMENT else []
                    check(subject, target.backend, inputs, *compared)
        except Exception as error:  # whatever an op does wrong is a finding
            text = " ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
            failures.append(f"{label}: {text}")
    return {
        "op": subject.op.name,
        "backend": target.backend,
        "isa": target.isa,
        "device": target.device,
        "checks": count,
        "failures": failures,
    }


@cache
def prepared(
    name: str, case: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Inputs, Expected]:
    """Return the inputs of an op's corner and what is expected of every backend for them."""
    subject = subjects()[name]
    sizes = corners(subject.oracle)[case]
    inputs = inputs_for(subject.oracle, sizes, dtype, seed=seed, device=device)
    return inputs, expected(subject, inputs)


def _plan(subject: Subject, target: Target) -> Iterator[tuple[Check, str, torch.dtype]]:
    """List the checks: agreement in each dtype and corner, the rest on the typical inputs."""
    first, *others = subject.oracle.dtypes
    cases = [(case, first) for case in corners(subject.oracle)]
    for case, dtype in [*cases, *(("typical", dtype) for dtype in others)]:
        yield from ((check, case, dtype) for check in AGREEMENT)
    for check in (check_strided, check_poisoned, check_repeat):
        yield check, "typical", first
    if target.backend != "reference":  # torch's own sums may depend on the number of threads
        yield check_threads, "typical", first


def _table(rows: list[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("op", "backend", "isa", "device", "checks", "verdict", box=None, pad_edge=False)
    for row in rows:
        bad = len(row["failures"])
        verdict = Text(f"{bad} failed", "bold red") if bad else Text("ok", "green")
        cells = [row["op"], row["backend"], row["isa"] or "", row["device"], str(row["checks"])]
        table.add_row(*cells, verdict)
    return table


@click.command()
@click.option("--op", help="Check this op only.")
@click.option("--backend", help="Check this backend only.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def command(op: str | None, backend: str | None, as_json: bool) -> None:
    """Check every op against its reference on this machine."""
    if op is not None and op not in (names := list(subjects())):
        raise click.BadParameter(f"{op!r} is not one of {', '.join(names)}", param_hint="--op")
    rows = validate(op, backend)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        from rich.console import Console

        console = Console()
        console.print(_table(rows))
        for row in rows:
            for failure in row["failures"]:
                console.print(f"{row['op']} {row['backend']}: {failure}", markup=False)
    if not rows:
        raise click.ClickException("nothing to check: no such backend can run here")
    if any(row["failures"] for row in rows):
        raise click.exceptions.Exit(1)
