"""One self-contained HTML file: what was done, what came out, where the data are from."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from ..._files import replacing
from . import texts
from .pipeline import Results
from .plots import plots
from .table import Table, code_table, machine, quality_table, speed_table, verdicts


def write_report(results: Results, path: Path) -> None:
    """Write the report, whole or not at all."""
    page = texts.PAGE.format(body="\n".join(_sections(results)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(page.encode())


def _sections(results: Results) -> list[str]:
    images = {name: _image(png, name) for name, png in plots(results).items()}
    codes, task, metrics = _explanations(results)
    said = "".join(f"<li>{escape(line)}</li>" for line in verdicts(results))
    failed = "" if results.agreement.holds else ' class="fail"'
    return [
        "<h1>livrec_fast demo</h1>",
        f"<small>{escape(machine(results.settings.device))}; seed {results.settings.seed}</small>",
        f"<ul{failed}>{said}</ul>",
        "<h2>Codes</h2>",
        f"<p>{codes}</p>",
        _table(code_table(results)),
        images["codes"],
        "<p>Films that share their first two codes:</p>",
        _neighbours(results),
        "<h2>Retrieval and ranking</h2>",
        f"<p>{task}</p><p>{metrics}</p>",
        _table(quality_table(results)),
        images["losses"],
        "<h2>Time and memory</h2>",
        f"<p>{texts.SPEED}</p>",
        _table(speed_table(results)),
        images["times"],
        "<h2>The run</h2>",
        f"<p>{_settings(results)}</p>",
        "<h2>Data and licences</h2>",
        f"<p>{texts.SOURCES.format(dropped=results.ratings.unmatched)}</p>",
    ]


def _explanations(results: Results) -> tuple[str, str, str]:
    """Fill in what is said of the codes, the task and the metrics."""
    quality, tested, ratings = results.items.quality, results.tested, results.ratings
    codes = texts.CODES.format(
        dim=results.items.vectors.shape[1],
        unique=quality.unique_rate,
        collisions=quality.collisions,
    )
    task = texts.TASK.format(
        share=results.settings.train_share,
        ratings=len(ratings.item),
        candidates=results.settings.candidates,
        mean=float((tested.end - tested.begin).mean()),
        longest=int(np.bincount(ratings.user).max()),
    )
    metrics = texts.METRICS.format(blocks=len(tested), items=len(ratings.titles))
    return codes, task, metrics


def _image(png: bytes, name: str) -> str:
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="scroll"><table>{row(table.heads, "th")}{rows}</table></div>'


def _neighbours(results: Results) -> str:
    lines = [
        f"<li>({first}, {second}): {escape('; '.join(titles))}</li>"
        for (first, second), titles in results.items.neighbours.items()
    ]
    return "<ul>" + "".join(lines) + "</ul>"


def _settings(results: Results) -> str:
    chosen, model = results.settings, results.settings.shape
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results.seconds.items())
    return texts.RUN.format(
        steps=chosen.steps,
        users=chosen.users,
        candidates=chosen.candidates,
        rate=chosen.learning_rate,
        dim=model.dim,
        heads=model.heads,
        head_dim=model.head_dim,
        nearest=model.nearest,
        threshold=model.false_negative,
        spent=spent,
    )
