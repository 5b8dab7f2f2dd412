"""The doctor's preflight: the memory plan against what is free here, and predictions for Jetson modules."""

from __future__ import annotations

from typing import Any

from segzero_rt.bundle import Bundle
from segzero_rt.engines.record import TARGETS, EngineRecord
from segzero_rt.errors import SegZeroError
from segzero_rt.preflight.machine import Machine
from segzero_rt.preflight.memory_plan import plan_memory
from segzero_rt.preflight.prediction import REPLY_TOKENS, predict
from segzero_rt.preflight.type_needs import CUDA_ONLY, TypeNeed, type_needs

PREDICTION_NOTE = (
    "predicted from published figures, not measured: the least that a question can take, with a reply of "
    f"{REPLY_TOKENS} tokens, at full bandwidth and full dense 16-bit rate"
)


def plan_report(
    bundle: Bundle, machine: Machine, problems: list[str], *, with_predictions: bool, backend: str = "auto"
) -> dict[str, Any] | None:
    """The memory plan, number types that devices lack, engines; what forbids running here is added to `problems`.

    Args:
        backend: the one that is to run it; a type that this device lacks is a problem where engines are asked for.
    """
    try:
        plan = plan_memory(bundle)
        needs = type_needs(bundle)
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
    types = [_type_fit(need, machine) for need in needs]
    for need, row in zip(needs, types, strict=True):
        if row["problem"] and (need.dtype in CUDA_ONLY or backend in TARGETS):
            problems.append(f"expected a device that has the types of this bundle: {row['problem']}")
    return {
        "memory_plan": plan.as_dict(),
        "memory_available_bytes": free,
        "fits": fits,
        "build_fits": free is None or plan.build_peak_bytes <= free,
        "number_types": types,
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
    for row in preflight["number_types"]:
        needed = f"engines of {', '.join(row['graphs'])} need compute capability {row['least_capability']} or newer"
        rows.append((f"  {row['dtype']}", row["problem"] or needed))
    rows += [("  engine", f"{row['file']}: {row['problem'] or 'fits this machine'}") for row in preflight["engines"]]
    if preflight["predictions"]:
        rows.append(("predictions", preflight["predictions_note"]))
    for row in preflight["predictions"]:
        memory = f"{_mib(row['needed_bytes'])} and a reserve, of {_mib(row['memory_bytes'])}"
        text = f"fits ({memory}), {row['question_ms']:.0f} ms or more" if row["fits"] else f"does not fit ({memory})"
        if row["missing_types"]:
            missing = ", ".join(row["missing_types"])
            text = f"takes no engine: compute capability {row['compute_capability']} has no {missing}"
        rows.append((f"  {row['module']}", text))
    return rows


def _type_fit(need: TypeNeed, machine: Machine) -> dict[str, Any]:
    """Why engines of these graphs cannot be built for the device here; without one, why nothing can run them."""
    capability = machine.gpus[0].capability if machine.gpus else None
    needed = f"{need} needs compute capability {need.least_capability} or newer"
    problem = None
    if capability is not None and not need.met_by(capability):
        problem = f"{needed}, this device has {capability}, so no engine can be built for it"
    elif capability is None and need.dtype in CUDA_ONLY:
        problem = f"{needed}, there is no CUDA device here, and no CPU runs it"
    if problem is not None:
        problem += "; export it again with --storage float16 or int8"
    return {
        "dtype": need.dtype,
        "graphs": list(need.graphs),
        "least_capability": need.least_capability,
        "problem": problem,
    }


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
