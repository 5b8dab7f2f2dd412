"""What `segzero bench` prints before its document: short tables, each as soon as its figures are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PERCENTILES = ("p50", "p90", "p99")


def machine(environment: Mapping[str, Any]) -> str:
    """What is measured, and on what."""
    parts = [
        f"{environment['bundle']['name']} on {environment['backend']}",
        f"{environment['cores']} cores, {environment['cpu'] or 'unknown CPU'}",
        *(f"GPU {name}" for name in environment["gpus"]),
    ]
    if environment["power_mode"]:
        parts.append(f"power mode {environment['power_mode']}")
    if environment["load_average"]:
        parts.append(f"load average {environment['load_average'][0]:g}")
    return "; ".join(parts)


def ceiling(document: Mapping[str, Any]) -> str:
    """What the machine could do at best, before anything of it is measured."""
    found = document["ceiling"]
    if found is None:
        return f"no ceiling: {document['ceiling_problem']}"
    peaks = found["peaks"]
    rates = ", ".join(f"{value / 1e9:.0f} G {kind} operations/s" for kind, value in peaks["flops"].items())
    rows = [("ceiling", "G operations", "MB", "least ms")]
    for stage, work in found["work"].items():
        flops = sum(work["flops"].values())
        least = found["stages_ms"][stage]
        rows.append((_shown(stage), f"{flops / 1e9:.3f}", f"{work['num_bytes'] / 1e6:.1f}", f"{least:.2f}"))
    return f"measured here: {rates}, {peaks['bandwidth'] / 1e9:.1f} GB/s\n{_table(rows)}"


def cold_start(document: Mapping[str, Any]) -> str:
    """Whole processes until the first answer."""
    if "problem" in document:
        return f"cold start: not measured, {document['problem']}"
    lines = []
    for name in ("evicted", "cached"):
        if (one := document[name]) is not None:
            parts = ", ".join(f"{part} {one[f'{part}_ms']:.0f}" for part in ("import", "load", "first_question"))
            lines.append(
                f"cold start, files {name}: {one['process_ms']:.0f} ms ({parts.replace('_', ' ')}), "
                f"peak {one['peak_memory_bytes'] / 1e6:.0f} MB"
            )
    return "\n".join(lines)


def single_stream(document: Mapping[str, Any]) -> str:
    """Stages in a question, stages alone with their part of the ceiling, and totals."""
    rows: list[tuple[str, ...]] = [("in a question, ms", *_PERCENTILES)]
    rows += [_percentile_row(name, row) for name, row in document["stages_ms"].items()]
    rows.append(_percentile_row("end to end", document["end_to_end_ms"]))
    alone: list[tuple[str, ...]] = [("alone, ms", *_PERCENTILES, "of ceiling")]
    for name, row in document["stages_apart_ms"].items():
        fraction = document["fraction_of_ceiling"].get(name)
        alone.append((*_percentile_row(name, row), "" if fraction is None else f"{fraction:.0%}"))
    lines = [_table(rows), _table(alone)]
    if decode := document["decode_counts"]:
        taken = f"{decode['tokens']:.1f} tokens a reply in {decode['runs']:.1f} runs of the decoder"
        lines.append(f"{taken}, {decode['accepted']:.1f} of {decode['drafted']:.1f} guesses right")
    lines.append(
        f"single stream: {document['num_questions']} questions, {document['throughput_per_s']:.2f} per second, "
        f"first {document['first_question_ms']:.0f} ms"
    )
    for source, joules in (document.get("joules_per_question") or {}).items():
        lines.append(f"energy: {joules:.3f} J a question ({source})")
    if document.get("device_peak_memory_bytes"):
        lines.append(f"device: peak {document['device_peak_memory_bytes'] / 1e6:.0f} MB in use")
    return "\n".join(lines)


def offline(row: Mapping[str, Any]) -> str:
    """Throughput with everything there."""
    return f"offline: {row['num_questions']} questions, {row['throughput_per_s']:.2f} per second"


def repeated_frame(row: Mapping[str, Any]) -> str:
    """Further questions on one picture."""
    took = " / ".join(f"{row['end_to_end_ms'][name]:.1f}" for name in _PERCENTILES)
    return f"repeated frame: {took} ms a further question (p50 / p90 / p99)"


def fixed_rate(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line for each rate."""
    table: list[tuple[str, ...]] = [
        ("fixed rate, Hz", "frames", "dropped", "answered/s", "p50 ms", "p99 ms", "first", "last", "jitter")
    ]
    for row in rows:
        jitter = "" if row["jitter_ms"] is None else f"{row['jitter_ms']['mean']:.1f}"
        numbers = (row["latency_ms"]["p50"], row["latency_ms"]["p99"], row["first_latency_ms"], row["last_latency_ms"])
        table.append(
            (
                f"{row['rate_hz']:g}",
                str(row["frames_sent"]),
                str(row["frames_dropped"]),
                f"{row['answered_hz']:.2f}",
                *(f"{value:.1f}" for value in numbers),
                jitter,
            )
        )
    return _table(table)


def _percentile_row(name: str, row: Mapping[str, float]) -> tuple[str, ...]:
    return (_shown(name), *(f"{row[key]:.2f}" for key in _PERCENTILES))


def _shown(stage: str) -> str:
    return {"token": "one token"}.get(stage, stage.replace("_", " "))


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows)
