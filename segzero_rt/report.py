"""Reports of an evaluation: an HTML page with the worst answers as pictures, or Markdown without pictures."""

from __future__ import annotations

import base64
import heapq
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.caption import drawable
from segzero_rt.dataset import Sample
from segzero_rt.evaluation import Record
from segzero_rt.overlay import draw_overlay
from segzero_rt.segmentation import Segmentation

SUFFIXES = (".html", ".md")
_PICTURE_SIDE_PX = 480

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


@dataclass(kw_only=True)
class Gallery:
    """Keeps the pictures of the `size` worst answers of a run, in memory that does not grow with the dataset."""

    size: int = 24
    """0 keeps and draws none."""
    _worst: list[tuple[float, int, Record, bytes, bytes]] = field(default_factory=list)
    _seen: int = 0

    def add(self, sample: Sample, record: Record, result: Segmentation | None) -> None:
        """Draws the answer if it is among the worst so far; of equals, the first stay."""
        if not self.size:
            return
        self._seen += 1
        key = (-record.iou, -self._seen)
        if len(self._worst) == self.size and key <= self._worst[0][:2]:
            return
        image_rgb = sample.image_rgb
        given = Segmentation.empty(Answer(status=AnswerStatus.MALFORMED), sample.size_hw) if result is None else result
        entry = (
            *key,
            record,
            _jpeg(draw_overlay(image_rgb, given, caption=False)),
            _jpeg(draw_overlay(image_rgb, _truth(sample), caption=False)),
        )
        (heapq.heappushpop if len(self._worst) == self.size else heapq.heappush)(self._worst, entry)

    @property
    def worst_first(self) -> list[tuple[Record, bytes, bytes]]:
        """Record, JPEG of the answer, JPEG of the truth."""
        return [
            (record, given, true) for _, _, record, given, true in sorted(self._worst, key=lambda one: one[:2])[::-1]
        ]


def render_html(summary: dict[str, Any], gallery: Gallery) -> str:
    """One self-contained page: nothing is loaded from anywhere, whatever a dataset or a model wrote."""
    facts = "".join(f"<tr><th>{html.escape(name)}</th><td class=n>{value}</td></tr>" for name, value in _facts(summary))
    kinds = "".join(
        f"<tr><td>{html.escape(drawable(kind))}</td>" + "".join(f"<td class=n>{value}</td>" for value in row) + "</tr>"
        for kind, row in _kind_rows(summary)
    )
    head = "".join(f"<th class=n>{name}</th>" for name in _KIND_COLUMNS)
    articles = "".join(_article(record, given, true) for record, given, true in gallery.worst_first)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>segzero eval</title><style>{_STYLE}</style>"
        f"<h1>segzero eval</h1><table>{facts}</table>"
        f"<h2>By kind of question</h2><table><tr><th>kind</th>{head}</tr>{kinds}</table>"
        f"<h2>Worst answers</h2>{articles}</html>\n"
    )


def render_text(summary: dict[str, Any]) -> str:
    """The tables for a terminal."""
    facts = _facts(summary)
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {value}" for name, value in facts]
    kinds = _kind_rows(summary)
    width = max(len("kind"), *(len(drawable(kind)) for kind, _ in kinds))
    for kind, row in [("kind", list(_KIND_COLUMNS)), *kinds]:
        lines.append(f"{drawable(kind):<{width}}" + "".join(f"  {value:>10}" for value in row))
    return "\n".join(lines)


def render_markdown(summary: dict[str, Any], records: Sequence[Record], *, num_worst: int = 24) -> str:
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


def _kind_rows(summary: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        (kind, [_number(row["giou"]), _number(row["ciou"]), _number(row["box_iou"]), str(row["num_samples"])])
        for kind, row in summary["by_kind"].items()
    ]


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = summary["giou_interval_95"]
    latency = summary["latency_ms"]
    return [
        ("gIoU", f"{summary['giou']:.4f} ({low:.4f} to {high:.4f})"),
        ("cIoU", _number(summary["ciou"])),
        ("box IoU", _number(summary["box_iou"])),
        ("samples", str(summary["num_samples"])),
        ("failed", str(summary["num_failed"])),
        ("answers that parse", _number(summary["parse_rate"])),
        ("no such object, said so", _number(summary["none_accuracy"])),
        ("said none, was there", _number(summary["false_none_rate"])),
        ("latency p50 / p90 / p99, ms", " / ".join(f"{latency[name]:.1f}" for name in ("p50", "p90", "p99"))),
    ]


def _article(record: Record, given: bytes, true: bytes) -> str:
    thinking = html.escape(record.error or record.thinking)
    return (
        f"<article><h3>{html.escape(record.text)}</h3>"
        f"<p>IoU {record.iou:.3f}, {html.escape(record.status)}, {html.escape(record.kind)} "
        f"<span class=dim>{html.escape(record.source)}</span></p><p class=dim>{thinking}</p>"
        f"<figure><img alt='answer' src='{_data_uri(given)}'><figcaption>answer</figcaption></figure>"
        f"<figure><img alt='truth' src='{_data_uri(true)}'><figcaption>truth</figcaption></figure></article>"
    )


def _truth(sample: Sample) -> Segmentation:
    prompts = tuple(Prompt(box_xyxy=one.box_xyxy) for one in sample.objects)
    return Segmentation(
        masks=sample.masks,
        scores=np.ones(len(prompts), np.float32),
        boxes_xyxy=sample.boxes_xyxy,
        answer=Answer(status=AnswerStatus.OK if prompts else AnswerStatus.NONE_FOUND, prompts=prompts),
    )


def _jpeg(image_rgb: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(image_rgb)
    picture.thumbnail((_PICTURE_SIDE_PX, _PICTURE_SIDE_PX))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def _number(value: float | None) -> str:
    return "no samples" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    """Text inside a Markdown table: one line, no cell or HTML of its own."""
    return html.escape(" ".join(text.split())).replace("|", "\\|")


def write_report(path: Path, summary: dict[str, Any], records: Sequence[Record], gallery: Gallery) -> str:
    """The text for `path`, whose suffix is one of `SUFFIXES`."""
    return render_html(summary, gallery) if path.suffix == ".html" else render_markdown(summary, records)
