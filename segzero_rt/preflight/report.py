"""The doctor's preflight: the memory plan against what is free here, and predictions for Jetson modules."""

from __future__ import annotations

from typing import Any

from segzero_rt.bundle import Bundle
from segzero_rt.engines.record import EngineRecord
from segzero_rt.errors import SegZeroError
from segzero_rt.preflight.machine import Machine
from segzero_rt.preflight.memory_plan import plan_memory
from segzero_rt.preflight.prediction import REPLY_TOKENS, predict

PREDICTION_NOTE = (
    "predicted from published figures, not measured: the least that a question can take, with a reply of "
    f"{REPLY_TOKENS} tokens, at full bandwidth and full dense 16-bit rate"
)


def plan_report(
    bundle: Bundle, machine: Machine, problems: list[str], *, with_predictions: bool
) -> dict[str, Any] | None:
    """The memory plan and whether it fits; what does not fit is added to `problems`."""
    try:
        plan = plan_memory(bundle)
        predictions = predict(bundle) if with_predictions else []
    except SegZeroError as error:
        problems.append(" ".join(str(error).split()))
        return None
    free = machine.memory_available_bytes
    fits = free is None or plan.run_bytes <= free
    if not fits:
        assert free is not None
        problems.append(
            f"expected {_mib(plan.run_bytes)} of free memory for this bundle, got {_mib(free)} (weights "
            f"{_mib(plan.policy_weights_bytes + plan.segmenter_weights_bytes)}, cache {_mib(plan.kv_cache_bytes)}); "
            "close other programs, or export it with a shorter --max-length or smaller weights"
        )
    return {
        "memory_plan": plan.as_dict(),
        "memory_available_bytes": free,
        "fits": fits,
        "build_fits": free is None or plan.build_peak_bytes <= free,
        "engines": [_engine_fit(engine, machine) for engine in bundle.manifest.engines],
        "predictions_note": PREDICTION_NOTE if with_predictions else None,
        "predictions": predictions,
    }


def plan_rows(preflight: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The report as rows to read."""
    if preflight is None:
        return []
    plan = preflight["memory_plan"]
    parts = ", ".join(
        f"{name.removesuffix('_bytes').replace('_', ' ')} {_mib(value)}"
        for name, value in plan.items()
        if name not in ("run_bytes", "build_peak_bytes")
    )
    free = preflight["memory_available_bytes"]
    rows = [
        ("memory plan", f"{_mib(plan['run_bytes'])} of {'unknown' if free is None else _mib(free)} free: {parts}"),
        ("  to build", f"{_mib(plan['build_peak_bytes'])} for `segzero build`"),
    ]
    rows += [("  engine", f"{row['file']}: {row['problem'] or 'fits this machine'}") for row in preflight["engines"]]
    if preflight["predictions"]:
        rows.append(("predictions", preflight["predictions_note"]))
    for row in preflight["predictions"]:
        memory = f"{_mib(row['needed_bytes'])} and a reserve, of {_mib(row['memory_bytes'])}"
        text = f"fits ({memory}), {row['question_ms']:.0f} ms or more" if row["fits"] else f"does not fit ({memory})"
        rows.append((f"  {row['module']}", text))
    return rows


def _engine_fit(engine: EngineRecord, machine: Machine) -> dict[str, Any]:
    """Why an engine cannot run here, as far as that can be told without loading it."""
    problem = None
    installed = machine.tensorrt.get(engine.target)
    capability = machine.gpus[0].capability if machine.gpus else None
    if capability is None:
        problem = "no CUDA device here"
    elif engine.compute_capabilities and capability not in engine.compute_capabilities:
        problem = f"built for {', '.join(engine.compute_capabilities)}, this device has {capability}"
    elif installed is None:
        problem = f"{engine.target} is not installed"
    elif installed != engine.library_version and not engine.options.get("version_compatible"):
        problem = f"built with {engine.target} {engine.library_version}, {installed} is installed"
    return {
        "file": engine.file,
        "graph": engine.graph,
        "gate": dict(engine.gate),
        "problem": problem,
    }


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
