"""Learning curves and learning rates as SVG pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..svg_figures import figure_with_axes, save_svg

_STYLES = {
    "sft_answers": ("#e67e22", "--"), "sft_reasoning": ("#e67e22", "-"), "grpo_reasoning": ("#2471a3", "-"),
    "grpo_answers": ("#2471a3", "--"), "sft_answers_once": ("#a04000", ":"), "sft_reasoning_once": ("#a04000", "-."),
}  # fmt: skip
"""Colour by method, line by reasoning."""


def plot_curves(path: Path, curves: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> None:
    """Validation against samples learnt from: each seed thin, the mean thick.

    Args:
        curves: label → for each seed, (samples, value) pairs at the same samples.
    """
    figure, axes = figure_with_axes("samples learnt from", "box gIoU, validation")
    for name, seeds in curves.items():
        colour, line = _STYLES[name]
        samples = [point[0] for point in seeds[0]]
        values = np.array([[point[1] for point in seed] for seed in seeds])
        for row in values:
            axes.plot(samples, row, line, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(samples, values.mean(0), line, color=colour, linewidth=2, label=name.replace("_", " "))
    axes.set_xscale("symlog", linthresh=max(1.0, min(seeds[0][1][0] for seeds in curves.values())))
    axes.legend()
    save_svg(figure, path)


def plot_rates(path: Path, tried: Mapping[str, Mapping[str, float]]) -> None:
    """Best validation of each run of the sweep against its learning rate.

    Args:
        tried: arm → rate → value.
    """
    figure, axes = figure_with_axes("learning rate", "box gIoU, validation, best of a short run")
    for name, values in tried.items():
        colour, line = _STYLES[name]
        rates = sorted(values, key=float)
        axes.plot(
            [float(rate) for rate in rates], [values[rate] for rate in rates], f"{line}", marker="o", color=colour,
            label=name.replace("_", " "),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.legend()
    save_svg(figure, path)
