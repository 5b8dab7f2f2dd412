"""Learning curves and learning rates as SVG pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_STYLES = {
    "sft_answers": ("#e67e22", "--"), "sft_reasoning": ("#e67e22", "-"), "grpo_reasoning": ("#2471a3", "-"),
    "grpo_answers": ("#2471a3", "--"), "sft_answers_once": ("#a04000", ":"), "sft_reasoning_once": ("#a04000", "-."),
}  # fmt: skip
"""Colour by method, line by reasoning."""
_SIZE_INCHES = (7.0, 4.2)


def plot_curves(path: Path, curves: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> None:
    """Validation against samples learnt from: each seed thin, the mean thick.

    Args:
        curves: label → for each seed, (samples, value) pairs at the same samples.
    """
    figure, axes = _figure("samples learnt from", "box gIoU, validation")
    for name, seeds in curves.items():
        colour, line = _STYLES[name]
        samples = [point[0] for point in seeds[0]]
        values = np.array([[point[1] for point in seed] for seed in seeds])
        for row in values:
            axes.plot(samples, row, line, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(samples, values.mean(0), line, color=colour, linewidth=2, label=name.replace("_", " "))
    axes.set_xscale("symlog", linthresh=max(1.0, min(seeds[0][1][0] for seeds in curves.values())))
    axes.legend()
    _save(figure, path)


def plot_rates(path: Path, tried: Mapping[str, Mapping[str, float]]) -> None:
    """Best validation of each run of the sweep against its learning rate.

    Args:
        tried: arm → rate → value.
    """
    figure, axes = _figure("learning rate", "box gIoU, validation, best of a short run")
    for name, values in tried.items():
        colour, line = _STYLES[name]
        rates = sorted(values, key=float)
        axes.plot(
            [float(rate) for rate in rates], [values[rate] for rate in rates], f"{line}", marker="o", color=colour,
            label=name.replace("_", " "),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.legend()
    _save(figure, path)


def _figure(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    temporary = path.with_suffix(".part")
    with rc_context({"svg.hashsalt": path.stem}):  # the same figures make the same file
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    temporary.replace(path)
