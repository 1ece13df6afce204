"""The results as rows of text, for the terminal and for the report."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .evaluation import KS
from .measure import Part
from .pipeline import Results

_LOSSES = {"ranking": "the ranking loss", "contrast": "the contrastive loss"}


@dataclass(frozen=True)
class Table:
    """A title, heads, rows of text; the first column is a name, the others are numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def code_table(results: Results) -> Table:
    """Return reconstruction error, usage and entropy of each level of the codebooks."""
    quality = results.items.quality
    rows = [
        (
            f"{level + 1}",
            f"{len(book)}",
            f"{quality.relative_error[level]:.3f}",
            f"{quality.usage[level]:.1%}",
            f"{quality.entropy[level]:.2f} of {len(book).bit_length() - 1}",
        )
        for level, book in enumerate(results.items.codebooks)
    ]
    heads = ("level", "codewords", "relative error", "used", "entropy, bits")
    return Table("Codes", heads, rows)


def quality_table(results: Results) -> Table:
    """Return the metrics of both runs beside the baselines."""
    base = results.baselines
    runs = [results.runs[backend].metrics for backend in ("reference", "auto")]
    names = {
        "AUC": "AUC (baseline: item's mean rating)",
        "GAUC": f"GAUC, {runs[0]['GAUC users']:.0f} users (same baseline)",
        **{f"HR@{k}": f"HR@{k} (baseline: popularity)" for k in KS},
        **{f"HR@{k}, returning": f"HR@{k}, returning users only" for k in KS},
    }
    rows = [
        (text, *(f"{values[name]:.4f}" for values in (base, *runs))) for name, text in names.items()
    ]
    return Table("Quality on later ratings", ("", "baseline", "reference", "auto"), rows)


def speed_table(results: Results) -> Table:
    """Return time and peak memory per op and per step, and the backend that `auto` ran."""
    reference, auto = results.runs["reference"], results.runs["auto"]
    rows = []
    for part in shared_parts(results):
        times = _pair(reference.op_ms(part), auto.op_ms(part), "{:.2f}")
        bytes_ = _memory(reference.op_bytes.get(part), auto.op_bytes.get(part))
        rows.append((_name(part), "+".join(sorted(auto.backends[part])), *times, *bytes_))
    times = _pair(reference.step_ms(), auto.step_ms(), "{:.1f}")
    rows.append(("training step", "", *times, *_memory(reference.step_bytes, auto.step_bytes)))
    items = results.items
    for name, seconds in (("fit", items.fit_seconds), ("encode", items.encode_seconds)):
        times = _pair(1000 * seconds["reference"], 1000 * seconds["auto"], "{:.1f}")
        label = f"k-means {name}, all items"
        rows.append((label, items.backend, *times, "", "", ""))
    heads = ("", "ran", "ref. ms", "auto ms", "ratio", "ref. MB", "auto MB", "ratio")
    return Table("Time and peak memory per training step", heads, rows)


def shared_parts(results: Results) -> list[Part]:
    """Return what both runs have timed, each op's forward before its backward."""
    timed = [set(run.op_seconds) for run in results.runs.values()]
    return sorted(
        set.intersection(*timed), key=lambda part: (part.op, part.direction == "backward")
    )


def _name(part: Part) -> str:
    return part.op if part.direction == "forward" else f"{part.op} grad"


def _pair(reference: float, auto: float, form: str) -> tuple[str, str, str]:
    return form.format(reference), form.format(auto), f"{reference / auto:.2f}x" if auto else "-"


def _memory(reference: int | None, auto: int | None) -> tuple[str, str, str]:
    if reference is None or auto is None:
        return "-", "-", "-"
    return _pair(reference / 1e6, auto / 1e6, "{:.2f}")


def verdicts(results: Results) -> list[str]:
    """Say in sentences what the runs have shown, good or not."""
    agreement, runs = results.agreement, results.runs
    word = "agree" if agreement.holds else "DISAGREE"
    steps = len(runs["auto"].ranking)
    limits = ", ".join(
        f"{_LOSSES[name]} differs by at most {worst:.1e} (tolerance {agreement.tolerance[name]:g})"
        for name, worst in agreement.worst.items()
    )
    said = [f"The two runs {word} over {steps} steps. Relatively, {limits}."]
    if results.items.differing:
        said.append(
            f"{results.items.differing} items have other codes by auto: near ties, within rounding."
        )
    ranking, contrast = _ends(runs["auto"].ranking), _ends(runs["auto"].contrast)
    said.append(
        "From the first to the last tenth of the steps the ranking loss goes from "
        f"{ranking[0]:.4f} to {ranking[1]:.4f}, the contrastive loss from {contrast[0]:.3f} to "
        f"{contrast[1]:.3f}."
    )
    for name in ("AUC", "GAUC", "HR@50"):
        ours, base = runs["auto"].metrics[name], results.baselines[name]
        word = "above" if ours > base else "NOT above"
        said.append(f"{name} is {word} its baseline: {ours:.4f} against {base:.4f}.")
    return said


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def machine(device: torch.device) -> str:
    """Describe where the numbers come from."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads{gpu}, Python {platform.python_version()}, {platform.system()}"
    )
