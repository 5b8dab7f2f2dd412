"""The report of a run: one HTML page with its curves and, from the last evaluation, replies with their pictures."""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from segzero_rt.image import load_image

from .grpo_observer import BOX_GIOU, ObservedSample

_SAMPLES_PER_KIND = 3
_TRUE_COLOUR, _SAID_COLOUR = "#28b463", "#e74c3c"
_CURVES = {
    "reward": "reward, training",
    "eval_reward": "reward, validation",
    f"eval_rewards/{BOX_GIOU}/mean": "box gIoU, validation",
    "kl": "KL to the start",
    "entropy": "entropy",
    "completions/mean_length": "tokens",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
section { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; }
article { margin: 1.5rem 0; border-top: 1px solid var(--line); padding-top: 1rem; overflow: auto; }
article img { float: left; width: 320px; margin-right: 1rem; border-radius: 6px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
svg { width: 100%; } polyline { fill: none; stroke: #3498db; stroke-width: 1.5; }
.dim { color: var(--dim); font-size: 13px; }
"""


def write_report(path: Path, metrics: Sequence[dict[str, Any]], samples: Sequence[ObservedSample]) -> None:
    """Writes the page; an earlier one is replaced once the new one is whole.

    Args:
        metrics: lines of `metrics.jsonl`.
        samples: of one evaluation.
    """
    curves = "".join(_curve(title, metrics, key) for key, title in _CURVES.items())
    chosen: dict[str, list[ObservedSample]] = defaultdict(list)
    for sample in samples:
        if len(chosen[sample.kind]) < _SAMPLES_PER_KIND:
            chosen[sample.kind].append(sample)
    articles = "".join(_article(sample) for kind in sorted(chosen) for sample in chosen[kind])
    step = samples[-1].step if samples else 0
    page = (
        f"<!doctype html><meta charset=utf-8><title>GRPO, step {step}</title><style>{_STYLE}</style>"
        f"<h1>GRPO, step {step}</h1><section>{curves}</section><h2>Replies</h2>"
        f'<p class=dim>boxes: <b style="color:{_TRUE_COLOUR}">true</b>, '
        f'<b style="color:{_SAID_COLOUR}">answered</b></p>'
        f"{articles}"
    )
    temporary = path.with_suffix(".part")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _curve(title: str, metrics: Sequence[dict[str, Any]], key: str) -> str:
    points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    if not points:
        return ""
    last_step = max(step for step, _ in points) or 1
    low, high = min(value for _, value in points), max(value for _, value in points)
    scale = (high - low) or 1.0
    line = " ".join(f"{300 * step / last_step:.1f},{78 - 76 * (value - low) / scale:.1f}" for step, value in points)
    return (
        f"<figure><svg viewBox='0 0 300 80'><polyline points='{line}'/></svg><figcaption class=dim>{title}: "
        f"{points[-1][1]:.3g} ({low:.3g} to {high:.3g})</figcaption></figure>"
    )


def _article(sample: ObservedSample) -> str:
    terms = ", ".join(f"{name} {value:g}" for name, value in sample.terms.items())
    return (
        f'<article><img src="{_picture(sample)}" alt=""><b>{html.escape(sample.question)}</b> '
        f"<span class=dim>{html.escape(sample.kind)}, {sample.answer.status.value}</span>"
        f"<pre>{html.escape(sample.case.text)}</pre><p class=dim>box IoU {sample.box_iou:.2f}; {terms}</p></article>"
    )


def _picture(sample: ObservedSample) -> str:
    """The picture as the policy saw it, boxes drawn, as a data address."""
    height, width = sample.case.input_size_hw
    picture = Image.fromarray(load_image(sample.image)).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for boxes, colour in (
        ([one.box_xyxy for one in sample.case.objects], _TRUE_COLOUR),
        ([prompt.box_xyxy for prompt in sample.answer.prompts], _SAID_COLOUR),
    ):
        for box in boxes:
            draw.rectangle(box, outline=colour, width=max(2, width // 140))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
