"""Pictures of a bench document: where a question's time goes, how latencies spread, how far stages are from the roof.

matplotlib draws them; it is no part of the runtime and comes with the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.errors import OutputError

if TYPE_CHECKING:  # its modules are loaded when something is drawn
    from matplotlib.axes import Axes

WATERFALL, DISTRIBUTION, ROOFLINE = "stages.png", "latency.png", "roofline.png"
_BLUE, _LIGHT, _GREY = "#2b6cb0", "#bcd4ec", "#555555"
_SEQUENCE = ("preprocess", "vision", "prefill", "decode", "parse", "mask_wait", "mask_decode", "copies_and_glue")
_COMPUTED = ("vision", "prefill", "decode", "mask_encode", "mask_decode")


def check_plotting(folder: str | None) -> None:
    """Refuses before anything is measured what would fail afterwards.

    Raises:
        OutputError: matplotlib is not installed, or `folder` is a file or cannot be made.
    """
    if folder is None:
        return
    try:
        import matplotlib  # noqa: F401 - asked for, not used yet
    except ImportError as error:
        raise OutputError(
            f"expected matplotlib to draw with, which is not installed; install 'segzero-rt[plot]' ({error})"
        ) from error
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder[:200]!r}: expected a folder to write pictures to: {error.strerror}") from error


def write_plots(document: Mapping[str, Any], folder: str) -> list[str]:
    """Draws what the document has figures for; returns the files' names.

    Raises:
        OutputError: as `check_plotting`, or the disk refuses.
    """
    check_plotting(folder)
    drawn = []
    plots: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {}
    if "stages_ms" in document:
        plots |= {WATERFALL: _waterfall, DISTRIBUTION: _distribution}
    if document.get("ceiling") and document.get("stages_apart_ms"):
        plots[ROOFLINE] = _roofline
    for name, draw in plots.items():
        _save(document, draw, Path(folder) / name)
        drawn.append(name)
    return drawn


def _save(document: Mapping[str, Any], draw: Callable[[Axes, Mapping[str, Any]], None], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, document)
    environment = document["environment"]
    machine = f"{environment['bundle']['name']} on {environment['backend']}, {environment['cpu']}"
    figure.supxlabel(f"{machine}, {environment['cores']} cores", fontsize=7, color=_GREY, x=0.99, ha="right")
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _waterfall(axes: Axes, document: Mapping[str, Any]) -> None:
    """Medians of the stages that a question waits for, one after the other; the encoder beside them."""
    stages = document["stages_ms"]
    start = 0.0
    names = [name for name in _SEQUENCE if name in stages]
    for row, name in enumerate(names):
        width = stages[name]["p50"]
        axes.barh(row, width, left=start, color=_BLUE, height=0.6)
        axes.text(start + width, row, f" {width:.1f}", va="center", fontsize=8)
        start += width
    if "mask_encode" in stages:
        width = stages["mask_encode"]["p50"]
        axes.barh(len(names), width, color=_LIGHT, height=0.6)
        axes.text(width, len(names), f" {width:.1f}", va="center", fontsize=8)
        names.append("mask_encode")
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title("A question's way, medians (light: runs beside the policy, or when waited for)", fontsize=10)


def _distribution(axes: Axes, document: Mapping[str, Any]) -> None:
    """All latencies of the single stream in order, with their percentiles."""
    took = sorted(document["end_to_end_all_ms"])
    shares = [(index + 1) / len(took) for index in range(len(took))]
    axes.step([took[0], *took], [0.0, *shares], where="post", color=_BLUE)
    for name, value in document["end_to_end_ms"].items():
        axes.axvline(value, color=_LIGHT, linewidth=1, zorder=0)
        axes.text(value, 1.03, f"{name} {value:.1f}", rotation=30, fontsize=7, va="bottom")
    axes.set_ylim(0, 1.2)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("ms from picture and question to masks")
    axes.set_ylabel("share of questions")
    axes.set_title(f"Latency of {len(took)} questions, single stream", fontsize=10)


def _roofline(axes: Axes, document: Mapping[str, Any]) -> None:
    """Operations a second over operations per byte, log-log, below what the machine was measured to do."""
    ceiling = document["ceiling"]
    peaks, work = ceiling["peaks"], ceiling["work"]
    points = {}
    for stage in _COMPUTED:
        one = work.get("token" if stage == "decode" else stage)
        took = document["stages_apart_ms"].get("token" if stage == "decode" else stage)
        if one and took and one["num_bytes"]:
            flops = sum(one["flops"].values())
            points[stage] = (flops / one["num_bytes"], flops / (took["p50"] / 1e3))
    slopes = {f"{int(size) >> 20} MiB": rate for size, rate in peaks["read_rates"].items()}
    knees = [flops / rate for flops in peaks["flops"].values() for rate in slopes.values()]
    low = 0.5 * min([x for x, _ in points.values()] + knees)
    high = 4 * max([x for x, _ in points.values()] + knees)
    roof = max(peaks["flops"].values())
    for name, rate in slopes.items():
        axes.plot([low, roof / rate], [low * rate, roof], color=_LIGHT, linewidth=1, zorder=0)
        axes.text(low, low * rate, f" {name}: {rate / 1e9:.0f} GB/s", fontsize=6, va="bottom", color=_GREY)
    for kind, flops in peaks["flops"].items():
        axes.plot([flops / max(slopes.values()), high], [flops, flops], color=_GREY, linewidth=1)
        axes.text(high, flops, f"{kind}, {flops / 1e9:.0f} G/s ", fontsize=7, ha="right", va="bottom", color=_GREY)
    for stage, (intensity, rate) in points.items():
        axes.plot(intensity, rate, "o", color=_BLUE)
        axes.annotate(stage.replace("_", " "), (intensity, rate), (5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights and cache")
    axes.set_ylabel("operations a second")
    axes.set_title("Stages below the roofs that were measured here", fontsize=10)
