"""The picture of a `speed_accuracy` result: median latency against gIoU, the front as a line.

python -m benchmarks.speed_accuracy_plot RESULT.json docs/speed_accuracy.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#555555"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Writes the picture: colour is the precision, shape the reply, the number the picture's side."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display
    from matplotlib.lines import Line2D

    rows = document["configurations"]
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    replies = list(dict.fromkeys(row["reply"] for row in rows))
    figure = Figure(figsize=(7.5, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    front = sorted((row for row in rows if row["on_front"]), key=lambda row: row["latency_ms"]["p50"])
    axes.plot([row["latency_ms"]["p50"] for row in front], [row["giou"] for row in front], color=_GREY, lw=1, zorder=1)
    for row in rows:
        at = row["latency_ms"]["p50"], row["giou"]
        colour = _COLOURS[precisions.index(row["precision"]) % len(_COLOURS)]
        marker = _MARKERS[replies.index(row["reply"]) % len(_MARKERS)]
        face = {"within": colour, "open": f"{colour}44"}.get(row["gate"], "none")
        axes.scatter(*at, s=34, marker=marker, facecolors=face, edgecolors=colour, zorder=2)
        axes.annotate(str(row["side"]), at, xytext=(4, 4), textcoords="offset points", fontsize=6, color=_GREY)
    legend = [
        Line2D([], [], color=_COLOURS[index % len(_COLOURS)], marker="o", ls="", label=f"{name} weights")
        for index, name in enumerate(precisions)
    ] + [
        Line2D([], [], color=_GREY, marker=_MARKERS[index % len(_MARKERS)], ls="", mfc="none", label=name)
        for index, name in enumerate(replies)
    ]
    figure.legend(handles=legend, fontsize=7, frameon=False, loc="outside right upper")
    axes.set_xlabel("median latency of one question, ms")
    axes.set_ylabel("gIoU")
    meaning = (
        f"filled: loses at most {document['gate_limit']} gIoU against {document['reference']}, "
        "pale: perhaps, hollow: more\nnumber: side of the policy's picture, line: the front"
    )
    figure.suptitle(meaning, fontsize=7, color=_GREY, x=0.01, ha="left")
    environment = document["environment"]
    told = (
        f"{environment['cpu']}, {document['cores']} cores, {rows[0]['num_samples']} questions, {document['date'][:10]}"
    )
    figure.supxlabel(told, fontsize=7, color=_GREY, x=0.99, ha="right")
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
