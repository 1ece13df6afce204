"""`livrec-fast validate`: a modest set of the checks for every op and backend of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch

from .checks import (
    check_forward,
    check_gradients,
    check_poisoned,
    check_repeat,
    check_strided,
    check_threads,
)
from .subjects import Inputs, Subject, Target, corners, inputs_for, subjects, targets

Row = dict[str, Any]
Check = Callable[[Subject, str, Inputs], None]


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
    for label, check, inputs in _plan(subject, target):
        if subject.refusal(inputs, target.backend) is not None:
            continue
        count += 1
        try:
            with target.active():
                check(subject, target.backend, inputs)
        except Exception as error:  # whatever an op does wrong is a finding
            text = " ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
            failures.append(f"{check.__name__}, {label}: {text}")
    return {
        "op": subject.op.name,
        "backend": target.backend,
        "isa": target.isa,
        "device": target.device,
        "checks": count,
        "failures": failures,
    }


def _plan(subject: Subject, target: Target) -> Iterator[tuple[str, Check, Inputs]]:
    """List the checks: agreement in each dtype and corner, the rest on the typical inputs."""
    oracle = subject.oracle
    first = oracle.dtypes[0]

    def made(case: Any, dtype: torch.dtype) -> Inputs:
        return inputs_for(oracle, case, dtype, device=target.device)

    for case, dtype in [(c, first) for c in corners(oracle)] + [
        ("typical", dtype) for dtype in oracle.dtypes[1:]
    ]:
        inputs = made(corners(oracle)[case], dtype)
        agreement: list[Check] = [check_forward, check_gradients]
        for check in agreement:
            yield f"{case}, {str(dtype)[6:]}", check, inputs
    others: list[Check] = [check_strided, check_poisoned, check_repeat]
    if target.backend != "reference":  # torch's own sums may depend on the number of threads
        others.append(check_threads)
    for check in others:
        yield "typical", check, made("typical", first)


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
