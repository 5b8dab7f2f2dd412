"""Line pictures as SVG files, which stay the same while their figures do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SIZE_INCHES = (7.0, 4.2)


def figure_with_axes(x: str, y: str) -> tuple[Any, Any]:
    """matplotlib's figure and axes, labelled, with a grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def save_svg(figure: Any, path: Path) -> None:
    """Writes to a temporary name and renames; without a date, so that the same lines make the same file."""
    from matplotlib import rc_context

    temporary = path.with_suffix(".part")
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    temporary.replace(path)
