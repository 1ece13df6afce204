"""The paper's figures 1, 4 and 5 by what was measured, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..._files import replacing
from .._plots import figure, png

_MEDIAN_LIFE = 40  # minutes, in the paper


def write_plots(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the figures that there are numbers for, and return their files."""
    draw = {"1": ("id-norm-by-age", _ages), "4": ("prefixes", _prefixes), "5": ("gate", _gate)}
    made = []
    for number, (name, paint) in draw.items():
        if number in found:
            made.append(folder / f"figure-{number}-{name}.png")
            with replacing(made[-1]) as out:
                out.write(png(paint, found[number]))
    return made


def _ages(found: dict[str, list[float]]) -> Any:
    """Norm of the room id's embedding over the room's age."""
    drawn, (axis,) = figure(6, 3, 1)
    there = np.asarray(found["count"]) > 0
    start, mean = np.asarray(found["start"])[there], np.asarray(found["mean"])[there]
    end = np.append(np.asarray(found["start"])[1:], np.nan)[there]
    middle = np.where(np.isnan(end), start * 1.2, (start + end) / 2)
    axis.plot(middle, mean, marker="o", markersize=3, color="#c2410c")
    axis.axvline(_MEDIAN_LIFE, color="black", linewidth=0.8, linestyle="--")
    axis.set(
        title="Norm of the room id's embedding by the room's age; dashed: 40 minutes",
        xlabel="age of the room, minutes",
        ylabel="mean norm",
        ylim=(0, None),
        xscale="symlog",
    )
    return drawn


def _prefixes(found: dict[str, Any]) -> Any:
    """Cosines of pairs that share a prefix, beside any; and the largest prefixes."""
    drawn, (left, right) = figure(10, 3, 2)
    bins = np.asarray(found["bins"])
    pair = "a live slice and a video" if found["both domains"] else "two slices"
    for name, colour, label in (
        ("within", "#0f766e", "of one two-level prefix"), ("apart", "#8a8f98", "any")
    ):  # fmt: skip
        counts = np.asarray(found[f"{name} counts"], float)
        share = counts / max(1.0, counts.sum())
        mean = f"{label}, mean {found[name]:.2f}"
        left.stairs(share, bins, fill=True, alpha=0.55, color=colour, label=mean)
    left.set(title=f"Cosine of {pair}", xlabel="cosine", ylabel="share of pairs")
    left.legend()
    rows = found["largest"][::-1]
    names = [f"({row['prefix'][0]}, {row['prefix'][1]})" for row in rows]
    place = np.arange(len(rows))
    right.barh(place + 0.2, [r["live"] for r in rows], 0.38, color="#c2410c", label="live slices")
    right.barh(place - 0.2, [r["video"] for r in rows], 0.38, color="#1d4ed8", label="videos")
    right.set_yticks(place, names, fontsize=8)
    right.set(title="Largest prefixes", xlabel="slices")
    right.legend(loc="lower right")
    return drawn


def _gate(found: dict[str, list[float]]) -> Any:
    """Weight of the id by tenths of its norm."""
    drawn, (axis,) = figure(6, 3, 1)
    mean = np.asarray(found["mean"])
    axis.bar(np.arange(len(mean)), mean, color="#1d4ed8", width=0.7)
    axis.set_xticks(np.arange(len(mean)), [f"{norm:.2f}" for norm in found["start"]], fontsize=8)
    axis.set(
        title=f"Learnable gate: the id's weight, {found['overall'][0]:.2f} on average, "
        f"slope {found['slope'][0]:+.4f} per tenth",
        xlabel="tenths of the candidates by the norm of the id's embedding (mean norm)",
        ylabel="mean weight of the id",
        ylim=(0, 1),
    )
    return drawn
