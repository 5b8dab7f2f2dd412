"""Draws a GRPO run: box gIoU on validation by kind of question, step by step.

python -m training.grpo_curves runs/grpo --out curves.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from segzero_rt.errors import DatasetError

from .grpo_callbacks import METRICS_NAME, STEP, read_metrics
from .grpo_observer import BOX_GIOU
from .questions import QUERY_KINDS, REASONING_KINDS
from .svg_figures import figure_with_axes, save_svg

_PREFIX = f"eval_{BOX_GIOU}/"
_ALL = f"eval_rewards/{BOX_GIOU}/mean"
_ALL_LABEL = "all questions"


def validation_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Kind of question, and `all questions` → (step, box gIoU) of every evaluation of a run.

    Raises:
        DatasetError: no metrics there, or no evaluation yet.
    """
    path = run / METRICS_NAME
    if not path.is_file():
        raise DatasetError(f"expected a GRPO run with {METRICS_NAME}, found none in {run}")
    evaluations = [line for line in read_metrics(path) if _ALL in line]
    if not evaluations:
        raise DatasetError(f"expected an evaluation in {path}, found none; it comes with the first step")
    names = {_ALL_LABEL: _ALL, **{kind: _PREFIX + kind for kind in QUERY_KINDS}}
    curves = {
        label: [(int(line[STEP]), float(line[key])) for line in evaluations if key in line]
        for label, key in names.items()
    }
    return {label: points for label, points in curves.items() if points}


def plot_validation(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Kinds that only reinforcement has boxes for are thick, the kinds that the base policy was taught thin."""
    figure, axes = figure_with_axes("optimiser steps", "box gIoU, validation")
    for label, points in curves.items():
        reinforced = label in REASONING_KINDS
        style = {"color": "#222", "linestyle": "--"} if label == _ALL_LABEL else {}
        axes.plot(*zip(*points, strict=True), label=label, linewidth=2.4 if reinforced else 1, **style)
    axes.set_ylim(0, 1)
    axes.legend(ncols=3, fontsize="small", loc="lower right")
    save_svg(figure, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw a GRPO run's box gIoU on validation by kind of question.")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    chosen = parser.parse_args(arguments)
    try:
        plot_validation(chosen.out, validation_curves(chosen.run))
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
