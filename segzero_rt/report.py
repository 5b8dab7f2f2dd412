"""Reports of an evaluation: an HTML page with the worst answers as pictures, or Markdown without pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from segzero_rt.caption import drawable
from segzero_rt.evaluation import FAILED, Record
from segzero_rt.report_gallery import Drawing

SUFFIXES = (".html", ".md")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
article { margin: 2rem 0; border-top: 1px solid var(--line); padding-top: 1rem; }
figure { display: inline-block; margin: 0 1% 0 0; width: 48%; vertical-align: top; }
img { width: 100%; border-radius: 6px; }
figcaption, .dim { color: var(--dim); font-size: 13px; }
"""


def render_html(summary: Mapping[str, Any], records: Sequence[Record], worst: Sequence[Drawing]) -> str:
    """One self-contained page: nothing is loaded from anywhere, whatever a dataset or a model wrote.

    Args:
        summary: of `summarize`, with what the command adds.
        records: all of them; what failed is listed.
        worst: of `draw_worst`.
    """
    facts = "".join(
        f"<tr><th>{html.escape(name)}</th><td class=n>{html.escape(value)}</td></tr>" for name, value in _facts(summary)
    )
    kinds = "".join(
        f"<tr><td>{html.escape(drawable(kind))}</td>" + "".join(f"<td class=n>{value}</td>" for value in row) + "</tr>"
        for kind, row in _kind_rows(summary)
    )
    head = "".join(f"<th class=n>{name}</th>" for name in _KIND_COLUMNS)
    articles = "".join(_article(drawing) for drawing in worst)
    failures = "".join(
        f"<li>{html.escape(record.error or '')} <span class=dim>{html.escape(record.source)}</span></li>"
        for record in records
        if record.status == FAILED
    )
    failed = f"<h2>Failed, counted as IoU 0</h2><ul>{failures}</ul>" if failures else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>segzero eval</title><style>{_STYLE}</style>"
        f"<h1>segzero eval</h1><table>{facts}</table>"
        f"<h2>By kind of question</h2><table><tr><th>kind</th>{head}</tr>{kinds}</table>{failed}"
        f"<h2>Worst answers</h2>{articles}</html>\n"
    )


def render_text(summary: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    facts = _facts(summary)
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {value}" for name, value in facts]
    kinds = _kind_rows(summary)
    width = max(len("kind"), *(len(drawable(kind)) for kind, _ in kinds))
    for kind, row in [("kind", list(_KIND_COLUMNS)), *kinds]:
        lines.append(f"{drawable(kind):<{width}}" + "".join(f"  {value:>10}" for value in row))
    return "\n".join(lines)


def render_markdown(summary: Mapping[str, Any], records: Sequence[Record], *, num_worst: int = 24) -> str:
    """The tables of the page, and the worst answers in words."""
    lines = ["# segzero eval", "", "| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in _facts(summary))]
    lines += ["", f"| kind | {' | '.join(_KIND_COLUMNS)} |", "|---|" + "---:|" * len(_KIND_COLUMNS)]
    lines += [f"| {_cell(kind)} | {' | '.join(row)} |" for kind, row in _kind_rows(summary)]
    lines += ["", "## Worst answers", "", "| IoU | status | question | thinking | where |", "|---:|---|---|---|---|"]
    for record in sorted(records, key=lambda one: one.iou)[:num_worst]:
        cells = (record.status, _cell(record.text), _cell(record.error or record.thinking), _cell(record.source))
        lines.append(f"| {record.iou:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_KIND_COLUMNS = ("gIoU", "cIoU", "box IoU", "samples")


def _kind_rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        (kind, [_number(row["giou"]), _number(row["ciou"]), _number(row["box_iou"]), str(row["num_samples"])])
        for kind, row in summary["by_kind"].items()
    ]


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    latency = summary["latency_ms"]
    facts = [
        ("gIoU", _interval(summary, "giou")),
        ("cIoU", _interval(summary, "ciou")),
        ("box IoU", _number(summary["box_iou"])),
        ("boxes above IoU 0.5", _interval(summary, "box_accuracy")),
        ("points on the object", _interval(summary, "point_accuracy")),
        ("samples", str(summary["num_samples"])),
        ("pictures", str(summary["num_pictures"])),
        ("failed", str(summary["num_failed"])),
        ("answers that parse", _number(summary["parse_rate"])),
        ("no such object, said so", _number(summary["none_accuracy"])),
        ("said none, was there", _number(summary["false_none_rate"])),
        ("thinking tokens, mean", _mean_count(summary["thinking_tokens"])),
        ("reply tokens, mean", _mean_count(summary["reply_tokens"])),
        ("latency p50 / p90 / p99, ms", " / ".join(f"{latency[name]:.1f}" for name in ("p50", "p90", "p99"))),
    ]
    return [*facts, *((name.replace("_", " "), str(value)) for name, value in summary.get("scoring", {}).items())]


def _interval(summary: Mapping[str, Any], name: str) -> str:
    mean, interval = _number(summary[name]), summary[f"{name}_interval_95"]
    return mean if interval is None else f"{mean} ({interval[0]:.4f} to {interval[1]:.4f})"


def _mean_count(counts: Mapping[str, float] | None) -> str:
    return "not counted" if counts is None else f"{counts['mean']:.1f}"


def _article(drawing: Drawing) -> str:
    record = drawing.record
    thinking = html.escape(record.error or record.thinking)
    pictures = (("answer", drawing.answer_jpeg), ("truth", drawing.truth_jpeg))
    figures = "".join(
        f"<figure><img alt='{name}' src='{_data_uri(jpeg)}'><figcaption>{name}</figcaption></figure>"
        for name, jpeg in pictures
        if jpeg is not None
    )
    return (
        f"<article><h3>{html.escape(record.text)}</h3>"
        f"<p>IoU {record.iou:.3f}, {html.escape(record.status)}, {html.escape(record.kind)} "
        f"<span class=dim>{html.escape(record.source)}</span></p><p class=dim>{thinking}</p>{figures}</article>"
    )


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def _number(value: float | None) -> str:
    return "no samples" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    """Text inside a Markdown table: one line, no cell or HTML of its own."""
    return html.escape(" ".join(text.split())).replace("|", "\\|")
