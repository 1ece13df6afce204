"""The report's plots, as PNG."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._plots import figure, png
from .pipeline import Results
from .table import shared_parts
from .training import differences

COLOURS = {"reference": "#8a8f98", "auto": "#c2410c"}


def plots(results: Results) -> dict[str, bytes]:
    """Draw all plots: name to PNG."""
    painted = {"codes": _codes, "losses": _losses, "times": _times}
    return {name: png(paint, results) for name, paint in painted.items()}


def _codes(results: Results) -> Any:
    """Items per codeword, most used first: an even use is a flat line."""
    drawn, axes = figure(10, 2.8, len(results.items.codebooks))
    codes = results.items.codes.cpu().long()
    for level, (axis, book) in enumerate(zip(axes, results.items.codebooks, strict=True)):
        counts = codes[:, level].bincount(minlength=len(book)).sort(descending=True).values
        axis.fill_between(
            np.arange(len(book)), counts, 0.8, step="mid", color="#0f766e", alpha=0.85
        )
        axis.axhline(len(codes) / len(book), color="black", linewidth=0.8, linestyle="--")
        axis.set(
            title=f"level {level + 1}: {int((counts > 0).sum())} of {len(book)} codewords used",
            xlabel="codeword, most used first",
            xlim=(0, len(book) - 1),
            yscale="log",
            ylim=(0.8, None),
        )
    axes[0].set_ylabel("items")
    axes[-1].text(0.98, 0.92, "dashed: even use", transform=axes[-1].transAxes, ha="right")
    return drawn


def _losses(results: Results) -> Any:
    """Both runs over each other, and their relative difference."""
    drawn, axes = figure(10, 3, 3)
    runs = results.runs
    for axis, name, title in (
        (axes[0], "ranking", "ranking loss"),
        (axes[1], "contrast", "contrastive loss"),
    ):
        for backend, run in runs.items():
            wide = backend == "reference"
            axis.plot(
                _smooth(np.array(getattr(run, name))),
                color=COLOURS[backend],
                linewidth=4 if wide else 1.2,
                alpha=0.6 if wide else 1,
                label=backend,
            )
        axis.set(title=f"{title}, moving mean", xlabel="step")
    axes[0].legend()
    for name, colour in (("ranking", "#1d4ed8"), ("contrast", "#a16207")):
        shown = np.maximum(differences(runs["reference"], runs["auto"], name), 1e-9)
        axes[2].plot(shown, label=name, color=colour, linewidth=0.8)
        limit = results.agreement.tolerance[name]
        axes[2].axhline(limit, color=colour, linestyle="--", linewidth=0.8)
    axes[2].set(
        title="relative difference; dashed: tolerances",
        xlabel="step",
        yscale="log",
        ylim=(5e-10, 1e-1),
    )
    axes[2].legend(loc="upper right", ncols=2)
    return drawn


def _smooth(values: np.ndarray) -> np.ndarray:
    window = max(1, min(20, len(values) // 10))
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _times(results: Results) -> Any:
    """Time of each op per training step, both directions, by both runs."""
    runs = results.runs
    parts = shared_parts(results)[::-1]
    drawn, (axis,) = figure(10, 0.8 + 0.42 * len(parts), 1)
    rows = np.arange(len(parts))
    for backend, shift in (("reference", 0.2), ("auto", -0.2)):
        times = [runs[backend].op_ms(part) for part in parts]
        bars = axis.barh(rows + shift, times, 0.38, color=COLOURS[backend], label=backend)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.set_yticks(rows, [f"{part.op}\n{part.direction}" for part in parts], fontsize=8)
    axis.set(xlabel="milliseconds per training step (median)")
    axis.margins(x=0.08)
    axis.grid(visible=False, axis="y")
    axis.legend(loc="lower right")
    return drawn
