"""The look of all systems' figures, and how they become PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    """Return a figure that no window shows, inches wide and high, and its row of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure((width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(1, columns, squeeze=False)[0]


def png(paint: Callable[[Any], Any], shown: Any) -> bytes:
    """Return as PNG the figure that `paint` makes of what is shown."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        paint(shown).savefig(file, format="png", dpi=150)
    return file.getvalue()
